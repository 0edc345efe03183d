// Quotas through the store: enforced before anything is allocated.

#include <gtest/gtest.h>

#include <optional>

#include "tests/store/store_fixture.h"

namespace kvern {
namespace {

using testing::ChunkSpec;
using testing::namespace_of;
using testing::StoreFixture;

constexpr std::uint64_t kPage = 4096;

ChunkSpec chunk_of(std::uint8_t tenant, std::uint64_t prompt) { return {.prompt = prompt, .namespace_number = tenant}; }

/// 16 pages; tenant 1 may hold three of them, tenant 2 as much as there is.
class Quotas : public ::testing::Test {
 protected:
  void limit(std::uint64_t bytes = 3 * kPage) {
    f.store.set_terms(namespace_of(1),
                      {.ladder = std::nullopt, .rotation = {}, .tenant = "small", .tenant_bytes = bytes});
  }
  TenantStats small() { return f.store.tenants().at(0); }
  StoreFixture f{StoreFixture::pages(16)};
};

TEST_F(Quotas, ATenantAtItsLimitMakesRoomFromItsOwn) {
  limit();
  ASSERT_TRUE(f.put(chunk_of(2, 100)));
  for (std::uint64_t prompt = 0; prompt < 8; ++prompt) ASSERT_TRUE(f.put(chunk_of(1, prompt))) << prompt;
  EXPECT_TRUE(f.has(chunk_of(2, 100))) << "the oldest of all is another tenant's";
  for (std::uint64_t prompt = 0; prompt < 8; ++prompt) EXPECT_EQ(f.has(chunk_of(1, prompt)), prompt >= 5) << prompt;
  EXPECT_EQ(small().used_bytes, 3 * kPage);
  EXPECT_EQ(small().refused, 0U);
  EXPECT_EQ(f.store.stats().chunks, 4U);
}

TEST_F(Quotas, WhatIsInUseStaysAndTheRestIsRefused) {
  limit();
  for (std::uint64_t prompt = 0; prompt < 3; ++prompt) ASSERT_TRUE(f.put(chunk_of(1, prompt)));
  std::vector<std::uint64_t> pins;
  for (std::uint64_t prompt = 0; prompt < 3; ++prompt) pins.push_back(f.pin(chunk_of(1, prompt))->pin);
  const auto refused = f.put(chunk_of(1, 3));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kBusy);
  EXPECT_NE(refused.error().message().find("tenant small holds"), std::string::npos) << refused.error().message();
  EXPECT_EQ(small().refused, 1U);
  EXPECT_TRUE(f.put(chunk_of(2, 3))) << "others have room";
  for (const auto pin : pins) f.store.unpin(pin);
  EXPECT_TRUE(f.put(chunk_of(1, 3)));
}

TEST_F(Quotas, OpenTicketsCountAndAreGivenBack) {
  limit();
  const auto info = chunk_of(1, 0).info();
  const auto ticket = f.store.begin_write(info, 2 * kPage).value();
  EXPECT_EQ(small().used_bytes, 2 * kPage);
  EXPECT_FALSE(f.put(chunk_of(1, 1), 2 * kPage)) << "two and two are more than three";
  testing::write_names(f.store.bytes(ticket), info);
  ASSERT_TRUE(f.store.publish(ticket, info, kPage));
  EXPECT_EQ(small().used_bytes, kPage);
  const auto given_up = f.store.begin_write(chunk_of(1, 1).info(), 2 * kPage).value();
  f.store.abort(given_up);
  const auto load = f.store.begin_load(2 * kPage, namespace_of(1)).value();
  EXPECT_EQ(small().used_bytes, 3 * kPage);
  f.store.abort(load);
  EXPECT_EQ(small().used_bytes, kPage);
  f.store.flush(NamespaceSet::all());
  EXPECT_EQ(small().used_bytes, 0U);
}

TEST_F(Quotas, WhatNeverFitsIsRefusedAtOnce) {
  limit();
  ASSERT_TRUE(f.put(chunk_of(1, 0)));
  EXPECT_EQ(f.put(chunk_of(1, 1), 4 * kPage).error().code(), Code::kRefused);
  EXPECT_TRUE(f.has(chunk_of(1, 0))) << "nothing leaves for it";
}

TEST_F(Quotas, WhatWasThereBeforeCounts) {
  for (std::uint64_t prompt = 0; prompt < 5; ++prompt) ASSERT_TRUE(f.put(chunk_of(1, prompt)));
  limit();
  EXPECT_EQ(small().used_bytes, 5 * kPage);
  EXPECT_EQ(small().limit_bytes, 3 * kPage);
  EXPECT_EQ(f.store.stats().chunks, 5U) << "a tenant keeps what it has";
  ASSERT_TRUE(f.put(chunk_of(1, 9)));
  EXPECT_EQ(small().used_bytes, 3 * kPage);
  EXPECT_EQ(f.store.stats().chunks, 3U);
}

TEST_F(Quotas, EveryWayOutGivesBytesBack) {
  limit(8 * kPage);
  ASSERT_TRUE(f.put({.prompt = 1, .blocks = 2, .namespace_number = 1}));
  ASSERT_TRUE(f.put({.prompt = 1, .blocks = 4, .namespace_number = 1}));
  EXPECT_EQ(small().used_bytes, kPage) << "superseded";
  f.store.quarantine(namespace_of(1), 0, chunk_of(1, 1).info().key.last_block);
  EXPECT_EQ(small().used_bytes, 0U);
  ASSERT_TRUE(f.put(chunk_of(1, 2).shard(0, 4)));
  EXPECT_EQ(small().used_bytes, kPage) << "a part of a chunk counts";
  f.clock.advance(std::chrono::seconds(61));
  f.store.sweep();
  EXPECT_EQ(small().used_bytes, 0U);
}

}  // namespace
}  // namespace kvern
