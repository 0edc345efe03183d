#include "service/device_service.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "kernels/container.h"
#include "service/log.h"
#include "store/lease.h"
#include "transport/wire.h"

namespace kvern {
namespace {

constexpr int kMaxAllocations = 1024;
/// A piece usually lies in one chunk; each round finds the chunk that holds the last block which is still missing.
constexpr int kMaxRounds = 16;

Status refused(std::string why) { return {Code::kRefused, std::move(why)}; }

/// What a registration says of the shape, not yet checked.
PagedCache cache_of(const wire::RegisterDevicePages& request) {
  const wire::ShardMessage& shard = request.shard();
  return {.dtype = shard.dtype() < static_cast<std::uint32_t>(DType::kOpaqueBytes) ? static_cast<DType>(shard.dtype())
                                                                                   : DType::kOpaqueBytes,
          .block_tokens = request.block_tokens(),
          .pages_per_block = request.pages_per_block(),
          .layer_begin = shard.layer_begin(),
          .group_layers = request.group_layers(),
          .head_begin = shard.head_begin(),
          .heads = shard.heads(),
          .model_heads = request.model_heads(),
          .key_dim = shard.key_dim(),
          .value_dim = shard.value_dim(),
          .layers = {}};
}

/// Which (layer, head) of the pages have been written. Shards of several writers make up one chunk.
class Coverage {
 public:
  explicit Coverage(const PagedCache& cache)
      : cache_(cache), done_(cache.layers.size() * cache.heads, false), missing_(done_.size()) {}

  /// How many of them the shard holds that were missing until now.
  std::size_t add(const StoredShard& shard) {
    std::size_t added = 0;
    for (std::size_t layer = 0; layer < cache_.layers.size(); ++layer) {
      if (!within(cache_.layer_begin + layer, shard.layer_begin, shard.layers)) continue;
      for (std::size_t head = 0; head < cache_.heads; ++head) {
        const std::size_t cell = layer * cache_.heads + head;
        if (!within(cache_.head_begin + head, shard.head_begin, shard.heads) || done_[cell]) continue;
        done_[cell] = true;
        ++added;
      }
    }
    missing_ -= added;
    return added;
  }
  bool complete() const { return missing_ == 0; }

