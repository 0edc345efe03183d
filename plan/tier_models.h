#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "plan/replay.h"
#include "store/demotion.h"
#include "store/eviction_policy.h"

namespace kvern::plan {

/// The DRAM tier of the replay: the real policy and the real ladder over blocks that have no bytes.
class DramModel {
 public:
  DramModel(const ReplayConfig& config, std::size_t blocks);

  bool contains(std::uint32_t block) const { return chunk_of_[block] != kNoChunk; }
  StoredForm form(std::uint32_t block) const { return demotion_.form(chunk_of_[block]); }
  double bytes(std::uint32_t block) const { return demotion_.bytes(chunk_of_[block]); }
  void use(std::uint32_t block) { policy_->touched(chunk_of_[block]); }
  /// The block continues the prompt of the parent (kNoChunk: it begins one). Makes room first. False: it is too large.
  bool insert(std::uint32_t block, std::uint32_t parent, StoredForm form);
  void link(std::uint32_t block, std::uint32_t parent);

  const Demotion& demotion() const { return demotion_; }
  std::uint64_t dropped() const { return dropped_; }

 private:
  bool make_room(double bytes);

  const double capacity_;
  const double block_bytes_;
  const std::unique_ptr<EvictionPolicy> policy_;
  Demotion demotion_;
  std::size_t ladder_;
  double used_ = 0;
  std::uint64_t dropped_ = 0;
  std::vector<std::uint32_t> chunk_of_;  // by block
  std::vector<std::uint32_t> block_of_;  // by chunk
  std::vector<std::uint32_t> spare_;
};

/// A tier below it.
class LowerModel {
 public:
  LowerModel(const LowerTierModel& config, std::size_t blocks) : config_(config), entries_(blocks) {}

  bool contains(std::uint32_t block) const { return entries_[block].bytes > 0; }
  StoredForm form(std::uint32_t block) const { return entries_[block].form; }
  double bytes(std::uint32_t block) const { return entries_[block].bytes; }
  void read(std::uint32_t block);
  /// Returns the bytes that were written, those that were written again with it.
  double write(std::uint32_t block, StoredForm form, double bytes);

 private:
  struct Entry {
    double bytes = 0;
    std::uint64_t place = 0;  ///< its last one in the queue
    StoredForm form;
    bool was_read = false;
  };
  struct Queued {
    std::uint32_t block;
    std::uint64_t place;
  };
  void append(std::uint32_t block);

  const LowerTierModel config_;
  double used_ = 0;
  std::vector<Entry> entries_;  // by block
  std::vector<Queued> queue_;   // in order; an entry that moved on left its old places behind
  std::size_t first_ = 0;
  std::uint64_t next_place_ = 1;
};

}  // namespace kvern::plan
