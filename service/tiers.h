#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "service/config.h"
#include "store/tier.h"
#include "store/tiered_store.h"

namespace kvern {

/// The tiers below DRAM that the configuration names, fastest first. clock and observer outlive them. Throws
/// std::runtime_error with a sentence when one cannot be opened; a remote one that is not reachable is no error.
std::vector<LowerTier> make_tiers(const ServiceConfig& config, const Clock& clock, TierObserver& observer);

std::string_view write_policy_name(WritePolicy policy);

/// "a,b , c" -> {"a", "b", "c"}; empty words are left out.
std::vector<std::string> split_list(std::string_view text);

}  // namespace kvern
