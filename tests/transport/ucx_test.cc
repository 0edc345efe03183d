#include "transport/ucx.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <netinet/in.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <future>
#include <iostream>
#include <random>
#include <thread>

#include "tests/transport/ucx_peers.h"
#include "transport/ucx_context.h"
#include "transport/ucx_messages.h"

namespace kvern {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;

constexpr std::size_t kMiB = 1U << 20;
constexpr std::size_t kMemoryBytes = 32 * kMiB;

void fill(std::span<std::byte> bytes, unsigned seed) {
  std::minstd_rand random(seed);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() >> 8U);
}

struct Pair {
  MemoryHandler handler{kMemoryBytes};
  std::unique_ptr<UcxServer> server = std::make_unique<UcxServer>(server_config(), handler);
  std::unique_ptr<DataPlane> plane;

  Pair() {
    auto made = make_ucx_data_plane(client_config(server->port()));
    if (!made) throw std::runtime_error(made.error().to_string());
    plane = std::move(*made);
  }
};

/// A peer that says what it likes, on UCX itself.
class RawClient {
 public:
  explicit RawClient(std::uint16_t port) : worker_("", "lo") {
    worker_.set_handler(
        ucx::kAnswer,
        [](void* self, const void*, std::size_t, void*, std::size_t, const ucp_am_recv_param_t*) {
          ++static_cast<RawClient*>(self)->answers;
          return UCS_OK;
        },
        this);
    const auto address = ucx::resolve("127.0.0.1", port);
    ucp_ep_params_t parameters{};
    parameters.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR |
                            UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    parameters.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
    parameters.sockaddr = address->ucx();
    parameters.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    parameters.err_handler.cb = [](void* self, ucp_ep_h, ucs_status_t) { static_cast<RawClient*>(self)->cut = true; };
    parameters.err_handler.arg = this;
    if (ucp_ep_create(worker_.get(), &parameters, &endpoint_) != UCS_OK) throw std::runtime_error("no endpoint");
  }
  ~RawClient() {
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    parameters.flags = UCP_EP_CLOSE_FLAG_FORCE;
    finish(ucp_ep_close_nbx(endpoint_, &parameters));
  }

  void send(unsigned id, const std::string& header, const std::string& payload, bool with_reply = true) {
    ucp_request_param_t parameters{};
    parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    if (with_reply) parameters.flags = UCP_AM_SEND_FLAG_REPLY;
    finish(ucp_am_send_nbx(endpoint_, id, header.data(), header.size(), payload.data(), payload.size(), &parameters));
  }
  void step() { worker_.step(wake_, 1ms); }

  int answers = 0;
  bool cut = false;

 private:
  void finish(ucs_status_ptr_t request) {
    if (!UCS_PTR_IS_PTR(request)) return;
    while (ucp_request_check_status(request) == UCS_INPROGRESS) step();
    ucp_request_free(request);
  }

  ucx::Worker worker_;
  EventFd wake_;
  ucp_ep_h endpoint_ = nullptr;
};

std::string bytes_of(const ucx::RequestHeader& header) {
  return {reinterpret_cast<const char*>(&header), sizeof header};
}

ucx::RequestHeader valid_header() {
  ucx::RequestHeader header;
  header.token_bytes = static_cast<std::uint32_t>(std::strlen(kToken));
  std::memcpy(header.token.data(), kToken, header.token_bytes);
  header.request_id = 1;
  header.bytes = 4096;
  return header;
}

// ------------------------------------------------------------------ the module

TEST(UcxModule, VersionIsThatOfTheLoadedLibrary) {
  const auto version = ucx_version();
  ASSERT_TRUE(version) << version.error().message();
  EXPECT_EQ(*version, *ucx::version());
}

TEST(UcxModuleDeathTest, AMissingModuleIsASentence) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        ::setenv("KVERN_UCX_MODULE", "/nowhere/libkvern_ucx.so", 1);
        const auto made = make_ucx_data_plane(client_config(1));
        std::cerr << made.error().to_string();
        std::_Exit(made ? 0 : 3);
      },
      ::testing::ExitedWithCode(3), "unavailable: Kvern's UCX module is not installed .*/nowhere/libkvern_ucx.so");
}

