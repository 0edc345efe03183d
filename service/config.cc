#include "service/config.h"

#include <fnmatch.h>
#include <sys/un.h>
#include <unistd.h>

#include <toml++/toml.h>
#include <algorithm>
#include <bit>
#include <cctype>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <thread>

#include "base/keys.h"
#include "kernels/chain.h"
#include "store/ladder.h"

namespace kvern {
namespace {

constexpr std::uint64_t kNoLimit = UINT64_MAX;
constexpr std::uint64_t kKiB = 1024;
constexpr std::uint64_t kMiB = kKiB << 10;
constexpr std::uint64_t kGiB = kMiB << 10;
constexpr std::uint64_t kTiB = kGiB << 10;
constexpr std::string_view kAdmissionSuffix = ".fds";
// A chunk of 256 tokens takes more than this in every model that one would serve; a smaller one only fills the table
// sooner.
constexpr std::uint64_t kExpectedChunkBytes = 256 * kKiB;
constexpr std::uint64_t kMinChunkCapacity = 1U << 14;
constexpr std::uint64_t kMaxChunkCapacity = 1U << 24;
// Room for some dozen chunks of a large model while they step down; a smaller share costs hits, a larger one memory.
constexpr std::uint64_t kLadderFreeShare = 32;
// 16 blocks of 16 tokens in a chunk of 256.
constexpr std::uint64_t kExpectedBlocksPerChunk = 16;

using Config = ServiceConfig;
#define KVERN_SLOT(member) [](Config& config) -> ConfigKey::Slot { return &config.member; }

constexpr ConfigKey kKeys[] = {
    {"server.socket", KeyType::kText, "", "", 0, kNoLimit,
     "Unix socket of the control plane. Descriptors are handed out at the same path with \".fds\". Empty: "
     "$XDG_RUNTIME_DIR/kvern/kvernd.sock, or /run/kvern/kvernd.sock where that variable is not set.",
     KVERN_SLOT(server.socket)},
    {"server.socket_mode", KeyType::kText, "", "", 0, kNoLimit,
     "Permissions of both socket files, in octal: who may open them may read and write the cache.",
     KVERN_SLOT(server.socket_mode)},
    {"server.run_dir", KeyType::kText, "", "", 0, kNoLimit,
     "Folder in tmpfs for the slab and the index. Made if it is missing; removed at the end without "
     "store.warm_restart. Empty: /dev/shm/kvern-<uid>-<hash of the socket's path>.",
     KVERN_SLOT(server.run_dir)},
    {"server.tcp_listen", KeyType::kText, "", "", 0, kNoLimit,
     "Control plane for other hosts, host:port (\"*:7070\" for all addresses); empty: off.",
     KVERN_SLOT(server.tcp_listen)},
    {"server.insecure", KeyType::kFlag, "", "", 0, kNoLimit,
     "Serve TCP without keys: everybody who reaches the port may read and write the cache.",
     KVERN_SLOT(server.insecure)},
    {"server.server_key_file", KeyType::kText, "", "", 0, kNoLimit,
     "CURVE key pair of the daemon, as kvernctl keygen writes it. Needed for TCP.", KVERN_SLOT(server.server_key_file)},
    {"server.allowed_clients_file", KeyType::kText, "", "", 0, kNoLimit,
     "Lines \"name key\" or \"name key admin\": public keys that may connect over TCP. The name becomes the tenant; "
     "admin: kvernctl may ask for and flush what all tenants have.",
     KVERN_SLOT(server.allowed_clients_file)},
    {"server.data_plane", KeyType::kText, "", "auto|shm|ucx", 0, kNoLimit,
     "How bytes travel. auto: shared memory on this host, UCX to others; the other words force one.",
     KVERN_SLOT(server.data_plane)},
    {"server.ucx_listen", KeyType::kText, "", "", 0, kNoLimit,
     "Address on which UCX listens for other hosts; empty: off. UCX over TCP is not encrypted: trusted networks only.",
     KVERN_SLOT(server.ucx_listen)},
    {"server.ucx_port", KeyType::kNumber, "", "", 0, 65535, "Port of UCX; 0: chosen by the system.",
     KVERN_SLOT(server.ucx_port)},
    {"server.ucx_advertise", KeyType::kText, "", "", 0, kNoLimit,
     "Address that clients are told to use for UCX; empty: the one of ucx_listen.", KVERN_SLOT(server.ucx_advertise)},
    {"server.ucx_devices", KeyType::kText, "", "", 0, kNoLimit, "UCX_NET_DEVICES of the daemon; empty: all.",
     KVERN_SLOT(server.ucx_devices)},
    {"server.ucx_transports", KeyType::kText, "", "", 0, kNoLimit, "UCX_TLS of the daemon; empty: what UCX finds.",
     KVERN_SLOT(server.ucx_transports)},
    {"server.drain_timeout_ms", KeyType::kNumber, "ms", "", 0, 3'600'000,
     "How long a graceful stop waits for stores that were committed.", KVERN_SLOT(server.drain_timeout_ms)},

    {"store.dram_bytes", KeyType::kBytes, "bytes", "", kMiB, 256 * kTiB,
     "Size of the DRAM tier. Reserved in tmpfs in the first seconds.", KVERN_SLOT(store.dram_bytes)},
    {"store.eviction", KeyType::kText, "", "reuse|lru|s3fifo|tinylfu", 0, kNoLimit,
     "What leaves first when the tier is full; in every policy the end of a prompt leaves before its start.",
     KVERN_SLOT(store.eviction)},
    {"store.retain_percent", KeyType::kNumber, "%", "", 0, 100,
     "Share of the tier, or of its quota where that is less, in which a tenant's requests may have chunks retained "
     "(retain_seconds); 0: such wishes come to nothing.",
     KVERN_SLOT(store.retain_percent)},
    {"store.warm_restart", KeyType::kFlag, "", "", 0, kNoLimit,
     "Keep the DRAM tier in server.run_dir when the daemon ends, however it ends, and take it back at the next start.",
     KVERN_SLOT(store.warm_restart)},
    {"store.incomplete_ttl_seconds", KeyType::kNumber, "s", "", 1, 86'400,
     "A chunk of which some ranks never stored their part is dropped after this long.",
     KVERN_SLOT(store.incomplete_ttl_seconds)},
    {"store.chunk_capacity", KeyType::kNumber, "chunks", "", 0, kMaxChunkCapacity,
     "Most chunks in the tier; 0: one per 256 KiB of dram_bytes, at least 16384.", KVERN_SLOT(store.chunk_capacity)},
    {"store.index_slots", KeyType::kNumber, "blocks", "", 0, 1ULL << 31,
     "Slots of the block index, a power of two of which 3/4 are used; 0: 32 per chunk.", KVERN_SLOT(store.index_slots)},

    {"nvme.files", KeyType::kText, "", "", 0, kNoLimit,
     "The NVMe tier: files, made if they are missing, or block devices, separated by commas; empty: none.",
     KVERN_SLOT(nvme.files)},
    {"nvme.bytes", KeyType::kBytes, "bytes", "", kMiB, 1024 * kTiB, "Size of each of them, reserved at the start.",
     KVERN_SLOT(nvme.bytes)},
    {"nvme.write", KeyType::kText, "", "through|back|off", 0, kNoLimit,
     "When chunks go there. through: as soon as they are stored; back: before they leave DRAM; off: never.",
     KVERN_SLOT(nvme.write)},
    {"nvme.io", KeyType::kText, "", "auto|io_uring|threads", 0, kNoLimit,
     "How it is read and written. auto: io_uring, or threads where that is forbidden.", KVERN_SLOT(nvme.io)},
    {"nvme.sync", KeyType::kFlag, "", "", 0, kNoLimit,
     "Flush the device before a write counts as done: survives loss of power, not only of the daemon.",
     KVERN_SLOT(nvme.sync)},
    {"nvme.write_queue_bytes", KeyType::kBytes, "bytes", "", kMiB, kTiB,
     "Chunks that wait to be written are held in DRAM, so much of them; more are not written.",
     KVERN_SLOT(nvme.write_queue_bytes)},
    {"nvme.write_bytes_per_second", KeyType::kBytes, "bytes", "", 0, kTiB,
     "Spares the flash: no more than this is written; 0: no limit.", KVERN_SLOT(nvme.write_bytes_per_second)},

    {"redis.nodes", KeyType::kText, "", "", 0, kNoLimit,
     "The Redis tier: host:port of some nodes of a cluster, or of one server, separated by commas; empty: none.",
     KVERN_SLOT(redis.nodes)},
    {"redis.user", KeyType::kText, "", "", 0, kNoLimit, "Name to log in with; empty: the default user.",
     KVERN_SLOT(redis.user)},
    {"redis.password_file", KeyType::kText, "", "", 0, kNoLimit, "File whose first line is the password; empty: none.",
     KVERN_SLOT(redis.password_file)},
    {"redis.tls", KeyType::kFlag, "", "", 0, kNoLimit, "Connect with TLS.", KVERN_SLOT(redis.tls)},
    {"redis.tls_ca_file", KeyType::kText, "", "", 0, kNoLimit,
     "Certificates that servers are checked against, PEM; empty: the system's.", KVERN_SLOT(redis.tls_ca_file)},
    {"redis.tls_certificate_file", KeyType::kText, "", "", 0, kNoLimit,
     "Certificate of the daemon, PEM, where servers ask for one; empty: none.", KVERN_SLOT(redis.tls_certificate_file)},
    {"redis.tls_key_file", KeyType::kText, "", "", 0, kNoLimit, "Its private key, PEM.",
     KVERN_SLOT(redis.tls_key_file)},
    {"redis.prefix", KeyType::kText, "", "", 0, kNoLimit,
     "What all keys begin with; daemons with the same prefix share their chunks.", KVERN_SLOT(redis.prefix)},
    {"redis.ttl_seconds", KeyType::kNumber, "s", "", 0, 1ULL << 31,
     "Chunks that nobody has read for so long go; 0: never, which leaves it to the server's maxmemory-policy.",
     KVERN_SLOT(redis.ttl_seconds)},
    {"redis.write", KeyType::kText, "", "through|back|off", 0, kNoLimit, "When chunks go there, see nvme.write.",
     KVERN_SLOT(redis.write)},
    {"redis.write_queue_bytes", KeyType::kBytes, "bytes", "", kMiB, kTiB, "See nvme.write_queue_bytes.",
     KVERN_SLOT(redis.write_queue_bytes)},
    {"redis.find_timeout_ms", KeyType::kNumber, "ms", "", 10, 600'000,
     "Of asking which chunks are there; what the server has not answered by then is a miss.",
     KVERN_SLOT(redis.find_timeout_ms)},
    {"redis.timeout_ms", KeyType::kNumber, "ms", "", 10, 600'000, "Of one read or write.",
     KVERN_SLOT(redis.timeout_ms)},

    {"s3.bucket", KeyType::kText, "", "", 0, kNoLimit, "The S3 tier: name of the bucket; empty: none.",
     KVERN_SLOT(s3.bucket)},
    {"s3.endpoint", KeyType::kText, "", "", 0, kNoLimit,
     "https://host[:port] of another S3-compatible server than AWS; empty: AWS.", KVERN_SLOT(s3.endpoint)},
    {"s3.region", KeyType::kText, "", "", 0, kNoLimit, "Region that requests are signed for.", KVERN_SLOT(s3.region)},
    {"s3.path_style", KeyType::kFlag, "", "", 0, kNoLimit,
     "The bucket's name in the path, as most servers other than AWS want it, and not in the host name.",
     KVERN_SLOT(s3.path_style)},
    {"s3.access_key_id_file", KeyType::kText, "", "", 0, kNoLimit,
     "File with the access key; empty: the variable AWS_ACCESS_KEY_ID.", KVERN_SLOT(s3.access_key_id_file)},
    {"s3.secret_access_key_file", KeyType::kText, "", "", 0, kNoLimit,
     "File with the secret key; empty: the variable AWS_SECRET_ACCESS_KEY.", KVERN_SLOT(s3.secret_access_key_file)},
    {"s3.session_token_file", KeyType::kText, "", "", 0, kNoLimit,
     "File with the session token, read again now and then; empty: the variable AWS_SESSION_TOKEN, if it is set.",
     KVERN_SLOT(s3.session_token_file)},
    {"s3.ca_file", KeyType::kText, "", "", 0, kNoLimit,
     "Certificates that the server is checked against, PEM; empty: the system's.", KVERN_SLOT(s3.ca_file)},
    {"s3.proxy", KeyType::kText, "", "", 0, kNoLimit, "http://host:port of a proxy; empty: none.",
     KVERN_SLOT(s3.proxy)},
    {"s3.prefix", KeyType::kText, "", "", 0, kNoLimit,
     "What all keys begin with; daemons with the same bucket and prefix share their chunks.", KVERN_SLOT(s3.prefix)},
    {"s3.write", KeyType::kText, "", "through|back|off", 0, kNoLimit, "When chunks go there, see nvme.write.",
     KVERN_SLOT(s3.write)},
    {"s3.write_queue_bytes", KeyType::kBytes, "bytes", "", kMiB, kTiB, "See nvme.write_queue_bytes.",
     KVERN_SLOT(s3.write_queue_bytes)},
    {"s3.part_bytes", KeyType::kBytes, "bytes", "", 5 * kMiB, 5 * kGiB, "Larger chunks are uploaded in such parts.",
     KVERN_SLOT(s3.part_bytes)},
    {"s3.find_timeout_ms", KeyType::kNumber, "ms", "", 10, 600'000, "See redis.find_timeout_ms.",
     KVERN_SLOT(s3.find_timeout_ms)},
    {"s3.timeout_ms", KeyType::kNumber, "ms", "", 10, 600'000, "Of one read, with all its attempts.",
     KVERN_SLOT(s3.timeout_ms)},

    {"sessions.max_sessions", KeyType::kNumber, "", "", 1, 65'536, "Most sessions at a time.",
     KVERN_SLOT(sessions.max_sessions)},
    {"sessions.staging_bytes_max", KeyType::kBytes, "bytes", "", 4096, kTiB,
     "Most staging memory of one session; a client that asks for more gets this much.",
     KVERN_SLOT(sessions.staging_bytes_max)},
    {"sessions.heartbeat_interval_ms", KeyType::kNumber, "ms", "", 10, 600'000,
     "How often clients show that they live.", KVERN_SLOT(sessions.heartbeat_interval_ms)},
    {"sessions.timeout_ms", KeyType::kNumber, "ms", "", 20, 3'600'000,
     "A session without a sign of life for this long is expired: its leases and claims are void.",
     KVERN_SLOT(sessions.timeout_ms)},

    {"pipeline.encode_threads", KeyType::kNumber, "threads", "", 0, 1024,
     "Threads that encode; 0: one per core less one for messages.", KVERN_SLOT(pipeline.encode_threads)},
    {"pipeline.device_threads", KeyType::kNumber, "chunks", "", 1, 64,
     "Chunks under way on each GPU at a time; each takes memory there for its raw and encoded bytes.",
     KVERN_SLOT(pipeline.device_threads)},
    {"pipeline.device_multiprocessors", KeyType::kNumber, "multiprocessors", "", 0, 1024,
     "Most multiprocessors of each GPU that gather and code chunks, rounded up to what it can set apart; 0: all.",
     KVERN_SLOT(pipeline.device_multiprocessors)},
    {"pipeline.max_queued", KeyType::kNumber, "chunks", "", 1, 1'000'000,
     "Most chunks that wait for an encode thread; more are refused as busy.", KVERN_SLOT(pipeline.max_queued)},
    {"pipeline.ring_spin_us", KeyType::kNumber, "us", "", 0, 100'000,
     "How long the message thread spins after a message before it sleeps; 0 where a core is dear.",
     KVERN_SLOT(pipeline.ring_spin_us)},

    {"codec.default", KeyType::kText, "", "", 0, kNoLimit,
     "Codec of namespaces that no [[namespace]] rule and no ladder gives another.", KVERN_SLOT(codec.fallback)},
    {"codec.profiles", KeyType::kText, "", "", 0, kNoLimit,
     "Folder of the model profiles that `kvern calibrate` writes; empty: the one that $KVERN_PROFILES names.",
     KVERN_SLOT(codec.profiles)},
    {"ladder.default", KeyType::kText, "", "off|exact|balanced|compact", 0, kNoLimit,
     "Forms that chunks step down through before they are dropped. exact loses nothing; the others store int8 first; "
     "off: chunks stay as codec.default has them.",
     KVERN_SLOT(ladder.fallback)},
    {"ladder.threads", KeyType::kNumber, "threads", "", 1, 64, "Threads that make smaller forms, of idle priority.",
     KVERN_SLOT(ladder.threads)},
    {"ladder.free_bytes", KeyType::kBytes, "bytes", "", 0, kTiB,
     "Chunks step down when less of the DRAM tier is free; 0: a thirty-second of it, at most 1 GiB.",
     KVERN_SLOT(ladder.free_bytes)},

    {"compact.state_dir", KeyType::kText, "", "", 0, kNoLimit,
     "Folder for what is known of compact caches; empty: \"compact\" in server.run_dir. With a lower tier name one "
     "that "
     "survives a reboot as that does.",
     KVERN_SLOT(compact.state_dir)},
    {"compact.threads", KeyType::kNumber, "threads", "", 1, 64,
     "Threads that make compact caches, of low priority: so many are made at a time.", KVERN_SLOT(compact.threads)},
    {"compact.helper_threads", KeyType::kNumber, "threads", "", 0, 64,
     "Threads that help with each, of low priority: heads of a layer are cut side by side.",
     KVERN_SLOT(compact.helper_threads)},
    {"compact.job_bytes", KeyType::kBytes, "bytes", "", kMiB, kTiB,
     "Most memory for one of them, which holds a layer of the prompt and all slots; and for the queries of all that "
     "wait.",
     KVERN_SLOT(compact.job_bytes)},
    {"compact.max_pending", KeyType::kNumber, "", "", 1, 65'536,
     "Most compact caches that wait to be made; more are refused as busy.", KVERN_SLOT(compact.max_pending)},
    {"compact.max_handles", KeyType::kNumber, "", "", 1, 1'000'000, "Most compact caches at a time.",
     KVERN_SLOT(compact.max_handles)},
    {"compact.max_ttl_seconds", KeyType::kNumber, "s", "", 1, 1ULL << 31, "Longest life that one may ask for.",
     KVERN_SLOT(compact.max_ttl_seconds)},

    {"metrics.listen", KeyType::kText, "", "", 0, kNoLimit,
     "host:port of /metrics, /healthz and /readyz; port 0: chosen by the system; empty: off.",
     KVERN_SLOT(metrics.listen)},
    {"log.level", KeyType::kText, "", "trace|debug|info|warn|error|off", 0, kNoLimit,
     "What is logged to standard error.", KVERN_SLOT(log.level)},
    {"log.format", KeyType::kText, "", "text|json", 0, kNoLimit,
     "text: time, level, event, name=value …; json: an object a line with the same.", KVERN_SLOT(log.format)},
    {"log.lines_per_second", KeyType::kNumber, "lines", "", 0, 1'000'000,
     "Most lines of one kind of event a second; more are counted and left out; 0: no limit.",
     KVERN_SLOT(log.lines_per_second)},

    {"tracing.endpoint", KeyType::kText, "", "", 0, kNoLimit,
     "OpenTelemetry collector that gets spans by OTLP/HTTP in JSON, http://host:4318; without a path /v1/traces is "
     "meant. Empty: no spans.",
     KVERN_SLOT(tracing.endpoint)},
    {"tracing.service_name", KeyType::kText, "", "", 0, kNoLimit, "Resource attribute service.name of all spans.",
     KVERN_SLOT(tracing.service_name)},
    {"tracing.sample_one_in", KeyType::kNumber, "requests", "", 0, 1'000'000'000,
     "Requests that belong to a trace of the engine are recorded when that is; of the others one in so many; 0: none.",
     KVERN_SLOT(tracing.sample_one_in)},
    {"tracing.queue_spans", KeyType::kNumber, "spans", "", 1, 1'000'000,
     "Spans that wait for the collector, about 1 KiB each; more are dropped and counted.",
     KVERN_SLOT(tracing.queue_spans)},
    {"tracing.interval_ms", KeyType::kNumber, "ms", "", 10, 600'000,
     "How often what waits is sent; sooner when 512 spans do.", KVERN_SLOT(tracing.interval_ms)},
    {"tracing.timeout_ms", KeyType::kNumber, "ms", "", 10, 600'000, "Of one answer of the collector.",
     KVERN_SLOT(tracing.timeout_ms)},
    {"tracing.headers_file", KeyType::kText, "", "", 0, kNoLimit,
     "File with lines \"Name: value\" that go along, such as an Authorization; empty: none.",
     KVERN_SLOT(tracing.headers_file)},
    {"tracing.ca_file", KeyType::kText, "", "", 0, kNoLimit,
     "Certificates that an https collector is checked against, PEM; empty: the system's.", KVERN_SLOT(tracing.ca_file)},
};
#undef KVERN_SLOT

/// The keys of tables in arrays, for the reference.
struct RuleKey {
  std::string_view array;
  std::string_view name;
  std::string_view values;
  std::string_view help;
};
constexpr RuleKey kRuleKeys[] = {
    {"namespace", "match", "a table of patterns, as of file names",
     "Facts of the namespaces that the rule is for, such as model, lora, quantization, tenant; all must fit."},
    {"namespace", "codec", "a codec chain", "Codec of these namespaces; not together with a ladder."},
    {"namespace", "ladder", "off, exact, balanced or compact", "Forms that their chunks step down through."},
    {"namespace", "max_relative_error", "0 to 1",
     "No form with a larger error of the attention output is kept or served."},
    {"tenant", "name", "a pattern, as of file names", "The tenants that the rule is for."},
    {"tenant", "ladder", "off, exact, balanced or compact", "As in [[namespace]]."},
    {"tenant", "max_relative_error", "0 to 1", "As in [[namespace]]; of both the stricter holds."},
    {"tenant", "dram_bytes", "a size such as \"4GiB\"", "What each of these tenants may hold of the DRAM tier."},
    {"tenant", "dram_share", "above 0, at most 1", "The same as a share of the tier; of both the smaller holds."},
};

const ConfigKey* find_key(std::string_view name) {
  const auto* found = std::ranges::find(kKeys, name, &ConfigKey::name);
  return found == std::end(kKeys) ? nullptr : found;
}

bool is_one_of(std::string_view text, std::string_view choices) {
  while (true) {
    const auto bar = choices.find('|');
    if (text == choices.substr(0, bar)) return true;
    if (bar == std::string_view::npos) return false;
    choices.remove_prefix(bar + 1);
  }
}

std::optional<std::uint64_t> parse_number(std::string_view text, int base = 10) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<unsigned> parse_mode(std::string_view text) {
  const auto mode = parse_number(text, 8);
  if (!mode || *mode > 0777) return std::nullopt;
  return static_cast<unsigned>(*mode);
}

std::string toml_text(std::string_view text) {
  std::ostringstream out;
  const toml::value<std::string> value(text);
  out << toml::toml_formatter(value, toml::format_flags::none);
  return out.str();
}

std::string toml_number(double number) {
  std::ostringstream out;
  out << toml::toml_formatter(toml::value<double>(number), toml::format_flags::none);
  return out.str();
}

/// Collects "file:line: sentence" and gives them out in the order of the lines.
class FileErrors {
 public:
  explicit FileErrors(std::string file) : file_(std::move(file)) {}
  void add(const toml::source_region& where, const std::string& sentence) {
    sentences_.emplace(where.begin.line, file_ + ":" + std::to_string(where.begin.line) + ": " + sentence);
  }
  void move_to(std::vector<std::string>& errors) {
    for (auto& [line, sentence] : sentences_) errors.push_back(std::move(sentence));
  }

