#include "plan/tier_models.h"

#include <algorithm>
#include <utility>

namespace kvern::plan {

DramModel::DramModel(const ReplayConfig& config, std::size_t blocks)
    : capacity_(config.dram_bytes),
      block_bytes_(config.block_bytes),
      policy_(std::move(*make_eviction_policy(config.policy))),
      demotion_(config.demotion),
      ladder_(demotion_.add_ladder(config.ladder)),
      chunk_of_(blocks, kNoChunk) {}

// Each step frees something, so that this ends.
bool DramModel::make_room(double bytes) {
  if (bytes > capacity_) return false;
  while (used_ + bytes > capacity_) {
    const auto step = demotion_.next(*policy_);
    if (!step) return false;
    used_ -= step->freed_bytes;
    if (step->to) {
      demotion_.stepped(step->chunk, *step->to);
      continue;
    }
    ++dropped_;
    policy_->erased(step->chunk);
    demotion_.left(step->chunk);
    chunk_of_[std::exchange(block_of_[step->chunk], kNoChunk)] = kNoChunk;
    spare_.push_back(step->chunk);
  }
  return true;
}

bool DramModel::insert(std::uint32_t block, std::uint32_t parent, StoredForm form) {
  const double bytes = block_bytes_ * demotion_.ladder(ladder_).rung(form).bytes_share;
  if (!make_room(bytes)) return false;
  if (spare_.empty()) {
    spare_.push_back(static_cast<std::uint32_t>(block_of_.size()));
    block_of_.push_back(kNoChunk);
  }
  const std::uint32_t chunk = spare_.back();
  spare_.pop_back();
  block_of_[chunk] = block;
  chunk_of_[block] = chunk;
  used_ += bytes;
  // Blocks are numbered from 0, and a fingerprint is any number.
  policy_->inserted(chunk, {.bytes = static_cast<std::uint64_t>(bytes), .fingerprint = block});
  demotion_.entered(chunk, ladder_, form, block_bytes_);
  link(block, parent);
  return true;
}

void DramModel::link(std::uint32_t block, std::uint32_t parent) {
  if (parent != kNoChunk && contains(parent)) policy_->follows(chunk_of_[block], chunk_of_[parent]);
}

void LowerModel::append(std::uint32_t block) {
  entries_[block].place = next_place_;
  queue_.push_back({block, next_place_++});
}

void LowerModel::read(std::uint32_t block) {
  entries_[block].was_read = true;
  if (config_.kind == LowerTierModel::Kind::kLru) append(block);
}

double LowerModel::write(std::uint32_t block, StoredForm form, double bytes) {
  if (contains(block) || bytes > config_.bytes) return 0;
  double written = bytes;
  entries_[block] = {.bytes = bytes, .place = 0, .form = form, .was_read = false};
  used_ += bytes;
  append(block);
  // What was read goes round once more, and then leaves all the same unless it is read again.
  while (used_ > config_.bytes) {
    const Queued oldest = queue_[first_++];
    Entry& entry = entries_[oldest.block];
    if (entry.bytes == 0 || entry.place != oldest.place) continue;
    if (config_.kind == LowerTierModel::Kind::kLog && entry.was_read) {
      entry.was_read = false;
      written += entry.bytes;
      append(oldest.block);
      continue;
    }
    used_ -= entry.bytes;
    entry = {};
  }
  return written;
}

}  // namespace kvern::plan
