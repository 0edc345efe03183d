#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "transport/ucx.h"

namespace kvern {

/// All of Kvern that touches UCX is libkvern_ucx.so, opened by the functions of ucx.h (ucx_loader.cc) when the first of
/// them is called, and never closed. It is looked for at KVERN_UCX_MODULE, else beside the extension or program that
/// contains the loader, in ../lib/kvern from there, and in ../transport (build tree); the same beside the executable.

/// Changes with every change of the types that cross the boundary.
constexpr std::uint64_t kUcxModuleAbi = 0x4b56'5543'5800'0001;

class UcxListener {
 public:
  virtual ~UcxListener() = default;
  virtual std::uint16_t port() const = 0;
};

struct UcxModule {
  std::uint64_t abi;  ///< the first word for ever
  Result<std::string> (*version)();
  Result<std::unique_ptr<UcxListener>> (*listen)(const UcxServerConfig& config, UcxServerHandler& handler);
  Result<std::unique_ptr<DataPlane>> (*connect)(const UcxClientConfig& config);
};

}  // namespace kvern

extern "C" {
/// The one symbol of the module.
const kvern::UcxModule* kvern_ucx_module();
}
