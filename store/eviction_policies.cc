#include "store/eviction_policy.h"

#include <array>
#include <string>

namespace kvern {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<EvictionPolicy> (*make)();
};
constexpr std::array kPolicies = {Entry{"lru", make_lru_policy}, Entry{"s3fifo", make_s3fifo_policy},
                                  Entry{"tinylfu", make_tinylfu_policy}, Entry{"reuse", make_reuse_policy}};
constexpr auto kNames = [] {
  std::array<std::string_view, kPolicies.size()> names;
  for (std::size_t i = 0; i < names.size(); ++i) names[i] = kPolicies[i].name;
  return names;
}();

}  // namespace

std::span<const std::string_view> eviction_policy_names() { return kNames; }

Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name) {
  std::string known;
  for (const Entry& entry : kPolicies) {
    if (entry.name == name) return entry.make();
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  return failure(Code::kInvalid, "no eviction policy is called \"" + std::string(name) + "\": use one of " + known);
}

}  // namespace kvern
