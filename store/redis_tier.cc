#include "store/redis_tier.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "base/executor.h"
#include "store/byte_parts.h"
#include "store/event_loop.h"
#include "store/redis_cluster.h"
#include "store/redis_object.h"
#include "store/remote_key.h"
#include "store/transfer_queue.h"
#include "store/write_budget.h"

namespace kvern {
namespace {

constexpr std::size_t kErasesAtOnce = 64;
constexpr std::string_view kScanCount = "1000";  // keys that a server looks at in one step: well under a millisecond
constexpr std::size_t kResolverQueue = 256;

Status closing() { return {Code::kUnavailable, "the redis tier is closing"}; }
Status cancelled() { return {Code::kExpired, "the operation was cancelled"}; }

Status status_of_error(const std::string& error) {
  if (error.starts_with("OOM")) return {Code::kBusy, "Redis is full (see maxmemory and maxmemory-policy): " + error};
  if (error.starts_with("TRYAGAIN")) return {Code::kBusy, "the slot is on its way to another Redis node"};
  if (error.starts_with("NOPERM")) {
    return {Code::kUnavailable,
            "the Redis user lacks a permission (it needs +@read +@write +@transaction +@keyspace +@connection "
            "+cluster|slots and the prefix's keys): " +
                error};
  }
  return {Code::kUnavailable, "Redis answers: " + error};
}

/// The first error among the replies, and within that of EXEC.
Status first_error(std::span<const RespValue> replies) {
  for (const auto& reply : replies) {
    if (reply.is_error()) return status_of_error(reply.text);
    if (auto status = first_error(reply.elements); !status) return status;
  }
  return Status::ok();
}

/// Of a write: every command must have been confirmed, in EXEC's answer or by itself.
Status confirmed(std::span<const RespValue> replies) {
  if (auto status = first_error(replies); !status) return status;
  const RespValue& last = replies.back();
  const bool executed = last.type == RespValue::Type::kArray && last.elements.size() + 2 == replies.size();
  const auto results = executed ? std::span<const RespValue>(last.elements) : replies;
  const bool good = std::ranges::all_of(results, [](const RespValue& result) {
    return result.type == RespValue::Type::kSimple || result.type == RespValue::Type::kInteger;
  });
  return good ? Status::ok() : Status(Code::kUnavailable, "Redis does not confirm what was written");
}

}  // namespace

Status RedisTierConfig::validate() const {
  if (nodes.empty()) return {Code::kInvalid, "nodes must name at least one Redis node as host:port"};
  for (const auto& node : nodes) {
    if (const auto endpoint = parse_redis_endpoint(node); !endpoint) return endpoint.error();
  }
  if (!user.empty() && password.empty()) return {Code::kInvalid, "user needs a password"};
  if (!tls && !(tls_ca_file.empty() && tls_certificate_file.empty() && tls_key_file.empty())) {
    return {Code::kInvalid, "certificates are given, yet tls is off"};
  }
  if (auto status = check_remote_prefix(prefix); !status) return status;
  if (probes_per_cell == 0) return {Code::kInvalid, "probes_per_cell must be at least 1"};
  if (concurrent_reads == 0 || concurrent_writes == 0 || max_outstanding == 0) {
    return {Code::kInvalid, "concurrent_reads, concurrent_writes and max_outstanding must be at least 1"};
  }
  if (write_queue_bytes == 0 || write_queue_age_ns <= 0) {
    return {Code::kInvalid, "write_queue_bytes and write_queue_age_ns must be above 0"};
  }
  if (connect_timeout_ns <= 0 || find_timeout_ns <= 0 || operation_timeout_ns <= 0) {
    return {Code::kInvalid, "timeouts must be above 0"};
  }
  return breaker.validate();
}

/// Everything but the first few members is touched by the loop's thread alone.
struct RedisTier::Work {
  using OnCancel = std::stop_callback<std::function<void()>>;
  struct Read {
    TierHit hit;
    std::uint64_t offset = 0;
    std::span<std::byte> into;
    std::stop_token token;
    Done done;
    std::unique_ptr<OnCancel> on_cancel = {};
    std::uint64_t turn = 0;  ///< in the queue
    std::shared_ptr<RedisCall> call = {};
    bool ended = false;
  };
  struct Find {
    std::vector<CellQuery> cells;
    std::stop_token token;
    FindDone done;
    std::unique_ptr<OnCancel> on_cancel = {};
    std::vector<std::shared_ptr<RedisCall>> calls = {};
    std::vector<TierHit> hits = {};
    std::size_t unanswered = 0;
    bool any_answer = false;
    Status trouble = {};
    bool ended = false;
  };
  struct Write {
    TierObject object;
    Done done;
  };
  struct Erase {
    std::vector<ChunkKey> keys;
    Done done;
    std::size_t next = 0, under_way = 0;
    Status trouble = {};
  };
  struct Scan {
    std::string pattern;
    /// Of each page that has keys; goes on with go_on().
    std::function<void(const std::shared_ptr<Scan>& scan, const std::vector<std::string>& keys)> take;
    Done done;
    std::vector<RedisEndpoint> nodes = {};
    std::size_t node = 0;
    std::string cursor = "0";
  };

