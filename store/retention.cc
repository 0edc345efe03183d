#include "store/retention.h"

namespace kvern {

void Retention::put(std::uint32_t chunk, const Wish& wish) {
  remove(chunk);
  wishes_.emplace(chunk, wish);
  turns_.insert({wish.until_ns, wish.position, chunk});
  bytes_of_tenant_[wish.tenant] += wish.bytes;
  bytes_ += wish.bytes;
}

void Retention::remove(std::uint32_t chunk) {
  const auto known = wishes_.find(chunk);
  if (known == wishes_.end()) return;
  const Wish& wish = known->second;
  turns_.erase({wish.until_ns, wish.position, chunk});
  const auto tenant = bytes_of_tenant_.find(wish.tenant);
  tenant->second -= wish.bytes;
  if (tenant->second == 0) bytes_of_tenant_.erase(tenant);
  bytes_ -= wish.bytes;
  wishes_.erase(known);
}

const Retention::Wish* Retention::find(std::uint32_t chunk) const {
  const auto known = wishes_.find(chunk);
  return known == wishes_.end() ? nullptr : &known->second;
}

std::optional<std::uint32_t> Retention::first() const {
  return turns_.empty() ? std::nullopt : std::optional(turns_.begin()->chunk);
}

std::vector<std::uint32_t> Retention::all() const {
  std::vector<std::uint32_t> chunks;
  chunks.reserve(turns_.size());
  for (const Turn& turn : turns_) chunks.push_back(turn.chunk);
  return chunks;
}

std::uint64_t Retention::bytes_of(std::uint32_t tenant) const {
  const auto known = bytes_of_tenant_.find(tenant);
  return known == bytes_of_tenant_.end() ? 0 : known->second;
}

}  // namespace kvern
