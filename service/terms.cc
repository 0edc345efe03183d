#include "service/terms.h"

#include <algorithm>
#include <utility>

#include "store/ladder.h"

namespace kvern {

Result<NamespaceTerms> namespace_terms(const ServiceConfig& config, const std::map<std::string, std::string>& facts) {
  const NamespaceRule* const rule = config.rule_for(facts);
  const auto tenant_of = facts.find("tenant");
  const TenantRule* const tenant = tenant_of == facts.end() ? nullptr : config.tenant_rule(tenant_of->second);

  NamespaceTerms terms;
  terms.codec_spec = config.codec.fallback;
  std::string ladder = config.ladder.fallback;
  if (tenant != nullptr) {
    if (!tenant->ladder.empty()) ladder = tenant->ladder;
    terms.storage.max_relative_error = tenant->max_relative_error;
    terms.storage.tenant = tenant_of->second;
    terms.storage.tenant_bytes = tenant->dram_bytes;
    if (tenant->dram_share < 1) {
      const auto share = static_cast<std::uint64_t>(tenant->dram_share * static_cast<double>(config.store.dram_bytes));
      terms.storage.tenant_bytes =
          std::max<std::uint64_t>(1, tenant->dram_bytes == 0 ? share : std::min(share, tenant->dram_bytes));
    }
  }
  if (rule != nullptr) {
    if (!rule->ladder.empty()) ladder = rule->ladder;
    if (!rule->codec.empty()) {
      terms.codec_spec = rule->codec;
      ladder = kNoLadder;
    }
    terms.storage.max_relative_error = std::min(terms.storage.max_relative_error, rule->max_relative_error);
  }
  const double floor = terms.storage.max_relative_error;
  if (ladder != kNoLadder) {
    auto profile = find_ladder_profile(ladder);
    if (!profile) return failure(profile.error());
    auto made = Ladder::make(std::move(*profile), floor);
    if (!made) return failure(made.error());
    terms.codec_spec = made->rungs().front().codec_spec;
    terms.storage.ladder = std::move(*made);
  } else if (floor < 1 && !(known_error(terms.codec_spec).value_or(1) <= floor)) {
    return failure(Code::kRefused, "the configuration stores it as " + terms.codec_spec +
                                       ", which is not known to keep max_relative_error = " + std::to_string(floor) +
                                       ": name a ladder or a more exact codec");
  }
  return terms;
}

}  // namespace kvern
