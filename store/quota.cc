#include "store/quota.h"

#include <algorithm>

namespace kvern {

void TenantQuotas::set_limit(const std::string& tenant, std::uint64_t limit_bytes) {
  limit_bytes_[tenant] = limit_bytes;
}

Status TenantQuotas::charge(const std::string& tenant, std::uint64_t bytes) {
  if (const std::uint64_t excess = over(tenant, bytes); excess > 0) {
    return {Code::kRefused, "tenant " + tenant + " holds " + std::to_string(used(tenant)) + " of " +
                                std::to_string(limit(tenant)) + " bytes: " + std::to_string(bytes) +
                                " more do not fit"};
  }
  used_bytes_[tenant] += bytes;
  return Status::ok();
}

void TenantQuotas::refund(const std::string& tenant, std::uint64_t bytes) {
  const auto found = used_bytes_.find(tenant);
  if (found == used_bytes_.end()) return;
  found->second -= std::min(found->second, bytes);
  if (found->second == 0) used_bytes_.erase(found);
}

std::uint64_t TenantQuotas::over(const std::string& tenant, std::uint64_t bytes) const {
  const std::uint64_t most = limit(tenant);
  if (most == 0 || bytes == 0) return 0;
  const std::uint64_t held = used(tenant);
  if (bytes <= most && held <= most - bytes) return 0;
  return bytes <= most ? held - (most - bytes) : held + 1;
}

std::uint64_t TenantQuotas::used(const std::string& tenant) const {
  const auto found = used_bytes_.find(tenant);
  return found == used_bytes_.end() ? 0 : found->second;
}

std::uint64_t TenantQuotas::limit(const std::string& tenant) const {
  const auto found = limit_bytes_.find(tenant);
  return found == limit_bytes_.end() ? default_limit_bytes_ : found->second;
}

}  // namespace kvern
