// The GPU's decode attention behind a C interface, for bench/gpu_attention.py and gpu_model.py: both sides of a
// comparison run in one process, on the same stream, with the same events and graphs. Functions that can fail return 0
// (or a plan) when they did not, and leave a sentence for kvern_last_error() otherwise. Not thread-safe.

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/attend.h"
#include "kernels/cuda/int8.h"
#include "kernels/cuda/observation.h"
#include "kernels/cuda/quantise.h"
#include "kernels/cuda/selection.h"

namespace {

using namespace kvern;

/// group: tokens of keys, or at most so many channels of int4 values.
quantise::Form int4_form(DType dtype, bool keys, std::uint32_t tokens, std::uint32_t dim, std::uint32_t group) {
  return {dtype, keys, tokens, dim, keys ? group : quantise::Form::channel_group(dim, group)};
}
int8::Form int8_form(DType dtype, bool keys, std::uint32_t tokens, std::uint32_t dim, std::uint32_t group) {
  return {dtype, keys, tokens, dim, keys ? group : int8::Form::channel_group(dim)};
}

/// What keeping the tokens of a layer needs, one after the other in one piece of memory; with no memory, how much.
struct KeepScratch {
  KeepScratch(std::byte* memory, const HeadRows& queries, const HeadRows& keys) : begin(memory) {
    columns = keys.tokens - queries.tokens;
    const std::size_t statistics = std::size_t{queries.heads} * columns;
    observation = take<std::byte>(evict::cuda_observation_bytes(queries, keys));
    seen.lse = take<float>(std::size_t{queries.heads} * queries.tokens);
    seen.mean = take<float>(statistics);
    seen.variance = take<float>(statistics);
    seen.dispersion = take<double>(2);
    seen.not_finite = take<std::uint64_t>(1);
    scores = take<float>(std::size_t{keys.heads} * columns);
    selection = take<std::byte>(evict::cuda_selection_bytes(keys.heads, columns));
  }

  std::uint32_t columns = 0;
  std::byte* observation = nullptr;
  evict::CudaObservation seen;
  float* scores = nullptr;
  std::byte* selection = nullptr;
  std::size_t bytes = 0;

 private:
  template <class T>
  T* take(std::size_t count) {
    constexpr std::size_t kAlignment = 256;
    std::byte* at = begin + bytes;
    bytes += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }
  std::byte* begin;
};

std::string last_error;

int told(const Status& status) {
  if (!status) last_error = status.to_string();
  return status ? 0 : 1;
}

}  // namespace

#define KVERN_C extern "C" __attribute__((visibility("default")))

extern "C" {
/// AttendRows.
struct KvernRows {
  const std::byte* data;
  std::uint64_t stride_bytes;
  const std::uint32_t* index;
  const float* lengths;
  /// Of a section's codes, 0 for rows; how many tokens it has, and in groups of how many.
  std::uint32_t bits;
  std::uint32_t tokens;
  std::uint32_t group;
};
/// AttendSegment, and the KV head it belongs to. Heads come in order.
struct KvernSegment {
  std::uint32_t head;
  std::uint32_t entries;
  KvernRows keys;
  KvernRows values;
  const float* bias;
  const std::int32_t* positions;
};
}

KVERN_C const char* kvern_last_error() { return last_error.c_str(); }

/// Queries [query_heads][rows][dim] without gaps. Element types as in base/dtype.h.
KVERN_C CudaAttendPlan* kvern_attend_plan(std::uint32_t dtype, std::uint32_t query_heads, std::uint32_t rows,
                                          std::uint32_t dim, std::uint32_t value_dim, std::uint32_t kv_heads,
                                          const KvernSegment* segments, std::uint32_t count,
                                          std::uint32_t piece_entries) {
  const auto type = static_cast<DType>(dtype);
  const auto take = [&](const KvernRows& from, bool keys) {
    AttendRows to;
    to.dtype = type;
    to.data = from.data;
    to.stride_bytes = from.stride_bytes;
    to.index = from.index;
    to.lengths = from.lengths;
    const std::uint32_t row_dim = keys ? dim : value_dim;
    if (from.bits == 4) to.section = int4_form(type, keys, from.tokens, row_dim, from.group);
    if (from.bits == 8) to.section = int8_form(type, keys, from.tokens, row_dim, from.group);
    return to;
  };
  std::vector<std::vector<AttendSegment>> of_heads(kv_heads);
  for (const KvernSegment* segment = segments; segment != segments + count; ++segment) {
    of_heads.at(segment->head)
        .push_back({segment->entries, take(segment->keys, true), take(segment->values, false), segment->bias,
                    segment->positions});
  }
  const std::vector<std::span<const AttendSegment>> heads(of_heads.begin(), of_heads.end());
  // Its queries are told at every run.
  static const std::byte somewhere{};
  const AttendProblem problem{HeadRows::contiguous(&somewhere, type, query_heads, rows, dim), value_dim, 0, nullptr,
                              heads};
  auto plan = CudaAttendPlan::make(problem, {piece_entries});
  if (told(status_of(plan)) != 0) return nullptr;
  return new CudaAttendPlan(std::move(*plan));
}
KVERN_C void kvern_attend_free(CudaAttendPlan* plan) { delete plan; }
KVERN_C std::uint64_t kvern_attend_device_bytes(const CudaAttendPlan* plan) { return plan->device_bytes(); }
KVERN_C int kvern_attend_put(CudaAttendPlan* plan, std::byte* memory, CUstream_st* stream) {
  return told(plan->put(memory, stream));
}
KVERN_C int kvern_attend(const CudaAttendPlan* plan, const std::byte* queries, const std::int32_t* query_positions,
                         float* output, float* lse, CUstream_st* stream) {
  return told(plan->attend(queries, query_positions, output, lse, stream));
}

