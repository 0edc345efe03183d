#include "service/device_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>

#include "tests/integration/host_device.h"
#include "tests/service/service_fixture.h"

namespace kvern::testing {
namespace {

using ::testing::HasSubstr;

/// Pages of the fixture's model on a device that is host memory.
class DeviceServiceTest : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kPages = 64;
  static constexpr std::uint64_t kRowBytes = 8 * 2;
  static constexpr std::uint64_t kPageBytes = 2 * kBlockTokens * 2 * kRowBytes;

  DeviceServiceTest()
      : devices({.store = fixture.store,
                 .pipeline = fixture.pipeline,
                 .encoders = fixture.executor,
                 .metrics = fixture.metrics,
                 .clock = fixture.clock,
                 .slab = fixture.slab_memory.bytes(),
                 .usable_bytes = [] { return kSlabBytes; },
                 .open = [this](std::string_view uuid) -> Result<DeviceAccess> {
                   if (uuid != HostDevice::kUuid) return failure(Code::kRefused, "there is no such device");
                   return DeviceAccess{.memory = memory, .make_coder = []() -> Result<std::unique_ptr<PageCoder>> {
                                         return std::make_unique<HostPageCoder>();
                                       }};
                 }}),
        hot({.sessions = fixture.sessions,
             .store = fixture.store,
             .tiers = fixture.tiers,
             .pipeline = fixture.pipeline,
             .in_flight = fixture.in_flight,
             .metrics = fixture.metrics,
             .clock = fixture.clock,
             .slab_bytes = kSlabBytes,
             .devices = &devices}),
        session(fixture.open_local(1)),
        space(fixture.register_model(*session)),
        pages(memory->allocate(2 * kPages * kPageBytes)) {
    fill(pages, 3);
  }
  ~DeviceServiceTest() override { devices.drain(); }

  /// A registration that is right; its descriptor is offered.
  wire::RegisterDevicePages registration() {
    std::vector<UniqueFd> descriptors;
    descriptors.push_back(std::move(memory->share(pages.data(), pages.size())->allocation.descriptor));
    EXPECT_TRUE(session->offer(std::move(descriptors)));
    wire::RegisterDevicePages request;
    request.set_device(std::string(HostDevice::kUuid));
    auto* allocation = request.add_allocations();
    allocation->set_kind(static_cast<std::uint32_t>(DeviceHandleKind::kDescriptor));
    allocation->set_bytes(pages.size());
    for (std::uint64_t layer = 0; layer < 2; ++layer) {
      auto* each = request.add_layers();
      each->set_offset(layer * kPages * kPageBytes);
      each->set_pages(kPages);
      each->set_page_stride_bytes(kPageBytes);
      each->set_head_stride_bytes(2 * kRowBytes);
      each->set_token_stride_bytes(4 * kRowBytes);
      each->set_value_offset_bytes(kRowBytes);
    }
    request.set_block_tokens(kBlockTokens);
    request.set_pages_per_block(1);
    request.set_group_layers(2);
    request.set_model_heads(2);
    auto* shard = request.mutable_shard();
    shard->set_dtype(static_cast<std::uint32_t>(DType::kBFloat16));
    shard->set_layers(2);
    shard->set_heads(2);
    shard->set_key_dim(8);
    shard->set_value_dim(8);
    return request;
  }

  /// The answer to a hot request; waits for the device and runs what it leaves to the executor.
  wire::HotReply ask(const wire::HotRequest& request) {
    wire::HotReply answer;
    hot.handle(session->id(), request, [&](wire::HotReply reply) { answer = std::move(reply); });
    devices.drain();
    return answer;
  }
  wire::HotRequest store_request(std::uint64_t pages_id, std::uint64_t prompt, std::uint32_t first_block) {
    wire::HotRequest request;
    auto* body = request.mutable_store_pages();
    body->set_pages_id(pages_id);
    *body->mutable_reserve() = ServiceFixture::reserve_request(space, prompt, 1).reserve();
    auto* ids = body->add_blocks();
    for (std::uint32_t i = 0; i < 4; ++i) ids->add_ids(first_block + i);
    return request;
  }
  wire::HotRequest load_request(std::uint64_t pages_id, std::uint64_t prompt, std::uint32_t first_block) {
    wire::HotRequest request;
    auto* body = request.mutable_load_pages();
    body->set_pages_id(pages_id);
    body->set_namespace_id(space.bytes.data(), space.bytes.size());
    body->set_hash_bytes(kHashBytes);
    auto* item = body->add_items();
    item->set_block_hashes(block_hashes(prompt, 0, 4));
    for (std::uint32_t i = 0; i < 4; ++i) item->add_block_ids(first_block + i);
    return request;
  }
  static BlockHash hash_of(std::uint64_t prompt, std::uint64_t number) {
    const std::string bytes = block_hash(prompt, number);
    return *BlockHash::from_bytes({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()});
  }
  std::vector<std::byte> block(std::uint32_t id) const {
    std::vector<std::byte> bytes;
    for (std::uint64_t layer = 0; layer < 2; ++layer) {
      const auto page = pages.subspan((layer * kPages + id) * kPageBytes, kPageBytes);
      bytes.insert(bytes.end(), page.begin(), page.end());
    }
    return bytes;
  }

