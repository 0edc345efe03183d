#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace kvern {

/// One reading of kvernd's metrics, in the text format of Prometheus; or what changed between two of them. A value.
class Scrape {
 public:
  using Labels = std::map<std::string, std::string, std::less<>>;

  /// kInvalid with the line when the text is not of that format, or not kvernd's.
  static Result<Scrape> parse(std::string_view text);

  /// What changed since an earlier reading of the same daemon: counters and histograms are less by what they were then,
  /// gauges are as they are now. Where the daemon was restarted in between, what it counted since its start.
  Scrape since(const Scrape& earlier) const;
  /// Of since(): the time between both, in seconds; else that since the daemon's start.
  double seconds() const { return seconds_; }
  bool restarted() const { return restarted_; }  ///< of since(): the daemon's counts began anew in between

  /// The sum over all series of that name that have these labels; 0 without any.
  double sum(std::string_view name, const Labels& where = {}) const;
  /// The same for each value of a label.
  std::map<std::string, double> by(std::string_view name, std::string_view label, const Labels& where = {}) const;
  /// Of a histogram: (upper bound, number of observations up to it), ascending, over all series with these labels.
  std::vector<std::pair<double, double>> buckets(const std::string& name, const Labels& where = {}) const;
  /// By linear interpolation in the bucket that holds it; 0 of an empty histogram.
  double quantile(double q, const std::string& name, const Labels& where = {}) const;

 private:
  struct Series {
    std::string name;
    Labels labels;
    bool is_counter;
    double value;
  };
  std::vector<Series> series_;
  double seconds_ = 0;
  bool restarted_ = false;
};

}  // namespace kvern
