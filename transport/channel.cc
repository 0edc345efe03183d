#include "transport/channel.h"

#include <sys/eventfd.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <span>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "transport/futex.h"
#include "transport/ring.h"
#include "transport/spin_wait.h"

namespace kvern {
namespace {

// Keeps deadlines within 64 bits of nanoseconds.
constexpr std::chrono::milliseconds kMaxTimeout = std::chrono::hours(24);
// A full request ring means that the daemon is far behind or stopped: nothing is lost by looking again this rarely.
constexpr std::chrono::microseconds kFullRingPause{200};

Status closed() { return Status(Code::kUnavailable, "the daemon is gone or the session was closed"); }
Status expired() { return Status(Code::kExpired, "the daemon has ended the session: register again"); }

/// Any thread that waits for an answer may become the reader: the one that takes replies out of the ring and hands them
/// to whom they belong. The others sleep on their condition variable until they have their answer or the reader leaves
/// and passes its role on.
class RingChannel final : public Channel {
 public:
  RingChannel(const SegmentView& segment, UniqueFd doorbell, const RingChannelConfig& config)
      : segment_(segment),
        doorbell_(std::move(doorbell)),
        requests_(segment.request_ring(), segment.header().request_head, segment.header().request_tail),
        replies_(segment.reply_ring(), segment.header().reply_head, segment.header().reply_tail),
        spin_(config.spin_us) {}

  bool alive() const override { return !closed_ && !session_expired(); }

  void close() override {
    closed_ = true;
    {
      const std::lock_guard lock(mutex_);
      for (auto& [id, waiter] : waiters_) waiter->wake.notify_one();
    }
    segment_.header().reply_sequence.fetch_add(1);
    futex_wake_all(segment_.header().reply_sequence);
  }

 private:
  struct Waiter {
    wire::HotReply* reply;
    bool answered = false;
    std::condition_variable wake;
  };

  Status do_call(wire::HotRequest& request, wire::HotReply* reply, std::chrono::milliseconds timeout) override {
    const std::int64_t deadline_ns = now_ns() + std::chrono::nanoseconds(std::min(timeout, kMaxTimeout)).count();
    Waiter waiter{.reply = reply, .wake = {}};
    {
      const std::lock_guard lock(mutex_);
      request.set_id(++last_id_);
      waiters_.emplace(request.id(), &waiter);
    }
    const Status sent = send(request, deadline_ns);

    std::unique_lock lock(mutex_);
    while (sent.is_ok() && !waiter.answered && alive()) {
      const std::chrono::nanoseconds left(deadline_ns - now_ns());
      if (left.count() <= 0) break;
      if (reader_active_) {
        waiter.wake.wait_for(lock, left);
        continue;
      }
      reader_active_ = true;
      lock.unlock();
      read_until_answered(waiter, deadline_ns);
      lock.lock();
      reader_active_ = false;
    }
    waiters_.erase(request.id());
    // Also after a wake-up that made this thread the reader to be, and that came together with its time-out.
    if (!reader_active_ && !waiters_.empty()) waiters_.begin()->second->wake.notify_one();

    if (waiter.answered) return Status::ok();
    if (!sent) return sent;
    if (closed_) return closed();
    if (session_expired()) return expired();
    return Status(Code::kUnavailable, "the daemon did not answer within " + std::to_string(timeout.count()) + " ms");
  }

  Status send(const wire::HotRequest& request, std::int64_t deadline_ns) {
    const std::string frame = request.SerializeAsString();
    for (;;) {
      if (closed_) return closed();
      if (session_expired()) return expired();
      Status status;
      {
        const std::lock_guard lock(push_mutex_);
        status = requests_.push(std::as_bytes(std::span(frame)));
      }
      if (status.is_ok()) {
        ring_doorbell_if(kDaemonAwaitsRequest);
        return status;
      }
      if (status.code() == Code::kCorrupt) {
        close();
        return closed();
      }
      if (status.code() != Code::kBusy) return status;
      if (now_ns() >= deadline_ns) {
        return Status(Code::kUnavailable, "the daemon does not take requests: its ring is full");
      }
      drain_if_nobody_reads();  // the daemon takes no requests either while its replies find no room
      std::this_thread::sleep_for(kFullRingPause);
    }
  }