  Work(RedisTierConfig tier_config, const Clock& clock);
  void close();

  void start(const std::shared_ptr<Read>& read);
  void send(const std::shared_ptr<Read>& read);
  Status judge(const Read& read, std::span<const RespValue> replies);
  void finish(Read& read, Status status);

  void start(const std::shared_ptr<Find>& find);
  void probe(const std::shared_ptr<Find>& find, std::size_t cell, std::size_t block);
  void take(Find& find, std::size_t cell, std::size_t block, const RespValue& reply);
  void finish(Find& find, Result<std::vector<TierHit>> hits);

  void start(const std::shared_ptr<Write>& write);
  void send(const std::shared_ptr<Write>& write);
  void store(const std::shared_ptr<Write>& write, const std::string& name, std::string manifest,
             std::size_t old_pieces);
  void sent(const Write& write, Status status);
  void finish(const Write& write, Status status);

  void go_on(const std::shared_ptr<Erase>& erase);
  void start(const std::shared_ptr<Scan>& scan);
  void go_on(const std::shared_ptr<Scan>& scan);
  void for_each_key(const std::shared_ptr<Scan>& scan, const std::vector<std::string>& keys, std::string_view command,
                    const std::function<void(const std::string& key, const RespValue& reply)>& take,
                    const std::function<void()>& then);
  void unlink(const std::shared_ptr<Scan>& scan, const std::vector<std::string>& keys);
  void look_at(const std::shared_ptr<Scan>& scan, const std::vector<std::string>& keys, const PageDone& page);

  std::string name_of(const ChunkKey& key) const { return remote_object_name(config.prefix, key); }
  void execute(RedisLane lane, const std::string& name, std::vector<RedisRequest> requests, RedisBatch::Done done);
  void drop(const std::string& name, std::size_t pieces);
  void refresh_ttl(const std::string& name, std::size_t pieces);

