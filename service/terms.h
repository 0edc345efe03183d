#pragma once

#include <map>
#include <string>

#include "base/status.h"
#include "service/config.h"
#include "service/namespaces.h"

namespace kvern {

/// What the configuration says of the namespace with these facts (tenant included): the [[namespace]] rule that fits,
/// then the [[tenant]] one, then the defaults; of two floors the stricter one. kRefused with a sentence that names the
/// keys when they contradict each other.
Result<NamespaceTerms> namespace_terms(const ServiceConfig& config, const std::map<std::string, std::string>& facts);

}  // namespace kvern
