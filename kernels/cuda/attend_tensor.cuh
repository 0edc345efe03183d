#pragma once

#include "kernels/cuda/attend_task.cuh"
#include "kernels/cuda/tensor_cores.cuh"

/// Attention over rows of 16-bit elements on the tensor cores.
///
/// Keys stand for the rows of the first matrix and queries for the columns of the second, so that few queries waste
/// little: logits [16 keys][8 queries] = K * Q', then sums [16 columns of V][8 queries] = V' * P. Elements go from
/// memory to the registers of the lane that multiplies them, 16 bytes at a time: which element of a row stands where in
/// the sum over a row, and which column of V is which row of a result, are free to choose. A weight is multiplied as
/// the sum of two elements, so that nothing is lost beyond what float32 loses.
namespace kvern::cuda::tensor {

/// Queries that a block works on: the width of the instruction.
constexpr unsigned kQueries = 8;
/// Elements of a row that lanes share out among them.
constexpr unsigned kBlock = 64;

/// Rows of up to kBlocks * kBlock elements. Warps of a block, and blocks that a multiprocessor has registers for.
template <unsigned kBlocks>
constexpr unsigned kWarps = kBlocks <= 2 ? 8 : 4;
constexpr unsigned kResident = 2;

/// Where a lane stands in a fragment.
struct Lane {
  unsigned row = threadIdx.x % kWarp / 4;
  unsigned column = threadIdx.x % 4;
};

/// The block's queries and their positions, in shared memory. Rows lie half of its banks apart, so that two can be read
/// at a time.
template <unsigned kBlocks>
struct alignas(16) Queries {
  std::uint16_t elements[kQueries][kBlocks * kBlock + kBlock / 2];
  std::int32_t positions[kQueries];
};

/// Entries [begin, end) of a segment, as tiles of kKeys.
struct Span {
  std::uint32_t begin;
  std::uint32_t end;
  __device__ std::uint32_t clamp(std::uint32_t entry) const { return min(entry, end - 1); }
};

/// Weights of 16 keys and 8 queries as sums of two elements.
struct Weights {
  std::uint32_t upper[2];
  std::uint32_t lower[2];
};

template <class E>
__device__ void multiply_weights(float (&sums)[4], const std::uint32_t (&values)[4], const Weights& weights) {
  E::multiply(sums, values, weights.upper);
  E::multiply(sums, values, weights.lower);
}

/// Rows as they are: a warp holds 16 keys and 16 values.
template <class E, unsigned kBlocks>
class PlainRows {
 public:
  static constexpr unsigned kTiles = 1;
  static constexpr unsigned kKeys = 16 * kTiles;

  __device__ PlainRows(const Task& task, const Segment& segment, Span span, const Queries<kBlocks>& queries)
      : task_(task),
        keys_(segment.keys),
        values_(segment.values),
        span_(span),
        query_(&queries.elements[lane_.row][lane_.column * 8]) {}

  /// Begins to load the tile at first.
  __device__ void start(std::uint32_t first) {
    find_keys(first);
    find_values(first);
    load_keys();
    load_values();
  }
  /// Before the present tile is worked on: what comes next.
  __device__ void look_ahead(std::uint32_t next, bool more) {
    if (more) find_keys(next);
  }
  __device__ void find_keys(std::uint32_t first) {
    for (unsigned i = 0; i < 2; ++i) key_rows_[i] = keys_.number(span_.clamp(first + lane_.row + 8 * i));
  }
  __device__ void find_values(std::uint32_t first) {
    for (unsigned i = 0; i < 4; ++i) value_rows_[i] = values_.number(span_.clamp(first + value_entry(i)));
  }
  __device__ void load_keys() {
    for (unsigned i = 0; i < 2; ++i) {
      const std::byte* row = keys_.data + key_rows_[i] * keys_.stride;
      for (unsigned chunk = 0; chunk < 2 * kBlocks; ++chunk) {
        const unsigned element = chunk * kBlock / 2 + lane_.column * 8;
        key_[chunk][i] = element < task_.dim ? load_once(row + element * 2) : uint4{};
      }
    }
  }
  __device__ void load_values() {
    for (unsigned i = 0; i < 4; ++i) {
      const std::byte* row = values_.data + value_rows_[i] * values_.stride;
      for (unsigned block = 0; block < kBlocks; ++block) {
        const unsigned element = block * kBlock + lane_.row * 8;
        value_[block][i] = element < task_.value_dim ? load_once(row + element * 2) : uint4{};
      }
    }
  }
  __device__ void multiply_keys(float (&logits)[kTiles][4]) const {
    for (unsigned chunk = 0; chunk < 2 * kBlocks; ++chunk) {
      const uint4& a = key_[chunk][0];
      const uint4& b = key_[chunk][1];
      const uint4 query = *reinterpret_cast<const uint4*>(query_ + chunk * kBlock / 2);
      E::multiply(logits[0], {a.x, b.x, a.y, b.y}, {query.x, query.y});
      E::multiply(logits[0], {a.z, b.z, a.w, b.w}, {query.z, query.w});
    }
  }
  __device__ void add_values(const Weights (&weights)[kTiles], float (&sums)[4 * kBlocks][4]) const {
    for (unsigned block = 0; block < kBlocks; ++block) {
      const uint4(&v)[4] = value_[block];
      add(v[0].x, v[1].x, v[2].x, v[3].x, weights[0], sums[block * 4]);
      add(v[0].y, v[1].y, v[2].y, v[3].y, weights[0], sums[block * 4 + 1]);
      add(v[0].z, v[1].z, v[2].z, v[3].z, weights[0], sums[block * 4 + 2]);
      add(v[0].w, v[1].w, v[2].w, v[3].w, weights[0], sums[block * 4 + 3]);
    }
  }
  /// The column of V that the lane's first or second row in sums[i] stands for.
  __device__ static unsigned column(unsigned i, unsigned half) {
    return i / 4 * kBlock + Lane().row * 8 + i % 4 * 2 + half;
  }

