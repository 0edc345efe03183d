#include "store/redis_slots.h"

#include <gtest/gtest.h>

#include "store/redis_object.h"

namespace kvern {
namespace {

TEST(RedisSlot, IsWhatTheClusterSpecificationSays) {
  EXPECT_EQ(redis_slot("123456789"), 0x31C3 % 16384);
  EXPECT_EQ(redis_slot("foo"), 12182);
  EXPECT_EQ(redis_slot("{user1000}.following"), redis_slot("{user1000}.followers"));
  EXPECT_EQ(redis_slot("foo{{bar}}zap"), redis_slot("{bar"));
  EXPECT_EQ(redis_slot("foo{bar}{zap}"), redis_slot("bar"));
}

TEST(RedisSlot, AllKeysOfAnObjectShareOne) {
  const std::string name = "kvern/v1.1/00/0/abcdef";
  EXPECT_EQ(redis_slot(redis_manifest_key(name)), redis_slot(name));
  for (std::size_t piece = 0; piece < 20; ++piece)
    EXPECT_EQ(redis_slot(redis_piece_key(name, piece)), redis_slot(name));
}

TEST(RedisEndpoints, AreHostAndPort) {
  EXPECT_EQ(parse_redis_endpoint("redis-0.svc:6379").value(), (RedisEndpoint{"redis-0.svc", 6379}));
  EXPECT_EQ(parse_redis_endpoint("[::1]:7000").value(), (RedisEndpoint{"::1", 7000}));
  for (const char* text : {"", "host", "host:", ":6379", "host:0", "host:65536", "host:12x", "::1:7000", "[]:1"}) {
    EXPECT_EQ(parse_redis_endpoint(text).error().code(), Code::kInvalid) << text;
  }
}

TEST(RedisRedirects, AreReadFromErrors) {
  const RedisEndpoint asked{"10.0.0.1", 7000};
  const auto moved = parse_redis_redirect("MOVED 3999 127.0.0.1:6381", asked);
  ASSERT_TRUE(moved);
  EXPECT_EQ(moved->kind, RedisRedirect::Kind::kMoved);
  EXPECT_EQ(moved->slot, 3999);
  EXPECT_EQ(moved->endpoint, (RedisEndpoint{"127.0.0.1", 6381}));
  EXPECT_EQ(parse_redis_redirect("ASK 1 :7001", asked)->endpoint, (RedisEndpoint{"10.0.0.1", 7001}));
  EXPECT_EQ(parse_redis_redirect("ASK 1 ::1:7001", asked)->endpoint, (RedisEndpoint{"::1", 7001}));
  for (const char* text :
       {"ERR x", "MOVED", "MOVED ", "MOVED 1", "MOVED x a:1", "MOVED 16384 a:1", "MOVED 1 a:", "ASK 1 ?:0"}) {
    EXPECT_FALSE(parse_redis_redirect(text, asked)) << text;
  }
}

TEST(ClusterSlots, AreReadAndChecked) {
  const RedisEndpoint asked{"10.0.0.1", 7000};
  const auto parsed = [&](const std::string& text) {
    RespReader reader;
    const auto room = reader.room({});
    std::copy_n(reinterpret_cast<const std::byte*>(text.data()), text.size(), room.begin());
    reader.received(text.size());
    return parse_cluster_slots(reader.next({}).value().value(), asked);
  };
  const auto ranges =
      parsed("*2\r\n*3\r\n:0\r\n:5\r\n*2\r\n$1\r\na\r\n:1\r\n*4\r\n:6\r\n:16383\r\n*2\r\n$-1\r\n:2\r\n*0\r\n");
  ASSERT_TRUE(ranges);
  EXPECT_EQ(ranges->at(0).master, (RedisEndpoint{"a", 1}));
  EXPECT_EQ(ranges->at(1).first, 6);
  EXPECT_EQ(ranges->at(1).master, (RedisEndpoint{"10.0.0.1", 2}));
  for (const char* text :
       {"+OK\r\n", "*1\r\n:1\r\n", "*1\r\n*3\r\n:5\r\n:4\r\n*2\r\n$1\r\na\r\n:1\r\n",
        "*1\r\n*3\r\n:0\r\n:16384\r\n*2\r\n$1\r\na\r\n:1\r\n", "*1\r\n*3\r\n:0\r\n:1\r\n*1\r\n$1\r\na\r\n"}) {
    EXPECT_EQ(parsed(text).error().code(), Code::kCorrupt) << text;
  }
}

TEST(RedisManifests, AreReadBackAndNeverBelievedWhenDamaged) {
  RedisManifest manifest{.bytes = 2 * kRedisPieceBytes + 4096, .checksums = {1, 2, 3}};
  const std::string text = manifest.encode();
  EXPECT_EQ(RedisManifest::decode(text).value(), manifest);
  EXPECT_EQ(manifest.piece_bytes(1), kRedisPieceBytes);
  EXPECT_EQ(manifest.piece_bytes(2), 4096U);
  for (std::size_t i = 0; i < text.size(); ++i) {
    std::string damaged = text;
    damaged[i] = static_cast<char>(damaged[i] ^ 1);
    EXPECT_FALSE(RedisManifest::decode(damaged)) << i;
    EXPECT_FALSE(RedisManifest::decode(text.substr(0, i))) << i;
  }
  manifest.checksums.push_back(4);  // more pieces than bytes
  EXPECT_FALSE(RedisManifest::decode(manifest.encode()));
}

}  // namespace
}  // namespace kvern
