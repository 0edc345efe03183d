#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "connector/device_group.h"

namespace kvern::testing {

/// What plays the engine's device in device_path_test.cc.
class DevicePlayer {
 public:
  virtual ~DevicePlayer() = default;
  /// Memory of the device, as long as the player lives.
  virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void write(std::byte* device, const std::byte* host, std::size_t bytes) = 0;
  virtual void read(std::byte* host, const std::byte* device, std::size_t bytes) = 0;
  virtual std::shared_ptr<const EngineDevice> engine_device() = 0;
};

/// Kinds of memory that the program's player has; one of them, "private", cannot be shared.
std::vector<std::string> device_kinds();
/// nullptr where there is no device: the test is skipped.
std::unique_ptr<DevicePlayer> make_device_player(const std::string& kind);
/// The kvernd that reaches the player's memory.
std::string device_daemon_path();

}  // namespace kvern::testing
