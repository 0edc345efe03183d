#include "service/event_log.h"

#include <gtest/gtest.h>

namespace kvern {
namespace {

EventLog::Removal removal(std::uint8_t number) {
  const std::vector<std::uint8_t> hash = {number};
  return {.key = {}, .blocks = {BlockHash(hash)}, .reason = "evicted", .time_ns = number};
}

std::vector<std::int64_t> read_all(const EventLog& log, std::uint64_t cursor, EventLog::Page* page) {
  std::vector<std::int64_t> numbers;
  *page = log.read(cursor, [&](const EventLog::Removal& each) {
    numbers.push_back(each.time_ns);
    return true;
  });
  return numbers;
}

TEST(EventLog, AReaderSeesWhatHappenedSinceItsCursor) {
  EventLog log;
  EventLog::Page page;
  log.add(removal(1));
  EXPECT_TRUE(read_all(log, 0, &page).empty()) << "cursor 0 means now";
  EXPECT_FALSE(page.lost);
  log.add(removal(2));
  log.add(removal(3));
  EXPECT_EQ(read_all(log, page.next_cursor, &page), (std::vector<std::int64_t>{2, 3}));
  EXPECT_FALSE(page.lost);
  EXPECT_TRUE(read_all(log, page.next_cursor, &page).empty());
}

TEST(EventLog, WhoFallsBehindIsToldSo) {
  EventLog log(2);
  for (std::uint8_t i = 1; i <= 5; ++i) log.add(removal(i));
  EventLog::Page page;
  EXPECT_EQ(read_all(log, 1, &page), (std::vector<std::int64_t>{4, 5}));
  EXPECT_TRUE(page.lost);
  read_all(log, 1000, &page);
  EXPECT_TRUE(page.lost) << "a cursor of another daemon";
}

TEST(EventLog, WhoReadsOnAfterSomethingUnknownLeftIsToldSo) {
  EventLog log;
  log.add(removal(1));
  const std::uint64_t before = log.next_cursor();
  log.forget();
  log.add(removal(2));
  EventLog::Page page;
  read_all(log, before, &page);
  EXPECT_TRUE(page.lost);
  log.add(removal(3));
  EXPECT_EQ(read_all(log, page.next_cursor, &page), (std::vector<std::int64_t>{3}));
  EXPECT_FALSE(page.lost);
}

TEST(EventLog, APageEndsWhereTheReaderIsFull) {
  EventLog log;
  for (std::uint8_t i = 1; i <= 3; ++i) log.add(removal(i));
  int taken = 0;
  const auto page = log.read(1, [&](const EventLog::Removal&) { return ++taken <= 2; });
  EXPECT_EQ(page.next_cursor, 3U);
}

TEST(EventLog, TheLastRemovalOfABlockIsRemembered) {
  EventLog log;
  log.add(removal(1));
  log.add(removal(2));
  const std::vector<std::uint8_t> known = {2};
  const std::vector<std::uint8_t> unknown = {9};
  EXPECT_EQ(log.last_removal_of(BlockHash(known))->time_ns, 2);
  EXPECT_FALSE(log.last_removal_of(BlockHash(unknown)));
}

}  // namespace
}  // namespace kvern
