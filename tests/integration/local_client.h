#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/block_index.h"
#include "base/clock.h"
#include "base/keys.h"
#include "kernels/container.h"
#include "transport/admission.h"
#include "transport/channel.h"
#include "transport/control.h"
#include "transport/session_segment.h"
#include "transport/shared_memory.h"
#include "transport/wire.h"

namespace kvern::testing {

constexpr std::uint32_t kBlockTokens = 16;
constexpr std::uint32_t kBlocksPerChunk = 8;
constexpr std::uint32_t kHashBytes = 32;
constexpr std::chrono::milliseconds kCallTimeout{10'000};

inline ShardShape model_shape() {
  return {.dtype = DType::kBFloat16,
          .layer_begin = 0,
          .layers = 4,
          .head_begin = 0,
          .heads = 2,
          .tokens = kBlockTokens * kBlocksPerChunk,
          .key_dim = 64,
          .value_dim = 64};
}

inline std::map<std::string, std::string> model_facts() {
  return {{"model", "integration"},   {"weights", "0a0b"},     {"dtype", "bfloat16"}, {"kv_dtype", "bfloat16"},
          {"block_tokens", "16"},     {"chunk_tokens", "128"}, {"layers", "4"},       {"kv_heads", "2"},
          {"key_dim", "64"},          {"value_dim", "64"},     {"groups", "full:4"},  {"rope", "none"},
          {"hash_algorithm", "test"}, {"hash_seed", "0"}};
}

inline std::string block_hash(std::uint64_t prompt, std::uint64_t block) {
  std::string bytes(kHashBytes, '\x33');
  std::memcpy(bytes.data(), &prompt, sizeof prompt);
  std::memcpy(bytes.data() + sizeof prompt, &block, sizeof block);
  return bytes;
}

/// The canonical bytes of one chunk of a prompt: small numbers that differ from chunk to chunk.
inline void fill_chunk(std::span<std::byte> bytes, std::uint64_t prompt, std::uint64_t chunk) {
  std::uint64_t state = prompt * 0x9e3779b97f4a7c15ULL + chunk;
  for (std::size_t i = 0; i + 1 < bytes.size(); i += 2) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    bytes[i] = static_cast<std::byte>(state >> 56);
    bytes[i + 1] = static_cast<std::byte>(0x3e + (state >> 40) % 2);
  }
}

/// Puts decoded rows back where they were in the canonical layout.
class CanonicalSink final : public RowSink {
 public:
  CanonicalSink(const ShardShape& shape, std::span<std::byte> out) : shape_(shape), out_(out) {}
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    const std::size_t row = shape_.row_bytes(part);
    std::memcpy(out_.data() + shape_.plane_offset(layer, part, head) + token * row, rows, count * row);
  }

 private:
  ShardShape shape_;
  std::span<std::byte> out_;
};

/// A client on the daemon's host, made of the transport's parts alone, so that tests can do what a good client would
/// not.
class LocalClient {
 public:
  static Result<std::unique_ptr<LocalClient>> connect(const std::string& socket, const std::string& name,
                                                      std::uint64_t staging_bytes = 4U << 20) {
    std::unique_ptr<LocalClient> client(new LocalClient(socket));
    wire::ControlRequest request;
    auto* hello = request.mutable_hello();
    hello->mutable_versions()->set_protocol(kProtocolVersion);
    hello->mutable_versions()->set_container(kContainerVersion);
    hello->set_role(wire::ROLE_WORKER);
    hello->set_client_name(name);
    hello->set_staging_bytes(staging_bytes);
    wire::ControlReply reply;
    if (const Status status = client->control(request, &reply); !status) return failure(status);
    client->welcome_ = reply.welcome();
    auto admitted =
        request_admission(client->welcome_.admission_path(), client->welcome_.session_token(), kCallTimeout);
    if (!admitted) return failure(admitted.error());
    const wire::Admitted& answer = admitted->answer;
    client->connection_ = std::move(admitted->connection);
    client->slab_ = SharedMemory::map(std::move(admitted->slab), answer.slab_bytes(), false).value();
    client->index_memory_ = SharedMemory::map(std::move(admitted->index), answer.index_bytes(), false).value();
    client->segment_memory_ = SharedMemory::map(std::move(admitted->segment), answer.segment_bytes(), true).value();
    client->staging_ = SharedMemory::map(std::move(admitted->staging), answer.staging_bytes(), true).value();
    client->segment_ = SegmentView::attach(client->segment_memory_.bytes()).value();
    client->index_ = BlockIndexReader::attach(client->index_memory_.bytes());
    client->hazards_ = std::make_unique<HazardSlots>(client->segment_);
    client->doorbell_ = UniqueFd(::dup(admitted->doorbell.get()));
    client->channel_ = make_ring_channel(client->segment_, std::move(admitted->doorbell));

    wire::ControlRequest naming;
    for (const auto& [fact, value] : model_facts()) {
      auto* field = naming.mutable_register_namespace()->add_fields();
      field->set_name(fact);
      field->set_value(value);
    }
    if (const Status status = client->control(naming, &reply); !status) return failure(status);
    const std::string& id = reply.namespace_registered().namespace_id();
    std::memcpy(client->namespace_id_.bytes.data(), id.data(), id.size());
    return client;
  }

