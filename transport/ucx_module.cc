#include "transport/ucx_module.h"

#include "transport/ucx_client.h"
#include "transport/ucx_context.h"
#include "transport/ucx_server.h"

extern "C" __attribute__((visibility("default"))) const kvern::UcxModule* kvern_ucx_module() {
  static constexpr kvern::UcxModule kModule{kvern::kUcxModuleAbi, &kvern::ucx::version, &kvern::ucx::listen,
                                            &kvern::ucx::connect};
  return &kModule;
}
