#include "transport/control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>
#include <zmq.hpp>

namespace kvern {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;

// Long enough that only a defect lets it pass, also under sanitizers on a busy machine.
constexpr auto kPatience = 20000ms;

/// A folder for socket files that goes with the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = "/tmp/kvern-control-XXXXXX";
    path_ = ::mkdtemp(pattern.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// Answers a status query with its client's name as the transport knows it; keeps replies of flush requests.
class Handler : public ControlHandler {
 public:
  void handle(const ControlPeer& peer, wire::ControlRequest request, ControlReplyFunction reply) override {
    std::unique_lock lock(mutex);
    sequences.push_back(request.sequence());
    wire::ControlReply answer;
    if (request.has_flush()) {
      kept.push_back(std::move(reply));
      changed.notify_all();
      return;
    }
    if (request.has_hot()) {
      if (request.session_token() != "token") {
        set_status({Code::kExpired, "no such session"}, answer.mutable_status());
      } else {
        answer.mutable_hot()->set_id(request.hot().id());
        answer.mutable_hot()->mutable_fetched();
      }
    } else {
      answer.mutable_status_report()->set_json((peer.local ? "local " : "remote ") + peer.public_key);
    }
    lock.unlock();
    reply(std::move(answer));
  }
  void malformed(const ControlPeer&, const Status& why) override {
    std::lock_guard lock(mutex);
    complaints.push_back(why.message());
    changed.notify_all();
  }
  std::vector<std::uint64_t> seen() {
    std::lock_guard lock(mutex);
    return sequences;
  }
  ControlReplyFunction take_kept() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return !kept.empty(); });
    auto reply = std::move(kept.back());
    kept.pop_back();
    return reply;
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::uint64_t> sequences;
  std::vector<ControlReplyFunction> kept;
  std::vector<std::string> complaints;
};

struct Local {
  TemporaryFolder folder;
  std::string path = folder.file("kvernd.sock");
  Handler handler;
  ControlServerConfig config;
  std::unique_ptr<ControlServer> server;

  Local() {
    config.unix_path = path;
    server = std::make_unique<ControlServer>(config, handler);
  }
  std::string endpoint() const { return "ipc://" + path; }
  std::unique_ptr<ControlClient> client() const {
    return std::make_unique<ControlClient>(ControlClientConfig{endpoint(), {}, {}});
  }
};

Result<std::string> ask_name(ControlClient& client, std::chrono::milliseconds timeout = kPatience) {
  wire::ControlRequest request;
  request.mutable_status();
  wire::ControlReply reply;
  if (Status status = client.call(request, &reply, timeout); !status) return failure(status);
  EXPECT_EQ(reply.sequence(), request.sequence());
  return reply.status_report().json();
}

/// A peer that says what it likes.
class RawPeer {
 public:
  explicit RawPeer(const std::string& endpoint) {
    socket_.set(zmq::sockopt::linger, 0);
    socket_.set(zmq::sockopt::rcvtimeo, static_cast<int>(kPatience.count()));
    socket_.connect(endpoint);
  }
  void send(const std::vector<std::string>& parts) {
    for (std::size_t i = 0; i < parts.size(); ++i) {
      socket_.send(zmq::buffer(parts[i]), i + 1 < parts.size() ? zmq::send_flags::sndmore : zmq::send_flags::none);
    }
  }
  wire::ControlReply receive() {
    zmq::message_t frame;
    wire::ControlReply reply;
    if (!socket_.recv(frame)) {
      ADD_FAILURE() << "no answer";
      return reply;
    }
    EXPECT_TRUE(reply.ParseFromArray(frame.data(), static_cast<int>(frame.size())));
    return reply;
  }

 private:
  zmq::context_t context_{1};
  zmq::socket_t socket_{context_, zmq::socket_type::dealer};
};

TEST(ControlServerConfig, TcpWithoutKeysSaysWhatToDo) {
  ControlServerConfig config;
  config.tcp_endpoint = "tcp://127.0.0.1:*";
  const Status status = config.validate();
  EXPECT_EQ(status.code(), Code::kRefused);
  EXPECT_THAT(status.message(), HasSubstr("kvernctl keygen"));
  EXPECT_THAT(status.message(), HasSubstr("insecure = true"));
  config.insecure = true;
  EXPECT_TRUE(config.validate());
}

TEST(ControlServerConfig, RefusesNothingToListenOnAndBrokenKeys) {
  EXPECT_EQ(ControlServerConfig{}.validate().code(), Code::kInvalid);
  ControlServerConfig config;
  config.tcp_endpoint = "tcp://127.0.0.1:*";
  config.server_keys = *generate_curve_keys();
  EXPECT_TRUE(config.validate());
  config.allowed_client_keys = {"too short"};
  EXPECT_THAT(config.validate().message(), HasSubstr("too short"));
  config.allowed_client_keys.clear();
  config.server_keys->secret_key[7] = '"';  // not in the Z85 alphabet
  EXPECT_EQ(config.validate().code(), Code::kInvalid);
}

