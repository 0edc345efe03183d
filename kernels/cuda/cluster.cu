#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "kernels/cluster_arithmetic.h"
#include "kernels/cuda/cluster.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/packs.cuh"
#include "kernels/merge_arithmetic.h"

namespace kvern::cluster {
namespace {

using cuda::kEveryLane;
using cuda::kWarp;
using cuda::launched;
using cuda::with_element;

constexpr unsigned kMaxSources = kMaxChunk / 2;
/// Of a set of a chunk's entries or sources, a bit each.
constexpr unsigned kEntryWords = kMaxChunk / kWarp;
constexpr unsigned kSourceWords = kMaxSources / kWarp;
/// Blocks of the largest chunks that a multiprocessor has registers for when rows are averaged.
constexpr unsigned kResidentBlocks = 4;
constexpr unsigned kPlaceThreads = kWarp * kWarp;
constexpr unsigned kAssignThreads = 256;

/// A thread compares so many sources with as many targets at a time, which keeps its units busy although each product
/// waits for the one before it. The lanes of a warp lie in rows of sources and columns of targets.
constexpr unsigned kTile = 4;
constexpr unsigned kColumns = 8;
constexpr unsigned kRows = kWarp / kColumns;
constexpr unsigned kWarpSources = kRows * kTile;
constexpr unsigned kWarpTargets = kColumns * kTile;
// A thread per entry makes warps enough for the sources.
static_assert(2 * kWarpSources == kWarp);

/// What a thread copies and loads at a time.
template <class E>
constexpr std::uint32_t kUnitElements = 16 / sizeof(typename E::Raw);
template <class E>
using Unit = cuda::Words<E, kUnitElements<E>>;

/// Entries as a pass finds them: rows of tokens, or those that the pass before has left.
struct Source {
  HeadRows keys;
  HeadRows values;
  const Members* members;        ///< [head][token]; null: entry i is token i
  const std::uint32_t* entries;  ///< [head]; null: one per token

  __device__ std::uint32_t count(std::uint32_t head) const { return entries != nullptr ? entries[head] : keys.tokens; }
  __device__ Members member(std::uint32_t head, std::uint32_t entry) const {
    if (members == nullptr) return {1, entry, entry, entry};
    return members[static_cast<std::size_t>(head) * keys.tokens + entry];
  }
};

struct Pass {
  std::uint32_t chunk;
  std::uint32_t sinks;
  std::uint32_t recent;
  std::uint32_t merges;
  float min_similarity;
  std::uint32_t pieces;      ///< room per head
  std::uint32_t* into;       ///< [head][token], within the piece
  std::uint32_t* survivors;  ///< [head][piece], afterwards the number of the piece's first survivor
  std::uint32_t* numbers;    ///< [head][token]

  __device__ Cut cut(std::uint32_t entries) const { return Cut::of(entries, sinks, recent, chunk, merges); }
};

/// Of a row of elements.
template <class E>
KVERN_HOST_DEVICE constexpr std::uint32_t units_of(std::uint32_t dim) {
  return (dim + kUnitElements<E> - 1) / kUnitElements<E>;
}

/// The keys of a piece in shared memory, the sources and then the targets. Zeros fill the last unit of a key: they add
/// nothing to its products.
template <class E>
struct SharedKeys {
  Unit<E>* data;
  std::uint32_t stride;  ///< units from one key to the next
  std::uint32_t units;   ///< of a key
  std::uint32_t sources;
  std::uint32_t targets;

