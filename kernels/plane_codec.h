#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/codec.h"

namespace kvern {

/// Base of codecs whose sections are one plane each (one layer, K or V, one head): readers with another tensor-parallel
/// size decode just their heads. Sections are stored in the order layer, part, head; planes of no bytes have none.
class PlaneCodec : public Codec {
 public:
  std::vector<SectionPlan> plan(const ShardShape& shape) const final;
  Result<std::size_t> encode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> planes,
                             std::span<std::byte> out) const final;
  Status decode(const ShardShape& shape, const SectionExtent& extent, std::span<const std::byte> payload,
                TokenRange tokens, std::uint32_t head_begin, std::uint32_t head_end, RowSink& sink) const final;

 protected:
  /// Puts rows of one plane where the engine wants them.
  class PlaneSink {
   public:
    PlaneSink(RowSink& sink, std::uint32_t layer, Part part, std::uint32_t head)
        : sink_(sink), layer_(layer), part_(part), head_(head), preferred_rows_(sink.preferred_rows()) {}

    /// Calls run(begin, end) for pieces of the range that do not cross a multiple of the sink's preferred rows and hold
    /// at most max_rows.
    template <typename Run>
    void for_each_run(TokenRange tokens, std::uint32_t max_rows, Run run) const {
      for (std::uint32_t begin = tokens.begin; begin < tokens.end;) {
        std::uint32_t rows = std::min(tokens.end - begin, max_rows);
        if (preferred_rows_ > 0) rows = std::min(rows, preferred_rows_ - begin % preferred_rows_);
        run(begin, begin + rows);
        begin += rows;
      }
    }
    void write(std::uint32_t token, std::uint32_t count, const std::byte* rows) {
      sink_.write(layer_, part_, head_, token, count, rows);
    }

   private:
    RowSink& sink_;
    std::uint32_t layer_;
    Part part_;
    std::uint32_t head_;
    std::uint32_t preferred_rows_;
  };

  virtual std::size_t max_plane_bytes(const ShardShape& shape, Part part) const = 0;
  virtual Result<std::size_t> encode_plane(const ShardShape& shape, Part part, std::span<const std::byte> plane,
                                           std::span<std::byte> out) const = 0;
  virtual Status decode_plane(const ShardShape& shape, Part part, std::span<const std::byte> payload, TokenRange tokens,
                              PlaneSink& sink) const = 0;
};

}  // namespace kvern
