#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/status.h"

namespace kvern {

/// The daemon's configuration: one TOML file, each key also as environment variable and flag. Later sources win:
/// default, file, KVERN_<SECTION>_<KEY>, --section.key=value. config_keys() is the one list of keys; parsing, --help,
/// --dump-config and the reference in docs/ come from it.

/// The word for "chunks stay as they were stored", where a ladder could stand.
inline constexpr std::string_view kNoLadder = "off";

/// A [[namespace]] table: how some namespaces are kept. Patterns are those of fnmatch(3) over the facts of the
/// namespace
/// ("model", "tenant", "lora", …); all of them must hold. The first rule that fits is used.
struct NamespaceRule {
  std::map<std::string, std::string> match;
  std::string codec;              ///< empty: none of its own
  std::string ladder;             ///< empty: none of its own; not together with a codec
  double max_relative_error = 1;  ///< no weaker form is stored or served
};

/// A [[tenant]] table: what the tenants whose names fit the pattern may have. The first one that fits is used.
struct TenantRule {
  std::string name;
  std::string ladder;  ///< empty: none of its own
  double max_relative_error = 1;
  std::uint64_t dram_bytes = 0;  ///< of the DRAM tier, for each such tenant; 0: no limit
  double dram_share = 1;         ///< the same as a share; of both the smaller holds
};

struct ServiceConfig {
  struct Server {
    std::string socket;  ///< set by default_socket_path() when no source names one
    std::string socket_mode = "0660";
    std::string run_dir;  ///< set by default_run_dir() when no source names one
    std::string tcp_listen;
    bool insecure = false;
    std::string server_key_file;
    std::string allowed_clients_file;
    std::string data_plane = "auto";
    std::string ucx_listen;
    std::uint64_t ucx_port = 0;
    std::string ucx_advertise;
    std::string ucx_devices;
    std::string ucx_transports;
    std::uint64_t drain_timeout_ms = 10'000;
  } server;
  struct Store {
    std::uint64_t dram_bytes = 4ULL << 30;
    std::string eviction = "reuse";
    std::uint64_t retain_percent = 25;
    bool warm_restart = true;
    std::uint64_t incomplete_ttl_seconds = 60;
    std::uint64_t chunk_capacity = 0;
    std::uint64_t index_slots = 0;
  } store;
  struct Nvme {
    std::string files;  ///< separated by commas; empty: no such tier
    std::uint64_t bytes = 64ULL << 30;
    std::string write = "through";
    std::string io = "auto";
    bool sync = true;
    std::uint64_t write_queue_bytes = 256ULL << 20;
    std::uint64_t write_bytes_per_second = 0;
  } nvme;
  struct Redis {
    std::string nodes;  ///< separated by commas; empty: no such tier
    std::string user;
    std::string password_file;
    bool tls = false;
    std::string tls_ca_file;
    std::string tls_certificate_file, tls_key_file;
    std::string prefix = "kvern";
    std::uint64_t ttl_seconds = 0;
    std::string write = "through";
    std::uint64_t write_queue_bytes = 256ULL << 20;
    std::uint64_t find_timeout_ms = 500;
    std::uint64_t timeout_ms = 5000;
  } redis;
  struct S3 {
    std::string bucket;  ///< empty: no such tier
    std::string endpoint;
    std::string region = "us-east-1";
    bool path_style = false;
    std::string access_key_id_file;
    std::string secret_access_key_file;
    std::string session_token_file;
    std::string ca_file;
    std::string proxy;
    std::string prefix = "kvern";
    std::string write = "through";
    std::uint64_t write_queue_bytes = 256ULL << 20;
    std::uint64_t part_bytes = 16ULL << 20;
    std::uint64_t find_timeout_ms = 1000;
    std::uint64_t timeout_ms = 10'000;
  } s3;
  struct Sessions {
    std::uint64_t max_sessions = 256;
    std::uint64_t staging_bytes_max = 1ULL << 30;
    std::uint64_t heartbeat_interval_ms = 1000;
    std::uint64_t timeout_ms = 10'000;
  } sessions;
  struct Pipeline {
    std::uint64_t encode_threads = 0;
    std::uint64_t device_threads = 8;  ///< H100, chunks of 32 MiB: int4 loads at 100, 118, 138 GB/s with 4, 6, 8
    std::uint64_t device_multiprocessors = 0;
    std::uint64_t max_queued = 4096;
    std::uint64_t ring_spin_us = 50;
  } pipeline;
  struct CodecChoice {
    std::string fallback = "raw";  ///< key codec.default
    std::string profiles;          ///< folder of model profiles; empty: $KVERN_PROFILES
  } codec;
  struct LadderChoice {
    std::string fallback = "off";  ///< key ladder.default
    std::uint64_t threads = 1;
    std::uint64_t free_bytes = 0;
  } ladder;
  struct Compact {
    std::string state_dir;  ///< empty: compact_state_dir() makes one in run_dir
    std::uint64_t threads = 1;
    std::uint64_t helper_threads = 3;
    std::uint64_t job_bytes = 4ULL << 30;
    std::uint64_t max_pending = 64;
    std::uint64_t max_handles = 4096;
    std::uint64_t max_ttl_seconds = std::uint64_t{7} * 86'400;
  } compact;
  std::vector<NamespaceRule> namespaces;
  std::vector<TenantRule> tenants;
  struct Metrics {
    std::string listen = "127.0.0.1:9464";
  } metrics;
  struct Log {
    std::string level = "info";
    std::string format = "text";
    std::uint64_t lines_per_second = 10;
  } log;
  struct Tracing {
    std::string endpoint;  ///< empty: no spans
    std::string service_name = "kvernd";
    std::uint64_t sample_one_in = 100;
    std::uint64_t queue_spans = 8192;
    std::uint64_t interval_ms = 1000;
    std::uint64_t timeout_ms = 5000;
    std::string headers_file;
    std::string ca_file;

