#include "kernels/codec.h"

#include <algorithm>

#include "kernels/chain.h"

namespace kvern {

std::size_t Codec::max_bytes(const ShardShape& shape, const SectionExtent& extent) const {
  const auto sections = plan(shape);
  const auto section = std::ranges::find(sections, extent, &SectionPlan::extent);
  return section == sections.end() ? 0 : section->max_bytes;
}

Result<std::shared_ptr<const Codec>> make_codec(std::string_view spec, std::string_view rotation) {
  auto chain = parse_chunk_chain(spec, rotation);
  if (!chain) return failure(chain.error());
  if (chain->codec == nullptr) {
    return failure(Code::kInvalid,
                   "unrotate needs to know how the model turns its keys, and this model's namespace does not say; give "
                   "its parameters or leave it out");
  }
  return std::move(chain->codec);
}

}  // namespace kvern
