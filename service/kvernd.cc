#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstring>
#include <exception>
#include <iostream>
#include <map>
#include <string>
#include <thread>

#include "kernels/align.h"
#include "service/config.h"
#include "service/daemon.h"
#include "service/log.h"
#include "transport/ucx.h"

namespace kvern {
namespace {

struct Arguments {
  std::string config_file;
  std::string check_file;
  bool dump = false;
  bool reference = false;
  std::map<std::string, std::string> flags;
};

std::map<std::string, std::string> environment() {
  std::map<std::string, std::string> result;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (const char* equals = std::strchr(*entry, '='))
      result.emplace(std::string(*entry, static_cast<std::size_t>(equals - *entry)), equals + 1);
  }
  return result;
}

int print_errors(const std::vector<std::string>& errors) {
  for (const auto& error : errors) std::cerr << error << "\n";
  return errors.empty() ? 0 : 1;
}

/// A session has two sockets and four memory files or doorbells: many sessions need more than the usual 1024
/// descriptors.
void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

sigset_t stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

int run(const ServiceConfig& config) {
  process_log().configure({.level = log_level(config.log.level),
                           .json = config.log.format == "json",
                           .lines_per_second = config.log.lines_per_second});
  raise_descriptor_limit();
  if (!config.server.ucx_listen.empty()) prepare_ucx_environment();  // before there are threads
  const sigset_t signals = stop_signals();  // blocked in all threads, since they inherit this one's mask
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  try {
    Daemon daemon(config);
    int signal = 0;
    ::sigwait(&signals, &signal);
    log_info("got a signal; a second one stops at once", {{"signal", ::strsignal(signal)}});
    std::atomic<bool> drained{false};
    std::jthread second([&] {
      int again = 0;
      ::sigwait(&signals, &again);
      if (!drained.load()) daemon.abandon();
    });
    daemon.drain();
    drained.store(true);
    ::pthread_kill(second.native_handle(), SIGINT);  // ends its wait
    second.join();
  } catch (const std::exception& error) {
    log_error("kvernd ends", {{"why", error.what()}});
    return 1;
  }
  process_log().tell_left_out(true);
  log_info("stopped");
  return 0;
}

int main(int argc, char** argv) {
  CLI::App app("kvernd: keeps the KV cache of LLM engines, compressed and shared.");
  app.set_version_flag("--version", "kvernd " KVERN_VERSION);
  Arguments arguments;
  app.add_option("--config", arguments.config_file, "TOML file to read");
  app.add_option("--check-config", arguments.check_file, "check this TOML file, explain its errors, and end");
  app.add_flag("--dump-config", arguments.dump, "print the effective configuration as a TOML file, and end");
  app.add_flag("--config-reference", arguments.reference, "print what all keys do, in Markdown, and end");
  for (const ConfigKey& key : config_keys()) {
    const std::string name(key.name);
    app.add_option_function<std::string>(
           "--" + name, [&arguments, name](const std::string& value) { arguments.flags[name] = value; },
           std::string(key.help) + " (" + key.environment_name() + ")")
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
        ->expected(0, 1)  // --metrics.listen= sets it to nothing
        ->type_name(key.type_name())
        ->group("[" + name.substr(0, name.find('.')) + "]");
  }
  CLI11_PARSE(app, argc, argv);

  if (arguments.reference) {
    std::cout << config_reference();
    return 0;
  }
  ConfigSources sources;
  if (!arguments.check_file.empty()) {
    sources.file = arguments.check_file;
  } else {
    if (!arguments.config_file.empty()) sources.file = arguments.config_file;
    sources.environment = environment();
    sources.flags = arguments.flags;
  }
  const LoadedConfig loaded = load_config(sources);
  if (!loaded.errors.empty()) return print_errors(loaded.errors);
  align::set_profile_folder(loaded.config.codec.profiles);
  if (!arguments.check_file.empty()) {
    std::cout << arguments.check_file << ": good\n";
    return 0;
  }
  if (arguments.dump) {
    std::cout << dump_config(loaded.config);
    return 0;
  }
  return run(loaded.config);
}

}  // namespace
}  // namespace kvern

int main(int argc, char** argv) { return kvern::main(argc, argv); }
