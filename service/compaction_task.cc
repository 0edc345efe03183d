#include "service/compaction_task.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "base/parallel.h"
#include "kernels/slot_pages.h"
#include "store/lease.h"

namespace kvern {
namespace {

using std::chrono::milliseconds;

/// How often it looks whether chunks have come up from lower tiers, and how long it waits for all of them: a prompt of
/// some gigabytes takes seconds from a disk or an object store.
constexpr milliseconds kPrefetchInterval{2};
constexpr std::chrono::seconds kPrefetchPatience{60};

Status cancelled_status() { return {Code::kExpired, "it was deleted, or has expired, before it was made"}; }

/// A chunk of the prompt that stays where it is.
struct SourceChunk {
  std::shared_ptr<Lease> lease;
  std::vector<ContainerReader> shards;
  std::uint32_t first_token = 0;
  std::uint32_t tokens = 0;  ///< of the prompt; the last block may hold more
};

/// One layer of the prompt, [head][token][dim] for keys and values.
class LayerRows {
 public:
  LayerRows(const ShardShape& group, std::uint32_t tokens)
      : tokens_(tokens), row_bytes_{group.row_bytes(Part::kKey), group.row_bytes(Part::kValue)} {
    for (std::size_t part = 0; part < 2; ++part) rows_[part].resize(row_bytes_[part] * tokens * group.heads);
  }

  /// Takes the rows of a shard that begins at that head, of a chunk that begins at that token. Those of different
  /// shards may be filled side by side.
  class Sink final : public RowSink {
   public:
    Sink(LayerRows& layer, std::uint32_t first_token, std::uint32_t first_head)
        : layer_(layer), first_token_(first_token), first_head_(first_head) {}
    void write(std::uint32_t, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
               const std::byte* rows) override {
      const auto of = static_cast<std::size_t>(part);
      const std::size_t at = (std::size_t{first_head_} + head) * layer_.tokens_ + first_token_ + token;
      std::memcpy(layer_.rows_[of].data() + at * layer_.row_bytes_[of], rows, count * layer_.row_bytes_[of]);
    }

   private:
    LayerRows& layer_;
    const std::uint32_t first_token_;
    const std::uint32_t first_head_;
  };
  const std::byte* of(Part part) const { return rows_[static_cast<std::size_t>(part)].data(); }

 private:
  const std::uint32_t tokens_;
  const std::size_t row_bytes_[2];
  std::vector<std::byte> rows_[2];
};

/// The chunks of the cache in their canonical layout, zeros where no slot is.
class SlotChunks {
 public:
  explicit SlotChunks(const CompactionOrder& order)
      : block_tokens_(order.info.block_tokens), chunk_tokens_(order.chunk_tokens) {
    const std::uint32_t padded = (order.plan.slots + block_tokens_ - 1) / block_tokens_ * block_tokens_;
    for (std::uint32_t first = 0; first < padded; first += chunk_tokens_) {
      ShardShape& shape = shapes_.emplace_back(order.info.shape);
      shape.tokens = std::min(chunk_tokens_, padded - first);
      chunks_.emplace_back(shape.raw_bytes());
    }
  }

  /// Rows [head][slots of the layer][dim] to the layer's pages, one after the other.
  void put(std::span<const SlotPage> pages, std::uint32_t slots, Part part, std::span<const std::byte> rows) {
    for (std::size_t page = 0; page < pages.size(); ++page) {
      const std::uint32_t to = pages[page].block * block_tokens_;
      const std::uint32_t first = static_cast<std::uint32_t>(page) * block_tokens_;
      const std::size_t chunk = to / chunk_tokens_;
      const ShardShape& shape = shapes_[chunk];
      const std::size_t row = shape.row_bytes(part);
      const std::uint32_t count = std::min(block_tokens_, slots - first);
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        std::memcpy(
            chunks_[chunk].data() + shape.plane_offset(pages[page].layer, part, head) + to % chunk_tokens_ * row,
            rows.data() + (std::size_t{head} * slots + first) * row, count * row);
      }
    }
  }
  std::size_t size() const { return chunks_.size(); }
  const ShardShape& shape(std::size_t chunk) const { return shapes_[chunk]; }
  std::span<const std::byte> bytes(std::size_t chunk) const { return chunks_[chunk]; }

