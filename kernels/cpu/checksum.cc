#include "kernels/checksum.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/copy.h"
#include "kernels/cpu/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/checksum.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace kvern {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr std::size_t kStripe = 64;
constexpr std::size_t kStripesPerBlock = 16;  // (192 - 64) / 8: XXH3 moves through its secret in steps of 8 bytes
constexpr std::size_t kScrambleOffset = 128;
constexpr std::uint32_t kPrime32 = 0x9E3779B1U;

enum class Store { kNone, kCached, kStream };

// The inner loop of XXH3 over whole stripes, starting at stripe `first` of a block. Vectors that are hashed are the
// very registers that are stored.
#if HWY_TARGET == HWY_SCALAR

template <Store kStore>
void accumulate(std::uint64_t* lanes, std::uint8_t* destination, const std::uint8_t* source, std::size_t stripes,
                std::size_t first, const std::uint8_t* secret) {
  for (std::size_t stripe = 0; stripe < stripes; ++stripe) {
    std::uint64_t data[8];
    std::memcpy(data, source + stripe * kStripe, kStripe);
    if constexpr (kStore != Store::kNone) std::memcpy(destination + stripe * kStripe, data, kStripe);
    std::uint64_t key[8];
    std::memcpy(key, secret + first * 8, kStripe);
    for (std::size_t i = 0; i < 8; ++i) {
      const std::uint64_t mixed = data[i] ^ key[i];
      lanes[i ^ 1] += data[i];
      lanes[i] += (mixed & 0xffffffffU) * (mixed >> 32);
    }
    if (++first == kStripesPerBlock) {
      first = 0;
      std::memcpy(key, secret + kScrambleOffset, kStripe);
      for (std::size_t i = 0; i < 8; ++i) lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ key[i]) * kPrime32;
    }
  }
}

#else

template <Store kStore>
void accumulate(std::uint64_t* lanes, std::uint8_t* destination, const std::uint8_t* source, std::size_t stripes,
                std::size_t first, const std::uint8_t* secret) {
  const hn::CappedTag<std::uint64_t, 8> d;
  const hn::Repartition<std::uint32_t, decltype(d)> d32;
  const hn::Repartition<std::uint8_t, decltype(d)> d8;
  using V = hn::VFromD<decltype(d)>;
  constexpr std::size_t kLanes = hn::MaxLanes(d);
  constexpr std::size_t kVectors = 8 / kLanes;

  V sum[kVectors];
  for (std::size_t i = 0; i < kVectors; ++i) sum[i] = hn::Load(d, lanes + i * kLanes);

  const auto step = [&](std::size_t stripe, std::size_t in_block) HWY_ATTR {
    for (std::size_t i = 0; i < kVectors; ++i) {
      const std::size_t offset = stripe * kStripe + i * kLanes * 8;
      const auto raw = hn::LoadU(d8, source + offset);
      if constexpr (kStore == Store::kCached) hn::StoreU(raw, d8, destination + offset);
      if constexpr (kStore == Store::kStream) hn::Stream(raw, d8, destination + offset);
      const V data = hn::BitCast(d, raw);
      const V key = hn::BitCast(d, hn::LoadU(d8, secret + in_block * 8 + i * kLanes * 8));
      const V mixed = hn::Xor(data, key);
      const V product = hn::MulEven(hn::BitCast(d32, mixed), hn::BitCast(d32, hn::ShiftRight<32>(mixed)));
      sum[i] = hn::Add(sum[i], hn::Add(product, hn::Shuffle01(data)));
    }
  };
  const auto scramble = [&]() HWY_ATTR {
    const auto prime = hn::Set(d32, kPrime32);
    for (std::size_t i = 0; i < kVectors; ++i) {
      const V key = hn::BitCast(d, hn::LoadU(d8, secret + kScrambleOffset + i * kLanes * 8));
      const V mixed = hn::Xor(hn::Xor(sum[i], hn::ShiftRight<47>(sum[i])), key);
      const V low = hn::MulEven(hn::BitCast(d32, mixed), prime);
      const V high = hn::MulEven(hn::BitCast(d32, hn::ShiftRight<32>(mixed)), prime);
      sum[i] = hn::Add(low, hn::ShiftLeft<32>(high));
    }
  };

  std::size_t stripe = 0;
  while (stripe < stripes) {
    if (first == 0 && stripes - stripe >= kStripesPerBlock) {
      for (std::size_t i = 0; i < kStripesPerBlock; ++i) step(stripe + i, i);
      scramble();
      stripe += kStripesPerBlock;
      continue;
    }
    step(stripe++, first++);
    if (first == kStripesPerBlock) {
      scramble();
      first = 0;
    }
  }
  for (std::size_t i = 0; i < kVectors; ++i) hn::Store(sum[i], d, lanes + i * kLanes);
}

