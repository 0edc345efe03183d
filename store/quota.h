#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>

#include "base/status.h"

namespace kvern {

/// Bytes per tenant. Charged before anything is allocated, so that a tenant at its limit costs the others nothing. Pure
/// bookkeeping; not thread-safe.
class TenantQuotas {
 public:
  /// limit_bytes of a tenant that has none of its own; 0: no limit.
  explicit TenantQuotas(std::uint64_t default_limit_bytes = 0) : default_limit_bytes_(default_limit_bytes) {}

  /// 0: no limit. A tenant that holds more than that keeps it, and gets nothing new before it is below.
  void set_limit(const std::string& tenant, std::uint64_t limit_bytes);
  /// kRefused, with nothing charged, when the tenant would hold more than it may.
  Status charge(const std::string& tenant, std::uint64_t bytes);
  /// Charges what is there already, whatever the limit.
  void add(const std::string& tenant, std::uint64_t bytes) { used_bytes_[tenant] += bytes; }
  /// Of bytes that were charged.
  void refund(const std::string& tenant, std::uint64_t bytes);
  /// How many of its bytes have to leave before it may store so many more; 0: none. More than it holds when it can
  /// never be.
  std::uint64_t over(const std::string& tenant, std::uint64_t bytes) const;

  std::uint64_t used(const std::string& tenant) const;
  std::uint64_t limit(const std::string& tenant) const;

 private:
  const std::uint64_t default_limit_bytes_;
  std::unordered_map<std::string, std::uint64_t> used_bytes_;
  std::unordered_map<std::string, std::uint64_t> limit_bytes_;
};

}  // namespace kvern