TEST(UcxModuleDeathTest, AFileThatIsNoModuleIsASentence) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        ::setenv("KVERN_UCX_MODULE", "/etc/passwd", 1);
        const auto version = ucx_version();
        std::cerr << version.error().to_string();
        std::_Exit(version ? 0 : 3);
      },
      ::testing::ExitedWithCode(3), "unavailable: UCX cannot be loaded .*/etc/passwd");
}

// ------------------------------------------------------------------ both sides well

TEST(Ucx, PushedBytesArriveAndPulledBytesAreThoseOfTheServer) {
  Pair pair;
  EXPECT_EQ(pair.plane->name(), "ucx/tcp");
  // Around the sizes where UCX changes its ways, and odd ones.
  for (const std::size_t bytes : {1UL, 100UL, 8191UL, 65535UL, 65536UL, 300001UL, 2 * kMiB, 8 * kMiB + 3}) {
    const std::uint64_t offset = 4 * kMiB;
    auto staged = pair.plane->staging(offset, bytes);
    ASSERT_TRUE(staged);
    fill(*staged, static_cast<unsigned>(bytes));
    ASSERT_TRUE(pair.plane->push(7, offset, bytes));
    EXPECT_TRUE(std::equal(staged->begin(), staged->end(), pair.handler.memory.begin() + offset)) << bytes;

    const std::uint64_t from = 13 * kMiB + 1;
    fill(std::span(pair.handler.memory).subspan(from, bytes), static_cast<unsigned>(bytes) + 1);
    const auto pulled = pair.plane->pull(7, from, bytes);
    ASSERT_TRUE(pulled) << pulled.error().to_string();
    EXPECT_TRUE(std::equal(pulled->bytes().begin(), pulled->bytes().end(), pair.handler.memory.begin() + from))
        << bytes;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pulled->bytes().data()) % 64, 0U);
  }
  pair.handler.wait([&] { return pair.handler.begun == pair.handler.ended; });  // the peer may know before we do
  EXPECT_EQ(pair.handler.count_failed(), 0U);
}

TEST(Ucx, ManyThreadsPushAndPullAtOnce) {
  Pair pair;
  constexpr std::size_t kBytes = kMiB;
  fill(pair.handler.memory, 1);
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&, thread] {
      // The lower half is pulled by all, the upper pushed to, a MiB for each thread.
      const std::uint64_t mine = kMemoryBytes / 2 + thread * kBytes;
      for (unsigned round = 0; round < 10; ++round) {
        auto staged = pair.plane->staging(mine, kBytes);
        fill(*staged, thread * 100 + round);
        EXPECT_TRUE(pair.plane->push(1, mine, kBytes));
        const auto pulled = pair.plane->pull(1, thread * kBytes, kBytes);
        ASSERT_TRUE(pulled);
        EXPECT_EQ(std::memcmp(pulled->bytes().data(), pair.handler.memory.data() + thread * kBytes, kBytes), 0);
      }
      EXPECT_EQ(std::memcmp(pair.plane->staging(mine, kBytes)->data(), pair.handler.memory.data() + mine, kBytes), 0);
    });
  }
  for (auto& thread : threads) thread.join();
  pair.handler.wait([&] { return pair.handler.begun == pair.handler.ended; });  // the peer may know before we do
  EXPECT_EQ(pair.handler.count_ended(), 160U);
}

