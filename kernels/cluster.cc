#include "kernels/cluster.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "base/parallel.h"
#include "kernels/cluster_arithmetic.h"
#include "kernels/cpu/cluster.h"

namespace kvern::cluster {
namespace {

/// Memory that grows and is not initialised.
template <typename T>
class Buffer {
 public:
  T* get(std::size_t count) {
    if (count > size_) {
      data_ = std::make_unique_for_overwrite<T[]>(count);
      size_ = count;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
  std::size_t size_ = 0;
};

/// Entries of one head as a pass finds them.
struct Source {
  Rows keys;
  Rows values;
  /// Null: entry i is token i.
  const Members* members = nullptr;

  Members member(std::uint32_t entry) const {
    return members != nullptr ? members[entry] : Members{1, entry, entry, entry};
  }
};

/// Where a pass puts them.
struct Target {
  float* keys = nullptr;
  float* values = nullptr;
  Members* members = nullptr;
};

/// Entries [begin, begin + count), of which at most `merges` join others.
struct Piece {
  std::uint32_t head = 0;
  std::uint32_t begin = 0;
  std::uint32_t count = 0;
  std::uint32_t merges = 0;
  std::uint32_t survivors = 0;
  std::uint32_t to = 0;  ///< number of the first survivor
};

/// Decides which entries of the piece go where: into[i] is an entry of the piece. Returns how many survive.
std::uint32_t match_piece(const Source& source, const Piece& piece, float min_similarity, MatchScratch& scratch,
                          std::uint32_t* into) {
  for (std::uint32_t i = 0; i < piece.count; ++i) into[i] = i;
  if (piece.merges == 0) return piece.count;
  match_chunk(source.keys.from(piece.begin), piece.count, scratch);
  std::uint64_t ranks[kMaxSources];
  std::uint32_t candidates = 0;
  for (std::uint32_t a = 0; a < (piece.count + 1) / 2; ++a) {
    const float similarity = scratch.partners[a].similarity;
    if (similarity == -std::numeric_limits<float>::infinity() || similarity < min_similarity) continue;
    ranks[candidates++] = rank(similarity, a);
  }
  const std::uint32_t merges = std::min(piece.merges, candidates);
  if (merges < candidates) std::nth_element(ranks, ranks + merges, ranks + candidates, std::greater<>());
  for (std::uint32_t i = 0; i < merges; ++i) {
    const std::uint32_t a = ~static_cast<std::uint32_t>(ranks[i]);
    into[std::size_t{2} * a] = 2 * scratch.partners[a].target + 1;
  }
  return piece.count - merges;
}

/// Writes the survivors; numbers[i] becomes the new number of entry i of the piece.
void merge_piece(const Source& source, const Piece& piece, const std::uint32_t* into, const Target& target,
                 std::uint32_t* numbers) {
  Members joined[kMaxChunk];
  float weights[kMaxChunk];
  float inverses[kMaxChunk];
  bool alone[kMaxChunk];
  for (std::uint32_t i = 0; i < piece.count; ++i) {
    joined[i] = source.member(piece.begin + i);
    weights[i] = static_cast<float>(joined[i].count);
    alone[i] = true;
  }
  for (std::uint32_t i = 0; i < piece.count; ++i) {
    if (into[i] == i) continue;
    Members& all = joined[into[i]];
    all.count += joined[i].count;
    all.first = std::min(all.first, joined[i].first);
    all.last = std::max(all.last, joined[i].last);
    alone[into[i]] = false;
  }
  std::uint32_t next = piece.to;
  for (std::uint32_t i = 0; i < piece.count; ++i) {
    if (into[i] != i) continue;
    if (alone[i]) weights[i] = 1;
    inverses[i] = alone[i] ? 1.0F : 1.0F / static_cast<float>(joined[i].count);
    target.members[next] = joined[i];
    numbers[i] = next++;
  }
  for (std::uint32_t i = 0; i < piece.count; ++i) numbers[i] = numbers[into[i]];
  const auto average = [&](const Rows& rows, float* out) {
    if (rows.dim == 0) return;
    average_chunk(rows.from(piece.begin), piece.count, into, weights, inverses, out + std::size_t{piece.to} * rows.dim);
  };
  average(source.keys, target.keys);
  average(source.values, target.values);
}

Rows float_rows(const float* rows, std::uint32_t dim) {
  return {DType::kFloat32, reinterpret_cast<const std::byte*>(rows), dim * sizeof(float), dim};
}

Status check_rows(const HeadRows& keys, const HeadRows& values) {
  if (keys.dtype != values.dtype || keys.heads != values.heads || keys.tokens != values.tokens) {
    return {Code::kInvalid, "keys and values that are clustered must have the same dtype, heads and tokens"};
  }
  if (keys.dtype == DType::kOpaqueBytes) return {Code::kInvalid, "opaque bytes cannot be clustered"};
  if (keys.dim == 0 || keys.dim > kMaxDim || values.dim > kMaxDim) {
    return {Code::kInvalid, "clustering takes head dimensions up to " + std::to_string(kMaxDim)};
  }
  return Status::ok();
}

Rows head_rows(const HeadRows& rows, std::uint32_t head) {
  return {rows.dtype, rows.row(head, 0), rows.token_stride_bytes, rows.dim};
}

}  // namespace

Status Options::validate() const {
  if (chunk < 2 || chunk > kMaxChunk || chunk % 2 != 0) {
    return {Code::kInvalid, "clustering: a chunk must be an even number of entries, 2 to " + std::to_string(kMaxChunk)};
  }
  if (merges.empty() || merges.size() > kMaxPasses) {
    return {Code::kInvalid, "clustering takes 1 to " + std::to_string(kMaxPasses) + " passes"};
  }
  if (std::ranges::any_of(merges, [&](std::uint32_t number) { return number > chunk / 2; })) {
    return {Code::kInvalid, "clustering: a pass merges at most half of a chunk"};
  }
  if (std::isnan(min_similarity)) return {Code::kInvalid, "clustering: the least similarity must be a number"};
  return Status::ok();
}

Status OnlineOptions::validate() const {
  if (Status status = clustering.validate(); !status) return status;
  if (body_entries < clustering.chunk) return {Code::kInvalid, "clustering: the body must hold at least one chunk"};
  return Status::ok();
}

std::vector<std::uint32_t> merges_for(double keep, std::uint32_t chunk) {
  if (!(keep < 1)) return {0};
  const double passes = keep > 0 ? std::ceil(std::log2(1 / keep) - 1e-6) : kMaxPasses;
  const auto count = static_cast<std::uint32_t>(std::clamp(passes, 1.0, static_cast<double>(kMaxPasses)));
  const double kept = std::max(0.5, std::pow(keep, 1.0 / count));
  return std::vector<std::uint32_t>(count, static_cast<std::uint32_t>(std::lround((1 - kept) * chunk)));
}

/// [head][token] or [head][token][dim] each, with room for every token; passes go from one half to the other.
struct Clusters::Storage {
  std::uint32_t tokens = 0;
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
  std::vector<std::uint32_t> entries;  // per head
  int current = 0;
  Buffer<float> keys[2];
  Buffer<float> values[2];
  Buffer<Members> members[2];
  Buffer<std::uint32_t> into;
  Buffer<std::uint32_t> numbers;
  Buffer<std::uint32_t> assignment;
  std::vector<Piece> pieces;

