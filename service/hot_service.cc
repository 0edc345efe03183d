#include "service/hot_service.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "kernels/codec.h"
#include "kernels/container.h"
#include "service/log.h"
#include "transport/wire.h"

namespace kvern {
namespace {

// Positions beyond this are a mistake.
constexpr std::uint64_t kMaxPosition = 1ULL << 40;
// Durations that one Report may carry.
constexpr int kMaxDurations = 4096;
// What a Fetch may pin in one answer, so that the answer is never larger than a message: a location takes at most 48
// bytes.
constexpr std::size_t kMaxLocations = kMaxMessageBytes / 64;

double seconds_since(const Clock& clock, std::int64_t started_ns) {
  return static_cast<double>(clock.now_ns() - started_ns) * 1e-9;
}

Status invalid(std::string why) { return Status(Code::kInvalid, std::move(why)); }

std::span<const std::uint8_t> as_bytes(std::string_view text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

/// Hashes that lie behind one another, hash_bytes each.
Result<std::vector<BlockHash>> split_hashes(std::string_view joined, std::uint32_t hash_bytes, std::size_t most) {
  if (hash_bytes == 0 || hash_bytes > BlockHash::kMaxBytes) {
    return failure(Code::kInvalid, "hash_bytes must be 1 to " + std::to_string(BlockHash::kMaxBytes));
  }
  if (joined.empty() || joined.size() % hash_bytes != 0) {
    return failure(Code::kInvalid, "the block hashes are not a whole number of hashes");
  }
  if (joined.size() / hash_bytes > most) {
    return failure(Code::kInvalid, "more than " + std::to_string(most) + " block hashes: ask in pieces");
  }
  std::vector<BlockHash> hashes;
  hashes.reserve(joined.size() / hash_bytes);
  for (std::size_t at = 0; at < joined.size(); at += hash_bytes)
    hashes.emplace_back(as_bytes(joined.substr(at, hash_bytes)));
  return hashes;
}

Status check_item_count(int items) {
  if (items > 0 && items <= kMaxItems) return Status::ok();
  return invalid("a request has 1 to " + std::to_string(kMaxItems) + " items, not " + std::to_string(items));
}

std::vector<std::uint64_t> parse_checksums(const std::string& bytes) {
  std::vector<std::uint64_t> checksums(bytes.size() / sizeof(std::uint64_t));
  if (!checksums.empty()) std::memcpy(checksums.data(), bytes.data(), checksums.size() * sizeof(std::uint64_t));
  return checksums;
}

/// One request whose items end on different threads: the last one answers.
class PendingCommit {
 public:
  using Reply = std::function<void(std::span<const Status> items)>;
  PendingCommit(std::size_t items, Reply reply, ChunkStore& store, Metrics& metrics, const Clock& clock,
                StorePipeline& pipeline)
      : work_(pipeline),
        store_(store),
        statuses_(items),
        left_(items),
        reply_(std::move(reply)),
        metrics_(metrics),
        clock_(clock),
        started_(clock.now_ns()) {}

  /// Before the item can finish.
  void follows(const BlockHash& previous, const ChunkKey& chunk) { order_.emplace_back(previous, chunk); }

  void finish(std::size_t item, Status status) {
    statuses_[item] = std::move(status);
    if (left_.fetch_sub(1) != 1) return;
    for (const auto& [previous, chunk] : order_) {
      store_.link(chunk.namespace_id, chunk.group, previous, chunk.last_block);
    }
    metrics_.commit_seconds.Observe(seconds_since(clock_, started_));
    reply_(statuses_);
  }

 private:
  const StorePipeline::Work work_;  // a stop waits until the answer is given
  ChunkStore& store_;
  std::vector<std::pair<BlockHash, ChunkKey>> order_;  // each chunk with the block before it; known when all are stored
  std::vector<Status> statuses_;
  std::atomic<std::size_t> left_;
  const Reply reply_;
  Metrics& metrics_;
  const Clock& clock_;
  const std::int64_t started_;
};

/// Whether the pages hold what chunks of this shape hold.
Status check_pages(const PagedCache& cache, const ContainerInfo& info) {
  ShardShape shape = cache.shape(1);
  shape.tokens = info.shape.tokens;
  if (shape == info.shape && cache.block_tokens == info.block_tokens && cache.group_layers == info.group_layers &&
      cache.model_heads == info.model_heads) {
    return Status::ok();
  }
  return invalid("the shard is not that of the registered pages");
}

Result<std::vector<std::uint32_t>> block_ids_of(const google::protobuf::RepeatedField<std::uint32_t>& ids,
                                                std::size_t blocks, const PagedCache& cache) {
  if (static_cast<std::size_t>(ids.size()) != blocks) {
    return failure(Code::kInvalid, "as many block ids as block hashes are needed");
  }
  for (const std::uint32_t id : ids) {
    if (!cache.has_block(id)) {
      return failure(Code::kInvalid, "block " + std::to_string(id) + " lies outside of the registered pages");
    }
  }
  return std::vector<std::uint32_t>(ids.begin(), ids.end());
}

/// The answers of one LoadPages; the last item to end sends them.
class PendingLoad {
 public:
  PendingLoad(std::uint64_t id, std::size_t items, HotReplyFunction reply, StorePipeline& pipeline)
      : work_(pipeline), left_(items), reply_(std::move(reply)) {
    answer_.set_id(id);
    for (std::size_t i = 0; i < items; ++i) answer_.mutable_pages_loaded()->add_items();
  }

  void finish(std::size_t item, const Status& status, const DeviceService::Loaded& loaded) {
    {
      std::lock_guard lock(mutex_);
      auto* answer = answer_.mutable_pages_loaded()->mutable_items(static_cast<int>(item));
      set_status(status, answer->mutable_status());
      answer->set_tokens(loaded.tokens);
      answer->set_raw_bytes(loaded.raw_bytes);
      answer->set_encoded_bytes(loaded.encoded_bytes);
      answer->set_codec_spec(loaded.codec_spec);
      if (--left_ > 0) return;
    }
    reply_(std::move(answer_));
  }

 private:
  const StorePipeline::Work work_;
  std::mutex mutex_;
  std::size_t left_;
  wire::HotReply answer_;
  const HotReplyFunction reply_;
};

/// A line of level debug when the request is answered.
HotReplyFunction logged(std::uint64_t session_id, const wire::HotRequest& request, HotReplyFunction reply) {
  const auto* kind = wire::HotRequest::descriptor()->FindFieldByNumber(request.body_case());
  return [session_id, kind = std::string(kind == nullptr ? "unknown" : kind->name()),
          trace = trace_id_of(request.traceparent()), reply = std::move(reply),
          started = Clock::system().now_ns()](wire::HotReply answer) {
    log_debug("a request was answered", {{"session", session_id},
                                         {"request", answer.id()},
                                         {"kind", kind},
                                         {"trace", trace},
                                         {"status", code_name(static_cast<Code>(answer.status().code()))},
                                         {"seconds", seconds_since(Clock::system(), started)}});
    reply(std::move(answer));
  };
}

/// The span's name; nullptr for requests that take no time worth recording.
const char* span_name(wire::HotRequest::BodyCase body) {
  switch (body) {
    case wire::HotRequest::kMatch:
      return "kvern.match";
    case wire::HotRequest::kReserve:
      return "kvern.reserve";
    case wire::HotRequest::kCommit:
      return "kvern.commit";
    case wire::HotRequest::kFetch:
      return "kvern.fetch";
    case wire::HotRequest::kStorePages:
      return "kvern.store_pages";
    case wire::HotRequest::kLoadPages:
      return "kvern.load_pages";
    case wire::HotRequest::kAbandon:
    case wire::HotRequest::kRelease:
    case wire::HotRequest::kReleaseMatch:
    case wire::HotRequest::kReport:
    case wire::HotRequest::kRetain:
    case wire::HotRequest::BODY_NOT_SET:
      return nullptr;
  }
  return nullptr;
}

void set_namespace(const SpanPtr& span, const Namespace& space) {
  if (span) span->set("kvern.namespace", space.id.to_hex());
}

/// The span ends with the answer. Items that failed on their own are counted.
HotReplyFunction traced(SpanPtr span, HotReplyFunction reply) {
  return [span = std::move(span), reply = std::move(reply)](wire::HotReply answer) {
    std::uint64_t failed = 0;
    const auto count = [&failed](const wire::StatusMessage& status) { failed += to_status(status) ? 0U : 1U; };
    for (const auto& item : answer.committed().items()) count(item);
    for (const auto& item : answer.pages_stored().items()) count(item);
    for (const auto& item : answer.fetched().items()) count(item.status());
    std::uint64_t tokens = 0, raw_bytes = 0, encoded_bytes = 0;
    for (const auto& item : answer.pages_loaded().items()) {
      count(item.status());
      tokens += item.tokens();
      raw_bytes += item.raw_bytes();
      encoded_bytes += item.encoded_bytes();
    }
    if (answer.has_pages_loaded()) {
      span->set("kvern.tokens", tokens);
      span->set("kvern.raw_bytes", raw_bytes);
      span->set("kvern.encoded_bytes", encoded_bytes);
    }
    if (failed > 0) span->set("kvern.failed", failed);
    span->end(to_status(answer.status()));
    reply(std::move(answer));
  };
}

}  // namespace

SpanPtr HotService::start_span(const Session& session, const wire::HotRequest& request) const {
  const char* name = span_name(request.body_case());
  if (name == nullptr) return nullptr;
  SpanPtr span = parts_.tracer->start(name, SpanKind::kServer, request.traceparent());
  if (span) describe(*span, session);
  return span;
}

void HotService::handle(std::uint64_t session_id, wire::HotRequest request, HotReplyFunction reply) {
  wire::HotReply answer;
  answer.set_id(request.id());
  const auto finish = [&](const Status& status) {
    if (status.code() == Code::kInvalid) {
      log_warn("a request is not valid", {{"session", session_id},
                                          {"request", request.id()},
                                          {"trace", trace_id_of(request.traceparent())},
                                          {"why", status.message()}});
    }
    set_status(status, answer.mutable_status());
    reply(std::move(answer));
  };
  const auto session = parts_.sessions.find(session_id);
  if (!session) return finish(Status(Code::kExpired, "the session has ended: say hello again"));
  if (process_log().writes(LogLevel::kDebug)) reply = logged(session_id, request, std::move(reply));
  const std::int64_t started = parts_.clock.now_ns();
  session->touch(started);
  const SpanPtr span = parts_.tracer == nullptr ? nullptr : start_span(*session, request);
  if (span) reply = traced(span, std::move(reply));
  switch (request.body_case()) {
    case wire::HotRequest::kMatch:
      parts_.metrics.request(RequestType::kMatch);
      return finish(match(*session, request.match(), answer.mutable_matched(), span));
    case wire::HotRequest::kReserve: {
      parts_.metrics.request(RequestType::kReserve);
      const Status status = reserve(*session, request.reserve(), answer.mutable_reserved(), span);
      parts_.metrics.reserve_seconds.Observe(seconds_since(parts_.clock, started));
      return finish(status);
    }
    case wire::HotRequest::kCommit:
      parts_.metrics.request(RequestType::kCommit);
      return commit(session, request, std::move(reply), span);
    case wire::HotRequest::kAbandon:
      parts_.metrics.request(RequestType::kAbandon);
      return finish(abandon(*session, request.abandon()));
    case wire::HotRequest::kFetch: {
      parts_.metrics.request(RequestType::kFetch);
      const Status status = fetch(*session, request.fetch(), answer.mutable_fetched(), span);
      parts_.metrics.fetch_seconds.Observe(seconds_since(parts_.clock, started));
      return finish(status);
    }
    case wire::HotRequest::kRelease:
      parts_.metrics.request(RequestType::kRelease);
      return finish(release(*session, request.release()));
    case wire::HotRequest::kReleaseMatch:
      parts_.metrics.request(RequestType::kReleaseMatch);
      session->drop_match(request.release_match().lease_id());
      return finish(Status::ok());
    case wire::HotRequest::kReport:
      parts_.metrics.request(RequestType::kReport);
      report(request.report());
      return finish(Status::ok());
    case wire::HotRequest::kStorePages:
      parts_.metrics.request(RequestType::kStorePages);
      return store_pages(session, request, std::move(reply), span);
    case wire::HotRequest::kLoadPages:
      parts_.metrics.request(RequestType::kLoadPages);
      return load_pages(session, request, std::move(reply));
    case wire::HotRequest::kRetain:
      parts_.metrics.request(RequestType::kRetain);
      return finish(retain(*session, request.retain(), answer.mutable_retained()));
    case wire::HotRequest::BODY_NOT_SET:
      break;
  }
  parts_.metrics.protocol_error(ProtocolError::kUnknownBody);
  finish(invalid("the request has no body that this daemon knows"));
}

void HotService::protocol_error(std::uint64_t session_id, const Status& why) {
  parts_.metrics.protocol_error(ProtocolError::kBadRing);
  log_warn("the ring of a session is broken", {{"session", session_id}, {"why", why.message()}});
  parts_.sessions.end_soon(session_id, SessionEnd::kProtocolError);
}

/// Whether chunks are still on their way up. Starts the movement when it is asked for the first time.
Result<bool> HotService::prefetch(Session& session, const wire::Match& request, const Namespace& space,
                                  std::span<const BlockHash> blocks, const SpanPtr& span) {
  const auto group = static_cast<std::uint16_t>(request.group());
  if (!request.prefetch() || !parts_.tiers.has_tiers()) return false;
  if (const auto running = session.find_prefetch(request.lease_id(), group)) {
    // Clients ask every few milliseconds: what they wait for has a span of its own.
    const bool pending = running->pending();
    if (pending && span) span->discard();
    return pending;
  }
  const std::size_t first = std::min<std::size_t>(request.first_block(), blocks.size());
  auto started =
      parts_.tiers.prefetch(space.id, group, blocks, first, space.shape.chunk_tokens / space.shape.block_tokens,
                            child_of(span, "kvern.prefetch"));
  const bool pending = started->pending();
  if (Status added = session.add_prefetch(request.lease_id(), group, std::move(started)); !added) return failure(added);
  return pending;
}

Status HotService::match(Session& session, const wire::Match& request, wire::Matched* answer, const SpanPtr& span) {
  const auto space = named_namespace(session, request.namespace_id(), request.group());
  if (!space) return space.error();
  const auto hashes = split_hashes(request.block_hashes(), request.hash_bytes(), kMaxMatchBlocks);
  if (!hashes) return hashes.error();
  const auto group = static_cast<std::uint16_t>(request.group());
  set_namespace(span, **space);
  if (span) span->set("kvern.blocks", hashes->size());
  const auto pending = prefetch(session, request, **space, *hashes, span);
  if (!pending) return pending.error();
  answer->set_pending(*pending);
  if (*pending) return Status::ok();
  std::string present((hashes->size() + 7) / 8, '\0');
  std::vector<std::shared_ptr<Lease>> leases;
  std::shared_ptr<Lease> last;
  std::uint64_t found = 0;
  for (std::size_t i = 0; i < hashes->size(); ++i) {
    auto pinned = parts_.store.pin((*space)->id, group, (*hashes)[i]);
    if (!pinned) continue;
    present[i / 8] = static_cast<char>(present[i / 8] | 1 << (i % 8));
    ++found;
    // While a lease holds the chunk its number means that chunk: one pin for all blocks of it.
    const bool held = last && last->chunk().chunk == pinned->chunk;
    auto lease = std::make_shared<Lease>(parts_.store, std::move(*pinned), (*space)->id, group, (*hashes)[i]);
    if (held || i < request.first_block()) continue;
    last = lease;
    leases.push_back(std::move(lease));
  }
  if (!leases.empty()) {
    if (Status added = session.add_match(request.lease_id(), std::move(leases)); !added) return added;
  }
  if (span) span->set("kvern.tokens", found * (*space)->shape.block_tokens);
  answer->set_present(std::move(present));
  return Status::ok();
}

/// What all items of a Reserve have in common.
struct HotService::ReserveTerms {
  std::shared_ptr<const Namespace> space;
  std::shared_ptr<const Codec> codec;
  ContainerInfo info;  ///< without key, hashes, position and tokens
  std::uint32_t hash_bytes = 0;
};

Result<HotService::ReserveTerms> HotService::reserve_terms(Session& session, const wire::Reserve& request) {
  if (stopping_.load(std::memory_order_relaxed)) {
    parts_.metrics.refused(Refusal::kStopping);
    return failure(Code::kUnavailable, "the daemon is stopping");
  }
  if (const Status count = check_item_count(request.items_size()); !count) return failure(count);
  auto space = named_namespace(session, request.namespace_id(), request.group());
  if (!space) return failure(space.error());
  ReserveTerms terms;
  terms.space = *space;
  terms.hash_bytes = request.hash_bytes();
  const wire::ShardMessage& shard = request.shard();
  if (shard.dtype() > static_cast<std::uint32_t>(DType::kOpaqueBytes))
    return failure(Code::kInvalid, "there is no such dtype");
  if (request.block_tokens() != terms.space->shape.block_tokens) {
    return failure(Code::kInvalid, "blocks have " + std::to_string(terms.space->shape.block_tokens) +
                                       " tokens in this namespace, not " + std::to_string(request.block_tokens()));
  }
  terms.info.key.namespace_id = terms.space->id;
  terms.info.key.group = static_cast<std::uint16_t>(request.group());
  terms.info.shape = {.dtype = static_cast<DType>(shard.dtype()),
                      .layer_begin = shard.layer_begin(),
                      .layers = shard.layers(),
                      .head_begin = shard.head_begin(),
                      .heads = shard.heads(),
                      .tokens = terms.space->shape.block_tokens,
                      .key_dim = shard.key_dim(),
                      .value_dim = shard.value_dim()};
  terms.info.block_tokens = request.block_tokens();
  terms.info.group_layers = request.group_layers();
  terms.info.model_heads = request.model_heads();
  const Status fits = terms.space->shape.accepts(terms.info.shape, request.group_layers(), request.model_heads());
  if (!fits) return failure(fits);

  // Bytes of unknown layout can only be kept as they are, whatever the namespace prefers for the others.
  const bool opaque = terms.info.shape.dtype == DType::kOpaqueBytes;
  const std::string spec = !request.codec_spec().empty() ? request.codec_spec()
                           : opaque                      ? "raw"
                                                         : terms.space->codec_spec;
  auto codec = make_codec(spec, terms.space->fact("rotation"));
  if (!codec) return failure(Code::kRefused, codec.error().message());
  terms.codec = std::move(*codec);
  terms.info.codec_spec = terms.codec->spec();
  terms.info.lossy_generations = terms.codec->lossless() ? 0 : 1;
  return terms;
}

Status HotService::reserve(Session& session, const wire::Reserve& request, wire::Reserved* answer,
                           const SpanPtr& span) {
  const auto terms = reserve_terms(session, request);
  if (!terms) {
    if (terms.error().code() == Code::kInvalid) parts_.metrics.refused(Refusal::kInvalid);
    if (terms.error().code() == Code::kRefused) parts_.metrics.refused(Refusal::kCodec);
    return terms.error();
  }
  if (!session.staging()) return Status(Code::kRefused, "the session asked for no staging memory");
  for (const auto& item : request.items()) reserve_item(session, *terms, item, answer->add_items());
  if (span) {
    set_namespace(span, *terms->space);
    const auto reserved = std::ranges::count(answer->items(), wire::RESERVED, &wire::ReservedItem::outcome);
    span->set("kvern.codec", std::string(terms->codec->spec()));
    span->set("kvern.chunks", static_cast<std::uint64_t>(request.items_size()));
    span->set("kvern.reserved", static_cast<std::uint64_t>(reserved));
  }
  return Status::ok();
}

/// Why an item is not reserved.
struct HotService::Refused {
  wire::Reservation outcome;
  Status why;
};

/// The item as a reservation with the claim on its key, without memory.
tl::expected<std::shared_ptr<Reservation>, HotService::Refused> HotService::claim_item(const ReserveTerms& terms,
                                                                                       const wire::ReserveItem& item) {
  const auto refuse = [&](wire::Reservation outcome, Refusal why, Status status) {
    parts_.metrics.refused(why);
    return tl::unexpected(Refused{outcome, std::move(status)});
  };
  auto hashes = split_hashes(item.block_hashes(), terms.hash_bytes, terms.space->shape.chunk_tokens);
  if (!hashes) return refuse(wire::REFUSED, Refusal::kInvalid, hashes.error());
  if (item.position() > kMaxPosition || item.position() % terms.info.block_tokens != 0) {
    return refuse(wire::REFUSED, Refusal::kInvalid, invalid("the position is not the start of a block"));
  }
  auto reservation = std::make_shared<Reservation>();
  reservation->codec = terms.codec;
  ContainerInfo& info = reservation->info;
  info = terms.info;
  info.shape.tokens = static_cast<std::uint32_t>(hashes->size()) * info.block_tokens;
  info.position = item.position();
  reservation->previous = BlockHash::from_bytes(as_bytes(item.previous_block()));
  if (reservation->previous) {
    info.previous_tag = block_tag(info.key.namespace_id, info.key.group, reservation->previous->bytes());
  }
  info.key.last_block = hashes->back();
  info.block_hashes = std::move(*hashes);
  if (const Status fits = terms.space->shape.accepts(info.shape, info.group_layers, info.model_heads); !fits) {
    return refuse(wire::REFUSED, Refusal::kInvalid, fits);
  }
  if (const Status accepts = terms.codec->accepts(info.shape); !accepts) {
    return refuse(wire::REFUSED, Refusal::kCodec, accepts);
  }
  if (container_max_bytes(*terms.codec, info) > parts_.slab_bytes) {
    return refuse(wire::REFUSED, Refusal::kTooLarge,
                  Status(Code::kRefused, "the chunk is larger than the DRAM tier ([store] dram_bytes)"));
  }
  // Claimed before the store is asked: whoever held the claim before has published by now, and is seen there.
  reservation->claim = parts_.in_flight.claim(info.key, info.shape);
  const Presence presence = reservation->claim ? parts_.store.presence(info.key, info.shape) : Presence::kInFlight;
  if (presence == Presence::kStored) return tl::unexpected(Refused{wire::ALREADY_STORED, Status::ok()});
  if (presence == Presence::kInFlight) {
    return refuse(wire::IN_FLIGHT, Refusal::kInFlight, Status(Code::kBusy, "somebody else is storing it"));
  }
  return reservation;
}

void HotService::reserve_item(Session& session, const ReserveTerms& terms, const wire::ReserveItem& item,
                              wire::ReservedItem* answer) {
  const auto refuse = [&](wire::Reservation outcome, Refusal why, std::string reason) {
    parts_.metrics.refused(why);
    answer->set_outcome(outcome);
    answer->set_reason(std::move(reason));
  };
  auto claimed = claim_item(terms, item);
  if (!claimed) {
    answer->set_outcome(claimed.error().outcome);
    return answer->set_reason(claimed.error().why.message());
  }
  const auto reservation = std::move(*claimed);
  const auto staging = session.staging();
  const std::size_t raw_bytes = reservation->info.shape.raw_bytes();
  if (raw_bytes > staging->capacity_bytes()) {
    return refuse(wire::REFUSED, Refusal::kTooLarge,
                  "a chunk of " + std::to_string(raw_bytes) + " bytes does not fit into the session's staging of " +
                      std::to_string(staging->capacity_bytes()) + " ([sessions] staging_bytes_max)");
  }
  auto block = staging->allocate(raw_bytes);
  if (!block) return refuse(wire::NO_ROOM, Refusal::kStagingFull, "the session's staging is full at the moment");
  reservation->block = std::move(*block);
  if (const Status added = session.add_reservation(reservation); !added) {
    return refuse(wire::NO_ROOM, Refusal::kSession, added.message());
  }
  answer->set_outcome(wire::RESERVED);
  answer->set_reservation_id(reservation->id);
  answer->mutable_extent()->set_offset(reservation->block.extent().offset);
  answer->mutable_extent()->set_bytes(raw_bytes);
}

Status HotService::retain(const Session& session, const wire::Retain& request, wire::Retained* answer) {
  const auto space = named_namespace(session, request.namespace_id(), request.group());
  if (!space) return space.error();
  const auto hashes = split_hashes(request.block_hashes(), request.hash_bytes(), kMaxMatchBlocks);
  if (!hashes) return hashes.error();
  if (request.retain_seconds() == 0 || request.retain_seconds() > kMaxRetainSeconds) {
    return invalid("retain_seconds must be 1 to " + std::to_string(kMaxRetainSeconds) + ", not " +
                   std::to_string(request.retain_seconds()));
  }
  const std::int64_t until_ns =
      parts_.clock.now_ns() + static_cast<std::int64_t>(request.retain_seconds()) * 1'000'000'000;
  const RetainedChunks retained =
      parts_.store.retain((*space)->id, static_cast<std::uint16_t>(request.group()), *hashes, until_ns);
  parts_.metrics.retentions_refused.Increment(static_cast<double>(retained.refused));
  answer->set_chunks(retained.chunks);
  answer->set_refused(retained.refused);
  return Status::ok();
}

void HotService::commit(const std::shared_ptr<Session>& session, const wire::HotRequest& request,
                        HotReplyFunction reply, const SpanPtr& span) {
  const auto& items = request.commit().items();
  if (span) span->set("kvern.chunks", static_cast<std::uint64_t>(items.size()));
  if (const Status count = check_item_count(items.size()); !count) {
    wire::HotReply answer;
    answer.set_id(request.id());
    set_status(count, answer.mutable_status());
    return reply(std::move(answer));
  }
  const auto answer_all = [id = request.id(), reply = std::move(reply)](std::span<const Status> statuses) {
    wire::HotReply answer;
    answer.set_id(id);
    for (const Status& each : statuses) set_status(each, answer.mutable_committed()->add_items());
    reply(std::move(answer));
  };
  const auto pending = std::make_shared<PendingCommit>(static_cast<std::size_t>(items.size()), answer_all, parts_.store,
                                                       parts_.metrics, parts_.clock, parts_.pipeline);
  std::size_t index = 0;
  for (const auto& item : items) {
    const std::size_t mine = index++;
    const auto reservation = session->take_reservation(item.reservation_id());
    if (!reservation) {
      pending->finish(mine, invalid("there is no reservation " + std::to_string(item.reservation_id())));
      continue;
    }
    if (reservation->running_pushes.load() > 0) {
      pending->finish(mine, invalid("its bytes are still on their way"));
      continue;
    }
    if (item.plane_checksums().size() != plane_count(reservation->info.shape) * sizeof(std::uint64_t)) {
      parts_.metrics.refused(Refusal::kInvalid);
      pending->finish(mine, invalid("there must be one checksum per layer, part and head"));
      continue;
    }
    if (reservation->previous) pending->follows(*reservation->previous, reservation->info.key);
    reservation->span = span;
    const Status queued =
        parts_.pipeline.submit(reservation, parse_checksums(item.plane_checksums()),
                               [pending, mine](Status status) { pending->finish(mine, std::move(status)); });
    if (!queued) {
      parts_.metrics.refused(Refusal::kQueueFull);
      pending->finish(mine, queued);
    }
  }
}

void HotService::store_pages(const std::shared_ptr<Session>& session, const wire::HotRequest& request,
                             HotReplyFunction reply, const SpanPtr& span) {
  const wire::StorePages& body = request.store_pages();
  const auto refuse = [&](const Status& status) {
    wire::HotReply answer;
    answer.set_id(request.id());
    set_status(status, answer.mutable_status());
    reply(std::move(answer));
  };
  const auto pages = session->find_pages(body.pages_id());
  if (!pages || parts_.devices == nullptr)
    return refuse(invalid("there are no pages " + std::to_string(body.pages_id())));
  const auto terms = reserve_terms(*session, body.reserve());
  if (!terms) return refuse(terms.error());
  if (Status fits = check_pages(pages->cache(), terms->info); !fits) return refuse(fits);
  const auto& items = body.reserve().items();
  if (body.blocks_size() != items.size()) return refuse(invalid("as many lists of block ids as items are needed"));
  set_namespace(span, *terms->space);
  if (span) span->set("kvern.chunks", static_cast<std::uint64_t>(items.size()));

  const auto answer_all = [id = request.id(), reply](std::span<const Status> statuses) {
    wire::HotReply answer;
    answer.set_id(id);
    for (const Status& each : statuses) set_status(each, answer.mutable_pages_stored()->add_items());
    reply(std::move(answer));
  };
  const auto pending = std::make_shared<PendingCommit>(static_cast<std::size_t>(items.size()), answer_all, parts_.store,
                                                       parts_.metrics, parts_.clock, parts_.pipeline);
  std::vector<std::pair<std::size_t, Status>> ended;
  for (int i = 0; i < items.size(); ++i) {
    const auto mine = static_cast<std::size_t>(i);
    auto claimed = claim_item(*terms, items[i]);
    if (!claimed) {
      ended.emplace_back(mine, claimed.error().why);
      continue;
    }
    const auto& reservation = *claimed;
    auto ids = block_ids_of(body.blocks(i).ids(), reservation->info.block_hashes.size(), pages->cache());
    if (ids && std::ranges::find(*ids, 0U) != ids->end()) {
      ids = failure(Code::kInvalid, "block 0 is the null block: leave it out");
    }
    if (!ids) {
      ended.emplace_back(mine, ids.error());
      continue;
    }
    if (reservation->previous) pending->follows(*reservation->previous, reservation->info.key);
    reservation->span = span;
    const Status queued =
        parts_.devices->store(pages, reservation, std::move(*ids), body.deadline_ns(),
                              [pending, mine](Status status) { pending->finish(mine, std::move(status)); });
    if (!queued) {
      parts_.metrics.refused(Refusal::kQueueFull);
      ended.emplace_back(mine, queued);
    }
  }
  for (auto& [item, status] : ended) pending->finish(item, std::move(status));
}

void HotService::load_pages(const std::shared_ptr<Session>& session, const wire::HotRequest& request,
                            HotReplyFunction reply) {
  const wire::LoadPages& body = request.load_pages();
  const auto refuse = [&](const Status& status) {
    wire::HotReply answer;
    answer.set_id(request.id());
    set_status(status, answer.mutable_status());
    reply(std::move(answer));
  };
  if (stopping_.load(std::memory_order_relaxed)) return refuse(Status(Code::kUnavailable, "the daemon is stopping"));
  const auto pages = session->find_pages(body.pages_id());
  if (!pages || parts_.devices == nullptr)
    return refuse(invalid("there are no pages " + std::to_string(body.pages_id())));
  if (Status count = check_item_count(body.items_size()); !count) return refuse(count);
  const auto space = named_namespace(*session, body.namespace_id(), body.group());
  if (!space) return refuse(space.error());
  std::vector<DeviceService::LoadRequest> loads;
  for (const auto& item : body.items()) {
    auto hashes = split_hashes(item.block_hashes(), body.hash_bytes(), kMaxMatchBlocks);
    if (!hashes) return refuse(hashes.error());
    auto ids = block_ids_of(item.block_ids(), hashes->size(), pages->cache());
    if (!ids) return refuse(ids.error());
    loads.push_back({.pages = pages,
                     .space = *space,
                     .group = static_cast<std::uint16_t>(body.group()),
                     .hashes = std::move(*hashes),
                     .block_ids = std::move(*ids),
                     .deadline_ns = body.deadline_ns()});
  }

  const auto pending = std::make_shared<PendingLoad>(request.id(), loads.size(), std::move(reply), parts_.pipeline);
  for (std::size_t i = 0; i < loads.size(); ++i) {
    const auto finish = [pending, i](const Status& status, const DeviceService::Loaded& loaded) {
      pending->finish(i, status, loaded);
    };
    if (Status queued = parts_.devices->load(std::move(loads[i]), finish); !queued) finish(queued, {});
  }
}

Status HotService::abandon(Session& session, const wire::Abandon& request) {
  if (Status count = check_item_count(request.reservation_ids_size()); !count) return count;
  for (const auto id : request.reservation_ids()) session.take_reservation(id);
  return Status::ok();
}

Status HotService::fetch(Session& session, const wire::Fetch& request, wire::Fetched* answer, const SpanPtr& span) {
  if (stopping_.load(std::memory_order_relaxed)) return Status(Code::kUnavailable, "the daemon is stopping");
  if (Status count = check_item_count(request.items_size()); !count) return count;
  const auto space = named_namespace(session, request.namespace_id(), request.group());
  if (!space) return space.error();
  std::size_t locations = 0;
  std::optional<BlockHash> previous;
  for (const auto& item : request.items()) {
    auto* fetched = answer->add_items();
    if (locations >= kMaxLocations) {
      set_status(Status(Code::kBusy, "the answer would be too large: ask for fewer items"), fetched->mutable_status());
      continue;
    }
    fetch_item(session, **space, static_cast<std::uint16_t>(request.group()), item, fetched);
    locations += 1 + static_cast<std::size_t>(fetched->shards_size());
    // Who fetches a prompt names its chunks in order, and eviction wants to know it.
    const auto block = BlockHash::from_bytes(as_bytes(item.block_hash()));
    if (previous && block) {
      parts_.store.link((*space)->id, static_cast<std::uint16_t>(request.group()), *previous, *block);
    }
    previous = block;
  }
  if (span) {
    std::uint64_t tokens = 0, bytes = 0;
    for (const auto& item : answer->items()) {
      tokens += item.tokens();
      for (const auto& shard : item.shards()) bytes += shard.bytes();
    }
    set_namespace(span, **space);
    span->set("kvern.tier", "dram");
    span->set("kvern.chunks", static_cast<std::uint64_t>(request.items_size()));
    span->set("kvern.tokens", tokens);
    span->set("kvern.encoded_bytes", bytes);
  }
  return Status::ok();
}

void HotService::fetch_item(Session& session, const Namespace& space, std::uint16_t group, const wire::FetchItem& item,
                            wire::FetchedItem* answer) {
  const auto block = BlockHash::from_bytes(as_bytes(item.block_hash()));
  if (!block) return set_status(invalid("a block hash has 1 to 64 bytes"), answer->mutable_status());
  auto pinned = parts_.store.pin(space.id, group, *block, PinFor::kClaimed);
  if (!pinned) {
    parts_.metrics.missed(Miss::kEvictedBeforeLoad, space.shape.block_tokens);
    return set_status(pinned.error(), answer->mutable_status());
  }
  auto lease = std::make_shared<Lease>(parts_.store, std::move(*pinned), space.id, group, *block);
  const PinnedChunk& chunk = lease->chunk();
  const auto id = session.add_lease(lease);
  if (!id) return set_status(id.error(), answer->mutable_status());
  answer->set_lease_id(*id);
  answer->set_tokens(chunk.tokens);
  for (const StoredShard& shard : chunk.shards) {
    auto* location = answer->add_shards();
    location->set_offset(shard.extent.offset);
    location->set_bytes(shard.extent.bytes);
    location->set_layer_begin(shard.layer_begin);
    location->set_layers(shard.layers);
    location->set_head_begin(shard.head_begin);
    location->set_heads(shard.heads);
  }
  set_status(Status::ok(), answer->mutable_status());
}

Status HotService::release(Session& session, const wire::Release& request) {
  const int items = request.lease_ids_size() + request.corrupt_lease_ids_size();
  if (Status count = check_item_count(items); !count) return count;
  for (const auto id : request.corrupt_lease_ids()) {
    if (auto lease = session.take_lease(id)) parts_.pipeline.verify(std::move(lease));
  }
  for (const auto id : request.lease_ids()) session.take_lease(id);
  return Status::ok();
}

void HotService::report(const wire::Report& request) {
  Metrics& metrics = parts_.metrics;
  const auto count = [](std::uint64_t value) { return static_cast<double>(value); };
  metrics.requested_tokens.Increment(count(request.requested_tokens()));
  metrics.hit_tokens.Increment(count(request.hit_tokens()));
  if (request.requested_tokens() > request.hit_tokens()) {
    metrics.missed(Miss::kNotStored, count(request.requested_tokens() - request.hit_tokens()));
  }
  metrics.loaded_tokens.Increment(count(request.loaded_tokens()));
  metrics.failed_loads.Increment(count(request.failed_loads()));
  const auto observe_all = [](const auto& durations, prometheus::Histogram& histogram) {
    for (int i = 0; i < std::min(durations.size(), kMaxDurations); ++i) {
      if (std::isfinite(durations[i]) && durations[i] >= 0) histogram.Observe(durations[i]);
    }
  };
  observe_all(request.match_seconds(), metrics.match_seconds);
  if (request.load_seconds_size() == 0 && request.loaded_raw_bytes() == 0) return;
  // The text is the client's: only names of codecs that exist become labels.
  const auto codec = make_codec(request.codec_spec());
  Metrics::OfCodec& figures = metrics.codec(codec                                  ? (*codec)->spec()
                                            : request.codec_spec() == kMixedCodecs ? kMixedCodecs
                                                                                   : "unknown");
  observe_all(request.load_seconds(), figures.decode_seconds);
  figures.loaded_raw_bytes.Increment(count(request.loaded_raw_bytes()));
  figures.loaded_encoded_bytes.Increment(count(request.loaded_encoded_bytes()));
}

}  // namespace kvern