 private:
  const std::string file_;
  std::multimap<toml::source_index, std::string> sentences_;
};

/// The scalar as ConfigKey::set() takes it, or nullopt when its TOML type is not the key's.
std::optional<std::string> scalar_text(const toml::node& node, KeyType type) {
  if (type == KeyType::kFlag) {
    if (const auto* flag = node.as_boolean()) return flag->get() ? "true" : "false";
    return std::nullopt;
  }
  const bool number_fits = type == KeyType::kNumber || type == KeyType::kBytes;
  if (const auto* number = node.as_integer(); number && number_fits) return std::to_string(number->get());
  const bool text_fits = type == KeyType::kText || type == KeyType::kBytes;
  if (const auto* text = node.as_string(); text && text_fits) return text->get();
  return std::nullopt;
}

std::string section_names() {
  std::string names;
  std::string_view last;
  for (const ConfigKey& key : kKeys) {
    const auto section = key.name.substr(0, key.name.find('.'));
    if (section == last) continue;
    names += (names.empty() ? "[" : ", [") + std::string(section) + "]";
    last = section;
  }
  return names + ", [[namespace]] and [[tenant]]";
}

std::string key_names(std::string_view section) {
  std::string names;
  for (const ConfigKey& key : kKeys) {
    const auto dot = key.name.find('.');
    if (key.name.substr(0, dot) != section) continue;
    names += (names.empty() ? "" : ", ") + std::string(key.name.substr(dot + 1));
  }
  return names;
}

/// The keys of a table in an array such as [[namespace]]: each is read by the function of its name.
using RuleKeys = std::map<std::string_view, std::function<Status(const toml::node&)>>;

void read_table(const toml::node& node, const char* array, const RuleKeys& keys, FileErrors& errors) {
  const auto* table = node.as_table();
  if (table == nullptr) return errors.add(node.source(), std::string(array) + " must be a table");
  for (const auto& [name, value] : *table) {
    const auto key = keys.find(name.str());
    if (key == keys.end()) {
      std::string known;
      for (const auto& [each, read] : keys) known += (known.empty() ? "" : ", ") + std::string(each);
      errors.add(name.source(), std::string(array) + " has no key " + std::string(name.str()) + "; it has " + known);
    } else if (const Status read = key->second(value); !read) {
      errors.add(value.source(), read.message());
    }
  }
}

Status read_text(const toml::node& node, const std::string& key, std::string& into) {
  if (!node.is_string()) return {Code::kInvalid, key + " must be a text"};
  into = node.as_string()->get();
  return Status::ok();
}

Status read_ladder(const toml::node& node, std::string& into) {
  if (Status text = read_text(node, "ladder", into); !text || into == kNoLadder) return text;
  return status_of(find_ladder_profile(into));
}

Status read_error(const toml::node& node, double& into) {
  const auto value = node.value<double>();
  if (!value || !(*value >= 0 && *value <= 1)) {
    return {Code::kInvalid, "max_relative_error must be a number from 0 to 1"};
  }
  into = *value;
  return Status::ok();
}

Status read_bytes(const toml::node& node, const std::string& key, std::uint64_t& into) {
  const auto text = scalar_text(node, KeyType::kBytes);
  const auto bytes = text ? parse_bytes(*text) : failure(Code::kInvalid, "write a number of bytes or \"4GiB\"");
  if (!bytes) return {Code::kInvalid, key + ": " + bytes.error().message()};
  if (*bytes == 0) return {Code::kInvalid, key + " must be above 0"};
  into = *bytes;
  return Status::ok();
}

Status read_share(const toml::node& node, const std::string& key, double& into) {
  const auto value = node.value<double>();
  if (!value || !(*value > 0 && *value <= 1)) return {Code::kInvalid, key + " must be a number above 0, at most 1"};
  into = *value;
  return Status::ok();
}

void read_namespace_rule(const toml::node& node, ServiceConfig& config, FileErrors& errors) {
  NamespaceRule rule;
  const auto read_match = [&](const toml::node& value) {
    if (!value.is_table()) return Status(Code::kInvalid, "match must be a table of texts");
    for (const auto& [fact, pattern] : *value.as_table()) {
      const std::string name(fact.str());
      if (Status text = read_text(pattern, "match." + name, rule.match[name]); !text) return text;
    }
    return Status::ok();
  };
  const auto read_codec = [&](const toml::node& value) {
    if (Status text = read_text(value, "codec", rule.codec); !text) return text;
    return status_of(parse_chunk_chain(rule.codec));
  };
  read_table(
      node, "[[namespace]]",
      {{"match", read_match},
       {"codec", read_codec},
       {"ladder", [&](const toml::node& value) { return read_ladder(value, rule.ladder); }},
       {"max_relative_error", [&](const toml::node& value) { return read_error(value, rule.max_relative_error); }}},
      errors);
  if (!rule.codec.empty() && !rule.ladder.empty() && rule.ladder != kNoLadder) {
    errors.add(node.source(), "a [[namespace]] rule names a codec or a ladder, not both: a ladder has its own codecs");
  }
  if (rule.codec.empty() && rule.ladder.empty() && rule.max_relative_error >= 1) {
    errors.add(node.source(), "the [[namespace]] rule says nothing: give it a codec, a ladder or max_relative_error");
  }
  config.namespaces.push_back(std::move(rule));
}

void read_tenant_rule(const toml::node& node, ServiceConfig& config, FileErrors& errors) {
  TenantRule rule;
  read_table(
      node, "[[tenant]]",
      {{"dram_bytes", [&](const toml::node& value) { return read_bytes(value, "dram_bytes", rule.dram_bytes); }},
       {"dram_share", [&](const toml::node& value) { return read_share(value, "dram_share", rule.dram_share); }},
       {"name", [&](const toml::node& value) { return read_text(value, "name", rule.name); }},
       {"ladder", [&](const toml::node& value) { return read_ladder(value, rule.ladder); }},
       {"max_relative_error", [&](const toml::node& value) { return read_error(value, rule.max_relative_error); }}},
      errors);
  if (rule.name.empty()) return errors.add(node.source(), "the [[tenant]] rule names no tenant");
  config.tenants.push_back(std::move(rule));
}

void read_section(std::string_view section, const toml::table& table, ServiceConfig& config, FileErrors& errors) {
  for (const auto& [name, value] : table) {
    const std::string full = std::string(section) + "." + std::string(name.str());
    const ConfigKey* key = find_key(full);
    if (key == nullptr) {
      errors.add(name.source(),
                 "there is no key " + full + "; [" + std::string(section) + "] has " + key_names(section));
      continue;
    }
    const auto text = scalar_text(value, key->type);
    if (!text) {
      errors.add(value.source(), full + " must be " + key->type_name());
      continue;
    }
    if (const Status set = key->set(config, *text); !set) errors.add(value.source(), set.message());
  }
}

void read_sections(const toml::table& root, ServiceConfig& config, FileErrors& errors) {
  for (const auto& [name, value] : root) {
    if (name == "namespace" && value.is_array()) {
      for (const auto& rule : *value.as_array()) read_namespace_rule(rule, config, errors);
    } else if (name == "tenant" && value.is_array()) {
      for (const auto& rule : *value.as_array()) read_tenant_rule(rule, config, errors);
    } else if (value.is_table() && !key_names(name.str()).empty()) {
      read_section(name.str(), *value.as_table(), config, errors);
    } else {
      errors.add(name.source(), "there is no section " + std::string(name.str()) + "; there are " + section_names());
    }
  }
}

void read_file(std::string_view text, const std::string& file_name, LoadedConfig& loaded) {
  FileErrors errors(file_name);
  try {
    const toml::table root = toml::parse(text, file_name);
    read_sections(root, loaded.config, errors);
  } catch (const toml::parse_error& error) {
    errors.add(error.source(), std::string(error.description()));
  }
  errors.move_to(loaded.errors);
}

void finish(LoadedConfig& loaded) {
  auto& server = loaded.config.server;
  if (server.socket.empty()) server.socket = default_socket_path();
  if (server.run_dir.empty()) server.run_dir = default_run_dir(server.socket);
  if (!loaded.errors.empty()) return;
  if (const Status valid = loaded.config.validate(); !valid) loaded.errors.push_back(valid.message());
}

}  // namespace

std::string ConfigKey::environment_name() const {
  std::string result = "KVERN_";
  for (const char c : name) result += c == '.' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return result;
}

std::string ConfigKey::type_name() const {
  switch (type) {
    case KeyType::kText:
      return choices.empty() ? "a text" : "one of \"" + std::string(choices) + "\"";
    case KeyType::kFlag:
      return "true or false";
    case KeyType::kNumber:
      return "a whole number";
    case KeyType::kBytes:
      return "a number of bytes or a text such as \"4GiB\"";
  }
  return "";
}

Status ConfigKey::set(ServiceConfig& config, std::string_view text) const {
  const std::string key(name);
  const auto wrong = [&](const std::string& why) { return Status(Code::kInvalid, key + why); };
  const Slot target = slot(config);
  if (auto* const* flag = std::get_if<bool*>(&target)) {
    if (text != "true" && text != "false") return wrong(" must be true or false, not \"" + std::string(text) + "\"");
    **flag = text == "true";
    return Status::ok();
  }
  if (auto* const* words = std::get_if<std::string*>(&target)) {
    if (!choices.empty() && !is_one_of(text, choices)) {
      return wrong(" must be one of " + std::string(choices) + ", not \"" + std::string(text) + "\"");
    }
    **words = text;
    return Status::ok();
  }
  std::uint64_t value = 0;
  if (type == KeyType::kBytes) {
    const auto bytes = parse_bytes(text);
    if (!bytes) return wrong(": " + bytes.error().message());
    value = *bytes;
  } else {
    const auto number = parse_number(text);
    if (!number) return wrong(" must be a whole number, not \"" + std::string(text) + "\"");
    value = *number;
  }
  if (value < min || value > max) {
    const auto show = [&](std::uint64_t limit) {
      return type == KeyType::kBytes ? format_bytes(limit) : std::to_string(limit);
    };
    return wrong(" must be from " + show(min) + " to " + show(max) + ", not " + show(value));
  }
  *std::get<std::uint64_t*>(target) = value;
  return Status::ok();
}

std::string ConfigKey::get(const ServiceConfig& config) const {
  const Slot source = slot(const_cast<ServiceConfig&>(config));  // read only
  if (const auto* flag = std::get_if<bool*>(&source)) return **flag ? "true" : "false";
  if (const auto* words = std::get_if<std::string*>(&source)) return **words;
  const std::uint64_t value = *std::get<std::uint64_t*>(source);
  return type == KeyType::kBytes ? format_bytes(value) : std::to_string(value);
}

std::span<const ConfigKey> config_keys() { return kKeys; }

std::string default_socket_path() {
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  return std::string(runtime != nullptr && *runtime != '\0' ? runtime : "/run") + "/kvern/kvernd.sock";
}

std::string default_run_dir(const std::string& socket) {
  std::error_code error;
  const auto path = std::filesystem::absolute(socket, error).string();
  char hash[17];
  std::snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(checksum64(path.data(), path.size())));
  return "/dev/shm/kvern-" + std::to_string(getuid()) + "-" + hash;
}

