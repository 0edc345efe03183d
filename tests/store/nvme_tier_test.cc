#include "store/nvme_tier.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/store/nvme_fixture.h"

namespace kvern {
namespace {

using testing::Answer;
using testing::BlockFault;
using testing::BlockFaults;
using testing::BlockRequest;
using testing::erase;
using testing::erase_all;
using testing::faulty;
using testing::find;
using testing::holds;
using testing::kPatienceNs;
using testing::NvmeObject;
using testing::open_tier;
using testing::read;
using testing::small_log;
using testing::TempFolder;
using testing::write;

class NvmeTierTest : public ::testing::TestWithParam<BlockIoKind> {
 protected:
  NvmeConfig config() const { return small_log(folder_.file("log"), GetParam()); }

  TempFolder folder_;
};

std::string kind_name(const ::testing::TestParamInfo<BlockIoKind>& info) {
  return info.param == BlockIoKind::kUring ? "Uring" : "Threads";
}
INSTANTIATE_TEST_SUITE_P(Io, NvmeTierTest, ::testing::Values(BlockIoKind::kUring, BlockIoKind::kThreads), kind_name);

TEST_P(NvmeTierTest, GivesBackWhatWasWritten) {
  auto tier = open_tier(config());
  EXPECT_EQ(tier->io_kind(), GetParam() == BlockIoKind::kUring ? "io_uring" : "threads");
  const NvmeObject object{.prompt = 7, .blocks = 4, .pages = 9};
  ASSERT_TRUE(write(*tier, object.object(3)));
  EXPECT_TRUE(holds(*tier, object));
  EXPECT_EQ(tier->stats().objects, 1U);
  EXPECT_EQ(tier->stats().used_bytes, object.bytes());
  EXPECT_EQ(tier->stats().capacity_bytes, 8 * (256U << 10) - kTierAlignment) << "less the superblock";
}

TEST_P(NvmeTierTest, ReadsPartsOfAnObject) {
  auto tier = open_tier(config());
  const NvmeObject object{.prompt = 7, .pages = 9};
  ASSERT_TRUE(write(*tier, object.object()));
  const AlignedBuffer buffer(2 * kTierAlignment);
  Answer<Status> answer;
  tier->read(find(*tier, object.query()), 3 * kTierAlignment, buffer.span(), {}, answer.function());
  ASSERT_TRUE(answer.get());
  const auto content = object.content();
  EXPECT_TRUE(std::ranges::equal(buffer.span(), std::span(content).subspan(3 * kTierAlignment, 2 * kTierAlignment)));
}

TEST_P(NvmeTierTest, MovesBytesFromAndToRegisteredMemoryAndWhatLiesBeside) {
  const AlignedBuffer memory(64 * kTierAlignment);
  const auto pages = [&](std::size_t first, std::size_t count) {
    return memory.span().subspan(first * kTierAlignment, count * kTierAlignment);
  };
  NvmeConfig registering = config();
  registering.io.memory = {pages(0, 32), pages(40, 24)};
  auto tier = open_tier(registering);
  const NvmeObject object{.prompt = 7, .pages = 9};
  TierObject from_memory = object.object();
  object.fill(pages(3, 9));
  from_memory.pieces = {pages(3, 9)};
  ASSERT_TRUE(write(*tier, std::move(from_memory)));
  const TierHit hit = find(*tier, object.query());
  for (const std::size_t first :
       {0U, 23U, 28U, 31U, 40U, 55U}) {  // within, at the ends of, and across what is registered
    Answer<Status> answer;
    tier->read(hit, 0, pages(first, 9), {}, answer.function());
    ASSERT_TRUE(answer.get());
    EXPECT_TRUE(std::ranges::equal(pages(first, 9), object.content())) << first;
    std::ranges::fill(pages(first, 9), std::byte{0});
  }
}

TEST_P(NvmeTierTest, APromptThatLeavesAChunkHalfwayHits) {
  auto tier = open_tier(config());
  const NvmeObject object{.prompt = 7, .blocks = 6};
  ASSERT_TRUE(write(*tier, object.object()));
  const TierHit hit = find(*tier, object.query(2));
  EXPECT_EQ(hit.blocks, 2U);
  EXPECT_EQ(hit.key, object.key()) << "the object's own key, though the prompt does not name its last block";
  EXPECT_TRUE(read(*tier, hit));
  EXPECT_EQ(find(*tier, object.query(9)).blocks, 6U) << "a longer prompt";
  CellQuery other = object.query();
  other.group = 1;
  EXPECT_EQ(find(*tier, other).bytes, 0U);
  other = object.query();
  other.namespace_id.bytes[5] = 1;
  EXPECT_EQ(find(*tier, other).bytes, 0U);
  EXPECT_EQ(find(*tier, NvmeObject{.prompt = 8}.query()).bytes, 0U);
}

TEST_P(NvmeTierTest, AnswersForTheLongestAndTheNewest) {
  auto tier = open_tier(config());
  const NvmeObject part{.prompt = 7, .blocks = 2, .pages = 2};
  const NvmeObject whole{.prompt = 7, .blocks = 4, .pages = 4};
  const NvmeObject smaller{.prompt = 7, .blocks = 4, .pages = 3, .version = 1};
  ASSERT_TRUE(write(*tier, part.object()));
  ASSERT_TRUE(write(*tier, whole.object()));
  EXPECT_TRUE(holds(*tier, whole));
  EXPECT_EQ(find(*tier, part.query()).key, whole.key());
  EXPECT_EQ(tier->stats().objects, 1U) << "nobody can ask for the shorter one any more";
  ASSERT_TRUE(write(*tier, smaller.object()));
  EXPECT_TRUE(holds(*tier, smaller));
  EXPECT_EQ(tier->stats().objects, 1U);
  tier = nullptr;
  EXPECT_TRUE(holds(*open_tier(config()), smaller));
}

TEST_P(NvmeTierTest, WhatIsKnownIsNotWrittenAgain) {
  auto tier = open_tier(config());
  const NvmeObject object{.prompt = 7};
  ASSERT_TRUE(write(*tier, object.object()));
  const auto written = tier->nvme_stats().written_bytes;
  EXPECT_TRUE(write(*tier, object.object()));
  EXPECT_EQ(tier->nvme_stats().written_bytes, written);
}

TEST_P(NvmeTierTest, IsThereAfterARestart) {
  std::vector<NvmeObject> objects;
  for (std::uint64_t prompt = 1; prompt <= 40; ++prompt) {
    objects.push_back({.prompt = prompt, .pages = static_cast<std::uint32_t>(1 + prompt % 7)});
  }
  for (std::size_t restart = 0; restart < 4; ++restart) {
    auto tier = open_tier(config());
    const auto recovery = tier->recovery(kPatienceNs);
    EXPECT_EQ(recovery->objects, restart * 10);
    EXPECT_EQ(recovery->log.damaged, 0U);
    EXPECT_EQ(recovery->log.message, "");
    for (std::size_t i = 0; i < restart * 10; ++i) EXPECT_TRUE(holds(*tier, objects[i]));
    for (std::size_t i = restart * 10; i < restart * 10 + 10; ++i) ASSERT_TRUE(write(*tier, objects[i].object()));
  }
}

TEST_P(NvmeTierTest, HashesOfAllLengthsAreKept) {
  auto tier = open_tier(config());
  for (std::size_t bytes = 1; bytes <= BlockHash::kMaxBytes; ++bytes) {
    TierObject object = NvmeObject{.prompt = bytes, .blocks = 1, .pages = 1}.object();
    object.blocks = {BlockHash(std::vector<std::uint8_t>(bytes, 0x77))};
    object.key.last_block = object.blocks.back();
    ASSERT_TRUE(write(*tier, std::move(object)));
  }
  tier = nullptr;
  tier = open_tier(config());
  for (std::size_t bytes = 1; bytes <= BlockHash::kMaxBytes; ++bytes) {
    const NvmeObject object{.prompt = bytes, .blocks = 1, .pages = 1};
    const BlockHash hash(std::vector<std::uint8_t>(bytes, 0x77));
    const TierHit hit = find(*tier, {object.namespace_id(), 0, {hash}});
    EXPECT_EQ(hit.key.last_block, hash);
    EXPECT_EQ(read(*tier, hit).value(), object.content());
  }
}

TEST_P(NvmeTierTest, TheOldestRegionIsReused) {
  auto tier = open_tier(config());
  std::vector<NvmeObject> objects;
  for (std::uint64_t prompt = 1; prompt <= 300; ++prompt) {
    objects.push_back({.prompt = prompt, .pages = static_cast<std::uint32_t>(8 + prompt % 7)});
    ASSERT_TRUE(write(*tier, objects.back().object()));
  }
  const auto check = [&](NvmeTier& each) {
    std::size_t first = 0;
    while (find(each, objects[first].query()).bytes == 0) ++first;
    EXPECT_GT(first, 200U);
    EXPECT_LT(first, 280U) << "at least five regions are full";
    for (std::size_t i = first; i < objects.size(); ++i) EXPECT_TRUE(holds(each, objects[i]));
    EXPECT_EQ(each.stats().objects, objects.size() - first);
    return first;
  };
  const std::size_t before = check(*tier);
  EXPECT_GT(tier->nvme_stats().regions_reclaimed, 10U);
  tier = nullptr;
  tier = open_tier(config());
  EXPECT_EQ(check(*tier), before);
}

TEST_P(NvmeTierTest, SeveralFilesMakeOneLog) {
  NvmeConfig two = config();
  two.files.push_back({folder_.file("log2"), 4 * two.region_bytes});
  auto tier = open_tier(two);
  EXPECT_EQ(tier->nvme_stats().regions, 12U);
  std::vector<NvmeObject> objects;
  for (std::uint64_t prompt = 1; prompt <= 50; ++prompt) {
    objects.push_back({.prompt = prompt, .pages = 10});
    ASSERT_TRUE(write(*tier, objects.back().object()));
  }
  tier = nullptr;
  std::swap(two.files[0], two.files[1]);
  tier = open_tier(two);
  for (const auto& object : objects) EXPECT_TRUE(holds(*tier, object)) << "in whatever order they are named";
}

TEST_P(NvmeTierTest, ErasedObjectsStayAway) {
  const NvmeObject gone{.prompt = 1}, kept{.prompt = 2}, back{.prompt = 3, .pages = 2};
  const NvmeObject other{.prompt = 1, .namespace_number = 2}, third{.prompt = 1, .namespace_number = 3};
  auto tier = open_tier(config());
  for (const auto& object : {gone, kept, back, other, third}) ASSERT_TRUE(write(*tier, object.object()));
  ASSERT_TRUE(erase(*tier, gone.key()));
  ASSERT_TRUE(erase(*tier, back.key()));
  ASSERT_TRUE(write(*tier, back.object()));
  ASSERT_TRUE(erase_all(*tier, other.namespace_id()));
  ASSERT_TRUE(erase(*tier, NvmeObject{.prompt = 99}.key())) << "nothing to erase is no error";
  const auto check = [&](NvmeTier& each) {
    EXPECT_EQ(find(each, gone.query()).bytes, 0U);
    EXPECT_EQ(find(each, other.query()).bytes, 0U);
    for (const auto& object : {kept, back, third}) EXPECT_TRUE(holds(each, object));
    EXPECT_EQ(each.stats().objects, 3U);
  };
  check(*tier);
  tier = nullptr;
  tier = open_tier(config());
  check(*tier);
  ASSERT_TRUE(erase_all(*tier, NamespaceSet::all()));
  EXPECT_EQ(tier->stats().objects, 0U);
  EXPECT_EQ(tier->stats().used_bytes, 0U);
  tier = nullptr;
  EXPECT_EQ(open_tier(config())->stats().objects, 0U);
}

TEST_P(NvmeTierTest, WhatATenantHasIsListedAndErasedForGood) {
  const NvmeObject sample;
  TierObject mine = NvmeObject{.prompt = 1}.object(), mine_too = NvmeObject{.prompt = 2}.object();
  mine_too.key.namespace_id.bytes.back() = 7;  // another namespace of the tenant
  const TierObject foreign = NvmeObject{.prompt = 3, .namespace_number = 9}.object();
  const NamespaceSet tenant = NamespaceSet::of_tenant(mine.key.namespace_id);
  const auto list = [&](Tier& tier, const NamespaceSet& namespaces) {
    std::set<std::string> keys;
    Answer<Status> answer;
    tier.list(
        namespaces,
        [&](const std::vector<TierHit>& hits) {
          for (const auto& hit : hits) {
            EXPECT_EQ(hit.bytes, sample.bytes());
            keys.insert(hit.key.to_string());
          }
        },
        answer.function());
    EXPECT_TRUE(answer.get());
    return keys;
  };
  auto tier = open_tier(config());
  for (const auto& object : {mine, mine_too, foreign}) ASSERT_TRUE(write(*tier, object));
  const std::set<std::string> both{mine.key.to_string(), mine_too.key.to_string()};
  EXPECT_EQ(list(*tier, tenant), both);
  EXPECT_EQ(list(*tier, mine.key.namespace_id), std::set<std::string>{mine.key.to_string()});
  EXPECT_EQ(list(*tier, NamespaceSet::all()).size(), 3U);
  ASSERT_TRUE(erase_all(*tier, tenant));
  EXPECT_EQ(list(*tier, NamespaceSet::all()), std::set<std::string>{foreign.key.to_string()});
  tier = nullptr;
  tier = open_tier(config());
  EXPECT_EQ(list(*tier, NamespaceSet::all()), std::set<std::string>{foreign.key.to_string()});
}

TEST_P(NvmeTierTest, AnObjectThatIsErasedWhileItIsWrittenIsGone) {
  const NvmeObject object{.prompt = 1};
  auto tier = open_tier(config());
  Answer<Status> written, erased;
  tier->write(object.object(), written.function());
  tier->erase({object.key()}, erased.function());
  EXPECT_TRUE(written.get());
  EXPECT_TRUE(erased.get());
  EXPECT_EQ(find(*tier, object.query()).bytes, 0U);
}

TEST_P(NvmeTierTest, ObjectsThatWereReadAreWrittenAgainBeforeTheirRegionIsReused) {
  NvmeConfig with_rewrites = config();
  with_rewrites.rewrite_share = 0.5;
  auto tier = open_tier(with_rewrites);
  const NvmeObject wanted{.prompt = 1'000'000, .pages = 4};
  ASSERT_TRUE(write(*tier, wanted.object()));
  ASSERT_TRUE(write(*tier, NvmeObject{.prompt = 1'000'001, .pages = 4}.object()));
  for (std::uint64_t prompt = 1; prompt <= 400; ++prompt) {
    ASSERT_TRUE(write(*tier, NvmeObject{.prompt = prompt, .pages = 8}.object()));
    ASSERT_TRUE(holds(*tier, wanted)) << prompt;
  }
  EXPECT_EQ(find(*tier, NvmeObject{.prompt = 1'000'001}.query()).bytes, 0U) << "nobody had asked for it";
  EXPECT_GT(tier->nvme_stats().rewritten_bytes, 0U);
  tier = nullptr;
  EXPECT_TRUE(holds(*open_tier(with_rewrites), wanted));
}

TEST_P(NvmeTierTest, AReadUnderWayKeepsItsRegion) {
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(config(), faulty(faults));
  const NvmeObject object{.prompt = 1, .pages = 8};
  ASSERT_TRUE(write(*tier, object.object()));
  const TierHit hit = find(*tier, object.query());
  faults->set(
      [](const BlockRequest& request) { return BlockFault{.hold = request.kind == BlockRequest::Kind::kRead}; });
  const AlignedBuffer buffer(hit.bytes);
  Answer<Status> done;
  tier->read(hit, 0, buffer.span(), {}, done.function());
  faults->wait_held(1);
  // Twice around: the first region cannot be reused before the read has ended.
  std::vector<Answer<Status>> written(80);
  for (std::uint64_t i = 0; i < written.size(); ++i) {
    tier->write(NvmeObject{.prompt = 2 + i, .pages = 12}.object(), written[i].function());
  }
  EXPECT_TRUE(written[30].get());
  EXPECT_FALSE(written.back().ready());
  EXPECT_FALSE(done.ready());
  faults->release();
  ASSERT_TRUE(done.get());
  EXPECT_TRUE(std::ranges::equal(buffer.span(), object.content()));
  for (auto& each : written) {
    if (&each == &written[30]) continue;
    EXPECT_TRUE(each.get());
  }
  EXPECT_EQ(find(*tier, object.query()).bytes, 0U);
}

TEST_P(NvmeTierTest, QueuedReadsCanBeCancelled) {
  NvmeConfig one_read = config();
  one_read.io.read_depth = 1;
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(one_read, faulty(faults));
  const NvmeObject object{.prompt = 1, .pages = 8};
  ASSERT_TRUE(write(*tier, object.object()));
  const TierHit hit = find(*tier, object.query());
  std::stop_source stop;
  stop.request_stop();
  const AlignedBuffer buffer(hit.bytes);
  Answer<Status> done;
  tier->read(hit, 0, buffer.span(), stop.get_token(), done.function());
  EXPECT_EQ(done.get().code(), Code::kExpired);
  EXPECT_TRUE(holds(*tier, object)) << "a cancelled read says nothing about the object";
}

TEST_P(NvmeTierTest, WritesThatHaveNotBegunEndWithTheTier) {
  NvmeConfig slow = config();
  slow.batch_age_ns = kPatienceNs;
  auto tier = open_tier(slow);
  std::vector<Answer<Status>> answers(3);
  tier->write(NvmeObject{.prompt = 1}.object(), answers[0].function());
  tier->erase({NvmeObject{.prompt = 2}.key()}, answers[1].function());
  tier->erase_all(NamespaceSet::all(), answers[2].function());
  tier = nullptr;
  for (auto& answer : answers) EXPECT_EQ(answer.get().code(), Code::kUnavailable);
}

TEST_P(NvmeTierTest, DrainWaitsForWhatWasAccepted) {
  NvmeConfig slow = config();
  slow.batch_age_ns = kPatienceNs;
  auto tier = open_tier(slow);
  const NvmeObject object{.prompt = 1};
  Answer<Status> written;
  tier->write(object.object(), written.function());
  EXPECT_EQ(tier->stats().queued_bytes, object.bytes());
  EXPECT_TRUE(tier->drain(kPatienceNs));
  EXPECT_TRUE(written.get());
  EXPECT_EQ(tier->stats().queued_bytes, 0U);
  tier = nullptr;
  EXPECT_TRUE(holds(*open_tier(config()), object));
}

// ---- bounds

TEST(NvmeTier, RefusesWhatItCannotTake) {
  TempFolder folder;
  auto faults = std::make_shared<BlockFaults>();
  NvmeConfig config = small_log(folder.file("log"));
  config.write_queue_bytes = 64 * kTierAlignment;
  auto tier = open_tier(config, faulty(faults));
  EXPECT_EQ(write(*tier, NvmeObject{.prompt = 1, .pages = 64}.object()).code(), Code::kRefused) << "no region has room";
  EXPECT_TRUE(write(*tier, NvmeObject{.prompt = 1, .pages = 60}.object()));

  faults->set(
      [](const BlockRequest& request) { return BlockFault{.hold = request.kind == BlockRequest::Kind::kWrite}; });
  Answer<Status> first, second;
  tier->write(NvmeObject{.prompt = 2, .pages = 40}.object(), first.function());
  EXPECT_EQ(write(*tier, NvmeObject{.prompt = 3, .pages = 30}.object()).code(), Code::kBusy) << "the queue is full";
  tier->write(NvmeObject{.prompt = 4, .pages = 24}.object(), second.function());
  faults->release();
  EXPECT_EQ(first.get().to_string(), "ok");
  EXPECT_EQ(second.get().to_string(), "ok");
}

TEST(NvmeTier, SparesTheFlash) {
  TempFolder folder;
  ManualClock clock;
  NvmeConfig config = small_log(folder.file("log"));
  config.write_bytes_per_second = 4 * kTierAlignment;
  config.write_burst_bytes = 8 * kTierAlignment;
  auto tier = open_tier(config, open_block_io, clock);
  EXPECT_TRUE(write(*tier, NvmeObject{.prompt = 1, .pages = 8}.object()));
  EXPECT_EQ(write(*tier, NvmeObject{.prompt = 2, .pages = 1}.object()).code(), Code::kRefused);
  clock.advance(std::chrono::seconds(1));
  EXPECT_TRUE(write(*tier, NvmeObject{.prompt = 2, .pages = 6}.object()));
  clock.advance(std::chrono::milliseconds(400));
  EXPECT_EQ(write(*tier, NvmeObject{.prompt = 3, .pages = 1}.object()).code(), Code::kRefused) << "paid for afterwards";
  clock.advance(std::chrono::milliseconds(200));
  EXPECT_TRUE(write(*tier, NvmeObject{.prompt = 3, .pages = 1}.object()));
}

TEST(NvmeTier, LetsGoOfMemoryWhenTheDeviceHangs) {
  TempFolder folder;
  ManualClock clock;
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(small_log(folder.file("log")), faulty(faults), clock);
  ASSERT_TRUE(write(*tier, NvmeObject{.prompt = 3}.object())) << "opens a region";
  faults->set(
      [](const BlockRequest& request) { return BlockFault{.hold = request.kind == BlockRequest::Kind::kWrite}; });
  Answer<Status> begun, queued;
  TierObject waiting = NvmeObject{.prompt = 2}.object();
  const std::weak_ptr<const void> memory = waiting.hold;
  tier->write(NvmeObject{.prompt = 1}.object(), begun.function());
  faults->wait_held(1);
  tier->write(std::move(waiting), queued.function());
  clock.advance(std::chrono::seconds(30));
  EXPECT_EQ(queued.get().code(), Code::kBusy);
  EXPECT_TRUE(memory.expired());
  faults->release();
  EXPECT_TRUE(begun.get());
}

TEST(NvmeTier, ReadsDoNotWaitBehindWrites) {
  TempFolder folder;
  auto faults = std::make_shared<BlockFaults>();
  NvmeConfig config = small_log(folder.file("log"));
  config.io.write_depth = 1;
  auto tier = open_tier(config, faulty(faults));
  const NvmeObject object{.prompt = 1};
  ASSERT_TRUE(write(*tier, object.object()));
  faults->set(
      [](const BlockRequest& request) { return BlockFault{.hold = request.kind == BlockRequest::Kind::kWrite}; });
  std::vector<Answer<Status>> written(20);
  for (std::uint64_t i = 0; i < written.size(); ++i) {
    tier->write(NvmeObject{.prompt = 2 + i}.object(), written[i].function());
  }
  faults->wait_held(1);
  EXPECT_TRUE(holds(*tier, object)) << "though no write moves";
  faults->release();
  for (auto& each : written) EXPECT_TRUE(each.get());
}

TEST(NvmeTier, BoundsTheBytesOfReads) {
  TempFolder folder;
  auto faults = std::make_shared<BlockFaults>();
  NvmeConfig config = small_log(folder.file("log"));
  config.read_queue_bytes = 10 * kTierAlignment;
  auto tier = open_tier(config, faulty(faults));
  const NvmeObject object{.prompt = 1, .pages = 6};
  ASSERT_TRUE(write(*tier, object.object()));
  const TierHit hit = find(*tier, object.query());
  faults->set([](const BlockRequest&) { return BlockFault{.hold = true}; });
  const AlignedBuffer buffer(hit.bytes);
  Answer<Status> first;
  tier->read(hit, 0, buffer.span(), {}, first.function());
  EXPECT_EQ(read(*tier, hit).error().code(), Code::kBusy);
  faults->release();
  EXPECT_TRUE(first.get());
  EXPECT_TRUE(holds(*tier, object));
}

// ---- trouble of the device

TEST(NvmeTier, AnUnreadableObjectIsDropped) {
  TempFolder folder;
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(small_log(folder.file("log")), faulty(faults));
  const NvmeObject lost{.prompt = 1}, kept{.prompt = 2}, swapped{.prompt = 3};
  for (const auto& object : {lost, kept, swapped}) ASSERT_TRUE(write(*tier, object.object()));
  faults->set([](const BlockRequest& request) {
    return BlockFault{.error = request.kind == BlockRequest::Kind::kRead ? EIO : 0};
  });
  EXPECT_EQ(read(*tier, find(*tier, lost.query())).error().code(), Code::kInternal);
  EXPECT_EQ(find(*tier, lost.query()).bytes, 0U);
  faults->set([](const BlockRequest& request) {
    return BlockFault{.most_bytes = kTierAlignment, .corrupt = request.kind == BlockRequest::Kind::kRead};
  });
  EXPECT_EQ(read(*tier, find(*tier, swapped.query())).error().code(), Code::kCorrupt) << "its first page is another";
  EXPECT_EQ(find(*tier, swapped.query()).bytes, 0U);
  faults->set(nullptr);
  EXPECT_TRUE(holds(*tier, kept));
  EXPECT_EQ(tier->nvme_stats().unreadable, 2U);
  EXPECT_TRUE(write(*tier, lost.object()));
  EXPECT_TRUE(holds(*tier, lost));
}

TEST(NvmeTier, ShortReadsAndWritesAreContinued) {
  TempFolder folder;
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(small_log(folder.file("log")), faulty(faults));
  // Not a whole number of blocks either.
  faults->set([](const BlockRequest&) { return BlockFault{.most_bytes = 2 * kTierAlignment}; });
  for (std::uint64_t prompt = 1; prompt <= 60; ++prompt) {
    const NvmeObject object{.prompt = prompt, .pages = 9};
    ASSERT_TRUE(write(*tier, object.object()));
    ASSERT_TRUE(holds(*tier, object));
  }
}

struct FailedWrite {
  const char* name;
  int error;
  bool (*hits)(const BlockRequest&);
};

class NvmeFailedWriteTest : public ::testing::TestWithParam<FailedWrite> {};

bool is_data(const BlockRequest& request) {
  return request.kind == BlockRequest::Kind::kWrite && !request.through && request.bytes == 12 * kTierAlignment;
}
bool is_sync(const BlockRequest& request) { return request.kind == BlockRequest::Kind::kSync; }
bool is_record(const BlockRequest& request) { return request.kind == BlockRequest::Kind::kWrite && request.through; }

INSTANTIATE_TEST_SUITE_P(Steps, NvmeFailedWriteTest,
                         ::testing::Values(FailedWrite{"Data", EIO, is_data}, FailedWrite{"NoSpace", ENOSPC, is_data},
                                           FailedWrite{"Flush", EIO, is_sync}, FailedWrite{"Record", EIO, is_record}),
                         [](const auto& each) { return std::string(each.param.name); });

// One request in four fails; the log goes on in other regions, and what was acknowledged is there, then and later.
TEST_P(NvmeFailedWriteTest, FailsItsObjectsAlone) {
  TempFolder folder;
  NvmeConfig config = small_log(folder.file("log"));
  config.files[0].bytes = 64 * config.region_bytes;
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(config, faulty(faults));
  // Without a period: headers of regions are through, too, and every fourth request could be one of them.
  const auto count = std::make_shared<std::uint32_t>(0);
  faults->set([count](const BlockRequest& request) {
    const bool fails = GetParam().hits(request) && (++*count * 0x9e3779b1U) >> 30U == 0;
    return BlockFault{.error = fails ? GetParam().error : 0};
  });
  std::vector<NvmeObject> objects;
  std::vector<Answer<Status>> answers(60);
  for (std::uint64_t i = 0; i < answers.size(); ++i) {
    objects.push_back({.prompt = i + 1, .pages = 12});
    tier->write(objects.back().object(), answers[i].function());
    if (i % 3 > 0) continue;
    EXPECT_TRUE(tier->drain(kPatienceNs));
  }
  ASSERT_TRUE(tier->drain(kPatienceNs));
  std::vector<NvmeObject> good;
  std::size_t bad = 0;
  for (std::size_t i = 0; i < answers.size(); ++i) {
    if (answers[i].get()) {
      good.push_back(objects[i]);
    } else {
      ++bad;
      EXPECT_EQ(find(*tier, objects[i].query()).bytes, 0U);
    }
  }
  EXPECT_GT(bad, 0U);
  EXPECT_GT(good.size(), 20U);
  EXPECT_EQ(tier->nvme_stats().failed_writes, bad);
  for (const auto& object : good) EXPECT_TRUE(holds(*tier, object));
  tier = nullptr;
  tier = open_tier(config);
  for (const auto& object : good) EXPECT_TRUE(holds(*tier, object)) << "after a restart";
  for (const auto& object : objects) {
    if (find(*tier, object.query()).bytes == 0) continue;
    EXPECT_TRUE(holds(*tier, object)) << "never wrong bytes";
  }
}

TEST(NvmeTier, ADeviceThatTakesNothingFailsWritesAndKeepsReading) {
  TempFolder folder;
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(small_log(folder.file("log")), faulty(faults));
  const NvmeObject object{.prompt = 1};
  ASSERT_TRUE(write(*tier, object.object()));
  faults->set([](const BlockRequest& request) {
    return BlockFault{.error = request.kind == BlockRequest::Kind::kRead ? 0 : EROFS};
  });
  EXPECT_EQ(write(*tier, NvmeObject{.prompt = 2}.object()).code(), Code::kInternal);
  EXPECT_EQ(erase(*tier, NvmeObject{.prompt = 3}.key()).code(), Code::kInternal);
  EXPECT_TRUE(holds(*tier, object));
  EXPECT_EQ(erase(*tier, object.key()).code(), Code::kInternal) << "not for good";
  EXPECT_EQ(find(*tier, object.query()).bytes, 0U) << "but for now";
}

/// Writes objects until all regions have been used; returns those that are found.
std::vector<NvmeObject> fill_all_regions(NvmeTier& tier) {
  std::vector<NvmeObject> objects;
  for (std::uint64_t prompt = 1; tier.nvme_stats().regions_reclaimed < 2; ++prompt) {
    objects.push_back({.prompt = prompt, .pages = 12});
    EXPECT_TRUE(write(tier, objects.back().object()));
  }
  std::erase_if(objects, [&](const NvmeObject& each) { return find(tier, each.query()).bytes == 0; });
  EXPECT_GT(objects.size(), 20U);
  return objects;
}

TEST(NvmeTier, ADeviceThatTakesNothingForLongCostsNothingThatIsOnIt) {
  TempFolder folder;
  const NvmeConfig config = small_log(folder.file("log"));
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(config, faulty(faults));
  const std::vector<NvmeObject> objects = fill_all_regions(*tier);
  faults->set([](const BlockRequest& request) {
    return BlockFault{.error = request.kind == BlockRequest::Kind::kRead ? 0 : ENOSPC};
  });
  for (std::uint64_t prompt = 1000; prompt < 1100; ++prompt) {
    EXPECT_FALSE(write(*tier, NvmeObject{.prompt = prompt, .pages = 12}.object()));
  }
  for (const auto& object : objects) EXPECT_TRUE(holds(*tier, object));
  tier = nullptr;
  tier = open_tier(config);
  for (const auto& object : objects) EXPECT_TRUE(holds(*tier, object)) << "after a restart";
  // It goes on where it was: the oldest region gives way, and no other.
  const std::uint64_t reclaimed = tier->nvme_stats().regions_reclaimed;
  EXPECT_TRUE(write(*tier, NvmeObject{.prompt = 2000, .pages = 12}.object()));
  EXPECT_LE(tier->nvme_stats().regions_reclaimed, reclaimed + 1);
  EXPECT_TRUE(holds(*tier, objects.back()));
}

TEST(NvmeTier, AMediumThatCannotBeReadAtTheStartRefusesWrites) {
  TempFolder folder;
  auto faults = std::make_shared<BlockFaults>();
  faults->set([](const BlockRequest&) { return BlockFault{.error = EIO}; });
  auto tier = open_tier(small_log(folder.file("log")), faulty(faults));
  EXPECT_EQ(tier->recovery(kPatienceNs)->status.code(), Code::kInternal);
  EXPECT_EQ(write(*tier, NvmeObject{.prompt = 1}.object()).code(), Code::kInternal);
  EXPECT_EQ(erase(*tier, NvmeObject{.prompt = 1}.key()).code(), Code::kInternal);
  EXPECT_EQ(find(*tier, NvmeObject{.prompt = 1}.query()).bytes, 0U);
}

// The header that could not be written leaves the one of the region's former life in its place.
TEST(NvmeTier, ARegionThatCouldNotBeReusedDoesNotComeBack) {
  TempFolder folder;
  const NvmeConfig config = small_log(folder.file("log"));
  auto faults = std::make_shared<BlockFaults>();
  auto tier = open_tier(config, faulty(faults));
  std::uint64_t prompt = 1;
  // Two objects in a region: the next one opens the ninth.
  for (; prompt <= 16; ++prompt) ASSERT_TRUE(write(*tier, NvmeObject{.prompt = prompt, .pages = 25}.object()));
  faults->set([](const BlockRequest& request) {
    return BlockFault{
        .error = request.through && request.bytes == kTierAlignment && request.offset == kTierAlignment ? EIO : 0};
  });
  const NvmeObject last{.prompt = prompt, .pages = 25};
  ASSERT_TRUE(write(*tier, last.object())) << "in the region behind it";
  for (std::uint64_t gone = 1; gone <= 4; ++gone) {
    EXPECT_EQ(find(*tier, NvmeObject{.prompt = gone}.query()).bytes, 0U);
  }
  tier = nullptr;
  tier = open_tier(config);
  for (std::uint64_t gone = 1; gone <= 4; ++gone) {
    EXPECT_EQ(find(*tier, NvmeObject{.prompt = gone}.query()).bytes, 0U) << gone;
  }
  EXPECT_TRUE(holds(*tier, last));
  EXPECT_TRUE(holds(*tier, {.prompt = 5, .pages = 25}));
}

// ---- opening

void overwrite(const std::string& path, std::uint64_t offset, const std::string& bytes) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::string refusal(const NvmeConfig& config) {
  try {
    NvmeTier tier(config, Clock::system(), nullptr);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

TEST(NvmeTier, StartsEmptyOnALogOfAnotherVersionAndSaysSo) {
  TempFolder folder;
  const NvmeConfig config = small_log(folder.file("log"));
  const NvmeObject object{.prompt = 1};
  ASSERT_TRUE(write(*open_tier(config), object.object()));
  overwrite(config.files[0].path, 8, std::string("\x63\0\0\0", 4));
  auto tier = open_tier(config);
  EXPECT_NE(tier->recovery(kPatienceNs)->log.message.find("another version"), std::string::npos);
  EXPECT_EQ(find(*tier, object.query()).bytes, 0U);
  EXPECT_TRUE(write(*tier, object.object()));
  tier = nullptr;
  tier = open_tier(config);
  EXPECT_TRUE(holds(*tier, object));
  EXPECT_EQ(tier->recovery(kPatienceNs)->log.message, "");
}

// Behind a damaged record others may stand that were written before the damage. What is written in its place must not
// lead to them.
TEST(NvmeTier, RecordsBehindADamagedOneAreNotTakenUpAgain) {
  TempFolder folder;
  const NvmeConfig config = small_log(folder.file("log"));
  std::vector<NvmeObject> objects;
  for (std::uint64_t prompt = 1; prompt <= 4; ++prompt) objects.push_back({.prompt = prompt, .pages = 3});
  auto tier = open_tier(config);
  for (std::size_t i = 0; i < 3; ++i) ASSERT_TRUE(write(*tier, objects[i].object()));
  tier = nullptr;
  // Superblock, header of the region, record and data of the first batch.
  overwrite(config.files[0].path, (1 + 1 + 4) * kTierAlignment + 20, "damage");
  tier = open_tier(config);
  EXPECT_TRUE(holds(*tier, objects[0]));
  EXPECT_EQ(tier->stats().objects, 1U);
  ASSERT_TRUE(write(*tier, objects[3].object()));
  tier = nullptr;
  tier = open_tier(config);
  EXPECT_TRUE(holds(*tier, objects[3]));
  EXPECT_EQ(tier->stats().objects, 2U);
}

TEST(NvmeTier, StartsEmptyOnADamagedSuperblockOrAnotherCutAndSaysSo) {
  TempFolder folder;
  NvmeConfig config = small_log(folder.file("log"));
  ASSERT_TRUE(write(*open_tier(config), NvmeObject{.prompt = 1}.object()));
  overwrite(config.files[0].path, 20, "x");
  auto tier = open_tier(config);
  EXPECT_NE(tier->recovery(kPatienceNs)->log.message.find("damaged"), std::string::npos);
  EXPECT_EQ(tier->stats().objects, 0U);
  ASSERT_TRUE(write(*tier, NvmeObject{.prompt = 1}.object()));
  tier = nullptr;
  config.region_bytes *= 2;
  tier = open_tier(config);
  EXPECT_NE(tier->recovery(kPatienceNs)->log.message.find("another size"), std::string::npos);
  EXPECT_EQ(tier->stats().objects, 0U);
}

TEST(NvmeTier, RefusesWhatIsNotALog) {
  TempFolder folder;
  const NvmeConfig config = small_log(folder.file("log"));
  std::ofstream(config.files[0].path) << "letters from my grandmother";
  EXPECT_NE(refusal(config).find("holds something else"), std::string::npos);
  std::string first_line;
  std::getline(std::ifstream(config.files[0].path), first_line);
  EXPECT_EQ(first_line, "letters from my grandmother");
}

TEST(NvmeTier, RefusesAFileThatAnotherUses) {
  TempFolder folder;
  NvmeConfig config = small_log(folder.file("log"));
  const auto tier = open_tier(config);
  config.lock_wait_ns = 0;
  EXPECT_NE(refusal(config).find("another process uses it"), std::string::npos);
}

TEST(NvmeTier, RefusesWhenThereIsNoRoom) {
  TempFolder folder;
  NvmeConfig config = small_log(folder.file("log"));
  config.region_bytes = std::uint64_t{1} << 34;
  config.files[0].bytes = std::uint64_t{1} << 43;
  EXPECT_NE(refusal(config).find("no room"), std::string::npos);
  EXPECT_NE(::access(config.files[0].path.c_str(), F_OK), 0) << "nothing is left behind";
  config.files[0].path = folder.file("missing/log");
  EXPECT_NE(refusal(config).find("No such file"), std::string::npos);
}

TEST(NvmeTier, SmallFilesHaveSmallRegions) {
  NvmeConfig config;
  EXPECT_EQ(config.validate().code(), Code::kInvalid) << "no files";
  config.files = {{"a", std::uint64_t{1} << 40}, {"b", std::uint64_t{1} << 33}};
  EXPECT_EQ(config.resolved().region_bytes, NvmeConfig::kRegionBytes);
  config.files[1].bytes = std::uint64_t{1} << 30;
  EXPECT_EQ(config.resolved().region_bytes, std::uint64_t{64} << 20);
  EXPECT_TRUE(config.validate());
  config.files[0].bytes = std::uint64_t{100} << 40;
  EXPECT_GT(config.resolved().region_bytes, std::uint64_t{1} << 30) << "or there would be too many";
  config.files = {{"a", std::uint64_t{128} << 10}};
  EXPECT_TRUE(config.validate()) << "the smallest that there is";
  config.files[0].bytes /= 2;
  EXPECT_EQ(config.validate().code(), Code::kInvalid);
}

TEST(NvmeTier, RefusesConfigurationsThatMakeNoSense) {
  TempFolder folder;
  const NvmeConfig good = small_log(folder.file("log"));
  EXPECT_TRUE(good.validate());
  const std::vector<void (*)(NvmeConfig&)> mistakes{
      [](NvmeConfig& config) { config.files.clear(); },
      [](NvmeConfig& config) { config.files[0].path.clear(); },
      [](NvmeConfig& config) { config.files[0].bytes = config.region_bytes; },
      [](NvmeConfig& config) { config.files[0].bytes += 1; },
      [](NvmeConfig& config) { config.region_bytes = 4096; },
      [](NvmeConfig& config) { config.region_bytes += 1; },
      [](NvmeConfig& config) { config.files[0].bytes = config.region_bytes * 70'000; },
      [](NvmeConfig& config) { config.write_queue_bytes = 0; },
      [](NvmeConfig& config) { config.queue_age_ns = 0; },
      [](NvmeConfig& config) { config.rewrite_share = 1; },
      [](NvmeConfig& config) { config.io.read_depth = 0; },
      [](NvmeConfig& config) { config.breaker.failures = 0; },
  };
  for (const auto& mistake : mistakes) {
    NvmeConfig config = good;
    mistake(config);
    EXPECT_EQ(config.validate().code(), Code::kInvalid);
    EXPECT_THROW(NvmeTier(config, Clock::system(), nullptr), std::invalid_argument);
  }
}

// A seccomp filter of one thread, as containers have it.
void forbid_io_uring() {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{.len = 4, .filter = program};
  ASSERT_EQ(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
  ASSERT_EQ(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter), 0);
}

TEST(NvmeTier, UsesThreadsWhereIoUringIsForbiddenAndSaysSo) {
  TempFolder folder;
  std::thread([&] {
    forbid_io_uring();
    auto tier = open_tier(small_log(folder.file("log")));
    EXPECT_EQ(tier->io_kind(), "threads");
    ASSERT_EQ(tier->notes().size(), 1U);
    EXPECT_NE(tier->notes()[0].find("io_uring cannot be used"), std::string::npos);
    const NvmeObject object{.prompt = 1};
    ASSERT_TRUE(write(*tier, object.object()));
    EXPECT_TRUE(holds(*tier, object));
    EXPECT_THROW(open_tier(small_log(folder.file("other"), BlockIoKind::kUring)), std::runtime_error);
  }).join();
}

}  // namespace
}  // namespace kvern
