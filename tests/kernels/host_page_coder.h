#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <span>
#include <vector>

#include "kernels/page_coder.h"
#include "kernels/scratch.h"

namespace kvern::testing {

/// The page coder of a device that is no device: its memory is the host's, its kernels are loops over the codecs of the
/// CPU. What the CUDA one must equal, and what stands in for it where there is no GPU.
class HostPageCoder final : public PageCoder {
 public:
  bool codes(const Codec& codec) const override {
    const std::string_view spec = codec.spec();
    return spec.find('|') == std::string_view::npos &&
           (spec == "raw" || spec.starts_with("int") || spec.starts_with("fp8"));
  }

  Status encode(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const Codec& codec,
                std::span<std::byte> sections) override {
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    const Scratch canonical(shape.raw_bytes());
    move_rows(cache, block_ids, shape, canonical.data(), true);
    std::size_t offset = 0;
    for (const SectionPlan& section : codec.plan(shape)) {
      const std::size_t room = (section.max_bytes + 63) / 64 * 64;
      const auto out = sections.subspan(offset, room);
      std::ranges::fill(out, std::byte{0});
      const Part part = section.extent.has_key ? Part::kKey : Part::kValue;
      // Codecs want their planes and sections aligned.
      const Scratch plane(shape.plane_bytes(part));
      const Scratch coded(room);
      std::memcpy(plane.data(), canonical.data() + shape.plane_offset(section.extent.layer, part, section.extent.head),
                  shape.plane_bytes(part));
      const auto size = codec.encode(shape, section.extent, plane.first(shape.plane_bytes(part)), coded.first(room));
      if (!size) return size.error();
      std::memcpy(out.data(), coded.data(), *size);
      offset += room;
    }
    moved_.to_host += offset;
    return Status::ok();
  }

  Status decode(const PagedCache& cache, const PageTarget& target, const ContainerReader& container,
                std::span<const std::byte>, const std::function<Status()>& meanwhile) override {
    if (Status status = meanwhile(); !status) return status;
    ShardShape part = container.info().shape;
    part.tokens = static_cast<std::uint32_t>(target.block_ids.size()) * cache.block_tokens;
    const std::uint32_t first = target.first_block * cache.block_tokens;
    const Scratch canonical(part.raw_bytes());
    CanonicalRows rows(part, first, canonical.data());
    const ShardShape& whole = container.info().shape;
    if (Status status = container.decode(whole.layer_begin, whole.layer_begin + whole.layers, whole.head_begin,
                                         whole.head_begin + whole.heads, {first, first + part.tokens}, rows);
        !status) {
      return status;
    }
    for (const SectionInfo& section : container.sections()) moved_.to_device += section.bytes;
    move_rows(cache, target.block_ids, part, canonical.data(), false);
    return Status::ok();
  }

  Status gather(const PagedCache& cache, std::span<const std::uint32_t> block_ids,
                std::span<std::byte> canonical) override {
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    move_rows(cache, block_ids, shape, canonical.data(), true);
    moved_.to_host += shape.raw_bytes();
    return Status::ok();
  }
  Status scatter(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const ShardShape& shape,
                 std::span<const std::byte> canonical) override {
    move_rows(cache, block_ids, shape, const_cast<std::byte*>(canonical.data()), false);
    moved_.to_device += shape.raw_bytes();
    return Status::ok();
  }
  Status zero(const PagedCache& cache, std::span<const std::uint32_t> block_ids) override {
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    std::vector<std::byte> zeros(shape.raw_bytes());
    move_rows(cache, block_ids, shape, zeros.data(), false);
    return Status::ok();
  }
  Moved moved() const override { return moved_; }

 private:
  class CanonicalRows final : public RowSink {
   public:
    CanonicalRows(const ShardShape& shape, std::uint32_t first, std::byte* to)
        : shape_(shape), first_(first), to_(to) {}
    void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
               const std::byte* rows) override {
      const std::size_t bytes = shape_.row_bytes(part);
      std::memcpy(to_ + shape_.plane_offset(layer, part, head) + (token - first_) * bytes, rows, count * bytes);
    }

   private:
    const ShardShape& shape_;
    std::uint32_t first_;
    std::byte* to_;
  };

  static void move_rows(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const ShardShape& shape,
                        std::byte* canonical, bool gather) {
    for (std::uint32_t l = 0; l < cache.layers.size(); ++l) {
      const std::uint32_t layer = cache.layer_begin + l - shape.layer_begin;
      if (layer >= shape.layers) continue;
      for (std::uint32_t h = 0; h < cache.heads; ++h) {
        const std::uint32_t head = cache.head_begin + h - shape.head_begin;
        if (head >= shape.heads) continue;
        for (std::uint32_t token = 0; token < shape.tokens; ++token) {
          const std::uint32_t block = block_ids[token / cache.block_tokens];
          if (!gather && block == 0) continue;
          const PagedLayer& pages = cache.layers[l];
          const std::uint32_t in_block = token % cache.block_tokens;
          const std::uint64_t page = std::uint64_t{block} * cache.pages_per_block + in_block / cache.page_tokens();
          std::byte* row = pages.base + page * pages.page_stride_bytes + h * pages.head_stride_bytes +
                           in_block % cache.page_tokens() * pages.token_stride_bytes;
          for (const Part part : {Part::kKey, Part::kValue}) {
            std::byte* in_page = row + (part == Part::kKey ? 0 : pages.value_offset_bytes);
            std::byte* in_plane = canonical + shape.plane_offset(layer, part, head) + token * shape.row_bytes(part);
            std::memcpy(gather ? in_plane : in_page, gather ? in_page : in_plane, shape.row_bytes(part));
          }
        }
      }
    }
  }

  Moved moved_;
};

}  // namespace kvern::testing