  const RedisTierConfig config;
  const std::string ttl;  ///< empty: none
  WriteBudget budget;
  std::atomic<std::uint32_t> outstanding{0};  ///< finds and reads
  RedisConnectionSettings settings;
  EventLoop loop;
  ThreadPool resolver;
  std::unique_ptr<RedisCluster> cluster;  ///< made and let go by the loop's thread
  bool closed = false;
  TransferQueue queue;
};

RedisTier::Work::Work(RedisTierConfig tier_config, const Clock& clock)
    : config(std::move(tier_config)),
      ttl(config.ttl_seconds == 0 ? "" : std::to_string(config.ttl_seconds)),
      budget(config.write_queue_bytes),
      loop("kvern-redis", clock),
      resolver("kvern-redis-dns", 1, kResolverQueue),
      queue(loop, "Redis", {config.concurrent_reads, config.concurrent_writes, config.write_queue_age_ns}) {
  settings = {.user = config.user,
              .password = config.password,
              .tls = nullptr,
              .connect_timeout_ns = config.connect_timeout_ns};
  if (config.tls) {
    auto context = TlsContext::create(config.tls_ca_file, config.tls_certificate_file, config.tls_key_file);
    if (!context) throw std::invalid_argument("redis: " + context.error().message());
    settings.tls = std::move(*context);
  }
  std::vector<RedisEndpoint> seeds;
  for (const auto& node : config.nodes) seeds.push_back(parse_redis_endpoint(node).value());
  static_cast<void>(loop.post(
      [this, seeds = std::move(seeds)] { cluster = std::make_unique<RedisCluster>(loop, resolver, settings, seeds); }));
}

void RedisTier::Work::close() {
  closed = true;
  queue.close(closing());
  cluster.reset();  // ends what was sent
}

void RedisTier::Work::execute(RedisLane lane, const std::string& name, std::vector<RedisRequest> requests,
                              RedisBatch::Done done) {
  if (closed) return done(failure(closing()));
  auto call = std::make_shared<RedisCall>();
  call->lane = lane;
  call->slot = redis_slot(name);
  call->requests = std::move(requests);
  call->timeout_ns = lane == RedisLane::kLookup ? config.find_timeout_ns : config.operation_timeout_ns;
  call->done = std::move(done);
  cluster->execute(call);
}

// ---- find: the manifests of all candidates, in one round trip to each node

void RedisTier::Work::start(const std::shared_ptr<Find>& find) {
  if (closed) return finish(*find, failure(closing()));
  if (find->token.stop_requested()) return finish(*find, failure(cancelled()));
  find->hits.resize(find->cells.size());
  std::vector<std::pair<std::size_t, std::size_t>> probes;
  for (std::size_t cell = 0; cell < find->cells.size(); ++cell) {
    const std::size_t blocks = find->cells[cell].blocks.size();
    const std::size_t tried = std::min<std::size_t>(blocks, config.probes_per_cell);
    for (std::size_t i = 1; i <= tried; ++i) probes.emplace_back(cell, blocks - i);
  }
  if (probes.empty()) return finish(*find, std::move(find->hits));
  find->unanswered = probes.size();
  for (const auto& [cell, block] : probes) probe(find, cell, block);
  if (find->ended) return;
  find->on_cancel = std::make_unique<OnCancel>(find->token, [this, weak = std::weak_ptr(find)] {
    static_cast<void>(loop.post([this, weak] {
      if (const auto cancelled_find = weak.lock()) finish(*cancelled_find, failure(cancelled()));
    }));
  });
}

void RedisTier::Work::probe(const std::shared_ptr<Find>& find, std::size_t cell, std::size_t block) {
  const CellQuery& query = find->cells[cell];
  const std::string name = name_of({query.namespace_id, query.group, query.blocks[block]});
  auto call = std::make_shared<RedisCall>();
  call->lane = RedisLane::kLookup;
  call->slot = redis_slot(name);
  call->requests.push_back(redis_command({"GET", redis_manifest_key(name)}));
  call->timeout_ns = config.find_timeout_ns;
  call->done = [this, find, cell, block](const Result<std::vector<RespValue>>& replies) {
    if (find->ended) return;
    if (replies) {
      take(*find, cell, block, replies->front());
    } else {
      find->trouble = replies.error();
    }
    if (--find->unanswered > 0) return;
    // Where some nodes are down, the others serve what they have.
    if (find->any_answer) return finish(*find, std::move(find->hits));
    finish(*find, failure(find->trouble));
  };
  find->calls.push_back(call);
  cluster->execute(call);
}

void RedisTier::Work::take(Find& find, std::size_t cell, std::size_t block, const RespValue& reply) {
  if (reply.is_error()) {
    find.trouble = status_of_error(reply.text);
    return;
  }
  find.any_answer = true;
  if (reply.type != RespValue::Type::kBulk) return;
  const CellQuery& query = find.cells[cell];
  const auto manifest = RedisManifest::decode(reply.text);
  if (!manifest || manifest->bytes % kTierAlignment != 0) return;  // a miss; the next write replaces it
  TierHit& best = find.hits[cell];
  if (best.blocks > block) return;
  best = {.key = {query.namespace_id, query.group, query.blocks[block]},
          .bytes = manifest->bytes,
          .blocks = static_cast<std::uint32_t>(block + 1)};
}

void RedisTier::Work::finish(Find& find, Result<std::vector<TierHit>> hits) {
  if (std::exchange(find.ended, true)) return;
  find.on_cancel.reset();
  for (const auto& call : std::exchange(find.calls, {})) RedisCluster::abandon(*call);
  outstanding.fetch_sub(1);
  const auto done = std::move(find.done);
  done(std::move(hits));
}

// ---- read: the pieces, between two looks at the manifest

void RedisTier::Work::start(const std::shared_ptr<Read>& read) {
  if (read->token.stop_requested()) return finish(*read, cancelled());
  read->on_cancel = std::make_unique<OnCancel>(read->token, [this, weak = std::weak_ptr(read)] {
    static_cast<void>(loop.post([this, weak] {
      const auto late = weak.lock();
      if (late == nullptr || late->ended) return;
      if (!queue.withdraw(late->turn)) {
        RedisCluster::abandon(*std::exchange(late->call, nullptr));
        queue.read_ended();
      }
      finish(*late, cancelled());
    }));
  });
  read->turn = queue.read([this, read] { send(read); }, [this, read](Status why) { finish(*read, std::move(why)); });
}

void RedisTier::Work::send(const std::shared_ptr<Read>& read) {
  const std::string name = name_of(read->hit.key);
  auto call = std::make_shared<RedisCall>();
  call->lane = RedisLane::kRead;
  call->slot = redis_slot(name);
  call->timeout_ns = config.operation_timeout_ns;
  call->requests.push_back(redis_command({"GET", redis_manifest_key(name)}));
  const std::uint64_t end = read->offset + read->into.size();
  for (std::uint64_t at = read->offset; at < end;) {
    const std::uint64_t piece = at / kRedisPieceBytes;
    const std::uint64_t piece_begin = piece * kRedisPieceBytes;
    const std::uint64_t piece_end = std::min<std::uint64_t>(piece_begin + kRedisPieceBytes, read->hit.bytes);
    const std::uint64_t until = std::min(end, piece_end);
    const std::string key = redis_piece_key(name, piece);
    auto request = at == piece_begin && until == piece_end
                       ? redis_command({"GET", key})
                       : redis_command({"GETRANGE", key, std::to_string(at - piece_begin),
                                        std::to_string(until - piece_begin - 1)});
    request.into = read->into.subspan(at - read->offset, until - at);
    call->requests.push_back(std::move(request));
    at = until;
  }
  call->requests.push_back(redis_command({"GET", redis_manifest_key(name)}));
  call->done = [this, read](const Result<std::vector<RespValue>>& replies) {
    read->call.reset();  // which holds the read
    finish(*read, replies ? judge(*read, *replies) : replies.error());
    queue.read_ended();
  };
  read->call = call;
  cluster->execute(call);
}

Status RedisTier::Work::judge(const Read& read, std::span<const RespValue> replies) {
  if (auto status = first_error(replies); !status) return status;
  const RespValue& before = replies.front();
  const RespValue& after = replies.back();
  const std::string name = name_of(read.hit.key);
  if (before.type != RespValue::Type::kBulk) return {Code::kNotFound, "the object is gone"};
  if (before.text != after.text) return {Code::kNotFound, "the object was replaced while it was read"};
  const auto manifest = RedisManifest::decode(before.text);
  if (!manifest) {
    drop(name, 0);
    return manifest.error();
  }
  if (manifest->bytes != read.hit.bytes) return {Code::kNotFound, "the object was replaced by another one"};
  std::uint64_t at = read.offset;
  for (const auto& reply : replies.subspan(1, replies.size() - 2)) {
    const std::size_t piece = at / kRedisPieceBytes;
    if (!reply.received_in_place) {
      drop(name, manifest->pieces());
      return {Code::kNotFound, "a piece of the object is gone; the rest was dropped"};
    }
    const auto bytes = static_cast<std::size_t>(reply.integer);
    if (bytes == manifest->piece_bytes(piece) &&
        checksum64(read.into.data() + (at - read.offset), bytes) != manifest->checksums[piece]) {
      drop(name, manifest->pieces());
      return {Code::kCorrupt, "a piece of the object does not match its checksum; the object was dropped"};
    }
    at += bytes;
  }
  if (config.refresh_ttl_on_read) refresh_ttl(name, manifest->pieces());
  return Status::ok();
}

void RedisTier::Work::finish(Read& read, Status status) {
  if (std::exchange(read.ended, true)) return;
  read.on_cancel.reset();
  outstanding.fetch_sub(1);
  const auto done = std::move(read.done);
  done(std::move(status));
}

// Nobody waits for these two: where they fail, the next reader finds what they meant to mend.

void RedisTier::Work::drop(const std::string& name, std::size_t pieces) {
  std::vector<RedisRequest> requests{redis_command({"UNLINK", redis_manifest_key(name)})};
  for (std::size_t i = 0; i < pieces; ++i) requests.push_back(redis_command({"UNLINK", redis_piece_key(name, i)}));
  execute(RedisLane::kWrite, name, std::move(requests), [](const Result<std::vector<RespValue>>&) {});
}

void RedisTier::Work::refresh_ttl(const std::string& name, std::size_t pieces) {
  if (ttl.empty()) return;
  std::vector<RedisRequest> requests;
  for (std::size_t i = 0; i < pieces; ++i) requests.push_back(redis_command({"EXPIRE", redis_piece_key(name, i), ttl}));
  requests.push_back(redis_command({"EXPIRE", redis_manifest_key(name), ttl}));
  execute(RedisLane::kWrite, name, std::move(requests), [](const Result<std::vector<RespValue>>&) {});
}

// ---- write

void RedisTier::Work::start(const std::shared_ptr<Write>& write) {
  queue.write([this, write] { send(write); }, [this, write](Status why) { finish(*write, std::move(why)); });
}

/// Looks first: what another daemon has stored already need not cross the network again.
void RedisTier::Work::send(const std::shared_ptr<Write>& write) {
  const std::string name = name_of(write->object.key);
  RedisManifest manifest{.bytes = write->object.bytes(), .checksums = {}};
  for (std::uint64_t at = 0; at < manifest.bytes; at += kRedisPieceBytes) {
    manifest.checksums.push_back(checksum_of(slice(write->object.pieces, at, kRedisPieceBytes)));
  }
  std::vector<std::string> keys;
  for (std::size_t i = 0; i < manifest.pieces(); ++i) keys.push_back(redis_piece_key(name, i));
  std::vector<std::string_view> exists{"EXISTS"};
  exists.insert(exists.end(), keys.begin(), keys.end());
  std::vector<RedisRequest> requests{redis_command({"GET", redis_manifest_key(name)}),
                                     redis_command(std::span<const std::string_view>(exists))};
  execute(RedisLane::kWrite, name, std::move(requests),
          [this, write, name, encoded = manifest.encode(),
           pieces = manifest.pieces()](const Result<std::vector<RespValue>>& replies) {
            if (!replies) return sent(*write, replies.error());
            const RespValue& there = replies->front();
            if (there.type == RespValue::Type::kBulk && there.text == encoded &&
                replies->back().integer == static_cast<std::int64_t>(pieces)) {
              refresh_ttl(name, pieces);
              return sent(*write, Status::ok());
            }
            const auto old = RedisManifest::decode(there.text);
            store(write, name, encoded, old ? old->pieces() : 0);
          });
}

void RedisTier::Work::store(const std::shared_ptr<Write>& write, const std::string& name, std::string manifest,
                            std::size_t old_pieces) {
  const auto kept_manifest = std::make_shared<std::string>(std::move(manifest));
  const auto set = [&](const std::string& key, ByteParts body) {
    return ttl.empty() ? redis_command({"SET", key}, std::move(body))
                       : redis_command({"SETEX", key, ttl}, std::move(body));
  };
  auto call = std::make_shared<RedisCall>();
  call->lane = RedisLane::kWrite;
  call->slot = redis_slot(name);
  call->transaction = true;
  call->timeout_ns = config.operation_timeout_ns;
  call->hold = std::make_shared<std::pair<std::shared_ptr<const void>, std::shared_ptr<const void>>>(write->object.hold,
                                                                                                     kept_manifest);
  call->requests.push_back(redis_command({"MULTI"}));
  const std::uint64_t bytes = write->object.bytes();
  std::size_t piece = 0;
  for (std::uint64_t at = 0; at < bytes; at += kRedisPieceBytes) {
    call->requests.push_back(set(redis_piece_key(name, piece++), slice(write->object.pieces, at, kRedisPieceBytes)));
  }
  call->requests.push_back(set(redis_manifest_key(name), {std::as_bytes(std::span(*kept_manifest))}));
  for (; piece < old_pieces; ++piece) call->requests.push_back(redis_command({"UNLINK", redis_piece_key(name, piece)}));
  call->requests.push_back(redis_command({"EXEC"}));
  call->done = [this, write](const Result<std::vector<RespValue>>& replies) {
    sent(*write, replies ? confirmed(*replies) : replies.error());
  };
  cluster->execute(call);
}

void RedisTier::Work::sent(const Write& write, Status status) {
  finish(write, std::move(status));
  queue.write_ended();
}

void RedisTier::Work::finish(const Write& write, Status status) {
  write.done(std::move(status));
  budget.give_back(write.object.bytes());  // last: who drains has heard of it
}

// ---- erase

void RedisTier::Work::go_on(const std::shared_ptr<Erase>& erase) {
  while (erase->under_way < kErasesAtOnce && erase->next < erase->keys.size()) {
    const std::string name = name_of(erase->keys[erase->next++]);
    ++erase->under_way;
    const auto ended = [this, erase](const Status& status) {
      if (!status) erase->trouble = status;
      --erase->under_way;
      loop.later([this, erase] { go_on(erase); });
    };
    // The manifest knows how many pieces there are.
    execute(RedisLane::kWrite, name, {redis_command({"GET", redis_manifest_key(name)})},
            [this, name, ended](const Result<std::vector<RespValue>>& replies) {
              if (!replies) return ended(replies.error());
              if (replies->front().is_error()) return ended(status_of_error(replies->front().text));
              if (replies->front().type != RespValue::Type::kBulk) return ended(Status::ok());
              const auto manifest = RedisManifest::decode(replies->front().text);
              std::vector<RedisRequest> requests{redis_command({"UNLINK", redis_manifest_key(name)})};
              for (std::size_t i = 0; manifest && i < manifest->pieces(); ++i) {
                requests.push_back(redis_command({"UNLINK", redis_piece_key(name, i)}));
              }
              execute(RedisLane::kWrite, name, std::move(requests),
                      [ended](const Result<std::vector<RespValue>>& unlinked) {
                        ended(unlinked ? first_error(*unlinked) : unlinked.error());
                      });
            });
  }
  if (erase->under_way > 0 || erase->next < erase->keys.size() || !erase->done) return;
  std::exchange(erase->done, nullptr)(erase->trouble);
}

// ---- all keys of a pattern: each node's, a page at a time

void RedisTier::Work::start(const std::shared_ptr<Scan>& scan) {
  // Any answer means that the map is known.
  execute(RedisLane::kWrite, scan->pattern, {redis_command({"PING"})},
          [this, scan](const Result<std::vector<RespValue>>& replies) {
            auto masters = replies ? cluster->masters() : failure(replies.error());
            if (!masters) return scan->done(masters.error());
            scan->nodes = std::move(*masters);
            go_on(scan);
          });
}

void RedisTier::Work::go_on(const std::shared_ptr<Scan>& scan) {
  if (closed) return scan->done(closing());
  if (scan->node == scan->nodes.size()) return scan->done(Status::ok());
  auto call = std::make_shared<RedisCall>();
  call->lane = RedisLane::kWrite;
  call->timeout_ns = config.operation_timeout_ns;
  call->requests.push_back(redis_command({"SCAN", scan->cursor, "MATCH", scan->pattern, "COUNT", kScanCount}));
  call->done = [this, scan](const Result<std::vector<RespValue>>& replies) {
    if (!replies) return scan->done(replies.error());
    const RespValue& page = replies->front();
    if (page.is_error()) return scan->done(status_of_error(page.text));
    if (page.elements.size() != 2) return scan->done({Code::kCorrupt, "the reply to SCAN is malformed"});
    scan->cursor = page.elements[0].text;
    if (scan->cursor == "0") ++scan->node;
    std::vector<std::string> keys;
    for (const auto& key : page.elements[1].elements) keys.push_back(key.text);
    if (!keys.empty()) return scan->take(scan, keys);
    loop.later([this, scan] { go_on(scan); });
  };
  const std::size_t node = scan->node;
  cluster->execute_on(scan->nodes[node], call);
}

// Each key by itself, through the map: a slot may have moved since. Goes on when all have been answered.
void RedisTier::Work::for_each_key(const std::shared_ptr<Scan>& scan, const std::vector<std::string>& keys,
                                   std::string_view command,
                                   const std::function<void(const std::string& key, const RespValue& reply)>& take,
                                   const std::function<void()>& then) {
  struct Page {
    std::size_t left;
    Status trouble = {};
  };
  const auto page = std::make_shared<Page>(Page{keys.size()});
  for (const auto& key : keys) {
    execute(RedisLane::kWrite, key, {redis_command({command, key})},
            [this, scan, page, key, take, then](const Result<std::vector<RespValue>>& replies) {
              const Status status = replies ? first_error(*replies) : replies.error();
              if (status) take(key, replies->front());
              if (!status) page->trouble = status;
              if (--page->left > 0) return;
              if (!page->trouble) return scan->done(page->trouble);
              then();
              go_on(scan);
            });
  }
}

void RedisTier::Work::unlink(const std::shared_ptr<Scan>& scan, const std::vector<std::string>& keys) {
  for_each_key(
      scan, keys, "UNLINK", [](const std::string&, const RespValue&) {}, [] {});
}

void RedisTier::Work::look_at(const std::shared_ptr<Scan>& scan, const std::vector<std::string>& keys,
                              const PageDone& page) {
  const auto hits = std::make_shared<std::vector<TierHit>>();
  const auto take = [this, hits](const std::string& key, const RespValue& reply) {
    if (key.size() < 2) return;  // the pattern does not fit it: whoever answers is no Redis
    const auto name = parse_remote_object_name(config.prefix, std::string_view(key).substr(1, key.size() - 2));
    const auto manifest = RedisManifest::decode(reply.text);
    if (name && manifest) hits->push_back({.key = *name, .bytes = manifest->bytes});
  };
  for_each_key(scan, keys, "GET", take, [hits, page] { page(std::move(*hits)); });
}

// ---- the tier

RedisTier::RedisTier(RedisTierConfig config, const Clock& clock, TierObserver* observer)
    : Tier("redis", config.breaker, clock, observer) {
  if (const auto status = config.validate(); !status) throw std::invalid_argument("redis: " + status.message());
  work_ = std::make_unique<Work>(std::move(config), clock);
}

RedisTier::~RedisTier() {
  work_->loop.stop([this] { work_->close(); });
}

void RedisTier::do_find(std::vector<CellQuery> cells, std::stop_token cancel, FindDone done) {
  if (work_->outstanding.fetch_add(1) >= work_->config.max_outstanding) {
    work_->outstanding.fetch_sub(1);
    return done(failure(Code::kBusy, "too many operations of the redis tier are under way"));
  }
  auto find = std::make_shared<Work::Find>(
      Work::Find{.cells = std::move(cells), .token = std::move(cancel), .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), find] { work->start(find); })) find->done(failure(closing()));
}

