// The other process of process_test.cc: peer_process ROLE SOCKET [ARGUMENT]. Says "ready" when it is set up, and ends
// when its standard input does.

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <string_view>

#include "tests/transport/test_daemon.h"
#include "transport/ring.h"

namespace kvern::testing {
namespace {

void say(const std::string& line) { std::printf("%s\n", line.c_str()), std::fflush(stdout); }

/// False at the end of the input.
bool wait_for_byte() {
  char byte = 0;
  return ::read(STDIN_FILENO, &byte, 1) == 1;
}

int ping(TestClient& client, int count) {
  for (int i = 0; i < count; ++i) {
    if (const Status status = client.echo("ping " + std::to_string(i)); !status) {
      say(status.to_string());
      return 1;
    }
  }
  return 0;
}

/// Pushes frames of all sizes as fast as it can, so that a kill often hits it in the middle of one.
[[noreturn]] void push_for_ever(const TestClient& client) {
  SessionHeader& header = client.view.header();
  RingProducer requests(client.view.request_ring(), header.request_head, header.request_tail);
  RingConsumer replies(client.view.reply_ring(), header.reply_head, header.reply_tail);
  std::minstd_rand random(static_cast<unsigned>(::getpid()));
  std::string reply;
  for (;;) {
    const std::string text(random() % 200'000, static_cast<char>(random()));
    const std::string frame = TestDaemon::make_echo(text).SerializeAsString();
    while (requests.push(std::as_bytes(std::span(frame))).code() == Code::kBusy) {
      while (replies.pop(&reply).is_ok()) {
      }
      ::eventfd_write(client.session.doorbell.get(), 1);
    }
    ::eventfd_write(client.session.doorbell.get(), 1);
  }
}

/// Overwrites the whole segment with noise, again and again.
void scribble(const TestClient& client, unsigned seed) {
  std::mt19937 random(seed);
  const auto memory = client.segment.bytes();
  for (int round = 0; round < 200'000; ++round) {
    // Most of the damage where it matters: the header's words, then anywhere.
    const std::size_t range = round % 4 == 0 ? memory.size() : sizeof(SessionHeader);
    const std::size_t at = random() % (range / 8) * 8;
    const std::uint64_t value = round % 3 == 0 ? random() % (8U << 20) : random();
    std::memcpy(memory.data() + at, &value, sizeof value);
    if (round % 64 == 0) ::eventfd_write(client.session.doorbell.get(), 1);
  }
}

int serve(const std::string& path) {
  TestDaemon daemon(path);
  say("ready");
  while (wait_for_byte()) {
    for (const PeerProcess& peer : daemon.take_peers()) {
      say("pid " + std::to_string(peer.pid) + (peer.pidfd ? " with pidfd" : " without pidfd"));
    }
  }
  return 0;
}

int run(std::string_view role, const std::string& path, int argument) {
  if (role == "daemon") return serve(path);
  auto client = TestClient::connect(path);
  if (!client) {
    say(client.error().to_string());
    return 1;
  }
  if (role == "ping") return ping(*client, argument);
  if (role == "scribble") {
    scribble(*client, static_cast<unsigned>(argument));
    return 0;
  }
  // hold: a child that inherits the connection and outlives its parent.
  const bool parent = role != "push" && ::fork() != 0;
  if (parent) ::pause();
  say("ready");
  if (role == "push") push_for_ever(*client);
  while (wait_for_byte()) {
  }
  return 0;
}

}  // namespace
}  // namespace kvern::testing

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  return kvern::testing::run(argv[1], argv[2], argc > 3 ? std::stoi(argv[3]) : 0);
}