  Status control(wire::ControlRequest& request, wire::ControlReply* reply) {
    request.set_session_token(welcome_.session_token());
    const Status sent = control_->call(request, reply, kCallTimeout);
    return sent ? to_status(reply->status()) : sent;
  }
  Status heartbeat() {
    segment_.header().client_heartbeat_ns.store(Clock::system().now_ns());
    wire::ControlRequest request;
    request.mutable_heartbeat();
    wire::ControlReply reply;
    return control(request, &reply);
  }
  Status hot(wire::HotRequest& request, wire::HotReply* reply) {
    const Status sent = channel_->call(request, reply, kCallTimeout);
    return sent ? to_status(reply->status()) : sent;
  }

  Result<wire::Reserved> reserve(std::uint64_t prompt, std::uint64_t chunks, const std::string& codec = "") {
    wire::HotRequest request;
    auto* reserve = request.mutable_reserve();
    const ShardShape shape = model_shape();
    reserve->set_namespace_id(namespace_id_.bytes.data(), namespace_id_.bytes.size());
    reserve->set_hash_bytes(kHashBytes);
    reserve->set_block_tokens(kBlockTokens);
    reserve->set_group_layers(shape.layers);
    reserve->set_model_heads(shape.heads);
    reserve->set_codec_spec(codec);
    auto* shard = reserve->mutable_shard();
    shard->set_dtype(static_cast<std::uint32_t>(shape.dtype));
    shard->set_layers(shape.layers);
    shard->set_heads(shape.heads);
    shard->set_key_dim(shape.key_dim);
    shard->set_value_dim(shape.value_dim);
    for (std::uint64_t chunk = 0; chunk < chunks; ++chunk) {
      auto* item = reserve->add_items();
      for (std::uint64_t block = 0; block < kBlocksPerChunk; ++block) {
        item->mutable_block_hashes()->append(block_hash(prompt, chunk * kBlocksPerChunk + block));
      }
      item->set_position(chunk * shape.tokens);
    }
    wire::HotReply reply;
    if (const Status status = hot(request, &reply); !status) return failure(status);
    return reply.reserved();
  }