 private:
  __device__ unsigned value_entry(unsigned i) const { return 2 * lane_.column + i % 2 + i / 2 * 8; }
  __device__ static void add(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d, const Weights& weights,
                             float (&sums)[4]) {
    multiply_weights<E>(sums, {lower_halves(a, b), upper_halves(a, b), lower_halves(c, d), upper_halves(c, d)},
                        weights);
  }

  Lane lane_;
  const Task& task_;
  const Rows& keys_;
  const Rows& values_;
  Span span_;
  std::uint32_t key_rows_[2];
  std::uint32_t value_rows_[4];
  const std::uint16_t* query_;
  uint4 key_[2 * kBlocks][2];
  uint4 value_[kBlocks][4];
};

/// What goes with the entries of a warp's tile, each held by one lane.
template <unsigned kKeys>
class EntryTerms {
 public:
  __device__ EntryTerms(const Segment& segment, Span span) : segment_(segment), span_(span) {}

  /// Begins to load those of the tile at first.
  __device__ void load(std::uint32_t first) {
    for (unsigned i = 0; i < kEach; ++i) {
      const std::uint32_t inside = span_.clamp(entry(first, i));
      bias_[i] = segment_.bias != nullptr ? segment_.bias[inside] : 0.0F;
      if (has_key_lengths()) key_lengths_[i] = segment_.keys.lengths[inside];
      if (has_value_lengths()) value_lengths_[i] = segment_.values.lengths[inside];
      if (has_positions()) positions_[i] = segment_.positions[inside];
    }
  }
  /// When they are needed: biases in the units of logits, which hide what lies behind the span. Not before, for it
  /// waits for what load() began.
  __device__ void settle(std::uint32_t first) {
    for (unsigned i = 0; i < kEach; ++i) {
      bias_[i] = entry(first, i) < span_.end ? bias_[i] * kLog2E : -INFINITY;
    }
  }
  __device__ bool has_key_lengths() const { return segment_.keys.lengths != nullptr; }
  __device__ bool has_value_lengths() const { return segment_.values.lengths != nullptr; }
  __device__ bool has_positions() const { return segment_.positions != nullptr; }
  __device__ float bias(unsigned key) const { return of(bias_, key); }
  __device__ float key_length(unsigned key) const { return of(key_lengths_, key); }
  __device__ float value_length(unsigned key) const { return of(value_lengths_, key); }
  __device__ std::int32_t position(unsigned key) const { return of(positions_, key); }

 private:
  static constexpr unsigned kEach = (kKeys + kWarp - 1) / kWarp;
  __device__ static std::uint32_t entry(std::uint32_t first, unsigned i) {
    return first + i * kWarp + threadIdx.x % kWarp;
  }
  /// key / kWarp is known when this is compiled.
  template <typename T>
  __device__ static T of(const T (&values)[kEach], unsigned key) {
    return __shfl_sync(kEveryLane, values[key / kWarp], static_cast<int>(key % kWarp));
  }