    std::string url() const;  ///< the endpoint; without a path, that of OTLP
  } tracing;

  /// What no single key shows: limits that contradict each other, paths that are too long, codecs that do not exist.
  Status validate() const;
  const NamespaceRule* rule_for(const std::map<std::string, std::string>& facts) const;  ///< null: none fits
  const TenantRule* tenant_rule(const std::string& tenant) const;                        ///< null: none fits
  bool has_ladders() const;                                                              ///< some chunks may step down
  std::uint64_t demotion_free_bytes() const;  ///< 0 without ladders; derived from dram_bytes unless set
  unsigned socket_mode() const;               ///< the octal text as a number
  std::string admission_path() const;         ///< where descriptors are handed out: the socket's path and ".fds"
  std::string compact_state_dir() const;      ///< where manifests of compact caches are kept
  std::uint32_t chunk_capacity() const;       ///< derived from dram_bytes unless set
  std::uint32_t index_slots() const;          ///< derived from chunk_capacity() unless set; a power of two
  std::uint64_t encode_threads() const;       ///< one per core but one, unless set
};

/// $XDG_RUNTIME_DIR/kvern/kvernd.sock, or /run/kvern/kvernd.sock without that variable.
std::string default_socket_path();
/// /dev/shm/kvern-<uid>-<hash of the socket's path>: two daemons with different sockets never share one.
std::string default_run_dir(const std::string& socket);

enum class KeyType { kText, kFlag, kNumber, kBytes };

struct ConfigKey {
  using Slot = std::variant<std::string*, bool*, std::uint64_t*>;

  std::string_view name;  ///< "section.key"
  KeyType type;
  std::string_view unit;     ///< "ms", "bytes", …; empty: none
  std::string_view choices;  ///< "auto|shm|ucx"; empty: any
  std::uint64_t min;
  std::uint64_t max;
  std::string_view help;
  Slot (*slot)(ServiceConfig& config);

  std::string environment_name() const;  ///< KVERN_SERVER_SOCKET
  std::string type_name() const;
  /// Sets the key from text. kInvalid with a sentence that names the key.
  Status set(ServiceConfig& config, std::string_view text) const;
  std::string get(const ServiceConfig& config) const;
};
std::span<const ConfigKey> config_keys();

struct ConfigSources {
  std::optional<std::string> file;
  std::map<std::string, std::string> environment;  ///< all of it; names that are no key of ours are ignored
  std::map<std::string, std::string> flags;        ///< by key name
};
struct LoadedConfig {
  ServiceConfig config;
  std::vector<std::string> errors;  ///< "kvernd.toml:7: …"; empty: the configuration is good
};
/// Reads all sources and reports every error that it finds, not just the first.
LoadedConfig load_config(const ConfigSources& sources);
/// The same for the text of a file; file_name is for the messages.
LoadedConfig parse_config(std::string_view toml, const std::string& file_name);
/// The effective configuration as a TOML file with the documentation of each key.
std::string dump_config(const ServiceConfig& config);
/// All keys with their defaults, what they may be, and what they do, in Markdown: docs/configuration.md.
std::string config_reference();

/// "4GiB", "512 MiB", "100kB", "4096". kInvalid says what is accepted.
Result<std::uint64_t> parse_bytes(std::string_view text);
/// The largest binary unit that gives a whole number: "4GiB".
std::string format_bytes(std::uint64_t bytes);

}  // namespace kvern
