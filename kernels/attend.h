#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/head_rows.h"
#include "kernels/int8_arithmetic.h"
#include "kernels/plane_form.h"
#include "kernels/quantise_arithmetic.h"

namespace kvern {

class Executor;

/// Rows that have to be decoded before they can be read.
class RowReader {
 public:
  virtual ~RowReader() = default;
  /// Writes rows [begin, end) to out without gaps. Called from several threads at once, for a few dozen rows at a time.
  virtual Status read(TokenRange rows, std::byte* out) const = 0;
};

/// Rows of a plane as a form wrote them. Borrows form and payload.
class PlaneReader final : public RowReader {
 public:
  PlaneReader(const PlaneForm& form, const PlaneShape& plane, std::span<const std::byte> payload)
      : form_(form), plane_(plane), payload_(payload) {}
  Status read(TokenRange rows, std::byte* out) const override { return form_.decode(plane_, payload_, rows, out); }

 private:
  const PlaneForm& form_;
  PlaneShape plane_;
  std::span<const std::byte> payload_;
};

/// How a section holds rows as codes.
using SectionForm = std::variant<std::monostate, quantise::Form, int8::Form>;

/// The keys or the values of a segment. Borrows everything.
struct AttendRows {
  DType dtype = DType::kFloat32;
  /// Rows in memory, stride_bytes apart; not used where there is a reader.
  const std::byte* data = nullptr;
  std::size_t stride_bytes = 0;
  const RowReader* reader = nullptr;
  /// Entry i has row index[i]; null: row i. Indices that rise by one are read together.
  const std::uint32_t* index = nullptr;
  /// Entry i is lengths[i] times its row: a direction that two layers share (MiniCache); null: the row as it is.
  const float* lengths = nullptr;
  /// For the GPU: data is a section of this form, which it reads without decoding it first. The CPU takes a reader.
  SectionForm section{};

  static AttendRows of(const HeadRows& rows, std::uint32_t head) {
    return {rows.dtype, rows.row(head, 0), rows.token_stride_bytes, nullptr, nullptr, nullptr, {}};
  }
  static AttendRows of(const RowReader& reader, DType dtype) {
    return {dtype, nullptr, 0, &reader, nullptr, nullptr, {}};
  }
  template <class Form>
  static AttendRows of_section(const std::byte* section, const Form& form) {
    return {form.dtype, section, 0, nullptr, nullptr, nullptr, form};
  }
};

/// Entries of one KV head that are stored alike: tokens, centroids, merged or retained tokens, a recent tail.
struct AttendSegment {
  std::uint32_t entries = 0;
  AttendRows keys;
  AttendRows values;
  /// Added to the logit of entry i, for instance ln N of a centroid of N tokens; null: nothing is added.
  const float* bias = nullptr;
  /// Position of entry i; null: every query sees every entry.
  const std::int32_t* positions = nullptr;
};

/// Attention of a few queries over a compact cache of one layer: logit = <q, k> * scale + bias, over all segments of
/// the query's KV head. Borrows everything.
struct AttendProblem {
  /// [query heads][rows][dim]; query head h reads KV head h / (query heads / KV heads).
  HeadRows queries;
  std::uint32_t value_dim = 0;
  /// 0: 1 / sqrt(dim).
  float scale = 0;
  /// Position of each row: it sees entries at its own position and before; null: it sees all.
  const std::int32_t* query_positions = nullptr;
  /// The segments of each KV head. Heads may differ in segments and lengths.
  std::span<const std::span<const AttendSegment>> heads;

  /// kInvalid, in a sentence, for what attend() does not take: heads that do not divide the query heads, dimensions
  /// that are 0 or beyond kMaxAttendDim, opaque bytes, segments without rows.
  Status validate() const;
};

constexpr std::uint32_t kMaxAttendDim = 256;

/// Floats of workspace that attend() needs for a valid problem.
std::size_t attend_workspace_floats(const AttendProblem& problem);

/// Writes output [query heads][rows][value_dim] and lse [query heads][rows], the natural logarithm of the sum of the
/// exponentials of the logits, both fp32. A query that sees no entry gets zeros and -infinity. NaN and infinities in
/// keys or values are not hidden: the outputs that they touch become NaN. Reads every row once per KV head, whatever
/// the number of queries; accumulates in fp32. The same bits from run to run and for any executor: the entries are cut
/// into pieces of a fixed size, whose results are combined in order. kInvalid for problems that validate() refuses and
/// for spans that are too small; kRefused for sections (on the CPU a reader decodes them); what a reader answers when
/// it fails.
Status attend(const AttendProblem& problem, std::span<float> workspace, std::span<float> output, std::span<float> lse,
              Executor* executor);

}  // namespace kvern
