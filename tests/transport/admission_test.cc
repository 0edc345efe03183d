#include "transport/admission.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "tests/transport/test_daemon.h"

namespace kvern {
namespace {

using ::testing::HasSubstr;
using testing::TestDaemon;

constexpr std::chrono::seconds kPatience = TestDaemon::kPatience;

class Admission : public ::testing::Test {
 protected:
  Admission() {
    std::string pattern = "/tmp/kvern-admission-XXXXXX";
    directory_ = ::mkdtemp(pattern.data());
    path_ = directory_ + "/admission.sock";
  }
  ~Admission() override { std::filesystem::remove_all(directory_); }

  UniqueFd raw_connection() const {
    UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    return fd;
  }

  /// Waits for the end of the connection, dropping what is sent before.
  static bool ends(int fd) {
    char packet[4096];
    for (;;) {
      pollfd poll_fd{.fd = fd, .events = POLLIN, .revents = 0};
      if (::poll(&poll_fd, 1, static_cast<int>(std::chrono::milliseconds(kPatience).count())) != 1) return false;
      if (::recv(fd, packet, sizeof packet, 0) <= 0) return true;
    }
  }

  /// The status of the answer to a packet.
  static Code answer_to(int fd, const std::string& packet) {
    EXPECT_EQ(::send(fd, packet.data(), packet.size(), MSG_NOSIGNAL), static_cast<ssize_t>(packet.size()));
    char answer[4096];
    const ssize_t bytes = ::recv(fd, answer, sizeof answer, 0);
    wire::Admitted admitted;
    EXPECT_TRUE(bytes > 0 && admitted.ParseFromArray(answer, static_cast<int>(bytes)));
    return to_status(admitted.status()).code();
  }

  static std::string admit_packet() {
    wire::Admit request;
    request.set_session_token("token");
    return request.SerializeAsString();
  }

  static std::size_t open_descriptors() {
    const std::filesystem::directory_iterator entries("/proc/self/fd");
    return static_cast<std::size_t>(std::distance(begin(entries), end(entries)));
  }

  std::string directory_;
  std::string path_;
};

TEST_F(Admission, HandsOutTheDescriptorsInOrder) {
  TestDaemon daemon(path_);
  auto session = request_admission(path_, "token", kPatience);
  ASSERT_TRUE(session) << session.error().to_string();
  EXPECT_EQ(session->answer.slab_bytes(), TestDaemon::kSlabBytes);
  EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, session->slab.get(), 0), MAP_FAILED);
  auto slab = SharedMemory::map(std::move(session->slab), session->answer.slab_bytes(), false);
  ASSERT_TRUE(slab) << slab.error().to_string();
  EXPECT_EQ(slab->bytes()[0], std::byte{77});
  auto segment = SharedMemory::map(std::move(session->segment), session->answer.segment_bytes(), true);
  ASSERT_TRUE(segment) << segment.error().to_string();
  EXPECT_TRUE(SegmentView::attach(segment->bytes()));
  auto staging = SharedMemory::map(std::move(session->staging), session->answer.staging_bytes(), true);
  ASSERT_TRUE(staging) << staging.error().to_string();
  EXPECT_EQ(::eventfd_write(session->doorbell.get(), 1), 0);
}