  void reserve(std::uint32_t heads, int half) {
    const std::size_t rows = std::size_t{heads} * tokens;
    keys[half].get(rows * key_dim);
    values[half].get(rows * value_dim);
    members[half].get(rows);
  }
  std::size_t row(std::uint32_t head) const { return std::size_t{head} * tokens; }
  Target target(std::uint32_t head, int half) const {
    return {keys[half].data() + row(head) * key_dim, values[half].data() + row(head) * value_dim,
            members[half].data() + row(head)};
  }
  Source source(std::uint32_t head) const {
    const Target from = target(head, current);
    return {float_rows(from.keys, key_dim), float_rows(from.values, value_dim), from.members};
  }

  /// Sinks, chunks of the body and recent entries of every head.
  void cut(const Options& options, std::uint32_t merges) {
    pieces.clear();
    for (std::uint32_t head = 0; head < entries.size(); ++head) {
      const Cut all = Cut::of(entries[head], options.sinks, options.recent, options.chunk, merges);
      for (std::uint32_t number = 0; number < all.pieces(); ++number) {
        const Span span = all.piece(number);
        pieces.push_back({head, span.begin, span.count, span.merges, span.count, 0});
      }
    }
  }

  template <typename SourceOf>
  void pass(const Options& options, std::uint32_t merges, int half, SourceOf source_of, Executor* executor) {
    // Chunks per task: what they share is the scratch memory.
    constexpr std::size_t kTaskPieces = 8;
    cut(options, merges);
    const std::size_t tasks = (pieces.size() + kTaskPieces - 1) / kTaskPieces;
    parallel_for(executor, tasks, [&](std::size_t task) {
      const auto scratch = std::make_unique_for_overwrite<MatchScratch>();
      for (std::size_t i = task * kTaskPieces; i < std::min(pieces.size(), (task + 1) * kTaskPieces); ++i) {
        Piece& piece = pieces[i];
        piece.survivors = match_piece(source_of(piece.head), piece, options.min_similarity, *scratch,
                                      into.data() + row(piece.head) + piece.begin);
      }
    });
    std::ranges::fill(entries, 0U);
    for (Piece& piece : pieces) {
      piece.to = entries[piece.head];
      entries[piece.head] += piece.survivors;
    }
    parallel_for(executor, tasks, [&](std::size_t task) {
      for (std::size_t i = task * kTaskPieces; i < std::min(pieces.size(), (task + 1) * kTaskPieces); ++i) {
        const Piece& piece = pieces[i];
        const std::size_t at = row(piece.head) + piece.begin;
        merge_piece(source_of(piece.head), piece, into.data() + at, target(piece.head, half), numbers.data() + at);
      }
    });
  }
};

Clusters::Clusters() : storage_(std::make_unique<Storage>()) {}
Clusters::~Clusters() = default;
Clusters::Clusters(Clusters&&) noexcept = default;
Clusters& Clusters::operator=(Clusters&&) noexcept = default;

std::uint32_t Clusters::heads() const { return static_cast<std::uint32_t>(storage_->entries.size()); }

HeadClusters Clusters::head(std::uint32_t head) const {
  const Target rows = storage_->target(head, storage_->current);
  const std::size_t entries = storage_->entries[head];
  return {static_cast<std::uint32_t>(entries),
          {rows.keys, entries * storage_->key_dim},
          {rows.values, entries * storage_->value_dim},
          {rows.members, entries},
          {storage_->assignment.data() + storage_->row(head), storage_->tokens}};
}

Status compress(const HeadRows& keys, const HeadRows& values, const Options& options, Clusters& out,
                Executor* executor) {
  if (Status status = options.validate(); !status) return status;
  if (Status status = check_rows(keys, values); !status) return status;
  Clusters::Storage& storage = *out.storage_;
  storage.tokens = keys.tokens;
  storage.key_dim = keys.dim;
  storage.value_dim = values.dim;
  storage.entries.assign(keys.heads, keys.tokens);
  storage.current = 0;
  const std::size_t rows = std::size_t{keys.heads} * keys.tokens;
  storage.into.get(rows);
  storage.numbers.get(rows);
  storage.assignment.get(rows);
  storage.reserve(keys.heads, 0);
  storage.pass(
      options, options.merges[0], 0,
      [&](std::uint32_t head) {
        return Source{head_rows(keys, head), head_rows(values, head), nullptr};
      },
      executor);
  std::copy_n(storage.numbers.data(), rows, storage.assignment.data());
  for (std::size_t pass = 1; pass < options.merges.size(); ++pass) {
    const int half = 1 - storage.current;
    storage.reserve(keys.heads, half);
    storage.pass(
        options, options.merges[pass], half, [&](std::uint32_t head) { return storage.source(head); }, executor);
    storage.current = half;
    for (std::uint32_t head = 0; head < keys.heads; ++head) {
      std::uint32_t* assigned = storage.assignment.data() + storage.row(head);
      const std::uint32_t* numbers = storage.numbers.data() + storage.row(head);
      for (std::uint32_t token = 0; token < keys.tokens; ++token) assigned[token] = numbers[assigned[token]];
    }
  }
  return Status::ok();
}

void restore_rows(std::span<const float> entry_rows, std::uint32_t dim, std::span<const std::uint32_t> assignment,
                  DType dtype, std::byte* out) {
  gather_rows(entry_rows.data(), dim, assignment.data(), assignment.size(), dtype, out);
}

/// One head: sinks | body | recent.
struct OnlineClusters::State {
  struct Head {
    std::vector<float> keys;
    std::vector<float> values;
    std::vector<Members> members;
    std::uint32_t body_end = 0;  ///< entries before it are sinks and body
    std::uint32_t oldest = 0;    ///< where the next entries to be clustered again begin
  };