  ServiceFixture fixture;
  std::shared_ptr<HostDevice> memory = std::make_shared<HostDevice>();
  DeviceService devices;
  HotService hot;
  std::shared_ptr<Session> session;
  NamespaceId space;
  std::span<std::byte> pages;
};

TEST_F(DeviceServiceTest, StoresAndLoadsWithinThePages) {
  const auto id = devices.register_pages(*session, registration());
  ASSERT_TRUE(id) << id.error().message();
  const auto stored = ask(store_request(*id, 1, 5));
  ASSERT_EQ(stored.pages_stored().items_size(), 1) << stored.status().message();
  EXPECT_TRUE(to_status(stored.pages_stored().items(0)));
  const auto untouched = block(24);
  const auto loaded = ask(load_request(*id, 1, 20));
  ASSERT_EQ(loaded.pages_loaded().items_size(), 1) << loaded.status().message();
  EXPECT_EQ(loaded.pages_loaded().items(0).tokens(), kChunkTokens);
  EXPECT_EQ(loaded.pages_loaded().items(0).raw_bytes(), 4 * 2 * kPageBytes);
  for (std::uint32_t i = 0; i < 4; ++i) EXPECT_EQ(block(20 + i), block(5 + i)) << i;
  EXPECT_EQ(block(24), untouched);
  // Again: it is there already.
  EXPECT_TRUE(to_status(ask(store_request(*id, 1, 9)).pages_stored().items(0)));
}

TEST_F(DeviceServiceTest, RefusesRegistrationsThatReachTooFarOrMakeNoSense) {
  using Change = void (*)(wire::RegisterDevicePages&);
  const Change changes[] = {
      [](auto& r) { r.set_device("GPU-other"); },
      [](auto& r) { r.clear_allocations(); },
      [](auto& r) { r.mutable_allocations(0)->set_bytes(1ULL << 40); },  // more than the file has
      [](auto& r) { r.mutable_allocations(0)->set_bytes(4096); },
      [](auto& r) { r.mutable_allocations(0)->set_kind(77); },
      [](auto& r) { r.mutable_allocations(0)->set_offered(1); },
      [](auto& r) { r.mutable_layers(1)->set_allocation(1); },
      [](auto& r) { r.mutable_layers(1)->set_offset(r.layers(1).offset() + 2); },
      [](auto& r) { r.mutable_layers(1)->set_offset(1); },
      [](auto& r) { r.mutable_layers(1)->set_offset(~0ULL); },
      [](auto& r) { r.mutable_layers(1)->set_pages(kPages + 1); },
      [](auto& r) { r.mutable_layers(1)->set_pages(~0U); },
      [](auto& r) { r.mutable_layers(1)->set_pages(0); },
      [](auto& r) { r.mutable_layers(1)->set_page_stride_bytes(1ULL << 63); },
      [](auto& r) { r.mutable_layers(1)->set_page_stride_bytes((1ULL << 40) - 2); },
      [](auto& r) { r.mutable_layers(1)->set_token_stride_bytes(3); },
      [](auto& r) { r.mutable_layers(1)->set_value_offset_bytes(1ULL << 40); },
      [](auto& r) { r.mutable_layers()->RemoveLast(); },
      [](auto& r) { r.set_block_tokens(0); },
      [](auto& r) { r.set_pages_per_block(3); },
      [](auto& r) { r.set_pages_per_block(0); },
      [](auto& r) { r.set_group_layers(1); },
      [](auto& r) { r.set_model_heads(1); },
      [](auto& r) { r.mutable_shard()->set_dtype(static_cast<std::uint32_t>(DType::kOpaqueBytes)); },
      [](auto& r) { r.mutable_shard()->set_dtype(1000); },
      [](auto& r) { r.mutable_shard()->set_heads(~0U); },
      [](auto& r) { r.mutable_shard()->set_key_dim(1U << 16); },
  };
  for (std::size_t i = 0; i < std::size(changes); ++i) {
    auto request = registration();
    changes[i](request);
    const auto id = devices.register_pages(*session, request);
    ASSERT_FALSE(id) << i;
    EXPECT_NE(id.error().message(), "") << i;
  }
  session->take_offered();
  auto request = registration();
  session->take_offered();
  EXPECT_THAT(devices.register_pages(*session, request).error().message(), HasSubstr("was not offered"));
}

TEST_F(DeviceServiceTest, RefusesRequestsThatThePagesDoNotHold) {
  const auto id = devices.register_pages(*session, registration());
  ASSERT_TRUE(id);
  EXPECT_EQ(to_status(ask(store_request(*id + 1, 1, 5)).status()).code(), Code::kInvalid);
  auto request = store_request(*id, 1, kPages - 2);
  EXPECT_EQ(to_status(ask(request).pages_stored().items(0)).code(), Code::kInvalid);
  request = store_request(*id, 1, 0);
  EXPECT_EQ(to_status(ask(request).pages_stored().items(0)).code(), Code::kInvalid);
  request = store_request(*id, 1, 5);
  request.mutable_store_pages()->mutable_blocks(0)->mutable_ids()->RemoveLast();
  EXPECT_EQ(to_status(ask(request).pages_stored().items(0)).code(), Code::kInvalid);
  request = store_request(*id, 1, 5);
  request.mutable_store_pages()->clear_blocks();
  EXPECT_EQ(to_status(ask(request).status()).code(), Code::kInvalid);
  request = store_request(*id, 1, 5);
  request.mutable_store_pages()->mutable_reserve()->mutable_shard()->set_heads(1);
  EXPECT_EQ(to_status(ask(request).status()).code(), Code::kInvalid);
  request = load_request(*id, 1, kPages - 2);
  EXPECT_EQ(to_status(ask(request).status()).code(), Code::kInvalid);
  request = load_request(*id, 1, 5);
  request.mutable_load_pages()->mutable_items(0)->mutable_block_ids()->RemoveLast();
  EXPECT_EQ(to_status(ask(request).status()).code(), Code::kInvalid);
}

TEST_F(DeviceServiceTest, ZeroesThePagesOfALoadThatFailsAndOnlyThose) {
  const auto id = devices.register_pages(*session, registration());
  ASSERT_TRUE(id);
  const auto neighbour = block(24);
  const auto loaded = ask(load_request(*id, 9, 20));
  EXPECT_EQ(to_status(loaded.pages_loaded().items(0).status()).code(), Code::kNotFound);
  EXPECT_EQ(block(20), std::vector<std::byte>(2 * kPageBytes));
  EXPECT_EQ(block(24), neighbour);
}

TEST_F(DeviceServiceTest, PublishesNothingThatWasReadTooLate) {
  const auto id = devices.register_pages(*session, registration());
  ASSERT_TRUE(id);
  fixture.clock.advance(std::chrono::seconds(1));
  auto request = store_request(*id, 1, 5);
  request.mutable_store_pages()->set_deadline_ns(fixture.clock.now_ns());
  EXPECT_EQ(to_status(ask(request).pages_stored().items(0)).code(), Code::kUnavailable);
  EXPECT_FALSE(fixture.store.pin(space, 0, hash_of(1, 0)));
  auto load = load_request(*id, 1, 5);
  load.mutable_load_pages()->set_deadline_ns(fixture.clock.now_ns());
  const auto before = block(5);
  EXPECT_FALSE(to_status(ask(load).pages_loaded().items(0).status()));
  EXPECT_EQ(block(5), before) << "others may have it";
}

TEST_F(DeviceServiceTest, NobodyTouchesThePagesOfASessionThatHasEnded) {
  const auto id = devices.register_pages(*session, registration());
  ASSERT_TRUE(id);
  const auto held = session->find_pages(*id);
  ASSERT_TRUE(to_status(ask(store_request(*id, 1, 5)).pages_stored().items(0)));
  const auto another = registration();
  fixture.sessions.end(session->id(), SessionEnd::kDisconnected);
  EXPECT_FALSE(held->use());
  EXPECT_FALSE(devices.register_pages(*session, another));
  const auto before = block(20);
  Status ended;
  ASSERT_TRUE(devices.load({.pages = held,
                            .space = fixture.namespaces.find(space),
                            .group = 0,
                            .hashes = {hash_of(1, 3)},
                            .block_ids = {20}},
                           [&](const Status& status, const DeviceService::Loaded&) { ended = status; }));
  devices.drain();
  EXPECT_EQ(ended.code(), Code::kExpired);
  EXPECT_EQ(block(20), before);
}

TEST(Device, LoadsGoBeforeStoresThatWait) {
  std::vector<std::byte> slab(64);
  Device device({.memory = std::make_shared<HostDevice>(), .make_coder = nullptr}, 1, slab, [] { return 64; });
  std::promise<void> started;
  std::promise<void> go_on;
  ASSERT_TRUE(device.submit(Device::Kind::kStore, [&] {
    started.set_value();
    go_on.get_future().wait();
  }));
  started.get_future().wait();
  std::string order;
  ASSERT_TRUE(device.submit(Device::Kind::kStore, [&] { order += "store "; }));
  ASSERT_TRUE(device.submit(Device::Kind::kLoad, [&] { order += "load "; }));
  ASSERT_TRUE(device.submit(Device::Kind::kStore, [&] { order += "store "; }));
  go_on.set_value();
  device.drain();
  EXPECT_EQ(order, "load store store ");
}

}  // namespace
}  // namespace kvern::testing