Status ServiceConfig::validate() const {
  const auto invalid = [](std::string why) { return Status(Code::kInvalid, std::move(why)); };
  if (!parse_mode(server.socket_mode)) {
    return invalid("server.socket_mode must be octal permissions such as \"0660\", not \"" + server.socket_mode + "\"");
  }
  if (admission_path().size() >= sizeof(sockaddr_un::sun_path)) {
    return invalid("server.socket is too long: with \"" + std::string(kAdmissionSuffix) + "\" at most " +
                   std::to_string(sizeof(sockaddr_un::sun_path) - 1) + " characters fit, it has " +
                   std::to_string(admission_path().size()));
  }
  if (!server.tcp_listen.empty() && !server.insecure && server.server_key_file.empty()) {
    return invalid("server.tcp_listen needs server.server_key_file (kvernctl keygen) or insecure = true");
  }
  if (!server.tcp_listen.empty() && !server.insecure && server.allowed_clients_file.empty()) {
    return invalid("server.tcp_listen needs server.allowed_clients_file, or nobody could connect");
  }
  if (!server.tcp_listen.empty() &&
      (server.tcp_listen.rfind(':') == std::string::npos || server.tcp_listen.find("://") != std::string::npos)) {
    return invalid("server.tcp_listen must be host:port, not \"" + server.tcp_listen + "\"");
  }
  if (server.data_plane == "ucx" && server.ucx_listen.empty()) {
    return invalid("server.data_plane = \"ucx\" needs server.ucx_listen");
  }
  if (!metrics.listen.empty() && metrics.listen.rfind(':') == std::string::npos) {
    return invalid("metrics.listen must be host:port, not \"" + metrics.listen + "\"");
  }
  if (sessions.timeout_ms < 2 * sessions.heartbeat_interval_ms) {
    return invalid(
        "sessions.timeout_ms must be at least twice sessions.heartbeat_interval_ms, or one late heartbeat ends a "
        "session");
  }
  if (store.index_slots != 0 && !std::has_single_bit(store.index_slots)) {
    return invalid("store.index_slots must be a power of two, not " + std::to_string(store.index_slots));
  }
  if (const auto made = parse_chunk_chain(codec.fallback); !made)
    return invalid("codec.default: " + made.error().message());
  if (std::error_code error; !codec.profiles.empty() && !std::filesystem::is_directory(codec.profiles, error)) {
    return invalid("codec.profiles must be a folder, which \"" + codec.profiles + "\" is not");
  }
  if (compact.max_pending > compact.max_handles) {
    return invalid("compact.max_pending must not be larger than compact.max_handles: those that wait count, too");
  }
  if (!compact.state_dir.empty() && compact.state_dir == server.run_dir) {
    return invalid("compact.state_dir must be a folder of its own, not server.run_dir");
  }
  const std::string_view to = tracing.endpoint;
  const std::size_t host = to.starts_with("http://") ? 7 : to.starts_with("https://") ? 8 : 0;
  const bool named = host != 0 && to.size() > host && to[host] != '/' &&
                     std::ranges::all_of(to, [](char c) { return c > ' ' && c <= '~'; });
  if (!to.empty() && !named) {
    return invalid("tracing.endpoint must be http://host:port or https://host:port, not \"" + tracing.endpoint + "\"");
  }
  if (!to.empty() && tracing.service_name.empty()) return invalid("tracing.service_name must not be empty");
  if (demotion_free_bytes() >= store.dram_bytes) return invalid("ladder.free_bytes must be less than store.dram_bytes");
  return Status::ok();
}

