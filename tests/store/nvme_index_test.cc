#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <vector>

#include "store/object_index.h"
#include "store/region_format.h"
#include "tests/store/nvme_fixture.h"

namespace kvern {
namespace {

using testing::NvmeObject;

LogEntry entry_of(const NvmeObject& object, std::uint32_t page) {
  LogEntry entry;
  entry.namespace_id = object.namespace_id();
  entry.blocks = object.hashes(object.blocks);
  entry.page = page;
  entry.pages = object.pages;
  entry.first_page_checksum = object.version;
  return entry;
}

constexpr std::uint32_t kRegions = 4;
constexpr std::uint64_t kPrompts = 12;
constexpr std::uint32_t kMostBlocks = 5;

/// Every block names one object, by an ordinary map.
class NaiveIndex {
 public:
  void insert(std::uint32_t region, const NvmeObject& object, std::uint32_t page) {
    const std::size_t number = objects_.size();
    objects_.push_back({region, object, page, true});
    for (std::uint32_t i = 0; i < object.blocks; ++i) {
      const auto [found, is_new] = blocks_.try_emplace(block(object, i), number);
      const std::size_t former = std::exchange(found->second, number);
      if (!is_new && objects_[former].object.blocks == i + 1) forget(former);
    }
  }
  template <typename Predicate>
  void erase_if(const Predicate& predicate) {
    for (std::size_t i = 0; i < objects_.size(); ++i) {
      if (objects_[i].known && predicate(objects_[i].region, objects_[i].object)) forget(i);
    }
  }
  void erase(const NvmeObject& object) {
    const auto found = blocks_.find(block(object, object.blocks - 1));
    if (found != blocks_.end() && objects_[found->second].object.blocks == object.blocks) forget(found->second);
  }
  /// Region, page and blocks of what answers for so many blocks of a prompt.
  std::optional<std::array<std::uint32_t, 3>> find(const NvmeObject& prompt, std::uint32_t blocks) const {
    for (std::uint32_t i = blocks; i-- > 0;) {
      const auto found = blocks_.find(block(prompt, i));
      if (found == blocks_.end()) continue;
      const Object& object = objects_[found->second];
      return std::array{object.region, object.page, i + 1};
    }
    return std::nullopt;
  }
  std::uint64_t objects() const {
    return static_cast<std::uint64_t>(std::ranges::count_if(objects_, [](const Object& each) { return each.known; }));
  }

 private:
  struct Object {
    std::uint32_t region;
    NvmeObject object;
    std::uint32_t page;
    bool known;
  };
  using Block = std::array<std::uint64_t, 3>;
  static Block block(const NvmeObject& object, std::uint32_t number) {
    return {object.namespace_number, object.prompt, number};
  }
  void forget(std::size_t number) {
    objects_[number].known = false;
    std::erase_if(blocks_, [&](const auto& each) { return each.second == number; });
  }

