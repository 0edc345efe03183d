#include "connector/probe_engine.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "base/clock.h"
#include "base/keys.h"

namespace kvern {
namespace {

constexpr std::uint32_t kHashBytes = 32;
constexpr std::uint32_t kProbeTokens = 256;
constexpr std::size_t kPageAlignment = 4096;

double seconds_since(std::int64_t start_ns) { return static_cast<double>(Clock::system().now_ns() - start_ns) * 1e-9; }

std::uint64_t mix(std::uint64_t value) {
  value += 0x9E3779B97F4A7C15ULL;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ULL;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBULL;
  return value ^ (value >> 31);
}

/// Element i of the contents that a seed gives: finite, between -4 and 4, exact in every dtype.
float element(std::uint64_t seed, std::uint64_t i) {
  return static_cast<float>(static_cast<std::int64_t>(mix(seed ^ mix(i)) % 257) - 128) / 32.0F;
}

/// NOLINTNEXTLINE(readability-identifier-naming)
std::uint16_t to_bfloat16(float value) { return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16); }
float from_bfloat16(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

}  // namespace

std::uint64_t ProbeShape::chunk_bytes() const {
  return std::uint64_t{layers} * 2 * heads * head_dim * block_tokens * chunk_blocks * dtype_bytes(dtype);
}

ProbeShape ProbeShape::of_chunk_bytes(std::uint64_t bytes, PagePacking packing) {
  ProbeShape shape;
  shape.packing = packing;
  shape.layers = 1;
  shape.chunk_blocks = kProbeTokens / shape.block_tokens;
  shape.layers = static_cast<std::uint32_t>(std::max<std::uint64_t>(1, bytes / shape.chunk_bytes()));
  return shape;
}

ProbeEngine::ProbeEngine(const ProbeShape& shape) : shape_(shape) {
  const std::uint64_t pages = std::uint64_t{shape.chunks} * shape.chunk_blocks + 1;  // page 0 is the null block
  pages_bytes_ = pages * page_bytes() * shape.layers;
  pages_ = std::shared_ptr<std::byte[]>(
      new (std::align_val_t{kPageAlignment}) std::byte[pages_bytes_](),
      [](std::byte* memory) { operator delete[](memory, std::align_val_t{kPageAlignment}); });
}

std::uint64_t ProbeEngine::page_bytes() const {
  return std::uint64_t{2} * shape_.heads * shape_.head_dim * shape_.block_tokens * dtype_bytes(shape_.dtype);
}

GroupPages ProbeEngine::group_pages() {
  const std::uint64_t element_bytes = dtype_bytes(shape_.dtype);
  GroupPages group;
  group.packing = shape_.packing;
  group.dtype = shape_.dtype;
  group.block_tokens = shape_.block_tokens;
  group.heads = shape_.heads;
  group.model_heads = shape_.heads;
  group.group_layers = shape_.layers;
  group.key_dim = shape_.head_dim;
  group.value_dim = shape_.head_dim;
  const std::uint32_t pages = shape_.chunks * shape_.chunk_blocks + 1;
  for (std::uint32_t layer = 0; layer < shape_.layers; ++layer) {
    LayerPages lies;
    lies.base = pages_.get() + std::uint64_t{layer} * pages * page_bytes();
    lies.reachable_bytes = pages * page_bytes();
    lies.pages = pages;
    lies.page_stride_bytes = page_bytes();
    lies.head_stride_bytes = page_bytes() / shape_.heads;
    lies.token_stride_bytes = std::uint64_t{2} * shape_.head_dim * element_bytes;
    lies.value_offset_bytes = std::uint64_t{shape_.head_dim} * element_bytes;
    group.layers.push_back(lies);
  }
  return group;
}

Result<std::unique_ptr<ProbeEngine>> ProbeEngine::start(const ClientConfig& address, const ProbeShape& shape,
                                                        std::uint32_t timeout_ms) {
  std::unique_ptr<ProbeEngine> engine(new ProbeEngine(shape));
  NamespaceSpec names;
  names.fields = {{"model", "kvern-probe"},
                  {"weights", to_hex(std::vector<std::uint8_t>{0})},
                  {"dtype", std::string(dtype_name(shape.dtype))},
                  {"kv_dtype", std::string(dtype_name(shape.dtype))},
                  {"block_tokens", std::to_string(shape.block_tokens)},
                  {"chunk_tokens", std::to_string(shape.block_tokens * shape.chunk_blocks)},
                  {"hash_algorithm", "probe"},
                  {"hash_seed", "00"},
                  {"layers", std::to_string(shape.layers)},
                  {"kv_heads", std::to_string(shape.heads)},
                  {"key_dim", std::to_string(shape.head_dim)},
                  {"value_dim", std::to_string(shape.head_dim)},
                  {"groups", "full:" + std::to_string(shape.layers)},
                  {"rope", "none"},
                  {"extra.probe", std::to_string(std::random_device{}()) + "-" + std::to_string(getpid())}};
  const auto connect = [&](bool scheduler, int* handle) -> Result<std::shared_ptr<Client>> {
    ClientConfig config = address;
    config.scheduler = scheduler;
    config.client_name += scheduler ? " probe-scheduler" : " probe-worker";
    if (const Status valid = config.validate(); !valid) return failure(valid);
    auto client = std::make_shared<Client>(config);
    *handle = client->add_namespace(names);
    if (!client->wait_ready(timeout_ms)) {
      return failure(Code::kUnavailable,
                     client->problem().empty() ? "no answer from " + address.address : client->problem());
    }
    const auto session = client->session();
    const auto index = static_cast<std::size_t>(*handle);
    if (!session || session->namespace_ids.size() <= index || !session->namespace_ids[index]) {
      return failure(Code::kRefused, session && session->refusals.size() > index ? session->refusals[index]
                                                                                 : "the session ended at once");
    }
    return client;
  };
  auto scheduler = connect(true, &engine->scheduler_namespace_);
  if (!scheduler) return failure(scheduler.error());
  auto worker = connect(false, &engine->worker_namespace_);
  if (!worker) return failure(worker.error());
  engine->scheduler_client_ = *scheduler;
  engine->worker_client_ = *worker;

  MatcherConfig matcher;
  matcher.block_tokens = shape.block_tokens;
  matcher.chunk_blocks = shape.chunk_blocks;
  matcher.groups = {GroupWindow{}};
  engine->matcher_ = std::make_unique<PrefixMatcher>(engine->scheduler_client_, matcher);
  engine->worker_ = std::make_unique<TransferWorker>(engine->worker_client_, WorkerConfig{});
  if (const Status status = engine->worker_->register_group(engine->group_pages()); !status) return failure(status);
  return engine;
}

std::string ProbeEngine::hashes(std::uint64_t prompt, std::uint32_t chunks) const {
  std::string joined;
  joined.reserve(std::size_t{chunks} * shape_.chunk_blocks * kHashBytes);
  for (std::uint64_t block = 0; block < std::uint64_t{chunks} * shape_.chunk_blocks; ++block) {
    for (std::uint64_t word = 0; word < kHashBytes / 8; ++word) {
      const std::uint64_t value = mix(mix(prompt) ^ (block * 4 + word));
      joined.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
  }
  return joined;
}

void ProbeEngine::fill_chunk(std::uint32_t chunk, std::uint64_t seed, std::byte* pages) const {
  const std::uint64_t all_pages = std::uint64_t{shape_.chunks} * shape_.chunk_blocks + 1;
  const std::uint64_t elements = page_bytes() / dtype_bytes(shape_.dtype);
  for (std::uint32_t layer = 0; layer < shape_.layers; ++layer) {
    for (std::uint32_t block = 0; block < shape_.chunk_blocks; ++block) {
      const std::uint64_t page = 1 + std::uint64_t{chunk} * shape_.chunk_blocks + block;
      std::byte* out = pages + (layer * all_pages + page) * page_bytes();
      const std::uint64_t first = (std::uint64_t{layer} * shape_.chunk_blocks + block) * elements;
      for (std::uint64_t i = 0; i < elements; ++i) {
        const float value = element(seed + chunk, first + i);
        if (shape_.dtype == DType::kFloat32) {
          std::memcpy(out + i * 4, &value, 4);
        } else {
          const std::uint16_t bits = to_bfloat16(value);
          std::memcpy(out + i * 2, &bits, 2);
        }
      }
    }
  }
}

void ProbeEngine::fill_pages(std::uint64_t seed) {
  for (std::uint32_t chunk = 0; chunk < shape_.chunks; ++chunk) fill_chunk(chunk, seed, pages_.get());
}

void ProbeEngine::clear_pages() { std::memset(pages_.get(), 0, pages_bytes_); }

bool ProbeEngine::pages_equal(std::uint32_t chunk, std::uint64_t seed) const {
  return largest_relative_difference(chunk, seed) == 0.0;
}

double ProbeEngine::largest_relative_difference(std::uint32_t chunk, std::uint64_t seed) const {
  std::vector<std::byte> expected(pages_bytes_);
  fill_chunk(chunk, seed, expected.data());
  const std::uint64_t all_pages = std::uint64_t{shape_.chunks} * shape_.chunk_blocks + 1;
  double difference = 0;
  double magnitude = 0;
  const auto value_at = [this](const std::byte* memory) {
    if (shape_.dtype == DType::kFloat32) {
      float value = 0;
      std::memcpy(&value, memory, 4);
      return double{value};
    }
    std::uint16_t bits = 0;
    std::memcpy(&bits, memory, 2);
    return double{from_bfloat16(bits)};
  };
  for (std::uint32_t layer = 0; layer < shape_.layers; ++layer) {
    const std::uint64_t begin = (layer * all_pages + 1 + std::uint64_t{chunk} * shape_.chunk_blocks) * page_bytes();
    for (std::uint64_t at = begin; at < begin + shape_.chunk_blocks * page_bytes(); at += dtype_bytes(shape_.dtype)) {
      const double want = value_at(expected.data() + at);
      const double got = value_at(pages_.get() + at);
      if (!std::isfinite(got)) return std::numeric_limits<double>::infinity();
      difference = std::max(difference, std::abs(want - got));
      magnitude = std::max(magnitude, std::abs(want));
    }
  }
  return magnitude > 0 ? difference / magnitude : difference;
}

std::vector<JobResult> ProbeEngine::wait_for(std::uint64_t job, std::uint32_t timeout_ms) {
  std::vector<JobResult> results;
  const std::int64_t start_ns = Clock::system().now_ns();
  while (seconds_since(start_ns) * 1000 < timeout_ms) {
    for (auto& result : worker_->poll()) {
      if (result.id != job) continue;
      results.push_back(std::move(result));
      if (results.back().event != JobEvent::kGathered) return results;
    }
    std::this_thread::yield();
  }
  return results;
}

ProbeEngine::StoreTimes ProbeEngine::store(std::uint64_t prompt, std::uint32_t first, std::uint32_t count,
                                           const std::string& codec, std::uint32_t timeout_ms) {
  const std::string joined = hashes(prompt, first + count);
  StoreJob job;
  job.id = next_job_++;
  job.namespace_handle = worker_namespace_;
  job.codec_spec = codec;
  for (std::uint32_t chunk = first; chunk < first + count; ++chunk) {
    StoreChunk piece;
    piece.position = std::uint64_t{chunk} * shape_.chunk_blocks * shape_.block_tokens;
    for (std::uint32_t block = 0; block < shape_.chunk_blocks; ++block) {
      const std::size_t at = (std::size_t{chunk} * shape_.chunk_blocks + block) * kHashBytes;
      piece.hashes.emplace_back(
          std::span(reinterpret_cast<const std::uint8_t*>(joined.data() + at), std::size_t{kHashBytes}));
      piece.block_ids.push_back(1 + (chunk % shape_.chunks) * shape_.chunk_blocks + block);
    }
    job.chunks.push_back(std::move(piece));
  }
  StoreTimes times;
  times.reason = "no answer within " + std::to_string(timeout_ms) + " ms";
  const std::uint64_t id = job.id;
  worker_->submit_store(std::move(job));
  for (const auto& result : wait_for(id, timeout_ms)) {
    if (result.event == JobEvent::kGathered) times.gathered_seconds = result.seconds;
    if (result.event != JobEvent::kStored) continue;
    times.stored_seconds = result.seconds;
    times.stored_chunks = static_cast<std::uint32_t>(result.stored_chunks.size());
    times.reason = result.reason;
  }
  return times;
}

PrefixMatcher::Answer ProbeEngine::match(std::uint64_t prompt, std::uint32_t chunks) {
  return match_hashes(prompt, hashes(prompt, chunks));
}

PrefixMatcher::Answer ProbeEngine::match_hashes(std::uint64_t prompt, const std::string& joined) {
  const auto tokens = static_cast<std::uint32_t>(joined.size() / kHashBytes * shape_.block_tokens);
  while (true) {
    auto answer =
        matcher_->match(std::to_string(prompt), scheduler_namespace_, joined, kHashBytes, 0, tokens, tokens + 1);
    if (answer.known) return answer;
    std::this_thread::yield();
  }
}

void ProbeEngine::release(std::uint64_t prompt) { matcher_->release(std::to_string(prompt)); }

ProbeEngine::LoadTimes ProbeEngine::load(std::uint64_t prompt, std::uint32_t first, std::uint32_t count,
                                         std::uint32_t timeout_ms) {
  const std::string joined = hashes(prompt, first + count);
  LoadJob job;
  job.id = next_job_++;
  job.namespace_handle = worker_namespace_;
  for (std::uint32_t chunk = first; chunk < first + count; ++chunk) {
    LoadPiece piece;
    for (std::uint32_t block = 0; block < shape_.chunk_blocks; ++block) {
      const std::size_t at = (std::size_t{chunk} * shape_.chunk_blocks + block) * kHashBytes;
      piece.hashes.emplace_back(
          std::span(reinterpret_cast<const std::uint8_t*>(joined.data() + at), std::size_t{kHashBytes}));
      piece.block_ids.push_back(1 + (chunk % shape_.chunks) * shape_.chunk_blocks + block);
    }
    job.pieces.push_back(std::move(piece));
  }
  LoadTimes times;
  times.reason = "no answer within " + std::to_string(timeout_ms) + " ms";
  const std::uint64_t id = job.id;
  worker_->submit_load(std::move(job));
  for (const auto& result : wait_for(id, timeout_ms)) {
    times.seconds = result.seconds;
    times.loaded = result.event == JobEvent::kLoaded;
    times.reason = result.reason;
    times.encoded_bytes = result.encoded_bytes;
  }
  return times;
}

}  // namespace kvern