std::string ServiceConfig::Tracing::url() const {
  const std::size_t path = endpoint.find('/', endpoint.find("://") + 3);
  if (path == std::string::npos) return endpoint + "/v1/traces";
  return path + 1 == endpoint.size() ? endpoint + "v1/traces" : endpoint;
}

const NamespaceRule* ServiceConfig::rule_for(const std::map<std::string, std::string>& facts) const {
  const auto found = std::ranges::find_if(namespaces, [&](const NamespaceRule& rule) {
    return std::ranges::all_of(rule.match, [&](const auto& wanted) {
      const auto fact = facts.find(wanted.first);
      return fact != facts.end() && ::fnmatch(wanted.second.c_str(), fact->second.c_str(), 0) == 0;
    });
  });
  return found == namespaces.end() ? nullptr : &*found;
}

const TenantRule* ServiceConfig::tenant_rule(const std::string& tenant) const {
  const auto found = std::ranges::find_if(
      tenants, [&](const TenantRule& rule) { return ::fnmatch(rule.name.c_str(), tenant.c_str(), 0) == 0; });
  return found == tenants.end() ? nullptr : &*found;
}

bool ServiceConfig::has_ladders() const {
  const auto steps = [](const auto& rule) { return !rule.ladder.empty() && rule.ladder != kNoLadder; };
  return ladder.fallback != kNoLadder || std::ranges::any_of(namespaces, steps) || std::ranges::any_of(tenants, steps);
}

