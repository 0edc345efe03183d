#pragma once

#include <prometheus/counter.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/status.h"
#include "store/demoter.h"
#include "store/tier.h"

namespace kvern {

/// Kinds of hot requests; labels of kvern_requests_total.
enum class RequestType {
  kMatch,
  kReserve,
  kCommit,
  kAbandon,
  kFetch,
  kRelease,
  kReleaseMatch,
  kReport,
  kStorePages,
  kLoadPages,
  kRetain,
  kCount
};
/// Why a reservation or commit came to nothing; labels of kvern_refused_total.
enum class Refusal {
  kInvalid,
  kCodec,
  kTooLarge,
  kStagingFull,
  kStoreFull,
  kQueueFull,
  kInFlight,
  kCorrupt,
  kStopping,
  kSession,
  kCount
};
/// Kinds of messages that no correct client sends; labels of kvern_protocol_errors_total.
enum class ProtocolError { kMalformed, kSequence, kUnknownBody, kBadToken, kBadRing, kVersion, kForbidden, kCount };
/// Why tokens of a prompt were not served; labels of kvern_miss_tokens_total.
enum class Miss { kNotStored, kEvictedBeforeLoad, kFailedLoad, kCount };

/// How requests for compact caches end; labels of kvern_compactions_total.
enum class CompactionEnd { kReady, kFailed, kRefused, kCount };

/// Counters and histograms of the daemon, registered once; hot paths only add. Figures that somebody else keeps
/// (occupancy, sessions, queues) are collected when they are asked for. Thread-safe.
class Metrics final : public TierObserver, public DemotionObserver {
 public:
  Metrics();

  /// Counts an operation of a lower tier.
  void finished(std::string_view tier, TierOperation operation, const Status& status, std::uint64_t bytes,
                double seconds) override;

  /// Counts a step down a ladder.
  void demoted(std::string_view codec_spec, std::uint64_t bytes_before, std::uint64_t bytes_after, double error,
               double seconds) override;
  void refused(DemotionRefusal why) override { at(demotions_refused_, why).Increment(); }

  void request(RequestType type) { at(requests_, type).Increment(); }
  void refused(Refusal why) { at(refused_, why).Increment(); }
  void protocol_error(ProtocolError kind) { at(protocol_errors_, kind).Increment(); }
  void missed(Miss why, double tokens) { at(missed_, why).Increment(tokens); }
  void compaction_ended(CompactionEnd how) { at(compactions_, how).Increment(); }
  /// Counts one that is ready. error: of its attention, where it was measured.
  void compacted(std::uint64_t prompt_tokens, std::uint64_t raw_bytes, std::uint64_t stored_bytes,
                 std::optional<double> error, double seconds);
  void session_ended(std::string_view why);
  void chunk_removed(std::string_view reason);

  /// What depends on the codec. The label is the names of the chain's steps without their parameters, which clients
  /// choose.
  struct OfCodec {
    prometheus::Counter& stored_chunks;
    prometheus::Counter& stored_raw_bytes;
    prometheus::Counter& stored_encoded_bytes;
    prometheus::Counter& loaded_raw_bytes;
    prometheus::Counter& loaded_encoded_bytes;
    prometheus::Histogram& encode_seconds;
    prometheus::Histogram& decode_seconds;
  };
  OfCodec& codec(std::string_view spec);

  prometheus::Registry& registry() const { return *registry_; }

 private:
  template <typename Enum>
  using Counters = std::array<prometheus::Counter*, static_cast<std::size_t>(Enum::kCount)>;
  template <typename Enum>
  static prometheus::Counter& at(const Counters<Enum>& counters, Enum which) {
    return *counters[static_cast<std::size_t>(which)];
  }

  const std::unique_ptr<prometheus::Registry> registry_;
  Counters<RequestType> requests_{};
  Counters<Refusal> refused_{};
  Counters<ProtocolError> protocol_errors_{};
  Counters<Miss> missed_{};
  Counters<DemotionRefusal> demotions_refused_{};
  Counters<CompactionEnd> compactions_{};
  std::map<std::string, prometheus::Counter*, std::less<>> sessions_ended_;
  std::map<std::string, prometheus::Counter*, std::less<>> removed_;

 public:  // after registry_, in which they live
  prometheus::Counter& requested_tokens;
  prometheus::Counter& hit_tokens;
  prometheus::Counter& loaded_tokens;
  prometheus::Counter& failed_loads;
  prometheus::Counter& retentions_refused;
  prometheus::Counter& control_requests;
  prometheus::Counter& device_stored_bytes;
  prometheus::Counter& device_loaded_bytes;
  prometheus::Histogram& match_seconds;
  prometheus::Histogram& reserve_seconds;
  prometheus::Histogram& commit_seconds;
  prometheus::Histogram& fetch_seconds;
  prometheus::Counter& compacted_tokens;
  prometheus::Counter& compacted_raw_bytes;
  prometheus::Counter& compacted_stored_bytes;
  prometheus::Histogram& compaction_seconds;
  prometheus::Histogram& compaction_error;
  prometheus::Counter& spans_exported;
  prometheus::Counter& spans_queue_full;
  prometheus::Counter& spans_not_taken;

 private:
  /// One operation of one tier.
  struct OfOperation {
    std::array<prometheus::Counter*, 4> ended;  ///< by Outcome
    prometheus::Counter& bytes;
    prometheus::Histogram& seconds;
  };
  OfOperation& operation(std::string_view tier, TierOperation operation);

  /// Steps to one form.
  struct OfRung {
    prometheus::Counter& steps;
    prometheus::Counter& freed_bytes;
    prometheus::Histogram& error;
    prometheus::Histogram& seconds;
  };
  OfRung& rung(std::string_view codec_spec);

  std::mutex rungs_mutex_;
  std::map<std::string, std::unique_ptr<OfRung>, std::less<>> rungs_;  ///< by the chain as it stands on a ladder
  std::mutex tiers_mutex_;
  std::map<std::pair<std::string, TierOperation>, std::unique_ptr<OfOperation>> operations_;
  std::mutex codecs_mutex_;
  std::map<std::string, std::unique_ptr<OfCodec>, std::less<>> codecs_;
};

/// "int8 | zstd" of "int8(group=64) | zstd(level=3)".
std::string codec_label(std::string_view spec);
/// The same, with what tells the rungs of ladders apart: "centroid | int4 ratio=0.25".
std::string rung_label(const std::string& codec_spec);

}  // namespace kvern