  __device__ Unit<E>* source(std::uint32_t number) const { return data + number * stride; }
  __device__ Unit<E>* target(std::uint32_t number) const { return source(sources + number); }
  __device__ Unit<E>* entry(std::uint32_t number) const {
    return number % 2 == 0 ? source(number / 2) : target(number / 2);
  }
};

/// Copies 16 bytes to shared memory; both aligned to 16.
__device__ void start_copy(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Calls visit(row, column) for all places of a matrix, shared out among the threads of the block.
template <typename Visit>
__device__ void for_each_place(std::uint32_t rows, std::uint32_t columns, Visit visit) {
  const std::uint32_t row_step = blockDim.x / columns;
  const std::uint32_t column_step = blockDim.x % columns;
  std::uint32_t row = threadIdx.x / columns;
  std::uint32_t column = threadIdx.x % columns;
  while (row < rows) {
    visit(row, column);
    row += row_step;
    column += column_step;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
}

/// whole: the rows are aligned to units and consist of them.
template <class E>
__device__ void load_keys(const HeadRows& rows, std::uint32_t head, const Span& piece, bool whole,
                          const SharedKeys<E>& keys) {
  if (whole) {
    for_each_place(piece.count, keys.units, [&](std::uint32_t entry, std::uint32_t unit) {
      start_copy(keys.entry(entry) + unit, rows.row(head, piece.begin + entry) + unit * sizeof(Unit<E>));
    });
    wait_for_copies();
  } else {
    using Raw = typename E::Raw;
    for_each_place(piece.count, keys.units * kUnitElements<E>, [&](std::uint32_t entry, std::uint32_t column) {
      const auto* from = reinterpret_cast<const Raw*>(rows.row(head, piece.begin + entry));
      reinterpret_cast<Raw*>(keys.entry(entry))[column] = column < rows.dim ? from[column] : Raw{0};
    });
  }
  __syncthreads();
}

/// 1 / length, or NaN for what must not be merged.
template <class E>
__device__ float inverse_length(const Unit<E>* key, std::uint32_t units) {
  float squares = 0;
  for (std::uint32_t i = 0; i < units; ++i) {
    const Unit<E> unit = key[i];
    for (const std::uint32_t word : unit.words) {
      float values[cuda::kWordElements<E>];
      cuda::to_floats<E>(word, values);
      for (const float value : values) squares = squares + value * value;
    }
  }
  return merge::usable(squares) ? 1.0F / sqrtf(squares) : NAN;
}

/// Products of 16-bit elements are exact, so that it does not matter where they are added fused.
template <class E>
__device__ float add_product(float sum, float a, float b) {
  return sizeof(typename E::Raw) == 2 ? __fmaf_rn(a, b, sum) : sum + a * b;
}

/// sums[i][j] = sources[i] * targets[j], one column after the other.
template <class E>
__device__ void multiply(const Unit<E>* const (&sources)[kTile], const Unit<E>* const (&targets)[kTile],
                         std::uint32_t units, float (&sums)[kTile][kTile]) {
  for (auto& row : sums) {
    for (float& sum : row) sum = 0;
  }
#pragma unroll 1
  for (std::uint32_t unit = 0; unit < units; ++unit) {
    Unit<E> from[kTile];
    Unit<E> to[kTile];
    for (unsigned i = 0; i < kTile; ++i) from[i] = sources[i][unit];
    for (unsigned j = 0; j < kTile; ++j) to[j] = targets[j][unit];
#pragma unroll
    for (unsigned word = 0; word < Unit<E>::kWords; ++word) {
      float a[kTile][cuda::kWordElements<E>];
      float b[kTile][cuda::kWordElements<E>];
      for (unsigned i = 0; i < kTile; ++i) cuda::to_floats<E>(from[i].words[word], a[i]);
      for (unsigned j = 0; j < kTile; ++j) cuda::to_floats<E>(to[j].words[word], b[j]);
      for (unsigned element = 0; element < cuda::kWordElements<E>; ++element) {
        for (unsigned i = 0; i < kTile; ++i) {
          for (unsigned j = 0; j < kTile; ++j) sums[i][j] = add_product<E>(sums[i][j], a[i][element], b[j][element]);
        }
      }
    }
  }
}

/// The most similar target of a source: similarity * |source| and its number. Of equal ones the lowest.
struct Best {
  float similarity = -INFINITY;
  std::uint32_t target = 0;

  __device__ void update(float other, std::uint32_t number) {
    if (other > similarity || (other == similarity && number < target)) *this = {other, number};
  }
};

/// The best target of each of kWarpSources sources from the first one on, by a warp: best[i] of source
/// first + i * kRows + lane / kColumns. Where there are no more sources or targets the last ones are taken again.
template <class E>
__device__ void match(const SharedKeys<E>& keys, const float* target_inverses, std::uint32_t first,
                      Best (&best)[kTile]) {
  const unsigned row = threadIdx.x % kWarp / kColumns;
  const unsigned column = threadIdx.x % kColumns;
  const Unit<E>* sources[kTile];
  for (unsigned i = 0; i < kTile; ++i) sources[i] = keys.source(min(first + i * kRows + row, keys.sources - 1));
#pragma unroll 1
  for (std::uint32_t begin = 0; begin < keys.targets; begin += kWarpTargets) {
    const auto number = [&](unsigned j) { return min(begin + j * kColumns + column, keys.targets - 1); };
    const Unit<E>* targets[kTile];
    for (unsigned j = 0; j < kTile; ++j) targets[j] = keys.target(number(j));
    float sums[kTile][kTile];
    multiply<E>(sources, targets, keys.units, sums);
    for (unsigned j = 0; j < kTile; ++j) {
      const float inverse = target_inverses[number(j)];
      for (unsigned i = 0; i < kTile; ++i) best[i].update(sums[i][j] * inverse, number(j));
    }
  }
  for (Best& of_source : best) {
    for (unsigned offset = kColumns / 2; offset > 0; offset /= 2) {
      const float similarity = __shfl_xor_sync(kEveryLane, of_source.similarity, offset);
      const std::uint32_t target = __shfl_xor_sync(kEveryLane, of_source.target, offset);
      of_source.update(similarity, target);
    }
  }
}

/// A block per piece and head, a thread per entry: which entries of the piece go where.
template <class E>
__global__ void __launch_bounds__(kMaxChunk)
    match_kernel(Source source, Pass pass, std::uint32_t shared_stride, bool whole_units) {
  extern __shared__ uint4 shared[];
  __shared__ float inverses[kMaxChunk];  ///< of the sources and then the targets
  __shared__ std::uint64_t ranks[kMaxSources];
  __shared__ std::uint32_t partners[kMaxSources];
  const std::uint32_t head = blockIdx.y;
  const Cut cut = pass.cut(source.count(head));
  if (blockIdx.x >= cut.pieces()) return;
  const Span piece = cut.piece(blockIdx.x);
  std::uint32_t* into = pass.into + static_cast<std::size_t>(head) * source.keys.tokens + piece.begin;
  std::uint32_t* survivors = pass.survivors + static_cast<std::size_t>(head) * pass.pieces + blockIdx.x;
  if (piece.merges == 0) {
    if (threadIdx.x < piece.count) into[threadIdx.x] = threadIdx.x;
    if (threadIdx.x == 0) *survivors = piece.count;
    return;
  }
  const std::uint32_t sources = (piece.count + 1) / 2;
  const std::uint32_t targets = piece.count / 2;
  const SharedKeys<E> keys{reinterpret_cast<Unit<E>*>(shared), shared_stride, units_of<E>(source.keys.dim), sources,
                           targets};
  load_keys<E>(source.keys, head, piece, whole_units, keys);
  if (threadIdx.x < piece.count) inverses[threadIdx.x] = inverse_length<E>(keys.source(threadIdx.x), keys.units);
  __syncthreads();

  const std::uint32_t first = threadIdx.x / kWarp * kWarpSources;
  if (first < sources) {
    Best best[kTile];
    match<E>(keys, inverses + sources, first, best);
    for (unsigned i = 0; i < kTile; ++i) {
      const std::uint32_t a = first + i * kRows + threadIdx.x % kWarp / kColumns;
      if (threadIdx.x % kColumns != 0 || a >= sources) continue;
      const float similarity = best[i].similarity * inverses[a];
      const bool none = !(similarity > -INFINITY) || similarity < pass.min_similarity;
      partners[a] = best[i].target;
      ranks[a] = none ? 0 : rank(similarity, a);
    }
  }
  __syncthreads();
  const std::uint32_t a = threadIdx.x;
  bool merges = a < sources && ranks[a] != 0;
  if (merges) {
    std::uint32_t before = 0;
    for (std::uint32_t other = 0; other < sources; ++other) before += ranks[other] > ranks[a] ? 1 : 0;
    merges = before < piece.merges;
  }
  if (a < sources) into[2 * a] = merges ? 2 * partners[a] + 1 : 2 * a;
  if (a < targets) into[2 * a + 1] = 2 * a + 1;
  const auto merged = static_cast<std::uint32_t>(__syncthreads_count(merges ? 1 : 0));
  if (threadIdx.x == 0) *survivors = piece.count - merged;
}

/// A block per head: where the survivors of each piece begin, and how many there are in all.
__global__ void __launch_bounds__(kPlaceThreads) place_kernel(Source source, Pass pass, std::uint32_t* entries) {
  __shared__ std::uint32_t of_warp[kWarp];
  const std::uint32_t head = blockIdx.x;
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  const std::uint32_t pieces = pass.cut(source.count(head)).pieces();
  std::uint32_t* survivors = pass.survivors + static_cast<std::size_t>(head) * pass.pieces;
  std::uint32_t next = 0;
  for (std::uint32_t first = 0; first < pieces; first += kPlaceThreads) {
    const std::uint32_t piece = first + threadIdx.x;
    const std::uint32_t count = piece < pieces ? survivors[piece] : 0;
    std::uint32_t sum = count;
    for (unsigned offset = 1; offset < kWarp; offset *= 2) {
      const std::uint32_t before = __shfl_up_sync(kEveryLane, sum, offset);
      if (lane >= offset) sum += before;
    }
    if (lane == kWarp - 1) of_warp[warp] = sum;
    __syncthreads();
    const std::uint32_t earlier = cuda::sum_of_warp(lane < warp ? of_warp[lane] : 0U);
    const std::uint32_t all = cuda::sum_of_warp(of_warp[lane]);
    __syncthreads();
    if (piece < pieces) survivors[piece] = next + earlier + sum - count;
    next += all;
  }
  if (threadIdx.x == 0) entries[head] = next;
}

/// The survivors of a piece, in order, in shared memory.
struct Survivors {
  std::uint32_t entries[kMaxChunk];                 ///< which entry of the piece each is
  float inverses[kMaxChunk];                        ///< of each: 1 / tokens of its members; 1: nobody joins it
  float weights[kMaxChunk];                         ///< tokens of each entry of the piece
  std::uint32_t joined[kMaxSources][kSourceWords];  ///< the sources that join a target, a bit each
  std::uint32_t surviving[kEntryWords];             ///< the entries that survive, a bit each

  /// How many survivors come before an entry of the piece.
  __device__ std::uint32_t before(std::uint32_t entry) const {
    int count = __popc(surviving[entry / kWarp] & ((1U << entry % kWarp) - 1));
#pragma unroll 1
    for (std::uint32_t word = 0; word < entry / kWarp; ++word) count += __popc(surviving[word]);
    return static_cast<std::uint32_t>(count);
  }

  /// Calls visit(entry) for the entries that join one, in order: sources that join a target.
  template <typename Visit>
  __device__ void for_each_joined(std::uint32_t entry, Visit visit) const {
    if (entry % 2 == 0) return;
#pragma unroll 1
    for (std::uint32_t word = 0; word < kSourceWords; ++word) {
#pragma unroll 1
      for (std::uint32_t left = joined[entry / 2][word]; left != 0; left &= left - 1) {
        visit(2 * (word * kWarp + static_cast<std::uint32_t>(__ffs(static_cast<int>(left))) - 1));
      }
    }
  }
};

/// Finds the survivors of a piece, the first of which has the number `begin`; writes what each stands for and the
/// numbers of all entries. Returns how many there are. All threads of the block call it, one per entry.
__device__ std::uint32_t find_survivors(const Source& source, const Pass& pass, std::uint32_t head, const Span& piece,
                                        std::uint32_t begin, Members* out, Survivors& survivors) {
  const std::size_t first = static_cast<std::size_t>(head) * source.keys.tokens;
  const std::uint32_t entry = threadIdx.x;
  const bool inside = entry < piece.count;
  std::uint32_t into = 0;
  Members members;
  if (inside) {
    into = pass.into[first + piece.begin + entry];
    members = source.member(head, piece.begin + entry);
    survivors.weights[entry] = static_cast<float>(members.count);
  }
  const bool survives = inside && into == entry;
  const unsigned surviving = __ballot_sync(kEveryLane, survives ? 1 : 0);
  if (entry % kWarp == 0) survivors.surviving[entry / kWarp] = surviving;
  if (entry < kMaxSources) {
    for (std::uint32_t& word : survivors.joined[entry]) word = 0;
  }
  __syncthreads();
  if (inside) pass.numbers[first + piece.begin + entry] = begin + survivors.before(into);
  if (inside && !survives) {
    const std::uint32_t number = entry / 2;
    atomicOr(&survivors.joined[into / 2][number / kWarp], 1U << number % kWarp);
  }
  __syncthreads();
  if (survives) {
    const std::uint32_t own = members.count;
    survivors.for_each_joined(entry, [&](std::uint32_t other) {
      const Members joined = source.member(head, piece.begin + other);
      members.count += joined.count;
      members.first = min(members.first, joined.first);
      members.last = max(members.last, joined.last);
    });
    const std::uint32_t number = survivors.before(entry);
    survivors.entries[number] = entry;
    survivors.inverses[number] = members.count == own ? 1.0F : 1.0F / static_cast<float>(members.count);
    out[first + begin + number] = members;
  }
  return static_cast<std::uint32_t>(__syncthreads_count(survives ? 1 : 0));
}

/// Elements that a lane loads or stores at a time.
template <class E, unsigned kEach>
struct alignas(kEach * sizeof(typename E::Raw)) Neighbours {
  typename E::Raw values[kEach];
};

/// Neighbouring columns of the keys or the values that a lane averages.
struct Columns {
  const std::byte* from;  ///< of the piece's first entry; null: there are no such columns
  std::size_t stride_bytes;
  float* to;  ///< of the piece's first survivor
  std::uint32_t dim;

  template <class E, unsigned kEach>
  __device__ Neighbours<E, kEach> load(std::uint32_t entry) const {
    if (from == nullptr) return {};
    return *reinterpret_cast<const Neighbours<E, kEach>*>(from + entry * stride_bytes);
  }
};

/// The columns from `column` on of a piece's rows, which begin with the head's entry `begin`. out: where the mean of
/// its first survivor goes.
template <class E>
__device__ Columns columns_of(const HeadRows& rows, std::uint32_t head, std::uint32_t begin, std::uint32_t column,
                              float* out) {
  if (column >= rows.dim) return {};
  return {rows.row(head, begin) + column * sizeof(typename E::Raw), rows.token_stride_bytes, out + column, rows.dim};
}

/// Parts of the rows that a lane has under way at a time: mostly one of a key and one of a value.
constexpr unsigned kParts = 2;

/// The mean of a survivor's members, in the order of the entries.
template <class E, unsigned kEach>
__device__ void average(const Columns (&parts)[kParts], const Survivors& survivors, std::uint32_t survivor) {
  const std::uint32_t entry = survivors.entries[survivor];
  const float inverse = survivors.inverses[survivor];
  float sums[kParts][kEach];
  // Calls use(sum, value) for what an entry has in the lane's columns.
  const auto for_each_value = [&](std::uint32_t of_entry, auto use) {
    Neighbours<E, kEach> loaded[kParts];
    for (unsigned part = 0; part < kParts; ++part) loaded[part] = parts[part].load<E, kEach>(of_entry);
    for (unsigned part = 0; part < kParts; ++part) {
      for (unsigned i = 0; i < kEach; ++i) use(sums[part][i], E::to_float(loaded[part].values[i]));
    }
  };
  for_each_value(entry, [](float& sum, float value) { sum = value; });
  if (inverse != 1.0F) {
    for (auto& part : sums) {
      for (float& sum : part) sum = sum * survivors.weights[entry];
    }
    survivors.for_each_joined(entry, [&](std::uint32_t other) {
      const float weight = survivors.weights[other];
      for_each_value(other, [&](float& sum, float value) { sum = sum + value * weight; });
    });
    for (auto& part : sums) {
      for (float& sum : part) sum = sum * inverse;
    }
  }
  for (unsigned part = 0; part < kParts; ++part) {
    if (parts[part].from == nullptr) continue;
    using Floats = Neighbours<cuda::Float32, kEach>;
    Floats mean;
    for (unsigned i = 0; i < kEach; ++i) mean.values[i] = __float_as_uint(sums[part][i]);
    *reinterpret_cast<Floats*>(parts[part].to + static_cast<std::size_t>(survivor) * parts[part].dim) = mean;
  }
}

/// A block per piece and head, a thread per entry and then a warp per survivor. Keys, values and what is written are
/// aligned to kEach elements, their dimensions multiples of it.
template <class E, unsigned kEach>
__global__ void __launch_bounds__(kMaxChunk, kResidentBlocks)
    merge_kernel(Source source, Pass pass, DeviceClusters out) {
  __shared__ Survivors survivors;
  const std::uint32_t head = blockIdx.y;
  const Cut cut = pass.cut(source.count(head));
  if (blockIdx.x >= cut.pieces()) return;
  const Span piece = cut.piece(blockIdx.x);
  const std::uint32_t begin = pass.survivors[static_cast<std::size_t>(head) * pass.pieces + blockIdx.x];
  const std::uint32_t count = find_survivors(source, pass, head, piece, begin, out.members, survivors);
  const std::size_t to = static_cast<std::size_t>(head) * source.keys.tokens + begin;
  // A value's columns follow those of the key.
  const auto columns = [&](std::uint32_t at) {
    const HeadRows& keys = source.keys;
    const HeadRows& values = source.values;
    return at < keys.dim ? columns_of<E>(keys, head, piece.begin, at, out.keys + to * keys.dim)
                         : columns_of<E>(values, head, piece.begin, at - keys.dim, out.values + to * values.dim);
  };
  constexpr unsigned kStep = kWarp * kEach;
  const std::uint32_t all = source.keys.dim + source.values.dim;
  for (std::uint32_t at = threadIdx.x % kWarp * kEach; at < all; at += kParts * kStep) {
    const Columns parts[kParts] = {columns(at), columns(at + kStep)};
    for (std::uint32_t i = threadIdx.x / kWarp; i < count; i += blockDim.x / kWarp) {
      average<E, kEach>(parts, survivors, i);
    }
  }
}

/// The entries of the tokens after a pass that is not the first one.
__global__ void assign_kernel(const std::uint32_t* numbers, std::uint32_t tokens, std::uint32_t* assignment) {
  const std::uint32_t token = blockIdx.x * kAssignThreads + threadIdx.x;
  if (token >= tokens) return;
  const std::size_t row = static_cast<std::size_t>(blockIdx.y) * tokens;
  assignment[row + token] = numbers[row + assignment[row + token]];
}

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

/// What lies in the workspace, in order.
struct Workspace {
  std::size_t rows;
  std::uint32_t pieces;

  Workspace(const HeadRows& keys, const Options& options)
      : rows(static_cast<std::size_t>(keys.heads) * keys.tokens), pieces(keys.tokens / options.chunk + 3) {}

  template <typename T>
  T* take(std::byte*& at, std::size_t count) const {
    T* taken = reinterpret_cast<T*>(at);
    at += aligned(count * sizeof(T));
    return taken;
  }
};

HeadRows float_rows(const HeadRows& like, const float* data) {
  return HeadRows::contiguous(reinterpret_cast<const std::byte*>(data), DType::kFloat32, like.heads, like.tokens,
                              like.dim);
}

/// Whether the rows begin at multiples of so many bytes and are multiples long.
bool in_units_of(std::size_t bytes, const HeadRows& rows) {
  const std::size_t row_bytes = rows.dim * dtype_bytes(rows.dtype);
  return (reinterpret_cast<std::uintptr_t>(rows.data) | rows.head_stride_bytes | rows.token_stride_bytes | row_bytes) %
             bytes ==
         0;
}
bool in_units_of(std::size_t bytes, const float* data) { return reinterpret_cast<std::uintptr_t>(data) % bytes == 0; }

/// Units from one key to the next in shared memory: an odd number, so that eight keys lie in different banks, unless
/// the chunk fits only without.
template <class E>
std::uint32_t shared_stride_of(std::uint32_t chunk, std::uint32_t dim) {
  const std::uint32_t units = units_of<E>(dim);
  const std::uint32_t odd = units | 1U;
  return std::size_t{chunk} * odd * sizeof(Unit<E>) <= kMaxChunkElements * sizeof(float) ? odd : units;
}

template <class E>
cudaError_t launch_pass(const Source& source, const Pass& pass, const DeviceClusters& out, cudaStream_t stream) {
  const std::uint32_t stride = shared_stride_of<E>(pass.chunk, source.keys.dim);
  const std::size_t shared = std::size_t{pass.chunk} * stride * sizeof(Unit<E>);
  const cudaError_t error =
      cudaFuncSetAttribute(match_kernel<E>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  const dim3 grid(pass.pieces, source.keys.heads);
  const unsigned threads = (pass.chunk + kWarp - 1) / kWarp * kWarp;
  match_kernel<E><<<grid, threads, shared, stream>>>(source, pass, stride, in_units_of(sizeof(Unit<E>), source.keys));
  place_kernel<<<source.keys.heads, kPlaceThreads, 0, stream>>>(source, pass, out.entries);
  constexpr unsigned kEach = 4;
  constexpr std::size_t kBytes = kEach * sizeof(typename E::Raw);
  const bool wide = in_units_of(kBytes, source.keys) && in_units_of(kBytes, source.values) &&
                    in_units_of(kEach * sizeof(float), out.keys) && in_units_of(kEach * sizeof(float), out.values);
  if (wide) {
    merge_kernel<E, kEach><<<grid, threads, 0, stream>>>(source, pass, out);
  } else {
    merge_kernel<E, 1><<<grid, threads, 0, stream>>>(source, pass, out);
  }
  return cudaSuccess;
}

}  // namespace

std::size_t cuda_compress_workspace_bytes(const HeadRows& keys, const HeadRows& values, const Options& options) {
  const Workspace workspace(keys, options);
  const std::size_t rows = workspace.rows;
  return 2 * aligned(rows * sizeof(std::uint32_t)) +
         aligned(static_cast<std::size_t>(workspace.pieces) * keys.heads * sizeof(std::uint32_t)) +
         2 * aligned(keys.heads * sizeof(std::uint32_t)) + aligned(rows * keys.dim * sizeof(float)) +
         aligned(rows * values.dim * sizeof(float)) + aligned(rows * sizeof(Members));
}

Status cuda_compress(const HeadRows& keys, const HeadRows& values, const Options& options, const DeviceClusters& out,
                     std::byte* workspace, CUstream_st* stream) {
  if (Status status = options.validate(); !status) return status;
  if (keys.dtype != values.dtype || keys.heads != values.heads || keys.tokens != values.tokens) {
    return {Code::kInvalid, "keys and values that are clustered must have the same dtype, heads and tokens"};
  }
  if (keys.dtype == DType::kOpaqueBytes || keys.dim == 0 || keys.dim > kMaxDim || values.dim > kMaxDim ||
      keys.heads > 65535) {
    return {Code::kInvalid, "clustering takes numbers, head dimensions up to 256 and 65535 heads at most"};
  }
  if (static_cast<std::size_t>(options.chunk) * (keys.dim + 1) > kMaxChunkElements) {
    return {Code::kRefused, "the keys of a chunk do not fit the shared memory; use a smaller chunk"};
  }
  if (keys.heads == 0 || keys.tokens == 0) return Status::ok();

  const Workspace sizes(keys, options);
  std::byte* at = workspace;
  Pass pass{options.chunk, options.sinks, options.recent, 0,      options.min_similarity,
            sizes.pieces,  nullptr,       nullptr,        nullptr};
  pass.into = sizes.take<std::uint32_t>(at, sizes.rows);
  auto* const numbers = sizes.take<std::uint32_t>(at, sizes.rows);
  pass.survivors = sizes.take<std::uint32_t>(at, static_cast<std::size_t>(sizes.pieces) * keys.heads);
  std::uint32_t* counts[2] = {sizes.take<std::uint32_t>(at, keys.heads), sizes.take<std::uint32_t>(at, keys.heads)};
  DeviceClusters other = out;
  other.keys = sizes.take<float>(at, sizes.rows * keys.dim);
  other.values = sizes.take<float>(at, sizes.rows * values.dim);
  other.members = sizes.take<Members>(at, sizes.rows);

  // Passes take turns with the two places, so that the last one writes to out.
  Source source{keys, values, nullptr, nullptr};
  for (std::size_t i = 0; i < options.merges.size(); ++i) {
    const bool last = (options.merges.size() - 1 - i) % 2 == 0;
    DeviceClusters to = last ? out : other;
    // A pass reads how many entries there are while it counts those that will be.
    to.entries = i + 1 == options.merges.size() ? out.entries : counts[i % 2];
    pass.merges = options.merges[i];
    pass.numbers = i == 0 ? out.assignment : numbers;  // the first pass's entries are the tokens
    cudaError_t error = cudaSuccess;
    with_element(source.keys.dtype, [&](auto element) {
      using E = decltype(element);
      error = launch_pass<E>(source, pass, to, stream);
    });
    if (error != cudaSuccess) return {Code::kInternal, std::string("cluster kernel: ") + cudaGetErrorString(error)};
    if (i > 0) {
      const dim3 grid((keys.tokens + kAssignThreads - 1) / kAssignThreads, keys.heads);
      assign_kernel<<<grid, kAssignThreads, 0, stream>>>(pass.numbers, keys.tokens, out.assignment);
    }
    if (Status status = launched("cluster"); !status) return status;
    source = {float_rows(keys, to.keys), float_rows(values, to.values), to.members, to.entries};
  }
  return Status::ok();
}

}  // namespace kvern::cluster
