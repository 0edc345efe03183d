#include "service/metrics.h"

#include <algorithm>
#include <utility>

#include "service/sessions.h"

namespace kvern {
namespace {

using prometheus::Registry;

// From 1 us, what a look-up in memory takes, to 10 s, what no request should; four buckets a decade.
prometheus::Histogram::BucketBoundaries seconds_buckets() {
  prometheus::Histogram::BucketBoundaries buckets;
  buckets.reserve(7 * 4 + 1);
  for (const double decade : {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0}) {
    for (const double step : {1.0, 2.0, 4.0, 7.0}) buckets.push_back(decade * step);
  }
  buckets.push_back(10);
  return buckets;
}

// From what int8 loses to what no ladder allows.
prometheus::Histogram::BucketBoundaries error_buckets() {
  return {0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1};
}

prometheus::Family<prometheus::Counter>& counters(Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}

prometheus::Counter& counter(Registry& registry, const char* name, const char* help,
                             const prometheus::Labels& labels = {}) {
  return counters(registry, name, help).Add(labels);
}

prometheus::Family<prometheus::Histogram>& histograms(Registry& registry, const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}

prometheus::Histogram& histogram(Registry& registry, const char* name, const char* help) {
  return histograms(registry, name, help).Add({}, seconds_buckets());
}

template <typename Array>
void label_all(Array& array, prometheus::Family<prometheus::Counter>& family, const char* label,
               const std::array<const char*, std::tuple_size_v<Array>>& values) {
  for (std::size_t i = 0; i < array.size(); ++i) array[i] = &family.Add({{label, values[i]}});
}

// Chains that an operator or an engine asks for are few; beyond this number the label says "other".
constexpr std::size_t kMaxCodecLabels = 32;
constexpr const char* kOtherCodec = "other";

/// How an operation of a tier ended; the label "outcome".
constexpr std::array<const char*, 4> kOutcomes = {"ok", "miss", "declined", "error"};
std::size_t outcome_of(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return 0;
    case Code::kNotFound:
      return 1;
    case Code::kBusy:
    case Code::kRefused:
    case Code::kExpired:
      return 2;
    case Code::kInvalid:
    case Code::kCorrupt:
    case Code::kUnavailable:
    case Code::kInternal:
      return 3;
  }
  return 3;
}

}  // namespace

std::string codec_label(std::string_view spec) {
  std::string label;
  int depth = 0;
  for (const char c : spec) {
    if (c == '(') ++depth;
    if (depth == 0) label += c;
    if (c == ')') --depth;
  }
  return label;
}

std::string rung_label(const std::string& codec_spec) {
  std::string label = codec_label(codec_spec);
  if (const auto at = codec_spec.find("ratio="); at != std::string::npos) {
    label += " " + codec_spec.substr(at, codec_spec.find_first_of(",)", at) - at);
  }
  return label;
}

