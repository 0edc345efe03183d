#include "kernels/page_coder.h"

#include <cstring>

#include "kernels/scratch.h"

namespace kvern {
namespace {

/// Rows of a chunk, put into the canonical layout of some of its tokens.
class CanonicalSink final : public RowSink {
 public:
  CanonicalSink(const ShardShape& shape, std::uint32_t first_token, std::byte* to)
      : shape_(shape), first_token_(first_token), to_(to) {}
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    const std::size_t row_bytes = shape_.row_bytes(part);
    std::memcpy(to_ + shape_.plane_offset(layer, part, head) + (token - first_token_) * row_bytes, rows,
                count * row_bytes);
  }

 private:
  const ShardShape& shape_;
  const std::uint32_t first_token_;
  std::byte* const to_;
};

}  // namespace

Result<std::size_t> encode_pages(PageCoder& coder, const PagedCache& cache, std::span<const std::uint32_t> block_ids,
                                 const Codec& codec, const ContainerInfo& info, std::span<std::byte> out,
                                 const std::function<Status()>& gathered, Executor* executor) {
  if (coder.codes(codec)) {
    const std::size_t header_bytes = container_header_bytes(codec, info);
    if (header_bytes > out.size()) return failure(Code::kInvalid, "the container is larger than its room");
    if (Status status = coder.encode(cache, block_ids, codec, out.subspan(header_bytes)); !status) {
      return failure(status);
    }
    if (Status status = gathered(); !status) return failure(status);
    return seal_container(codec, info, out, executor);
  }
  const Scratch scratch(info.shape.raw_bytes());
  const auto canonical = scratch.first(info.shape.raw_bytes());
  if (Status status = coder.gather(cache, block_ids, canonical); !status) return failure(status);
  if (Status status = gathered(); !status) return failure(status);
  return encode_container(codec, info, canonical, {}, out);
}

Status decode_pages(PageCoder& coder, const PagedCache& cache, const PageTarget& target,
                    const ContainerReader& container, std::span<const std::byte> bytes, Executor* executor) {
  if (coder.codes(container.codec())) {
    return coder.decode(cache, target, container, bytes, [&] { return container.verify(executor); });
  }
  const ShardShape& whole = container.info().shape;
  ShardShape part = whole;
  const std::uint32_t first_token = target.first_block * cache.block_tokens;
  part.tokens = static_cast<std::uint32_t>(target.block_ids.size()) * cache.block_tokens;
  const Scratch canonical(part.raw_bytes());
  CanonicalSink sink(part, first_token, canonical.data());
  const Status decoded =
      container.decode(whole.layer_begin, whole.layer_begin + whole.layers, whole.head_begin,
                       whole.head_begin + whole.heads, {first_token, first_token + part.tokens}, sink);
  if (!decoded) return decoded;
  return coder.scatter(cache, target.block_ids, part, canonical.first(part.raw_bytes()));
}

}  // namespace kvern
