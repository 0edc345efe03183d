#include "kernels/codec.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

#include "kernels/chain.h"

namespace kvern {
namespace {

/// Codecs made before. Every container that is read and every store asks for one by its spec, and of these there are a
/// handful; who sends many different ones only makes the cache start again.
class MadeCodecs {
 public:
  std::shared_ptr<const Codec> find(const std::string& key) {
    const std::lock_guard lock(mutex_);
    const auto found = codecs_.find(key);
    return found == codecs_.end() ? nullptr : found->second;
  }
  void put(std::string key, std::shared_ptr<const Codec> codec) {
    const std::lock_guard lock(mutex_);
    if (codecs_.size() >= kMaxCodecs) codecs_.clear();
    codecs_.emplace(std::move(key), std::move(codec));
  }

 private:
  static constexpr std::size_t kMaxCodecs = 256;
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Codec>> codecs_;
};

}  // namespace

std::size_t Codec::max_bytes(const ShardShape& shape, const SectionExtent& extent) const {
  const auto sections = plan(shape);
  const auto section = std::ranges::find(sections, extent, &SectionPlan::extent);
  return section == sections.end() ? 0 : section->max_bytes;
}

Result<std::shared_ptr<const Codec>> make_codec(std::string_view spec, std::string_view rotation) {
  static MadeCodecs made;
  std::string key(spec);
  key.append(1, '\0').append(rotation);
  if (auto codec = made.find(key); codec != nullptr) return codec;
  auto chain = parse_chunk_chain(spec, rotation);
  if (!chain) return failure(chain.error());
  if (chain->codec == nullptr) {
    return failure(Code::kInvalid,
                   "unrotate needs to know how the model turns its keys, and this model's namespace does not say; give "
                   "its parameters or leave it out");
  }
  made.put(std::move(key), chain->codec);
  return std::move(chain->codec);
}

}  // namespace kvern