TEST(Ucx, RefusalsArriveWithCodeAndReasonAndThePlaneGoesOn) {
  Pair pair;
  const Status push = pair.plane->push(kGoneObject, 0, 2 * kMiB);
  EXPECT_EQ(push.code(), Code::kExpired);
  EXPECT_EQ(push.message(), "it has expired");
  EXPECT_EQ(pair.plane->pull(kGoneObject, 0, 100).error().code(), Code::kExpired);
  EXPECT_EQ(pair.plane->pull(1, kMemoryBytes, 100).error().code(), Code::kInvalid);
  EXPECT_EQ(pair.plane->pull(1, 0, 2UL << 30).error().code(), Code::kInvalid);
  EXPECT_EQ(pair.plane->pull(1, 0, 0).error().code(), Code::kInvalid);
  EXPECT_TRUE(pair.plane->pull(1, 0, 100));

  auto stranger = client_config(pair.server->port());
  stranger.session_token = "guessed";
  auto plane = make_ucx_data_plane(stranger);
  ASSERT_TRUE(plane);
  EXPECT_EQ((*plane)->push(1, 0, 2 * kMiB).code(), Code::kRefused);
  EXPECT_EQ((*plane)->pull(1, 0, 2 * kMiB).error().code(), Code::kRefused);
  EXPECT_EQ(pair.handler.count_begun(), 1U);
}

TEST(Ucx, StagingIsBounded) {
  Pair pair;
  EXPECT_TRUE(pair.plane->staging(kMemoryBytes - 64, 64));
  EXPECT_EQ(pair.plane->staging(kMemoryBytes - 64, 65).error().code(), Code::kInvalid);
  EXPECT_EQ(pair.plane->staging(~std::uint64_t{63}, 128).error().code(), Code::kInvalid);
  EXPECT_EQ(pair.plane->staging(1, 10).error().code(), Code::kInvalid);
  EXPECT_EQ(pair.plane->push(1, kMemoryBytes, 1).code(), Code::kInvalid);
}

TEST(Ucx, PulledBytesOutliveThePlane) {
  Pair pair;
  fill(pair.handler.memory, 5);
  auto pulled = pair.plane->pull(1, 0, 2 * kMiB);
  pair.plane.reset();
  ASSERT_TRUE(pulled);
  EXPECT_EQ(std::memcmp(pulled->bytes().data(), pair.handler.memory.data(), 2 * kMiB), 0);
}

TEST(Ucx, CloseEndsThePlaneForGood) {
  Pair pair;
  pair.plane->close();
  EXPECT_EQ(pair.plane->push(1, 0, 64).code(), Code::kUnavailable);
  EXPECT_EQ(pair.plane->pull(1, 0, 64).error().code(), Code::kUnavailable);
}

TEST(Ucx, AnAddressInUseIsASentence) {
  Pair pair;
  MemoryHandler handler(64);
  UcxServerConfig config = server_config();
  config.port = pair.server->port();
  try {
    UcxServer second(config, handler);
    FAIL() << "bound twice";
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr("127.0.0.1:" + std::to_string(config.port)));
  }
}

TEST(Ucx, UnknownTransportsAndDevicesAreSentences) {
  MemoryHandler handler(64);
  UcxServerConfig config = server_config();
  config.devices = "no_such_card";
  try {
    UcxServer server(config, handler);
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr("no_such_card"));
  }
}

TEST(Ucx, NobodyListeningIsUnavailableAndNotAHang) {
  std::uint16_t port = 0;
  {
    Pair pair;
    port = pair.server->port();
  }
  const auto plane = make_ucx_data_plane(client_config(port));
  ASSERT_FALSE(plane);
  EXPECT_EQ(plane.error().code(), Code::kUnavailable);
  EXPECT_THAT(plane.error().message(), HasSubstr(std::to_string(port)));
}

TEST(Ucx, ARestartedServerListensOnItsPortAtOnce) {
  Pair pair;
  UcxServerConfig config = server_config();
  config.port = pair.server->port();
  pair.server.reset();
  pair.server = std::make_unique<UcxServer>(config, pair.handler);
  // The old plane is done with; a new one works.
  while (pair.plane->pull(1, 0, 64)) {
  }
  const auto plane = make_ucx_data_plane(client_config(config.port));
  ASSERT_TRUE(plane);
  EXPECT_TRUE((*plane)->pull(1, 0, 64));
}

// ------------------------------------------------------------------ one side dies

