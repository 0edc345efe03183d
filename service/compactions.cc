#include "service/compactions.h"

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "service/log.h"

namespace kvern {
namespace {

// Far more than a model's context, few enough that no product of sizes overflows before it is compared with a limit.
constexpr std::uint32_t kMaxPromptTokens = 1U << 24;
constexpr std::uint32_t kMaxPromptBlocks = 1U << 20;
constexpr std::uint32_t kMaxQueryHeads = 1U << 14;
constexpr std::size_t kMaxSpecBytes = 4096;
constexpr std::size_t kMaxReasonBytes = 1024;
// Clients ask again when this is over, so that one that has gone away is not waited for long.
constexpr std::uint64_t kMaxWaitMs = 60'000;
constexpr std::size_t kMaxWaiters = 1024;
// Below the engine's threads and the daemon's own, but not idle: somebody waits for the result.
constexpr int kNice = 10;

/// Of this thread, once; without the right to it the thread keeps its priority.
void lower_priority() {
  static thread_local const int done = ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), kNice);
  static_cast<void>(done);
}

/// The same without any claim: it gives way at once to whoever wants the processor. An engine's threads wait for each
/// other many times a step, so that one that has to share its processor holds all of them up.
void make_idle() {
  constexpr sched_param kNone{};
  static thread_local const int done = ::sched_setscheduler(0, SCHED_IDLE, &kNone);
  static_cast<void>(done);
}

/// Tasks on an executor's threads, at that priority.
class LowPriority final : public Executor {
 public:
  explicit LowPriority(Executor& on) : on_(on) {}
  [[nodiscard]] bool submit(std::function<void()> task) override {
    return on_.submit([task = std::move(task)] {
      lower_priority();
      task();
    });
  }

 private:
  Executor& on_;
};

Status invalid(std::string why) { return {Code::kInvalid, std::move(why)}; }
Status refused(std::string why) { return {Code::kRefused, std::move(why)}; }
Status not_found() { return {Code::kNotFound, "there is no such compact cache, or it has expired"}; }

/// How the model turns its keys; none where they need not be moved. kRefused when that is not known: other ways to tell
/// positions (added to the input, or to the scores) would put the slots at wrong distances.
Result<std::optional<rope::Parameters>> rotation_of(const Namespace& space, std::int64_t shift) {
  if (shift == 0) return std::optional<rope::Parameters>();
  const std::string& text = space.fact("rotation");
  if (text.empty()) {
    return failure(
        refused("the keys cannot be moved to the positions of the slots: this model does not turn them, or "
                "how is not known (fact rotation)"));
  }
  auto rotation = rope::Parameters::parse(text);
  if (!rotation) return failure(rotation.error());
  if (rotation->rotary_dim > space.shape.key_dim) return failure(refused("the rotation is larger than the keys"));
  return std::optional(*rotation);
}

/// Whether the prompt's blocks are few enough to derive their hashes.
bool is_nameable(const CompactHandle& handle, const Namespace& space) {
  return handle.prompt_tokens <= kMaxPromptTokens &&
         handle.prompt_tokens / space.shape.block_tokens <= kMaxPromptBlocks;
}

