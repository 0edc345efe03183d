#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <vector>

#include "transport/ucx_module.h"

namespace kvern {
namespace {

constexpr const char* kModuleFile = "libkvern_ucx.so";
constexpr const char* kModuleVariable = "KVERN_UCX_MODULE";

std::vector<std::filesystem::path> candidates() {
  if (const char* named = std::getenv(kModuleVariable); named != nullptr && *named != '\0') return {named};
  std::vector<std::filesystem::path> folders;
  std::error_code ignored;
  // For an extension this is its file; for a program what it was started as, which may be no path at all.
  Dl_info self{};
  if (::dladdr(reinterpret_cast<const void*>(&candidates), &self) != 0 && self.dli_fname != nullptr) {
    const std::filesystem::path file(self.dli_fname);
    if (file.has_parent_path()) folders.push_back(std::filesystem::absolute(file.parent_path(), ignored));
  }
  folders.push_back(std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path());
  std::vector<std::filesystem::path> files;
  for (const auto& folder : folders) {
    for (const char* place : {".", "../lib/kvern", "../transport"}) {
      files.push_back((folder / place / kModuleFile).lexically_normal());
    }
  }
  return files;
}

Result<const UcxModule*> load() {
  const auto paths = candidates();
  std::string looked_at;
  for (const auto& path : paths) {
    std::error_code ignored;
    if (!std::filesystem::exists(path, ignored)) {
      looked_at += (looked_at.empty() ? "" : ", ") + path.string();
      continue;
    }
    void* const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      return failure(Code::kUnavailable, std::string("UCX cannot be loaded (") + ::dlerror() +
                                             "): install UCX 1.13 or later, or keep to one host");
    }
    const auto entry = reinterpret_cast<decltype(&kvern_ucx_module)>(::dlsym(library, "kvern_ucx_module"));
    if (entry == nullptr || entry()->abi != kUcxModuleAbi) {
      return failure(Code::kRefused,
                     path.string() + " belongs to another version of Kvern: install both from one build");
    }
    return entry();
  }
  return failure(Code::kUnavailable, std::string("Kvern's UCX module is not installed (looked for ") + looked_at +
                                         "): install it, or name it in " + kModuleVariable);
}

const Result<const UcxModule*>& module() {
  static const Result<const UcxModule*> loaded = load();
  return loaded;
}

}  // namespace

struct UcxServer::State {
  std::unique_ptr<UcxListener> listener;
};

// The first three are read as soon as UCX is loaded, and 1.13 ignores what ucp_config_modify() says about the others.
void prepare_ucx_environment() {
  // The program's own crash handling stays: UCX would take SIGSEGV and others for itself.
  ::setenv("UCX_HANDLE_ERRORS", "none", 0);
  // Not on stdout, where programs write their results.
  ::setenv("UCX_LOG_FILE", "stderr", 0);
  // The ones below are no mistake on a host whose traffic goes over RDMA alone.
  ::setenv("UCX_WARN_UNUSED_ENV_VARS", "n", 0);
  // The default of 8 KiB costs three quarters of the throughput of put and get.
  ::setenv("UCX_TCP_TX_SEG_SIZE", "512k", 0);
  ::setenv("UCX_TCP_RX_SEG_SIZE", "512k", 0);
  // Or a restarted daemon waits a minute for its port.
  ::setenv("UCX_TCP_CM_REUSEADDR", "y", 0);
}

Result<std::string> ucx_version() {
  if (!module()) return failure(module().error());
  return (*module())->version();
}

UcxServer::UcxServer(const UcxServerConfig& config, UcxServerHandler& handler) : state_(std::make_unique<State>()) {
  prepare_ucx_environment();
  if (!module()) throw std::runtime_error(module().error().message());
  auto listener = (*module())->listen(config, handler);
  if (!listener) throw std::runtime_error(listener.error().message());
  state_->listener = std::move(*listener);
}

UcxServer::~UcxServer() = default;

std::uint16_t UcxServer::port() const { return state_->listener->port(); }

Result<std::unique_ptr<DataPlane>> make_ucx_data_plane(const UcxClientConfig& config) {
  if (!module()) return failure(module().error());
  return (*module())->connect(config);
}

}  // namespace kvern
