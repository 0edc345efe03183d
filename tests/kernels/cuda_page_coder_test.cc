#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/page_coder.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/host_page_coder.h"

namespace kvern {
namespace {

using testing::HostPageCoder;

struct Layout {
  const char* name;
  bool heads_first;  ///< within a page: [head][token] rather than [token][head]
  bool parts_apart;  ///< all K pages before all V pages
  std::uint32_t pages_per_block;
  std::uint32_t block_tokens = 16;
  std::size_t padding_bytes = 0;  ///< behind every row, or both rows of a token where parts are not apart
};

/// The same pages in host and device memory, filled with numbers.
class Pages {
 public:
  Pages(const Layout& layout, DType dtype, std::uint32_t key_dim, std::uint32_t value_dim, std::uint32_t layers,
        std::uint32_t heads, std::uint64_t seed) {
    constexpr std::uint32_t kBlocks = 12;
    cache_ = {.dtype = dtype,
              .block_tokens = layout.block_tokens,
              .pages_per_block = layout.pages_per_block,
              .layer_begin = 0,
              .group_layers = layers,
              .head_begin = 0,
              .heads = heads,
              .model_heads = heads,
              .key_dim = key_dim,
              .value_dim = value_dim,
              .layers = {}};
    const std::size_t element = dtype_bytes(dtype);
    const std::size_t page_tokens = layout.block_tokens / layout.pages_per_block;
    const std::size_t pages = kBlocks * layout.pages_per_block;
    const std::size_t row =
        (layout.parts_apart ? std::max(key_dim, value_dim) : key_dim + value_dim) * element + layout.padding_bytes;
    const std::size_t page = page_tokens * heads * row;
    const std::size_t layer = pages * page * (layout.parts_apart ? 2 : 1);
    host_.resize(layer * layers);
    fill(seed);
    device_ = std::make_unique<DeviceArray<std::byte>>(host_);
    for (std::uint32_t i = 0; i < layers; ++i) {
      PagedLayer each;
      each.base = host_.data() + i * layer;
      each.pages = static_cast<std::uint32_t>(pages);
      each.page_stride_bytes = page;
      each.head_stride_bytes = layout.heads_first ? page_tokens * row : row;
      each.token_stride_bytes = layout.heads_first ? row : heads * row;
      each.value_offset_bytes = layout.parts_apart ? pages * page : key_dim * element;
      cache_.layers.push_back(each);
    }
    layer_bytes_ = layer;
  }

  PagedCache on_host() const { return cache_; }
  PagedCache on_device() const {
    PagedCache cache = cache_;
    for (PagedLayer& layer : cache.layers) layer.base = device_->data() + (layer.base - host_.data());
    return cache;
  }
  const std::vector<std::byte>& host() const { return host_; }
  std::vector<std::byte> device() const { return device_->get(); }
  /// Of both memories.
  void put(std::size_t at, std::span<const std::byte> bytes) {
    std::ranges::copy(bytes, host_.begin() + static_cast<std::ptrdiff_t>(at));
    device_->put(at, bytes.data(), bytes.size());
  }
  std::size_t layer_bytes() const { return layer_bytes_; }

 private:
  void fill(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const std::size_t element = dtype_bytes(cache_.dtype);
    for (std::size_t at = 0; at < host_.size(); at += element) {
      const float value = normal(random);
      std::uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof bits);
      if (cache_.dtype == DType::kBFloat16) {
        const auto half = static_cast<std::uint16_t>(bits >> 16);
        std::memcpy(host_.data() + at, &half, sizeof half);
      } else if (cache_.dtype == DType::kFloat16) {
        const auto half = static_cast<std::uint16_t>(0x3000U + (bits & 0x0FFFU) + (bits >> 31 << 15));
        std::memcpy(host_.data() + at, &half, sizeof half);
      } else {
        std::memcpy(host_.data() + at, &value, sizeof value);
      }
    }
  }