TEST(UcxFailure, TheServerGoingAwayEndsAllCalls) {
  Pair pair;
  std::atomic<int> ended = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      Status status;
      while (status) status = status_of(pair.plane->pull(1, 0, 8 * kMiB));
      EXPECT_EQ(status.code(), Code::kUnavailable);
      ++ended;
    });
  }
  pair.handler.wait([&] { return pair.handler.ended > 4; });
  pair.server.reset();
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(ended, 4);
  pair.handler.wait([&] { return pair.handler.begun == pair.handler.ended; });  // the peer may know before we do
}

TEST(UcxFailure, AKilledServerProcessEndsAllCalls) {
  Peer server({"--serve"});
  const auto port = static_cast<std::uint16_t>(std::stoul(server.read_line()));
  auto plane = make_ucx_data_plane(client_config(port));
  ASSERT_TRUE(plane) << plane.error().to_string();
  ASSERT_TRUE((*plane)->pull(1, 0, 8 * kMiB));
  std::vector<std::thread> threads;
  std::atomic<int> rounds = 0;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      Status status;
      while (status) {
        status = thread % 2 == 0 ? status_of((*plane)->pull(1, 0, 8 * kMiB)) : (*plane)->push(1, 0, 8 * kMiB);
        ++rounds;
        rounds.notify_all();
      }
      EXPECT_EQ(status.code(), Code::kUnavailable);
    });
  }
  for (int seen = 0; seen < 8; seen = rounds.load()) rounds.wait(seen);
  server.signal(SIGKILL);
  for (auto& thread : threads) thread.join();
}

TEST(UcxFailure, AStoppedServerIsGivenUpAfterTheTimeout) {
  Peer server({"--serve"});
  auto config = client_config(static_cast<std::uint16_t>(std::stoul(server.read_line())));
  config.timeout = 500ms;
  auto plane = make_ucx_data_plane(config);
  ASSERT_TRUE(plane) << plane.error().to_string();
  server.signal(SIGSTOP);
  EXPECT_EQ((*plane)->pull(1, 0, 8 * kMiB).error().code(), Code::kUnavailable);
  EXPECT_EQ((*plane)->push(1, 0, 8 * kMiB).code(), Code::kUnavailable);
}

/// Lets a client process transfer until some are under way, does something to it, and expects all of them to be ended.
/// Another process has its turn, with another server that knows nothing of the first one, when the signal came between
/// two transfers.
void expect_all_reported_after(int signal, const std::string& role, const UcxServerConfig& config = server_config()) {
  while (true) {
    MemoryHandler handler(kMemoryBytes);
    UcxServer server(config, handler);
    Peer client({role, std::to_string(server.port())});
    handler.wait([&] { return handler.ended > 8 && handler.begun > handler.ended; });
    client.signal(signal);
    handler.wait([&] { return handler.begun == handler.ended; });
    if (handler.count_failed() == 0) continue;

    const auto before = handler.memory;
    client.signal(SIGCONT);
    if (signal == SIGSTOP) {
      // It finds its connection gone and leaves; what it had still to send does not come any more.
      EXPECT_EQ(client.wait(), 0);
    }
    EXPECT_EQ(handler.memory, before);
    EXPECT_TRUE(handler.idle());
    auto plane = make_ucx_data_plane(client_config(server.port()));
    ASSERT_TRUE(plane) << plane.error().to_string();
    EXPECT_TRUE((*plane)->pull(1, 0, 8 * kMiB));
    return;
  }
}

/// A server that waits half a second for a peer that takes no data.
UcxServerConfig impatient_config() {
  UcxServerConfig config = server_config();
  config.stall_timeout = 500ms;
  return config;
}

TEST(UcxFailure, AClientKilledWhilePushingIsReportedAndOthersAreServed) {
  expect_all_reported_after(SIGKILL, "--push");
}

TEST(UcxFailure, AClientKilledWhilePullingIsReportedAndOthersAreServed) {
  expect_all_reported_after(SIGKILL, "--pull");
}

