#include "transport/session_segment.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <set>
#include <thread>
#include <vector>

#include "transport/shared_memory.h"

namespace kvern {
namespace {

constexpr SegmentLayout kSmall{.hazard_capacity = 100, .request_ring_bytes = 1024, .reply_ring_bytes = 2048};

class SessionSegment : public ::testing::Test {
 protected:
  SessionSegment() {
    auto memory = SharedMemory::create_anonymous("kvern-test", kSmall.total_bytes());
    memory_ = std::move(memory.value());
    std::fill(memory_.bytes().begin(), memory_.bytes().end(), std::byte{0xee});
    view_ = SegmentView::create(memory_.bytes(), kSmall, 17, 99);
  }
  SharedMemory memory_;
  SegmentView view_;
};

TEST_F(SessionSegment, ClientSeesWhatTheDaemonCreated) {
  const auto client = SegmentView::attach(memory_.bytes());
  ASSERT_TRUE(client) << client.error().to_string();
  EXPECT_EQ(client->header().session_id, 17u);
  EXPECT_EQ(client->header().epoch, 99u);
  EXPECT_EQ(client->header().state.load(), static_cast<std::uint32_t>(SessionState::kLive));
  EXPECT_EQ(client->hazards().size(), 100u);
  for (const auto& hazard : client->hazards()) EXPECT_EQ(hazard.load(), 0u);
  EXPECT_EQ(client->request_ring().size(), 1024u);
  EXPECT_EQ(client->reply_ring().size(), 2048u);
}

// docs/protocol.md says where the words are.
TEST(SessionHeaderLayout, IsTheDocumentedOne) {
  EXPECT_EQ(offsetof(SessionHeader, session_id), 24u);
  EXPECT_EQ(offsetof(SessionHeader, state), 64u);
  EXPECT_EQ(offsetof(SessionHeader, daemon_sleeping), 128u);
  EXPECT_EQ(offsetof(SessionHeader, reply_sequence), 192u);
  EXPECT_EQ(offsetof(SessionHeader, client_waiting), 256u);
  EXPECT_EQ(offsetof(SessionHeader, client_heartbeat_ns), 320u);
  EXPECT_EQ(offsetof(SessionHeader, hazard_high_water), 384u);
  EXPECT_EQ(offsetof(SessionHeader, request_head), 448u);
  EXPECT_EQ(offsetof(SessionHeader, request_tail), 512u);
  EXPECT_EQ(offsetof(SessionHeader, reply_head), 576u);
  EXPECT_EQ(offsetof(SessionHeader, reply_tail), 640u);
}

TEST_F(SessionSegment, PartsLieInTheMemoryAndDoNotOverlap) {
  const auto* start = memory_.bytes().data();
  const auto* hazards = reinterpret_cast<const std::byte*>(view_.hazards().data());
  const auto* hazards_end = hazards + view_.hazards().size_bytes();
  EXPECT_GE(hazards, start + sizeof(SessionHeader));
  EXPECT_GE(view_.request_ring().data(), hazards_end);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view_.request_ring().data()) % 64, 0u);
  EXPECT_EQ(view_.reply_ring().data(), view_.request_ring().data() + 1024);
  EXPECT_EQ(view_.reply_ring().data() + 2048, start + kSmall.total_bytes());
}

TEST_F(SessionSegment, AttachRefusesForeignAndImpossibleMemory) {
  EXPECT_FALSE(SegmentView::attach(memory_.bytes().first(4095)));
  EXPECT_FALSE(SegmentView::attach(memory_.bytes().first(kSmall.total_bytes() - 1)));
  const auto refuses = [&](auto mutate) {
    SegmentView::create(memory_.bytes(), kSmall, 1, 1);
    mutate(view_.header());
    return !SegmentView::attach(memory_.bytes());
  };
  EXPECT_TRUE(refuses([](SessionHeader& header) { header.magic ^= 1; }));
  EXPECT_TRUE(refuses([](SessionHeader& header) { header.version += 1; }));
  EXPECT_TRUE(refuses([](SessionHeader& header) { header.hazard_capacity = 0; }));
  EXPECT_TRUE(refuses([](SessionHeader& header) { header.hazard_capacity = 0xffffffff; }));
  EXPECT_TRUE(refuses([](SessionHeader& header) { header.request_ring_bytes = 1025; }));
  EXPECT_TRUE(refuses([](SessionHeader& header) { header.reply_ring_bytes = 1U << 31; }));
  EXPECT_FALSE(refuses([](SessionHeader&) {}));
}

