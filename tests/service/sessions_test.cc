#include "service/sessions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>

#include "tests/service/service_fixture.h"

namespace kvern {
namespace {

using std::chrono::milliseconds;
using testing::ServiceFixture;

SessionIdentity tool() {
  SessionIdentity identity;
  identity.role = SessionRole::kTool;
  return identity;
}

/// The daemon looks after its sessions all the while.
void wait_silently(ServiceFixture& service, milliseconds duration) {
  constexpr milliseconds kTick{100};
  for (milliseconds passed{0}; passed < duration; passed += kTick) {
    service.clock.advance(kTick);
    service.sessions.tick();
  }
}

struct SessionsTest : ::testing::Test {
  // Before the service, whose hooks write here to the end.
  std::vector<std::pair<std::uint64_t, SessionEnd>> ends;
  std::vector<std::uint64_t> disconnected;
  ServiceFixture service;

  void SetUp() override {
    service.sessions.set_hooks(
        {.admitted = {},
         .ending = {},
         .ended = [this](const Session& session, SessionEnd why) { ends.emplace_back(session.id(), why); },
         .disconnect = [this](std::uint64_t connection) { disconnected.push_back(connection); },
         .wake = {}});
  }
};

TEST_F(SessionsTest, TokensAreLongAndDiffer) {
  const auto one = service.open_worker();
  const auto other = service.open_worker();
  EXPECT_EQ(one->token().size(), 32U);
  EXPECT_NE(one->token(), other->token());
  EXPECT_EQ(service.sessions.authenticate(one->token()).value(), one);
  EXPECT_EQ(service.sessions.authenticate(std::string(32, '\0')).error().code(), Code::kExpired);
}

TEST_F(SessionsTest, RepeatedAndOlderSequencesAreRefused) {
  const auto session = service.open_worker();  // its hello had number 1
  EXPECT_EQ(session->accept_sequence(1).code(), Code::kInvalid);
  EXPECT_TRUE(session->accept_sequence(5));
  EXPECT_EQ(session->accept_sequence(5).code(), Code::kInvalid);
  EXPECT_EQ(session->accept_sequence(4).code(), Code::kInvalid);
  EXPECT_TRUE(session->accept_sequence(6));
}

TEST_F(SessionsTest, ASilentSessionExpiresAndALoudOneDoesNot) {
  const auto silent = service.open_worker();
  const auto loud = service.open_worker();
  for (int i = 0; i < 4; ++i) {
    service.clock.advance(milliseconds(400));
    service.sessions.authenticate(loud->token()).value();
    service.sessions.tick();
  }
  EXPECT_THAT(ends, ::testing::ElementsAre(std::pair(silent->id(), SessionEnd::kExpired)));
  EXPECT_TRUE(silent->closed());
  EXPECT_EQ(service.sessions.authenticate(silent->token()).error().code(), Code::kExpired);
}

TEST_F(SessionsTest, NobodyIsBlamedForTheTimeInWhichTheDaemonDidNotRun) {
  const auto session = service.open_worker();
  service.sessions.tick();
  service.clock.advance(milliseconds(5000));  // what the client sends meanwhile waits in the daemon's sockets
  service.sessions.tick();
  EXPECT_TRUE(ends.empty());
  wait_silently(service, milliseconds(900));
  EXPECT_TRUE(ends.empty());
  wait_silently(service, milliseconds(200));
  EXPECT_THAT(ends, ::testing::ElementsAre(std::pair(session->id(), SessionEnd::kExpired)));
}

TEST_F(SessionsTest, TheHeartbeatWordKeepsALocalSessionWhateverItSays) {
  const auto session = service.open_local(1);
  auto& heartbeat = session->local()->segment.header().client_heartbeat_ns;
  for (const std::int64_t value : {INT64_MAX, INT64_MIN, std::int64_t{0}}) {
    heartbeat.store(value);
    wait_silently(service, milliseconds(800));
    EXPECT_TRUE(ends.empty());
  }
  wait_silently(service, milliseconds(1100));  // the word stands still
  EXPECT_EQ(ends.size(), 1U);
}

TEST_F(SessionsTest, AnExpiredSessionsMemoryStaysUntilItsProcessIsGone) {
  auto session = service.open_local(1);
  const std::weak_ptr<Session> watched = session;
  const auto& segment = session->local()->segment;
  wait_silently(service, milliseconds(1100));
  EXPECT_EQ(segment.header().state.load(), static_cast<std::uint32_t>(SessionState::kExpired));
  EXPECT_EQ(service.sessions.lingering(), 1U);
  EXPECT_TRUE(disconnected.empty());
  session.reset();
  ASSERT_FALSE(watched.expired());
  // The stopped process goes on and writes to its staging: nobody else has it.
  std::memset(watched.lock()->staging()->allocate(4096)->bytes().data(), 0xff, 4096);
  service.sessions.connection_closed(1);
  EXPECT_EQ(service.sessions.lingering(), 0U);
  EXPECT_TRUE(watched.expired());
}

TEST_F(SessionsTest, LingeringSessionsCountAgainstTheLimit) {
  ServiceFixture two(testing::kSlabBytes, 2);
  two.open_local(1);
  wait_silently(two, milliseconds(1100));
  two.open_local(2);
  EXPECT_EQ(two.sessions.open(tool(), 1).error().code(), Code::kBusy);
  two.sessions.connection_closed(1);
  EXPECT_TRUE(two.sessions.open(tool(), 1));
}

TEST_F(SessionsTest, ADeadProcessIsReapedByItsPidfd) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  const int pidfd = static_cast<int>(::syscall(SYS_pidfd_open, child, 0));
  if (pidfd < 0) GTEST_SKIP() << "no pidfd_open here";
  const auto session = service.sessions
                           .open({.role = SessionRole::kWorker,
                                  .plane = SessionPlane::kShm,
                                  .local = true,
                                  .tenant = {},
                                  .client_name = {},
                                  .attributes = {},
                                  .staging_bytes = 4096},
                                 1)
                           .value();
  PeerProcess peer;
  peer.pid = child;
  peer.pidfd = UniqueFd(pidfd);
  ASSERT_TRUE(service.sessions.admit(9, session->token(), std::move(peer)));
  service.sessions.tick();
  EXPECT_TRUE(ends.empty());
  ::kill(child, SIGKILL);
  siginfo_t info{};
  ::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED);
  service.sessions.tick();
  EXPECT_THAT(ends, ::testing::ElementsAre(std::pair(session->id(), SessionEnd::kDisconnected)));
  EXPECT_THAT(disconnected, ::testing::ElementsAre(9U));
}

