#include "kernels/cuda/page_coder.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "kernels/codec_step.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/int8.h"
#include "kernels/cuda/quantise.h"

namespace kvern {
namespace {

constexpr unsigned kThreads = 256;
/// Of a launch: blocks in y and z, and what 32 bits count with a block to spare.
constexpr std::uint32_t kMaxGrid = 65535;
constexpr std::uint64_t kMaxUnits = UINT32_MAX - kThreads;
constexpr std::size_t kAlignment = 64;
constexpr std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

Status outcome(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::ok();
  cudaGetLastError();  // so that it is no news to later calls
  return {error == cudaErrorMemoryAllocation ? Code::kBusy : Code::kInternal,
          std::string(what) + ": " + cudaGetErrorString(error)};
}

/// Does the next thing unless something failed before.
template <typename Step>
void then(Status& status, Step step) {
  if (status) static_cast<void>(status = step());
}

/// Planes of one part that lie plane_stride bytes apart in the order layer, head.
struct Planes {
  std::byte* first;
  std::size_t plane_stride;
  std::uint32_t row_bytes;
};

/// Rows of pages beside rows of planes. Layers [layer, …) of the cache are layers [0, …) of the launch.
struct Move {
  const std::uint32_t* bad;  ///< not 0: the rows are worthless, and pages stay as they are
  const PagedLayer* layers;
  const std::uint32_t* block_ids;
  std::uint32_t block_tokens;
  std::uint32_t page_tokens;
  std::uint32_t pages_per_block;
  std::uint32_t tokens;
  std::uint32_t cache_layer;  ///< of the launch's first layer
  std::uint32_t cache_head;
  std::uint32_t plane_layer;
  std::uint32_t plane_head;
  std::uint32_t plane_heads;
  Planes keys;
  Planes values;
};

enum class Way { kGather, kScatter, kZero };

/// One thread per Unit of a row; y: heads, z: layers times parts.
template <Way kWay, typename Unit>
__global__ void move_rows(Move move) {
  const bool value = blockIdx.z % 2 == 1;
  const Planes& planes = value ? move.values : move.keys;
  const std::uint32_t units = planes.row_bytes / sizeof(Unit);
  const std::uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
  if (units == 0 || at >= move.tokens * units) return;
  if (kWay == Way::kScatter && *move.bad != 0) return;
  const std::uint32_t token = at / units;
  const std::uint32_t layer = blockIdx.z / 2;
  const std::uint32_t head = blockIdx.y;
  const std::uint32_t block = move.block_ids[token / move.block_tokens];
  if (kWay != Way::kGather && block == 0) return;
  const PagedLayer& pages = move.layers[move.cache_layer + layer];
  const std::uint32_t in_block = token % move.block_tokens;
  const std::uint64_t page = std::uint64_t{block} * move.pages_per_block + in_block / move.page_tokens;
  std::byte* row =
      pages.base + page * pages.page_stride_bytes + std::uint64_t{move.cache_head + head} * pages.head_stride_bytes +
      std::uint64_t{in_block % move.page_tokens} * pages.token_stride_bytes + (value ? pages.value_offset_bytes : 0);
  const std::size_t plane = std::size_t{move.plane_layer + layer} * move.plane_heads + move.plane_head + head;
  auto* in_page = reinterpret_cast<Unit*>(row) + at % units;
  auto* in_plane = reinterpret_cast<Unit*>(planes.first + plane * planes.plane_stride) + at;
  if constexpr (kWay == Way::kGather) *in_plane = *in_page;
  if constexpr (kWay == Way::kScatter) *in_page = *in_plane;
  if constexpr (kWay == Way::kZero) *in_page = Unit{};
}

/// How rows are written down, from a canonical spec; nullopt for chains of several steps and unknown ones.
struct Spec {
  std::string name;
  std::uint32_t group = 0;
  quantise::Scheme scheme = quantise::Scheme::kSymmetric;
};
std::optional<Spec> parse_spec(std::string_view text) {
  const auto steps = CodecStep::parse_all(text);
  if (!steps || steps->size() != 1) return std::nullopt;
  const CodecStep& step = steps->front();
  Spec spec{.name = step.name};
  if (step.name == "raw") return spec;
  const auto group = step.number_within("group", 0, 1, 256);
  if (!group || *group == 0) return std::nullopt;
  spec.group = *group;
  if (const std::string* scheme = step.find("scheme"); scheme != nullptr && *scheme == "asymmetric") {
    spec.scheme = quantise::Scheme::kAsymmetric;
  }
  for (const char* known : {"int8", "int8r", "fp8", "int4", "int3", "int2"}) {
    if (step.name == known) return spec;
  }
  return std::nullopt;
}
quantise::Kind kind_of(const std::string& name) {
  if (name == "fp8") return quantise::Kind::kFp8;
  if (name == "int4") return quantise::Kind::kInt4;
  if (name == "int3") return quantise::Kind::kInt3;
  if (name == "int2") return quantise::Kind::kInt2;
  return quantise::Kind::kInt8Residual;
}

/// Codes planes of one part; of a part without rows it has none.
class Coding {
 public:
  Coding(const Spec& spec, const ShardShape& shape, Part part)
      : verbatim_(spec.name == "raw"), int8_(spec.name == "int8") {
    const bool key = part == Part::kKey;
    const std::uint32_t dim = key ? shape.key_dim : shape.value_dim;
    plane_bytes_ = shape.plane_bytes(part);
    if (dim == 0) return;
    if (int8_) {
      int8_form_ = {shape.dtype, key, shape.tokens, dim, key ? spec.group : int8::Form::channel_group(dim)};
    } else if (!verbatim_) {
      form_ = {shape.dtype,
               key,
               shape.tokens,
               dim,
               key ? spec.group : quantise::Form::channel_group(dim, spec.group),
               kind_of(spec.name),
               spec.scheme};
    }
  }
  std::size_t section_bytes() const {
    if (plane_bytes_ == 0) return 0;
    return verbatim_ ? plane_bytes_ : int8_ ? int8_form_.section_bytes() : form_.section_bytes();
  }
  Status encode(const Planes& planes, std::uint32_t count, std::byte* sections, std::size_t stride, std::uint32_t* bad,
                cudaStream_t stream) const {
    return int8_ ? int8::cuda_encode_planes(int8_form_, planes.first, planes.plane_stride, count, sections, stride, bad,
                                            stream)
                 : quantise::cuda_encode_planes(form_, planes.first, planes.plane_stride, count, sections, stride, bad,
                                                stream);
  }
  Status decode(const std::byte* sections, std::size_t stride, std::uint32_t count, TokenRange tokens,
                const Planes& rows, std::uint32_t* bad, cudaStream_t stream) const {
    return int8_ ? int8::cuda_decode_rows(int8_form_, sections, stride, count, tokens.begin, tokens.end, rows.first,
                                          rows.plane_stride, bad, stream)
                 : quantise::cuda_decode_rows(form_, sections, stride, count, tokens.begin, tokens.end, rows.first,
                                              rows.plane_stride, bad, stream);
  }