/// The order that a part asks for, without queries. kInvalid and kRefused with the reason.
Result<CompactionOrder> order_of(CompactHandle handle, const Namespace& space, const wire::Compact& request) {
  if (request.spec().size() > kMaxSpecBytes) return failure(invalid("the spec is too long"));
  if (request.group() > UINT16_MAX) return failure(invalid("there is no such group"));
  if (request.hash_bytes() < CompactHandle::kMinHashBytes || request.hash_bytes() > CompactHandle::kMaxHashBytes) {
    return failure(invalid("block hashes of compact caches have 16 to 32 bytes"));
  }
  if (!is_nameable(handle, space)) return failure(refused("the prompt is too long for a compact cache"));
  const auto plan = CompactionPlan::make(request.spec(), handle.prompt_tokens, handle.layout, space.shape.block_tokens);
  if (!plan) return failure(plan.error());
  if (plan->layout != handle.layout) return failure(invalid("the spec gives all layers the same slots"));
  if (plan->slots != handle.slots) {
    return failure(invalid("the spec makes " + std::to_string(plan->slots) + " slots, the handle says " +
                           std::to_string(handle.slots)));
  }
  if (plan->query_rows != request.query_rows()) {
    return failure(invalid("the method reads the prompt's last " + std::to_string(plan->query_rows) +
                           " queries, of which " + std::to_string(request.query_rows()) + " were captured"));
  }
  const NamespaceShape& shape = space.shape;
  if (shape.kv_dtype == DType::kOpaqueBytes || shape.value_dim == 0) {
    return failure(refused("caches of this kind hold no rows of keys and values that could be picked"));
  }
  CompactionOrder order;
  // Once more, now with the model's own rotation.
  auto chain = parse_chain(request.spec(), space.fact("rotation"));
  if (!chain) return failure(chain.error());
  if (chain->codec == nullptr) return failure(refused("unrotate needs the model's rotation, which is not known"));
  order.codec = chain->codec;
  auto rotation = rotation_of(space, plan->shift(0));
  if (!rotation) return failure(rotation.error());
  order.rotation = *rotation;
  ContainerInfo& info = order.info;
  info.key.namespace_id = space.id;
  info.key.group = static_cast<std::uint16_t>(request.group());
  info.shape = {.dtype = shape.kv_dtype,
                .layer_begin = 0,
                .layers = request.group_layers(),
                .head_begin = 0,
                .heads = request.model_heads(),
                .tokens = shape.block_tokens,
                .key_dim = shape.key_dim,
                .value_dim = shape.value_dim};
  info.block_tokens = shape.block_tokens;
  info.group_layers = request.group_layers();
  info.model_heads = request.model_heads();
  info.codec_spec = order.codec->spec();
  info.lossy_generations = order.codec->lossless() ? 0 : 1;
  if (Status fits = shape.accepts(info.shape, info.group_layers, info.model_heads); !fits) return failure(fits);
  if (Status takes = order.codec->accepts(info.shape); !takes) return failure(takes);
  order.handle = std::move(handle);
  order.plan = *plan;
  order.chunk_tokens = shape.chunk_tokens;
  order.hash_bytes = request.hash_bytes();
  return order;
}

/// Not cut within a character: what is no UTF-8 cannot be sent.
std::string beginning_of(const std::string& text, std::size_t most_bytes) {
  std::size_t end = std::min(text.size(), most_bytes);
  while (end < text.size() && end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) --end;
  return text.substr(0, end);
}

}  // namespace

std::vector<ChunkKey> Compactions::Entry::keys_of(const std::vector<BlockHash>& hashes) const {
  NamespaceId id;
  std::memcpy(id.bytes.data(), manifest.report().namespace_id().data(), id.bytes.size());
  return chunk_keys(hashes, id, static_cast<std::uint16_t>(manifest.report().group()),
                    manifest.chunk_tokens() / manifest.block_tokens());
}

std::vector<ChunkKey> Compactions::Entry::source_keys() const {
  return keys_of(handle.source_hashes(manifest.block_tokens(), manifest.hash_bytes()));
}

std::vector<ChunkKey> Compactions::Entry::slot_keys() const {
  return keys_of(handle.slot_hashes(manifest.block_tokens(), manifest.hash_bytes()));
}

Compactions::Compactions(const Parts& parts, const CompactionLimits& limits, std::filesystem::path folder)
    : parts_(parts),
      limits_(limits),
      helpers_(parts.helpers == nullptr ? nullptr : std::make_unique<LowPriority>(*parts.helpers)),
      task_({parts.store, parts.tiers, parts.pipeline, parts.in_flight, helpers_.get()}),
      manifests_(std::move(folder)) {
  for (auto& manifest : manifests_.load()) take_over(std::move(manifest));
  if (!entries_.empty()) log_info("compact caches of the run before are known", {{"caches", entries_.size()}});
}

void Compactions::take_over(wire::CompactManifest manifest) {
  auto entry = std::make_shared<Entry>();
  entry->handle = CompactHandle::parse(manifest.report().handle()).value();  // load() has looked
  entry->manifest = std::move(manifest);
  const bool expired = entry->handle.expires_at <= parts_.unix_seconds();
  if (entry->pending() || expired) {
    erase_chunks(entry->source_keys());
    erase_chunks(entry->slot_keys());
  }
  if (expired) return manifests_.remove(entry->handle.digits);
  if (entry->pending()) {
    entry->report().set_state(wire::COMPACTION_FAILED);
    entry->report().set_reason("the daemon restarted before it was made");
    keep(entry->handle.digits, entry->manifest);
  }
  entries_.emplace(entry->handle.text, std::move(entry));
}