TEST_F(SessionSegment, CreateRefusesLayoutsThatDoNotFit) {
  EXPECT_THROW(SegmentView::create(memory_.bytes().first(kSmall.total_bytes() - 1), kSmall, 1, 1),
               std::invalid_argument);
  SegmentLayout odd = kSmall;
  odd.reply_ring_bytes = 3000;
  EXPECT_THROW(SegmentView::create(memory_.bytes(), odd, 1, 1), std::invalid_argument);
}

TEST_F(SessionSegment, HazardsShowTheChunkUntilCleared) {
  HazardSlots slots(view_);
  const auto slot = slots.publish(0);
  ASSERT_TRUE(slot);
  EXPECT_EQ(view_.hazards()[*slot].load(), 1u);
  slots.clear(*slot);
  EXPECT_EQ(view_.hazards()[*slot].load(), 0u);
}

TEST_F(SessionSegment, HazardsAreAllOrNothingAndBounded) {
  HazardSlots slots(view_);
  std::vector<std::uint32_t> chunks(60, 5);
  std::vector<std::uint32_t> taken(60);
  ASSERT_TRUE(slots.publish_all(chunks, taken));
  EXPECT_EQ(std::set(taken.begin(), taken.end()).size(), 60u);
  std::vector<std::uint32_t> more(60);
  EXPECT_FALSE(slots.publish_all(chunks, more));
  EXPECT_EQ(view_.used_hazards().size(), 60u);
  for (int i = 0; i < 40; ++i) EXPECT_TRUE(slots.publish(7));
  EXPECT_FALSE(slots.publish(7));
  slots.clear(taken[3]);
  EXPECT_EQ(slots.publish(8), taken[3]);
}

TEST_F(SessionSegment, ClearingTwiceOrOutsideDoesNotHandOutASlotTwice) {
  HazardSlots slots(view_);
  const auto slot = slots.publish(1);
  ASSERT_TRUE(slot);
  slots.clear(*slot);
  slots.clear(*slot);
  slots.clear(99);
  slots.clear(0xffffffff);
  EXPECT_NE(*slots.publish(1), *slots.publish(2));
}

TEST_F(SessionSegment, UsedHazardsAreBoundedWhateverTheClientSays) {
  view_.header().hazard_high_water = 0xffffffff;
  EXPECT_EQ(view_.used_hazards().size(), 100u);
}

RC_GTEST_FIXTURE_PROP(SessionSegment, EveryPublishedChunkIsVisibleBelowTheHighWaterMark, ()) {
  SegmentView::create(memory_.bytes(), kSmall, 1, 1);
  HazardSlots slots(view_);
  std::map<std::uint32_t, std::uint32_t> model;  // slot -> chunk
  const auto steps = *rc::gen::container<std::vector<std::uint32_t>>(rc::gen::inRange(0U, 1000U));
  for (const std::uint32_t step : steps) {
    if (step % 3 == 0 && !model.empty()) {
      const auto victim = std::next(model.begin(), static_cast<std::ptrdiff_t>(step % model.size()));
      slots.clear(victim->first);
      model.erase(victim);
    } else if (const auto slot = slots.publish(step)) {
      RC_ASSERT(model.emplace(*slot, step).second);
    } else {
      RC_ASSERT(model.size() == kSmall.hazard_capacity);
    }
    std::multiset<std::uint32_t> expected;
    for (const auto& [slot, chunk] : model) expected.insert(chunk + 1);
    std::multiset<std::uint32_t> seen;
    for (const auto& hazard : view_.used_hazards()) {
      if (hazard.load() != 0) seen.insert(hazard.load());
    }
    RC_ASSERT(seen == expected);
  }
}

TEST_F(SessionSegment, ThreadsNeverShareASlot) {
  constexpr int kThreads = 4;
  constexpr int kRounds = 5000;
  HazardSlots slots(view_);
  std::vector<std::thread> threads;
  std::atomic<int> collisions = 0;
  for (std::uint32_t id = 0; id < kThreads; ++id) {
    threads.emplace_back([&, id] {
      for (int round = 0; round < kRounds; ++round) {
        const auto slot = slots.publish(id);
        if (!slot || view_.hazards()[*slot].load() != id + 1) ++collisions;
        if (slot) slots.clear(*slot);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(collisions, 0);
  EXPECT_LE(view_.used_hazards().size(), static_cast<std::size_t>(kThreads));
}

}  // namespace
}  // namespace kvern
