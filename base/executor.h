#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace kvern {

/// Runs tasks. Tasks must not throw.
class Executor {
 public:
  virtual ~Executor() = default;
  /// Takes ownership of the task. False (task dropped) when the queue is full or the executor is stopping.
  [[nodiscard]] virtual bool submit(std::function<void()> task) = 0;
};

/// A fixed number of named threads over one bounded queue, first in first out.
class ThreadPool final : public Executor {
 public:
  /// Throws std::system_error when a thread cannot be started.
  ThreadPool(std::string name, std::size_t threads, std::size_t queue_capacity);
  /// Finishes what was queued, then joins.
  ~ThreadPool() override;
  [[nodiscard]] bool submit(std::function<void()> task) override;
  /// Tasks that wait, not counting those that run.
  std::size_t queued() const;
  /// Blocks until nothing is queued and nothing runs.
  void drain();

 private:
  void run();

  const std::string name_;
  const std::size_t queue_capacity_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  std::deque<std::function<void()>> queue_;
  std::size_t running_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

/// Runs nothing until it is stepped: deterministic tests. Not thread-safe.
class ManualExecutor final : public Executor {
 public:
  [[nodiscard]] bool submit(std::function<void()> task) override {
    queue_.push_back(std::move(task));
    return true;
  }
  /// Runs the oldest task; false when there is none.
  bool step() {
    if (queue_.empty()) return false;
    auto task = std::move(queue_.front());
    queue_.pop_front();
    task();
    return true;
  }
  void run_all() {
    while (step()) {
    }
  }

 private:
  std::deque<std::function<void()>> queue_;
};

}  // namespace kvern