void Compactions::keep(const std::string& digits, const wire::CompactManifest& manifest) {
  if (const Status written = manifests_.write(digits, manifest); !written) {
    log_warn("a restart will not know what became of a compact cache", {{"why", written.message()}});
  }
}

void Compactions::erase_chunks(const std::vector<ChunkKey>& keys) {
  parts_.tiers.erase(keys, [](const Status& erased) {
    if (!erased) log_warn("chunks of a compact cache stay in a lower tier", {{"why", erased.message()}});
  });
}

// ---------------------------------------------------------------- coming

Status Compactions::admit_locked(const CompactionOrder& order, std::uint64_t query_bytes, bool is_new) {
  if (stopping_) return {Code::kUnavailable, "the daemon is stopping"};
  if (order.memory_bytes() > limits_.job_bytes) {
    return refused("the cut of this prompt takes " + std::to_string(order.memory_bytes()) +
                   " bytes of memory, more than compact.job_bytes = " + std::to_string(limits_.job_bytes));
  }
  if (query_bytes > limits_.job_bytes - std::min(limits_.job_bytes, query_bytes_)) {
    return {Code::kBusy, "queries of other compact caches fill compact.job_bytes"};
  }
  if (!is_new) return Status::ok();
  const auto pending = std::ranges::count_if(entries_, [](const auto& item) { return item.second->pending(); });
  if (static_cast<std::size_t>(pending) >= limits_.max_pending) {
    return {Code::kBusy, std::to_string(pending) +
                             " compact caches wait to be made (compact.max_pending): ask again "
                             "later"};
  }
  if (!make_room_locked()) {
    return refused("there are " + std::to_string(entries_.size()) +
                   " compact caches (compact.max_handles): delete some, or give them shorter lives");
  }
  return Status::ok();
}

/// Of those that failed only the reason is known: the oldest makes way.
bool Compactions::make_room_locked() {
  if (entries_.size() < limits_.max_handles) return true;
  auto oldest = entries_.end();
  for (auto at = entries_.begin(); at != entries_.end(); ++at) {
    const auto& report = at->second->manifest.report();
    if (report.state() != wire::COMPACTION_FAILED) continue;
    if (oldest == entries_.end() || report.created_at() < oldest->second->manifest.report().created_at()) oldest = at;
  }
  if (oldest == entries_.end()) return false;
  manifests_.remove(oldest->second->handle.digits);
  entries_.erase(oldest);
  return true;
}

namespace {

/// Whether another rank may add its part to what is known; the sentence says why not.
Status check_same(const CompactionOrder& known, const CompactionOrder& order) {
  if (known.plan.chain.spec == order.plan.chain.spec && known.info.key == order.info.key &&
      known.info.shape == order.info.shape && known.hash_bytes == order.hash_bytes &&
      known.query_heads == order.query_heads) {
    return Status::ok();
  }
  return invalid("other ranks have asked for something else under this handle");
}

bool overlap(std::uint32_t begin, std::uint32_t count, std::uint32_t other_begin, std::uint32_t other_count) {
  return begin < other_begin + other_count && other_begin < begin + count;
}

}  // namespace

Status Compactions::begin(const CompactionAsker& asker, const std::shared_ptr<const Namespace>& space,
                          const wire::Compact& request) {
  const auto handle = CompactHandle::parse(request.handle());
  Status taken = handle ? consider(asker, *space, request, *handle) : handle.error();
  if (taken) return taken;
  parts_.metrics.compaction_ended(CompactionEnd::kRefused);
  if (handle) turn_away(asker, *space, request, *handle, taken);
  return taken;
}

