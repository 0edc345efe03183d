#include "kernels/selection.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "base/parallel.h"

namespace kvern::evict {
namespace {

/// The number that the `count`-th best rank has, found digit by digit from the top: one histogram per digit over the
/// ranks that agree in the digits before. 0 < count <= ranks.size(). `better` receives how many are above it.
std::uint32_t threshold_of(std::span<const std::uint32_t> ranks, std::size_t count, std::size_t& better) {
  constexpr std::uint32_t kDigitBits = 8;
  std::uint32_t prefix = 0;
  std::uint32_t mask = 0;
  std::size_t wanted = count;
  for (std::uint32_t shift = 32; shift > 0;) {
    shift -= kDigitBits;
    std::array<std::uint32_t, 1U << kDigitBits> histogram{};
    for (const std::uint32_t rank : ranks) {
      if ((rank & mask) == prefix) ++histogram[(rank >> shift) & (histogram.size() - 1)];
    }
    std::size_t digit = histogram.size() - 1;
    for (; histogram[digit] < wanted; --digit) wanted -= histogram[digit];
    prefix |= static_cast<std::uint32_t>(digit) << shift;
    mask |= static_cast<std::uint32_t>(histogram.size() - 1) << shift;
  }
  better = count - wanted;
  return prefix;
}

std::vector<std::uint32_t> ranks_of(std::span<const float> scores) {
  std::vector<std::uint32_t> ranks(scores.size());
  std::ranges::transform(scores, ranks.begin(), score_rank);
  return ranks;
}

/// Writes the `count` best, ascending. count <= scores.size().
void write_best(std::span<const float> scores, std::size_t count, std::uint32_t* out) {
  if (count == 0) return;
  if (count == scores.size()) {
    for (std::uint32_t i = 0; i < count; ++i) out[i] = i;
    return;
  }
  const std::vector<std::uint32_t> ranks = ranks_of(scores);
  std::size_t better = 0;
  const std::uint32_t threshold = threshold_of(ranks, count, better);
  std::size_t ties = count - better;
  for (std::uint32_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] < threshold) continue;
    if (ranks[i] == threshold) {
      if (ties == 0) continue;
      --ties;
    }
    *out++ = i;
  }
}

}  // namespace

std::size_t count_nan(std::span<const float> scores) {
  return static_cast<std::size_t>(std::ranges::count_if(scores, [](float score) { return std::isnan(score); }));
}

std::vector<std::uint32_t> best_of(std::span<const float> scores, std::size_t count) {
  std::vector<std::uint32_t> best(std::min(count, scores.size()));
  write_best(scores, best.size(), best.data());
  return best;
}

std::vector<std::uint32_t> ranked_best_of(std::span<const float> scores, std::size_t count) {
  std::vector<std::uint32_t> best = best_of(scores, count);
  std::ranges::stable_sort(best, std::ranges::greater{}, [&](std::uint32_t i) { return score_rank(scores[i]); });
  return best;
}

Result<Selection> select_best(const TokenScores& scores, std::span<const std::uint32_t> counts, std::uint32_t tail,
                              Executor* executor) {
  if (counts.size() != 1 && counts.size() != scores.heads) {
    return failure(Code::kInvalid, "select: " + std::to_string(counts.size()) + " counts for " +
                                       std::to_string(scores.heads) + " heads");
  }
  Selection selection;
  std::uint64_t total = 0;
  for (std::size_t head = 0; head < scores.heads; ++head) {
    const std::uint32_t count = counts[counts.size() == 1 ? 0 : head];
    total += std::uint64_t{std::min(count, scores.tokens)} + tail;
    if (total > std::numeric_limits<std::uint32_t>::max()) {
      return failure(Code::kInvalid, "select: more than 2^32 - 1 tokens over all heads");
    }
    selection.offsets.push_back(static_cast<std::uint32_t>(total));
  }
  selection.tokens.resize(total);
  parallel_for(executor, scores.heads, [&](std::size_t head) {
    std::uint32_t* out = selection.tokens.data() + selection.offsets[head];
    const std::size_t count = selection.offsets[head + 1] - selection.offsets[head] - tail;
    write_best(scores.of(head), count, out);
    for (std::uint32_t i = 0; i < tail; ++i) out[count + i] = scores.tokens + i;
  });
  return selection;
}

Selection select_sinks_and_recent(std::uint32_t heads, std::uint32_t tokens, std::uint32_t sinks,
                                  std::uint32_t recent) {
  Selection selection;
  const std::uint32_t first_recent = tokens - std::min(tokens, recent);
  for (std::uint32_t head = 0; head < heads; ++head) {
    for (std::uint32_t token = 0; token < std::min(sinks, first_recent); ++token) selection.tokens.push_back(token);
    for (std::uint32_t token = first_recent; token < tokens; ++token) selection.tokens.push_back(token);
    selection.offsets.push_back(static_cast<std::uint32_t>(selection.tokens.size()));
  }
  return selection;
}

std::size_t gathered_bytes(const HeadRows& rows, const Selection& selection) {
  return selection.tokens.size() * rows.dim * dtype_bytes(rows.dtype);
}

Status gather_rows(const HeadRows& rows, const Selection& selection, std::span<std::byte> out, Executor* executor) {
  const auto invalid = [](std::string message) { return Status(Code::kInvalid, "gather: " + std::move(message)); };
  if (selection.heads() != rows.heads) {
    return invalid("a selection of " + std::to_string(selection.heads()) + " heads for rows of " +
                   std::to_string(rows.heads));
  }
  if (out.size() != gathered_bytes(rows, selection)) {
    return invalid(std::to_string(out.size()) + " bytes of output, " + std::to_string(gathered_bytes(rows, selection)) +
                   " needed");
  }
  for (const std::uint32_t token : selection.tokens) {
    if (token >= rows.tokens) {
      return invalid("token " + std::to_string(token) + " of " + std::to_string(rows.tokens));
    }
  }
  // Rows per task: half a megabyte of a large head, so that one head alone keeps several threads busy.
  constexpr std::size_t kTaskBytes = std::size_t{512} << 10;
  const std::size_t row_bytes = std::size_t{rows.dim} * dtype_bytes(rows.dtype);
  if (row_bytes == 0) return Status::ok();
  const std::size_t task_rows = std::max<std::size_t>(1, kTaskBytes / row_bytes);
  struct Task {
    std::size_t head;
    std::size_t begin;
    std::size_t end;
  };
  std::vector<Task> tasks;
  for (std::size_t head = 0; head < rows.heads; ++head) {
    for (std::size_t begin = selection.offsets[head]; begin < selection.offsets[head + 1]; begin += task_rows) {
      tasks.push_back({head, begin, std::min<std::size_t>(begin + task_rows, selection.offsets[head + 1])});
    }
  }
  parallel_for(executor, tasks.size(), [&](std::size_t i) {
    std::byte* to = out.data() + tasks[i].begin * row_bytes;
    for (std::size_t at = tasks[i].begin; at < tasks[i].end; ++at, to += row_bytes) {
      std::memcpy(to, rows.row(tasks[i].head, selection.tokens[at]), row_bytes);
    }
  });
  return Status::ok();
}

}  // namespace kvern::evict
