#pragma once

#include <algorithm>
#include <list>
#include <utility>
#include <vector>

#include "kernels/cuda/attend.h"
#include "tests/kernels/device_memory.h"

namespace kvern {

/// A copy on the device of rows and whatever lies between them.
class DeviceRows {
 public:
  explicit DeviceRows(const HeadRows& rows) : bytes_(extent(rows)), view_(rows) {
    bytes_.put(0, rows.data, extent(rows));
    view_.data = bytes_.data();
  }
  const HeadRows& view() const { return view_; }

 private:
  static std::size_t extent(const HeadRows& rows) {
    if (rows.heads == 0 || rows.tokens == 0) return 0;
    return (rows.heads - 1) * rows.head_stride_bytes + (rows.tokens - 1) * rows.token_stride_bytes +
           rows.dim * dtype_bytes(rows.dtype);
  }

  DeviceArray<std::byte> bytes_;
  HeadRows view_;
};

/// Output and lse of two runs of one plan, which are the same. The problem's queries and segments are in device memory.
inline std::pair<std::vector<float>, std::vector<float>> run_plan(const AttendProblem& problem,
                                                                  std::uint32_t piece_entries = 0) {
  auto plan = CudaAttendPlan::make(problem, {piece_entries});
  if (!plan) throw std::runtime_error(plan.error().to_string());
  const std::size_t rows = std::size_t{problem.queries.heads} * problem.queries.tokens;
  const DeviceArray<std::byte> memory(plan->device_bytes());
  std::pair<std::vector<float>, std::vector<float>> result;
  for (int i = 0; i < 2; ++i) {
    const DeviceArray<float> output(rows * problem.value_dim), lse(rows);
    Status status = i == 0 ? plan->put(memory.data(), nullptr) : Status::ok();
    if (status) {
      status = plan->attend(problem.queries.data, problem.query_positions, output.data(), lse.data(), nullptr);
    }
    if (!status) throw std::runtime_error(status.to_string());
    const auto before = std::exchange(result, std::pair(output.get(), lse.get()));
    if (i > 0 && before != result) throw std::runtime_error("two runs differ");
  }
  return result;
}

/// A copy on the device of everything that a problem points to, rows and sections.
class DeviceProblem {
 public:
  explicit DeviceProblem(const AttendProblem& host) : problem(host), queries_(host.queries) {
    const HeadRows& queries = host.queries;
    problem.queries = queries_.view();
    if (host.query_positions != nullptr) problem.query_positions = copy(host.query_positions, queries.tokens);
    for (const auto& segments : host.heads) {
      auto& of_head = segments_.emplace_back(segments.begin(), segments.end());
      for (AttendSegment& segment : of_head) {
        segment.keys = copy(segment.keys, segment.entries, queries.dim);
        segment.values = copy(segment.values, segment.entries, host.value_dim);
        if (segment.bias != nullptr) segment.bias = copy(segment.bias, segment.entries);
        if (segment.positions != nullptr) segment.positions = copy(segment.positions, segment.entries);
      }
    }
    heads_.assign(segments_.begin(), segments_.end());
    problem.heads = heads_;
  }
  DeviceProblem(const DeviceProblem&) = delete;
  DeviceProblem& operator=(const DeviceProblem&) = delete;

  std::pair<std::vector<float>, std::vector<float>> run(std::uint32_t piece_entries = 0) const {
    return run_plan(problem, piece_entries);
  }

  AttendProblem problem;

 private:
  template <typename T>
  const T* copy(const T* from, std::size_t count) {
    auto& array = memory_.emplace_back(count * sizeof(T));
    if (count != 0) array.put(0, reinterpret_cast<const std::byte*>(from), count * sizeof(T));
    return reinterpret_cast<const T*>(array.data());
  }
  AttendRows copy(AttendRows rows, std::uint32_t entries, std::uint32_t dim) {
    rows.data = copy(rows.data, extent(rows, entries, dim));
    if (rows.index != nullptr) rows.index = copy(rows.index, entries);
    if (rows.lengths != nullptr) rows.lengths = copy(rows.lengths, entries);
    return rows;
  }
  static std::size_t extent(const AttendRows& rows, std::uint32_t entries, std::uint32_t dim) {
    if (const auto* form = std::get_if<quantise::Form>(&rows.section)) return form->section_bytes();
    if (const auto* form = std::get_if<int8::Form>(&rows.section)) return form->section_bytes();
    if (entries == 0) return 0;
    const std::uint32_t last =
        rows.index == nullptr ? entries - 1 : *std::max_element(rows.index, rows.index + entries);
    return last * rows.stride_bytes + dim * dtype_bytes(rows.dtype);
  }

  DeviceRows queries_;
  /// Arrays do not move.
  std::list<DeviceArray<std::byte>> memory_;
  std::vector<std::vector<AttendSegment>> segments_;
  std::vector<std::span<const AttendSegment>> heads_;
};

}  // namespace kvern