Status Compactions::consider(const CompactionAsker& asker, const Namespace& space, const wire::Compact& request,
                             CompactHandle handle) {
  const std::int64_t now = parts_.unix_seconds();
  if (handle.expires_at <= now) return refused("the handle has expired");
  if (handle.expires_at - now > limits_.max_ttl_seconds) {
    return refused("a compact cache lives at most " + std::to_string(limits_.max_ttl_seconds) +
                   " seconds (compact.max_ttl_seconds)");
  }
  auto made = order_of(std::move(handle), space, request);
  if (!made) return made.error();
  auto order = std::make_shared<CompactionOrder>(std::move(*made));

  const wire::ShardMessage& shard = request.shard();
  ShardShape shape = order->info.shape;
  if (shard.dtype() != static_cast<std::uint32_t>(shape.dtype)) {
    return invalid("the shard's dtype is not that of its namespace");
  }
  shape.layer_begin = shard.layer_begin();
  shape.layers = shard.layers();
  shape.head_begin = shard.head_begin();
  shape.heads = shard.heads();
  shape.key_dim = shard.key_dim();
  shape.value_dim = shard.value_dim();
  if (Status fits = space.shape.accepts(shape, order->info.group_layers, order->info.model_heads); !fits) return fits;
  RankPart part{asker.session, shape.layer_begin, shape.layers, shape.head_begin, shape.heads, 0, {}};
  if (order->plan.query_rows > 0) {
    const std::uint32_t heads = request.query_heads();
    if (heads == 0 || heads > kMaxQueryHeads || heads % shape.heads != 0) {
      return invalid("query heads must be a multiple of the KV heads that they belong to");
    }
    const std::uint32_t per_kv_head = heads / shape.heads;
    order->query_heads = per_kv_head * order->info.model_heads;
    part.queries = {shape.layer_begin, shape.layers, shape.head_begin * per_kv_head, heads, {}};
    part.query_bytes = std::uint64_t{shape.layers} * order->plan.query_rows * heads * shape.row_bytes(Part::kKey);
  }
  return take_part(asker, space, std::move(order), std::move(part));
}

/// Nobody else knows of the chunks that lie under a handle that was refused.
void Compactions::turn_away(const CompactionAsker& asker, const Namespace& space, const wire::Compact& request,
                            const CompactHandle& handle, const Status& why) {
  const bool hashes_known = request.hash_bytes() >= CompactHandle::kMinHashBytes &&
                            request.hash_bytes() <= CompactHandle::kMaxHashBytes && request.group() <= UINT16_MAX &&
                            is_nameable(handle, space);
  if (!hashes_known) return;
  std::lock_guard files(files_mutex_);
  bool deleted = false;
  {
    std::lock_guard lock(mutex_);
    if (stopping_ || entries_.contains(handle.text)) return;
    deleted = deleted_ns_.contains(handle.text);
  }
  const auto entry = make_entry(asker, space, handle, beginning_of(request.spec(), kMaxSpecBytes), request.group(),
                                request.hash_bytes());
  erase_chunks(entry->source_keys());
  const std::int64_t seconds = handle.expires_at - parts_.unix_seconds();
  if (deleted || seconds <= 0 || seconds > limits_.max_ttl_seconds) return;
  entry->report().set_state(wire::COMPACTION_FAILED);
  entry->report().set_reason(beginning_of(why.message(), kMaxReasonBytes));
  {
    std::lock_guard lock(mutex_);
    if (!make_room_locked()) return;
    entries_.emplace(handle.text, entry);
  }
  keep(handle.digits, entry->manifest);
}

std::shared_ptr<Compactions::Entry> Compactions::make_entry(const CompactionAsker& asker, const Namespace& space,
                                                            const CompactHandle& handle, const std::string& spec,
                                                            std::uint32_t group, std::uint32_t hash_bytes) const {
  auto entry = std::make_shared<Entry>();
  entry->handle = handle;
  wire::CompactionReport& report = entry->report();
  report.set_handle(handle.text);
  report.set_method(spec);
  report.set_namespace_id(space.id.bytes.data(), space.id.bytes.size());
  report.set_group(group);
  report.set_tenant(space.tenant);
  report.set_client_name(asker.client_name);
  report.set_created_at(parts_.unix_seconds());
  entry->manifest.set_hash_bytes(hash_bytes);
  entry->manifest.set_block_tokens(space.shape.block_tokens);
  entry->manifest.set_chunk_tokens(space.shape.chunk_tokens);
  return entry;
}