std::uint64_t ServiceConfig::demotion_free_bytes() const {
  if (!has_ladders()) return 0;
  return ladder.free_bytes != 0 ? ladder.free_bytes : std::min(store.dram_bytes / kLadderFreeShare, kGiB);
}

unsigned ServiceConfig::socket_mode() const { return parse_mode(server.socket_mode).value_or(0600); }

std::string ServiceConfig::admission_path() const { return server.socket + std::string(kAdmissionSuffix); }

std::string ServiceConfig::compact_state_dir() const {
  return compact.state_dir.empty() ? server.run_dir + "/compact" : compact.state_dir;
}

std::uint32_t ServiceConfig::chunk_capacity() const {
  if (store.chunk_capacity != 0) return static_cast<std::uint32_t>(store.chunk_capacity);
  return static_cast<std::uint32_t>(
      std::clamp(store.dram_bytes / kExpectedChunkBytes, kMinChunkCapacity, kMaxChunkCapacity));
}

std::uint32_t ServiceConfig::index_slots() const {
  if (store.index_slots != 0) return static_cast<std::uint32_t>(store.index_slots);
  return static_cast<std::uint32_t>(std::bit_ceil(std::uint64_t{chunk_capacity()} * kExpectedBlocksPerChunk * 4 / 3));
}