  /// Fills one reserved extent; the item of a Commit.
  wire::CommitItem write(const wire::ReservedItem& reserved, std::uint64_t prompt, std::uint64_t chunk) {
    const ShardShape shape = model_shape();
    const auto canonical = staging_.bytes().subspan(reserved.extent().offset(), shape.raw_bytes());
    fill_chunk(canonical, prompt, chunk);
    wire::CommitItem item;
    item.set_reservation_id(reserved.reservation_id());
    for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
      for (const Part part : {Part::kKey, Part::kValue}) {
        for (std::uint32_t head = 0; head < shape.heads; ++head) {
          const std::uint64_t sum =
              checksum64(canonical.data() + shape.plane_offset(layer, part, head), shape.plane_bytes(part));
          item.mutable_plane_checksums()->append(reinterpret_cast<const char*>(&sum), sizeof sum);
        }
      }
    }
    return item;
  }

  /// Reserves, writes and commits chunks 0 .. chunks-1 of the prompt, one after the other where staging is small. The
  /// first failure.
  Status store(std::uint64_t prompt, std::uint64_t chunks, const std::string& codec = "") {
    const auto reserved = reserve(prompt, chunks, codec);
    if (!reserved) return reserved.error();
    wire::HotRequest request;
    for (int i = 0; i < reserved->items_size(); ++i) {
      const auto& item = reserved->items(i);
      if (item.outcome() == wire::ALREADY_STORED) continue;
      if (item.outcome() != wire::RESERVED)
        return {Code::kBusy, wire::Reservation_Name(item.outcome()) + " " + item.reason()};
      *request.mutable_commit()->add_items() = write(item, prompt, static_cast<std::uint64_t>(i));
    }
    if (!request.has_commit()) return Status::ok();
    wire::HotReply reply;
    if (const Status status = hot(request, &reply); !status) return status;
    for (const auto& each : reply.committed().items()) {
      if (const Status status = to_status(each); !status) return status;
    }
    return Status::ok();
  }

  /// A wish to keep the first chunks of the prompt.
  Result<wire::Retained> retain(std::uint64_t prompt, std::uint64_t chunks, std::uint64_t seconds) {
    wire::HotRequest request;
    auto* retain = request.mutable_retain();
    retain->set_namespace_id(namespace_id_.bytes.data(), namespace_id_.bytes.size());
    retain->set_hash_bytes(kHashBytes);
    retain->set_retain_seconds(seconds);
    for (std::uint64_t block = 0; block < chunks * kBlocksPerChunk; ++block) {
      retain->mutable_block_hashes()->append(block_hash(prompt, block));
    }
    wire::HotReply reply;
    if (const Status status = hot(request, &reply); !status) return failure(status);
    return reply.retained();
  }

  Result<wire::FetchedItem> fetch(std::uint64_t prompt, std::uint64_t block) {
    wire::HotRequest request;
    request.mutable_fetch()->set_namespace_id(namespace_id_.bytes.data(), namespace_id_.bytes.size());
    request.mutable_fetch()->add_items()->set_block_hash(block_hash(prompt, block));
    wire::HotReply reply;
    if (const Status status = hot(request, &reply); !status) return failure(status);
    const auto& item = reply.fetched().items(0);
    if (const Status status = to_status(item.status()); !status) return failure(status);
    return item;
  }

  /// Fetches, verifies and decodes the chunk with the block; releases it. The canonical bytes.
  Result<std::vector<std::byte>> load(std::uint64_t prompt, std::uint64_t block) {
    const auto item = fetch(prompt, block);
    if (!item) return failure(item.error());
    const ShardShape shape = model_shape();
    std::vector<std::byte> canonical(shape.raw_bytes());
    CanonicalSink sink(shape, canonical);
    Status status;
    for (const auto& where : item->shards()) {
      const auto reader = ContainerReader::parse(slab_.bytes().subspan(where.offset(), where.bytes()));
      if (!reader) return failure(reader.error());
      status = reader->decode(0, shape.layers, 0, shape.heads, {.begin = 0, .end = shape.tokens}, sink);
      if (!status) return failure(status);
    }
    wire::HotRequest release;
    release.mutable_release()->add_lease_ids(item->lease_id());
    wire::HotReply reply;
    if (status = hot(release, &reply); !status) return failure(status);
    return canonical;
  }

  /// Whether the chunk comes back bit for bit.
  Status load_and_compare(std::uint64_t prompt, std::uint64_t chunk) {
    const auto loaded = load(prompt, chunk * kBlocksPerChunk);
    if (!loaded) return loaded.error();
    std::vector<std::byte> expected(loaded->size());
    fill_chunk(expected, prompt, chunk);
    return *loaded == expected ? Status::ok() : Status(Code::kCorrupt, "the bytes are others");
  }

  std::uint64_t fingerprint(std::uint64_t prompt, std::uint64_t block) const {
    const std::string hash = block_hash(prompt, block);
    return block_fingerprint(namespace_id_, 0, {reinterpret_cast<const std::uint8_t*>(hash.data()), hash.size()});
  }

  const wire::Welcome& welcome() const { return welcome_; }
  const NamespaceId& namespace_id() const { return namespace_id_; }
  const BlockIndexReader& index() const { return *index_; }
  HazardSlots& hazards() { return *hazards_; }
  SegmentView& segment() { return segment_; }
  std::span<std::byte> staging() const { return staging_.bytes(); }
  Channel& channel() { return *channel_; }
  /// Wakes the daemon's ring thread without having sent anything.
  void ring_doorbell() const {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(doorbell_.get(), &one, sizeof one);
  }
  SessionState state() const { return static_cast<SessionState>(segment_.header().state.load()); }

 private:
  explicit LocalClient(const std::string& socket)
      : control_(std::make_unique<ControlClient>(
            ControlClientConfig{.endpoint = "ipc://" + socket, .server_key = {}, .client_keys = {}})) {}

  std::unique_ptr<ControlClient> control_;
  wire::Welcome welcome_;
  UniqueFd connection_, doorbell_;
  SharedMemory slab_, index_memory_, segment_memory_, staging_;
  SegmentView segment_;
  std::optional<BlockIndexReader> index_;
  std::unique_ptr<HazardSlots> hazards_;
  std::unique_ptr<Channel> channel_;
  NamespaceId namespace_id_;
};

}  // namespace kvern::testing
