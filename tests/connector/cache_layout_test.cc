#include "connector/cache_layout.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <numeric>

#include "base/keys.h"
#include "kernels/container.h"
#include "tests/connector/page_model.h"

namespace kvern {
namespace {

using test::PageModel;

PageModel::Options any_options() {
  PageModel::Options options;
  options.packing =
      *rc::gen::element(PagePacking::kRows, PagePacking::kCpuVec, PagePacking::kCpuAmx, PagePacking::kOpaque);
  options.dtype = *rc::gen::element(DType::kBFloat16, DType::kFloat16, DType::kFloat32);
  options.page_tokens = *rc::gen::element<std::uint32_t>(16, 32, 48, 64, 128);
  options.pages_per_block = *rc::gen::inRange<std::uint32_t>(1, 4);
  options.blocks = 5;
  options.heads = *rc::gen::inRange<std::uint32_t>(1, 4);
  options.head_begin = *rc::gen::inRange<std::uint32_t>(0, 3);
  options.model_heads = options.heads + options.head_begin + *rc::gen::inRange<std::uint32_t>(0, 2);
  options.layers = *rc::gen::inRange<std::uint32_t>(1, 3);
  options.layer_begin = *rc::gen::inRange<std::uint32_t>(0, 3);
  options.group_layers = options.layers + options.layer_begin;
  options.key_dim = *rc::gen::element<std::uint32_t>(64, 80, 96, 112, 128, 256);
  options.value_dim = *rc::gen::element<std::uint32_t>(64, 80, 96, 112, 128, 256);
  options.padding_bytes = *rc::gen::element<std::uint32_t>(0, 4, 100);
  if (options.packing == PagePacking::kRows) {
    options.heads_inside_tokens = *rc::gen::arbitrary<bool>();
    options.split_values = *rc::gen::arbitrary<bool>();
    options.key_dim = *rc::gen::element<std::uint32_t>(1, 63, 64, 80, 128, 256);
  }
  if (options.packing == PagePacking::kCpuAmx) {
    options.dtype = *rc::gen::element(DType::kBFloat16, DType::kFloat16);
  }
  if (options.packing == PagePacking::kOpaque) {
    options.dtype = DType::kOpaqueBytes;
    options.heads = 1;
    options.value_dim = *rc::gen::element<std::uint32_t>(0, 1, 100);
  }
  return options;
}

std::vector<std::uint32_t> any_blocks(std::uint32_t blocks) {
  std::vector<std::uint32_t> ids(blocks - 1);
  std::iota(ids.begin(), ids.end(), 1U);
  std::ranges::reverse(ids);
  std::rotate(ids.begin(), ids.begin() + *rc::gen::inRange<int>(0, static_cast<int>(ids.size())), ids.end());
  ids.resize(*rc::gen::inRange<std::size_t>(1, ids.size() + 1));
  return ids;
}

RC_GTEST_PROP(CacheLayout, gather_gives_the_canonical_layout_and_its_checksums, ()) {
  const auto options = any_options();
  PageModel model(options);
  RC_ASSERT(model.pages().validate().to_string() == Status::ok().to_string());
  const auto blocks = any_blocks(options.blocks);
  const ShardShape shape = model.pages().shape(static_cast<std::uint32_t>(blocks.size()));
  std::vector<std::byte> out(shape.raw_bytes());
  std::vector<std::uint64_t> checksums(2 * shape.layers * shape.heads);
  gather(model.pages(), blocks, out, checksums);
  RC_ASSERT(out == model.canonical(blocks));
  std::size_t plane = 0;
  for (std::uint32_t layer = 0; layer < shape.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      for (std::uint32_t head = 0; head < shape.heads; ++head) {
        RC_ASSERT(checksums[plane++] ==
                  checksum64(out.data() + shape.plane_offset(layer, part, head), shape.plane_bytes(part)));
      }
    }
  }
}

RC_GTEST_PROP(CacheLayout, the_sink_writes_just_the_rows_it_is_given, ()) {
  const auto options = any_options();
  PageModel model(options);
  auto blocks = any_blocks(options.blocks);
  const std::uint32_t block_tokens = model.pages().block_tokens;
  if (*rc::gen::arbitrary<bool>()) blocks[*rc::gen::inRange<std::size_t>(0, blocks.size())] = 0;
  const std::uint32_t first_token = *rc::gen::inRange<std::uint32_t>(0, 3) * block_tokens;
  const std::uint32_t shard_layer = *rc::gen::inRange<std::uint32_t>(0, options.layer_begin + 1);
  const std::uint32_t shard_head = *rc::gen::inRange<std::uint32_t>(0, options.head_begin + 1);
  PageSink sink(model.pages(), blocks, first_token, shard_layer, shard_head);

  const auto part = *rc::gen::element(Part::kKey, Part::kValue);
  const std::uint32_t dims = part == Part::kKey ? options.key_dim : options.value_dim;
  const std::uint32_t layer = *rc::gen::inRange<std::uint32_t>(0, options.group_layers + 1);
  const std::uint32_t head = *rc::gen::inRange<std::uint32_t>(0, options.model_heads + 1);
  const std::uint32_t held_end = first_token + static_cast<std::uint32_t>(blocks.size()) * block_tokens;
  const bool whole = *rc::gen::arbitrary<bool>();
  const std::uint32_t token = whole ? first_token : *rc::gen::inRange<std::uint32_t>(0, held_end);
  const std::uint32_t count = whole ? held_end - first_token : *rc::gen::inRange<std::uint32_t>(1, 2 * block_tokens);
  const std::size_t size = dtype_bytes(options.dtype);
  std::vector<std::byte> rows(std::max<std::size_t>(1, count * dims * size));
  std::mt19937 random(7);
  for (auto& byte : rows) byte = static_cast<std::byte>(random());

  auto expected = model.memory();
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint32_t at = token + i;
    if (at < first_token || at >= held_end) continue;
    const std::uint32_t block = blocks[(at - first_token) / block_tokens];
    const std::uint32_t own_layer = shard_layer + layer - options.layer_begin;
    const std::uint32_t own_head = shard_head + head - options.head_begin;
    if (block == 0 || own_layer >= options.layers || own_head >= options.heads) continue;
    for (std::uint32_t dim = 0; dim < dims; ++dim) {
      std::copy_n(
          rows.data() + (i * dims + dim) * size, size,
          expected[own_layer].data() + model.offset(part, own_head, block, (at - first_token) % block_tokens, dim));
    }
  }
  sink.write(layer, part, head, token, count, rows.data());
  RC_ASSERT(model.memory() == expected);
}

