#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "base/clock.h"
#include "base/trace.h"
#include "service/device_service.h"
#include "service/in_flight.h"
#include "service/metrics.h"
#include "service/sessions.h"
#include "service/store_pipeline.h"
#include "store/chunk_store.h"
#include "store/tiered_store.h"
#include "transport/channel.h"

namespace kvern {

/// Answers the hot messages of all clients, from the rings and from the control plane. Nothing here blocks: what takes
/// long goes to the pipeline. Requests are of unknown origin: every number and length is checked against what the
/// session's namespace says. Thread-safe.
class HotService final : public HotHandler {
 public:
  /// Longest prefix of one Match. A longer one is asked for in pieces.
  static constexpr std::size_t kMaxMatchBlocks = 1U << 15;
  /// What is retained for longer is asked for again.
  static constexpr std::uint64_t kMaxRetainSeconds = 7ULL * 24 * 3600;

  struct Parts {
    Sessions& sessions;
    ChunkStore& store;
    TieredStore& tiers;
    StorePipeline& pipeline;
    InFlight& in_flight;
    Metrics& metrics;
    const Clock& clock;
    std::uint64_t slab_bytes;
    DeviceService* devices = nullptr;  ///< nullptr: pages on devices are refused
    const Tracer* tracer = nullptr;    ///< nullptr: nothing is recorded
  };
  explicit HotService(const Parts& parts) : parts_(parts) {}

  void handle(std::uint64_t session_id, wire::HotRequest request, HotReplyFunction reply) override;
  void protocol_error(std::uint64_t session_id, const Status& why) override;

  /// From here on nothing is reserved or fetched; what is committed is finished.
  void begin_stop() { stopping_.store(true); }

 private:
  // span: of the request; null where nothing is recorded.
  SpanPtr start_span(const Session& session, const wire::HotRequest& request) const;
  Result<bool> prefetch(Session& session, const wire::Match& request, const Namespace& space,
                        std::span<const BlockHash> blocks, const SpanPtr& span);
  Status match(Session& session, const wire::Match& request, wire::Matched* answer, const SpanPtr& span);
  Status reserve(Session& session, const wire::Reserve& request, wire::Reserved* answer, const SpanPtr& span);
  void commit(const std::shared_ptr<Session>& session, const wire::HotRequest& request, HotReplyFunction reply,
              const SpanPtr& span);
  Status abandon(Session& session, const wire::Abandon& request);
  Status fetch(Session& session, const wire::Fetch& request, wire::Fetched* answer, const SpanPtr& span);
  Status release(Session& session, const wire::Release& request);
  void report(const wire::Report& request);
  Status retain(const Session& session, const wire::Retain& request, wire::Retained* answer);

  void store_pages(const std::shared_ptr<Session>& session, const wire::HotRequest& request, HotReplyFunction reply,
                   const SpanPtr& span);
  void load_pages(const std::shared_ptr<Session>& session, const wire::HotRequest& request, HotReplyFunction reply);

  struct ReserveTerms;
  struct Refused;
  Result<ReserveTerms> reserve_terms(Session& session, const wire::Reserve& request);
  tl::expected<std::shared_ptr<Reservation>, Refused> claim_item(const ReserveTerms& terms,
                                                                 const wire::ReserveItem& item);
  void reserve_item(Session& session, const ReserveTerms& terms, const wire::ReserveItem& item,
                    wire::ReservedItem* answer);
  void fetch_item(Session& session, const Namespace& space, std::uint16_t group, const wire::FetchItem& item,
                  wire::FetchedItem* answer);

  const Parts parts_;
  std::atomic<bool> stopping_{false};
};

}  // namespace kvern