  std::vector<Object> objects_;
  std::map<Block, std::size_t> blocks_;
};

NvmeObject arbitrary_object() {
  return {.prompt = *rc::gen::inRange<std::uint64_t>(0, kPrompts),
          .blocks = *rc::gen::inRange<std::uint32_t>(1, kMostBlocks + 1),
          .pages = *rc::gen::inRange<std::uint32_t>(1, 9),
          .namespace_number = *rc::gen::element<std::uint8_t>(1, 2)};
}

void compare(const ObjectIndex& index, const NaiveIndex& naive) {
  RC_ASSERT(index.objects() == naive.objects());
  for (const std::uint8_t number : {std::uint8_t{1}, std::uint8_t{2}}) {
    for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) {
      const NvmeObject object{.prompt = prompt, .namespace_number = number};
      for (std::uint32_t blocks = 1; blocks <= kMostBlocks + 1; ++blocks) {
        const TierHit hit = index.find(object.query(blocks));
        const auto expected = naive.find(object, blocks);
        RC_ASSERT((hit.bytes > 0) == expected.has_value());
        if (!expected) continue;
        RC_ASSERT(hit.blocks == (*expected)[2]);
        const auto location = index.locate(hit.key);
        RC_ASSERT(location.has_value());
        RC_ASSERT(location->region == (*expected)[0]);
        RC_ASSERT(location->page == (*expected)[1]);
      }
    }
  }
}

RC_GTEST_PROP(ObjectIndex, AgreesWithANaiveModel, ()) {
  ObjectIndex index(kRegions);
  NaiveIndex naive;
  std::uint32_t page = 0;
  const auto steps = *rc::gen::inRange(0, 120);
  for (int step = 0; step < steps; ++step) {
    const NvmeObject object = arbitrary_object();
    const auto region = *rc::gen::inRange<std::uint32_t>(0, kRegions);
    switch (*rc::gen::weightedElement<int>({{8, 0}, {3, 1}, {1, 2}, {1, 3}})) {
      case 0:
        index.insert(region, entry_of(object, ++page));
        naive.insert(region, object, page);
        break;
      case 1:
        index.erase(object.key());
        naive.erase(object);
        break;
      case 2:
        for (std::uint32_t each = 0; each < kRegions; ++each) {
          index.erase_range(each, 0, index.inserted(each), object.namespace_id());
        }
        naive.erase_if(
            [&](std::uint32_t, const NvmeObject& other) { return other.namespace_number == object.namespace_number; });
        break;
      default:
        for (std::size_t at = 0; at < index.inserted(region); at += 3) index.erase_range(region, at, 3, std::nullopt);
        index.clear(region);
        naive.erase_if([&](std::uint32_t in, const NvmeObject&) { return in == region; });
        break;
    }
  }
  compare(index, naive);
}

// Enough of them that tables are full, and that what is erased lies in the way of what is looked for.
TEST(ObjectIndex, FindsTheRestWhenHalfIsErased) {
  constexpr std::uint64_t kObjects = 20'000;
  ObjectIndex index(2);
  const auto object = [](std::uint64_t number) { return NvmeObject{.prompt = number, .blocks = 3}; };
  const auto erased = [](std::uint64_t number) { return number * 7919 % 16 < 8; };
  for (std::uint64_t i = 0; i < kObjects; ++i) index.insert(0, entry_of(object(i), static_cast<std::uint32_t>(i)));
  for (std::uint64_t i = 0; i < kObjects; ++i) {
    if (!erased(i)) continue;
    EXPECT_TRUE(index.erase(object(i).key()));
  }
  for (std::uint64_t i = 0; i < kObjects; ++i) {
    ASSERT_EQ(index.locate(object(i).key()).has_value(), !erased(i)) << i;
    ASSERT_EQ(index.find(object(i).query(2)).blocks, erased(i) ? 0U : 2U) << i;
  }
}

TEST(ObjectIndex, TakesNoMoreMemoryThanPromised) {
  constexpr std::uint32_t kFull = 20;
  constexpr std::uint64_t kObjects = 10'000;  // in each region
  constexpr std::uint32_t kBlocks = 8;
  ObjectIndex index(kFull);
  for (std::uint32_t region = 0; region < kFull; ++region) {
    for (std::uint64_t i = 0; i < kObjects; ++i) {
      index.insert(region, entry_of({.prompt = region * kObjects + i, .blocks = kBlocks}, 1));
    }
    index.close(region);
  }
  EXPECT_LE(index.memory_bytes() / index.objects(), 64U + 16U * kBlocks);
  for (std::uint32_t region = 0; region < kFull; ++region) {
    index.erase_range(region, 0, kObjects, std::nullopt);
    index.clear(region);
  }
  EXPECT_EQ(index.objects(), 0U);
  EXPECT_EQ(index.bytes(), 0U);
}

RC_GTEST_PROP(RegionFormat, TablesComeBackAsTheyWere,
              (const std::vector<std::pair<std::uint8_t, std::uint16_t>>& seeds)) {
  std::vector<std::byte> table;
  std::vector<LogEntry> entries;
  for (const auto& [kind, number] : seeds) {
    LogEntry entry = entry_of({.prompt = number, .blocks = 1 + number % 7U, .pages = number}, number);
    entry.kind = static_cast<LogEntry::Kind>(1 + kind % 4);
    entry.group = number;
    if (entry.kind == LogEntry::Kind::kErase) entry.blocks.resize(1);
    if (entry.kind == LogEntry::Kind::kEraseNamespace || entry.kind == LogEntry::Kind::kEraseAll) entry.blocks.clear();
    append_entry(table, entry);
    entries.push_back(entry);
  }
  std::size_t next = 0;
  RC_ASSERT(read_table(table, [&](const LogEntry& entry) {
    const LogEntry& expected = entries[next++];
    RC_ASSERT(entry.kind == expected.kind);
    RC_ASSERT(entry.group == expected.group);
    RC_ASSERT(entry.namespace_id == expected.namespace_id);
    RC_ASSERT(entry.blocks == expected.blocks);
    if (entry.kind != LogEntry::Kind::kObject) return;
    RC_ASSERT(entry.page == expected.page);
    RC_ASSERT(entry.pages == expected.pages);
    RC_ASSERT(entry.first_page_checksum == expected.first_page_checksum);
  }));
  RC_ASSERT(next == entries.size());
}

RC_GTEST_PROP(RegionFormat, AnyBytesAreReadSafely, (std::vector<std::uint8_t> bytes)) {
  // Often a table whose first line begins well.
  if (bytes.size() > 30 && bytes[0] % 2 == 0) bytes[0] = static_cast<std::uint8_t>(1 + bytes[0] % 4);
  const auto content = std::as_bytes(std::span(bytes));
  (void)read_table(content, [](const LogEntry& entry) { RC_ASSERT(entry.blocks.size() <= 0xffff); });
  RC_ASSERT(!decode_record_header(content));
  RC_ASSERT(!decode_footer_header(content));
  RC_ASSERT(!looks_like_log(content));
}

}  // namespace
}  // namespace kvern
