#include <google/protobuf/io/coded_stream.h>
#include <sys/epoll.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "transport/channel.h"
#include "transport/event_fd.h"
#include "transport/futex.h"
#include "transport/ring.h"
#include "transport/service_thread.h"
#include "transport/spin_wait.h"

namespace kvern {
namespace {

// Requests that one session gets served before it is the next one's turn.
constexpr int kBatch = 16;
// Replies that a client has no room for wait in the daemon. A client that is merely stopped has at most
// max_in_flight of them, usually of a few KiB; one that lets more than this pile up is not working.
constexpr std::size_t kMaxQueuedBytes = 16U << 20;

/// The id of a request that is too large to be parsed: the first field, if the client writes fields in order.
std::optional<std::uint64_t> leading_id(const std::string& frame) {
  google::protobuf::io::CodedInputStream input(reinterpret_cast<const std::uint8_t*>(frame.data()),
                                               static_cast<int>(frame.size()));
  std::uint64_t id = 0;
  if (input.ReadTag() != (wire::HotRequest::kIdFieldNumber << 3) || !input.ReadVarint64(&id)) return std::nullopt;
  return id;
}

wire::HotReply failed_reply(const Status& status) {
  wire::HotReply reply;
  set_status(status, reply.mutable_status());
  return reply;
}

/// One session's rings. The server's thread takes requests; any thread gives replies. Outlives its removal in the hands
/// of those who still owe a reply, but touches the segment no more.
class RingSession {
 public:
  RingSession(std::uint64_t id, const SegmentView& segment, std::shared_ptr<EventFd> server_wake)
      : id_(id),
        segment_(segment),
        server_wake_(std::move(server_wake)),
        requests_(segment.request_ring(), segment.header().request_head, segment.header().request_tail),
        replies_(segment.reply_ring(), segment.header().reply_head, segment.header().reply_tail) {}

  /// Server's thread: pushes what waits, takes some requests. False when there was nothing to do.
  static bool serve(const std::shared_ptr<RingSession>& session, HotHandler& handler, std::uint32_t max_in_flight);

  /// Server's thread: says in the segment whether the client has to ring the doorbell. Look for work once more between
  /// saying so and sleeping.
  void set_sleeping(bool sleeping) {
    if (removed_) return;
    const std::lock_guard lock(serving_);
    if (removed_) return;
    const std::uint32_t room = queued_ ? kDaemonAwaitsRoom : 0;
    segment_.header().daemon_sleeping.store(sleeping ? kDaemonAwaitsRequest | room : 0);
  }

  void answer(std::uint64_t request_id, wire::HotReply reply) {
    reply.set_id(request_id);
    if (reply.ByteSizeLong() > kMaxMessageBytes) {
      reply = failed_reply(Status(Code::kInvalid, "the answer is larger than a message may be: ask for fewer items"));
      reply.set_id(request_id);
    }
    std::string frame = reply.SerializeAsString();
    const std::lock_guard lock(replying_);
    --in_flight_;
    if (removed_ || broken_) return;
    queue_.push_back(std::move(frame));
    queued_bytes_ += queue_.back().size();
    push_queue();
    if (queued_bytes_ > kMaxQueuedBytes) fail(Status(Code::kRefused, "the client does not take its replies"));
    if (queued_) server_wake_->signal();
  }

  /// Neither requests are taken nor the segment touched once this has returned. on_server_thread: of the caller, who
  /// then is (or is called by) the one that takes requests.
  void remove(bool on_server_thread) {
    removed_ = true;
    replying_.lock();
    replying_.unlock();
    if (on_server_thread) return;
    serving_.lock();
    serving_.unlock();
  }

 private:
  class Ticket;

  bool serve_locked(const std::shared_ptr<RingSession>& self, HotHandler& handler, std::uint32_t max_in_flight);

