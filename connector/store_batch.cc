#include "connector/store_batch.h"

#include <bit>
#include <utility>

#include "base/clock.h"
#include "connector/shard_message.h"
#include "kernels/checksum.h"
#include "kernels/container.h"
#include "transport/wire.h"

namespace kvern {
namespace {

/// How long after its deadline the daemon's answer is awaited.
constexpr std::chrono::milliseconds kAnswerGrace{2000};

static_assert(std::endian::native == std::endian::little, "checksums travel as little-endian bytes");

void abandon(const Session& session, std::span<const std::uint64_t> reservations, std::chrono::milliseconds timeout) {
  if (reservations.empty()) return;
  wire::HotRequest request;
  request.mutable_abandon()->mutable_reservation_ids()->Add(reservations.begin(), reservations.end());
  wire::HotReply reply;
  // Reservations of a session that is gone are gone as well.
  static_cast<void>(session.channel->call(request, &reply, timeout));
}

wire::HotRequest reserve_request(const StoreContext& context, std::span<const std::uint32_t> chunks) {
  const GroupPages& pages = context.pages;
  wire::HotRequest request;
  request.set_traceparent(context.job.traceparent);
  wire::Reserve* body = request.mutable_reserve();
  body->set_namespace_id(context.namespace_id.bytes.data(), context.namespace_id.bytes.size());
  body->set_group(pages.group);
  body->set_hash_bytes(static_cast<std::uint32_t>(context.job.chunks[chunks.front()].hashes.front().size()));
  body->set_block_tokens(pages.block_tokens);
  body->set_group_layers(pages.group_layers);
  body->set_model_heads(pages.model_heads);
  body->set_codec_spec(context.job.codec_spec);
  describe_shard(pages.shape(1), body->mutable_shard());
  for (const std::uint32_t index : chunks) {
    const StoreChunk& chunk = context.job.chunks[index];
    wire::ReserveItem* item = body->add_items();
    item->set_position(chunk.position);
    if (chunk.previous) item->set_previous_block(chunk.previous->bytes().data(), chunk.previous->size());
    for (const BlockHash& hash : chunk.hashes) {
      item->mutable_block_hashes()->append(reinterpret_cast<const char*>(hash.bytes().data()), hash.size());
    }
  }
  return request;
}

/// A chunk in staging, and on its way to the daemon where that is elsewhere.
struct PushedChunk {
  GatheredChunk chunk;
  std::size_t bytes = 0;
  std::unique_ptr<Transfer> transfer;
};

/// Of each plane of the canonical layout, in the order layer, part, head.
void take_checksums(const ShardShape& shape, std::span<const std::byte> canonical, std::span<std::uint64_t> checksums) {
  std::size_t plane = 0;
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        checksums[plane++] =
            fast_checksum64(canonical.data() + shape.plane_offset(layer, part, head), shape.plane_bytes(part));
      }
    }
  }
}

Result<PushedChunk> gather_chunk(const StoreContext& context, std::uint32_t index, const wire::ReservedItem& item) {
  const StoreChunk& chunk = context.job.chunks[index];
  const ShardShape shape = context.pages.shape(static_cast<std::uint32_t>(chunk.block_ids.size()));
  const std::size_t bytes = shape.raw_bytes();
  if (item.extent().bytes() < bytes) return failure(Code::kInvalid, "the daemon reserved less than the chunk needs");
  auto staging = context.session.data_plane->staging(item.extent().offset(), bytes);
  if (!staging) return failure(staging.error());
  GatheredChunk gathered{index, item.reservation_id(), std::vector<std::uint64_t>(plane_count(shape))};
  if (context.device == nullptr) {
    gather(context.pages, chunk.block_ids, *staging, gathered.plane_checksums);
  } else {
    const Status copied = context.device->with_coder([&](PageCoder& coder) {
      return coder.gather(context.device->cache(), chunk.block_ids, staging->first(bytes));
    });
    if (!copied) return failure(copied);
    take_checksums(shape, *staging, gathered.plane_checksums);
  }
  auto transfer = context.session.data_plane->start_push(item.reservation_id(), item.extent().offset(), bytes);
  return PushedChunk{std::move(gathered), bytes, std::move(transfer)};
}

}  // namespace

Status check_chunk(const StoreChunk& chunk, const GroupPages& pages) {
  if (chunk.hashes.empty() || chunk.hashes.size() != chunk.block_ids.size()) {
    return {Code::kInvalid, "a chunk needs as many block ids as block hashes, and at least one"};
  }
  for (const BlockHash& hash : chunk.hashes) {
    if (hash.size() == 0 || hash.size() != chunk.hashes.front().size()) {
      return {Code::kInvalid, "the block hashes of a chunk must have one length"};
    }
  }
  for (const std::uint32_t id : chunk.block_ids) {
    if (id == 0) return {Code::kInvalid, "block 0 is the null block: leave it out"};
    if (!pages.has_block(id)) {
      return {Code::kInvalid, "block " + std::to_string(id) + " lies outside of the registered pages"};
    }
  }
  return Status::ok();
}

