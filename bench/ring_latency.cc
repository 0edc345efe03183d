// Round trip of one hot message between two processes over the shared-memory rings.
//
//   ring_latency [calls] [pause_us]
//
// Prints percentiles for back-to-back calls (both sides spin) and for calls with a pause between them that is longer
// than the spin time (both sides sleep).

#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "transport/channel.h"

namespace kvern {
namespace {

class Echo final : public HotHandler {
 public:
  void handle(std::uint64_t /*session_id*/, wire::HotRequest request, HotReplyFunction reply) override {
    wire::HotReply answer;
    answer.mutable_matched()->set_present(std::move(*request.mutable_match()->mutable_block_hashes()));
    reply(std::move(answer));
  }
  void protocol_error(std::uint64_t /*session_id*/, const Status& why) override {
    std::fprintf(stderr, "ring_latency: %s\n", why.to_string().c_str());
  }
};

int measure(Channel& channel, const char* name, int calls, std::chrono::microseconds pause) {
  std::vector<double> microseconds;
  for (int i = 0; i < calls; ++i) {
    if (pause.count() > 0) std::this_thread::sleep_for(pause);
    wire::HotRequest request;
    request.mutable_match()->set_block_hashes(std::string(64 * 32, 'h'));
    wire::HotReply reply;
    const std::int64_t start_ns = Clock::system().now_ns();
    if (const Status status = channel.call(request, &reply, std::chrono::seconds(60)); !status) {
      std::fprintf(stderr, "ring_latency: %s\n", status.to_string().c_str());
      return 1;
    }
    microseconds.push_back(static_cast<double>(Clock::system().now_ns() - start_ns) / 1000);
  }
  std::sort(microseconds.begin(), microseconds.end());
  const auto at = [&](std::size_t percent) { return microseconds[(microseconds.size() - 1) * percent / 100]; };
  std::printf("%-14s p50 %8.1f us   p90 %8.1f us   p99 %8.1f us   (%d calls)\n", name, at(50), at(90), at(99), calls);
  return 0;
}

int client(SharedMemory memory, UniqueFd doorbell, int calls, std::chrono::microseconds pause) {
  const auto view = SegmentView::attach(memory.bytes());
  if (!view) return 1;
  const auto channel = make_ring_channel(*view, std::move(doorbell));
  return measure(*channel, "back to back", calls, {}) + measure(*channel, "after a pause", calls / 20, pause);
}

int run(int calls, std::chrono::microseconds pause) {
  const SegmentLayout layout;
  auto memory = SharedMemory::create_anonymous("ring-latency", layout.total_bytes());
  if (!memory) {
    std::fprintf(stderr, "ring_latency: %s\n", memory.error().to_string().c_str());
    return 1;
  }
  UniqueFd doorbell(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  const SegmentView view = SegmentView::create(memory->bytes(), layout, 1, 1);
  const pid_t child = ::fork();
  if (child == 0) return client(std::move(*memory), std::move(doorbell), calls, pause);
  Echo echo;
  RingServer server({}, echo);
  server.add(1, view, doorbell.get());
  int status = 0;
  ::waitpid(child, &status, 0);
  server.remove(1);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace
}  // namespace kvern

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::stoi(argv[1]) : 20000;
  const int pause_us = argc > 2 ? std::stoi(argv[2]) : 500;
  if (calls < 20) return 2;
  return kvern::run(calls, std::chrono::microseconds(pause_us));
}