Status Compactions::take_part(const CompactionAsker& asker, const Namespace& space,
                              std::shared_ptr<CompactionOrder> order, RankPart part) {
  std::lock_guard files(files_mutex_);
  std::shared_ptr<Entry> entry;
  {
    std::lock_guard lock(mutex_);
    const auto found = entries_.find(order->handle.text);
    if (found != entries_.end()) entry = found->second;
    if (deleted_ns_.contains(order->handle.text)) return refused("this compact cache was deleted");
    if (Status admitted = admit_locked(*order, part.query_bytes, !entry); !admitted) return admitted;
    if (entry) {
      if (!entry->pending() || entry->handed_over) return refused("this compact cache is there already");
      if (Status same = check_same(*entry->order, *order); !same) return same;
      for (const RankPart& other : entry->parts) {
        if (overlap(part.layer_begin, part.layers, other.layer_begin, other.layers) &&
            overlap(part.head_begin, part.heads, other.head_begin, other.heads)) {
          return refused("a rank has asked for these layers and heads already");
        }
      }
    }
  }
  if (!entry) {
    entry = make_entry(asker, space, order->handle, order->plan.chain.spec, order->info.key.group, order->hash_bytes);
    entry->report().set_raw_bytes(order->prompt_bytes());
    entry->order = std::move(order);
    entry->began_ns = parts_.clock.now_ns();
    // Before it is taken: a daemon that dies over it leaves no chunks that nobody knows.
    if (Status written = manifests_.write(entry->handle.digits, entry->manifest); !written) return written;
  }
  std::lock_guard lock(mutex_);
  entries_.try_emplace(entry->handle.text, entry);
  entry->query_bytes += part.query_bytes;
  query_bytes_ += part.query_bytes;
  entry->parts.push_back(std::move(part));
  if (!entry->span) entry->span = asker.span;
  start_if_whole_locked(entry);
  return Status::ok();
}

Status Compactions::add_queries(const CompactionAsker& asker, const wire::CompactQueries& request) {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(request.handle());
  if (found == entries_.end() || !found->second->pending() || found->second->handed_over) {
    return {Code::kNotFound, "no compact cache of this handle waits for queries"};
  }
  auto& parts = found->second->parts;
  const auto part = std::ranges::find_if(parts, [&](const RankPart& each) {
    return each.session == asker.session && each.layer_begin == request.layer_begin() &&
           each.head_begin == request.head_begin();
  });
  if (part == parts.end()) return {Code::kNotFound, "this session has no part with these layers and heads"};
  std::string& bytes = part->queries.bytes;
  if (request.offset() != bytes.size() || request.data().empty() ||
      request.data().size() > part->query_bytes - bytes.size()) {
    return invalid("queries come in order and without gaps: " + std::to_string(bytes.size()) + " of " +
                   std::to_string(part->query_bytes) + " bytes are there");
  }
  bytes.reserve(part->query_bytes);
  bytes += request.data();
  start_if_whole_locked(found->second);
  return Status::ok();
}

void Compactions::start_if_whole_locked(const std::shared_ptr<Entry>& entry) {
  CompactionOrder& order = *entry->order;
  // Parts do not overlap, so that they cover all when they are as many.
  std::uint64_t covered = 0;
  for (const RankPart& part : entry->parts) covered += part.whole() ? std::uint64_t{part.layers} * part.heads : 0;
  if (covered < std::uint64_t{order.info.group_layers} * order.info.model_heads) return;
  if (order.plan.query_rows > 0) {
    for (RankPart& part : entry->parts) order.queries.push_back(std::move(part.queries));
  }
  // A graceful stop waits for it.
  const auto work = std::make_shared<StorePipeline::Work>(parts_.pipeline);
  if (parts_.executor.submit([this, entry, work] { run(entry); })) {
    entry->parts.clear();
    entry->handed_over = true;
    return;
  }
  // Caches that were deleted while they waited still stand in the queue: tick() tries again. At a stop the next start
  // says what became of it.
  for (std::size_t i = 0; i < order.queries.size(); ++i) entry->parts[i].queries = std::move(order.queries[i]);
  order.queries.clear();
}

// ---------------------------------------------------------------- being made

namespace {

/// What a task throws is its failure.
template <typename T, typename Work>
Result<T> caught(Work work) {
  try {
    return work();
  } catch (const std::exception& error) {
    return failure(Code::kInternal, error.what());
  }
}

}  // namespace

