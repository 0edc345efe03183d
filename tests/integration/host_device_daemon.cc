// kvernd with a device that is host memory (host_device.h). Takes the flags of kvernd.
#include <signal.h>

#include <cstdio>
#include <exception>
#include <string>

#include "service/config.h"
#include "service/daemon.h"
#include "tests/integration/host_device.h"

int main(int count, char** words) {
  using namespace kvern;
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ConfigSources sources;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto equals = word.find('=');
    if (!word.starts_with("--") || equals == std::string::npos) return 2;
    sources.flags[word.substr(2, equals - 2)] = word.substr(equals + 1);
  }
  const LoadedConfig loaded = load_config(sources);
  for (const auto& error : loaded.errors) std::fprintf(stderr, "%s\n", error.c_str());
  if (!loaded.errors.empty()) return 1;
  try {
    const auto memory = std::make_shared<testing::HostDevice>();
    Daemon daemon(loaded.config, [&](std::string_view uuid) -> Result<DeviceAccess> {
      if (uuid != memory->uuid()) return failure(Code::kRefused, "there is no device " + std::string(uuid));
      return DeviceAccess{.memory = memory, .make_coder = []() -> Result<std::unique_ptr<PageCoder>> {
                            return std::make_unique<testing::HostPageCoder>();
                          }};
    });
    int signal = 0;
    ::sigwait(&signals, &signal);
    daemon.drain();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