#endif

void accumulate_read(std::uint64_t* lanes, std::uint8_t* destination, const std::uint8_t* source, std::size_t stripes,
                     std::size_t first, const std::uint8_t* secret) {
  accumulate<Store::kNone>(lanes, destination, source, stripes, first, secret);
}
void accumulate_copy(std::uint64_t* lanes, std::uint8_t* destination, const std::uint8_t* source, std::size_t stripes,
                     std::size_t first, const std::uint8_t* secret) {
  accumulate<Store::kCached>(lanes, destination, source, stripes, first, secret);
}
// One line, from memory that was just written, to an aligned place.
void stream_stripe(std::uint8_t* destination, const std::uint8_t* source) {
#if HWY_TARGET == HWY_SCALAR
  std::memcpy(destination, source, kStripe);
#else
  const hn::CappedTag<std::uint8_t, kStripe> d;
  for (std::size_t i = 0; i < kStripe; i += hn::MaxLanes(d)) hn::Stream(hn::LoadU(d, source + i), d, destination + i);
#endif
}
void accumulate_stream(std::uint64_t* lanes, std::uint8_t* destination, const std::uint8_t* source, std::size_t stripes,
                       std::size_t first, const std::uint8_t* secret) {
  accumulate<Store::kStream>(lanes, destination, source, stripes, first, secret);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace kvern {

static_assert(std::endian::native == std::endian::little, "containers are little-endian and used in place");

HWY_EXPORT(accumulate_read);
HWY_EXPORT(accumulate_copy);
HWY_EXPORT(accumulate_stream);
HWY_EXPORT(stream_stripe);

namespace {

constexpr std::size_t kSecretBytes = 192;
constexpr std::size_t kLongestShortInput = 240;
constexpr std::size_t kLastStripeOffset = kSecretBytes - 64 - 7;
constexpr std::size_t kMergeOffset = 11;
constexpr std::size_t kStripesInBlock = 16;
constexpr std::uint64_t kPrime64 = 0x9E3779B185EBCA87ULL;
constexpr std::array<std::uint64_t, 8> kFirstLanes = {
    0xC2B2AE3DULL,         kPrime64,      0xC2B2AE3D27D4EB4FULL, 0x165667B19E3779F9ULL,
    0x85EBCA77C2B2AE63ULL, 0x85EBCA77ULL, 0x27D4EB2F165667C5ULL, 0x9E3779B1ULL};

const std::uint8_t* secret() {
  static const auto bytes = [] {
    std::array<std::uint8_t, kSecretBytes> value{};
    XXH3_generateSecret_fromSeed(value.data(), 0);
    return value;
  }();
  return bytes.data();
}

std::uint64_t read64(const std::uint8_t* bytes) {
  std::uint64_t value = 0;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
  const XXH128_hash_t product = XXH_mult64to128(a, b);
  return product.low64 ^ product.high64;
}

}  // namespace

Checksum64::Checksum64() : lanes_(kFirstLanes) {}

void Checksum64::update(const void* source, std::size_t bytes) {
  consume(Mode::kRead, nullptr, static_cast<const std::uint8_t*>(source), bytes);
}
void Checksum64::copy(void* destination, const void* source, std::size_t bytes) {
  consume(Mode::kCopy, static_cast<std::uint8_t*>(destination), static_cast<const std::uint8_t*>(source), bytes);
}
void Checksum64::stream_copy(void* destination, const void* source, std::size_t bytes) {
  streamed_ = true;
  consume(Mode::kStream, static_cast<std::uint8_t*>(destination), static_cast<const std::uint8_t*>(source), bytes);
}

void Checksum64::accumulate(Mode mode, std::uint8_t* destination, const std::uint8_t* source, std::size_t stripes) {
  if (stripes == 0) return;
  if (mode == Mode::kStream && reinterpret_cast<std::uintptr_t>(destination) % kStripeBytes != 0) mode = Mode::kCopy;
  switch (mode) {
    case Mode::kRead:
      HWY_DYNAMIC_DISPATCH(accumulate_read)(lanes_.data(), destination, source, stripes, stripe_in_block_, secret());
      break;
    case Mode::kCopy:
      HWY_DYNAMIC_DISPATCH(accumulate_copy)(lanes_.data(), destination, source, stripes, stripe_in_block_, secret());
      break;
    case Mode::kStream:
      HWY_DYNAMIC_DISPATCH(accumulate_stream)(lanes_.data(), destination, source, stripes, stripe_in_block_, secret());
      break;
  }
  stripe_in_block_ = (stripe_in_block_ + stripes) % kStripesInBlock;
}

// Consumes all held stripes but the last, full or not: XXH3 treats the last 64 bytes of its input differently.
void Checksum64::drop_held() {
  const std::size_t bytes = (held_ - 1) / kStripeBytes * kStripeBytes;
  if (bytes == 0) return;
  accumulate(Mode::kRead, nullptr, buffer_.data() + kStripeBytes, bytes / kStripeBytes);
  std::memmove(buffer_.data(), buffer_.data() + bytes, kStripeBytes + held_ - bytes);
  held_ -= bytes;
}

void Checksum64::consume(Mode mode, std::uint8_t* destination, const std::uint8_t* source, std::size_t bytes) {
  const auto hold = [&](std::size_t count) {
    std::uint8_t* held = buffer_.data() + kStripeBytes + held_;
    std::memcpy(held, source, count);
    if (mode == Mode::kStream && count == kStripeBytes &&
        reinterpret_cast<std::uintptr_t>(destination) % kStripeBytes == 0) {
      // The only line of the piece that would be fetched to be written.
      HWY_DYNAMIC_DISPATCH(stream_stripe)(destination, held);
      streamed_ = true;
      destination += count;
    } else if (mode != Mode::kRead) {
      std::memcpy(destination, held, count);
      destination += count;
    }
    held_ += count;
    source += count;
    bytes -= count;
  };
  if (bytes == 0) return;
  total_bytes_ += bytes;
  if (total_bytes_ <= kHeldBytes) {
    hold(bytes);
    return;
  }
  if (held_ > 0) {
    hold(std::min(bytes, (kStripeBytes - held_ % kStripeBytes) % kStripeBytes));
    drop_held();
    if (bytes == 0) return;
    accumulate(Mode::kRead, nullptr, buffer_.data() + kStripeBytes, 1);
    std::memcpy(buffer_.data(), buffer_.data() + kStripeBytes, kStripeBytes);
    held_ = 0;
  }
  const std::size_t stripes = (bytes - 1) / kStripeBytes;
  if (stripes > 0) {
    accumulate(mode, destination, source, stripes);
    const std::size_t consumed = stripes * kStripeBytes;
    std::memcpy(buffer_.data(), source + consumed - kStripeBytes, kStripeBytes);
    source += consumed;
    bytes -= consumed;
    if (mode != Mode::kRead) destination += consumed;
  }
  hold(bytes);
}

std::uint64_t Checksum64::digest() const {
  if (streamed_) stream_fence();
  const std::uint8_t* held = buffer_.data() + kStripeBytes;
  if (total_bytes_ <= kLongestShortInput) return XXH3_64bits(held, held_);
  alignas(64) std::array<std::uint64_t, 8> lanes = lanes_;
  const auto accumulate_one = HWY_DYNAMIC_DISPATCH(accumulate_read);
  const std::size_t stripes = (held_ - 1) / kStripeBytes;
  accumulate_one(lanes.data(), nullptr, held, stripes, stripe_in_block_, secret());
  // One stripe from the middle of the secret; its place in the block stays below the end, so nothing is scrambled.
  accumulate_one(lanes.data(), nullptr, held + held_ - kStripeBytes, 1, 0, secret() + kLastStripeOffset);
  std::uint64_t hash = total_bytes_ * kPrime64;
  for (std::size_t i = 0; i < 4; ++i) {
    const std::uint8_t* key = secret() + kMergeOffset + 16 * i;
    hash += fold(lanes[2 * i] ^ read64(key), lanes[2 * i + 1] ^ read64(key + 8));
  }
  hash ^= hash >> 37;
  hash *= 0x165667919E3779F9ULL;
  return hash ^ (hash >> 32);
}

std::uint64_t fast_checksum64(const void* data, std::size_t bytes) {
  Checksum64 checksum;
  checksum.update(data, bytes);
  return checksum.digest();
}

}  // namespace kvern

#endif