  OnlineOptions options;
  std::uint32_t key_dim;
  std::uint32_t value_dim;
  std::uint32_t tokens = 0;
  std::vector<Head> heads;

  std::uint32_t sinks() const { return options.clustering.sinks; }

  /// One pass over entries [begin, begin + count); the entries behind them move up. Returns how many survive.
  std::uint32_t cluster(Head& head, std::uint32_t begin, std::uint32_t count, std::uint32_t merges_per_chunk) const {
    const Options& clustering = options.clustering;
    const Source source{float_rows(head.keys.data(), key_dim), float_rows(head.values.data(), value_dim),
                        head.members.data()};
    Piece piece{0, begin, count, Cut::merges_of(count, merges_per_chunk, clustering.chunk), count, 0};
    if (piece.merges == 0) return count;
    std::uint32_t into[kMaxChunk];
    std::uint32_t numbers[kMaxChunk];
    const auto scratch = std::make_unique_for_overwrite<MatchScratch>();
    const std::uint32_t survivors = match_piece(source, piece, clustering.min_similarity, *scratch, into);
    std::vector<float> keys(std::size_t{survivors} * key_dim);
    std::vector<float> values(std::size_t{survivors} * value_dim);
    std::vector<Members> members(survivors);
    merge_piece(source, piece, into, {keys.data(), values.data(), members.data()}, numbers);
    replace(head.keys, keys, begin, count, key_dim);
    replace(head.values, values, begin, count, value_dim);
    replace(head.members, members, begin, count, 1);
    return survivors;
  }