  PagedCache cache_;
  std::vector<std::byte> host_;
  std::unique_ptr<DeviceArray<std::byte>> device_;
  std::size_t layer_bytes_ = 0;
};

ContainerInfo info_of(const PagedCache& cache, std::uint32_t blocks, const Codec& codec) {
  ContainerInfo info;
  info.shape = cache.shape(blocks);
  info.block_tokens = cache.block_tokens;
  info.group_layers = cache.group_layers;
  info.model_heads = cache.model_heads;
  for (std::uint32_t i = 0; i < blocks; ++i) {
    std::array<std::uint8_t, 32> bytes{};
    bytes[0] = static_cast<std::uint8_t>(i + 1);
    info.block_hashes.emplace_back(bytes);
  }
  info.key.last_block = info.block_hashes.back();
  info.codec_spec = codec.spec();
  return info;
}

/// A container whose sections the coder makes.
std::vector<std::byte> container_of(PageCoder& coder, const PagedCache& cache, const std::vector<std::uint32_t>& ids,
                                    const Codec& codec) {
  const ContainerInfo info = info_of(cache, static_cast<std::uint32_t>(ids.size()), codec);
  std::vector<std::byte> out(container_max_bytes(codec, info), std::byte{0xee});
  const Status encoded = coder.encode(cache, ids, codec, std::span(out).subspan(container_header_bytes(codec, info)));
  EXPECT_TRUE(encoded) << encoded.message();
  const auto size = seal_container(codec, info, out, nullptr);
  EXPECT_TRUE(size) << size.error().message();
  EXPECT_EQ(*size, out.size());
  return out;
}

// Rows at multiples of 4 bytes but not of 16 cannot be encoded where they lie.
constexpr Layout kLayouts[] = {{"TokensThenHeads", false, true, 1},    {"HeadsThenTokens", true, false, 1},
                               {"SmallPages", false, false, 2},        {"PagesOfTwelveTokens", true, true, 2, 24},
                               {"PaddedRows", true, false, 1, 16, 16}, {"RowsOffSixteenBytes", true, false, 1, 16, 4}};

class CudaPageCoderTest : public CudaTest, public ::testing::WithParamInterface<Layout> {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    auto made = make_cuda_page_coder(0);
    ASSERT_TRUE(made) << made.error().message();
    coder_ = std::move(*made);
  }
  std::unique_ptr<PageCoder> coder_;
  HostPageCoder host_;
};

TEST_P(CudaPageCoderTest, MakesTheContainersOfTheCpu) {
  const std::vector<std::uint32_t> ids{3, 1, 11, 7, 2};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const auto& [key_dim, value_dim] : {std::pair{64U, 64U}, {128U, 128U}, {192U, 128U}, {64U, 0U}}) {
      const Pages pages(GetParam(), dtype, key_dim, value_dim, 3, 2, 17);
      for (const char* spec :
           {"raw", "int8", "int8r", "fp8", "int4", "int4(scheme=symmetric)", "int3", "int2(group=32)"}) {
        const auto codec = make_codec(spec).value();
        ASSERT_TRUE(coder_->codes(*codec)) << spec;
        const auto expected = container_of(host_, pages.on_host(), ids, *codec);
        const auto made = container_of(*coder_, pages.on_device(), ids, *codec);
        EXPECT_EQ(made, expected) << spec << ", " << dtype_name(dtype) << ", " << key_dim << " and " << value_dim;
        // The ordinary writer's as well.
        const ContainerInfo info = info_of(pages.on_host(), static_cast<std::uint32_t>(ids.size()), *codec);
        const Scratch canonical(info.shape.raw_bytes());
        ASSERT_TRUE(host_.gather(pages.on_host(), ids, canonical.first(info.shape.raw_bytes())));
        const Scratch out(container_max_bytes(*codec, info));
        const auto size = encode_container(*codec, info, canonical.first(info.shape.raw_bytes()), {},
                                           out.first(container_max_bytes(*codec, info)));
        ASSERT_TRUE(size) << size.error().message();
        EXPECT_TRUE(std::ranges::equal(out.first(*size), made)) << spec;
      }
    }
  }
}

