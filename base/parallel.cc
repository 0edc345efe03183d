#include "base/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "base/executor.h"

namespace kvern {
namespace {

/// Outlives the call: a helper task that starts late finds nothing left to do and touches nothing else.
struct Shared {
  explicit Shared(std::size_t work) : count(work) {}

  const std::size_t count;
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::condition_variable idle;
  std::size_t done = 0;

  /// body is only touched while the caller waits: an index below count is not done yet.
  void work(const std::function<void(std::size_t)>& body) {
    std::size_t finished = 0;
    for (std::size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      body(i);
      ++finished;
    }
    if (finished == 0) return;
    const std::lock_guard lock(mutex);
    done += finished;
    if (done == count) idle.notify_all();
  }
};

}  // namespace

void parallel_for(Executor* executor, std::size_t count, const std::function<void(std::size_t)>& body) {
  if (executor == nullptr || count < 2) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  const auto shared = std::make_shared<Shared>(count);
  const std::size_t helpers = std::min<std::size_t>(count - 1, std::max(1U, std::thread::hardware_concurrency()));
  for (std::size_t i = 0; i < helpers; ++i) {
    if (!executor->submit([shared, &body] { shared->work(body); })) break;
  }
  shared->work(body);
  std::unique_lock lock(shared->mutex);
  shared->idle.wait(lock, [&] { return shared->done == count; });
}

}  // namespace kvern
