#pragma once

#include "kernels/cuda/observation_task.cuh"
#include "kernels/cuda/tensor_cores.cuh"

/// Observation of rows of 16-bit elements on the tensor cores.
///
/// Logits [rows][columns] = Q * K'. A warp works on a unit: rows of one query head, as many as its fragments hold, and
/// the block's warps on the units of as many query heads of a KV head as fit, so that a key is read once for them. The
/// queries stay in shared memory, the keys come through it in tiles, one on its way while the other is multiplied.
namespace kvern::evict::tensor {

using cuda::kEveryLane;
using cuda::kWarp;

constexpr unsigned kMostWarps = 8;
/// Blocks of so many warps that a multiprocessor has registers for.
constexpr unsigned kResident = 2;
constexpr std::uint32_t kTileColumns = 64;
constexpr unsigned kStages = 2;
/// Rows of a fragment of the first matrix, columns of one of the second, and what both have of the dim.
constexpr unsigned kFragmentRows = 16;
constexpr unsigned kFragmentColumns = 8;
constexpr unsigned kFragmentDim = 16;
constexpr unsigned kFragments = kTileColumns / kFragmentColumns;
/// Bytes that a thread copies at a time.
constexpr std::uint32_t kChunkBytes = 16;
constexpr std::uint32_t kChunkElements = kChunkBytes / sizeof(std::uint16_t);

/// Powers of this are 0 in float32, and its products with them too.
constexpr float kNothing = -200;

/// Rows of a unit that has kTiles fragments of them.
template <unsigned kTiles>
constexpr std::uint32_t kUnitRows = kTiles* kFragmentRows;

/// How a KV head's query heads are shared out among blocks; every warp of a block has a unit.
struct Blocks {
  std::uint32_t units;   ///< of a query head
  std::uint32_t heads;   ///< query heads of a block
  std::uint32_t groups;  ///< blocks for all query heads
  std::uint32_t warps() const { return units * heads; }
};

/// Bytes from one row to the next in shared memory: an odd number of chunks, so that eight rows lie in different banks.
__host__ __device__ inline std::uint32_t shared_stride(std::uint32_t dim) {
  return dim * static_cast<std::uint32_t>(sizeof(std::uint16_t)) + kChunkBytes;
}

/// Dynamic shared memory of a block.
inline std::size_t shared_bytes(const Blocks& blocks, std::uint32_t unit_rows, std::uint32_t dim) {
  return std::size_t{blocks.warps() * unit_rows + kStages * kTileColumns} * shared_stride(dim);
}

/// Columns [begin, end).
struct Span {
  std::uint32_t begin;
  std::uint32_t end;
};

__host__ __device__ inline std::uint32_t observed_pieces(const Problem& problem) {
  return (problem.columns + problem.piece - 1) / problem.piece;
}

/// Pieces of the observed columns come first, then those of the others.
__device__ inline Span span_of(const Problem& problem, std::uint32_t piece) {
  const std::uint32_t observed = observed_pieces(problem);
  const bool is_observed = piece < observed;
  const std::uint32_t begin =
      is_observed ? piece * problem.piece : problem.columns + (piece - observed) * problem.piece;
  return {begin, min(is_observed ? problem.columns : problem.keys.tokens, begin + problem.piece)};
}

/// A lane has two rows of each fragment, kFragmentRows / 2 apart, and two neighbouring columns.
struct Lane {
  unsigned row = threadIdx.x % kWarp / 4;
  unsigned column = threadIdx.x % 4 * 2;
  /// The lane's i-th row of a unit.
  __device__ unsigned unit_row(unsigned i) const { return i * (kFragmentRows / 2) + row; }
};

/// The rows of the warp.
template <unsigned kTiles>
struct Unit {
  __device__ Unit(const Problem& problem, const Blocks& blocks) {
    const unsigned warp = threadIdx.x / kWarp;
    head = blockIdx.x * blocks.heads + warp / blocks.units;
    part = warp % blocks.units;
    first_row = part * kUnitRows<kTiles>;
    rows = head < problem.sharing ? min(kUnitRows<kTiles>, problem.queries.tokens - first_row) : 0;
  }
  /// Of the KV head's rows, the first.
  __device__ std::uint32_t row_of_head(const Problem& problem) const {
    return head * problem.queries.tokens + first_row;
  }