TEST(Curve, KeysArePairsOf40CharactersAndDiffer) {
  const auto one = generate_curve_keys();
  const auto two = generate_curve_keys();
  ASSERT_TRUE(one && two);
  EXPECT_EQ(one->public_key.size(), 40U);
  EXPECT_EQ(one->secret_key.size(), 40U);
  EXPECT_NE(one->secret_key, two->secret_key);
}

TEST(Control, LocalPeerIsKnownAsLocal) {
  Local local;
  EXPECT_EQ(ask_name(*local.client()).value(), "local ");
}

TEST(Control, SocketFileHasItsModeAndGoesWithTheServer) {
  TemporaryFolder folder;
  Handler handler;
  ControlServerConfig config;
  config.unix_path = folder.file("kvernd.sock");
  config.unix_mode = 0602;  // no umask in use allows this one by accident
  {
    ControlServer server(config, handler);
    struct stat file {};
    ASSERT_EQ(::stat(config.unix_path.c_str(), &file), 0);
    EXPECT_EQ(file.st_mode & 0777U, 0602U);
  }
  EXPECT_FALSE(std::filesystem::exists(config.unix_path));
}

TEST(Control, StaleSocketFileIsReplacedAndALiveOneIsAnError) {
  Local local;
  Handler second;
  try {
    ControlServer server(local.config, second);
    FAIL() << "took the socket of a server that is alive";
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr(local.path));
    EXPECT_THAT(error.what(), HasSubstr("another process listens"));
  }
  EXPECT_TRUE(ask_name(*local.client()));

  ControlServerConfig config = local.config;
  config.unix_path = local.folder.file("stale.sock");
  const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, config.unix_path.c_str());
  ASSERT_EQ(::bind(socket, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ::close(socket);
  ASSERT_TRUE(std::filesystem::exists(config.unix_path));
  ControlServer server(config, second);
  ControlClient client({"ipc://" + config.unix_path, {}, {}});
  EXPECT_TRUE(ask_name(client));
}

TEST(Control, AFileThatIsNoSocketIsLeftAlone) {
  TemporaryFolder folder;
  Handler handler;
  ControlServerConfig config;
  config.unix_path = folder.file("notes.txt");
  std::ofstream(config.unix_path) << "precious";
  EXPECT_THROW(ControlServer(config, handler), std::runtime_error);
  std::string text;
  std::ifstream(config.unix_path) >> text;
  EXPECT_EQ(text, "precious");
}

TEST(Control, BindErrorNamesEndpointAndReason) {
  Handler handler;
  ControlServerConfig config;
  config.insecure = true;
  config.tcp_endpoint = "tcp://127.0.0.1:*";
  ControlServer first(config, handler);
  config.tcp_endpoint = first.tcp_endpoint();
  try {
    ControlServer second(config, handler);
    FAIL() << "bound twice";
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr(config.tcp_endpoint));
    EXPECT_THAT(error.what(), HasSubstr("in use"));
  }
  config.tcp_endpoint.clear();
  config.unix_path = "/nowhere/at/all/kvernd.sock";
  try {
    ControlServer second(config, handler);
    FAIL() << "bound in a folder that does not exist";
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr(config.unix_path));
    EXPECT_THAT(error.what(), HasSubstr("No such file"));
  }
}

TEST(Control, ManyThreadsGetTheirOwnAnswersWithRisingSequences) {
  Local local;
  auto client = local.client();
  constexpr int kThreads = 8;
  constexpr int kCalls = 50;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int call = 0; call < kCalls; ++call) EXPECT_TRUE(ask_name(*client));
    });
  }
  for (auto& thread : threads) thread.join();
  const auto sequences = local.handler.seen();
  ASSERT_EQ(sequences.size(), static_cast<std::size_t>(kThreads * kCalls));
  EXPECT_EQ(std::adjacent_find(sequences.begin(), sequences.end(), std::greater_equal<>()), sequences.end());
}