void Compactions::run(const std::shared_ptr<Entry>& entry) {
  lower_priority();
  const std::int64_t started_ns = parts_.clock.now_ns();
  const auto seconds_since = [this](std::int64_t since_ns) {
    return static_cast<double>(parts_.clock.now_ns() - since_ns) * 1e-9;
  };
  const SpanPtr span = child_of(entry->span, "kvern.compaction");
  const std::shared_ptr<const CompactionOrder> order = entry->order;
  const auto outcome = caught<CompactionTask::Outcome>([&] { return task_.run(*order, entry->cancelled); });
  if (span) {
    span->set("kvern.tokens", entry->handle.prompt_tokens);
    span->set("kvern.slots", entry->handle.slots);
    span->set("kvern.raw_bytes", order->prompt_bytes());
    if (outcome) span->set("kvern.encoded_bytes", outcome->stored_bytes);
    span->end(status_of(outcome));
  }
  const double seconds = seconds_since(started_ns);
  if (!finish(entry, outcome, seconds)) return;
  const auto measure = [this, entry, order, seconds, seconds_since](const CompactionTask::Cut& cut, Executor* helpers) {
    const std::int64_t since_ns = parts_.clock.now_ns();
    auto error = caught<CompactionError>([&] { return task_.measure(*order, cut, entry->cancelled, helpers); });
    return std::pair(std::move(error), seconds + seconds_since(since_ns));
  };
  // A thread without a claim to a processor takes no locks, which others would wait for: what it has found is noted,
  // and the prompt given back, by one that has, and before the caches that wait to be made.
  Executor& notes = parts_.helpers != nullptr ? *parts_.helpers : parts_.executor;
  const bool handed = parts_.measurers != nullptr && parts_.measurers->submit([this, entry, measure, &notes,
                                                                               cut = outcome->cut]() mutable {
    make_idle();
    const auto found = measure(*cut, nullptr);
    auto note = [this, entry, found, cut = std::move(cut)] { measured(entry, found.first, found.second); };
    if (!notes.submit(std::move(note))) measured(entry, found.first, found.second);
  });
  if (handed) return;
  const auto found = measure(*outcome->cut, helpers_.get());
  measured(entry, found.first, found.second);
}

bool Compactions::finish(const std::shared_ptr<Entry>& entry, const Result<CompactionTask::Outcome>& outcome,
                         double seconds) {
  Answers answers;
  const bool measuring = outcome && outcome->cut;
  {
    std::lock_guard files(files_mutex_);
    wire::CompactManifest manifest;
    bool dropped = false;
    {
      std::lock_guard lock(mutex_);
      dropped = !entries_.contains(entry->handle.text);
      if (dropped || stopping_ || !measuring) query_bytes_ -= entry->query_bytes;
      if (stopping_) return false;  // the next start cleans up
      manifest = entry->manifest;
    }
    erase_chunks(entry->source_keys());
    if (dropped || !outcome) erase_chunks(entry->slot_keys());
    if (dropped) return false;
    wire::CompactionReport& report = *manifest.mutable_report();
    report.set_seconds(seconds);
    if (outcome) {
      report.set_state(wire::COMPACTION_READY);
      report.set_stored_bytes(outcome->stored_bytes);
      report.mutable_layer_slots()->Assign(outcome->layer_slots.begin(), outcome->layer_slots.end());
    } else {
      report.set_state(wire::COMPACTION_FAILED);
      report.set_reason(beginning_of(outcome.error().message(), kMaxReasonBytes));
    }
    keep(entry->handle.digits, manifest);
    std::lock_guard lock(mutex_);
    entry->manifest = std::move(manifest);
    entry->order.reset();
    entry->measuring = measuring;
    answers = take_waiters_locked(entry->handle.text, report_of(*entry), measuring);
  }
  const wire::CompactionReport& report = entry->manifest.report();
  if (outcome) {
    if (!measuring) {
      parts_.metrics.compacted(entry->handle.prompt_tokens, report.raw_bytes(), report.stored_bytes(), {}, seconds);
    }
    log_info("a compact cache is ready", {{"tenant", report.tenant()},
                                          {"client", report.client_name()},
                                          {"tokens", entry->handle.prompt_tokens},
                                          {"slots", entry->handle.slots},
                                          {"raw_bytes", report.raw_bytes()},
                                          {"stored_bytes", report.stored_bytes()},
                                          {"seconds", seconds},
                                          {"method", report.method()}});
  } else {
    parts_.metrics.compaction_ended(CompactionEnd::kFailed);
    log_warn("a compact cache was not made", {{"tenant", report.tenant()},
                                              {"client", report.client_name()},
                                              {"method", report.method()},
                                              {"why", report.reason()}});
  }
  for (auto& [found, answer] : answers) found(std::vector{std::move(answer)});
  return measuring;
}

