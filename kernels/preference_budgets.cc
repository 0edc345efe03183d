#include "kernels/preference_budgets.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace kvern::evict {
namespace {

/// Shares this close below or above a whole number are that number.
constexpr double kSnap = 1e-6;
/// Fractions are compared in nine decimals, so that shares that are equal but for rounding tie.
constexpr double kFractionDigits = 1e9;

double usable(double preference) { return std::isfinite(preference) && preference > 0 ? preference : 0; }

std::uint64_t reachable(std::size_t layers, const TokenBudget& budget) {
  return std::min(budget.total, std::uint64_t{budget.cap} * layers);
}

/// lambda with sum over the layers of clamp(lambda * P, floor, cap) = target. All P are positive, and the target lies
/// between the sums of all floors and all caps, so the sum, which only grows, passes it: at one of the points where a
/// layer leaves its floor or reaches its cap, or on the straight line between two.
double water_level(const std::vector<double>& preferences, double floor, double cap, double target) {
  const auto sum_at = [&](double lambda) {
    double sum = 0;
    for (const double p : preferences) sum += std::clamp(lambda * p, floor, cap);
    return sum;
  };
  std::vector<double> corners;
  for (const double p : preferences) {
    corners.push_back(floor / p);
    corners.push_back(cap / p);
  }
  std::ranges::sort(corners);
  const auto above = std::ranges::partition_point(corners, [&](double lambda) { return sum_at(lambda) < target; });
  if (above == corners.end()) return corners.back();
  if (above == corners.begin()) return corners.front();
  const double low = *(above - 1);
  const double high = *above;
  // On the line the layers between floor and cap share what the others leave.
  double rest = target;
  double sloped = 0;
  for (const double p : preferences) {
    const double middle = std::midpoint(low, high) * p;
    if (middle <= floor) {
      rest -= floor;
    } else if (middle >= cap) {
      rest -= cap;
    } else {
      sloped += p;
    }
  }
  return sloped > 0 ? std::clamp(rest / sloped, low, high) : high;
}

}  // namespace

std::vector<double> preference_shares(std::span<const double> preferences, const TokenBudget& budget) {
  const std::size_t layers = preferences.size();
  if (layers == 0) return {};
  const auto target = static_cast<double>(reachable(layers, budget));
  const double floor = budget.floor;
  const double cap = budget.cap;
  std::vector<double> positive;
  for (const double p : preferences) {
    if (usable(p) > 0) positive.push_back(p);
  }
  if (positive.empty() || static_cast<double>(layers) * floor >= target) {
    return std::vector<double>(layers, target / static_cast<double>(layers));
  }
  const auto unwanted = static_cast<double>(layers - positive.size());
  const double at_most = static_cast<double>(positive.size()) * cap;
  std::vector<double> shares(layers);
  if (at_most + unwanted * floor <= target) {
    for (std::size_t i = 0; i < layers; ++i) {
      shares[i] = usable(preferences[i]) > 0 ? cap : (target - at_most) / unwanted;
    }
    return shares;
  }
  const double lambda = water_level(positive, floor, cap, target - unwanted * floor);
  for (std::size_t i = 0; i < layers; ++i) shares[i] = std::clamp(lambda * usable(preferences[i]), floor, cap);
  return shares;
}

std::vector<std::uint32_t> fair_budgets(std::span<const double> preferences, const TokenBudget& budget,
                                        std::uint32_t layers) {
  const std::vector<double> shares = preference_shares(preferences, budget);
  std::vector<std::uint32_t> budgets(shares.size());
  if (shares.size() < layers) {
    std::ranges::transform(shares, budgets.begin(), [&](double share) {
      return static_cast<std::uint32_t>(std::min(std::ceil(share - kSnap), static_cast<double>(budget.cap)));
    });
    return budgets;
  }
  std::vector<double> fractions(shares.size());
  std::uint64_t given = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    budgets[i] = static_cast<std::uint32_t>(std::floor(shares[i] + kSnap));
    fractions[i] = std::round((shares[i] - budgets[i]) * kFractionDigits);
    given += budgets[i];
  }
  std::vector<std::size_t> order(shares.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::ranges::greater{}, [&](std::size_t i) { return fractions[i]; });
  const std::uint64_t target = reachable(shares.size(), budget);
  for (std::size_t i = 0; i < order.size() && given < target; ++i) {
    if (budgets[order[i]] >= budget.cap) continue;
    ++budgets[order[i]];
    ++given;
  }
  return budgets;
}

std::vector<std::uint32_t> reference_budgets(std::span<const double> preferences, const TokenBudget& budget) {
  const std::size_t layers = preferences.size();
  double sum = 0;
  for (const double p : preferences) sum += usable(p);
  if (!(sum > 0)) return fair_budgets(preferences, budget, static_cast<std::uint32_t>(layers));
  const auto total = static_cast<std::int64_t>(budget.total);
  const std::int64_t cap = budget.cap;
  std::vector<std::int64_t> budgets(layers);
  std::int64_t excess = 0;
  for (std::size_t i = 0; i < layers; ++i) {
    const auto share = static_cast<std::int64_t>(usable(preferences[i]) / sum * static_cast<double>(total));
    budgets[i] = std::min(share, cap);
    excess += share - budgets[i];
  }
  // Evenly over the layers that fulfil a condition, the remainder to the lowest. A negative amount is taken away.
  const auto spread = [&](std::int64_t amount, auto takes_part) {
    std::vector<std::size_t> taking;
    for (std::size_t i = 0; i < layers; ++i) {
      if (takes_part(budgets[i])) taking.push_back(i);
    }
    if (taking.empty()) return;
    const auto count = static_cast<std::int64_t>(taking.size());
    const std::int64_t size = std::abs(amount);
    const std::int64_t sign = amount < 0 ? -1 : 1;
    for (std::int64_t i = 0; i < count; ++i) {
      budgets[taking[static_cast<std::size_t>(i)]] += sign * (size / count + (i < size % count ? 1 : 0));
    }
  };
  const auto below_cap = [&](std::int64_t tokens) { return tokens < cap; };
  if (excess > 0) spread(excess, below_cap);
  const std::int64_t difference = total - std::accumulate(budgets.begin(), budgets.end(), std::int64_t{0});
  if (difference > 0) spread(difference, below_cap);
  if (difference < 0) spread(difference, [](std::int64_t tokens) { return tokens > 1; });
  std::vector<std::uint32_t> result(layers);
  std::ranges::transform(budgets, result.begin(), [](std::int64_t tokens) {
    return static_cast<std::uint32_t>(std::max<std::int64_t>(0, tokens));
  });
  return result;
}

}  // namespace kvern::evict