std::uint64_t ServiceConfig::encode_threads() const {
  if (pipeline.encode_threads != 0) return pipeline.encode_threads;
  return std::max(1U, std::thread::hardware_concurrency() - 1);
}

LoadedConfig load_config(const ConfigSources& sources) {
  LoadedConfig loaded;
  if (sources.file) {
    std::error_code error;
    const auto status = std::filesystem::status(*sources.file, error);
    if (!std::filesystem::is_regular_file(status)) {
      loaded.errors.push_back(*sources.file +
                              ": cannot be read: " + (error ? error.message() : "it is no regular file"));
    } else {
      std::ostringstream text;
      std::ifstream file(*sources.file, std::ios::binary);
      text << file.rdbuf();
      if (!file) loaded.errors.push_back(*sources.file + ": cannot be read");
      read_file(text.str(), *sources.file, loaded);
    }
  }
  for (const ConfigKey& key : kKeys) {
    const auto found = sources.environment.find(key.environment_name());
    if (found == sources.environment.end()) continue;
    if (const Status set = key.set(loaded.config, found->second); !set) {
      loaded.errors.push_back("environment variable " + found->first + ": " + set.message());
    }
  }
  for (const auto& [name, value] : sources.flags) {
    const ConfigKey* key = find_key(name);
    const Status set = key == nullptr ? Status(Code::kInvalid, "there is no such key") : key->set(loaded.config, value);
    if (!set) loaded.errors.push_back("--" + name + ": " + set.message());
  }
  finish(loaded);
  return loaded;
}