 private:
  const std::uint32_t block_tokens_;
  const std::uint32_t chunk_tokens_;
  std::vector<ShardShape> shapes_;
  std::vector<std::vector<std::byte>> chunks_;
};

bool is_part_of(const ShardShape& shard, const ShardShape& group, std::uint32_t tokens) {
  return shard.dtype == group.dtype && shard.key_dim == group.key_dim && shard.value_dim == group.value_dim &&
         shard.tokens == tokens && shard.layer_begin + shard.layers <= group.layers &&
         shard.head_begin + shard.heads <= group.heads;
}

/// Queries of one layer, [row][head][dim] of all heads.
class LayerQueries {
 public:
  explicit LayerQueries(const CompactionOrder& order) : order_(order) {}

  HeadRows of(std::uint32_t layer) {
    const ShardShape& shape = order_.info.shape;
    const std::uint32_t rows = order_.plan.query_rows;
    const std::size_t row = shape.row_bytes(Part::kKey);
    const std::size_t token_stride = order_.query_heads * row;
    rows_.resize(rows * token_stride);
    for (const QueryPart& part : order_.queries) {
      if (layer < part.layer_begin || layer >= part.layer_begin + part.layers) continue;
      const std::size_t bytes = part.heads * row;
      for (std::uint32_t token = 0; token < rows; ++token) {
        const std::size_t from = (std::size_t{layer - part.layer_begin} * rows + token) * bytes;
        std::memcpy(rows_.data() + token * token_stride + part.head_begin * row, part.bytes.data() + from, bytes);
      }
    }
    return {rows_.data(), shape.dtype, order_.query_heads, rows, shape.key_dim, row, token_stride};
  }