TEST_F(Admission, KnowsWhoThePeerIs) {
  TestDaemon daemon(path_);
  const auto session = request_admission(path_, "token", kPatience);
  ASSERT_TRUE(session);
  const auto peers = daemon.take_peers();
  ASSERT_EQ(peers.size(), 1u);
  EXPECT_EQ(peers[0].pid, ::getpid());
  EXPECT_EQ(peers[0].uid, ::getuid());
  EXPECT_EQ(peers[0].gid, ::getgid());
  pollfd alive{.fd = peers[0].pidfd.get(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(::poll(&alive, 1, 0), 0);
}

TEST_F(Admission, RefusalComesBackAndEndsTheConnection) {
  TestDaemon daemon(path_);
  const auto session = request_admission(path_, "refuse", kPatience);
  ASSERT_FALSE(session);
  EXPECT_EQ(session.error().code(), Code::kRefused);
  EXPECT_EQ(session.error().message(), "no such session");
  EXPECT_EQ(daemon.closed_connections(), 0u);
}

TEST_F(Admission, EndOfTheClientIsNoticed) {
  TestDaemon daemon(path_);
  {
    const auto session = request_admission(path_, "token", kPatience);
    ASSERT_TRUE(session);
    EXPECT_EQ(daemon.closed_connections(), 0u);
  }
  EXPECT_TRUE(daemon.wait_for_closed(1));
}

TEST_F(Admission, DisconnectEndsTheConnectionWithoutCallingBack) {
  TestDaemon daemon(path_);
  const auto session = request_admission(path_, "token", kPatience);
  ASSERT_TRUE(session);
  const std::uint64_t connection = daemon.last_session();
  daemon.disconnect(connection + 1000);
  daemon.disconnect(connection);
  EXPECT_TRUE(ends(session->connection.get()));
  daemon.stop();
  EXPECT_EQ(daemon.closed_connections(), 0u);
}

TEST_F(Admission, EndOfTheDaemonEndsTheConnection) {
  auto daemon = std::make_unique<TestDaemon>(path_);
  const auto session = request_admission(path_, "token", kPatience);
  ASSERT_TRUE(session);
  daemon.reset();
  EXPECT_TRUE(ends(session->connection.get()));
}

TEST_F(Admission, SilentConnectionIsClosedInTime) {
  TestDaemon daemon(path_, {}, {}, {.first_packet_timeout = std::chrono::milliseconds(10)});
  const UniqueFd silent = raw_connection();
  EXPECT_TRUE(ends(silent.get()));
  EXPECT_EQ(daemon.closed_connections(), 0u);
}

TEST_F(Admission, FloodOfSilentConnectionsDoesNotShutOthersOut) {
  TestDaemon daemon(path_, {}, {}, {.max_silent = 4, .first_packet_timeout = std::chrono::hours(1)});
  std::vector<UniqueFd> flood;
  for (int i = 0; i < 50; ++i) flood.push_back(raw_connection());
  const auto session = request_admission(path_, "token", kPatience);
  ASSERT_TRUE(session) << session.error().to_string();
  EXPECT_TRUE(ends(flood.front().get()));
}

TEST_F(Admission, SessionsAreBounded) {
  TestDaemon daemon(path_, {}, {}, {.max_connections = 2});
  auto first = request_admission(path_, "token", kPatience);
  const auto second = request_admission(path_, "token", kPatience);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(request_admission(path_, "token", kPatience).error().code(), Code::kBusy);
  first->connection = UniqueFd();
  ASSERT_TRUE(daemon.wait_for_closed(1));
  EXPECT_TRUE(request_admission(path_, "token", kPatience));
}

TEST_F(Admission, WhatIsNoAdmitMessageIsAnsweredAndClosed) {
  TestDaemon daemon(path_);
  for (const std::string& packet : {std::string(1, '\xff'), std::string(4096, '\xff'), std::string(5000, 'x')}) {
    const UniqueFd fd = raw_connection();
    EXPECT_EQ(answer_to(fd.get(), packet), Code::kInvalid);
    EXPECT_TRUE(ends(fd.get()));
  }
  EXPECT_TRUE(request_admission(path_, "token", kPatience));
}

TEST_F(Admission, DescriptorsSentByAPeerAreNotKept) {
  TestDaemon daemon(path_);
  const UniqueFd fd = raw_connection();
  const std::size_t before = open_descriptors();
  std::string packet = "\xff";
  iovec part{.iov_base = packet.data(), .iov_len = packet.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  ASSERT_EQ(::sendmsg(fd.get(), &message, 0), 1);
  ASSERT_TRUE(ends(fd.get()));
  // The daemon lives in this process; by now it has closed its end of the connection, too.
  EXPECT_LE(open_descriptors(), before);
}

TEST_F(Admission, OfferedDescriptorsArriveAndEndTheirConnectionAlone) {
  TestDaemon daemon(path_);
  const auto session = request_admission(path_, "x", kPatience);
  ASSERT_TRUE(session);
  const auto memory = SharedMemory::create_anonymous("kvern-test-offer", 4096).value();
  memory.bytes()[5] = std::byte{55};
  const Status offered = offer_descriptors(path_, "offer", {memory.fd(), memory.fd(), memory.fd()}, kPatience);
  ASSERT_TRUE(offered) << offered.message();
  auto descriptors = daemon.take_offered();
  ASSERT_EQ(descriptors.size(), 3U);
  const auto mapped = SharedMemory::map(std::move(descriptors[2]), 4096, true);
  ASSERT_TRUE(mapped);
  EXPECT_EQ(mapped->bytes()[5], std::byte{55});
  EXPECT_EQ(offer_descriptors(path_, "other", {memory.fd()}, kPatience).code(), Code::kRefused);
  EXPECT_EQ(offer_descriptors(path_, "offer", {}, kPatience).code(), Code::kRefused);
  EXPECT_TRUE(daemon.take_offered().empty());
  // The session that was admitted goes on.
  EXPECT_TRUE(request_admission(path_, "y", kPatience));
  pollfd alive{.fd = session->connection.get(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(::poll(&alive, 1, 0), 0);
}

TEST_F(Admission, AnOfferWithoutItsDescriptorsIsRefused) {
  TestDaemon daemon(path_);
  wire::Admit request;
  request.set_session_token("offer");
  request.set_offered(2);
  const UniqueFd connection = raw_connection();
  EXPECT_EQ(answer_to(connection.get(), request.SerializeAsString()), Code::kInvalid);
  EXPECT_TRUE(ends(connection.get()));
}

TEST_F(Admission, SecondPacketEndsTheSession) {
  TestDaemon daemon(path_);
  const UniqueFd fd = raw_connection();
  ASSERT_EQ(answer_to(fd.get(), admit_packet()), Code::kOk);
  ASSERT_EQ(::send(fd.get(), "x", 1, MSG_NOSIGNAL), 1);
  EXPECT_TRUE(daemon.wait_for_closed(1));
  EXPECT_TRUE(ends(fd.get()));
}

TEST_F(Admission, SocketFileHasTheModeAndGoesWithTheServer) {
  {
    TestDaemon daemon(path_);
    struct stat info {};
    ASSERT_EQ(::stat(path_.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600u);
  }
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(Admission, StaleSocketFileIsReplaced) {
  {
    const UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    ASSERT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  ASSERT_TRUE(std::filesystem::exists(path_));
  TestDaemon daemon(path_);
  EXPECT_TRUE(request_admission(path_, "token", kPatience));
}

TEST_F(Admission, LiveSocketAndOtherFilesAreLeftAlone) {
  TestDaemon daemon(path_);
  try {
    TestDaemon second(path_);
    FAIL() << "two daemons on one socket";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), EADDRINUSE);
    EXPECT_THAT(error.what(), HasSubstr("another process listens on " + path_));
  }
  EXPECT_TRUE(request_admission(path_, "token", kPatience));
  const std::string file = directory_ + "/file";
  std::ofstream(file) << "precious";
  EXPECT_THROW(TestDaemon third(file), std::system_error);
  EXPECT_TRUE(std::filesystem::exists(file));
}

TEST_F(Admission, ClientSaysWhyItCannotConnect) {
  const auto absent = request_admission(path_, "token", kPatience);
  ASSERT_FALSE(absent);
  EXPECT_EQ(absent.error().code(), Code::kUnavailable);
  EXPECT_THAT(absent.error().message(), HasSubstr(path_));
  EXPECT_EQ(request_admission(std::string(200, 'x'), "token", kPatience).error().code(), Code::kInvalid);
}

TEST_F(Admission, ClientDoesNotWaitLongerThanAskedFor) {
  const UniqueFd mute(::socket(AF_UNIX, SOCK_SEQPACKET, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path_.data(), path_.size());
  ASSERT_EQ(::bind(mute.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(mute.get(), 1), 0);
  const auto session = request_admission(path_, "token", std::chrono::milliseconds(20));
  ASSERT_FALSE(session);
  EXPECT_EQ(session.error().code(), Code::kUnavailable);
  EXPECT_THAT(session.error().message(), HasSubstr("does not answer"));
}

}  // namespace
}  // namespace kvern