  /// The reader. Returns when the waiter has its answer, at the deadline, or when there is nothing to wait for.
  void read_until_answered(const Waiter& waiter, std::int64_t deadline_ns) {
    spin_.begin();
    while (alive()) {
      if (drain()) {
        if (waiter.answered) return;
        spin_.begin();
      }
      if (spin_.once()) continue;
      const std::int64_t left_ns = deadline_ns - now_ns();
      if (left_ns <= 0) return;
      sleep_until_reply(std::chrono::nanoseconds(left_ns));
    }
  }

  void sleep_until_reply(std::chrono::nanoseconds timeout) {
    SessionHeader& header = segment_.header();
    // The daemon moves the head, then the sequence, then looks for waiters; here it is the other way round.
    header.client_waiting.fetch_add(1);
    const std::uint32_t sequence = header.reply_sequence.load();
    if (replies_.empty() && alive()) futex_wait(header.reply_sequence, sequence, timeout);
    header.client_waiting.fetch_sub(1);
  }

  /// Hands out all replies that are there. Only for the reader. False when there were none.
  bool drain() {
    if (replies_.empty()) return false;
    wire::HotReply reply;
    for (;;) {
      Status status = replies_.pop(&frame_);
      if (status.code() == Code::kNotFound) break;
      if (!status || !reply.ParseFromString(frame_)) {
        close();
        break;
      }
      const std::lock_guard lock(mutex_);
      const auto found = waiters_.find(reply.id());
      if (found == waiters_.end() || found->second->answered) continue;  // its caller gave up
      found->second->reply->Swap(&reply);
      found->second->answered = true;
      found->second->wake.notify_one();
    }
    ring_doorbell_if(kDaemonAwaitsRoom);
    return true;
  }

  void drain_if_nobody_reads() {
    {
      const std::lock_guard lock(mutex_);
      if (reader_active_) return;
      reader_active_ = true;
    }
    drain();
    const std::lock_guard lock(mutex_);
    reader_active_ = false;
    if (!waiters_.empty()) waiters_.begin()->second->wake.notify_one();
  }

  void ring_doorbell_if(std::uint32_t awaited) {
    auto& sleeping = segment_.header().daemon_sleeping;
    if ((sleeping.load() & awaited) == 0) return;
    // One of the threads that see the flag is enough.
    if (sleeping.exchange(0) != 0) ::eventfd_write(doorbell_.get(), 1);
  }

  bool session_expired() const {
    return segment_.header().state.load() == static_cast<std::uint32_t>(SessionState::kExpired);
  }

  static std::int64_t now_ns() { return Clock::system().now_ns(); }

  const SegmentView segment_;
  const UniqueFd doorbell_;
  std::atomic<bool> closed_ = false;

  std::mutex push_mutex_;
  RingProducer requests_;  // by push_mutex_

  RingConsumer replies_;  // the reader's
  std::string frame_;     // the reader's
  SpinWait spin_;         // the reader's

  std::mutex mutex_;
  std::map<std::uint64_t, Waiter*> waiters_;  // by mutex_, as all that follows
  bool reader_active_ = false;
  std::uint64_t last_id_ = 0;
};

}  // namespace

Status Channel::call(wire::HotRequest& request, wire::HotReply* reply, std::chrono::milliseconds timeout) {
  // The id is still to come: it takes at most 11 bytes.
  constexpr std::size_t kMaxIdBytes = 11;
  if (const std::size_t bytes = request.ByteSizeLong(); bytes + kMaxIdBytes > kMaxMessageBytes) {
    return Status(Code::kInvalid, "a request of " + std::to_string(bytes) + " bytes is larger than " +
                                      std::to_string(kMaxMessageBytes) + ": send fewer items at once");
  }
  Status status = do_call(request, reply, timeout);
  // What the daemon grants when it comes to it would be nobody's: it ends with the session.
  const bool grants = request.has_reserve() || request.has_fetch();
  if (grants && status.code() == Code::kUnavailable && alive()) close();
  return status;
}

std::unique_ptr<Channel> make_ring_channel(const SegmentView& segment, UniqueFd doorbell,
                                           const RingChannelConfig& config) {
  return std::make_unique<RingChannel>(segment, std::move(doorbell), config);
}

}  // namespace kvern