void Compactions::measured(const std::shared_ptr<Entry>& entry, const Result<CompactionError>& error, double seconds) {
  Answers answers;
  wire::CompactManifest manifest;
  bool gone = false;  // deleted meanwhile
  {
    std::lock_guard files(files_mutex_);
    {
      std::lock_guard lock(mutex_);
      query_bytes_ -= entry->query_bytes;
      entry->measuring = false;
      if (stopping_) return;
      manifest = entry->manifest;
      gone = !entries_.contains(entry->handle.text);
    }
    wire::CompactionReport& report = *manifest.mutable_report();
    report.set_seconds(seconds);
    if (error) report.set_error_mean(error->mean);
    if (error) report.set_error_max(error->max);
    if (!gone) {
      keep(entry->handle.digits, manifest);
      std::lock_guard lock(mutex_);
      entry->manifest = manifest;
      answers = take_waiters_locked(entry->handle.text, report_of(*entry));
    }
  }
  const wire::CompactionReport& report = manifest.report();
  if (!error && !gone) {
    log_warn("the error of a compact cache is not known",
             {{"tenant", report.tenant()}, {"client", report.client_name()}, {"why", error.error().message()}});
  }
  parts_.metrics.compacted(entry->handle.prompt_tokens, report.raw_bytes(), report.stored_bytes(),
                           error ? std::optional(error->mean) : std::nullopt, seconds);
  for (auto& [found, answer] : answers) found(std::vector{std::move(answer)});
}

// ---------------------------------------------------------------- asking

std::shared_ptr<Compactions::Entry> Compactions::find_locked(const CompactionAsker& asker,
                                                             const std::string& handle) const {
  const auto found = entries_.find(handle);
  if (found == entries_.end() || found->second->handle.expires_at <= parts_.unix_seconds()) return nullptr;
  const bool own = asker.sees_all || found->second->manifest.report().tenant() == asker.tenant;
  return own ? found->second : nullptr;
}

/// As it is at this moment: chunks that were evicted, and lie in no lower tier, are gone.
wire::CompactionReport Compactions::report_of(const Entry& entry) const {
  wire::CompactionReport report = entry.manifest.report();
  report.set_error_to_come(entry.measuring);
  if (report.state() != wire::COMPACTION_READY || parts_.tiers.has_tiers()) return report;
  for (const ChunkKey& key : entry.slot_keys()) {
    if (parts_.store.describe(key.namespace_id, key.group, key.last_block)) continue;
    report.set_state(wire::COMPACTION_FAILED);
    report.set_reason("its chunks were evicted from DRAM, and there is no lower tier");
    break;
  }
  return report;
}

void Compactions::find(const CompactionAsker& asker, const wire::CompactionQuery& query, Found found) {
  std::vector<wire::CompactionReport> reports;
  {
    std::lock_guard lock(mutex_);
    if (!query.handle().empty()) {
      const auto entry = find_locked(asker, query.handle());
      const bool to_come = entry && (entry->pending() || (entry->measuring && !query.early()));
      if (to_come && query.wait_ms() > 0 && waiters_.size() < kMaxWaiters && !stopping_) {
        const auto wait_ns = static_cast<std::int64_t>(std::min(query.wait_ms(), kMaxWaitMs)) * 1'000'000;
        waiters_.push_back({query.handle(), parts_.clock.now_ns() + wait_ns, query.early(), std::move(found)});
        return;
      }
      if (entry) reports.push_back(report_of(*entry));
    } else {
      for (const auto& [handle, entry] : entries_) {
        if (find_locked(asker, handle)) reports.push_back(report_of(*entry));
      }
    }
  }
  if (reports.empty() && !query.handle().empty()) return found(failure(not_found()));
  std::ranges::sort(reports, {}, &wire::CompactionReport::created_at);
  found(std::move(reports));
}

Compactions::Answers Compactions::take_waiters_locked(const std::string& handle, const wire::CompactionReport& report,
                                                      bool early_only) {
  Answers answers;
  std::erase_if(waiters_, [&](Waiter& waiter) {
    if (waiter.handle != handle || (early_only && !waiter.early)) return false;
    answers.emplace_back(std::move(waiter.found), report);
    return true;
  });
  return answers;
}

Compactions::Figures Compactions::figures() const {
  Figures figures;
  std::lock_guard lock(mutex_);
  for (const auto& [handle, entry] : entries_) {
    const wire::CompactionReport& report = entry->manifest.report();
    ++(report.state() == wire::COMPACTION_READY    ? figures.ready
       : report.state() == wire::COMPACTION_FAILED ? figures.failed
                                                   : figures.pending);
    if (report.state() == wire::COMPACTION_READY) figures.stored_bytes += report.stored_bytes();
  }
  return figures;
}