TEST_P(CudaPageCoderTest, RefusesWhatIsNotFinite) {
  const std::vector<std::uint32_t> ids{3, 1};
  for (const Part part : {Part::kKey, Part::kValue}) {
    Pages pages(GetParam(), DType::kBFloat16, 64, 64, 2, 2, 19);
    const PagedLayer layer = pages.on_host().layers[1];
    // The last element of the last token's row of the last head.
    const std::uint64_t page = (std::uint64_t{ids.back()} + 1) * GetParam().pages_per_block - 1;
    const std::uint64_t token = GetParam().block_tokens / GetParam().pages_per_block - 1;
    const std::uint64_t row = page * layer.page_stride_bytes + layer.head_stride_bytes +
                              token * layer.token_stride_bytes + (part == Part::kKey ? 0 : layer.value_offset_bytes);
    constexpr std::array kInfinity{std::byte{0x80}, std::byte{0x7f}};
    pages.put(pages.layer_bytes() + row + 63 * sizeof(std::uint16_t), kInfinity);
    for (const char* spec : {"int8", "fp8", "int4"}) {
      const auto codec = make_codec(spec).value();
      const ContainerInfo info = info_of(pages.on_host(), 2, *codec);
      std::vector<std::byte> sections(container_max_bytes(*codec, info));
      EXPECT_EQ(coder_->encode(pages.on_device(), ids, *codec, sections).code(), Code::kInvalid) << spec;
      // Blocks beside it can be encoded, and a failure is not remembered.
      EXPECT_TRUE(coder_->encode(pages.on_device(), std::vector<std::uint32_t>{3, 2}, *codec, sections)) << spec;
    }
  }
}

TEST_P(CudaPageCoderTest, PutsBlocksWhereTheCpuPutsThem) {
  for (const char* spec : {"raw", "int8", "int4", "fp8"}) {
    const auto codec = make_codec(spec).value();
    const Pages from(GetParam(), DType::kBFloat16, 128, 128, 3, 2, 23);
    const auto bytes = container_of(host_, from.on_host(), {4, 9, 5, 6}, *codec);
    const auto container = ContainerReader::parse(bytes);
    ASSERT_TRUE(container) << container.error().message();
    const Pages to(GetParam(), DType::kBFloat16, 128, 128, 3, 2, 29);
    const std::vector<std::uint32_t> ids{8, 0, 2};
    const PageTarget target{ids, 1};
    const auto verify = [&] { return container->verify(); };
    const Status on_device = coder_->decode(to.on_device(), target, *container, bytes, verify);
    ASSERT_TRUE(on_device) << on_device.message();
    ASSERT_TRUE(host_.decode(to.on_host(), target, *container, bytes, verify));
    EXPECT_EQ(to.device(), to.host()) << spec;
    EXPECT_NE(to.device(), from.device());
  }
}

TEST_P(CudaPageCoderTest, LeavesPagesAloneWhenBytesAreBad) {
  const auto codec = make_codec("int4").value();
  const Pages from(GetParam(), DType::kBFloat16, 64, 64, 2, 2, 31);
  auto bytes = container_of(host_, from.on_host(), {1, 2}, *codec);
  const auto container = ContainerReader::parse(bytes);
  ASSERT_TRUE(container);
  const std::vector<std::uint32_t> ids{3, 4};
  const auto refuse = [] { return Status(Code::kCorrupt, "fails its checksum"); };
  EXPECT_EQ(coder_->decode(from.on_device(), {ids, 0}, *container, bytes, refuse).code(), Code::kCorrupt);
  EXPECT_EQ(from.device(), from.host());
  // A scale that is not finite, under a checksum that nobody looks at.
  std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(container->sections()[0].offset), 2, std::byte{0xff});
  EXPECT_EQ(coder_->decode(from.on_device(), {ids, 0}, *container, bytes, [] { return Status::ok(); }).code(),
            Code::kCorrupt);
  EXPECT_EQ(from.device(), from.host());
}