Metrics::Metrics()
    : registry_(std::make_unique<Registry>()),
      requested_tokens(counter(*registry_, "kvern_requested_tokens_total", "Prompt tokens that engines asked for")),
      hit_tokens(counter(*registry_, "kvern_hit_tokens_total", "Prompt tokens that were found", {{"tier", "dram"}})),
      loaded_tokens(counter(*registry_, "kvern_loaded_tokens_total", "Tokens whose blocks reached an engine's pages")),
      failed_loads(counter(*registry_, "kvern_failed_loads_total", "Loads that ended without the blocks")),
      retentions_refused(counter(*registry_, "kvern_retentions_refused_total",
                                 "Chunks that a request wanted kept and whose tenant may have no more of them")),
      control_requests(counter(*registry_, "kvern_control_requests_total", "Messages on the control plane")),
      device_stored_bytes(counter(*registry_, "kvern_device_page_bytes_total",
                                  "Bytes of pages on devices that were stored or loaded, before encoding",
                                  {{"operation", "store"}})),
      device_loaded_bytes(counters(*registry_, "kvern_device_page_bytes_total",
                                   "Bytes of pages on devices that were stored or loaded, before encoding")
                              .Add({{"operation", "load"}})),
      match_seconds(histogram(*registry_, "kvern_match_seconds", "Time of a prefix look-up, as the asker sees it")),
      reserve_seconds(histogram(*registry_, "kvern_reserve_seconds", "Time of a Reserve in the daemon")),
      commit_seconds(histogram(*registry_, "kvern_commit_seconds", "Time from Commit to its answer")),
      fetch_seconds(histogram(*registry_, "kvern_fetch_seconds", "Time of a Fetch in the daemon")),
      compacted_tokens(
          counter(*registry_, "kvern_compacted_tokens_total", "Prompt tokens that compact caches were made of")),
      compacted_raw_bytes(counter(*registry_, "kvern_compacted_raw_bytes_total",
                                  "Bytes of the prompts that compact caches were made of")),
      compacted_stored_bytes(
          counter(*registry_, "kvern_compacted_stored_bytes_total", "Bytes of compact caches when they were stored")),
      compaction_seconds(histogram(*registry_, "kvern_compaction_seconds", "Time to make a compact cache")),
      compaction_error(histograms(*registry_, "kvern_compaction_error",
                                  "Relative error of the attention output over compact caches, mean over the layers")
                           .Add({}, error_buckets())),
      spans_exported(
          counter(*registry_, "kvern_trace_spans_exported_total", "Spans that the tracing collector has taken")),
      spans_queue_full(counter(*registry_, "kvern_trace_spans_dropped_total",
                               "Spans that the tracing collector never had, by reason", {{"reason", "queue_full"}})),
      spans_not_taken(counters(*registry_, "kvern_trace_spans_dropped_total",
                               "Spans that the tracing collector never had, by reason")
                          .Add({{"reason", "collector"}})) {
  label_all(requests_, counters(*registry_, "kvern_requests_total", "Hot requests by type"), "type",
            {"match", "reserve", "commit", "abandon", "fetch", "release", "release_match", "report", "store_pages",
             "load_pages", "retain"});
  label_all(refused_, counters(*registry_, "kvern_refused_total", "Chunks that were not taken, by reason"), "reason",
            {"invalid", "codec", "too_large", "staging_full", "store_full", "queue_full", "in_flight", "corrupt",
             "stopping", "session"});
  label_all(protocol_errors_,
            counters(*registry_, "kvern_protocol_errors_total", "Messages that no correct client sends"), "kind",
            {"malformed", "sequence", "unknown_body", "bad_token", "bad_ring", "version", "forbidden"});
  label_all(missed_, counters(*registry_, "kvern_miss_tokens_total", "Prompt tokens that were not served, by reason"),
            "reason", {"not_stored", "evicted_before_load", "failed_load"});
  label_all(
      demotions_refused_,
      counters(*registry_, "kvern_demotions_refused_total", "Steps down a ladder that came to nothing, by reason"),
      "reason", {"in_use", "no_room", "codec", "error", "corrupt", "gone"});
  label_all(compactions_,
            counters(*registry_, "kvern_compactions_total", "Requests for compact caches, by what became of them"),
            "outcome", {"ready", "failed", "refused"});
  auto& ended = counters(*registry_, "kvern_sessions_ended_total", "Sessions that ended, by reason");
  for (const auto why : {SessionEnd::kGoodbye, SessionEnd::kDisconnected, SessionEnd::kExpired,
                         SessionEnd::kProtocolError, SessionEnd::kStopping}) {
    const std::string name(end_name(why));
    sessions_ended_.emplace(name, &ended.Add({{"reason", name}}));
  }
  auto& removed = counters(*registry_, "kvern_removed_chunks_total", "Chunks that left the store, by reason");
  for (const char* reason : {"evicted", "superseded", "quarantined", "flushed", "dropped"}) {
    removed_.emplace(reason, &removed.Add({{"reason", reason}, {"tier", "dram"}}));
  }
}

void Metrics::session_ended(std::string_view why) {
  if (const auto found = sessions_ended_.find(why); found != sessions_ended_.end()) found->second->Increment();
}

void Metrics::compacted(std::uint64_t prompt_tokens, std::uint64_t raw_bytes, std::uint64_t stored_bytes,
                        std::optional<double> error, double seconds) {
  compaction_ended(CompactionEnd::kReady);
  compacted_tokens.Increment(static_cast<double>(prompt_tokens));
  compacted_raw_bytes.Increment(static_cast<double>(raw_bytes));
  compacted_stored_bytes.Increment(static_cast<double>(stored_bytes));
  compaction_seconds.Observe(seconds);
  if (error) compaction_error.Observe(*error);
}

void Metrics::chunk_removed(std::string_view reason) {
  if (const auto found = removed_.find(reason); found != removed_.end()) found->second->Increment();
}

void Metrics::finished(std::string_view tier, TierOperation which, const Status& status, std::uint64_t bytes,
                       double seconds) {
  OfOperation& figures = operation(tier, which);
  figures.ended[outcome_of(status)]->Increment();
  figures.bytes.Increment(static_cast<double>(bytes));
  if (status) figures.seconds.Observe(seconds);
}