 private:
  bool verbatim_;
  bool int8_;
  std::size_t plane_bytes_ = 0;
  int8::Form int8_form_;
  quantise::Form form_;
};

/// Memory of the device, or pinned memory of the host, that only grows.
template <bool kHost>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { free(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Status reserve(std::size_t bytes) {
    if (bytes <= size_) return Status::ok();
    free();
    void* memory = nullptr;
    Status status = kHost ? outcome(cudaMallocHost(&memory, bytes), "pinned memory for a chunk")
                          : outcome(cudaMalloc(&memory, bytes), "device memory for a chunk");
    if (!status) return status;
    data_ = static_cast<std::byte*>(memory);
    size_ = bytes;
    return status;
  }
  std::byte* data() const { return data_; }

 private:
  void free() {
    if (data_ != nullptr) kHost ? cudaFreeHost(data_) : cudaFree(data_);
    data_ = nullptr;
    size_ = 0;
  }
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Keys and values of a chunk, each part's planes without gaps between heads and layers.
struct Layout {
  std::uint32_t layers = 0;
  std::uint32_t heads = 0;
  std::size_t key_stride = 0;  ///< from plane to plane, or from section to section
  std::size_t value_stride = 0;
  std::size_t key_bytes() const { return std::size_t{layers} * heads * key_stride; }
  std::size_t bytes() const { return key_bytes() + std::size_t{layers} * heads * value_stride; }
};

class CudaPageCoder final : public PageCoder {
 public:
  explicit CudaPageCoder(int device) : device_(device) {}
  ~CudaPageCoder() override {
    cudaSetDevice(device_);
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    if (done_ != nullptr) cudaEventDestroy(done_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  Status open() {
    if (Status status = outcome(cudaSetDevice(device_), "CUDA device"); !status) return status;
    int lowest = 0;
    int highest = 0;
    if (Status status = outcome(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "CUDA stream"); !status)
      return status;
    if (Status status = outcome(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, lowest), "CUDA stream");
        !status) {
      return status;
    }
    // Waiting threads sleep: a chunk takes long against the wake-up, and cores belong to the engine.
    return outcome(cudaEventCreateWithFlags(&done_, cudaEventBlockingSync | cudaEventDisableTiming), "CUDA event");
  }

  bool codes(const Codec& codec) const override { return parse_spec(codec.spec()).has_value(); }

  Status encode(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const Codec& codec,
                std::span<std::byte> sections) override {
    const auto spec = parse_spec(codec.spec());
    if (!spec) return {Code::kInvalid, "the device does not encode " + std::string(codec.spec())};
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    const Layout planes =
        layout(shape, align_up(shape.plane_bytes(Part::kKey)), align_up(shape.plane_bytes(Part::kValue)));
    const Coding keys(*spec, shape, Part::kKey);
    const Coding values(*spec, shape, Part::kValue);
    const Layout coded = layout(shape, align_up(keys.section_bytes()), align_up(values.section_bytes()));
    if (sections.size() < coded.bytes()) return too_small();
    const bool raw = spec->name == "raw";
    if (Status status = coded_.reserve(raw ? 0 : coded.bytes()); !status) return status;
    if (Status status = begin(cache, block_ids, planes.bytes()); !status) return status;
    Status status = gather_planes(cache, block_ids, planes);
    if (!raw) {
      const std::uint32_t count = shape.layers * shape.heads;
      // What lies between sections.
      then(status, [&] { return outcome(cudaMemsetAsync(coded_.data(), 0, coded.bytes(), stream_), "encode"); });
      then(status, [&] {
        return keys.encode(key_planes(planes, shape), count, coded_.data(), coded.key_stride, bad_flag(), stream_);
      });
      if (shape.value_dim != 0) {
        then(status, [&] {
          return values.encode(value_planes(planes, shape), count, coded_.data() + coded.key_bytes(),
                               coded.value_stride, bad_flag(), stream_);
        });
      }
    }
    then(status, [&] { return copy_out(raw ? planes_.data() : coded_.data(), coded, sections.data()); });
    Status done = finish(status);
    if (done && found_bad()) return {Code::kInvalid, spec->name + " cannot carry NaN or infinity"};
    return done;
  }

  Status decode(const PagedCache& cache, const PageTarget& target, const ContainerReader& container,
                std::span<const std::byte> bytes, const std::function<Status()>& meanwhile) override {
    const auto spec = parse_spec(container.codec().spec());
    if (!spec) return {Code::kInvalid, "the device does not decode " + std::string(container.codec().spec())};
    const ShardShape& shape = container.info().shape;
    const TokenRange tokens{
        target.first_block * cache.block_tokens,
        static_cast<std::uint32_t>(target.first_block + target.block_ids.size()) * cache.block_tokens};
    if (tokens.end > shape.tokens || target.block_ids.empty())
      return {Code::kInvalid, "the blocks lie outside the chunk"};
    const Coding keys(*spec, shape, Part::kKey);
    const Coding values(*spec, shape, Part::kValue);
    const Layout coded = layout(shape, align_up(keys.section_bytes()), align_up(values.section_bytes()));
    const std::size_t first = container.sections().front().offset;
    if (bytes.size() < first + coded.bytes()) return {Code::kCorrupt, "the sections are smaller than their form"};
    for (const SectionInfo& section : container.sections()) {
      if (section.bytes != (section.extent.has_key ? keys : values).section_bytes()) {
        return {Code::kCorrupt, "a section does not have the size of its form"};
      }
    }
    const std::uint32_t count = tokens.end - tokens.begin;
    ShardShape part = shape;
    part.tokens = count;
    const Layout rows = layout(part, align_up(part.plane_bytes(Part::kKey)), align_up(part.plane_bytes(Part::kValue)));
    const bool raw = spec->name == "raw";
    if (Status status = coded_.reserve(coded.bytes()); !status) return status;
    if (Status status = begin(cache, target.block_ids, raw ? 0 : rows.bytes()); !status) return status;
    Status status = copy_in(bytes.data() + first, coded, coded_.data());
    Planes key_rows = key_planes(rows, part);
    Planes value_rows = value_planes(rows, part);
    const std::uint32_t sections = shape.layers * shape.heads;
    if (raw) {
      // The rows lie in the sections as they are.
      key_rows = {coded_.data() + tokens.begin * shape.row_bytes(Part::kKey), coded.key_stride, key_rows.row_bytes};
      value_rows = {coded_.data() + coded.key_bytes() + tokens.begin * shape.row_bytes(Part::kValue),
                    coded.value_stride, value_rows.row_bytes};
    } else {
      then(status, [&] {
        return keys.decode(coded_.data(), coded.key_stride, sections, tokens, key_rows, bad_flag(), stream_);
      });
      if (shape.value_dim != 0) {
        then(status, [&] {
          return values.decode(coded_.data() + coded.key_bytes(), coded.value_stride, sections, tokens, value_rows,
                               bad_flag(), stream_);
        });
      }
    }
    // The kernel itself looks at the flag that decoding may have set, so that nobody waits in between.
    const Status verified = meanwhile();
    if (verified) then(status, [&] { return launch<Way::kScatter>(cache, shape, count, key_rows, value_rows); });
    if (Status done = finish(status); !done) return done;
    if (!verified) return verified;
    if (found_bad()) return {Code::kCorrupt, "a scale or code is not one that " + spec->name + " writes"};
    return Status::ok();
  }

  Status gather(const PagedCache& cache, std::span<const std::uint32_t> block_ids,
                std::span<std::byte> canonical) override {
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    if (canonical.size() < shape.raw_bytes()) return too_small();
    const Layout planes = layout(shape, shape.plane_bytes(Part::kKey), shape.plane_bytes(Part::kValue));
    if (Status status = begin(cache, block_ids, planes.bytes()); !status) return status;
    Status status = gather_planes(cache, block_ids, planes);
    then(status, [&] { return copy_out(planes_.data(), planes, canonical.data()); });
    return finish(status);
  }

  Status scatter(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const ShardShape& shape,
                 std::span<const std::byte> canonical) override {
    if (canonical.size() != shape.raw_bytes() || shape.tokens != block_ids.size() * cache.block_tokens) {
      return {Code::kInvalid, "the rows are not those of the blocks"};
    }
    const Layout planes = layout(shape, shape.plane_bytes(Part::kKey), shape.plane_bytes(Part::kValue));
    if (Status status = begin(cache, block_ids, planes.bytes()); !status) return status;
    Status status = copy_in(canonical.data(), planes, planes_.data());
    then(status, [&] {
      return launch<Way::kScatter>(cache, shape, shape.tokens, key_planes(planes, shape), value_planes(planes, shape));
    });
    return finish(status);
  }

  Status zero(const PagedCache& cache, std::span<const std::uint32_t> block_ids) override {
    if (block_ids.empty()) return Status::ok();
    if (Status status = begin(cache, block_ids, 0); !status) return status;
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    return finish(launch<Way::kZero>(cache, shape, shape.tokens, key_planes({}, shape), value_planes({}, shape)));
  }

  Moved moved() const override { return moved_; }

 private:
  static Status too_small() { return {Code::kInvalid, "there is not enough room for the chunk"}; }
  static Layout layout(const ShardShape& shape, std::size_t key_stride, std::size_t value_stride) {
    return {shape.layers, shape.heads, key_stride, value_stride};
  }
  Planes key_planes(const Layout& planes, const ShardShape& shape) const {
    return {planes_.data(), planes.key_stride, static_cast<std::uint32_t>(shape.row_bytes(Part::kKey))};
  }
  Planes value_planes(const Layout& planes, const ShardShape& shape) const {
    return {planes_.data() + planes.key_bytes(), planes.value_stride,
            static_cast<std::uint32_t>(shape.row_bytes(Part::kValue))};
  }
  std::uint32_t* bad_flag() const { return reinterpret_cast<std::uint32_t*>(parameters_.data()); }
  bool found_bad() const {
    std::uint32_t flag = 0;
    std::memcpy(&flag, host_flag_.data(), sizeof flag);
    return flag != 0;
  }
  PagedLayer* layer_table() const { return reinterpret_cast<PagedLayer*>(parameters_.data() + kAlignment); }
  std::uint32_t* ids(const PagedCache& cache) const {
    return reinterpret_cast<std::uint32_t*>(parameters_.data() + kAlignment + cache.layers.size() * sizeof(PagedLayer));
  }

  /// Room for planes; the flag (zero), the layers and the block ids to the device.
  Status begin(const PagedCache& cache, std::span<const std::uint32_t> block_ids, std::size_t plane_bytes) {
    if (Status status = outcome(cudaSetDevice(device_), "CUDA device"); !status) return status;
    if (block_ids.empty()) return {Code::kInvalid, "there are no blocks"};
    const std::size_t bytes = kAlignment + cache.layers.size() * sizeof(PagedLayer) + block_ids.size_bytes();
    for (Status status : {planes_.reserve(plane_bytes), parameters_.reserve(bytes), host_parameters_.reserve(bytes),
                          host_flag_.reserve(kAlignment)}) {
      if (!status) return status;
    }
    std::memset(host_parameters_.data(), 0, kAlignment);
    std::memcpy(host_parameters_.data() + kAlignment, cache.layers.data(), cache.layers.size() * sizeof(PagedLayer));
    std::memcpy(host_parameters_.data() + bytes - block_ids.size_bytes(), block_ids.data(), block_ids.size_bytes());
    moved_.to_device += bytes;
    return outcome(cudaMemcpyAsync(parameters_.data(), host_parameters_.data(), bytes, cudaMemcpyHostToDevice, stream_),
                   "parameters");
  }

  /// Brings the flag back and waits for the device. The status is that of what was queued before.
  Status finish(Status status) {
    then(status, [&] {
      moved_.to_host += sizeof(std::uint32_t);
      return outcome(
          cudaMemcpyAsync(host_flag_.data(), bad_flag(), sizeof(std::uint32_t), cudaMemcpyDeviceToHost, stream_),
          "the device's answer");
    });
    then(status, [&] { return outcome(cudaEventRecord(done_, stream_), "the device's answer"); });
    if (status) return outcome(cudaEventSynchronize(done_), "the device");
    // Nothing that was queued may write to memory that the caller gives to others now.
    cudaStreamSynchronize(stream_);
    return status;
  }

  template <Way kWay>
  Status launch(const PagedCache& cache, const ShardShape& shape, std::uint32_t tokens, const Planes& keys,
                const Planes& values) {
    // Where the shard's layers and heads and those of the cache overlap.
    const std::uint32_t layer = std::max(shape.layer_begin, cache.layer_begin);
    const std::uint32_t last_layer =
        std::min(shape.layer_begin + shape.layers, cache.layer_begin + static_cast<std::uint32_t>(cache.layers.size()));
    const std::uint32_t head = std::max(shape.head_begin, cache.head_begin);
    const std::uint32_t last_head = std::min(shape.head_begin + shape.heads, cache.head_begin + cache.heads);
    if (layer >= last_layer || head >= last_head) return Status::ok();
    const std::uint64_t most_units =
        std::uint64_t{tokens} * std::max(keys.row_bytes, values.row_bytes) / sizeof(std::uint16_t);
    if (most_units > kMaxUnits || last_head - head > kMaxGrid || 2 * (last_layer - layer) > kMaxGrid) {
      return {Code::kRefused, "the chunk has more rows than one launch moves"};
    }
    const Move move{.bad = bad_flag(),
                    .layers = layer_table(),
                    .block_ids = ids(cache),
                    .block_tokens = cache.block_tokens,
                    .page_tokens = cache.page_tokens(),
                    .pages_per_block = cache.pages_per_block,
                    .tokens = tokens,
                    .cache_layer = layer - cache.layer_begin,
                    .cache_head = head - cache.head_begin,
                    .plane_layer = layer - shape.layer_begin,
                    .plane_head = head - shape.head_begin,
                    .plane_heads = shape.heads,
                    .keys = keys,
                    .values = values};
    // The widest unit that all addresses are multiples of.
    std::uint64_t bits = keys.row_bytes | values.row_bytes | keys.plane_stride | values.plane_stride |
                         reinterpret_cast<std::uintptr_t>(keys.first) | reinterpret_cast<std::uintptr_t>(values.first);
    for (const PagedLayer& each : cache.layers) {
      bits |= reinterpret_cast<std::uintptr_t>(each.base) | each.page_stride_bytes | each.head_stride_bytes |
              each.token_stride_bytes | each.value_offset_bytes;
    }
    const auto with_unit = [&]<typename Unit>(Unit) {
      const std::uint64_t units = std::uint64_t{tokens} * std::max(keys.row_bytes, values.row_bytes) / sizeof(Unit);
      const dim3 grid(static_cast<unsigned>((units + kThreads - 1) / kThreads), last_head - head,
                      2 * (last_layer - layer));
      move_rows<kWay, Unit><<<grid, kThreads, 0, stream_>>>(move);
    };
    if (bits % 16 == 0) {
      with_unit(uint4{});
    } else if (bits % 4 == 0) {
      with_unit(std::uint32_t{});
    } else {
      with_unit(std::uint16_t{});
    }
    return outcome(cudaGetLastError(), "moving pages");
  }

  Status gather_planes(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const Layout& planes) {
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    if (shape.plane_bytes(Part::kKey) % kAlignment != 0 || shape.plane_bytes(Part::kValue) % kAlignment != 0) {
      if (Status status = outcome(cudaMemsetAsync(planes_.data(), 0, planes.bytes(), stream_), "gather"); !status)
        return status;
    }
    return launch<Way::kGather>(cache, shape, shape.tokens, key_planes(planes, shape), value_planes(planes, shape));
  }
  /// Between [part][layer][head] on the device and [layer][part][head] on the host.
  Status copy_out(const std::byte* device, const Layout& of, std::byte* host) {
    const std::size_t key_width = of.heads * of.key_stride;
    const std::size_t value_width = of.heads * of.value_stride;
    const std::size_t pitch = key_width + value_width;
    moved_.to_host += of.bytes();
    Status status = outcome(
        cudaMemcpy2DAsync(host, pitch, device, key_width, key_width, of.layers, cudaMemcpyDeviceToHost, stream_),
        "copying to the host");
    if (value_width > 0) {
      then(status, [&] {
        return outcome(cudaMemcpy2DAsync(host + key_width, pitch, device + of.key_bytes(), value_width, value_width,
                                         of.layers, cudaMemcpyDeviceToHost, stream_),
                       "copying to the host");
      });
    }
    return status;
  }
  Status copy_in(const std::byte* host, const Layout& of, std::byte* device) {
    const std::size_t key_width = of.heads * of.key_stride;
    const std::size_t value_width = of.heads * of.value_stride;
    const std::size_t pitch = key_width + value_width;
    moved_.to_device += of.bytes();
    Status status = outcome(
        cudaMemcpy2DAsync(device, key_width, host, pitch, key_width, of.layers, cudaMemcpyHostToDevice, stream_),
        "copying to the device");
    if (value_width > 0) {
      then(status, [&] {
        return outcome(cudaMemcpy2DAsync(device + of.key_bytes(), value_width, host + key_width, pitch, value_width,
                                         of.layers, cudaMemcpyHostToDevice, stream_),
                       "copying to the device");
      });
    }
    return status;
  }

  const int device_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t done_ = nullptr;
  Buffer<false> planes_;
  Buffer<false> coded_;
  Buffer<false> parameters_;
  Buffer<true> host_parameters_;
  Buffer<true> host_flag_;
  Moved moved_;
};

}  // namespace

Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(int device) {
  auto coder = std::make_unique<CudaPageCoder>(device);
  if (Status status = coder->open(); !status) return failure(status);
  return coder;
}

}  // namespace kvern
