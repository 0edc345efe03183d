#pragma once

namespace kvern {

/// True when this build has CUDA kernels and the machine has a driver and a device that run them. Never fails: without
/// a driver, without a device or in a build without CUDA it is false. The first call asks the driver, later ones
/// remember.
bool cuda_available();

}  // namespace kvern
