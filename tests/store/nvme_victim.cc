// Writes, erases, reads and reopens a log until it is killed; tells what it begins and what has ended on standard
// output, one short line each. nvme_crash_test.cc runs it. Exits with 3 when it reads wrong bytes.

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>

#include "tests/store/nvme_crash.h"

namespace kvern::testing {
namespace {

// One write of less than PIPE_BUF: lines of several threads do not mix, and each is out before what follows.
void say(const std::string& line) {
  if (::write(STDOUT_FILENO, line.data(), line.size()) != static_cast<ssize_t>(line.size())) std::_Exit(4);
}

class Victim {
 public:
  Victim(NvmeTier& tier, std::uint64_t seed) : tier_(tier), random_(seed) {}
  ~Victim() {
    while (outstanding_ > 0) std::this_thread::yield();
  }

  void step() {
    while (outstanding_ >= 32) std::this_thread::yield();
    const NvmeObject object = crash_object(random_);
    const auto kind = random_() % 100;
    if (kind < 70) {
      begin('w', object);
      tier_.write(object.object(), told());
    } else if (kind < 80) {
      begin('e', object);
      tier_.erase({object.key()}, told());
    } else if (kind == 80) {
      begin('n', object);
      tier_.erase_all(object.namespace_id(), told());
    } else {
      look_at(object);
    }
  }

 private:
  void begin(char operation, const NvmeObject& object) {
    ++outstanding_;
    say(std::string(1, operation) + ' ' + std::to_string(object.prompt) + ' ' + std::to_string(object.pages) + ' ' +
        std::to_string(object.namespace_number) + '\n');
  }
  std::function<void(Status)> told() {
    return [this, number = next_++, caller = std::this_thread::get_id()](const Status& status) {
      // What ends on the caller's thread was known before, and is kept no longer for it.
      if (status && std::this_thread::get_id() != caller) say("k " + std::to_string(number) + '\n');
      --outstanding_;
    };
  }
  void look_at(const NvmeObject& object) {
    const TierHit hit = find(tier_, object.query());
    if (hit.bytes == 0) return;
    const auto bytes = read(tier_, hit);
    if (!bytes && bytes.error().code() != Code::kNotFound) std::_Exit(3);
    if (bytes && !is_version_of(object, *bytes)) std::_Exit(3);
  }

  NvmeTier& tier_;
  std::mt19937_64 random_;
  std::atomic<int> outstanding_ = 0;
  std::uint64_t next_ = 0;
};

int run(const std::string& path, BlockIoKind kind, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  while (true) {
    NvmeTier tier(crash_log(path, kind), Clock::system(), nullptr);
    say("o\n");  // numbers of operations begin again
    Victim victim(tier, random());
    const auto steps = 100 + random() % 2000;
    for (std::uint64_t i = 0; i < steps; ++i) victim.step();
  }
}

}  // namespace
}  // namespace kvern::testing

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const auto kind = std::string(argv[2]) == "threads" ? kvern::BlockIoKind::kThreads : kvern::BlockIoKind::kUring;
  return kvern::testing::run(argv[1], kind, std::strtoull(argv[3], nullptr, 10));
}