void Metrics::demoted(std::string_view codec_spec, std::uint64_t bytes_before, std::uint64_t bytes_after, double error,
                      double seconds) {
  OfRung& figures = rung(codec_spec);
  figures.steps.Increment();
  figures.freed_bytes.Increment(static_cast<double>(bytes_before - std::min(bytes_before, bytes_after)));
  figures.error.Observe(error);
  figures.seconds.Observe(seconds);
}

Metrics::OfRung& Metrics::rung(std::string_view codec_spec) {
  // Of ladders alone: their chains are few, and their parameters tell rungs apart.
  std::lock_guard lock(rungs_mutex_);
  if (const auto found = rungs_.find(codec_spec); found != rungs_.end()) return *found->second;
  std::string spec(codec_spec);
  const prometheus::Labels labels = {{"codec", rung_label(spec)}};
  auto made = std::make_unique<OfRung>(OfRung{
      .steps = counters(*registry_, "kvern_demotions_total", "Chunks that stepped down to this form").Add(labels),
      .freed_bytes =
          counters(*registry_, "kvern_demotion_freed_bytes_total", "Bytes that steps to this form freed").Add(labels),
      .error = histograms(*registry_, "kvern_demotion_error",
                          "Relative error of the attention output over the form that was made, with those before it")
                   .Add(labels, error_buckets()),
      .seconds = histograms(*registry_, "kvern_demotion_seconds", "Time of a step to this form")
                     .Add(labels, seconds_buckets())});
  return *rungs_.emplace(std::move(spec), std::move(made)).first->second;
}

Metrics::OfOperation& Metrics::operation(std::string_view tier, TierOperation which) {
  const std::pair key(std::string(tier), which);
  std::lock_guard lock(tiers_mutex_);
  if (const auto found = operations_.find(key); found != operations_.end()) return *found->second;
  const prometheus::Labels labels = {{"tier", key.first}, {"operation", std::string(operation_name(which))}};
  auto made = std::make_unique<OfOperation>(OfOperation{
      .ended = {},
      .bytes = counters(*registry_, "kvern_tier_bytes_total", "Bytes that moved from and to lower tiers").Add(labels),
      .seconds =
          histograms(*registry_, "kvern_tier_operation_seconds", "Time of operations of lower tiers that succeeded")
              .Add(labels, seconds_buckets())});
  auto& ended = counters(*registry_, "kvern_tier_operations_total",
                         "Operations of lower tiers; declined: no room, not admitted or cancelled");
  for (std::size_t outcome = 0; outcome < kOutcomes.size(); ++outcome) {
    auto with_outcome = labels;
    with_outcome.emplace("outcome", kOutcomes[outcome]);
    made->ended[outcome] = &ended.Add(with_outcome);
  }
  return *operations_.emplace(key, std::move(made)).first->second;
}

Metrics::OfCodec& Metrics::codec(std::string_view spec) {
  std::string label = codec_label(spec);
  std::lock_guard lock(codecs_mutex_);
  auto found = codecs_.find(label);
  if (found != codecs_.end()) return *found->second;
  if (codecs_.size() >= kMaxCodecLabels) {
    label = kOtherCodec;
    found = codecs_.find(label);
    if (found != codecs_.end()) return *found->second;
  }
  const prometheus::Labels labels = {{"codec", label}, {"tier", "dram"}};
  const auto add = [&](const char* name, const char* help) -> prometheus::Counter& {
    return counters(*registry_, name, help).Add(labels);
  };
  const auto add_histogram = [&](const char* name, const char* help) -> prometheus::Histogram& {
    return histograms(*registry_, name, help).Add({{"codec", label}}, seconds_buckets());
  };
  auto made = std::make_unique<OfCodec>(
      OfCodec{.stored_chunks = add("kvern_stored_chunks_total", "Shards of chunks that were encoded and stored"),
              .stored_raw_bytes = add("kvern_stored_raw_bytes_total", "Bytes of stored chunks before encoding"),
              .stored_encoded_bytes = add("kvern_stored_encoded_bytes_total", "Bytes of stored chunks after encoding"),
              .loaded_raw_bytes = add("kvern_loaded_raw_bytes_total", "Bytes of loaded chunks after decoding"),
              .loaded_encoded_bytes = add("kvern_loaded_encoded_bytes_total", "Bytes of loaded chunks before decoding"),
              .encode_seconds = add_histogram("kvern_encode_seconds", "Time to encode one shard of a chunk"),
              .decode_seconds =
                  add_histogram("kvern_decode_seconds", "Time of one load at the engine: fetch, verify, decode")});
  return *codecs_.emplace(std::move(label), std::move(made)).first->second;
}

}  // namespace kvern