  template <typename T>
  static void replace(std::vector<T>& all, const std::vector<T>& with, std::size_t begin, std::size_t count,
                      std::size_t width) {
    const auto at = all.begin() + static_cast<std::ptrdiff_t>(begin * width);
    std::ranges::copy(with, at);
    all.erase(at + static_cast<std::ptrdiff_t>(with.size()), at + static_cast<std::ptrdiff_t>(count * width));
  }

  void append(const Rows& keys, const Rows& values, std::uint32_t count, Head& head) const {
    // A piece of rows that nobody joins is a copy.
    for (std::uint32_t begin = 0; begin < count;) {
      const std::uint32_t size = std::min(count - begin, kMaxChunk);
      const std::size_t entries = head.members.size();
      head.keys.resize((entries + size) * key_dim);
      head.values.resize((entries + size) * value_dim);
      std::uint32_t into[kMaxChunk];
      float ones[kMaxChunk];
      for (std::uint32_t i = 0; i < size; ++i) {
        into[i] = i;
        ones[i] = 1;
        const std::uint32_t token = tokens + begin + i;
        head.members.push_back({1, token, token, token});
      }
      average_chunk(keys.from(begin), size, into, ones, ones, head.keys.data() + entries * key_dim);
      if (value_dim > 0) {
        average_chunk(values.from(begin), size, into, ones, ones, head.values.data() + entries * value_dim);
      }
      begin += size;
    }
  }

  void settle(Head& head) const {
    const Options& clustering = options.clustering;
    const std::uint32_t chunk = clustering.chunk;
    while (head.members.size() >= std::size_t{std::max(head.body_end, sinks())} + clustering.recent + chunk) {
      if (head.body_end == 0) head.body_end = head.oldest = sinks();
      std::uint32_t count = chunk;
      for (const std::uint32_t merges : clustering.merges) count = cluster(head, head.body_end, count, merges);
      head.body_end += count;
      // Where nothing may be merged the body grows beyond its budget: each of its chunks is tried once.
      const std::uint32_t tries = (head.body_end - sinks()) / chunk + 1;
      for (std::uint32_t i = 0; i < tries && head.body_end - sinks() > options.body_entries; ++i) {
        if (head.oldest + chunk > head.body_end) head.oldest = sinks();
        const std::uint32_t survivors = cluster(head, head.oldest, chunk, clustering.merges[0]);
        head.body_end -= chunk - survivors;
        head.oldest += survivors;
      }
    }
  }
};

OnlineClusters::OnlineClusters(OnlineOptions options, std::uint32_t heads, std::uint32_t key_dim,
                               std::uint32_t value_dim)
    : state_(
          std::make_unique<State>(State{std::move(options), key_dim, value_dim, 0, std::vector<State::Head>(heads)})) {}
OnlineClusters::~OnlineClusters() = default;

Status OnlineClusters::append(const HeadRows& keys, const HeadRows& values, Executor* executor) {
  if (Status status = check_rows(keys, values); !status) return status;
  if (keys.heads != state_->heads.size() || keys.dim != state_->key_dim || values.dim != state_->value_dim) {
    return {Code::kInvalid, "tokens of another shape than the clusters"};
  }
  parallel_for(executor, keys.heads, [&](std::size_t index) {
    const auto head = static_cast<std::uint32_t>(index);
    state_->append(head_rows(keys, head), head_rows(values, head), keys.tokens, state_->heads[index]);
    state_->settle(state_->heads[index]);
  });
  state_->tokens += keys.tokens;
  return Status::ok();
}

std::uint32_t OnlineClusters::tokens() const { return state_->tokens; }

std::uint32_t OnlineClusters::recent_tokens() const {
  if (state_->heads.empty()) return 0;
  const State::Head& head = state_->heads[0];
  return static_cast<std::uint32_t>(head.members.size()) - head.body_end;
}

HeadClusters OnlineClusters::head(std::uint32_t head) const {
  const State::Head& entries = state_->heads[head];
  return {static_cast<std::uint32_t>(entries.members.size()), entries.keys, entries.values, entries.members, {}};
}

}  // namespace kvern::cluster