RC_GTEST_PROP(CacheLayout, zeroed_blocks_hold_zeros_and_nothing_else_changes, ()) {
  const auto options = any_options();
  PageModel model(options);
  auto blocks = any_blocks(options.blocks);
  blocks.push_back(0);
  auto expected = model.memory();
  for (std::uint32_t layer = 0; layer < options.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      for (std::uint32_t head = 0; head < options.heads; ++head) {
        for (const std::uint32_t block : blocks) {
          for (std::uint32_t token = 0; block != 0 && token < model.pages().block_tokens; ++token) {
            for (std::uint32_t dim = 0; dim < (part == Part::kKey ? options.key_dim : options.value_dim); ++dim) {
              std::fill_n(expected[layer].data() + model.offset(part, head, block, token, dim),
                          dtype_bytes(options.dtype), std::byte{0});
            }
          }
        }
      }
    }
  }
  zero_blocks(model.pages(), blocks);
  RC_ASSERT(model.memory() == expected);
}

RC_GTEST_PROP(CacheLayout, memory_that_is_one_byte_short_is_refused, ()) {
  auto options = any_options();
  options.padding_bytes = 0;
  if (options.split_values) options.value_dim = options.key_dim;
  PageModel model(options);
  GroupPages pages = model.pages();
  pages.layers.back().reachable_bytes -= 1;
  RC_ASSERT(pages.validate().code() == Code::kInvalid);
}

TEST(CacheLayout, overlapping_strides_are_refused) {
  PageModel model({.packing = PagePacking::kCpuVec});
  for (auto change : {+[](LayerPages& layer) { layer.page_stride_bytes -= 1; },
                      +[](LayerPages& layer) { layer.head_stride_bytes -= 1; },
                      +[](LayerPages& layer) { layer.page_stride_bytes = 0; }}) {
    GroupPages pages = model.pages();
    change(pages.layers[0]);
    EXPECT_EQ(pages.validate().code(), Code::kInvalid);
  }
  PageModel rows({.packing = PagePacking::kRows});
  for (auto change : {+[](LayerPages& layer) { layer.token_stride_bytes -= 1; },
                      +[](LayerPages& layer) { layer.value_offset_bytes -= 1; }}) {
    GroupPages pages = rows.pages();
    change(pages.layers[0]);
    EXPECT_EQ(pages.validate().code(), Code::kInvalid);
  }
}

TEST(CacheLayout, huge_strides_do_not_wrap_around) {
  PageModel model({.packing = PagePacking::kCpuVec});
  GroupPages pages = model.pages();
  pages.layers[0].page_stride_bytes = ~std::uint64_t{0} / 4;
  EXPECT_EQ(pages.validate().code(), Code::kInvalid);
}

TEST(CacheLayout, amx_pages_are_refused_where_they_cannot_hold_the_type) {
  PageModel model({.packing = PagePacking::kCpuAmx});
  GroupPages pages = model.pages();
  pages.dtype = DType::kFloat32;
  EXPECT_EQ(pages.validate().code(), Code::kRefused);
  pages = model.pages();
  pages.value_dim = 40;
  EXPECT_EQ(pages.validate().code(), Code::kRefused);
}

TEST(CacheLayout, heads_and_layers_outside_of_the_model_are_refused) {
  PageModel model({});
  GroupPages pages = model.pages();
  pages.head_begin = 1;
  EXPECT_EQ(pages.validate().code(), Code::kInvalid);
  pages = model.pages();
  pages.layer_begin = 1;
  EXPECT_EQ(pages.validate().code(), Code::kInvalid);
  pages = model.pages();
  pages.head_begin = ~0U;
  EXPECT_EQ(pages.validate().code(), Code::kInvalid);
}

TEST(CacheLayout, blocks_beyond_the_pages_are_known_as_such) {
  PageModel model({.pages_per_block = 2, .blocks = 3});
  EXPECT_TRUE(model.pages().has_block(2));
  EXPECT_FALSE(model.pages().has_block(3));
  EXPECT_FALSE(model.pages().has_block(~0U));
}

}  // namespace
}  // namespace kvern
