#include "connector/device_group.h"

#include <cstdio>
#include <utility>

#include "connector/shard_message.h"
#include "kernels/cuda/page_coder.h"
#include "transport/admission.h"
#include "transport/wire.h"

namespace kvern {
namespace {

PagedCache cache_of(const GroupPages& pages) {
  PagedCache cache{.dtype = pages.dtype,
                   .block_tokens = pages.block_tokens,
                   .pages_per_block = pages.pages_per_block,
                   .layer_begin = pages.layer_begin,
                   .group_layers = pages.group_layers,
                   .head_begin = pages.head_begin,
                   .heads = pages.heads,
                   .model_heads = pages.model_heads,
                   .key_dim = pages.key_dim,
                   .value_dim = pages.value_dim,
                   .layers = {}};
  for (const LayerPages& layer : pages.layers) {
    cache.layers.push_back({.base = layer.base,
                            .pages = layer.pages,
                            .page_stride_bytes = layer.page_stride_bytes,
                            .head_stride_bytes = layer.head_stride_bytes,
                            .token_stride_bytes = layer.token_stride_bytes,
                            .value_offset_bytes = layer.value_offset_bytes});
  }
  return cache;
}

// A daemon that did not answer in time, or has too much to do, is asked again after so long.
constexpr std::chrono::seconds kAskAgain{10};

}  // namespace

Result<std::shared_ptr<const EngineDevice>> cuda_engine_device(const std::byte* pointer) {
  auto memory = cuda_device_of(pointer);
  if (!memory) return failure(memory.error());
  const int number = (*memory)->number();
  return std::make_shared<const EngineDevice>(
      EngineDevice{.memory = std::move(*memory), .make_coder = [number] { return make_cuda_page_coder(number); }});
}

DeviceGroup::DeviceGroup(const GroupPages& pages)
    : group_(pages.group), device_(pages.device), cache_(cache_of(pages)) {
  for (const LayerPages& layer : pages.layers) reachable_.push_back(layer.reachable_bytes);
}

Result<std::uint64_t> DeviceGroup::pages_id(const Session& session, std::chrono::milliseconds timeout) {
  const std::lock_guard lock(mutex_);
  const bool known = registered_ && session_number_ == session.number;
  if (known && (*registered_ || std::chrono::steady_clock::now() < ask_again_)) return *registered_;
  auto result = register_with(session, timeout);
  // A session that is gone says nothing of the next one.
  if (!result && !session.alive()) return result;
  session_number_ = session.number;
  registered_ = result;
  const bool passes = !result && (result.error().code() == Code::kUnavailable || result.error().code() == Code::kBusy);
  ask_again_ = passes ? std::chrono::steady_clock::now() + kAskAgain : std::chrono::steady_clock::time_point::max();
  if (passes) return result;
  if (!result && !std::exchange(told_, true)) {
    std::fprintf(
        stderr, "kvern: the daemon cannot reach the pages of group %u on %s, they are copied by the engine: %s\n",
        static_cast<unsigned>(group_), std::string(device_->memory->uuid()).c_str(), result.error().message().c_str());
  }
  return result;
}

Result<std::uint64_t> DeviceGroup::register_with(const Session& session, std::chrono::milliseconds timeout) {
  if (!session.local) return failure(Code::kRefused, "the daemon is on another host");
  wire::ControlRequest request;
  request.set_session_token(session.token);
  wire::RegisterDevicePages* body = request.mutable_register_device_pages();
  body->set_device(std::string(device_->memory->uuid()));
  body->set_block_tokens(cache_.block_tokens);
  body->set_pages_per_block(cache_.pages_per_block);
  body->set_group_layers(cache_.group_layers);
  body->set_model_heads(cache_.model_heads);
  describe_shard(cache_.shape(1), body->mutable_shard());
  std::map<const std::byte*, std::uint32_t> known;  // numbers of allocations by their first byte
  std::vector<UniqueFd> descriptors;
  for (std::size_t i = 0; i < cache_.layers.size(); ++i) {
    const PagedLayer& layer = cache_.layers[i];
    auto place = device_->memory->share(layer.base, reachable_[i]);
    if (!place) return failure(place.error());
    const auto [at, is_new] =
        known.try_emplace(layer.base - place->offset, static_cast<std::uint32_t>(body->allocations_size()));
    if (is_new) {
      wire::DeviceAllocation* allocation = body->add_allocations();
      allocation->set_kind(static_cast<std::uint32_t>(place->allocation.kind));
      allocation->set_bytes(place->allocation.bytes);
      allocation->set_handle(place->allocation.handle);
      if (place->allocation.descriptor) {
        allocation->set_offered(static_cast<std::uint32_t>(descriptors.size()));
        descriptors.push_back(std::move(place->allocation.descriptor));
      }
    }
    wire::DeviceLayer* described = body->add_layers();
    described->set_allocation(at->second);
    described->set_offset(place->offset);
    described->set_pages(layer.pages);
    described->set_page_stride_bytes(layer.page_stride_bytes);
    described->set_head_stride_bytes(layer.head_stride_bytes);
    described->set_token_stride_bytes(layer.token_stride_bytes);
    described->set_value_offset_bytes(layer.value_offset_bytes);
  }
  if (!descriptors.empty()) {
    std::vector<int> numbers;
    numbers.reserve(descriptors.size());
    for (const UniqueFd& descriptor : descriptors) numbers.push_back(descriptor.get());
    if (Status offered = offer_descriptors(session.admission_path, session.token, numbers, timeout); !offered) {
      return failure(offered);
    }
  }
  wire::ControlReply reply;
  Status status = session.control->call(request, &reply, timeout);
  if (status) status = to_status(reply.status());
  if (!status) return failure(status);
  return reply.device_pages_registered().pages_id();
}

Status DeviceGroup::with_coder(const std::function<Status(PageCoder&)>& function) {
  const std::lock_guard lock(coder_mutex_);
  if (!coder_) {
    auto made = device_->make_coder();
    if (!made) return made.error();
    coder_ = std::move(*made);
  }
  return function(*coder_);
}

}  // namespace kvern
