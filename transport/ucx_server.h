#pragma once

#include <memory>

#include "transport/ucx_module.h"

namespace kvern::ucx {

Result<std::unique_ptr<UcxListener>> listen(const UcxServerConfig& config, UcxServerHandler& handler);

}  // namespace kvern::ucx
