#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/keys.h"
#include "base/status.h"
#include "connector/cache_layout.h"
#include "connector/client.h"
#include "connector/device_group.h"
#include "connector/transfer_worker.h"

namespace kvern {

/// What the batches of one store share. All that it refers to outlives them.
struct StoreContext {
  const Session& session;
  NamespaceId namespace_id;
  const GroupPages& pages;
  const StoreJob& job;
  DeviceGroup* device = nullptr;  ///< where the pages are on one
};

/// A chunk that lies gathered in staging and waits for its commit.
struct GatheredChunk {
  std::uint32_t index = 0;  ///< in StoreJob::chunks
  std::uint64_t reservation_id = 0;
  std::vector<std::uint64_t> plane_checksums;
};

struct GatheredBatch {
  std::vector<GatheredChunk> gathered;
  std::vector<std::uint32_t> stored_before;  ///< others can read them already
  std::vector<std::uint32_t> no_room;        ///< ask again when staging has room
  std::string reason;                        ///< for those that will not be stored
  std::uint64_t raw_bytes = 0;
};

/// kInvalid when the chunk is malformed or names blocks that the pages do not have.
Status check_chunk(const StoreChunk& chunk, const GroupPages& pages);

/// Reserves staging for the chunks, gathers their pages into it and brings the bytes to the daemon. An error means that
/// the session is of no use any more; what happens to single chunks is in the batch.
Status gather_batch(const StoreContext& context, std::span<const std::uint32_t> chunks,
                    std::chrono::milliseconds timeout, GatheredBatch* batch);

/// Has the daemon gather, encode and store the chunks from pages on a device that it knows by the number; pages are not
/// read any more when it returns. Errors as those of gather_batch().
Status store_pages(const StoreContext& context, std::uint64_t pages_id, std::span<const std::uint32_t> chunks,
                   std::chrono::milliseconds timeout, GatheredBatch* batch);

/// Commits what was gathered and returns the indices of the chunks that others can read now. reason gets a sentence
/// when some cannot be read.
std::vector<std::uint32_t> commit_batch(const Session& session, std::span<const GatheredChunk> gathered,
                                        const std::string& traceparent, std::chrono::milliseconds timeout,
                                        std::string* reason);

}  // namespace kvern
