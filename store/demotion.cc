#include "store/demotion.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "store/fingerprint_mix.h"

namespace kvern {
namespace {

// Weight of the latest step in the price: the price is that of the last hundred steps or so.
constexpr double kLatestWeight = 0.01;

}  // namespace

Status DemotionConfig::validate() const {
  if (!std::isfinite(error_price) || error_price < 0) {
    return {Code::kInvalid, "demotion: error_price must be 0 or more"};
  }
  if (sample_chunks == 0) return {Code::kInvalid, "demotion: sample_chunks must be 1 or more"};
  return Status::ok();
}

Demotion::Demotion(const DemotionConfig& config) : config_(config) {
  if (const Status status = config.validate(); !status) throw std::invalid_argument(status.message());
}

std::size_t Demotion::add_ladder(Ladder ladder) {
  const std::size_t rungs = ladder.rungs().size();
  ladders_.push_back({std::move(ladder), std::vector<OfRung>(rungs)});
  return ladders_.size() - 1;
}

void Demotion::entered(std::uint32_t chunk, std::size_t ladder, StoredForm form, double raw_bytes) {
  if (chunk >= chunks_.size()) chunks_.resize(chunk + std::size_t{1});
  if (contains(chunk)) leave(chunk);
  chunks_[chunk] = {raw_bytes, kNoChunk, static_cast<std::uint16_t>(ladder), form};
  join(chunk);
}

void Demotion::left(std::uint32_t chunk) {
  if (contains(chunk)) leave(chunk);
}

void Demotion::stepped(std::uint32_t chunk, StoredForm to) {
  if (!contains(chunk)) return;
  leave(chunk);
  chunks_[chunk].form = to;
  join(chunk);
  ++rung_of(chunks_[chunk]).steps_to;
}

double Demotion::bytes(std::uint32_t chunk) const {
  const Chunk& each = chunks_[chunk];
  return each.raw_bytes * ladders_[each.ladder].ladder.rung(each.form).bytes_share;
}

void Demotion::join(std::uint32_t chunk) {
  OfRung& rung = rung_of(chunks_[chunk]);
  chunks_[chunk].place = static_cast<std::uint32_t>(rung.members.size());
  rung.members.push_back(chunk);
  rung.raw_bytes += chunks_[chunk].raw_bytes;
}

void Demotion::leave(std::uint32_t chunk) {
  OfRung& rung = rung_of(chunks_[chunk]);
  const std::uint32_t place = std::exchange(chunks_[chunk].place, kNoChunk);
  rung.members[place] = rung.members.back();
  if (rung.members[place] != chunk) chunks_[rung.members[place]].place = place;
  rung.members.pop_back();
  rung.raw_bytes -= chunks_[chunk].raw_bytes;
}

double Demotion::worth_left(double error) const { return std::max(0.0, 1 - config_.error_price * error); }

Demotion::Step Demotion::drop(std::uint32_t chunk, const EvictionPolicy& policy) const {
  const Chunk& each = chunks_[chunk];
  const double freed = bytes(chunk);
  const double loss = policy.expected_use(chunk) * worth_left(ladders_[each.ladder].ladder.rung(each.form).error);
  return {chunk, std::nullopt, freed, loss / freed};
}

// The best step down from this rung that a sample of its chunks offers.
std::optional<Demotion::Step> Demotion::step_down(const OfLadder& of, std::size_t rung, const EvictionPolicy& policy) {
  const auto& members = of.rungs[rung].members;
  if (members.empty() || rung + 1 == of.rungs.size()) return std::nullopt;
  std::uint32_t chunk = kNoChunk;
  double least = std::numeric_limits<double>::infinity();
  for (std::uint32_t i = 0; i < config_.sample_chunks; ++i) {
    const std::uint32_t each = members[mix_fingerprint(++random_, 8) % members.size()];
    const double use = policy.expected_use(each);
    if (use < least) {
      least = use;
      chunk = each;
    }
  }
  const Chunk& from = chunks_[chunk];
  const Rung& before = of.ladder.rung(from.form);
  std::optional<Step> best;
  double best_cost = std::numeric_limits<double>::infinity();
  for (std::size_t to = rung + 1; to < of.rungs.size(); ++to) {
    const auto form = of.ladder.step(from.form, to);
    if (!form) continue;
    const Rung& after = of.ladder.rung(*form);
    const double lost = least * (worth_left(before.error) - worth_left(after.error));
    const double freed = from.raw_bytes * (before.bytes_share - after.bytes_share);
    const double cost = lost - price_ * freed;
    if (cost < best_cost) {
      best_cost = cost;
      best = Step{chunk, *form, freed, lost / freed};
    }
  }
  return best;
}

std::optional<Demotion::Step> Demotion::next(EvictionPolicy& policy) {
  std::optional<Step> best;
  for (const std::uint32_t chunk : policy.victims(1)) {
    if (contains(chunk)) best = drop(chunk, policy);
  }
  for (const OfLadder& each : ladders_) {
    for (std::size_t rung = 0; rung < each.rungs.size(); ++rung) {
      const auto step = step_down(each, rung, policy);
      if (step && (!best || step->loss_per_byte <= best->loss_per_byte)) best = step;
    }
  }
  if (best) price_ += kLatestWeight * (best->loss_per_byte - price_);
  return best;
}

Demotion::RungFigures Demotion::figures(std::size_t ladder, std::size_t rung) const {
  const OfLadder& of = ladders_[ladder];
  const OfRung& each = of.rungs[rung];
  return {.chunks = each.members.size(),
          .bytes = each.raw_bytes * of.ladder.rungs()[rung].bytes_share,
          .steps_to = each.steps_to};
}

}  // namespace kvern
