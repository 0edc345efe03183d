#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "base/executor.h"
#include "base/status.h"
#include "store/event_loop.h"
#include "store/redis_connection.h"
#include "store/redis_resp.h"
#include "store/redis_slots.h"

namespace kvern {

/// Connections of their own to each node, so that look-ups wait for no bytes, and reads for no writes.
enum class RedisLane { kLookup, kRead, kWrite };
inline constexpr std::size_t kRedisLanes = 3;

/// Requests for keys of one slot.
struct RedisCall {
  RedisLane lane = RedisLane::kLookup;
  std::uint16_t slot = 0;
  std::vector<RedisRequest> requests;
  /// The first request is MULTI and the last EXEC. Where the slot is on its way to another node, which takes no
  /// transactions of keys that it does not hold, the requests between go one by one.
  bool transaction = false;
  std::shared_ptr<const void> hold;  ///< keeps the bodies of requests
  std::int64_t timeout_ns = 0;
  /// Called once: a reply per request (which may be an error of the server; without MULTI and EXEC where they were left
  /// out), or kUnavailable.
  std::function<void(Result<std::vector<RespValue>>)> done;

  // Of RedisCluster:
  std::vector<RespValue> replies = {};
  std::vector<std::size_t> unanswered = {};
  int attempts = 0;
  bool abandoned = false;
  std::weak_ptr<RedisBatch> batch = {};  ///< weak: the batch holds the call
};

/// Sends requests to the node that serves their slot: knows the map of slots, follows MOVED and ASK, and asks anew when
/// nodes fail. A server without cluster support serves all slots. Belongs to the loop's thread.
class RedisCluster {
 public:
  /// All but the seeds outlive the cluster. seeds: nodes to ask for the map, at least one.
  RedisCluster(EventLoop& loop, Executor& resolver, const RedisConnectionSettings& settings,
               std::vector<RedisEndpoint> seeds);
  /// Ends what is under way with kUnavailable.
  ~RedisCluster();
  RedisCluster(const RedisCluster&) = delete;
  RedisCluster& operator=(const RedisCluster&) = delete;

  void execute(const std::shared_ptr<RedisCall>& call);
  /// done is not called any more and no bytes are received for it. (What is written may be written nevertheless.)
  static void abandon(RedisCall& call);

  /// Those that serve slots; kUnavailable while none is known.
  Result<std::vector<RedisEndpoint>> masters() const;
  /// To this node, wherever the keys are.
  void execute_on(const RedisEndpoint& node, const std::shared_ptr<RedisCall>& call);

 private:
  struct Node {
    std::array<std::unique_ptr<RedisConnection>, kRedisLanes> lanes;
    bool failing() const;
    bool idle() const;
  };

  RedisConnection& connection(const RedisEndpoint& endpoint, RedisLane lane);
  void send(const RedisEndpoint& endpoint, const std::shared_ptr<RedisCall>& call, bool asking, bool follow);
  void answered(const RedisEndpoint& endpoint, const std::shared_ptr<RedisCall>& call, bool asking,
                Result<std::vector<RespValue>> replies);
  void finish(RedisCall& call, Result<std::vector<RespValue>> replies);
  void refresh_soon();
  void refresh();
  void ask_for_map(std::vector<RedisEndpoint> candidates, std::size_t next);
  void take_map(const std::vector<RedisSlotRange>& ranges);
  void no_map(const Status& why);
  void prune();

  EventLoop& loop_;
  Executor& resolver_;
  const RedisConnectionSettings& settings_;
  const std::vector<RedisEndpoint> seeds_;
  bool closing_ = false;
  std::map<RedisEndpoint, Node> nodes_;
  bool map_known_ = false;
  Status map_failure_;  ///< why there is no map, once somebody was asked
  std::vector<std::optional<RedisEndpoint>> slots_;
  std::vector<std::shared_ptr<RedisCall>> waiting_;  ///< for the first map
  std::optional<std::uint64_t> refresh_timer_;
  bool refreshing_ = false;
  std::int64_t refreshed_ns_ = 0;
  std::size_t asked_ = 0;  ///< of the nodes, in turn
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace kvern