  /// Under replying_. True when something was pushed.
  bool push_queue() {
    bool pushed = false;
    while (!queue_.empty()) {
      const Status status = replies_.push(std::as_bytes(std::span(queue_.front())));
      if (status.code() == Code::kBusy) break;
      if (!status) {
        fail(status);
        return false;
      }
      queued_bytes_ -= queue_.front().size();
      queue_.pop_front();
      pushed = true;
    }
    queued_ = !queue_.empty();
    if (pushed) {
      SessionHeader& header = segment_.header();
      header.reply_sequence.fetch_add(1);
      if (header.client_waiting.load() != 0) futex_wake_all(header.reply_sequence);
    }
    return pushed;
  }

  /// Under replying_. The server's thread reports it.
  void fail(Status why) {
    broken_ = true;
    failure_ = std::move(why);
    queue_.clear();
    queued_bytes_ = 0;
    queued_ = false;
    server_wake_->signal();
  }

  const std::uint64_t id_;
  const SegmentView segment_;
  const std::shared_ptr<EventFd> server_wake_;
  std::atomic<bool> removed_ = false;
  std::atomic<bool> broken_ = false;
  std::atomic<bool> queued_ = false;  ///< queue_ is not empty
  std::atomic<std::uint32_t> in_flight_ = 0;

  std::mutex serving_;  // held while requests are taken and handled; before replying_
  RingConsumer requests_;
  std::string frame_;
  bool reported_ = false;

  std::mutex replying_;
  RingProducer replies_;
  std::deque<std::string> queue_;
  std::size_t queued_bytes_ = 0;
  Status failure_;
};

/// The right to answer one request, once. A handler that drops it answers, too, so that no client waits in vain.
class RingSession::Ticket {
 public:
  Ticket(std::shared_ptr<RingSession> session, std::uint64_t request_id)
      : session_(std::move(session)), request_id_(request_id) {}
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;
  ~Ticket() { use(failed_reply(Status(Code::kInternal, "the daemon has dropped the request"))); }
  void use(wire::HotReply reply) {
    if (!used_.exchange(true)) session_->answer(request_id_, std::move(reply));
  }

 private:
  const std::shared_ptr<RingSession> session_;
  const std::uint64_t request_id_;
  std::atomic<bool> used_ = false;
};

bool RingSession::serve(const std::shared_ptr<RingSession>& session, HotHandler& handler, std::uint32_t max_in_flight) {
  if (session->removed_) return false;  // without the lock, for which remove() may be waiting
  const std::lock_guard lock(session->serving_);
  return session->serve_locked(session, handler, max_in_flight);
}

bool RingSession::serve_locked(const std::shared_ptr<RingSession>& self, HotHandler& handler,
                               std::uint32_t max_in_flight) {
  if (removed_ || reported_) return false;
  bool progress = false;
  if (queued_) {
    const std::lock_guard lock(replying_);
    progress = push_queue();
  }
  // A client that does not take its replies gets no more of them: its requests stay in the ring.
  for (int i = 0; i < kBatch && !removed_ && !broken_ && !queued_ && !requests_.empty(); ++i) {
    progress = true;
    wire::HotRequest request;
    Status status = requests_.pop(&frame_);
    const bool oversized = frame_.size() > kMaxMessageBytes;
    if (status && oversized) {
      const auto id = leading_id(frame_);
      if (id) request.set_id(*id);
      if (!id) status = Status(Code::kInvalid, "an oversized frame that is no request");
    } else if (status && !request.ParseFromString(frame_)) {
      status = Status(Code::kInvalid, "a frame that is no request");
    }
    if (!status) {
      const std::lock_guard lock(replying_);
      fail(std::move(status));
      break;
    }
    const auto ticket = std::make_shared<Ticket>(self, request.id());
    if (++in_flight_ > max_in_flight) {
      ticket->use(failed_reply(Status(Code::kBusy, "too many requests of this session wait for their answer")));
    } else if (oversized) {
      ticket->use(failed_reply(
          Status(Code::kInvalid, "the request is larger than " + std::to_string(kMaxMessageBytes) + " bytes")));
    } else {
      handler.handle(id_, std::move(request), [ticket](wire::HotReply reply) { ticket->use(std::move(reply)); });
    }
  }
  if (broken_ && !removed_) {
    reported_ = true;
    progress = true;
    Status why;
    {
      const std::lock_guard lock(replying_);
      why = failure_;
    }
    handler.protocol_error(id_, why);
  }
  return progress;
}

}  // namespace

struct RingServer::State {
  State(const Config& config_in, HotHandler& handler_in)
      : config(config_in), handler(handler_in), epoll(::epoll_create1(EPOLL_CLOEXEC)) {
    if (!epoll) throw std::system_error(errno, std::system_category(), "epoll_create1");
    watch(wake->fd(), EPOLLIN);
  }