 private:
  const CompactionOrder& order_;
  std::vector<std::byte> rows_;
};

Status bring_up(TieredStore& tiers, const CompactionOrder& order, const std::vector<BlockHash>& hashes,
                const std::atomic<bool>& cancelled, std::shared_ptr<Prefetch>& held) {
  if (!tiers.has_tiers()) return Status::ok();
  const ChunkKey& key = order.info.key;
  held = tiers.prefetch(key.namespace_id, key.group, hashes, 0, order.chunk_tokens / order.info.block_tokens);
  const auto until = std::chrono::steady_clock::now() + kPrefetchPatience;
  while (held->pending()) {
    if (cancelled.load()) return cancelled_status();
    if (std::chrono::steady_clock::now() >= until) break;
    std::this_thread::sleep_for(kPrefetchInterval);
  }
  return Status::ok();
}

Result<SourceChunk> hold(ChunkStore& store, const CompactionOrder& order, std::span<const BlockHash> blocks,
                         std::uint32_t first_token) {
  const ChunkKey& key = order.info.key;
  auto pinned = store.pin(key.namespace_id, key.group, blocks.back());
  if (!pinned) {
    return failure(Code::kNotFound, "the prompt's tokens from " + std::to_string(first_token) +
                                        " on are not stored any more: they were evicted, or never arrived");
  }
  SourceChunk chunk;
  chunk.lease = std::make_shared<Lease>(store, std::move(*pinned), key.namespace_id, key.group, blocks.back());
  chunk.first_token = first_token;
  chunk.tokens = std::min(order.chunk_tokens, order.plan.prompt_tokens - first_token);
  for (const StoredShard& shard : chunk.lease->chunk().shards) {
    auto reader = ContainerReader::parse(store.bytes(shard));
    if (!reader) return failure(reader.error());
    const ContainerInfo& info = reader->info();
    const auto tokens = static_cast<std::uint32_t>(blocks.size()) * order.info.block_tokens;
    if (!is_part_of(info.shape, order.info.shape, tokens) || !std::ranges::equal(info.block_hashes, blocks)) {
      return failure(Code::kCorrupt, "a chunk of the prompt is not the one that its hashes name");
    }
    chunk.shards.push_back(std::move(*reader));
  }
  return chunk;
}

Result<std::vector<SourceChunk>> hold_prompt(ChunkStore& store, const CompactionOrder& order,
                                             const std::vector<BlockHash>& hashes) {
  const std::size_t chunk_blocks = order.chunk_tokens / order.info.block_tokens;
  std::vector<SourceChunk> prompt;
  for (std::size_t block = 0; block < hashes.size(); block += chunk_blocks) {
    const auto blocks = std::span(hashes).subspan(block, std::min(chunk_blocks, hashes.size() - block));
    auto chunk = hold(store, order, blocks, static_cast<std::uint32_t>(block) * order.info.block_tokens);
    if (!chunk) return failure(chunk.error());
    prompt.push_back(std::move(*chunk));
  }
  return prompt;
}

/// Verifies and decodes; the chunks side by side.
Status read_layer(const std::vector<SourceChunk>& prompt, std::uint32_t layer, std::uint32_t heads, LayerRows& rows,
                  Executor* helpers) {
  std::vector<Status> read(prompt.size());
  parallel_for(helpers, prompt.size(), [&](std::size_t i) {
    const SourceChunk& chunk = prompt[i];
    for (const ContainerReader& shard : chunk.shards) {
      LayerRows::Sink sink(rows, chunk.first_token, shard.info().shape.head_begin);
      if (read[i]) read[i] = shard.decode(layer, layer + 1, 0, heads, {0, chunk.tokens}, sink);
    }
  });
  const auto failed = std::ranges::find_if(read, [](const Status& status) { return !status; });
  return failed == read.end() ? Status::ok() : *failed;
}

PromptLayer prompt_layer(const CompactionOrder& order, std::uint32_t layer, const LayerRows& rows,
                         LayerQueries& queries) {
  const ShardShape& shape = order.info.shape;
  const std::uint32_t tokens = order.plan.prompt_tokens;
  PromptLayer prompt;
  prompt.keys = HeadRows::contiguous(rows.of(Part::kKey), shape.dtype, shape.heads, tokens, shape.key_dim);
  prompt.values = HeadRows::contiguous(rows.of(Part::kValue), shape.dtype, shape.heads, tokens, shape.value_dim);
  if (order.plan.query_rows > 0) prompt.queries = queries.of(layer);
  return prompt;
}

/// Pages of each layer. Budgets that follow from what all layers claim need the prompt once before it is cut.
Result<std::vector<std::uint32_t>> layer_pages(const CompactionOrder& order, const std::vector<SourceChunk>& prompt,
                                               LayerRows& rows, LayerQueries& queries,
                                               const std::atomic<bool>& cancelled, Executor* helpers) {
  const ShardShape& shape = order.info.shape;
  if (!order.plan.ragged()) {
    const std::uint32_t blocks = (order.plan.slots + order.info.block_tokens - 1) / order.info.block_tokens;
    return std::vector<std::uint32_t>(shape.layers, blocks);
  }
  std::vector<double> preferences;
  for (std::uint32_t layer = 0; order.plan.reads_preferences() && layer < shape.layers; ++layer) {
    if (cancelled.load()) return failure(cancelled_status());
    if (const Status read = read_layer(prompt, layer, shape.heads, rows, helpers); !read) return failure(read);
    const auto preference = layer_preference(order.plan, prompt_layer(order, layer, rows, queries), helpers);
    if (!preference) return failure(preference.error());
    preferences.push_back(*preference);
  }
  return order.plan.layer_pages(preferences, shape.layers);
}

/// Cuts one layer into its pages; returns what it keeps.
Result<evict::Selection> cut_layer(const CompactionOrder& order, const PromptLayer& prompt,
                                   std::span<const SlotPage> pages, SlotChunks& chunks, Executor* helpers) {
  const ShardShape& shape = order.info.shape;
  const auto room = static_cast<std::uint32_t>(pages.size()) * order.info.block_tokens;
  const std::uint32_t slots = order.plan.ragged() ? room : order.plan.slots;
  auto cut = compact_layer(order.plan, prompt, slots, helpers);
  if (!cut) return failure(cut.error());
  const std::int64_t shift = order.plan.shift(0);
  if (order.rotation && shift != 0) {
    const auto keys = HeadRows::contiguous(cut->keys.data(), shape.dtype, shape.heads, slots, shape.key_dim);
    if (const Status placed = place_keys(keys, shift, *order.rotation, cut->keys.data(), helpers); !placed) {
      return failure(placed);
    }
  }
  chunks.put(pages, slots, Part::kKey, cut->keys);
  chunks.put(pages, slots, Part::kValue, cut->values);
  return std::move(cut->kept);
}

/// How many of the chunk's last tokens belong to the prompt's last ones, which are not merged with others; those that
/// fill its last block are zeros.
std::uint32_t exact_tail(const CompactionOrder& order, std::size_t chunk, std::uint32_t tokens) {
  const std::uint64_t begin = std::uint64_t{chunk} * order.chunk_tokens, end = begin + tokens;
  const std::uint64_t recent = order.plan.slots - std::min(order.plan.slots, order.plan.recent_slots());
  return end <= recent ? 0 : static_cast<std::uint32_t>(end - std::max(begin, recent));
}

/// Encoded bytes of all chunks.
Result<std::uint64_t> store_slots(const CompactionTask::Parts& parts, const CompactionOrder& order,
                                  const std::vector<std::uint32_t>& layer_slots, const SlotChunks& slots) {
  const auto hashes = order.handle.slot_hashes(order.info.block_tokens, order.hash_bytes);
  const std::size_t chunk_blocks = order.chunk_tokens / order.info.block_tokens;
  std::uint64_t bytes = 0;
  std::optional<BlockHash> previous;
  for (std::size_t chunk = 0; chunk < slots.size(); ++chunk) {
    const auto blocks =
        std::span(hashes).subspan(chunk * chunk_blocks, std::min(chunk_blocks, hashes.size() - chunk * chunk_blocks));
    Reservation reservation;
    reservation.codec = order.codec;
    ContainerInfo& info = reservation.info;
    info = order.info;
    info.shape = slots.shape(chunk);
    info.position = chunk * order.chunk_tokens;
    info.key.last_block = blocks.back();
    info.block_hashes.assign(blocks.begin(), blocks.end());
    info.layer_slots = layer_slots;
    info.exact_tail = exact_tail(order, chunk, info.shape.tokens);
    reservation.claim = parts.in_flight.claim(info.key, info.shape);
    if (!reservation.claim) return failure(Code::kBusy, "somebody else stores a chunk of it");
    const Status stored = parts.pipeline.store(reservation, [&](std::span<std::byte> out) {
      auto encoded = encode_container(*order.codec, info, slots.bytes(chunk), {}, out);
      bytes += encoded.value_or(0);
      return encoded;
    });
    if (!stored) return failure(stored);
    if (previous) parts.store.link(info.key.namespace_id, info.key.group, *previous, info.key.last_block);
    previous = info.key.last_block;
  }
  return bytes;
}

}  // namespace