void RedisTier::do_read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
                        Done done) {
  if (work_->outstanding.fetch_add(1) >= work_->config.max_outstanding) {
    work_->outstanding.fetch_sub(1);
    return done({Code::kBusy, "too many operations of the redis tier are under way"});
  }
  auto read = std::make_shared<Work::Read>(
      Work::Read{.hit = hit, .offset = offset, .into = into, .token = std::move(cancel), .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), read] { work->start(read); })) read->done(closing());
}

void RedisTier::do_write(TierObject object, Done done) {
  const std::uint64_t bytes = object.bytes();
  if (!work_->budget.take(bytes)) {
    return done({Code::kBusy, "the redis tier's write queue is full"});
  }
  auto write = std::make_shared<Work::Write>(Work::Write{.object = std::move(object), .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), write] { work->start(write); })) work_->finish(*write, closing());
}

void RedisTier::do_erase(std::vector<ChunkKey> keys, Done done) {
  auto erase = std::make_shared<Work::Erase>(Work::Erase{.keys = std::move(keys), .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), erase] { work->go_on(erase); })) erase->done(closing());
}

void RedisTier::do_erase_all(const NamespaceSet& namespaces, Done done) {
  auto scan = std::make_shared<Work::Scan>(
      Work::Scan{.pattern = "{" + remote_names_of(work_->config.prefix, namespaces) + "*",
                 .take = [work = work_.get()](const auto& running,
                                              const std::vector<std::string>& keys) { work->unlink(running, keys); },
                 .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), scan] { work->start(scan); })) scan->done(closing());
}

void RedisTier::do_list(const NamespaceSet& namespaces, PageDone page, Done done) {
  auto scan = std::make_shared<Work::Scan>(Work::Scan{
      .pattern = "{" + remote_names_of(work_->config.prefix, namespaces) + "*}",
      .take = [work = work_.get(), page = std::move(page)](
                  const auto& running, const std::vector<std::string>& keys) { work->look_at(running, keys, page); },
      .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), scan] { work->start(scan); })) scan->done(closing());
}

Status RedisTier::do_drain(std::int64_t timeout_ns) {
  if (work_->budget.wait_empty(timeout_ns)) return Status::ok();
  return {Code::kExpired, "the redis tier still has writes under way"};
}

TierStats RedisTier::do_stats() const { return {.queued_bytes = work_->budget.taken_bytes()}; }

}  // namespace kvern
