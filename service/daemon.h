#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "service/config.h"
#include "service/device.h"

namespace kvern {

/// A whole kvernd: memory, store, sessions, servers. Ready when the constructor returns.
class Daemon {
 public:
  /// Throws std::runtime_error with a sentence when something that it needs cannot be had: another daemon serves that
  /// socket, tmpfs is too small, an address is taken.
  /// open_device: how devices are reached on which sessions register pages; none: cuda_devices().
  explicit Daemon(const ServiceConfig& config, OpenDevice open_device = {});
  /// Without drain() before: ends at once. Removes the files that it made.
  ~Daemon();

  /// Takes no new work, finishes what was committed (at most server.drain_timeout_ms) and ends the sessions. Returns
  /// early when abandon() was called from another thread or a signal handler's thread.
  void drain();
  void abandon();

  std::uint16_t http_port() const;  ///< 0: off
  std::string tcp_endpoint() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvern
