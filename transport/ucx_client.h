#pragma once

#include <memory>

#include "transport/ucx_module.h"

namespace kvern::ucx {

Result<std::unique_ptr<DataPlane>> connect(const UcxClientConfig& config);

}  // namespace kvern::ucx