TEST(Control, AnswersInAnotherOrderAndFromOtherThreadsFindTheirCallers) {
  Local local;
  auto client = local.client();
  const auto flush = [&](std::uint64_t* chunks) {
    wire::ControlRequest request;
    request.mutable_flush();
    wire::ControlReply reply;
    EXPECT_TRUE(client->call(request, &reply, kPatience));
    EXPECT_EQ(reply.sequence(), request.sequence());
    *chunks = reply.flushed().chunks();
  };
  std::uint64_t first = 0;
  std::uint64_t second = 0;
  std::thread one([&] { flush(&first); });
  auto first_reply = local.handler.take_kept();
  std::thread two([&] { flush(&second); });
  auto second_reply = local.handler.take_kept();
  const auto answer = [](std::uint64_t chunks) {
    wire::ControlReply reply;
    reply.mutable_flushed()->set_chunks(chunks);
    return reply;
  };
  std::thread([&] { second_reply(answer(2)); }).join();
  two.join();
  std::thread([&] { first_reply(answer(1)); }).join();
  one.join();
  EXPECT_EQ(first, 1U);
  EXPECT_EQ(second, 2U);
}

TEST(Control, ALateAnswerIsDroppedAndTheNextCallGetsItsOwn) {
  Local local;
  auto client = local.client();
  ASSERT_TRUE(ask_name(*client));
  wire::ControlRequest request;
  request.mutable_flush();
  wire::ControlReply reply;
  const Status status = client->call(request, &reply, 20ms);
  EXPECT_EQ(status.code(), Code::kUnavailable);
  EXPECT_THAT(status.message(), HasSubstr(local.path));
  auto late = local.handler.take_kept();
  late({});
  late({});  // answering twice hurts nobody either
  EXPECT_EQ(ask_name(*client).value(), "local ");
}

TEST(Control, AReplyAfterTheServerIsGoneIsDropped) {
  Local local;
  auto client = local.client();
  std::thread caller([&] {
    wire::ControlRequest request;
    request.mutable_flush();
    wire::ControlReply reply;
    EXPECT_EQ(client->call(request, &reply, kPatience).code(), Code::kUnavailable);
  });
  auto reply = local.handler.take_kept();
  local.server.reset();
  reply({});
  client->close();
  caller.join();
}

TEST(Control, CloseWakesAllWaitingCalls) {
  Local local;
  auto client = local.client();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      wire::ControlRequest request;
      request.mutable_flush();
      wire::ControlReply reply;
      EXPECT_EQ(client->call(request, &reply, std::chrono::hours(1)).code(), Code::kUnavailable);
    });
  }
  for (int i = 0; i < 4; ++i) local.handler.take_kept();
  client->close();
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(ask_name(*client).error().code(), Code::kUnavailable);
}

TEST(Control, ClientReconnectsToARestartedServerAndOldRequestsStayUnsent) {
  Local local;
  auto client = local.client();
  ASSERT_TRUE(ask_name(*client));
  local.server.reset();
  // Whichever the client notices first, the time-out or the closed connection: this request has had its time.
  EXPECT_EQ(ask_name(*client, 300ms).error().code(), Code::kUnavailable);
  const std::size_t before = local.handler.seen().size();
  local.server = std::make_unique<ControlServer>(local.config, local.handler);
  EXPECT_EQ(ask_name(*client).value(), "local ");
  EXPECT_EQ(local.handler.seen().size(), before + 1);
}

TEST(Control, AnOversizedRequestIsRefusedBeforeItIsSent) {
  Local local;
  auto client = local.client();
  wire::ControlRequest request;
  request.mutable_explain()->set_block_hash(std::string(kMaxMessageBytes, 'x'));
  wire::ControlReply reply;
  EXPECT_EQ(client->call(request, &reply, kPatience).code(), Code::kInvalid);
  EXPECT_TRUE(ask_name(*client));
}

TEST(Control, WrongFramesAreCountedAndAnswered) {
  Local local;
  RawPeer peer(local.endpoint());
  const std::vector<std::vector<std::string>> wrong = {
      {"", "a REQ socket would send this"}, {"\xff\xff\xff"}, {std::string(kMaxMessageBytes + 1, 'x')}, {""}};
  for (const auto& parts : wrong) {
    peer.send(parts);
    EXPECT_EQ(to_status(peer.receive().status()).code(), Code::kInvalid);
  }
  std::lock_guard lock(local.handler.mutex);
  EXPECT_EQ(local.handler.complaints.size(), wrong.size());
}

TEST(Control, AFloodedConnectionIsCutAndOthersAreServed) {
  Local local;
  RawPeer hostile(local.endpoint());
  for (int i = 0; i < 4; ++i) hostile.send({std::string(4 * kMaxMessageBytes, 'x')});
  EXPECT_TRUE(ask_name(*local.client()));
  std::lock_guard lock(local.handler.mutex);
  EXPECT_TRUE(local.handler.complaints.empty());
}