  std::uint32_t head;  ///< query head among those of the KV head; may be beyond the last
  std::uint32_t part;  ///< which of the head's units
  std::uint32_t first_row;
  std::uint32_t rows;  ///< that there are; the others are zeros
};

__device__ inline float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

/// Copies a chunk to shared memory, or zeros where it is not there.
__device__ inline void copy_chunk(std::uint32_t to, const std::byte* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? kChunkBytes : 0U)
               : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Four matrices of eight rows of one chunk; lane i has the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(std::uint32_t (&matrices)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

/// Copies the unit's queries to its place in shared memory.
template <unsigned kTiles>
__device__ void load_queries(const Problem& problem, const Unit<kTiles>& unit, std::uint32_t to) {
  const std::uint32_t chunks = problem.queries.dim / kChunkElements;
  const std::size_t head = std::size_t{blockIdx.z} * problem.sharing + unit.head;
  for (std::uint32_t i = threadIdx.x % kWarp; i < kUnitRows<kTiles> * chunks; i += kWarp) {
    const std::uint32_t row = i / chunks;
    const std::uint32_t at = i % chunks * kChunkBytes;
    const bool there = row < unit.rows;
    const std::byte* from = there ? problem.queries.row(head, unit.first_row + row) + at : problem.queries.data;
    copy_chunk(to + row * shared_stride(problem.queries.dim) + at, from, there);
  }
}

/// Copies tiles of a head's keys to shared memory, with all threads of the block.
class KeyLoader {
 public:
  __device__ explicit KeyLoader(const Problem& problem)
      : keys_(problem.keys.row(blockIdx.z, 0)),
        token_stride_(problem.keys.token_stride_bytes),
        shared_stride_(shared_stride(problem.keys.dim)),
        chunks_(problem.keys.dim / kChunkElements),
        column_(threadIdx.x / chunks_),
        chunk_(threadIdx.x % chunks_),
        column_step_(blockDim.x / chunks_),
        chunk_step_(blockDim.x % chunks_) {}

  /// Columns [first, first + kTileColumns), zeros from `end` on.
  __device__ void load(std::uint32_t first, std::uint32_t end, std::uint32_t to) const {
    std::uint32_t chunk = chunk_;
    for (std::uint32_t column = column_; column < kTileColumns; column += column_step_) {
      const std::byte* from = keys_ + min(first + column, end - 1) * token_stride_ + chunk * kChunkBytes;
      copy_chunk(to + column * shared_stride_ + chunk * kChunkBytes, from, first + column < end);
      chunk += chunk_step_;
      if (chunk >= chunks_) {
        chunk -= chunks_;
        ++column;
      }
    }
  }

 private:
  const std::byte* keys_;
  std::size_t token_stride_;
  std::uint32_t shared_stride_;
  std::uint32_t chunks_;
  /// The thread's first chunk of a tile, and how far it is to its next.
  std::uint32_t column_;
  std::uint32_t chunk_;
  std::uint32_t column_step_;
  std::uint32_t chunk_step_;
};

/// A lane's part of a unit's logits: its rows and columns of each fragment.
template <unsigned kTiles>
struct Logits {
  float values[kTiles][kFragments][4];

  /// The lane's i-th row, and its `column`-th column of a fragment.
  __device__ float& at(unsigned i, unsigned fragment, unsigned column) {
    return values[i / 2][fragment][i % 2 * 2 + column];
  }
};

/// Logits of the queries and keys that lie at these addresses.
template <class E, unsigned kTiles>
__device__ void multiply(std::uint32_t queries, std::uint32_t keys, std::uint32_t dim, Logits<kTiles>& logits) {
  const unsigned lane = threadIdx.x % kWarp;
  const std::uint32_t stride = shared_stride(dim);
  // Matrices of the queries: rows 0 and 8 of the first chunk, then of the second. Of the keys: both chunks of column 0,
  // then of column 8.
  queries += (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * kChunkBytes;
  keys += (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * kChunkBytes;
#pragma unroll 2
  for (std::uint32_t k = 0; k < dim; k += kFragmentDim) {
    std::uint32_t a[kTiles][4];
    for (unsigned tile = 0; tile < kTiles; ++tile) load_matrices(a[tile], queries + tile * kFragmentRows * stride);
    for (unsigned fragment = 0; fragment < kFragments; fragment += 2) {
      std::uint32_t b[4];
      load_matrices(b, keys + fragment * kFragmentColumns * stride);
      for (unsigned tile = 0; tile < kTiles; ++tile) {
        E::multiply(logits.values[tile][fragment], a[tile], {b[0], b[1]});
        E::multiply(logits.values[tile][fragment + 1], a[tile], {b[2], b[3]});
      }
    }
    queries += 2 * kChunkBytes;
    keys += 2 * kChunkBytes;
  }
}

/// Scales the logits, counts those that are not finite and makes them, and masked ones, -infinity.
template <unsigned kTiles>
__device__ unsigned scale_and_mask(const Problem& problem, const Unit<kTiles>& unit, std::uint32_t first,
                                   std::uint32_t end, Logits<kTiles>& logits) {
  const Lane lane;
  unsigned not_finite = 0;
  float check = 0;
  for (unsigned i = 0; i < 2 * kTiles; ++i) {
    for (unsigned j = 0; j < 2 * kFragments; ++j) {
      float& logit = logits.at(i, j / 2, j % 2);
      logit *= problem.scale;
      check = fmaf(logit, 0.0F, check);  // NaN once there was infinity or NaN
    }
  }
  if (check != 0) {
    for (unsigned i = 0; i < 2 * kTiles; ++i) {
      for (unsigned j = 0; j < 2 * kFragments; ++j) {
        float& logit = logits.at(i, j / 2, j % 2);
        const std::uint32_t column = first + j / 2 * kFragmentColumns + lane.column + j % 2;
        if (isfinite(logit)) continue;
        if (lane.unit_row(i) < unit.rows && column < end) ++not_finite;
        logit = -INFINITY;
      }
    }
  }
  // The last column that the window's first row sees.
  const std::uint32_t seen = problem.keys.tokens - problem.queries.tokens;
  if (first + kTileColumns > min(end, seen + 1)) {
    for (unsigned i = 0; i < 2 * kTiles; ++i) {
      const std::uint32_t last = seen + unit.first_row + lane.unit_row(i);
      for (unsigned j = 0; j < 2 * kFragments; ++j) {
        const std::uint32_t column = first + j / 2 * kFragmentColumns + lane.column + j % 2;
        if (column >= end || column > last) logits.at(i, j / 2, j % 2) = -INFINITY;
      }
    }
  }
  return not_finite;
}

/// Calls body(first column, logits) for each tile of the span, with all warps of the block at a time.
template <class E, unsigned kTiles, class Body>
__device__ void for_each_tile(const Problem& problem, const Unit<kTiles>& unit, Span span, Body body) {
  extern __shared__ uint4 shared[];
  const std::uint32_t stride = shared_stride(problem.keys.dim);
  const std::uint32_t all_queries = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const std::uint32_t all_keys = all_queries + blockDim.x / kWarp * kUnitRows<kTiles> * stride;
  const std::uint32_t queries = all_queries + threadIdx.x / kWarp * kUnitRows<kTiles> * stride;
  const KeyLoader loader(problem);
  load_queries(problem, unit, queries);
  loader.load(span.begin, span.end, all_keys);
  std::uint32_t stage = 0;
  for (std::uint32_t first = span.begin; first < span.end; first += kTileColumns) {
    wait_for_copies();
    // The tile is there, and nobody reads the one before any more.
    __syncthreads();
    const std::uint32_t keys = all_keys + stage * kTileColumns * stride;
    stage = (stage + 1) % kStages;
    const std::uint32_t next = first + kTileColumns;
    if (next < span.end) loader.load(next, span.end, all_keys + stage * kTileColumns * stride);
    Logits<kTiles> logits = {};
    multiply<E>(queries, keys, problem.keys.dim, logits);
    body(first, logits);
  }
}

/// Adds the lane's i-th row of logits.
template <unsigned kTiles>
__device__ void add_row(Logits<kTiles>& logits, unsigned i, Totals& totals) {
  float largest = totals.largest;
  for (unsigned j = 0; j < 2 * kFragments; ++j) largest = fmaxf(largest, logits.at(i, j / 2, j % 2));
  float sum = 0;
  float weighted = 0;
  for (unsigned j = 0; j < 2 * kFragments; ++j) {
    const float below = fmaxf(logits.at(i, j / 2, j % 2) - largest, kNothing);
    const float power = power_of_two(below);
    sum += power;
    weighted = fmaf(power, below, weighted);
  }
  const float change = fmaxf(totals.largest - largest, kNothing);
  const float factor = power_of_two(change);
  totals.weighted = fmaf(fmaf(change, totals.sum, totals.weighted), factor, weighted);
  totals.sum = fmaf(totals.sum, factor, sum);
  totals.largest = largest;
}

/// The totals of a row from those of the four lanes that share it.
__device__ inline Totals total_of_row(const Totals& of_lane) {
  Totals total;
  total.largest = of_lane.largest;
  for (unsigned offset = 1; offset < 4; offset *= 2) {
    total.largest = fmaxf(total.largest, __shfl_xor_sync(kEveryLane, total.largest, offset));
  }
  const float change = fmaxf(of_lane.largest - total.largest, kNothing);
  const float factor = power_of_two(change);
  total.sum = of_lane.sum * factor;
  total.weighted = fmaf(change, of_lane.sum, of_lane.weighted) * factor;
  for (unsigned offset = 1; offset < 4; offset *= 2) {
    total.sum += __shfl_xor_sync(kEveryLane, total.sum, offset);
    total.weighted += __shfl_xor_sync(kEveryLane, total.weighted, offset);
  }
  return total;
}

/// Pass 1: one block per group of query heads, piece of columns and KV head. Counts what is not finite.
template <class E, unsigned kTiles>
__global__ void __launch_bounds__(kMostWarps* kWarp, kResident)
    add_columns(const __grid_constant__ Problem problem, const __grid_constant__ Blocks blocks,
                std::uint64_t* not_finite) {
  const Unit<kTiles> unit(problem, blocks);
  const Lane lane;
  const std::uint32_t piece = blockIdx.y;
  const Span span = span_of(problem, piece);
  Totals of_lane[2 * kTiles];
  unsigned bad = 0;
  for_each_tile<E>(problem, unit, span, [&](std::uint32_t first, Logits<kTiles>& logits) {
    bad += scale_and_mask(problem, unit, first, span.end, logits);
    for (unsigned i = 0; i < 2 * kTiles; ++i) add_row(logits, i, of_lane[i]);
  });
  const bool observed = piece < observed_pieces(problem);
  Totals* totals = problem.totals + (std::size_t{blockIdx.z} * problem.pieces + piece) * rows_of(problem);
  for (unsigned i = 0; i < 2 * kTiles; ++i) {
    Totals total = total_of_row(of_lane[i]);
    total.observed = observed ? total.sum : 0.0F;
    if (!observed) total.weighted = 0;
    if (lane.column == 0 && lane.unit_row(i) < unit.rows) {
      totals[unit.row_of_head(problem) + lane.unit_row(i)] = total;
    }
  }
  bad = cuda::sum_of_warp(bad);
  if (threadIdx.x % kWarp == 0 && bad > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(not_finite), static_cast<unsigned long long>(bad));
  }
}

/// Of a column's attention in some rows: the mean, and the sum of the squares of what deviates from it.
struct Moments {
  float mean = 0;
  float squares = 0;
};

/// Static shared memory of pass 2.
constexpr std::size_t kMomentBytes = kMostWarps * kTileColumns * sizeof(Moments);

/// What two groups of rows count for when their moments are put together.
struct Shares {
  Shares() = default;
  __device__ Shares(std::uint32_t mine, std::uint32_t others) {
    const float all = static_cast<float>(max(1U, mine + others));
    own = static_cast<float>(mine) / all;
    other = static_cast<float>(others) / all;
    between = static_cast<float>(mine * others) / all;
  }
  float own;
  float other;
  float between;
};

/// Gives the same bits whichever is whose.
__device__ inline Moments merged(const Moments& own, const Moments& other, const Shares& shares) {
  const float apart = own.mean - other.mean;
  return {own.mean * shares.own + other.mean * shares.other,
          fmaf(apart * apart, shares.between, own.squares + other.squares)};
}

/// A unit's attention to its columns, column by column.
template <unsigned kTiles>
class ColumnMoments {
 public:
  __device__ explicit ColumnMoments(const Unit<kTiles>& unit) : unit_(unit) {
    std::uint32_t rows = 0;
    for (unsigned i = 0; i < 2 * kTiles; ++i) rows += lane_.unit_row(i) < unit.rows ? 1 : 0;
    share_ = rows > 0 ? 1 / static_cast<float>(rows) : 0.0F;
    for (unsigned level = 0; level < kLevels; ++level) {
      const std::uint32_t others = __shfl_xor_sync(kEveryLane, rows, kWarp / 2 >> level);
      shares_[level] = Shares(rows, others);
      rows += others;
    }
  }

  /// Of the columns 2 * lane and 2 * lane + 1 of the tile, from attention that is 0 in rows that are not there.
  __device__ void take(Logits<kTiles>& attention, Moments (&result)[2]) const {
    Moments moments[kColumns];
    for (unsigned j = 0; j < kColumns; ++j) moments[j] = of_lane(attention, j);
    share_out<kColumns / 2>(moments, kWarp / 2, shares_[0]);
    share_out<kColumns / 4>(moments, kWarp / 4, shares_[1]);
    share_out<kColumns / 8>(moments, kWarp / 8, shares_[2]);
    result[0] = moments[0];
    result[1] = moments[1];
  }

 private:
  static constexpr unsigned kColumns = 2 * kFragments;
  /// Of eight lanes that have rows of the same columns.
  static constexpr unsigned kLevels = 3;

  /// Of the columns that two lanes have in common, the upper lane keeps the upper half.
  template <unsigned kKept>
  __device__ static void share_out(Moments (&moments)[kColumns], unsigned offset, const Shares& shares) {
    const bool upper = (threadIdx.x & offset) != 0;
    for (unsigned j = 0; j < kKept; ++j) {
      const Moments low = moments[j];
      const Moments high = moments[j + kKept];
      const Moments own{upper ? high.mean : low.mean, upper ? high.squares : low.squares};
      const Moments other{__shfl_xor_sync(kEveryLane, upper ? low.mean : high.mean, offset),
                          __shfl_xor_sync(kEveryLane, upper ? low.squares : high.squares, offset)};
      moments[j] = merged(own, other, shares);
    }
  }
  __device__ Moments of_lane(Logits<kTiles>& attention, unsigned j) const {
    Moments moments;
    for (unsigned i = 0; i < 2 * kTiles; ++i) moments.mean += attention.at(i, j / 2, j % 2);
    moments.mean *= share_;
    for (unsigned i = 0; i < 2 * kTiles; ++i) {
      const bool there = lane_.unit_row(i) < unit_.rows;
      const float deviation = there ? attention.at(i, j / 2, j % 2) - moments.mean : 0.0F;
      moments.squares = fmaf(deviation, deviation, moments.squares);
    }
    return moments;
  }

  const Unit<kTiles>& unit_;
  Lane lane_;
  float share_;  ///< of each of the lane's rows in their mean
  Shares shares_[kLevels];
};

/// Pass 2: one block per group of query heads, piece of observed columns and KV head.
template <class E, unsigned kTiles>
__global__ void __launch_bounds__(kMostWarps* kWarp, kResident)
    statistics(const __grid_constant__ Problem problem, const __grid_constant__ Blocks blocks, float* means,
               float* variances) {
  __shared__ Moments of_units[kMostWarps][kTileColumns];
  const Unit<kTiles> unit(problem, blocks);
  const Lane lane;
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned first_column = threadIdx.x % kWarp * 2;
  const Span span = span_of(problem, blockIdx.y);
  const std::uint32_t window = problem.queries.tokens;
  float references[2 * kTiles];
  for (unsigned i = 0; i < 2 * kTiles; ++i) {
    const std::size_t row = std::size_t{blockIdx.z} * rows_of(problem) + unit.row_of_head(problem) + lane.unit_row(i);
    references[i] = lane.unit_row(i) < unit.rows ? problem.references[row] : INFINITY;
  }
  const ColumnMoments<kTiles> columns(unit);
  const std::size_t result = (std::size_t{blockIdx.z} * problem.sharing + unit.head) * problem.columns;
  for_each_tile<E>(problem, unit, span, [&](std::uint32_t first, Logits<kTiles>& logits) {
    scale_and_mask(problem, unit, first, span.end, logits);
    for (unsigned i = 0; i < 2 * kTiles; ++i) {
      for (unsigned j = 0; j < 2 * kFragments; ++j) {
        float& logit = logits.at(i, j / 2, j % 2);
        logit = power_of_two(logit - references[i]);
      }
    }
    Moments moments[2];
    columns.take(logits, moments);
    if (blocks.units > 1) {
      for (unsigned j = 0; j < 2; ++j) of_units[warp][first_column + j] = moments[j];
      __syncthreads();
    }
    if (unit.part > 0 || unit.rows == 0) return;
    for (std::uint32_t part = 1; part < blocks.units; ++part) {
      const std::uint32_t before = part * kUnitRows<kTiles>;
      const Shares shares(before, min(kUnitRows<kTiles>, window - before));
      for (unsigned j = 0; j < 2; ++j) moments[j] = merged(moments[j], of_units[warp + part][first_column + j], shares);
    }
    for (unsigned j = 0; j < 2; ++j) {
      const std::uint32_t column = first + first_column + j;
      if (column >= span.end) continue;
      means[result + column] = moments[j].mean;
      if (variances == nullptr) continue;
      variances[result + column] = window > 1 ? moments[j].squares / static_cast<float>(window - 1) : 0.0F;
    }
  });
}

}  // namespace kvern::evict::tensor