/// Bytes of a section of 4 or 8 bits, to a multiple of 64.
KVERN_C std::uint64_t kvern_section_bytes(std::uint32_t dtype, std::uint32_t bits, int keys, std::uint32_t tokens,
                                          std::uint32_t dim, std::uint32_t group) {
  const auto type = static_cast<DType>(dtype);
  const std::size_t bytes = bits == 4 ? int4_form(type, keys != 0, tokens, dim, group).section_bytes()
                                      : int8_form(type, keys != 0, tokens, dim, group).section_bytes();
  return (bytes + 63) / 64 * 64;
}
/// Encodes count planes of rows without gaps to sections kvern_section_bytes() apart; *not_finite as the kernels do.
KVERN_C int kvern_encode(std::uint32_t dtype, std::uint32_t bits, int keys, std::uint32_t tokens, std::uint32_t dim,
                         std::uint32_t group, const std::byte* planes, std::uint32_t count, std::byte* sections,
                         std::uint32_t* not_finite, CUstream_st* stream) {
  const auto type = static_cast<DType>(dtype);
  const std::size_t plane = std::size_t{tokens} * dim * dtype_bytes(type);
  const std::size_t section = kvern_section_bytes(dtype, bits, keys, tokens, dim, group);
  if (bits == 4) {
    return told(quantise::cuda_encode_planes(int4_form(type, keys != 0, tokens, dim, group), planes, plane, count,
                                             sections, section, not_finite, stream));
  }
  return told(int8::cuda_encode_planes(int8_form(type, keys != 0, tokens, dim, group), planes, plane, count, sections,
                                       section, not_finite, stream));
}

/// Which tokens of a layer CAKE keeps. Queries [query_heads][rows][dim] without gaps are those of the last rows; keys
/// [kv_heads][tokens][dim] have heads head_stride bytes apart. kept: [kv_heads][count + rows], ascending, those of the
/// queries last. scratch: kvern_keep_bytes() at a multiple of 256.
KVERN_C std::uint64_t kvern_keep_bytes(std::uint32_t dtype, std::uint32_t query_heads, std::uint32_t rows,
                                       std::uint32_t kv_heads, std::uint32_t tokens, std::uint32_t dim) {
  const auto type = static_cast<DType>(dtype);
  return KeepScratch(nullptr, HeadRows::contiguous(nullptr, type, query_heads, rows, dim),
                     HeadRows::contiguous(nullptr, type, kv_heads, tokens, dim))
      .bytes;
}
KVERN_C int kvern_keep(std::uint32_t dtype, std::uint32_t query_heads, std::uint32_t rows, std::uint32_t kv_heads,
                       std::uint32_t tokens, std::uint32_t dim, const std::byte* queries, const std::byte* keys,
                       std::uint64_t head_stride, std::uint32_t count, std::byte* scratch, std::uint32_t* kept,
                       CUstream_st* stream) {
  const auto type = static_cast<DType>(dtype);
  const HeadRows of_queries = HeadRows::contiguous(queries, type, query_heads, rows, dim);
  HeadRows of_keys = HeadRows::contiguous(keys, type, kv_heads, tokens, dim);
  of_keys.head_stride_bytes = head_stride;
  const KeepScratch in(scratch, of_queries, of_keys);
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  Status status = evict::cuda_observe(of_queries, of_keys, in.columns, scale, in.observation, in.seen, stream);
  if (status) {
    status = evict::cuda_cake_scores(in.seen.mean, in.seen.variance, query_heads, kv_heads, in.columns,
                                     evict::kCakeGamma, {}, in.scores, stream);
  }
  if (status)
    status = evict::cuda_select_best(in.scores, kv_heads, in.columns, count, rows, in.selection, kept, stream);
  return told(status);
}