RC_GTEST_PROP(Control, ArbitraryFramesNeverStopTheServer, (const std::vector<std::string>& frames)) {
  static Local* local = new Local;  // one server for all of the property's cases
  RawPeer peer(local->endpoint());
  for (const auto& frame : frames) peer.send({frame});
  wire::ControlRequest request;
  request.set_sequence(77);
  request.mutable_status();
  peer.send({request.SerializeAsString()});
  std::size_t answers = 0;
  while (peer.receive().sequence() != 77) ++answers;
  RC_ASSERT(answers <= frames.size());
}

TEST(Control, RepliesToAPeerThatIsGoneAreCounted) {
  Local local;
  ControlReplyFunction reply;
  {
    RawPeer peer(local.endpoint());
    wire::ControlRequest request;
    request.mutable_flush();
    peer.send({request.SerializeAsString()});
    reply = local.handler.take_kept();
  }
  while (local.server->dropped_replies() == 0) {
    reply({});
    std::this_thread::yield();
  }
}

struct Remote {
  CurveKeyPair server_keys = *generate_curve_keys();
  CurveKeyPair known = *generate_curve_keys();
  CurveKeyPair stranger = *generate_curve_keys();
  Handler handler;
  std::unique_ptr<ControlServer> server;

  Remote() {
    ControlServerConfig config;
    config.tcp_endpoint = "tcp://127.0.0.1:*";
    config.server_keys = server_keys;
    config.allowed_client_keys = {generate_curve_keys()->public_key, known.public_key};
    server = std::make_unique<ControlServer>(config, handler);
  }
};

TEST(ControlCurve, TheServerKnowsTheKeyThatTheTransportAuthenticated) {
  Remote remote;
  ControlClient client({remote.server->tcp_endpoint(), remote.server_keys.public_key, remote.known});
  EXPECT_EQ(ask_name(client).value(), "remote " + remote.known.public_key);
}

TEST(ControlCurve, AStrangerNeverReachesTheHandler) {
  Remote remote;
  ControlClient stranger({remote.server->tcp_endpoint(), remote.server_keys.public_key, remote.stranger});
  const auto answer = ask_name(stranger, 500ms);
  ASSERT_FALSE(answer);
  EXPECT_THAT(answer.error().message(), HasSubstr("allowed"));
  ControlClient plain({remote.server->tcp_endpoint(), {}, {}});
  EXPECT_FALSE(ask_name(plain, 500ms));
  ControlClient wrong_server({remote.server->tcp_endpoint(), remote.stranger.public_key, remote.known});
  EXPECT_FALSE(ask_name(wrong_server, 500ms));
  // They were still trying while this one got through.
  ControlClient known({remote.server->tcp_endpoint(), remote.server_keys.public_key, remote.known});
  EXPECT_TRUE(ask_name(known));
  EXPECT_EQ(remote.handler.seen().size(), 1U);
}

TEST(ControlCurve, AClientWithAServerKeyNeedsItsOwn) {
  EXPECT_THROW(ControlClient({"tcp://127.0.0.1:1", generate_curve_keys()->public_key, {}}), std::runtime_error);
  EXPECT_THROW(ControlClient({"tcp://127.0.0.1:1", "short", *generate_curve_keys()}), std::runtime_error);
}

TEST(ControlCurve, InsecureTcpPeerIsRemoteAndNameless) {
  Handler handler;
  ControlServerConfig config;
  config.tcp_endpoint = "tcp://127.0.0.1:*";
  config.insecure = true;
  ControlServer server(config, handler);
  ControlClient client({server.tcp_endpoint(), {}, {}});
  EXPECT_EQ(ask_name(client).value(), "remote ");
}

TEST(ControlChannel, HotMessagesTravelInsideControlMessages) {
  Local local;
  std::shared_ptr<ControlClient> client = local.client();
  auto channel = make_control_channel(client, "token");
  wire::HotRequest request;
  request.mutable_fetch()->set_group(3);
  wire::HotReply reply;
  ASSERT_TRUE(channel->call(request, &reply, kPatience));
  EXPECT_EQ(reply.id(), request.id());
  EXPECT_EQ(request.fetch().group(), 3U);
  EXPECT_TRUE(reply.has_fetched());
  EXPECT_TRUE(channel->alive());
}

TEST(ControlChannel, AnExpiredSessionEndsTheChannel) {
  Local local;
  std::shared_ptr<ControlClient> client = local.client();
  auto channel = make_control_channel(client, "old token");
  wire::HotRequest request;
  request.mutable_fetch();
  wire::HotReply reply;
  EXPECT_EQ(channel->call(request, &reply, kPatience).code(), Code::kExpired);
  EXPECT_FALSE(channel->alive());
  EXPECT_EQ(channel->call(request, &reply, kPatience).code(), Code::kUnavailable);
}

}  // namespace
}  // namespace kvern