Status gather_batch(const StoreContext& context, std::span<const std::uint32_t> chunks,
                    std::chrono::milliseconds timeout, GatheredBatch* batch) {
  wire::HotRequest request = reserve_request(context, chunks);
  wire::HotReply reply;
  Status status = context.session.channel->call(request, &reply, timeout);
  if (status) status = to_status(reply.status());
  if (!status) return status;
  const auto& items = reply.reserved().items();
  if (static_cast<std::size_t>(items.size()) != chunks.size()) {
    return {Code::kInvalid, "the daemon answered for another number of chunks than were asked for"};
  }
  std::vector<std::uint64_t> unused;
  std::vector<PushedChunk> pushed;
  for (int i = 0; i < items.size(); ++i) {
    const wire::ReservedItem& item = items[i];
    const std::uint32_t index = chunks[static_cast<std::size_t>(i)];
    switch (item.outcome()) {
      case wire::RESERVED:
        if (auto chunk = status ? gather_chunk(context, index, item) : failure(status)) {
          pushed.push_back(*std::move(chunk));
        } else {
          status = chunk.error();
          unused.push_back(item.reservation_id());
        }
        break;
      case wire::ALREADY_STORED:
        batch->stored_before.push_back(index);
        break;
      case wire::NO_ROOM:
        batch->no_room.push_back(index);
        break;
      case wire::IN_FLIGHT:
        batch->reason = "somebody else is storing it";
        break;
      default:
        batch->reason = item.reason();
        break;
    }
  }
  for (PushedChunk& push : pushed) {
    if (const Status arrived = status_of(push.transfer->wait()); arrived) {
      batch->raw_bytes += push.bytes;
      batch->gathered.push_back(std::move(push.chunk));
    } else {
      if (status) status = arrived;
      unused.push_back(push.chunk.reservation_id);
    }
  }
  abandon(context.session, unused, timeout);
  return status;
}

Status store_pages(const StoreContext& context, std::uint64_t pages_id, std::span<const std::uint32_t> chunks,
                   std::chrono::milliseconds timeout, GatheredBatch* batch) {
  wire::HotRequest request;
  request.set_traceparent(context.job.traceparent);
  wire::StorePages* body = request.mutable_store_pages();
  body->set_pages_id(pages_id);
  *body->mutable_reserve() = std::move(*reserve_request(context, chunks).mutable_reserve());
  for (const std::uint32_t index : chunks) {
    const auto& ids = context.job.chunks[index].block_ids;
    body->add_blocks()->mutable_ids()->Add(ids.begin(), ids.end());
  }
  // No answer comes: then the daemon must not publish what it reads of pages that have been given to others.
  body->set_deadline_ns(Clock::system().now_ns() + std::chrono::nanoseconds(timeout).count());
  wire::HotReply reply;
  Status status = context.session.channel->call(request, &reply, timeout + kAnswerGrace);
  if (status) status = to_status(reply.status());
  if (!status) return status;
  const auto& items = reply.pages_stored().items();
  if (static_cast<std::size_t>(items.size()) != chunks.size()) {
    return {Code::kInvalid, "the daemon answered for another number of chunks than were asked for"};
  }
  for (int i = 0; i < items.size(); ++i) {
    const std::uint32_t index = chunks[static_cast<std::size_t>(i)];
    const Status item = to_status(items[i]);
    if (!item) {
      batch->reason = item.message();
      continue;
    }
    batch->stored_before.push_back(index);
    batch->raw_bytes +=
        context.pages.shape(static_cast<std::uint32_t>(context.job.chunks[index].block_ids.size())).raw_bytes();
  }
  return Status::ok();
}

std::vector<std::uint32_t> commit_batch(const Session& session, std::span<const GatheredChunk> gathered,
                                        const std::string& traceparent, std::chrono::milliseconds timeout,
                                        std::string* reason) {
  wire::HotRequest request;
  request.set_traceparent(traceparent);
  for (const GatheredChunk& chunk : gathered) {
    wire::CommitItem* item = request.mutable_commit()->add_items();
    item->set_reservation_id(chunk.reservation_id);
    item->set_plane_checksums(chunk.plane_checksums.data(), chunk.plane_checksums.size() * sizeof(std::uint64_t));
  }
  wire::HotReply reply;
  Status status = session.channel->call(request, &reply, timeout);
  if (status) status = to_status(reply.status());
  std::vector<std::uint32_t> stored;
  if (!status) {
    *reason = status.message();
    return stored;
  }
  const auto& items = reply.committed().items();
  for (int i = 0; i < items.size() && static_cast<std::size_t>(i) < gathered.size(); ++i) {
    if (const Status item = to_status(items[i])) {
      stored.push_back(gathered[static_cast<std::size_t>(i)].index);
    } else {
      *reason = item.message();
    }
  }
  return stored;
}

}  // namespace kvern