  void watch(int fd, std::uint32_t events) {
    epoll_event event{.events = events, .data = {.fd = fd}};
    if (::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
      throw std::system_error(errno, std::system_category(), "epoll_ctl");
    }
  }

  void run() {
    SpinWait spin(config.spin_us);
    spin.begin();
    while (!stopping) {
      if (serve_all()) {
        spin.begin();
      } else if (!spin.once()) {
        sleep();
      }
    }
  }

  bool serve_all() {
    refresh();
    bool progress = false;
    for (const auto& session : serving) {
      if (RingSession::serve(session, handler, config.max_in_flight)) progress = true;
    }
    return progress;
  }

  void sleep() {
    for (const auto& session : serving) session->set_sleeping(true);
    // A client that moved its ring before it could see the flag does not ring: this look finds its frame.
    if (!serve_all()) {
      epoll_event events[16];
      ::epoll_wait(epoll.get(), events, std::size(events), -1);
      wake->drain();
    }
    for (const auto& session : serving) session->set_sleeping(false);
  }

  void refresh() {
    if (seen_version == version.load()) return;
    const std::lock_guard lock(mutex);
    seen_version = version.load();
    serving.clear();
    for (const auto& [id, registered] : sessions) serving.push_back(registered.session);
  }

  struct Registered {
    std::shared_ptr<RingSession> session;
    int doorbell;
  };

  const Config config;
  HotHandler& handler;
  const UniqueFd epoll;
  const std::shared_ptr<EventFd> wake = std::make_shared<EventFd>();
  std::atomic<bool> stopping = false;

  std::mutex mutex;
  std::map<std::uint64_t, Registered> sessions;  // by mutex
  std::atomic<std::uint64_t> version = 0;        // of sessions

  std::vector<std::shared_ptr<RingSession>> serving;  // the thread's copy
  std::uint64_t seen_version = 0;

  std::thread thread;
};

RingServer::RingServer(const Config& config, HotHandler& handler) : state_(std::make_shared<State>(config, handler)) {
  state_->thread = start_service_thread("kvern-rings", [state = state_.get()] { state->run(); });
}

RingServer::~RingServer() {
  state_->stopping = true;
  state_->wake->signal();
  state_->thread.join();
  for (const auto& [id, registered] : state_->sessions) registered.session->remove(false);
}

void RingServer::add(std::uint64_t session_id, const SegmentView& segment, int doorbell) {
  auto session = std::make_shared<RingSession>(session_id, segment, state_->wake);
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->sessions.contains(session_id)) throw std::invalid_argument("the session's rings are already served");
    // Edge-triggered, and never read: the client holds the same open file and could make a read block.
    state_->watch(doorbell, EPOLLIN | EPOLLET);
    state_->sessions.emplace(session_id, State::Registered{.session = std::move(session), .doorbell = doorbell});
    ++state_->version;
  }
  state_->wake->signal();
}

void RingServer::remove(std::uint64_t session_id) {
  State::Registered removed;
  {
    const std::lock_guard lock(state_->mutex);
    const auto found = state_->sessions.find(session_id);
    if (found == state_->sessions.end()) return;
    removed = std::move(found->second);
    state_->sessions.erase(found);
    ++state_->version;
  }
  ::epoll_ctl(state_->epoll.get(), EPOLL_CTL_DEL, removed.doorbell, nullptr);
  removed.session->remove(std::this_thread::get_id() == state_->thread.get_id());
}

}  // namespace kvern
