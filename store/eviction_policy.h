#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

namespace kvern {

/// Decides what leaves first. Knows chunks by their number only. Not thread-safe: the store's lock is held.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  virtual std::string_view name() const = 0;
  virtual void inserted(std::uint32_t chunk, std::uint64_t bytes) = 0;
  virtual void touched(std::uint32_t chunk) = 0;
  virtual void erased(std::uint32_t chunk) = 0;
  /// Up to count victims, best first. They stay known to the policy until erased(); a victim that could not be taken
  /// (leased, claimed) is reported by skipped(), so that the next call does not name it first again.
  virtual std::vector<std::uint32_t> victims(std::size_t count) = 0;
  virtual void skipped(std::uint32_t chunk) = 0;
};

std::unique_ptr<EvictionPolicy> make_lru_policy();

}  // namespace kvern
