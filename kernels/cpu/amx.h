#pragma once

#include <cstddef>
#include <cstdint>

/// Products of bf16 matrices with the tile registers of x86-64 (AMX), which Highway does not know. Sixteen times the
/// multiply-adds of AVX-512; sums are fp32, products exact.
namespace kvern::amx {

/// Rows of a tile of keys, and of queries.
constexpr std::uint32_t kTileRows = 16;
/// Elements of a row in a tile.
constexpr std::uint32_t kTileDim = 32;
/// Keys that multiply() takes, in three tiles.
constexpr std::uint32_t kKeys = 48;

/// True where the processor has it and the system lets this process use it. The first call asks, later ones remember.
bool available();

/// While one lives, its thread's tile registers are set up for multiply().
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

/// out[i] receives <key, query> as [kKeys][kTileRows] for two groups of kTileRows queries (out[1] may be null: one
/// group). keys is [kKeys][dim], queries [group][dim / 2][kTileRows][2]; dim is a multiple of kTileDim. All at
/// multiples of 64 bytes.
void multiply(const std::uint16_t* keys, const std::uint16_t* queries, std::uint32_t dim, float* const out[2]);

}  // namespace kvern::amx
