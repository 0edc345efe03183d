#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/clock.h"

namespace kvern {

/// One thread that waits for sockets, timers and posted tasks, and runs what belongs to them. What only that thread
/// touches needs no lock. Tasks must not block or throw.
class EventLoop {
 public:
  using Task = std::function<void()>;
  using Watcher = std::function<void(std::uint32_t events)>;  ///< events: EPOLLIN, EPOLLOUT, ...

  /// Throws std::system_error when the system refuses a descriptor or a thread. The clock outlives the loop.
  EventLoop(std::string name, const Clock& clock);
  /// stop() with nothing to do last.
  ~EventLoop();
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

  /// From any thread. False once it stops: the task was dropped.
  [[nodiscard]] bool post(Task task);
  /// From any other thread, once: runs what was posted, then `last`, then ends the thread. Timers and sockets that are
  /// still there are forgotten.
  void stop(Task last);

  // From the loop's thread only.

  std::int64_t now_ns() const { return clock_.now_ns(); }
  /// After what runs now, before the loop waits again.
  void later(Task task);
  /// Names the watch; the descriptor stays the caller's and must be unwatched before it is closed.
  std::uint64_t watch(int fd, std::uint32_t events, Watcher watcher);
  void rewatch(std::uint64_t watch, std::uint32_t events);
  void unwatch(std::uint64_t watch);
  /// Names the timer. It fires once, at or after when_ns.
  std::uint64_t at(std::int64_t when_ns, Task task);
  void cancel(std::uint64_t timer);

 private:
  struct Watch {
    int fd;
    std::shared_ptr<Watcher> watcher;  ///< shared: it may be unwatched while it runs
  };

  void run();
  bool run_posted();
  void run_later();
  void run_timers();
  int wait_ms() const;

  const std::string name_;
  const Clock& clock_;
  int epoll_ = -1;
  int wake_ = -1;
  std::mutex mutex_;
  std::vector<Task> posted_;
  bool stopping_ = false;
  std::vector<Task> later_;
  std::unordered_map<std::uint64_t, Watch> watches_;
  std::map<std::pair<std::int64_t, std::uint64_t>, Task> timers_;
  std::unordered_map<std::uint64_t, std::int64_t> timer_times_;
  std::uint64_t next_id_ = 1;
  std::thread thread_;
};

}  // namespace kvern