LoadedConfig parse_config(std::string_view toml, const std::string& file_name) {
  LoadedConfig loaded;
  read_file(toml, file_name, loaded);
  finish(loaded);
  return loaded;
}

std::string dump_config(const ServiceConfig& config) {
  std::string out;
  std::string_view last;
  const ServiceConfig defaults;
  for (const ConfigKey& key : kKeys) {
    const auto dot = key.name.find('.');
    const auto section = key.name.substr(0, dot);
    if (section != last) out += (out.empty() ? "[" : "\n[") + std::string(section) + "]\n";
    last = section;
    out += "# " + std::string(key.help) + "\n# " + key.type_name();
    if (!key.unit.empty() && key.type != KeyType::kBytes) out += ", in " + std::string(key.unit);
    const bool is_text = key.type == KeyType::kText || key.type == KeyType::kBytes;
    const auto show = [&](const std::string& value) { return is_text ? toml_text(value) : value; };
    out += "; default " + show(key.get(defaults)) + "; " + key.environment_name() + "\n";
    out += std::string(key.name.substr(dot + 1)) + " = " + show(key.get(config)) + "\n";
  }
  const auto show_rule = [&](const auto& rule) {
    if (!rule.ladder.empty()) out += "ladder = " + toml_text(rule.ladder) + "\n";
    if (rule.max_relative_error < 1) out += "max_relative_error = " + toml_number(rule.max_relative_error) + "\n";
  };
  for (const NamespaceRule& rule : config.namespaces) {
    out += "\n[[namespace]]\nmatch = {";
    for (const auto& [fact, pattern] : rule.match) {
      out += (out.back() == '{' ? " " : ", ") + toml_text(fact) + " = " + toml_text(pattern);
    }
    out += " }\n";
    if (!rule.codec.empty()) out += "codec = " + toml_text(rule.codec) + "\n";
    show_rule(rule);
  }
  for (const TenantRule& rule : config.tenants) {
    out += "\n[[tenant]]\nname = " + toml_text(rule.name) + "\n";
    if (rule.dram_bytes > 0) out += "dram_bytes = " + toml_text(format_bytes(rule.dram_bytes)) + "\n";
    if (rule.dram_share < 1) out += "dram_share = " + toml_number(rule.dram_share) + "\n";
    show_rule(rule);
  }
  return out;
}

