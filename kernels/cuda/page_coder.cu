#include "kernels/cuda/page_coder.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/codec_step.h"
#include "kernels/cuda/int8.h"
#include "kernels/cuda/page_moves.h"
#include "kernels/cuda/quantise.h"
#include "kernels/cuda/rows.cuh"

namespace kvern {
namespace {

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
  Status encode(const cuda::PagedRows& rows, std::uint32_t count, std::byte* sections, std::size_t stride,
                std::uint32_t* bad, cudaStream_t stream) const {
    return int8_ ? int8::cuda_encode_pages(int8_form_, rows, count, sections, stride, bad, stream)
                 : quantise::cuda_encode_pages(form_, rows, count, sections, stride, bad, stream);
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
  explicit CudaPageCoder(std::shared_ptr<const CudaPartition> partition)
      : partition_(std::move(partition)), device_(partition_->device()) {}
  ~CudaPageCoder() override {
    cudaSetDevice(device_);
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    if (done_ != nullptr) cudaEventDestroy(done_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  Status open() {
    if (Status status = outcome(cudaSetDevice(device_), "CUDA device"); !status) return status;
    const auto stream = partition_->make_stream();
    if (!stream) return stream.error();
    stream_ = *stream;
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
    const bool gathers = raw || !encodes_from_pages(cache, shape);
    if (Status status = begin(cache, block_ids, gathers ? planes.bytes() : 0); !status) return status;
    Status status = gathers ? gather_planes(cache, block_ids, planes) : Status::ok();
    if (!raw) {
      const std::uint32_t count = shape.layers * shape.heads;
      if (coded.key_stride != keys.section_bytes() || coded.value_stride != values.section_bytes()) {
        // What lies between sections.
        then(status, [&] { return outcome(cudaMemsetAsync(coded_.data(), 0, coded.bytes(), stream_), "encode"); });
      }
      const auto encode = [&](Part part, const Coding& coding, std::byte* to, std::size_t stride) {
        then(status, [&] {
          if (!gathers) {
            return coding.encode(paged_rows(cache, block_ids, part), count, to, stride, bad_flag(), stream_);
          }
          const Planes rows = part == Part::kKey ? key_planes(planes, shape) : value_planes(planes, shape);
          return coding.encode(rows, count, to, stride, bad_flag(), stream_);
        });
      };
      encode(Part::kKey, keys, coded_.data(), coded.key_stride);
      if (shape.value_dim != 0) {
        encode(Part::kValue, values, coded_.data() + coded.key_bytes(), coded.value_stride);
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
    if (verified)
      then(status, [&] { return cuda_scatter_pages(move(cache, shape, count, key_rows, value_rows), stream_); });
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
      return cuda_scatter_pages(
          move(cache, shape, shape.tokens, key_planes(planes, shape), value_planes(planes, shape)), stream_);
    });
    return finish(status);
  }

  Status zero(const PagedCache& cache, std::span<const std::uint32_t> block_ids) override {
    if (block_ids.empty()) return Status::ok();
    if (Status status = begin(cache, block_ids, 0); !status) return status;
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    return finish(
        cuda_zero_pages(move(cache, shape, shape.tokens, key_planes({}, shape), value_planes({}, shape)), stream_));
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
  /// Whether the code kernels can read the rows where they lie.
  static bool encodes_from_pages(const PagedCache& cache, const ShardShape& shape) {
    constexpr std::uint64_t kLoadBytes = 16;
    const std::uint64_t plane_bytes = std::max(shape.plane_bytes(Part::kKey), shape.plane_bytes(Part::kValue));
    return address_bits(cache) % kLoadBytes == 0 && plane_bytes / kLoadBytes < cuda::Divisor::kEnd;
  }
  /// Once begin() has put there what they name.
  cuda::PagedRows paged_rows(const PagedCache& cache, std::span<const std::uint32_t> block_ids, Part part) const {
    return {.layers = layer_table(),
            .pages = ids(cache) + block_ids.size(),
            .page_tokens = cuda::Divisor(cache.page_tokens()),
            .heads = cuda::Divisor(cache.heads),
            .value = part == Part::kValue};
  }

  /// Room for planes; the flag (zero), the layers, the block ids and the numbers of the blocks' pages to the device.
  Status begin(const PagedCache& cache, std::span<const std::uint32_t> block_ids, std::size_t plane_bytes) {
    if (Status status = outcome(cudaSetDevice(device_), "CUDA device"); !status) return status;
    if (block_ids.empty()) return {Code::kInvalid, "there are no blocks"};
    std::vector<std::uint32_t> numbers(block_ids.begin(), block_ids.end());
    for (const std::uint32_t block : block_ids) {
      for (std::uint32_t i = 0; i < cache.pages_per_block; ++i) numbers.push_back(block * cache.pages_per_block + i);
    }
    const std::size_t numbers_at = kAlignment + cache.layers.size() * sizeof(PagedLayer);
    const std::size_t bytes = numbers_at + numbers.size() * sizeof(std::uint32_t);
    for (Status status : {planes_.reserve(plane_bytes), parameters_.reserve(bytes), host_parameters_.reserve(bytes),
                          host_flag_.reserve(kAlignment)}) {
      if (!status) return status;
    }
    std::memset(host_parameters_.data(), 0, kAlignment);
    std::memcpy(host_parameters_.data() + kAlignment, cache.layers.data(), cache.layers.size() * sizeof(PagedLayer));
    std::memcpy(host_parameters_.data() + numbers_at, numbers.data(), bytes - numbers_at);
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

  /// What lies in pages and in planes.
  PageMove move(const PagedCache& cache, const ShardShape& shape, std::uint32_t tokens, const Planes& keys,
                const Planes& values) const {
    return {.cache = cache,
            .shape = shape,
            .tokens = tokens,
            .keys = keys,
            .values = values,
            .layers = layer_table(),
            .block_ids = ids(cache),
            .bad = bad_flag()};
  }

  Status gather_planes(const PagedCache& cache, std::span<const std::uint32_t> block_ids, const Layout& planes) {
    const ShardShape shape = cache.shape(static_cast<std::uint32_t>(block_ids.size()));
    if (shape.plane_bytes(Part::kKey) % kAlignment != 0 || shape.plane_bytes(Part::kValue) % kAlignment != 0) {
      if (Status status = outcome(cudaMemsetAsync(planes_.data(), 0, planes.bytes(), stream_), "gather"); !status)
        return status;
    }
    return cuda_gather_pages(move(cache, shape, shape.tokens, key_planes(planes, shape), value_planes(planes, shape)),
                             stream_);
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

  const std::shared_ptr<const CudaPartition> partition_;
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

Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(std::shared_ptr<const CudaPartition> partition) {
  auto coder = std::make_unique<CudaPageCoder>(std::move(partition));
  if (Status status = coder->open(); !status) return failure(status);
  return coder;
}

Result<std::unique_ptr<PageCoder>> make_cuda_page_coder(int device) {
  auto partition = CudaPartition::make(device, 0);
  if (!partition) return failure(partition.error());
  return make_cuda_page_coder(std::move(*partition));
}

}  // namespace kvern
