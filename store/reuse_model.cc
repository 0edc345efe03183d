#include "store/reuse_model.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "store/fingerprint_mix.h"

namespace kvern {
namespace {

// Uses that the sample holds: 32,768 known reuses give each class and age that matters hundreds.
constexpr std::size_t kRing = std::size_t{1} << 16U;
constexpr std::size_t kTable = 2 * kRing;
constexpr std::uint32_t kFree = 0xFFFFFFFF;
// How far back the model looks, in stores full of uses. Production traffic at a sixteenth of the size that it needs
// comes back after about that many.
constexpr std::uint64_t kHorizonStores = 16;
constexpr std::uint64_t kHorizonLeast = 4096;
// What was learnt loses half of its weight in so many horizons.
constexpr std::uint64_t kHorizonsPerHalving = 4;
// Estimates are renewed when an eighth of the store's content could have changed.
constexpr std::uint64_t kEstimatesPerStore = 8;
constexpr std::uint64_t kUsesPerEstimateLeast = 256;
// What is believed before anything was seen, and how many observations it weighs: 2 % of what reached an age is used
// before the next one, whatever the age, and 10 % within the first. Ages grow geometrically, so that the hazard per use
// falls as 1 / age: LRU.
constexpr double kPriorHazard = 0.02;
constexpr double kPriorFirstHazard = 0.1;
constexpr double kPriorWeight = 20;
constexpr double kHazardMost = 0.999;

constexpr std::uint64_t kFirstStep = 16;

std::array<std::uint64_t, ReuseModel::kAges> make_steps() {
  std::array<std::uint64_t, ReuseModel::kAges> begins{};
  double begin = kFirstStep;
  for (std::size_t step = 1; step < begins.size(); ++step, begin *= std::sqrt(2.0)) {
    begins[step] = static_cast<std::uint64_t>(std::llround(begin));
  }
  return begins;
}
const std::array<std::uint64_t, ReuseModel::kAges> kBegins = make_steps();

std::size_t home(std::uint64_t fingerprint) {
  return static_cast<std::size_t>(mix_fingerprint(fingerprint, 5)) & (kTable - 1);
}

}  // namespace

std::size_t ReuseModel::age_step(std::uint64_t age) {
  return static_cast<std::size_t>(std::upper_bound(kBegins.begin(), kBegins.end(), age) - kBegins.begin() - 1);
}

ReuseModel::ReuseModel() : ring_(kRing), table_(kTable, kFree) {
  forget_at_ = horizon() * kHorizonsPerHalving;
  estimate();
}

std::uint64_t ReuseModel::horizon() const { return std::max(kHorizonLeast, kHorizonStores * most_stored_); }

void ReuseModel::set_stored(std::size_t chunks) {
  if (chunks <= most_stored_) return;
  most_stored_ = chunks;
  counts_.grow(static_cast<std::size_t>(horizon()));
  while ((horizon() >> sampling_bits_) > kRing) sample_less();
}

// Halves the sample; what was learnt from it weighs half, like all that comes.
void ReuseModel::sample_less() {
  ++sampling_bits_;
  halve_counts();
}

void ReuseModel::halve_counts() {
  for (auto& of_class : at_risk_) {
    for (double& count : of_class) count /= 2;
  }
  for (auto& of_class : used_) {
    for (double& count : of_class) count /= 2;
  }
}

std::size_t ReuseModel::use(std::uint64_t fingerprint) {
  ++now_;
  const std::size_t chunk_class = std::min<std::size_t>(counts_.add(fingerprint), kClasses - 1);
  let_age();
  const std::uint64_t mask = (std::uint64_t{1} << sampling_bits_) - 1;
  if ((mix_fingerprint(fingerprint, 6) & mask) == 0) {
    if (const std::size_t slot = find(fingerprint); slot != kTable) {
      Sampled& before = ring_[table_[slot]];
      used_[before.chunk_class][age_step(now_ - before.used_at)] += 1;
      before.is_last_use = false;
      unlink(slot);
    }
    if (next_ - oldest_ == kRing) forget_oldest();
    const auto place = static_cast<std::uint32_t>(next_++ % kRing);
    ring_[place] = {fingerprint, now_ & kTimeMask, chunk_class & 3U, true};
    std::size_t slot = home(fingerprint);
    while (table_[slot] != kFree) slot = (slot + 1) % kTable;
    table_[slot] = place;
    at_risk_[chunk_class][0] += 1;
  }
  if (now_ >= forget_at_) {
    forget_at_ = now_ + horizon() * kHorizonsPerHalving;
    halve_counts();
  }
  if (now_ >= estimate_at_) estimate();
  return chunk_class;
}

// Counts those of the sample that have come to a further age unused.
void ReuseModel::let_age() {
  while (oldest_ < next_ && ring_[oldest_ % kRing].used_at + horizon() <= now_) forget_oldest();
  for (std::size_t step = 1; step < kAges && kBegins[step] < horizon(); ++step) {
    std::uint64_t& first = reached_[step];
    first = std::max(first, oldest_);
    for (; first < next_; ++first) {
      const Sampled& each = ring_[first % kRing];
      if (each.used_at + kBegins[step] > now_) break;
      if (each.is_last_use) at_risk_[each.chunk_class][step] += 1;
    }
  }
}

void ReuseModel::forget_oldest() {
  const Sampled& oldest = ring_[oldest_++ % kRing];
  if (oldest.is_last_use) unlink(find(oldest.fingerprint));
}

// The slot of its last use in the table; kTable when there is none.
std::size_t ReuseModel::find(std::uint64_t fingerprint) const {
  for (std::size_t slot = home(fingerprint); table_[slot] != kFree; slot = (slot + 1) % kTable) {
    if (ring_[table_[slot]].fingerprint == fingerprint) return slot;
  }
  return kTable;
}

// Linear probing without tombstones: what follows moves up where it may.
void ReuseModel::unlink(std::size_t slot) {
  std::size_t hole = slot;
  for (std::size_t next = (hole + 1) % kTable; table_[next] != kFree; next = (next + 1) % kTable) {
    const std::size_t wanted = home(ring_[table_[next]].fingerprint);
    if ((next - wanted) % kTable < (next - hole) % kTable) continue;
    table_[hole] = table_[next];
    hole = next;
  }
  table_[hole] = kFree;
}

void ReuseModel::estimate() {
  estimate_at_ = now_ + std::max(kUsesPerEstimateLeast, most_stored_ / kEstimatesPerStore);
  // Where a class was seen seldom, all classes together speak for it.
  PerAge together{};
  for (std::size_t step = 0; step < kAges; ++step) {
    double reached = kPriorWeight;
    double used = kPriorWeight * (step == 0 ? kPriorFirstHazard : kPriorHazard);
    for (std::size_t each = 0; each < kClasses; ++each) {
      reached += at_risk_[each][step];
      used += used_[each][step];
    }
    together[step] = used / reached;
  }
  for (std::size_t each = 0; each < kClasses; ++each) {
    PerAge hazard{};
    for (std::size_t step = 0; step < kAges; ++step) {
      hazard[step] = std::min(
          kHazardMost, (used_[each][step] + kPriorWeight * together[step]) / (at_risk_[each][step] + kPriorWeight));
    }
    for (std::size_t from = 0; from < kAges; ++from) {
      double left = 1;
      double uses = 0;
      double time = 0;
      double best = 0;
      for (std::size_t step = from; step < kAges; ++step) {
        const std::uint64_t end = step + 1 < kAges ? kBegins[step + 1] : 2 * kBegins[step];
        // A chunk of the first age is somewhere within it.
        const double length = static_cast<double>(end - kBegins[step]) * (step == from ? 0.75 : 1.0);
        uses += left * hazard[step];
        time += left * length * (1 - hazard[step] / 2);
        left *= 1 - hazard[step];
        best = std::max(best, uses / time);
      }
      worth_[each][from] = best;
    }
  }
}

}  // namespace kvern
