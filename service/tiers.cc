#include "service/tiers.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "service/log.h"
#include "store/nvme_tier.h"
#include "store/redis_tier.h"
#include "store/s3_tier.h"

namespace kvern {
namespace {

// How long the start waits for the recovery of NVMe, to say what it found; it goes on in the background.
constexpr std::int64_t kRecoveryPatience = 200'000'000;

WritePolicy write_policy(const std::string& word) {
  return word == "through" ? WritePolicy::kThrough : word == "back" ? WritePolicy::kBack : WritePolicy::kOff;
}

BlockIoKind block_io_kind(const std::string& word) {
  return word == "io_uring" ? BlockIoKind::kUring : word == "threads" ? BlockIoKind::kThreads : BlockIoKind::kAuto;
}

std::string first_line(const std::string& file, const char* key) {
  std::ifstream in(file);
  std::string line;
  if (!std::getline(in, line) || line.empty()) {
    throw std::runtime_error(std::string(key) + ": " + file + " has no first line that could be read");
  }
  return line;
}

std::unique_ptr<Tier> make_nvme(const ServiceConfig::Nvme& config, const Clock& clock, TierObserver& observer) {
  NvmeConfig nvme;
  for (const auto& path : split_list(config.files)) nvme.files.push_back({path, config.bytes / 4096 * 4096});
  nvme.sync = config.sync;
  nvme.write_queue_bytes = config.write_queue_bytes;
  nvme.write_bytes_per_second = config.write_bytes_per_second;
  nvme.io.kind = block_io_kind(config.io);
  auto tier = std::make_unique<NvmeTier>(nvme, clock, &observer);
  for (const auto& note : tier->notes()) log_warn("note on a tier", {{"tier", "nvme"}, {"note", note}});
  log_info("tier", {{"tier", "nvme"},
                    {"files", config.files},
                    {"bytes", config.bytes * nvme.files.size()},
                    {"io", tier->io_kind()}});
  // Not registered with the kernel (BlockIoConfig::memory): that would pin the whole slab before the daemon is ready,
  // and in huge pages it gains nothing (docs/decisions/0026).
  if (const auto found = tier->recovery(kRecoveryPatience)) {
    if (!found->log.message.empty()) log_warn("note on a tier", {{"tier", "nvme"}, {"note", found->log.message}});
    if (!found->status) log_error("a tier was not recovered", {{"tier", "nvme"}, {"why", found->status.message()}});
    log_info("chunks were found in a tier",
             {{"tier", "nvme"}, {"chunks", found->objects}, {"seconds", found->seconds}});
  } else {
    log_info("a tier is still being read; what is there is found when that has ended", {{"tier", "nvme"}});
  }
  return tier;
}

std::unique_ptr<Tier> make_redis(const ServiceConfig::Redis& config, const Clock& clock, TierObserver& observer) {
  RedisTierConfig redis;
  redis.nodes = split_list(config.nodes);
  redis.user = config.user;
  if (!config.password_file.empty()) redis.password = first_line(config.password_file, "redis.password_file");
  redis.tls = config.tls;
  redis.tls_ca_file = config.tls_ca_file;
  redis.tls_certificate_file = config.tls_certificate_file;
  redis.tls_key_file = config.tls_key_file;
  redis.prefix = config.prefix;
  redis.ttl_seconds = config.ttl_seconds;
  redis.write_queue_bytes = config.write_queue_bytes;
  redis.find_timeout_ns = static_cast<std::int64_t>(config.find_timeout_ms) * 1'000'000;
  redis.operation_timeout_ns = static_cast<std::int64_t>(config.timeout_ms) * 1'000'000;
  log_info("tier", {{"tier", "redis"}, {"nodes", config.nodes}, {"prefix", config.prefix}});
  return std::make_unique<RedisTier>(std::move(redis), clock, &observer);
}

SecretSource secret(const std::string& file, const char* variable) {
  SecretSource source;
  source.file = file;
  if (file.empty() && std::getenv(variable) != nullptr) source.environment = variable;
  return source;
}

std::unique_ptr<Tier> make_s3(const ServiceConfig::S3& config, const Clock& clock, TierObserver& observer) {
  S3TierConfig s3;
  s3.bucket.bucket = config.bucket;
  s3.bucket.endpoint = config.endpoint;
  s3.bucket.region = config.region;
  s3.bucket.path_style = config.path_style;
  s3.bucket.access_key_id = secret(config.access_key_id_file, "AWS_ACCESS_KEY_ID");
  s3.bucket.secret_access_key = secret(config.secret_access_key_file, "AWS_SECRET_ACCESS_KEY");
  s3.bucket.session_token = secret(config.session_token_file, "AWS_SESSION_TOKEN");
  s3.ca_file = config.ca_file;
  s3.proxy = config.proxy;
  s3.prefix = config.prefix;
  s3.write_queue_bytes = config.write_queue_bytes;
  s3.part_bytes = config.part_bytes;
  s3.find_timeout_ns = static_cast<std::int64_t>(config.find_timeout_ms) * 1'000'000;
  s3.read_timeout_ns = static_cast<std::int64_t>(config.timeout_ms) * 1'000'000;
  log_info("tier", {{"tier", "s3"},
                    {"bucket", config.bucket},
                    {"endpoint", config.endpoint.empty() ? "AWS" : config.endpoint},
                    {"prefix", config.prefix}});
  return std::make_unique<S3Tier>(std::move(s3), clock, &observer);
}

/// Names the tier in the message of whatever goes wrong.
template <typename Make>
void add(std::vector<LowerTier>& tiers, const char* name, const std::string& write, Make make) {
  try {
    tiers.push_back({make(), write_policy(write)});
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("the ") + name + " tier: " + error.what());
  }
}

}  // namespace

std::vector<LowerTier> make_tiers(const ServiceConfig& config, const Clock& clock, TierObserver& observer) {
  std::vector<LowerTier> tiers;
  if (!config.nvme.files.empty()) {
    add(tiers, "nvme", config.nvme.write, [&] { return make_nvme(config.nvme, clock, observer); });
  }
  if (!config.redis.nodes.empty()) {
    add(tiers, "redis", config.redis.write, [&] { return make_redis(config.redis, clock, observer); });
  }
  if (!config.s3.bucket.empty()) {
    add(tiers, "s3", config.s3.write, [&] { return make_s3(config.s3, clock, observer); });
  }
  return tiers;
}

std::string_view write_policy_name(WritePolicy policy) {
  switch (policy) {
    case WritePolicy::kOff:
      return "off";
    case WritePolicy::kThrough:
      return "through";
    case WritePolicy::kBack:
      return "back";
  }
  return "unknown";
}

std::vector<std::string> split_list(std::string_view text) {
  constexpr std::string_view kSpace = " \t";
  std::vector<std::string> words;
  while (!text.empty()) {
    const auto comma = text.find(',');
    std::string_view word = text.substr(0, comma);
    text.remove_prefix(comma == std::string_view::npos ? text.size() : comma + 1);
    word.remove_prefix(std::min(word.find_first_not_of(kSpace), word.size()));
    word = word.substr(0, word.find_last_not_of(kSpace) + 1);
    if (!word.empty()) words.emplace_back(word);
  }
  return words;
}

}  // namespace kvern
