#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "kernels/attend.h"
#include "kernels/cluster.h"
#include "kernels/decode_eviction.h"
#include "kernels/int8_arithmetic.h"
#include "kernels/merge.h"
#include "kernels/observation.h"
#include "kernels/quantise_arithmetic.h"
#include "kernels/rope.h"
#include "kernels/selection.h"
#include "kernels/token_scores.h"
#include "kernels/window_scores.h"

namespace kvern::golden {

/// Throws what a kernel answered, where it is not fine.
inline void check(const Status& status) {
  if (!status) throw std::runtime_error(status.to_string());
}
template <typename T>
T check(Result<T> result) {
  check(status_of(result));
  return *std::move(result);
}

struct Attended {
  std::vector<float> output;
  std::vector<float> lse;
};

/// The entries of one KV head, as cluster::HeadClusters has them.
struct HeadEntries {
  std::uint32_t entries = 0;
  std::vector<float> keys;
  std::vector<float> values;
  std::vector<cluster::Members> members;
  std::vector<std::uint32_t> assignment;

  bool operator==(const HeadEntries&) const = default;
};

/// The kernels that golden vectors are run on: the CPU's or a device's. Arguments and results lie in host memory;
/// contracts are those of the headers of kernels/. What a kernel answers in place of a result is thrown.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual evict::Observation observe(const HeadRows& queries, const HeadRows& keys,
                                     const evict::ObservationOptions& options) const = 0;
  virtual evict::TokenScores cake_scores(const evict::Observation& observation, std::uint32_t kv_heads, float gamma,
                                         const evict::Pooling& pooling) const = 0;
  virtual evict::TokenScores snapkv_scores(const evict::Observation& observation, std::uint32_t kv_heads,
                                           const evict::Pooling& pooling) const = 0;
  virtual evict::TokenScores decode_scores(const HeadRows& query, const HeadRows& keys,
                                           const evict::DecodeRule& rule) const = 0;
  virtual evict::Selection decode_keep(const HeadRows& query, const HeadRows& keys,
                                       const evict::DecodeRule& rule) const = 0;
  virtual std::vector<float> window_scores(const evict::Observation& observation,
                                           const evict::WindowRule& rule) const = 0;
  virtual std::vector<float> window_scores(std::span<const float> sums, std::uint32_t heads,
                                           const evict::WindowRule& rule) const = 0;
  /// `count` of every head.
  virtual evict::Selection select_best(const evict::TokenScores& scores, std::uint32_t count,
                                       std::uint32_t tail) const = 0;

  virtual void merge_layers(const HeadRows& x, const HeadRows& y, float weight, const merge::MergedRows& out) const = 0;
  virtual void restore_rows(const HeadRows& directions, std::span<const float> lengths, std::byte* out) const = 0;
  virtual std::vector<HeadEntries> compress(const HeadRows& keys, const HeadRows& values,
                                            const cluster::Options& options) const = 0;

  virtual rope::Turns turns_at(std::span<const double> inverse_frequencies,
                               std::span<const std::int64_t> positions) const = 0;
  /// To fp32, in the half-split style.
  virtual std::vector<float> rotate(const HeadRows& rows, const rope::Turns& turns,
                                    rope::Direction direction) const = 0;

  /// One plane as a section, and a section as the rows of a plane.
  virtual std::vector<std::byte> encode(const quantise::Form& form, std::span<const std::byte> plane) const = 0;
  virtual std::vector<std::byte> encode(const int8::Form& form, std::span<const std::byte> plane) const = 0;
  virtual std::vector<std::byte> decode(const quantise::Form& form, std::span<const std::byte> section) const = 0;
  virtual std::vector<std::byte> decode(const int8::Form& form, std::span<const std::byte> section) const = 0;

  virtual Attended attend(const AttendProblem& problem) const = 0;
};

/// On the instruction set that is chosen.
const Backend& cpu_backend();
/// On the current device; there must be one.
const Backend& cuda_backend();

}  // namespace kvern::golden
