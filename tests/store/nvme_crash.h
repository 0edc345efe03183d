#pragma once

#include <random>
#include <string>
#include <vector>

#include "tests/store/nvme_fixture.h"

namespace kvern::testing {

/// What the victim of crash tests and those who look at what it left have in common.

inline constexpr std::uint32_t kCrashMostPages = 12;

inline NvmeConfig crash_log(const std::string& path, BlockIoKind kind) {
  NvmeConfig config = small_log(path, kind);
  config.files[0].bytes = 12 * config.region_bytes;
  config.batch_age_ns = 200'000;
  config.rewrite_share = 0.25;
  config.lock_wait_ns = kPatienceNs;  // what its predecessor had begun takes as long as the disk likes
  return config;
}

inline NvmeObject crash_object(std::mt19937_64& random) {
  const auto pages = static_cast<std::uint32_t>(1 + random() % kCrashMostPages);
  return {.prompt = random() % 60,
          .blocks = 3,
          .pages = pages,
          .namespace_number = static_cast<std::uint8_t>(1 + random() % 2),
          .version = pages};
}

inline bool is_version_of(NvmeObject object, const std::vector<std::byte>& bytes) {
  object.pages = object.version = static_cast<std::uint32_t>(bytes.size() / kTierAlignment);
  return bytes == object.content();
}

}  // namespace kvern::testing
