#include "store/remote_key.h"

#include <gtest/gtest.h>

namespace kvern {
namespace {

ChunkKey sample_key() {
  ChunkKey key;
  key.namespace_id.bytes.fill(0xab);
  key.group = 3;
  const std::vector<std::uint8_t> hash{1, 2, 0xff};
  key.last_block = BlockHash(hash);
  return key;
}

TEST(RemoteKey, FollowsFromTheChunkKeyAlone) {
  // Daemons of other builds look for exactly this.
  EXPECT_EQ(remote_object_name("kvern", sample_key()), "kvern/v1.1/abababababababababababababababab/3/0102ff");
}

TEST(RemoteKey, NamesOfANamespaceBeginAlike) {
  const auto key = sample_key();
  EXPECT_EQ(remote_names_of("a/b", NamespaceSet::all()), "a/b/v1.1/");
  EXPECT_EQ(remote_names_of("a/b", NamespaceSet::of_tenant(key.namespace_id)), "a/b/v1.1/abababab");
  EXPECT_TRUE(remote_object_name("a/b", key).starts_with(remote_names_of("a/b", key.namespace_id)));
  EXPECT_TRUE(remote_names_of("a/b", key.namespace_id).ends_with("/"));
}

TEST(RemoteKey, NamesAreReadBackAndOthersAreNot) {
  const auto key = sample_key();
  EXPECT_EQ(parse_remote_object_name("a/b", remote_object_name("a/b", key)), key);
  const std::string id(32, 'a');
  for (const std::string& name :
       {std::string("kvern/v1.1/") + id + "/3/0102ff/more", "kvern/v1.1/" + id + "/3", "kvern/v1.1/" + id + "/03/01",
        "kvern/v1.1/" + id + "/65536/01", "kvern/v1.1/" + id + "/3/01F0", "kvern/v1.1/" + id + "/3/",
        "kvern/v1.2/" + id + "/3/01", std::string("kvern/v1.1/ab/3/01"), std::string("kvern/v1.1/"), std::string()}) {
    EXPECT_EQ(parse_remote_object_name("kvern", name), std::nullopt) << name;
  }
}

TEST(RemoteKey, PrefixesAreSafeInPatternsAndUrls) {
  EXPECT_TRUE(check_remote_prefix("fleet-1/eu_west.2"));
  for (const char* prefix : {"", "/a", "a/", "a*", "a?b", "a{b", "a b", "[a]", "ä"}) {
    EXPECT_FALSE(check_remote_prefix(prefix)) << prefix;
  }
  EXPECT_FALSE(check_remote_prefix(std::string(129, 'a')));
}

}  // namespace
}  // namespace kvern
