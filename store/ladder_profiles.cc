#include <array>

#include "store/ladder.h"

namespace kvern {
namespace {

// Bytes and errors are those of docs/quality.md ("Of chains for stored chunks alone" and "Chains"): whole containers of
// 256 tokens of real keys and values, against full attention, the worse of its two texts. `make quality` measures them
// again; tests/store/ladder_test.cc holds the bytes against containers that the codecs write.
//
// int4 after int8r is what is left of it without its residual, so it has the bytes of `int4` without zstd.
constexpr double kInt8Error = 0.0084;

const std::array<LadderProfile, 3>& profiles() {
  static const std::array<LadderProfile, 3> all = {
      LadderProfile{.name = "exact",
                    .rungs = {{.codec_spec = "raw", .bytes_share = 1.002, .error = 0},
                              {.codec_spec = "raw | zstd", .bytes_share = 0.709, .error = 0}}},
      LadderProfile{
          .name = "balanced",
          .rungs = {{.codec_spec = "int8r", .bytes_share = 0.533, .error = kInt8Error},
                    {.codec_spec = "int4", .bytes_share = 0.283, .error = 0.0584, .is_part_of_previous = true}}},
      LadderProfile{
          .name = "compact",
          .rungs = {{.codec_spec = "int8r", .bytes_share = 0.533, .error = kInt8Error},
                    {.codec_spec = "int4", .bytes_share = 0.283, .error = 0.0584, .is_part_of_previous = true},
                    {.codec_spec = "centroid(ratio=0.5) | int4",
                     .bytes_share = 0.146,
                     .error = 0.1495,
                     .source_error_max = kInt8Error},
                    {.codec_spec = "centroid(ratio=0.25) | int4",
                     .bytes_share = 0.076,
                     .error = 0.2364,
                     .source_error_max = kInt8Error}}},
  };
  return all;
}

}  // namespace

std::span<const LadderProfile> ladder_profiles() { return profiles(); }

}  // namespace kvern
