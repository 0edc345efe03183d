#pragma once

#include <fcntl.h>
#include <sys/eventfd.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/keys.h"
#include "transport/admission.h"
#include "transport/channel.h"

namespace kvern::testing {

/// A daemon that knows admission and rings and nothing else. What it does with a request depends on its kind:
///   Match         answered at once: present = block_hashes, after the request has proven whole (see make_echo)
///   Fetch         kept: answered by answer_kept()
///   Report        dropped without an answer
/// The token "refuse" is refused.
class TestDaemon final : public AdmissionHandler, public HotHandler {
 public:
  static constexpr std::size_t kSlabBytes = 1 << 16;
  static constexpr std::chrono::seconds kPatience{60};

  explicit TestDaemon(const std::string& path, const SegmentLayout& layout = {}, const RingServer::Config& config = {},
                      const AdmissionLimits& limits = {})
      : layout_(layout),
        slab_(SharedMemory::create_anonymous("kvern-test-slab", kSlabBytes).value()),
        slab_fd_(slab_.read_only_fd().value()),
        rings_(std::make_unique<RingServer>(config, *this)),
        admission_(std::make_unique<AdmissionServer>(path, 0600, *this, limits)) {
    slab_.bytes()[0] = std::byte{77};
  }

  void stop() {
    admission_.reset();
    rings_.reset();
  }
  ~TestDaemon() override { stop(); }

  void admit(std::uint64_t connection, const wire::Admit& request, PeerProcess peer, wire::Admitted* answer,
             std::vector<int>* descriptors) override {
    if (request.session_token() == "refuse") {
      set_status(Status(Code::kRefused, "no such session"), answer->mutable_status());
      return;
    }
    auto session = std::make_shared<Session>();
    session->segment = SharedMemory::create_anonymous("kvern-test-segment", layout_.total_bytes()).value();
    session->staging = SharedMemory::create_anonymous("kvern-test-staging", kSlabBytes).value();
    session->doorbell = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    session->view = SegmentView::create(session->segment.bytes(), layout_, connection, 1);
    rings_->add(connection, session->view, session->doorbell.get());
    answer->set_slab_bytes(kSlabBytes);
    answer->set_index_bytes(kSlabBytes);
    answer->set_segment_bytes(layout_.total_bytes());
    answer->set_staging_bytes(kSlabBytes);
    *descriptors = {slab_fd_.get(), slab_fd_.get(), session->segment.fd(), session->staging.fd(),
                    session->doorbell.get()};
    const std::lock_guard lock(mutex_);
    sessions_[connection] = std::move(session);
    peers_.push_back(std::move(peer));
    changed_.notify_all();
  }

  /// Keeps what it is offered with the token "offer", and refuses other tokens.
  Status offer(const wire::Admit& request, std::vector<UniqueFd> descriptors) override {
    if (request.session_token() != "offer") return {Code::kRefused, "no such session"};
    const std::lock_guard lock(mutex_);
    offered_ = std::move(descriptors);
    return Status::ok();
  }
  std::vector<UniqueFd> take_offered() {
    const std::lock_guard lock(mutex_);
    return std::exchange(offered_, {});
  }

  void closed(std::uint64_t connection) override {
    rings_->remove(connection);
    const std::lock_guard lock(mutex_);
    sessions_.erase(connection);
    closed_.push_back(connection);
    changed_.notify_all();
  }

  void handle(std::uint64_t session_id, wire::HotRequest request, HotReplyFunction reply) override {
    if (request.has_match()) {
      if (!is_whole(request.match())) {
        const std::lock_guard lock(mutex_);
        ++torn_;
      }
      wire::HotReply answer;
      answer.mutable_matched()->set_present(request.match().block_hashes());
      reply(std::move(answer));
    } else if (request.has_fetch()) {
      const std::lock_guard lock(mutex_);
      kept_.push_back(std::move(reply));
    }
    const std::lock_guard lock(mutex_);
    handled_[session_id] += 1;
    changed_.notify_all();
  }

  void protocol_error(std::uint64_t session_id, const Status& why) override {
    const std::lock_guard lock(mutex_);
    errors_.emplace_back(session_id, why);
    changed_.notify_all();
  }

  void answer_kept() {
    std::vector<HotReplyFunction> kept;
    {
      const std::lock_guard lock(mutex_);
      kept.swap(kept_);
    }
    for (const auto& reply : kept) reply({});
  }