std::vector<ChunkKey> chunk_keys(const std::vector<BlockHash>& hashes, const NamespaceId& namespace_id,
                                 std::uint16_t group, std::uint32_t chunk_blocks) {
  std::vector<ChunkKey> keys;
  for (std::size_t block = 0; block < hashes.size(); block += chunk_blocks) {
    keys.push_back({namespace_id, group, hashes[std::min(block + chunk_blocks, hashes.size()) - 1]});
  }
  return keys;
}

std::vector<ChunkKey> CompactionOrder::source_keys() const {
  return chunk_keys(handle.source_hashes(info.block_tokens, hash_bytes), info.key.namespace_id, info.key.group,
                    chunk_tokens / info.block_tokens);
}

std::vector<ChunkKey> CompactionOrder::slot_keys() const {
  return chunk_keys(handle.slot_hashes(info.block_tokens, hash_bytes), info.key.namespace_id, info.key.group,
                    chunk_tokens / info.block_tokens);
}

std::uint64_t CompactionOrder::prompt_bytes() const {
  ShardShape one = info.shape;
  one.tokens = 1;
  return std::uint64_t{one.raw_bytes()} * plan.prompt_tokens;
}

std::uint64_t CompactionOrder::memory_bytes() const {
  const std::uint64_t layer = prompt_bytes() / info.shape.layers;
  const std::uint64_t slots = prompt_bytes() / plan.prompt_tokens * (std::uint64_t{plan.slots} + info.block_tokens);
  // A float per query head and token for each of mean and dispersion, and about as much again for scores and order.
  const std::uint64_t scores = std::uint64_t{4 * sizeof(float)} * query_heads * plan.prompt_tokens;
  const std::uint64_t row_bytes = std::uint64_t{query_heads} * info.shape.row_bytes(Part::kKey);
  const std::uint64_t query_bytes = row_bytes * plan.query_rows * (info.shape.layers + 1);
  const std::uint64_t workspace = plan.query_rows == 0 ? 0 : workspace_bytes(plan, info.shape, query_heads);
  return layer + slots + scores + query_bytes + workspace;
}