TEST(UcxFailure, AStoppedPusherIsCutOffAndWritesNothingWhenItGoesOn) {
  expect_all_reported_after(SIGSTOP, "--push", impatient_config());
}

TEST(UcxFailure, AStoppedPullerIsCutOff) { expect_all_reported_after(SIGSTOP, "--pull", impatient_config()); }

// ------------------------------------------------------------------ hostile peers

TEST(UcxHostile, WrongHeadersAreAnsweredAndTouchNothing) {
  Pair pair;
  RawClient raw(pair.server->port());
  const auto wrong = [](auto change) {
    auto header = valid_header();
    change(header);
    return bytes_of(header);
  };
  const std::string payload(4096, 'x');
  const std::vector<std::string> headers = {
      "",
      "short",
      bytes_of(valid_header()) + "and more",
      wrong([](auto& header) { header.version = 2; }),
      wrong([](auto& header) { header.token_bytes = 65; }),
      wrong([](auto& header) { header.token_bytes = ~0U; }),
      wrong([](auto& header) { header.token_bytes -= 1; }),
      wrong([](auto& header) { header.bytes = 4097; }),
      wrong([](auto& header) { header.bytes = 0; }),
      wrong([](auto& header) { header.offset = ~std::uint64_t{0} - 100; }),
      wrong([](auto& header) { header.object_id = kGoneObject; }),
  };
  int sent = 0;
  for (const auto& header : headers) {
    for (const auto& body : {payload, std::string(4 * kMiB, 'x')}) {
      raw.send(ucx::kPush, header, body);
      while (raw.answers < sent + 1 && !raw.cut) raw.step();
      ASSERT_FALSE(raw.cut);
      ++sent;
    }
  }
  EXPECT_EQ(pair.handler.count_begun(), 0U);
  // Without a way to answer, or not meant for a server: nothing happens.
  raw.send(ucx::kPush, bytes_of(valid_header()), payload, false);
  raw.send(ucx::kAnswer, bytes_of(valid_header()), payload);
  raw.send(ucx::kData, bytes_of(valid_header()), payload);
  raw.send(1000, bytes_of(valid_header()), payload);
  EXPECT_TRUE(pair.plane->pull(1, 0, 2 * kMiB));
  EXPECT_EQ(pair.handler.count_begun(), 1U);
}

TEST(UcxHostile, ArbitraryMessagesNeverStopTheServer) {
  Pair pair;
  auto raw = std::make_unique<RawClient>(pair.server->port());
  EXPECT_TRUE(rc::check([&] {
    const auto id = *rc::gen::inRange(0U, 20U);
    std::string header = bytes_of(valid_header());
    if (*rc::gen::arbitrary<bool>()) {
      header = *rc::gen::arbitrary<std::string>();
    } else {
      const auto changes = *rc::gen::container<std::vector<std::pair<std::size_t, char>>>(
          rc::gen::pair(rc::gen::inRange<std::size_t>(0, header.size()), rc::gen::arbitrary<char>()));
      for (const auto& [at, value] : changes) header[at] = value;
    }
    const auto bytes = *rc::gen::element<std::size_t>(0, 1, 4096, 70000, 1000000);
    raw->send(id, header, std::string(bytes, 'x'));
    if (raw->cut) raw = std::make_unique<RawClient>(pair.server->port());
    RC_ASSERT(pair.plane->pull(1, 0, 4096).has_value());
  }));
}

/// A server that answers every request with what the test says.
class RawServer {
 public:
  struct Answer {
    unsigned id;
    std::string header;
    std::string payload;
  };
  using Script = std::function<std::vector<Answer>(unsigned id, const ucx::RequestHeader& request)>;

  explicit RawServer(Script script) : script_(std::move(script)) {
    std::promise<void> ready;
    thread_ = std::thread([this, &ready] { run(ready); });
    ready.get_future().wait();
  }
  ~RawServer() {
    stopping_ = true;
    wake_.signal();
    thread_.join();
  }
  std::uint16_t port() const { return port_; }