TEST_P(CudaPageCoderTest, MovesRowsOfOtherShardsAndZeroes) {
  const Pages pages(GetParam(), DType::kFloat16, 48, 48, 4, 3, 37);
  PagedCache host = pages.on_host();
  PagedCache device = pages.on_device();
  for (PagedCache* cache : {&host, &device}) {
    cache->layer_begin = 2;
    cache->group_layers = 8;
    cache->head_begin = 1;
    cache->model_heads = 8;
  }
  const std::vector<std::uint32_t> ids{5, 10};
  ShardShape shape = host.shape(2);
  shape.layer_begin = 0;
  shape.layers = 4;
  shape.head_begin = 2;
  shape.heads = 4;
  std::vector<std::byte> rows(shape.raw_bytes());
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::byte>(i * 7);
  ASSERT_TRUE(coder_->scatter(device, ids, shape, rows));
  ASSERT_TRUE(host_.scatter(host, ids, shape, rows));
  EXPECT_EQ(pages.device(), pages.host());
  std::vector<std::byte> gathered(host.shape(2).raw_bytes());
  std::vector<std::byte> expected(gathered.size());
  ASSERT_TRUE(coder_->gather(device, ids, gathered));
  ASSERT_TRUE(host_.gather(host, ids, expected));
  EXPECT_EQ(gathered, expected);
  ASSERT_TRUE(coder_->zero(device, ids));
  ASSERT_TRUE(host_.zero(host, ids));
  EXPECT_EQ(pages.device(), pages.host());
}

TEST_P(CudaPageCoderTest, CrossesTheBusWithEncodedBytes) {
  const Pages pages(GetParam(), DType::kBFloat16, 128, 128, 8, 4, 41);
  const std::vector<std::uint32_t> ids{1, 2, 3, 4, 5, 6, 7, 8};
  const auto codec = make_codec("int4").value();
  const auto before = coder_->moved();
  const auto bytes = container_of(*coder_, pages.on_device(), ids, *codec);
  const auto after = coder_->moved();
  EXPECT_LE(after.to_host - before.to_host, bytes.size());
  EXPECT_LT(after.to_host - before.to_host, pages.on_host().shape(8).raw_bytes() * 3 / 10);
  EXPECT_LT(after.to_device - before.to_device, 4096U);
}

using CudaPartitionTest = CudaTest;

TEST_F(CudaPartitionTest, HasTheMultiprocessorsThatWereAskedFor) {
  const auto all = CudaPartition::make(0, 0);
  ASSERT_TRUE(all) << all.error().message();
  const auto more = CudaPartition::make(0, 1U << 20);
  ASSERT_TRUE(more) << more.error().message();
  EXPECT_EQ((*more)->multiprocessors(), (*all)->multiprocessors());
  const auto some = CudaPartition::make(0, 5);
  ASSERT_TRUE(some) << some.error().message();
  EXPECT_GE((*some)->multiprocessors(), 5U);
  EXPECT_LT((*some)->multiprocessors(), (*all)->multiprocessors());
}

TEST_F(CudaPartitionTest, CodersOfAPartitionMakeTheSameBytes) {
  const auto partition = CudaPartition::make(0, 8);
  ASSERT_TRUE(partition) << partition.error().message();
  // Two at a time, as a daemon has them.
  auto first = make_cuda_page_coder(*partition);
  auto second = make_cuda_page_coder(*partition);
  ASSERT_TRUE(first) << first.error().message();
  ASSERT_TRUE(second) << second.error().message();
  const std::vector<std::uint32_t> ids{3, 1, 11, 7, 2};
  const auto codec = make_codec("int4").value();
  const Pages pages(kLayouts[0], DType::kBFloat16, 128, 128, 3, 2, 43);
  HostPageCoder host;
  const auto expected = container_of(host, pages.on_host(), ids, *codec);
  EXPECT_EQ(container_of(**first, pages.on_device(), ids, *codec), expected);
  EXPECT_EQ(container_of(**second, pages.on_device(), ids, *codec), expected);
}

TEST(CudaPartitionArguments, WithoutADeviceThePartitionIsRefusedInASentence) {
  if (cuda_available()) GTEST_SKIP() << "there is a CUDA device";
  const auto partition = CudaPartition::make(0, 8);
  ASSERT_FALSE(partition);
  EXPECT_NE(partition.error().message().find("CUDA"), std::string::npos) << partition.error().message();
}

INSTANTIATE_TEST_SUITE_P(Layouts, CudaPageCoderTest, ::testing::ValuesIn(kLayouts),
                         [](const auto& each) { return std::string(each.param.name); });

}  // namespace
}  // namespace kvern