TEST_F(SessionsTest, ASessionBelongsToOneProcess) {
  const auto session = service.open_local(1);
  EXPECT_EQ(service.sessions.admit(2, session->token(), PeerProcess{}).error().code(), Code::kRefused);
  const auto remote = service.open_worker();
  EXPECT_EQ(service.sessions.admit(3, remote->token(), PeerProcess{}).error().code(), Code::kRefused);
}

TEST_F(SessionsTest, StagingIsCappedAndNeverNothing) {
  const auto greedy = service.open_worker(1ULL << 40);
  EXPECT_EQ(greedy->staging()->capacity_bytes(), testing::kStagingBytes);
  const auto scheduler = service.sessions
                             .open({.role = SessionRole::kScheduler,
                                    .plane = SessionPlane::kShm,
                                    .local = true,
                                    .tenant = {},
                                    .client_name = {},
                                    .attributes = {},
                                    .staging_bytes = 0},
                                   1)
                             .value();
  ASSERT_TRUE(service.sessions.admit(4, scheduler->token(), PeerProcess{}));
  EXPECT_EQ(scheduler->staging()->capacity_bytes(), Slab::kAlignment);
}

TEST_F(SessionsTest, HazardsCountWhileTheSessionLives) {
  const auto session = service.open_local(1);
  const auto& segment = session->local()->segment;
  segment.hazards()[3].store(42 + 1);
  segment.header().hazard_high_water.store(UINT32_MAX);  // a client may write anything here
  std::unordered_set<std::uint32_t> claimed;
  service.hazards.collect(claimed);
  EXPECT_THAT(claimed, ::testing::UnorderedElementsAre(42U));
  service.sessions.end(session->id(), SessionEnd::kGoodbye);
  claimed.clear();
  service.hazards.collect(claimed);
  EXPECT_TRUE(claimed.empty());
}

TEST_F(SessionsTest, EndSoonEndsAtTheNextTick) {
  const auto session = service.open_worker();
  service.sessions.end_soon(session->id(), SessionEnd::kProtocolError);
  EXPECT_TRUE(ends.empty());
  service.sessions.tick();
  EXPECT_THAT(ends, ::testing::ElementsAre(std::pair(session->id(), SessionEnd::kProtocolError)));
}

TEST_F(SessionsTest, AStoppingDaemonSaysSoAndTakesNobody) {
  const auto session = service.open_local(1);
  service.sessions.begin_stop();
  EXPECT_EQ(session->local()->segment.header().state.load(), static_cast<std::uint32_t>(SessionState::kStopping));
  EXPECT_EQ(service.sessions.open(tool(), 1).error().code(), Code::kUnavailable);
  service.sessions.end_all();
  EXPECT_EQ(session->local()->segment.header().state.load(), static_cast<std::uint32_t>(SessionState::kStopping))
      << "nobody overwrites what it is still reading";
  EXPECT_TRUE(service.sessions.list().empty());
}

}  // namespace
}  // namespace kvern