struct CompactionTask::Cut {
  std::vector<SourceChunk> prompt;
  std::vector<evict::Selection> kept;  ///< by layer
};

Result<CompactionTask::Outcome> CompactionTask::run(const CompactionOrder& order,
                                                    const std::atomic<bool>& cancelled) const {
  const auto hashes = order.handle.source_hashes(order.info.block_tokens, order.hash_bytes);
  std::shared_ptr<Prefetch> held;
  if (const Status up = bring_up(parts_.tiers, order, hashes, cancelled, held); !up) return failure(up);
  auto prompt = hold_prompt(parts_.store, order, hashes);
  if (!prompt) return failure(prompt.error());

  Outcome outcome;
  const auto cut = std::make_shared<Cut>();
  cut->prompt = std::move(*prompt);
  const ShardShape& shape = order.info.shape;
  LayerRows rows(shape, order.plan.prompt_tokens);
  LayerQueries queries(order);
  const auto counts = layer_pages(order, cut->prompt, rows, queries, cancelled, parts_.helpers);
  if (!counts) return failure(counts.error());
  const std::uint32_t blocks = (order.plan.slots - 1) / order.info.block_tokens + 1;
  const auto pages = slot_pages(order.plan.layout, *counts, blocks);
  if (!pages) return failure(pages.error());
  if (order.plan.ragged()) {
    for (const std::uint32_t count : *counts) outcome.layer_slots.push_back(count * order.info.block_tokens);
  }
  SlotChunks slots(order);
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    if (cancelled.load()) return failure(cancelled_status());
    if (const Status read = read_layer(cut->prompt, layer, shape.heads, rows, parts_.helpers); !read)
      return failure(read);
    auto kept = cut_layer(order, prompt_layer(order, layer, rows, queries), (*pages)[layer], slots, parts_.helpers);
    if (!kept) return failure(kept.error());
    cut->kept.push_back(std::move(*kept));
  }
  const auto stored = store_slots(parts_, order, outcome.layer_slots, slots);
  if (!stored) return failure(stored.error());
  outcome.stored_bytes = *stored;
  if (order.plan.query_rows > 0) outcome.cut = cut;
  return outcome;
}

Result<CompactionError> CompactionTask::measure(const CompactionOrder& order, const Cut& cut,
                                                const std::atomic<bool>& cancelled, Executor* helpers) const {
  const ShardShape& shape = order.info.shape;
  LayerRows rows(shape, order.plan.prompt_tokens);
  LayerQueries queries(order);
  CompactionError error;
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    if (cancelled.load()) return failure(cancelled_status());
    if (const Status read = read_layer(cut.prompt, layer, shape.heads, rows, helpers); !read) return failure(read);
    const auto of_layer = attention_error(prompt_layer(order, layer, rows, queries), cut.kept[layer], helpers);
    if (!of_layer) return failure(of_layer.error());
    error.mean += *of_layer / shape.layers;
    error.max = std::max(error.max, *of_layer);
  }
  return error;
}

}  // namespace kvern