 private:
  template <unsigned kId>
  static ucs_status_t on_request(void* self, const void* bytes, std::size_t count, void*, std::size_t,
                                 const ucp_am_recv_param_t* parameters) {
    ucx::RequestHeader request;
    EXPECT_TRUE(ucx::parse(bytes, count, &request));
    auto* const server = static_cast<RawServer*>(self);
    server->endpoint_ = parameters->reply_ep;
    for (auto& answer : server->script_(kId, request)) server->todo_.push_back(std::move(answer));
    return UCS_OK;
  }

  void run(std::promise<void>& ready) {
    ucx::Worker worker("", "lo");
    worker.set_handler(ucx::kHello, &on_request<ucx::kHello>, this);
    worker.set_handler(ucx::kPush, &on_request<ucx::kPush>, this);
    worker.set_handler(ucx::kPull, &on_request<ucx::kPull>, this);
    const auto address = ucx::resolve("127.0.0.1", 0);
    ucp_listener_params_t parameters{};
    parameters.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
    parameters.sockaddr = address->ucx();
    parameters.conn_handler.cb = [](ucp_conn_request_h request, void* self) {
      static_cast<RawServer*>(self)->connections_.push_back(request);
    };
    parameters.conn_handler.arg = this;
    ucp_listener_h listener = nullptr;
    ASSERT_EQ(ucp_listener_create(worker.get(), &parameters, &listener), UCS_OK);
    ucp_listener_attr_t attributes{};
    attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
    ASSERT_EQ(ucp_listener_query(listener, &attributes), UCS_OK);
    port_ = ntohs(reinterpret_cast<const sockaddr_in&>(attributes.sockaddr).sin_port);
    ready.set_value();
    while (!stopping_) {
      for (ucp_conn_request_h request : std::exchange(connections_, {})) {
        ucp_ep_params_t endpoint{};
        endpoint.field_mask =
            UCP_EP_PARAM_FIELD_CONN_REQUEST | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
        endpoint.conn_request = request;
        endpoint.err_mode = UCP_ERR_HANDLING_MODE_PEER;
        endpoint.err_handler.cb = [](void* self, ucp_ep_h, ucs_status_t) {
          static_cast<RawServer*>(self)->todo_.clear();
        };
        endpoint.err_handler.arg = this;
        ucp_ep_h made = nullptr;
        ASSERT_EQ(ucp_ep_create(worker.get(), &endpoint, &made), UCS_OK);
      }
      for (const Answer& answer : std::exchange(todo_, {})) {
        ucp_request_param_t send{};
        const auto request = ucp_am_send_nbx(endpoint_, answer.id, answer.header.data(), answer.header.size(),
                                             answer.payload.data(), answer.payload.size(), &send);
        if (!UCS_PTR_IS_PTR(request)) continue;
        while (ucp_request_check_status(request) == UCS_INPROGRESS && !stopping_) worker.step(wake_, 1ms);
        ucp_request_free(request);
      }
      worker.step(wake_, 100ms);
    }
    ucp_listener_destroy(listener);
  }

  const Script script_;
  std::atomic<bool> stopping_ = false;
  EventFd wake_;
  std::uint16_t port_ = 0;
  ucp_ep_h endpoint_ = nullptr;
  std::vector<ucp_conn_request_h> connections_;
  std::vector<Answer> todo_;
  std::thread thread_;
};

std::string answer_header(std::uint64_t request_id, std::size_t bytes, std::uint32_t code = 0) {
  ucx::AnswerHeader header;
  header.request_id = request_id;
  header.bytes = bytes;
  header.code = code;
  return {reinterpret_cast<const char*>(&header), sizeof header};
}

/// What a client makes of the answers to its second request, a pull of 64 KiB.
Result<PulledBytes> pull_answered_with(
    const std::function<std::vector<RawServer::Answer>(std::uint64_t request_id)>& answers) {
  RawServer server([&](unsigned id, const ucx::RequestHeader& request) -> std::vector<RawServer::Answer> {
    if (id == ucx::kHello) return {{ucx::kAnswer, answer_header(request.request_id, 0), ""}};
    return answers(request.request_id);
  });
  auto config = client_config(server.port(), 64);
  config.timeout = 1000ms;
  auto plane = make_ucx_data_plane(config);
  if (!plane) return failure(plane.error());
  return (*plane)->pull(1, 0, 65536);
}