  const Segment& segment_;
  Span span_;
  float bias_[kEach];
  float key_lengths_[kEach];
  float value_lengths_[kEach];
  std::int32_t positions_[kEach];
};

/// What the threads of a block have in common. The plan's piece is in shared memory, for it is read time and again.
struct Block {
  __device__ Block(const Task& task, const Piece& of)
      : query_block(blockIdx.x % task.query_blocks),
        number(blockIdx.x / task.query_blocks),
        first_query(query_block * kQueries),
        query_count(min(kQueries, task.count - first_query)),
        piece(of),
        segment(of.segment),
        warp(threadIdx.x / kWarp) {}

  __device__ Span span() const { return {piece.begin, piece.end}; }

  std::uint32_t query_block;
  std::uint32_t number;  ///< of the piece
  std::uint32_t first_query;
  std::uint32_t query_count;
  const Piece& piece;
  const Segment& segment;
  unsigned warp;
};

/// Asks for what lies at from in L2, where what other kernels write is seen: this need not wait for them. One thread.
__device__ inline void prefetch(const std::byte* from, std::uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

/// Takes the block's piece, and waits for the kernels before. Meanwhile rows that follow each other without gaps are
/// fetched, as many as the warps begin with. All threads of the block.
__device__ inline void take_piece_ahead(const Task& task, std::uint32_t warp_keys, Piece& piece) {
  let_next_begin();
  take_piece(task, blockIdx.x / task.query_blocks, piece);
  const bool keys = threadIdx.x == 0;
  if (piece.segment.bits == 0 && (keys || threadIdx.x == kWarp)) {
    const Rows& rows = keys ? piece.segment.keys : piece.segment.values;
    const std::uint32_t row_bytes = (keys ? task.dim : task.value_dim) * 2;
    const std::uint32_t entries = min(piece.end - piece.begin, blockDim.x / kWarp * warp_keys);
    if (rows.index == nullptr && rows.stride == row_bytes && entries > 0) {
      prefetch(rows.data + std::size_t{piece.begin} * row_bytes, entries * row_bytes);
    }
  }
  wait_for_previous();
}

/// Copies the block's queries, element by element to place_of(column): each warp its own, all of whose elements are on
/// their way at a time. All threads of the block.
template <unsigned kBlocks, class PlaceOf>
__device__ void take_queries(const Task& task, const Block& block, Queries<kBlocks>& queries, PlaceOf place_of) {
  constexpr unsigned kEach = kBlocks * kBlock / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned query = block.warp; query < kQueries; query += kWarps<kBlocks>) {
    const bool there = query < block.query_count;
    const std::uint32_t of_head = block.first_query + (there ? query : 0);
    const auto* row = reinterpret_cast<const std::uint16_t*>(task.query(block.piece.head, of_head));
    std::uint16_t elements[kEach];
    for (unsigned i = 0; i < kEach; ++i) {
      const unsigned column = i * kWarp + lane;
      elements[i] = there && column < task.dim ? row[column] : std::uint16_t{0};
    }
    for (unsigned i = 0; i < kEach; ++i) queries.elements[query][place_of(i * kWarp + lane)] = elements[i];
    if (lane == 0) {
      queries.positions[query] =
          task.query_positions != nullptr ? task.query_positions[of_head % task.rows] : INT32_MAX;
    }
  }
  __syncthreads();
}

/// A warp's share of the block's piece: every kWarps-th tile. Takes the queries, to place_of(column), when its first
/// loads are on their way. All threads of the block.
template <class E, unsigned kBlocks, class Source, class PlaceOf>
__device__ void attend_tiles(Source source, const Task& task, const Block& block, Queries<kBlocks>& queries,
                             PlaceOf place_of, WarpResult<kQueries, kBlocks * kBlock>& result) {
  constexpr unsigned kTiles = Source::kTiles;
  constexpr unsigned kKeys = Source::kKeys;
  const Lane lane;
  constexpr std::uint32_t kStep = kWarps<kBlocks> * kKeys;
  const Span span = block.span();
  EntryTerms<kKeys> terms(block.segment, span);
  float sums[4 * kBlocks][4] = {};
  float references[2] = {-INFINITY, -INFINITY};
  float totals[2] = {};
  std::uint32_t first = span.begin + block.warp * kKeys;
  if (first < span.end) {
    terms.load(first);
    source.start(first);
  }
  take_queries(task, block, queries, place_of);
  for (; first < span.end; first += kStep) {
    const std::uint32_t next = first + kStep;
    const bool more = next < span.end;
    source.look_ahead(next, more);
    float logits[kTiles][4] = {};
    source.multiply_keys(logits);
    if (more) source.load_keys();
    terms.settle(first);

    float largest[2] = {-INFINITY, -INFINITY};
    for (unsigned i = 0; i < 2 * kTiles; ++i) {
      const unsigned key = i * 8 + lane.row;
      const float factor = terms.has_key_lengths() ? task.scale * terms.key_length(key) : task.scale;
      const float bias = terms.bias(key);
      float above = 0;
      if constexpr (!E::kWide) {
        if (terms.has_value_lengths()) above = fmaxf(log2f(fabsf(terms.value_length(key))), 0.0F);
      }
      const std::int32_t position = terms.has_positions() ? terms.position(key) : 0;
      for (unsigned query = 0; query < 2; ++query) {
        float& logit = logits[i / 2][i % 2 * 2 + query];
        logit = fmaf(logit, factor, bias);
        if (terms.has_positions() && position > queries.positions[2 * lane.column + query]) logit = -INFINITY;
        // So that weights stay within the elements' range, with their values' lengths too.
        largest[query] = fmaxf(largest[query], logit + above);
      }
    }
    float bases[2];
    float factors[2];
    for (unsigned query = 0; query < 2; ++query) {
      for (unsigned offset = 4; offset < kWarp; offset *= 2) {
        largest[query] = fmaxf(largest[query], __shfl_xor_sync(kEveryLane, largest[query], offset));
      }
      if constexpr (!E::kWide) largest[query] -= E::kHeadroom;
      const float now = fmaxf(references[query], largest[query]);
      bases[query] = finite_reference(now);
      factors[query] = power_of_two(references[query] - bases[query]);
      totals[query] *= factors[query];
      references[query] = now;
    }
    if (__any_sync(kEveryLane, factors[0] != 1 || factors[1] != 1)) {
      for (auto& sum : sums) {
        for (unsigned i = 0; i < 4; ++i) sum[i] *= factors[i % 2];
      }
    }
    Weights weights[kTiles];
    for (unsigned i = 0; i < 2 * kTiles; ++i) {
      float of_query[2];
      for (unsigned query = 0; query < 2; ++query) {
        of_query[query] = power_of_two(logits[i / 2][i % 2 * 2 + query] - bases[query]);
        totals[query] += of_query[query];
      }
      if (terms.has_value_lengths()) {
        const float length = terms.value_length(i * 8 + lane.row);
        of_query[0] *= length;
        of_query[1] *= length;
      }
      const std::uint32_t pair = E::pack(of_query[0], of_query[1]);
      weights[i / 2].upper[i % 2] = transposed(pair);
      weights[i / 2].lower[i % 2] = transposed(E::pack(of_query[0] - E::low(pair), of_query[1] - E::high(pair)));
    }
    if (more) terms.load(next);
    source.add_values(weights, sums);
    if (more) {
      // Indices are most often those of the keys, which have been read.
      source.find_values(next);
      source.load_values();
    }
  }

  __syncwarp();  // the result may lie where the source did
  for (unsigned query = 0; query < 2; ++query) {
    for (unsigned offset = 4; offset < kWarp; offset *= 2) {
      totals[query] += __shfl_xor_sync(kEveryLane, totals[query], offset);
    }
    const unsigned of = 2 * lane.column + query;
    if (of >= block.query_count) continue;
    for (unsigned i = 0; i < 4 * kBlocks; ++i) {
      result.sums[of][Source::column(i, 0)] = sums[i][query];
      result.sums[of][Source::column(i, 1)] = sums[i][2 + query];
    }
    if (lane.row == 0) {
      result.references[of] = references[query];
      result.totals[of] = totals[query];
    }
  }
}

/// One block per piece and kQueries queries.
template <class E, unsigned kBlocks>
__global__ void __launch_bounds__(kWarps<kBlocks>* kWarp, kResident) attend_pieces(const __grid_constant__ Task task) {
  constexpr unsigned kDim = kBlocks * kBlock;
  __shared__ Queries<kBlocks> queries;
  __shared__ WarpResult<kQueries, kDim> results[kWarps<kBlocks>];
  __shared__ Piece piece;
  using Source = PlainRows<E, kBlocks>;
  take_piece_ahead(task, Source::kKeys, piece);
  const Block block(task, piece);
  attend_tiles<E, kBlocks>(
      Source(task, block.segment, block.span(), queries), task, block, queries, [](unsigned column) { return column; },
      results[block.warp]);
  __syncthreads();
  hand_in<kWarps<kBlocks>, kQueries, kDim, 4>(
      task, piece, block.number, block.query_block, [&](unsigned of) -> const auto& { return results[of]; }, results);
}

}  // namespace kvern::cuda::tensor
