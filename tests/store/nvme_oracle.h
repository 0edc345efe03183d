#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "tests/store/nvme_fixture.h"

namespace kvern::testing {

/// Knows what a log may and what it must hold, from the operations that were begun, in their order, and from those that
/// ended well. Versions of one prompt differ in their number of pages. Thread-safe.
class NvmeOracle {
 public:
  /// How many bytes may be written behind an object before it may be gone; nullopt: it never may.
  explicit NvmeOracle(std::optional<std::uint64_t> kept_bytes) : kept_bytes_(kept_bytes) {}

  /// What the log of small_log() keeps for sure: all regions but the one that is written, the one before which was
  /// perhaps left early, and in each what an object, its tables and the footer may leave empty. Less what is rewritten.
  static std::uint64_t kept_bytes(const NvmeConfig& config, std::uint64_t largest_object_bytes) {
    const std::uint64_t regions = config.files[0].bytes / config.region_bytes;
    const std::uint64_t lost = largest_object_bytes + 4 * kTierAlignment;
    return static_cast<std::uint64_t>(static_cast<double>((regions - 2) * (config.region_bytes - lost)) *
                                      (1 - config.rewrite_share));
  }

  std::uint64_t begin_write(const NvmeObject& object) {
    return begin({Operation::kWrite, object, object.bytes() + 2 * kTierAlignment});
  }
  std::uint64_t begin_erase(const NvmeObject& object) { return begin({Operation::kErase, object, 2 * kTierAlignment}); }
  std::uint64_t begin_erase_namespace(std::uint8_t number) {
    return begin({Operation::kEraseNamespace, {.namespace_number = number}, 2 * kTierAlignment});
  }
  void ended_well(std::uint64_t operation) {
    std::lock_guard lock(mutex_);
    operations_[operation].ended_well = true;
  }

  /// Looks for every object that was ever written.
  ::testing::AssertionResult agrees_with(NvmeTier& tier) const {
    std::lock_guard lock(mutex_);
    std::map<std::pair<std::uint8_t, std::uint64_t>, std::vector<std::size_t>> prompts;
    for (std::size_t i = 0; i < operations_.size(); ++i) {
      const NvmeObject& object = operations_[i].object;
      if (operations_[i].kind == Operation::kWrite) prompts[{object.namespace_number, object.prompt}].push_back(i);
    }
    for (const auto& [prompt, writes] : prompts) {
      const auto result = check(tier, writes);
      if (!result) return result;
    }
    return ::testing::AssertionSuccess();
  }

 private:
  struct Operation {
    enum Kind { kWrite, kErase, kEraseNamespace };
    Kind kind;
    NvmeObject object;
    std::uint64_t log_bytes;
    bool ended_well = false;
  };

  std::uint64_t begin(Operation operation) {
    std::lock_guard lock(mutex_);
    operations_.push_back(std::move(operation));
    return operations_.size() - 1;
  }

  static bool erases(const Operation& operation, const NvmeObject& object) {
    if (operation.object.namespace_number != object.namespace_number) return false;
    return operation.kind == Operation::kEraseNamespace ||
           (operation.kind == Operation::kErase && operation.object.prompt == object.prompt);
  }

  ::testing::AssertionResult check(NvmeTier& tier, const std::vector<std::size_t>& writes) const {
    const NvmeObject& any = operations_[writes.front()].object;
    std::size_t begin = 0;        // behind the last erasure that ended well
    std::size_t maybe_begin = 0;  // behind the last one
    for (std::size_t i = 0; i < operations_.size(); ++i) {
      if (!erases(operations_[i], any)) continue;
      maybe_begin = i + 1;
      if (operations_[i].ended_well) begin = i + 1;
    }
    std::uint64_t behind = 0;
    std::size_t next = operations_.size();
    bool must = false;
    for (std::size_t i = writes.size(); i-- > 0 && writes[i] >= maybe_begin;) {
      for (; next > writes[i]; --next) behind += operations_[next - 1].log_bytes;
      must = must || (operations_[writes[i]].ended_well && (!kept_bytes_ || behind <= *kept_bytes_));
    }
    const std::string name =
        "prompt " + std::to_string(any.prompt) + " of namespace " + std::to_string(any.namespace_number);
    const TierHit hit = find(tier, any.query());
    if (hit.bytes == 0) {
      return must ? ::testing::AssertionFailure() << name << " is lost" : ::testing::AssertionSuccess();
    }
    if (!(hit.key == any.key())) return ::testing::AssertionFailure() << name << " is found under another key";
    const auto bytes = read(tier, hit);
    if (!bytes) return ::testing::AssertionFailure() << name << ": " << bytes.error().to_string();
    for (const std::size_t i : writes) {
      if (i >= begin && *bytes == operations_[i].object.content()) return ::testing::AssertionSuccess();
    }
    return ::testing::AssertionFailure() << name << " was erased, or its bytes are wrong";
  }

  const std::optional<std::uint64_t> kept_bytes_;
  mutable std::mutex mutex_;
  std::vector<Operation> operations_;
};

}  // namespace kvern::testing
