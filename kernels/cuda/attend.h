#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/status.h"
#include "kernels/attend.h"

struct CUstream_st;

namespace kvern {

struct CudaAttendOptions {
  /// Entries that one block of threads works on, rounded up to whole tiles; 0: as many as fill the device evenly.
  std::uint32_t piece_entries = 0;

  Status validate() const;
};

/// attend() on the GPU, planned once for a cache and run at every step: what the problem describes is cut into pieces
/// and put into device memory, so that a step is one launch. Equal to the CPU within rounding, not bit for bit; the
/// same bits from run to run on one kind of device.
///
/// Rows of fp16 and bf16 whose elements are of the queries' dtype, that lie at multiples of 16 bytes and have multiples
/// of eight elements are multiplied by tensor cores; if any segment has other rows, none is, which is much slower.
/// Sections of the forms int4 and int8 (AttendRows::section) are read as they are, their codes turned into the numbers
/// that decoding gives on the way: they need the tensor cores' dtypes, dimensions of 64, 128, 192 or 256, and memory
/// aligned to 64 bytes. Any bytes are safe, but whether they are what encoding makes is not looked at: verify sections
/// when they arrive (cuda_decode_rows() tells).
///
/// For one device, that which is current at make(). Calls of one plan may not overlap, on the host or on the device:
/// its device memory holds the pieces' results.
class CudaAttendPlan {
 public:
  /// Reads the problem's spans and segments during the call; what they point to (rows, indices, lengths, biases,
  /// positions) lies in memory that the device can reach, and stays there while the plan runs. Of the queries it takes
  /// shape and strides. Rows may change between runs: a tail that grows is a segment with room to spare, the positions
  /// of which hide what is not there yet (its rows must be finite).
  ///
  /// kInvalid as attend(); kRefused for segments with a reader and for sections that it does not take; kInternal when
  /// there is no device.
  static Result<CudaAttendPlan> make(const AttendProblem& problem, const CudaAttendOptions& options = {});

  CudaAttendPlan(CudaAttendPlan&&) noexcept;
  CudaAttendPlan& operator=(CudaAttendPlan&&) noexcept;
  ~CudaAttendPlan();

  /// Device memory that the plan needs.
  std::size_t device_bytes() const;

  /// Queues the copy of the plan to memory, aligned to 256 bytes. Once before the first run, and again when the memory
  /// was written to by others.
  Status put(std::byte* memory, CUstream_st* stream);

  /// Queues the attention of queries (and their positions; null: they see all), strided as the problem's; output and
  /// lse as attend() writes them. All lie in device memory. Neither allocates nor synchronises nor copies; may be
  /// captured in a graph. kInvalid before put(); kInternal when the launch fails.
  ///
  /// From sm_90 on its blocks may begin while the kernel before it in the stream ends, and read the plan; all that the
  /// plan points to is read when that kernel is done. In turn they let a kernel behind them begin, if it was launched
  /// so (programmatic stream serialisation): it has to wait for them before it reads what they write.
  Status attend(const std::byte* queries, const std::int32_t* query_positions, float* output, float* lse,
                CUstream_st* stream) const;

 private:
  struct Plan;
  explicit CudaAttendPlan(std::unique_ptr<Plan> plan);

  std::unique_ptr<Plan> plan_;
};

}  // namespace kvern