 private:
  static bool within(std::uint64_t value, std::uint64_t begin, std::uint64_t count) {
    return value >= begin && value < begin + count;
  }
  const PagedCache& cache_;
  std::vector<bool> done_;
  std::size_t missing_;
};

/// The container is a piece of what the pages hold.
Status check_identity(const ContainerInfo& info, const Lease& lease, const PagedCache& cache) {
  const ShardShape& shape = info.shape;
  if (info.key.namespace_id != lease.namespace_id() || info.key.group != lease.group()) {
    return {Code::kCorrupt, "the container belongs to another namespace or group"};
  }
  if (shape.dtype != cache.dtype || shape.key_dim != cache.key_dim || shape.value_dim != cache.value_dim ||
      info.block_tokens != cache.block_tokens || info.group_layers != cache.group_layers ||
      info.model_heads != cache.model_heads) {
    return refused("the stored chunk does not have the shape of the registered pages");
  }
  return Status::ok();
}

}  // namespace

Result<std::shared_ptr<Device>> DeviceService::device(const std::string& uuid) {
  const std::lock_guard lock(mutex_);
  auto& device = devices_[uuid];
  if (device) return device;
  auto access = parts_.open(uuid);
  if (!access) {
    devices_.erase(uuid);
    return failure(access.error());
  }
  device = std::make_shared<Device>(std::move(*access), parts_.threads, parts_.slab, parts_.usable_bytes);
  return device;
}

Result<std::uint64_t> DeviceService::register_pages(Session& session, const wire::RegisterDevicePages& request) {
  std::vector<UniqueFd> offered = session.take_offered();
  PagedCache cache = cache_of(request);
  if (request.allocations_size() == 0 || request.allocations_size() > kMaxAllocations) {
    return failure(Code::kInvalid, "1 to " + std::to_string(kMaxAllocations) + " allocations can be registered");
  }
  if (static_cast<std::uint32_t>(request.layers_size()) != request.shard().layers() || request.layers_size() == 0) {
    return failure(Code::kInvalid, "there must be one description per layer of the shard");
  }
  // Before anything is mapped: the sizes that the peer claims must hold what it describes.
  std::vector<std::uint64_t> reachable;
  for (const auto& layer : request.layers()) {
    if (layer.allocation() >= static_cast<std::uint32_t>(request.allocations_size())) {
      return failure(Code::kInvalid, "a layer lies in an allocation that there is not");
    }
    const std::uint64_t bytes = request.allocations(static_cast<int>(layer.allocation())).bytes();
    reachable.push_back(bytes - std::min(bytes, layer.offset()));
    cache.layers.push_back({.base = nullptr,
                            .pages = layer.pages(),
                            .page_stride_bytes = layer.page_stride_bytes(),
                            .head_stride_bytes = layer.head_stride_bytes(),
                            .token_stride_bytes = layer.token_stride_bytes(),
                            .value_offset_bytes = layer.value_offset_bytes()});
    if (layer.offset() % dtype_bytes(cache.dtype) != 0) {
      return failure(Code::kInvalid, "a layer begins in the middle of an element");
    }
  }
  if (Status status = cache.validate(reachable); !status) return failure(status);

  auto on = device(request.device());
  if (!on) return failure(on.error());
  std::vector<std::unique_ptr<ImportedMemory>> memory;
  for (const auto& allocation : request.allocations()) {
    SharedAllocation shared{.kind = static_cast<DeviceHandleKind>(allocation.kind()),
                            .bytes = allocation.bytes(),
                            .handle = allocation.handle(),
                            .descriptor = {}};
    if (shared.kind == DeviceHandleKind::kDescriptor) {
      if (allocation.offered() >= offered.size() || !offered[allocation.offered()]) {
        return failure(Code::kInvalid, "an allocation names a descriptor that was not offered");
      }
      shared.descriptor = std::move(offered[allocation.offered()]);
    }
    auto imported = (*on)->memory().import(shared);
    if (!imported) return failure(imported.error());
    memory.push_back(std::move(*imported));
  }
  // Once more, against what was really mapped.
  for (std::size_t i = 0; i < cache.layers.size(); ++i) {
    const auto& layer = request.layers(static_cast<int>(i));
    const auto bytes = memory[layer.allocation()]->bytes();
    reachable[i] = bytes.size() - std::min<std::uint64_t>(bytes.size(), layer.offset());
    cache.layers[i].base = bytes.data() + std::min<std::uint64_t>(bytes.size(), layer.offset());
  }
  if (Status status = cache.validate(reachable); !status) return failure(status);
  const auto id = session.add_pages(std::make_shared<DevicePages>(*on, std::move(cache), std::move(memory)));
  if (id) {
    log_info("pages on a device", {{"session", session.id()},
                                   {"layers", request.layers_size()},
                                   {"device", (*on)->memory().uuid()},
                                   {"allocations", request.allocations_size()}});
  }
  return id;
}

Status DeviceService::store(std::shared_ptr<DevicePages> pages, std::shared_ptr<Reservation> reservation,
                            std::vector<std::uint32_t> block_ids, std::int64_t deadline_ns, StorePipeline::Done done) {
  Device& device = pages->device();
  return device.submit(
      Device::Kind::kStore, [this, pages = std::move(pages), reservation = std::move(reservation),
                             block_ids = std::move(block_ids), deadline_ns, done = std::move(done)]() mutable {
        const ContainerInfo& info = reservation->info;
        const Codec& codec = *reservation->codec;
        const Status status = parts_.pipeline.store(*reservation, [&](std::span<std::byte> out) {
          Result<std::size_t> container = 0;
          const Status lent = pages->device().with_coder([&](PageCoder& coder) -> Status {
            auto use = pages->use();
            if (!use) return {Code::kExpired, "the session ended before its pages were read"};
            // The engine counts on its pages being read by then: what was read later may be somebody else's.
            const auto gathered = [&]() -> Status {
              use.reset();
              return is_late(deadline_ns) ? Status(Code::kUnavailable, "not finished in time") : Status::ok();
            };
            container = encode_pages(coder, pages->cache(), block_ids, codec, info, out, gathered, &parts_.encoders);
            return status_of(container);
          });
          return lent ? container : failure(lent);
        });
        if (status) {
          parts_.metrics.device_stored_bytes.Increment(static_cast<double>(info.shape.raw_bytes()));
        } else if (status.code() == Code::kInternal) {
          log_error("a chunk on a device could not be stored",
                    {{"device", pages->device().memory().uuid()}, {"why", status.message()}});
        }
        reservation.reset();
        pages.reset();
        done(status);
      });
}

Status DeviceService::load(LoadRequest request, std::function<void(const Status& status, const Loaded& loaded)> done) {
  Device& device = request.pages->device();
  return device.submit(Device::Kind::kLoad, [this, request = std::move(request), done = std::move(done)]() mutable {
    Loaded loaded;
    Status status = load_now(request, &loaded);
    if (status) {
      parts_.metrics.device_loaded_bytes.Increment(static_cast<double>(loaded.raw_bytes));
    } else if (!is_late(request.deadline_ns)) {
      // Nothing that was written in part may stay: a NaN in a page that is given to others poisons them. Once it is
      // late the client has given up, has zeroed the pages itself, and others may have them.
      const Status zeroed = request.pages->device().with_coder([&](PageCoder& coder) {
        const auto use = request.pages->use();
        return use ? coder.zero(request.pages->cache(), request.block_ids) : Status::ok();
      });
      if (!zeroed)
        log_error("pages of a failed load on a device could not be zeroed",
                  {{"device", request.pages->device().memory().uuid()}, {"why", zeroed.message()}});
    }
    request.pages.reset();
    done(status, loaded);
  });
}

bool DeviceService::is_late(std::int64_t deadline_ns) const {
  return deadline_ns != 0 && parts_.clock.now_ns() >= deadline_ns;
}

Status DeviceService::load_now(const LoadRequest& request, Loaded* loaded) {
  const auto& ids = request.block_ids;
  std::size_t begin = 0;
  std::size_t end = ids.size();
  for (int round = 0; round < kMaxRounds; ++round) {
    while (begin < end && ids[begin] == 0) ++begin;
    while (begin < end && ids[end - 1] == 0) --end;
    if (begin == end) return Status::ok();
    if (is_late(request.deadline_ns)) return {Code::kUnavailable, "not finished in time"};
    if (Status status = load_piece(request, begin, &end, loaded); !status) return status;
  }
  return {Code::kNotFound, "the blocks of one piece are spread over too many chunks"};
}

/// Loads what the chunk of the last missing block holds of [begin, end), and shortens the range by it.
Status DeviceService::load_piece(const LoadRequest& request, std::size_t begin, std::size_t* end, Loaded* loaded) {
  const PagedCache& cache = request.pages->cache();
  const BlockHash& last = request.hashes[*end - 1];
  auto pinned = parts_.store.pin(request.space->id, request.group, last, PinFor::kClaimed);
  if (!pinned) {
    parts_.metrics.missed(Miss::kEvictedBeforeLoad, request.space->shape.block_tokens);
    return pinned.error();
  }
  const auto lease = std::make_shared<Lease>(parts_.store, std::move(*pinned), request.space->id, request.group, last);
  Coverage coverage(cache);
  std::optional<std::pair<std::size_t, std::size_t>> common;  // first block in the chunk, count
  for (const StoredShard& shard : lease->chunk().shards) {
    if (coverage.add(shard) == 0) continue;
    const auto bytes = std::as_const(parts_.store).bytes(shard);
    const auto container = ContainerReader::parse(bytes);
    Status status = status_of(container);
    if (status) status = check_identity(container->info(), *lease, cache);
    if (status) {
      const auto& hashes = container->info().block_hashes;
      const auto found = std::ranges::find(hashes, last);
      if (found == hashes.end()) {
        status = {Code::kCorrupt, "the container does not hold the block that was asked for"};
      } else {
        auto first = static_cast<std::size_t>(found - hashes.begin());
        std::size_t count = 1;
        while (first > 0 && count < *end - begin && hashes[first - 1] == request.hashes[*end - 1 - count]) {
          --first;
          ++count;
        }
        if (common && *common != std::pair(first, count)) {
          status = {Code::kCorrupt, "the shards of the chunk hold different blocks"};
        }
        common = {first, count};
      }
    }
    if (status) {
      const auto ids = std::span(request.block_ids).subspan(*end - common->second, common->second);
      const PageTarget target{ids, static_cast<std::uint32_t>(common->first)};
      status = request.pages->device().with_coder([&](PageCoder& coder) -> Status {
        const auto use = request.pages->use();
        if (!use) return {Code::kExpired, "the session ended before its pages were written"};
        return decode_pages(coder, cache, target, *container, bytes, &parts_.encoders);
      });
    }
    if (status.code() == Code::kCorrupt) parts_.pipeline.verify(lease);
    if (!status) return status;
    loaded->encoded_bytes += bytes.size();
    add_codec(container->info().codec_spec, &loaded->codec_spec);
  }
  if (!coverage.complete() || !common) return {Code::kNotFound, "the stored shards do not cover this rank's heads"};
  const auto blocks = static_cast<std::uint32_t>(common->second);
  loaded->tokens += blocks * cache.block_tokens;
  loaded->raw_bytes += cache.shape(blocks).raw_bytes();
  *end -= common->second;
  return Status::ok();
}

std::vector<DeviceService::Figures> DeviceService::figures() const {
  const std::lock_guard lock(mutex_);
  std::vector<Figures> all;
  for (const auto& [uuid, device] : devices_) {
    all.push_back({.uuid = uuid, .pinned_bytes = device->pinned_bytes(), .moved = device->moved()});
  }
  return all;
}

void DeviceService::drain() {
  std::vector<std::shared_ptr<Device>> devices;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [uuid, device] : devices_) devices.push_back(device);
  }
  for (const auto& device : devices) device->drain();
}

}  // namespace kvern
