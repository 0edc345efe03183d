#include "store/event_loop.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

namespace kvern {
namespace {

constexpr std::uint64_t kWakeWatch = 0;  // watches of callers begin at 1
constexpr std::int64_t kNsPerMs = 1'000'000;
constexpr std::int64_t kMaxWaitMs = 60'000;

int checked(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

}  // namespace

EventLoop::EventLoop(std::string name, const Clock& clock) : name_(std::move(name)), clock_(clock) {
  epoll_ = checked(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
  try {
    wake_ = checked(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
    epoll_event event{.events = EPOLLIN, .data = {.u64 = kWakeWatch}};
    checked(::epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event), "epoll_ctl");
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    if (wake_ >= 0) ::close(wake_);
    ::close(epoll_);
    throw;
  }
}

EventLoop::~EventLoop() {
  stop([] {});
  ::close(wake_);
  ::close(epoll_);
}

bool EventLoop::post(Task task) {
  std::lock_guard lock(mutex_);
  if (stopping_) return false;
  posted_.push_back(std::move(task));
  if (posted_.size() == 1) ::eventfd_write(wake_, 1);
  return true;
}

void EventLoop::stop(Task last) {
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return;
    stopping_ = true;
    posted_.push_back(std::move(last));
    ::eventfd_write(wake_, 1);
  }
  thread_.join();
}

void EventLoop::later(Task task) { later_.push_back(std::move(task)); }

std::uint64_t EventLoop::watch(int fd, std::uint32_t events, Watcher watcher) {
  const std::uint64_t id = next_id_++;
  epoll_event event{.events = events, .data = {.u64 = id}};
  // Fails only for want of kernel memory or of a valid descriptor; the owner's deadline then ends what waits for it.
  static_cast<void>(::epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event));
  watches_.emplace(id, Watch{fd, std::make_shared<Watcher>(std::move(watcher))});
  return id;
}

void EventLoop::rewatch(std::uint64_t watch, std::uint32_t events) {
  epoll_event event{.events = events, .data = {.u64 = watch}};
  static_cast<void>(::epoll_ctl(epoll_, EPOLL_CTL_MOD, watches_.at(watch).fd, &event));
}

void EventLoop::unwatch(std::uint64_t watch) {
  const auto found = watches_.find(watch);
  static_cast<void>(::epoll_ctl(epoll_, EPOLL_CTL_DEL, found->second.fd, nullptr));
  watches_.erase(found);
}

std::uint64_t EventLoop::at(std::int64_t when_ns, Task task) {
  const std::uint64_t id = next_id_++;
  timers_.emplace(std::pair(when_ns, id), std::move(task));
  timer_times_.emplace(id, when_ns);
  return id;
}

void EventLoop::cancel(std::uint64_t timer) {
  const auto time = timer_times_.find(timer);
  if (time == timer_times_.end()) return;
  timers_.erase({time->second, timer});
  timer_times_.erase(time);
}

int EventLoop::wait_ms() const {
  if (timers_.empty()) return -1;
  const std::int64_t wait = timers_.begin()->first.first - clock_.now_ns();
  return static_cast<int>(std::clamp<std::int64_t>((wait + kNsPerMs - 1) / kNsPerMs, 0, kMaxWaitMs));
}

void EventLoop::run() {
  ::pthread_setname_np(::pthread_self(), name_.substr(0, 15).c_str());
  std::array<epoll_event, 64> events{};
  while (true) {
    const int count = ::epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), wait_ms());
    bool woken = false;
    for (int i = 0; i < count; ++i) {
      const epoll_event& event = events[static_cast<std::size_t>(i)];
      if (event.data.u64 == kWakeWatch) {
        woken = true;
        continue;
      }
      const auto found = watches_.find(event.data.u64);  // an earlier event may have unwatched it
      if (found == watches_.end()) continue;
      const auto watcher = found->second.watcher;
      (*watcher)(event.events);
    }
    run_timers();
    if (woken && !run_posted()) return;
    run_later();
  }
}

bool EventLoop::run_posted() {
  eventfd_t count = 0;
  static_cast<void>(::eventfd_read(wake_, &count));
  std::vector<Task> tasks;
  bool stopping = false;
  {
    std::lock_guard lock(mutex_);
    tasks.swap(posted_);
    stopping = stopping_;
  }
  for (auto& task : tasks) task();
  if (stopping) run_later();  // some operation's end may be in there
  return !stopping;
}

void EventLoop::run_later() {
  while (!later_.empty()) {
    std::vector<Task> tasks;
    tasks.swap(later_);
    for (auto& task : tasks) task();
  }
}

void EventLoop::run_timers() {
  const std::int64_t now = clock_.now_ns();
  while (!timers_.empty() && timers_.begin()->first.first <= now) {
    auto timer = timers_.extract(timers_.begin());
    timer_times_.erase(timer.key().second);
    timer.mapped()();
  }
}

}  // namespace kvern
