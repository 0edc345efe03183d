#include "kernels/cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace kvern::amx {
namespace {

bool processor_has_it() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  constexpr unsigned kBf16 = 1U << 22;
  constexpr unsigned kTile = 1U << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTile) != 0;
}

/// Linux saves the tile registers only of processes that have asked for it.
bool system_allows_it() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

/// All eight registers hold 16 rows of 64 bytes.
struct alignas(64) Configuration {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((target("amx-tile"))) void configure() {
  static constexpr Configuration kConfiguration;
  _tile_loadconfig(&kConfiguration);
}

__attribute__((target("amx-tile"))) void release() { _tile_release(); }

}  // namespace

bool available() {
  static const bool usable = processor_has_it() && system_allows_it();
  return usable;
}

Session::Session() { configure(); }
Session::~Session() { release(); }

__attribute__((target("amx-tile,amx-bf16"))) void multiply(const std::uint16_t* keys, const std::uint16_t* queries,
                                                           std::uint32_t dim, float* const out[2]) {
  const std::size_t key_bytes = dim * sizeof(std::uint16_t);
  const std::size_t tile_keys = std::size_t{kTileRows} * dim;
  constexpr std::size_t kQueryTile = std::size_t{kTileRows} * kTileDim;
  constexpr std::size_t kRowBytes = 64;
  const bool both = out[1] != nullptr;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (std::uint32_t i = 0; i < dim; i += kTileDim) {
    const std::uint16_t* key = keys + i;
    const std::uint16_t* query = queries + std::size_t{i} * kTileRows;
    static_assert(kQueryTile == kTileDim * kTileRows);
    _tile_loadd(6, query, kRowBytes);
    _tile_loadd(7, key, key_bytes);
    _tile_dpbf16ps(0, 7, 6);
    _tile_loadd(7, key + tile_keys, key_bytes);
    _tile_dpbf16ps(1, 7, 6);
    _tile_loadd(7, key + 2 * tile_keys, key_bytes);
    _tile_dpbf16ps(2, 7, 6);
    if (!both) continue;
    _tile_loadd(6, query + std::size_t{dim} * kTileRows, kRowBytes);
    _tile_dpbf16ps(5, 7, 6);
    _tile_loadd(7, key + tile_keys, key_bytes);
    _tile_dpbf16ps(4, 7, 6);
    _tile_loadd(7, key, key_bytes);
    _tile_dpbf16ps(3, 7, 6);
  }
  constexpr std::size_t kOutTile = std::size_t{kTileRows} * kTileRows;
  _tile_stored(0, out[0], kRowBytes);
  _tile_stored(1, out[0] + kOutTile, kRowBytes);
  _tile_stored(2, out[0] + 2 * kOutTile, kRowBytes);
  if (!both) return;
  _tile_stored(3, out[1], kRowBytes);
  _tile_stored(4, out[1] + kOutTile, kRowBytes);
  _tile_stored(5, out[1] + 2 * kOutTile, kRowBytes);
}

}  // namespace kvern::amx

#else

namespace kvern::amx {

bool available() { return false; }
Session::Session() = default;
Session::~Session() = default;
void multiply(const std::uint16_t*, const std::uint16_t*, std::uint32_t, float* const[2]) {}

}  // namespace kvern::amx

#endif