TEST(UcxHostile, AServersNonsenseIsAnErrorAtTheClient) {
  const std::string right(65536, 'r');
  const std::string small(100, 's');
  const std::string huge(3 * kMiB, 'h');
  EXPECT_TRUE(pull_answered_with([&](std::uint64_t id) -> std::vector<RawServer::Answer> {
    return {{ucx::kData, answer_header(id, right.size()), right}};
  }));
  for (const auto& payload : {small, huge}) {
    EXPECT_EQ(pull_answered_with([&](std::uint64_t id) -> std::vector<RawServer::Answer> {
                return {{ucx::kData, answer_header(id, payload.size()), payload}};
              })
                  .error()
                  .code(),
              Code::kInvalid);
  }
  EXPECT_EQ(pull_answered_with([&](std::uint64_t id) -> std::vector<RawServer::Answer> {
              return {{ucx::kAnswer, answer_header(id, 0), ""}};
            })
                .error()
                .code(),
            Code::kInvalid);
  EXPECT_EQ(pull_answered_with([&](std::uint64_t id) -> std::vector<RawServer::Answer> {
              return {{ucx::kAnswer, answer_header(id, 0, 9999), ""}};
            })
                .error()
                .code(),
            Code::kInvalid);
  // Garbage beside the answer, answers to what was not asked, answers given twice.
  EXPECT_TRUE(pull_answered_with([&](std::uint64_t id) -> std::vector<RawServer::Answer> {
    return {{ucx::kData, "short", small},
            {ucx::kAnswer, "", small},
            {ucx::kData, answer_header(id + 7, right.size()), right},
            {ucx::kData, answer_header(id, right.size() + 1), right},
            {ucx::kAnswer, answer_header(id, 3 * kMiB), huge},
            {ucx::kPush, answer_header(id, small.size()), small},
            {ucx::kData, answer_header(id, right.size()), right},
            {ucx::kData, answer_header(id, right.size()), right}};
  }));
  // No answer at all.
  EXPECT_EQ(pull_answered_with([&](std::uint64_t) { return std::vector<RawServer::Answer>(); }).error().code(),
            Code::kUnavailable);
}

// ------------------------------------------------------------------ roles of other processes

int serve() {
  MemoryHandler handler(kMemoryBytes);
  UcxServer server(server_config(), handler);
  std::cout << server.port() << std::endl;
  char end = 0;
  [[maybe_unused]] const auto ended = ::read(STDIN_FILENO, &end, 1);
  return 0;
}

/// Transfers from several threads until the server is gone; 0 when it ended as it should.
int transfer(std::uint16_t port, bool push) {
  auto plane = make_ucx_data_plane(client_config(port));
  if (!plane) return 1;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      constexpr std::size_t kBytes = 8 * kMiB;
      fill((*plane)->staging(thread * kBytes, kBytes).value(), thread);
      Status status;
      while (status) {
        status = push ? (*plane)->push(1, thread * kBytes, kBytes) : status_of((*plane)->pull(1, 0, kBytes));
      }
      if (status.code() != Code::kUnavailable) ++wrong;
    });
  }
  for (auto& thread : threads) thread.join();
  return wrong.load();
}

}  // namespace
}  // namespace kvern

int main(int argc, char** argv) {
  ::setenv("KVERN_UCX_MODULE", KVERN_UCX_MODULE_FILE, 0);
  kvern::prepare_ucx_environment();
  const std::string role = argc > 1 ? argv[1] : "";
  if (role == "--serve") return kvern::serve();
  if ((role == "--push" || role == "--pull") && argc == 3) {
    return kvern::transfer(static_cast<std::uint16_t>(std::stoul(argv[2])), role == "--push");
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
