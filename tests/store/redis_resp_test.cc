#include "store/redis_resp.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstring>

namespace kvern {
namespace {

/// What the reader makes of the text when it comes in portions of these sizes, again and again.
std::vector<RespValue> read_all(std::string_view text, const std::vector<std::size_t>& portions,
                                std::span<std::byte> into = {}, Status* broken = nullptr) {
  RespReader reader;
  std::vector<RespValue> values;
  std::size_t turn = 0;
  while (true) {
    auto value = reader.next(values.empty() ? into : std::span<std::byte>());
    if (!value) {
      if (broken != nullptr) *broken = value.error();
      return values;
    }
    if (*value) {
      values.push_back(std::move(**value));
      continue;
    }
    if (text.empty()) return values;
    const auto room = reader.room(values.empty() ? into : std::span<std::byte>());
    const std::size_t bytes = std::min({room.size(), text.size(), portions[turn++ % portions.size()]});
    std::memcpy(room.data(), text.data(), bytes);
    reader.received(bytes);
    text.remove_prefix(bytes);
  }
}

TEST(RespReader, ReadsEveryType) {
  const auto values = read_all(
      "+OK\r\n-ERR no\r\n:-42\r\n$5\r\nhe\r\no\r\n$0\r\n\r\n$-1\r\n*-1\r\n*2\r\n:1\r\n*1\r\n$1\r\nx\r\n", {1024});
  ASSERT_EQ(values.size(), 8U);
  EXPECT_EQ(values[0].text, "OK");
  EXPECT_TRUE(values[1].is_error());
  EXPECT_EQ(values[1].text, "ERR no");
  EXPECT_EQ(values[2].integer, -42);
  EXPECT_EQ(values[3].text, "he\r\no");
  EXPECT_EQ(values[4].type, RespValue::Type::kBulk);
  EXPECT_EQ(values[5].type, RespValue::Type::kNull);
  EXPECT_EQ(values[6].type, RespValue::Type::kNull);
  EXPECT_EQ(values[7].elements[1].elements[0].text, "x");
}

RC_GTEST_PROP(RespReader, PortionsDoNotMatter, ()) {
  const auto body = *rc::gen::container<std::string>(rc::gen::arbitrary<char>());
  const auto portions =
      *rc::gen::nonEmpty(rc::gen::container<std::vector<std::size_t>>(rc::gen::inRange<std::size_t>(1, 40)));
  std::string text = "$" + std::to_string(body.size()) + "\r\n" + body + "\r\n+next\r\n";
  std::vector<std::byte> memory(body.size() + *rc::gen::inRange<std::size_t>(0, 2));  // of the right size, or not
  const auto values = read_all(text, portions, memory);
  RC_ASSERT(values.size() == 2U);
  RC_ASSERT(values[0].integer == static_cast<std::int64_t>(body.size()));
  RC_ASSERT(values[1].text == "next");
  if (memory.empty()) {
    RC_ASSERT(values[0].text == body);
  } else {
    RC_ASSERT(values[0].received_in_place == (memory.size() == body.size()));
    if (values[0].received_in_place) RC_ASSERT(std::memcmp(memory.data(), body.data(), body.size()) == 0);
  }
}

RC_GTEST_PROP(RespReader, SurvivesAnyBytes, ()) {
  const auto text = *rc::gen::container<std::string>(
      rc::gen::oneOf(rc::gen::elementOf(std::string("+-:$*\r\n0123456789")), rc::gen::arbitrary<char>()));
  std::vector<std::byte> memory(*rc::gen::inRange<std::size_t>(0, 8));
  read_all(text, {3, 1, 7}, memory);
}

TEST(RespReader, RefusesWhatIsNoRespOrTooLarge) {
  for (const char* text :
       {"HTTP/1.1 400 Bad Request\r\n", "\r\n", "$x\r\n", "$-2\r\n", "$99999999999\r\n", ":\r\n", "*2000000000\r\n",
        "$2\r\nabc\r\n", "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n"}) {
    Status broken;
    read_all(text, {5}, {}, &broken);
    EXPECT_EQ(broken.code(), Code::kCorrupt) << text;
  }
  std::vector<std::byte> memory(4);
  for (const char* text : {"$x\r\n", "$-5\r\n", "$4\r\nabcdef\r\n", "$99999999999999\r\n"}) {
    Status broken;
    read_all(text, {5}, memory, &broken);
    EXPECT_EQ(broken.code(), Code::kCorrupt) << text;
  }
}

TEST(RespReader, ABodyThatNobodyWantsAnyMoreIsDropped) {
  RespReader reader;
  std::vector<std::byte> memory(100'000, std::byte{1});
  const auto give = [&](std::string_view text, std::span<std::byte> into) {
    const auto room = reader.room(into);
    ASSERT_LE(text.size(), room.size());
    std::memcpy(room.data(), text.data(), text.size());
    reader.received(text.size());
  };
  give("$100000\r\n" + std::string(1000, 'a'), memory);
  EXPECT_FALSE(reader.next(memory).value());
  give(std::string(1000, 'b'), memory);  // straight into the memory
  for (int i = 0; i < 98; ++i) {
    EXPECT_FALSE(reader.next({}).value());
    give(std::string(1000, 'c'), {});
  }
  EXPECT_FALSE(reader.next({}).value());
  give("\r\n:7\r\n", {});
  EXPECT_FALSE(reader.next({}).value()->received_in_place);
  EXPECT_EQ(reader.next({}).value()->integer, 7);
  EXPECT_EQ(memory[1999], std::byte{'b'});
  EXPECT_EQ(memory[2000], std::byte{1});
}

TEST(RedisCommand, LeavesTheBodyWhereItIs) {
  const std::string first = "abc";
  const std::string second = "de";
  const auto request =
      redis_command({"SET", "key"}, {std::as_bytes(std::span(first)), std::as_bytes(std::span(second))});
  EXPECT_EQ(request.head, "*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$5\r\n");
  EXPECT_EQ(static_cast<const void*>(request.body[1].data()), second.data());
}

}  // namespace
}  // namespace kvern
