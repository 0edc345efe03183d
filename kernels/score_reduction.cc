#include "kernels/score_reduction.h"

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <type_traits>
#include <variant>

namespace kvern {
namespace {

using Values = std::variant<std::span<double>, std::span<float>>;

/// Where ranks meet. A round is over when all ranks have come; its results are in the ranks' own memory by then, for
/// the last one to come puts them there while the others wait.
class Meeting {
 public:
  explicit Meeting(std::uint32_t ranks) : values_(ranks) {}

  std::uint32_t ranks() const { return static_cast<std::uint32_t>(values_.size()); }

  Status reduce(std::uint32_t rank, Values values) {
    std::unique_lock lock(mutex_);
    if (left_) return gone();
    values_[rank] = values;
    if (++here_ == values_.size()) {
      outcome_ = work();
      here_ = 0;
      ++round_;
      all_here_.notify_all();
      return outcome_;
    }
    const std::uint64_t round = round_;
    all_here_.wait(lock, [&] { return round_ != round || left_; });
    // Nobody can begin another round before this rank has left this one.
    if (round_ != round) return outcome_;
    return gone();
  }

  void leave() {
    const std::lock_guard lock(mutex_);
    left_ = true;
    all_here_.notify_all();
  }

 private:
  static Status gone() { return {Code::kUnavailable, "score reduction: a rank is gone"}; }

  Status work() {
    for (const Values& values : values_) {
      if (values.index() != values_[0].index() || size_of(values) != size_of(values_[0])) {
        return {Code::kInvalid, "score reduction: the ranks do not reduce the same values"};
      }
    }
    std::visit(
        [&]<typename T>(std::span<T>) {
          constexpr bool kMean = std::is_same_v<T, float>;
          std::vector<T> totals(size_of(values_[0]));
          for (const Values& values : values_) {
            const auto& of_rank = std::get<std::span<T>>(values);
            for (std::size_t i = 0; i < totals.size(); ++i) totals[i] += of_rank[i];
          }
          if (kMean) {
            for (T& total : totals) total /= static_cast<T>(values_.size());
          }
          for (const Values& values : values_) std::ranges::copy(totals, std::get<std::span<T>>(values).begin());
        },
        values_[0]);
    return Status::ok();
  }
  static std::size_t size_of(const Values& values) {
    return std::visit([](const auto& span) { return span.size(); }, values);
  }

  std::mutex mutex_;
  std::condition_variable all_here_;
  std::vector<Values> values_;
  std::size_t here_ = 0;
  std::uint64_t round_ = 0;
  Status outcome_;
  bool left_ = false;
};

class ThreadReduction final : public ScoreReduction {
 public:
  ThreadReduction(std::shared_ptr<Meeting> meeting, std::uint32_t rank) : meeting_(std::move(meeting)), rank_(rank) {}
  ~ThreadReduction() override { meeting_->leave(); }
  ThreadReduction(const ThreadReduction&) = delete;
  ThreadReduction& operator=(const ThreadReduction&) = delete;

  std::uint32_t ranks() const override { return meeting_->ranks(); }
  Status sum(std::span<double> values) override { return meeting_->reduce(rank_, values); }
  Status mean(std::span<float> values) override { return meeting_->reduce(rank_, values); }

 private:
  std::shared_ptr<Meeting> meeting_;
  std::uint32_t rank_;
};

}  // namespace

Result<std::vector<std::unique_ptr<ScoreReduction>>> make_thread_reductions(std::uint32_t ranks) {
  if (ranks == 0) return failure(Code::kInvalid, "score reduction: there must be at least one rank");
  const auto meeting = std::make_shared<Meeting>(ranks);
  std::vector<std::unique_ptr<ScoreReduction>> reductions;
  for (std::uint32_t rank = 0; rank < ranks; ++rank) {
    reductions.push_back(std::make_unique<ThreadReduction>(meeting, rank));
  }
  return reductions;
}

}  // namespace kvern
