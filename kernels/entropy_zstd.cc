#include "kernels/entropy_zstd.h"

#include <zstd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>

#include "kernels/byte_planes.h"
#include "kernels/codec_step.h"
#include "kernels/scratch.h"

namespace kvern {
namespace {

/// Higher levels take seconds per section and gain nothing on noise.
constexpr std::uint32_t kMaxLevel = 19;
constexpr std::uint32_t kDefaultLevel = 3;
constexpr std::size_t kMaxFrames = 4;

struct FreeContext {
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

/// Contexts are large and slow to make: one of each per thread.
template <typename Context, Context* create()>
Context* context_of_thread() {
  thread_local const std::unique_ptr<Context, FreeContext> context(create());
  if (context == nullptr) throw std::bad_alloc();
  return context.get();
}

/// For frames of one section. Byte planes of rows are noise around one distribution: the fewer matches zstd finds there
/// the smaller and faster its output, down to the entropy of the bytes, so they get its smallest tables whatever the
/// level. On normal numbers the exponents take .33 of their bytes so, .40 at level 3, .33 at level 19, at 4 times the
/// speed of level 3.
ZSTD_CCtx* compressor(int level, bool byte_planes) {
  constexpr int kSmallestHashLog = 6;
  constexpr int kLongestMinMatch = 7;
  ZSTD_CCtx* context = context_of_thread<ZSTD_CCtx, ZSTD_createCCtx>();
  ZSTD_CCtx_reset(context, ZSTD_reset_session_and_parameters);
  ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, byte_planes ? 1 : level);
  if (byte_planes) {
    ZSTD_CCtx_setParameter(context, ZSTD_c_strategy, ZSTD_fast);
    ZSTD_CCtx_setParameter(context, ZSTD_c_hashLog, kSmallestHashLog);
    ZSTD_CCtx_setParameter(context, ZSTD_c_minMatch, kLongestMinMatch);
  }
  return context;
}

Status corrupt(const char* why) { return {Code::kCorrupt, std::string("zstd section: ") + why}; }

}  // namespace

ZstdCodec::ZstdCodec(std::shared_ptr<const Codec> inner, int level)
    : inner_(std::move(inner)),
      level_(level),
      spec_(std::string(inner_->spec()) + " | zstd(level=" + std::to_string(level) + ")") {}

Status ZstdCodec::accepts(const ShardShape& shape) const { return inner_->accepts(shape); }

std::size_t ZstdCodec::frames(const ShardShape& shape) const {
  return inner_->verbatim() ? std::min(dtype_bytes(shape.dtype), kMaxFrames) : 1;
}

std::vector<SectionPlan> ZstdCodec::plan(const ShardShape& shape) const {
  auto sections = inner_->plan(shape);
  const std::size_t count = frames(shape);
  for (SectionPlan& section : sections) {
    section.max_bytes =
        (1 + count) * sizeof(std::uint64_t) + count * ZSTD_compressBound((section.max_bytes + count - 1) / count);
  }
  return sections;
}

Result<std::size_t> ZstdCodec::encode(const ShardShape& shape, const SectionExtent& extent,
                                      std::span<const std::byte> planes, std::span<std::byte> out) const {
  const Scratch room(inner_->max_bytes(shape, extent));
  const auto size = inner_->encode(shape, extent, planes, room.first(inner_->max_bytes(shape, extent)));
  if (!size) return failure(size.error());
  const std::size_t count = frames(shape);
  const Scratch split(count > 1 ? *size : 0);
  std::span<const std::byte> bytes = room.first(*size);
  if (count > 1) {
    split_byte_planes(bytes, count, split.first(*size));
    bytes = split.first(*size);
  }
  std::array<std::uint64_t, 1 + kMaxFrames> sizes{*size};
  const std::size_t head_bytes = (1 + count) * sizeof(std::uint64_t);
  std::size_t used = head_bytes;
  ZSTD_CCtx* context = compressor(level_, count > 1);
  for (std::size_t i = 0; i < count; ++i) {
    const auto frame = bytes.subspan(i * (*size / count), *size / count);
    const std::size_t written =
        ZSTD_compress2(context, out.data() + used, out.size() - used, frame.data(), frame.size());
    if (ZSTD_isError(written) != 0) {
      return failure(Code::kInternal, std::string("zstd cannot compress: ") + ZSTD_getErrorName(written));
    }
    sizes[1 + i] = written;
    used += written;
  }
  std::memcpy(out.data(), sizes.data(), head_bytes);
  return used;
}

Status ZstdCodec::decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                         TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const {
  const std::size_t count = frames(shape);
  std::array<std::uint64_t, 1 + kMaxFrames> sizes{};
  const std::size_t head_bytes = (1 + count) * sizeof(std::uint64_t);
  if (payload.size() < head_bytes) return corrupt("it is too short");
  std::memcpy(sizes.data(), payload.data(), head_bytes);
  const std::uint64_t inner_bytes = sizes[0];
  // Bounds the memory that a frame may ask for.
  if (inner_bytes > inner_->max_bytes(shape, extent) || inner_bytes % count != 0) {
    return corrupt("it says that it holds what its chain does not write");
  }
  const Scratch joined(inner_bytes);
  const Scratch split(count > 1 ? inner_bytes : 0);
  const auto bytes = (count > 1 ? split : joined).first(inner_bytes);
  std::span<const std::byte> left = payload.subspan(head_bytes);
  for (std::size_t i = 0; i < count; ++i) {
    if (sizes[1 + i] > left.size()) return corrupt("a frame is cut off");
    const auto frame = left.first(sizes[1 + i]);
    left = left.subspan(frame.size());
    const auto into = bytes.subspan(i * (inner_bytes / count), inner_bytes / count);
    // One frame, and nothing behind it.
    if (ZSTD_findFrameCompressedSize(frame.data(), frame.size()) != frame.size()) return corrupt("a frame is damaged");
    const std::size_t written = ZSTD_decompressDCtx(context_of_thread<ZSTD_DCtx, ZSTD_createDCtx>(), into.data(),
                                                    into.size(), frame.data(), frame.size());
    if (ZSTD_isError(written) != 0 || written != into.size()) return corrupt("a frame is damaged");
  }
  if (!left.empty()) return corrupt("bytes follow its frames");
  if (count > 1) join_byte_planes(bytes, count, joined.first(inner_bytes));
  return inner_->decode(shape, extent, joined.first(inner_bytes), tokens, head_begin, head_end, sink);
}

MakeWrapper make_zstd_wrapper;

Result<std::shared_ptr<const Codec>> make_zstd_wrapper(const CodecStep& step, std::shared_ptr<const Codec> inner) {
  if (Status names = step.check_names({"level"}); !names) return failure(names);
  const auto level = step.number_within("level", kDefaultLevel, 1, kMaxLevel);
  if (!level) return failure(level.error());
  return std::make_shared<ZstdCodec>(std::move(inner), static_cast<int>(*level));
}

}  // namespace kvern
