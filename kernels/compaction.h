#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/slot_layout.h"
#include "base/status.h"
#include "kernels/chain.h"
#include "kernels/head_rows.h"
#include "kernels/rope.h"
#include "kernels/selection.h"

namespace kvern {

class Executor;

/// What a compact cache of a prompt looks like before any of its bytes is there: follows from the spec and the number
/// of tokens alone, so that it can be told at once. Every head of a layer keeps the same number of tokens, and so do
/// the layers, unless the cache is ragged: then each layer keeps whole pages of the engine, mean_slots on average.
struct CompactionPlan {
  Chain chain;                      ///< canonical; its first step picks the tokens
  std::uint32_t prompt_tokens = 0;  ///< N
  std::uint32_t slots = 0;          ///< M <= N: what a request claims in every layer
  std::uint32_t mean_slots = 0;     ///< that layers keep on average: M, or fewer in the layout shift
  std::uint32_t query_rows = 0;     ///< last queries of the prompt that are needed; 0: none
  SlotLayout layout = SlotLayout::kRectangular;
  std::uint32_t page_tokens = 0;  ///< of the engine, of a ragged cache

  /// The shift layout holds the blocks of the thickest layer, which must be known before any layer is: no layer keeps
  /// more than this many times the mean. A pyramid's thickest layer stays below it by itself.
  static constexpr std::uint32_t kShiftPeak = 2;

  /// layout, page_tokens: how an engine with blocks of so many tokens reads caches whose layers differ; rectangular
  /// where it cannot. A cache is ragged where the spec's allocation asks for it, the engine can, the budget leaves a
  /// choice, and no step makes one row of several, since pages of different layers lie side by side: the mean is then
  /// rounded up to whole pages. Elsewhere the chain's allocation becomes uniform.
  /// kInvalid for a spec that is wrong, picks no tokens, or whose budget does not hold what the method always keeps;
  /// kRefused, with the reason, for what this service does not make: budgets that differ between heads, and methods
  /// that need the queries of the whole prompt.
  static Result<CompactionPlan> make(std::string_view spec, std::uint32_t prompt_tokens,
                                     SlotLayout layout = SlotLayout::kRectangular, std::uint32_t page_tokens = 0);

  /// Of the slots that a layer keeps, the last so many are the prompt's last tokens, kept whatever their scores.
  std::uint32_t recent_slots() const;
  bool ragged() const { return layout != SlotLayout::kRectangular; }
  /// Whether a ragged cache's pages follow from layer_preference() of all layers.
  bool reads_preferences() const;
  /// Pages of each layer of a ragged cache, mean_slots / page_tokens on average. preferences: of the layers where they
  /// are read, otherwise empty.
  std::vector<std::uint32_t> layer_pages(std::span<const double> preferences, std::uint32_t layers) const;

  /// Positions by which every kept key is turned when the cache is placed at slot `base`: base - (N - M). Queries from
  /// position base + M on then see every kept key at its distance in the prompt.
  std::int64_t shift(std::int64_t base) const {
    return base - (static_cast<std::int64_t>(prompt_tokens) - static_cast<std::int64_t>(slots));
  }
};

/// One attention layer of a prompt. Borrows the memory.
struct PromptLayer {
  HeadRows keys;     ///< [KV heads][N][dim], turned to their positions in the prompt
  HeadRows values;   ///< [KV heads][N][value dim]
  HeadRows queries;  ///< [query heads][query_rows][dim], the prompt's last, turned; not read when the plan needs none
};

/// What stays of a layer: [KV heads][M][dim] of the layer's dtype, the very bytes of the prompt.
struct CompactLayer {
  evict::Selection kept;
  std::vector<std::byte> keys;
  std::vector<std::byte> values;
};

/// Scores, selects and gathers the `slots` tokens of one layer; the same bytes whatever the executor (null: the
/// caller's thread alone). kInvalid when the rows are not those of the plan, or slots not what layer_pages() may give.
Result<CompactLayer> compact_layer(const CompactionPlan& plan, const PromptLayer& layer, std::uint32_t slots,
                                   Executor* executor);
/// The same with the plan's slots.
Result<CompactLayer> compact_layer(const CompactionPlan& plan, const PromptLayer& layer, Executor* executor);

/// One layer's claim on the tokens of all, as CAKE has it (token_scores.h, Preference). kInvalid as compact_layer().
Result<double> layer_preference(const CompactionPlan& plan, const PromptLayer& layer, Executor* executor);

/// ||O' - O|| / ||O|| over all heads of the attention outputs of the layer's captured queries, O over the whole prompt
/// and O' over what is kept; causal. kInvalid without queries, or when layer and kept do not belong together.
Result<double> attention_error(const PromptLayer& layer, const evict::Selection& kept, Executor* executor);

/// Bytes that compact_layer() or attention_error() work in at most, beside the layer and what they return.
std::uint64_t workspace_bytes(const CompactionPlan& plan, const ShardShape& layer, std::uint32_t query_heads);

/// Writes keys [head][M][dim], of their own dtype, turned by the same `shift` (CompactionPlan::shift) in fp32, to out;
/// in place where out is keys. kInvalid for keys or an out that do not fit the rotation.
Status place_keys(const HeadRows& keys, std::int64_t shift, const rope::Parameters& rotation, std::byte* out,
                  Executor* executor);

}  // namespace kvern
