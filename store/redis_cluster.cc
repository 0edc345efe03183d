#include "store/redis_cluster.h"

#include <algorithm>
#include <set>
#include <string_view>
#include <utility>

namespace kvern {
namespace {

constexpr int kMaxAttempts = 6;  // a slot moves once or twice while a call is under way, not more often
// A failover takes a second or more: asking five times a second finds the new master soon and burdens nobody.
constexpr std::int64_t kRefreshPauseNs = 200'000'000;

const RedisRequest& asking_request() {
  static const RedisRequest request = redis_command({"ASKING"});
  return request;
}

// Errors after which the map may be another one.
bool says_map_is_old(std::string_view error) {
  return error.starts_with("CLUSTERDOWN") || error.starts_with("READONLY") || error.starts_with("MASTERDOWN") ||
         error.starts_with("LOADING");
}

bool has_no_cluster(const RespValue& reply) {
  return reply.is_error() && (reply.text.find("cluster support disabled") != std::string::npos ||
                              reply.text.find("unknown command") != std::string::npos);
}

}  // namespace

bool RedisCluster::Node::failing() const {
  return std::ranges::any_of(lanes, [](const auto& lane) { return lane != nullptr && lane->failing(); });
}

bool RedisCluster::Node::idle() const {
  return std::ranges::all_of(lanes, [](const auto& lane) { return lane == nullptr || lane->idle(); });
}

RedisCluster::RedisCluster(EventLoop& loop, Executor& resolver, const RedisConnectionSettings& settings,
                           std::vector<RedisEndpoint> seeds)
    : loop_(loop), resolver_(resolver), settings_(settings), seeds_(std::move(seeds)), slots_(kRedisSlots) {
  refresh();
}

RedisCluster::~RedisCluster() {
  closing_ = true;
  *alive_ = false;
  if (refresh_timer_) loop_.cancel(*refresh_timer_);
  nodes_.clear();
  for (const auto& call : std::exchange(waiting_, {}))
    finish(*call, failure(Code::kUnavailable, "Redis is being left"));
}

RedisConnection& RedisCluster::connection(const RedisEndpoint& endpoint, RedisLane lane) {
  auto& connection = nodes_[endpoint].lanes[static_cast<std::size_t>(lane)];
  if (connection == nullptr) {
    connection = std::make_unique<RedisConnection>(loop_, resolver_, settings_, endpoint, [this] { refresh_soon(); });
  }
  return *connection;
}

void RedisCluster::finish(RedisCall& call, Result<std::vector<RespValue>> replies) {
  if (!call.abandoned) call.done(std::move(replies));
}

void RedisCluster::abandon(RedisCall& call) {
  call.abandoned = true;
  if (const auto batch = call.batch.lock()) batch->abandoned = true;
}

void RedisCluster::execute(const std::shared_ptr<RedisCall>& call) {
  if (closing_) return finish(*call, failure(Code::kUnavailable, "Redis is being left"));
  if (!map_known_) {
    if (!map_failure_) return finish(*call, failure(map_failure_));
    waiting_.push_back(call);
    return;
  }
  const auto& endpoint = slots_[call->slot];
  if (!endpoint) {
    refresh_soon();
    return finish(*call, failure(Code::kUnavailable, "no Redis node serves slot " + std::to_string(call->slot)));
  }
  call->unanswered.resize(call->requests.size());
  for (std::size_t i = 0; i < call->unanswered.size(); ++i) call->unanswered[i] = i;
  call->replies.resize(call->requests.size());
  send(*endpoint, call, false, true);
}

void RedisCluster::execute_on(const RedisEndpoint& node, const std::shared_ptr<RedisCall>& call) {
  if (closing_) return finish(*call, failure(Code::kUnavailable, "Redis is being left"));
  call->unanswered.resize(call->requests.size());
  for (std::size_t i = 0; i < call->unanswered.size(); ++i) call->unanswered[i] = i;
  call->replies.resize(call->requests.size());
  send(node, call, false, false);
}

void RedisCluster::send(const RedisEndpoint& endpoint, const std::shared_ptr<RedisCall>& call, bool asking,
                        bool follow) {
  auto batch = std::make_shared<RedisBatch>();
  for (const std::size_t i : call->unanswered) {
    // Inside MULTI the first ASKING still holds, and another one would be queued.
    if (asking && (i == 0 || !call->transaction)) batch->requests.push_back(&asking_request());
    batch->requests.push_back(&call->requests[i]);
  }
  batch->hold = call;
  batch->deadline_ns = loop_.now_ns() + call->timeout_ns;
  batch->abandoned = call->abandoned;
  batch->done = [this, endpoint, call, asking, follow](Result<std::vector<RespValue>> replies) {
    if (replies && follow) return answered(endpoint, call, asking, std::move(replies));
    finish(*call, std::move(replies));
  };
  call->batch = batch;
  ++call->attempts;
  connection(endpoint, call->lane).submit(std::move(batch));
}

void RedisCluster::answered(const RedisEndpoint& endpoint, const std::shared_ptr<RedisCall>& call, bool asking,
                            Result<std::vector<RespValue>> replies) {
  std::optional<RedisRedirect> redirect;
  bool try_again = false;
  std::vector<std::size_t> redirected;
  std::size_t next = 0;
  for (const std::size_t i : call->unanswered) {
    if (asking && (i == 0 || !call->transaction)) ++next;
    RespValue& reply = (*replies)[next++];
    if (reply.is_error()) {
      if (auto found = parse_redis_redirect(reply.text, endpoint)) {
        redirect = std::move(found);
        redirected.push_back(i);
      }
      try_again = try_again || reply.text.starts_with("TRYAGAIN");
      if (says_map_is_old(reply.text)) refresh_soon();
    }
    call->replies[i] = std::move(reply);
  }
  const bool last_attempt = call->attempts >= kMaxAttempts;
  if (try_again && call->transaction && !last_attempt) {
    call->transaction = false;
    call->requests.pop_back();
    call->requests.erase(call->requests.begin());
    call->replies.assign(call->requests.size(), RespValue{});
    call->unanswered.resize(call->requests.size());
    for (std::size_t i = 0; i < call->unanswered.size(); ++i) call->unanswered[i] = i;
    return send(endpoint, call, asking, true);
  }
  if (!redirect || last_attempt) {
    if (redirect) return finish(*call, failure(Code::kUnavailable, "Redis nodes send us from one to the other"));
    return finish(*call, std::move(call->replies));
  }
  if (redirect->kind == RedisRedirect::Kind::kMoved) {
    slots_[redirect->slot] = redirect->endpoint;
    refresh_soon();
  }
  if (!call->transaction) call->unanswered = std::move(redirected);
  send(redirect->endpoint, call, redirect->kind == RedisRedirect::Kind::kAsk, true);
}

Result<std::vector<RedisEndpoint>> RedisCluster::masters() const {
  if (!map_known_) {
    return failure(map_failure_ ? Status(Code::kUnavailable, "the Redis cluster is not known yet") : map_failure_);
  }
  std::set<RedisEndpoint> masters;
  for (const auto& slot : slots_) {
    if (slot && !masters.contains(*slot)) masters.insert(*slot);
  }
  return std::vector<RedisEndpoint>(masters.begin(), masters.end());
}

void RedisCluster::refresh_soon() {
  if (closing_ || refreshing_ || refresh_timer_) return;
  refresh_timer_ = loop_.at(std::max(loop_.now_ns(), refreshed_ns_ + kRefreshPauseNs), [this] {
    refresh_timer_.reset();
    refresh();
  });
}

void RedisCluster::refresh() {
  refreshing_ = true;
  std::set<RedisEndpoint> known(seeds_.begin(), seeds_.end());
  for (const auto& [endpoint, node] : nodes_) known.insert(endpoint);
  std::vector<RedisEndpoint> candidates(known.begin(), known.end());
  std::rotate(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(asked_++ % candidates.size()),
              candidates.end());
  ask_for_map(std::move(candidates), 0);
}

void RedisCluster::ask_for_map(std::vector<RedisEndpoint> candidates, std::size_t next) {
  const RedisEndpoint endpoint = candidates[next];
  auto call = std::make_shared<RedisCall>();
  call->requests.push_back(redis_command({"CLUSTER", "SLOTS"}));
  call->timeout_ns = settings_.connect_timeout_ns;
  call->done = [this, endpoint, candidates = std::move(candidates), next](Result<std::vector<RespValue>> replies) {
    if (closing_) return;
    Status why = status_of(replies);
    if (replies) {
      const RespValue& reply = replies->front();
      if (has_no_cluster(reply)) return take_map({{0, static_cast<std::uint16_t>(kRedisSlots - 1), endpoint}});
      if (reply.is_error()) {
        why = {Code::kUnavailable, "Redis node " + endpoint.to_string() + " answers CLUSTER SLOTS with: " + reply.text};
      } else if (const auto ranges = parse_cluster_slots(reply, endpoint); !ranges) {
        why = ranges.error();
      } else if (!ranges->empty()) {
        return take_map(*ranges);
      } else {
        why = {Code::kUnavailable, "Redis node " + endpoint.to_string() + " knows no masters"};
      }
    }
    if (next + 1 < candidates.size()) return ask_for_map(candidates, next + 1);
    no_map(why);
  };
  execute_on(endpoint, call);
}

void RedisCluster::take_map(const std::vector<RedisSlotRange>& ranges) {
  refreshing_ = false;
  refreshed_ns_ = loop_.now_ns();
  std::ranges::fill(slots_, std::nullopt);
  for (const auto& range : ranges) {
    std::fill(slots_.begin() + range.first, slots_.begin() + range.last + 1, range.master);
  }
  map_known_ = true;
  map_failure_ = Status::ok();
  const bool failing = std::ranges::any_of(ranges, [this](const auto& range) {
    const auto node = nodes_.find(range.master);
    return node != nodes_.end() && node->second.failing();
  });
  if (failing) refresh_soon();
  for (const auto& call : std::exchange(waiting_, {})) execute(call);
  loop_.later([this, alive = alive_] {
    if (*alive) prune();
  });
}

void RedisCluster::no_map(const Status& why) {
  refreshing_ = false;
  refreshed_ns_ = loop_.now_ns();
  refresh_soon();
  if (map_known_) return;
  map_failure_ = why;
  for (const auto& call : std::exchange(waiting_, {})) finish(*call, failure(why));
}

/// Lets go of nodes that serve nothing any more. Not from within one of their callbacks.
void RedisCluster::prune() {
  std::set<RedisEndpoint> used(seeds_.begin(), seeds_.end());
  const auto serving = masters();
  if (serving) used.insert(serving->begin(), serving->end());
  std::erase_if(nodes_, [&](const auto& each) { return !used.contains(each.first) && each.second.idle(); });
}

}  // namespace kvern