namespace {

/// A cell of a table in Markdown.
std::string cell(std::string_view text) {
  std::string result;
  for (const char c : text) {
    if (c == '|' || c == '<') result += '\\';
    result += c;
  }
  return result;
}

std::string values_of(const ConfigKey& key) {
  const auto show = [&](std::uint64_t limit) {
    return key.type == KeyType::kBytes ? format_bytes(limit) : std::to_string(limit);
  };
  switch (key.type) {
    case KeyType::kText: {
      std::string words = key.choices.empty() ? "text" : "`" + std::string(key.choices) + "`";
      for (auto bar = words.find('|'); bar != std::string::npos; bar = words.find('|')) words.replace(bar, 1, "`, `");
      return words;
    }
    case KeyType::kFlag:
      return "`true`, `false`";
    case KeyType::kNumber:
    case KeyType::kBytes:
      break;
  }
  const bool has_unit = !key.unit.empty() && key.type == KeyType::kNumber;
  return (key.max == kNoLimit ? "from " + show(key.min) : show(key.min) + " to " + show(key.max)) +
         (has_unit                      ? " " + std::string(key.unit)
          : key.type == KeyType::kBytes ? ", a size"
                                        : "");
}

}  // namespace

std::string config_reference() {
  std::string out;
  std::string_view last;
  const ServiceConfig defaults;
  for (const ConfigKey& key : kKeys) {
    const auto dot = key.name.find('.');
    const auto section = key.name.substr(0, dot);
    if (section != last) {
      out += std::string(out.empty() ? "" : "\n") + "### [" + std::string(section) +
             "]\n\n| Key | Default | Values | What it does |\n| --- | --- | --- | --- |\n";
    }
    last = section;
    const std::string value = key.get(defaults);
    out += "| `" + std::string(key.name.substr(dot + 1)) + "` | " + (value.empty() ? "empty" : "`" + value + "`") +
           " | " + values_of(key) + " | " + cell(key.help) + " |\n";
  }
  last = {};
  for (const RuleKey& key : kRuleKeys) {
    if (key.array != last) {
      out += "\n### [[" + std::string(key.array) + "]]\n\n| Key | Values | What it does |\n| --- | --- | --- |\n";
    }
    last = key.array;
    out += "| `" + std::string(key.name) + "` | " + cell(key.values) + " | " + cell(key.help) + " |\n";
  }
  return out;
}

Result<std::uint64_t> parse_bytes(std::string_view text) {
  const auto wrong = [&] {
    return failure(Code::kInvalid,
                   "\"" + std::string(text) + "\" is no size: write 4096, \"512MiB\", \"4GiB\" or \"100GB\"");
  };
  const auto digits = text.find_first_not_of("0123456789");
  const auto number = parse_number(text.substr(0, digits));
  if (!number) return wrong();
  if (digits == std::string_view::npos) return *number;
  std::string_view unit = text.substr(digits);
  while (unit.starts_with(' ')) unit.remove_prefix(1);
  constexpr std::pair<std::string_view, std::uint64_t> kUnits[] = {
      {"B", 1},     {"KiB", kKiB}, {"MiB", kMiB},     {"GiB", kGiB},         {"TiB", kTiB},
      {"kB", 1000}, {"KB", 1000},  {"MB", 1'000'000}, {"GB", 1'000'000'000}, {"TB", 1'000'000'000'000},
  };
  for (const auto& [name, factor] : kUnits) {
    if (unit != name) continue;
    if (*number > UINT64_MAX / factor) return wrong();
    return *number * factor;
  }
  return wrong();
}

std::string format_bytes(std::uint64_t bytes) {
  constexpr std::pair<std::string_view, std::uint64_t> kUnits[] = {
      {"TiB", kTiB}, {"GiB", kGiB}, {"MiB", kMiB}, {"KiB", kKiB}};
  for (const auto& [name, size] : kUnits) {
    if (bytes >= size && bytes % size == 0) return std::to_string(bytes / size) + std::string(name);
  }
  return std::to_string(bytes);
}

}  // namespace kvern