  /// False when it does not become true within kPatience. The condition is looked at under the daemon's lock.
  template <typename Condition>
  bool wait_until(Condition condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, condition);
  }
  bool wait_for_kept(std::size_t count) {
    return wait_until([this, count] { return kept_.size() >= count; });
  }
  bool wait_for_closed(std::size_t count) {
    return wait_until([this, count] { return closed_.size() >= count; });
  }
  bool wait_for_errors(std::size_t count) {
    return wait_until([this, count] { return errors_.size() >= count; });
  }
  bool wait_for_handled(std::uint64_t session_id, std::uint64_t count) {
    return wait_until([this, session_id, count] { return handled_[session_id] >= count; });
  }

  std::size_t errors() {
    const std::lock_guard lock(mutex_);
    return errors_.size();
  }
  std::size_t closed_connections() {
    const std::lock_guard lock(mutex_);
    return closed_.size();
  }
  std::size_t torn() {
    const std::lock_guard lock(mutex_);
    return torn_;
  }
  std::vector<PeerProcess> take_peers() {
    const std::lock_guard lock(mutex_);
    return std::exchange(peers_, {});
  }
  std::uint64_t last_session() {
    const std::lock_guard lock(mutex_);
    return sessions_.empty() ? 0 : sessions_.rbegin()->first;
  }
  /// Waits for another one.
  std::uint64_t last_session_after(std::uint64_t session_id) {
    wait_until([this, session_id] { return !sessions_.empty() && sessions_.rbegin()->first > session_id; });
    return last_session();
  }
  void disconnect(std::uint64_t connection) { admission_->disconnect(connection); }

  /// A request whose namespace_id is the checksum of its block_hashes.
  static wire::HotRequest make_echo(const std::string& text) {
    wire::HotRequest request;
    request.mutable_match()->set_block_hashes(text);
    request.mutable_match()->set_namespace_id(std::to_string(checksum64(text.data(), text.size())));
    return request;
  }

 private:
  struct Session {
    SharedMemory segment;
    SharedMemory staging;
    UniqueFd doorbell;
    SegmentView view;
  };

  static bool is_whole(const wire::Match& match) {
    return match.namespace_id() == std::to_string(checksum64(match.block_hashes().data(), match.block_hashes().size()));
  }

  const SegmentLayout layout_;
  SharedMemory slab_;
  UniqueFd slab_fd_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::uint64_t, std::shared_ptr<Session>> sessions_;
  std::map<std::uint64_t, std::uint64_t> handled_;
  std::vector<PeerProcess> peers_;
  std::vector<UniqueFd> offered_;
  std::vector<std::uint64_t> closed_;
  std::vector<std::pair<std::uint64_t, Status>> errors_;
  std::vector<HotReplyFunction> kept_;
  std::size_t torn_ = 0;

  std::unique_ptr<RingServer> rings_;
  std::unique_ptr<AdmissionServer> admission_;
};

/// A client as libkvern makes one, without the control plane.
struct TestClient {
  AdmittedSession session;
  SharedMemory segment;
  SegmentView view;
  std::unique_ptr<Channel> channel;

  static Result<TestClient> connect(const std::string& path, const RingChannelConfig& config = {}) {
    auto admitted = request_admission(path, "token", TestDaemon::kPatience);
    if (!admitted) return failure(admitted.error());
    TestClient client;
    client.session = std::move(*admitted);
    auto segment = SharedMemory::map(std::move(client.session.segment), client.session.answer.segment_bytes(), true);
    if (!segment) return failure(segment.error());
    client.segment = std::move(*segment);
    auto view = SegmentView::attach(client.segment.bytes());
    if (!view) return failure(view.error());
    client.view = *view;
    client.channel =
        make_ring_channel(client.view, UniqueFd(::fcntl(client.session.doorbell.get(), F_DUPFD_CLOEXEC, 0)), config);
    return client;
  }

  /// One echo; the error when the answer is not what was sent.
  Status echo(const std::string& text, std::chrono::milliseconds timeout = TestDaemon::kPatience) {
    wire::HotRequest request = TestDaemon::make_echo(text);
    wire::HotReply reply;
    Status status = channel->call(request, &reply, timeout);
    if (!status) return status;
    if (Status said = to_status(reply.status()); !said) return said;
    return reply.matched().present() == text ? Status::ok() : Status(Code::kCorrupt, "another answer came back");
  }
};

}  // namespace kvern::testing