// ---------------------------------------------------------------- going

std::vector<ChunkKey> Compactions::remove_locked(const std::shared_ptr<Entry>& entry) {
  entries_.erase(entry->handle.text);
  entry->cancelled.store(true);
  if (entry->pending()) {
    if (entry->handed_over) return {};  // whoever makes it cleans up
    query_bytes_ -= entry->query_bytes;
    return entry->source_keys();
  }
  return entry->manifest.report().state() == wire::COMPACTION_READY ? entry->slot_keys() : std::vector<ChunkKey>();
}

Status Compactions::erase(const CompactionAsker& asker, const std::string& handle) {
  {
    std::lock_guard lock(mutex_);
    const auto entry = find_locked(asker, handle);
    if (!entry) return not_found();
    // Other ranks may still ask for it.
    if (entry->pending() && !entry->handed_over) deleted_ns_[handle] = parts_.clock.now_ns();
  }
  end(handle, "it was deleted");
  return Status::ok();
}

void Compactions::end(const std::string& handle, const std::string& why) {
  Answers answers;
  std::vector<ChunkKey> keys;
  {
    std::lock_guard files(files_mutex_);
    std::string digits;
    {
      std::lock_guard lock(mutex_);
      const auto found = entries_.find(handle);
      if (found == entries_.end()) return;
      const auto entry = found->second;
      digits = entry->handle.digits;
      wire::CompactionReport report = entry->manifest.report();
      keys = remove_locked(entry);
      report.set_state(wire::COMPACTION_FAILED);
      report.set_reason(why);
      answers = take_waiters_locked(handle, report);
    }
    manifests_.remove(digits);
  }
  erase_chunks(keys);
  for (auto& [found, answer] : answers) found(std::vector{std::move(answer)});
}

/// Parts or queries never came.
void Compactions::give_up(const std::string& handle) {
  Answers answers;
  std::vector<ChunkKey> keys;
  {
    std::lock_guard files(files_mutex_);
    std::unique_lock lock(mutex_);
    const auto found = entries_.find(handle);
    if (found == entries_.end() || !found->second->pending() || found->second->handed_over) return;
    Entry& entry = *found->second;
    keys = entry.source_keys();
    entry.report().set_state(wire::COMPACTION_FAILED);
    entry.report().set_reason(
        "not all ranks have asked for it, or sent their queries, in time, or too many others wait to be made");
    query_bytes_ -= entry.query_bytes;
    entry.parts.clear();
    entry.order.reset();
    answers = take_waiters_locked(handle, entry.manifest.report());
    const auto digits = entry.handle.digits;
    const auto manifest = entry.manifest;
    lock.unlock();
    keep(digits, manifest);
  }
  parts_.metrics.compaction_ended(CompactionEnd::kFailed);
  erase_chunks(keys);
  for (auto& [found, answer] : answers) found(std::vector{std::move(answer)});
}

void Compactions::tick() {
  const std::int64_t now_ns = parts_.clock.now_ns();
  const std::int64_t now = parts_.unix_seconds();
  std::vector<std::string> expired;
  std::vector<std::string> late;
  Answers answers;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [handle, entry] : entries_) {
      if (entry->handle.expires_at <= now) {
        expired.push_back(handle);
      } else if (entry->pending() && !entry->handed_over && !stopping_) {
        start_if_whole_locked(entry);
        if (!entry->handed_over && now_ns - entry->began_ns >= limits_.collect_ns) late.push_back(handle);
      }
    }
    std::erase_if(deleted_ns_, [&](const auto& item) { return now_ns - item.second >= limits_.collect_ns; });
    std::erase_if(waiters_, [&](Waiter& waiter) {
      if (waiter.until_ns > now_ns) return false;
      answers.emplace_back(std::move(waiter.found), report_of(*entries_.at(waiter.handle)));
      return true;
    });
  }
  for (auto& [found, answer] : answers) found(std::vector{std::move(answer)});
  for (const auto& handle : expired) end(handle, "it has expired");
  for (const auto& handle : late) give_up(handle);
}

void Compactions::stop() {
  std::vector<Waiter> waiters;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    for (const auto& [handle, entry] : entries_) entry->cancelled.store(true);
    waiters = std::exchange(waiters_, {});
  }
  for (const Waiter& waiter : waiters) waiter.found(failure(Code::kUnavailable, "the daemon is stopping"));
}

}  // namespace kvern
