#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
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

/// What the batches of one load share. All that it refers to outlives them.
struct LoadContext {
  const Session& session;
  NamespaceId namespace_id;
  std::function<const GroupPages*(std::uint16_t group)> pages;  ///< nullptr for a group that is not registered
  const std::atomic<bool>& cancelled;
  std::chrono::steady_clock::time_point deadline;
  std::function<DeviceGroup*(std::uint16_t group)> device;  ///< nullptr for a group whose pages are in host memory
  const std::string& traceparent;                           ///< of the job
};

struct LoadedBytes {
  std::uint64_t tokens = 0;
  std::uint64_t raw_bytes = 0;
  std::uint64_t encoded_bytes = 0;
  std::string codec_spec;  ///< of the chunks, by add_codec()
  bool by_daemon = false;  ///< it was asked to write to pages on a device: they may have been written without a lease
};

/// Leases that loading took: none, and no page was written. Give them back with release(), also after a failure.
struct TakenLeases {
  std::vector<std::uint64_t> good;
  std::vector<std::uint64_t> corrupt;
};

/// Fetches the chunks that hold the pieces' blocks, verifies that they are what was asked for (namespace, group, every
/// block hash in full, shapes, checksums) and decodes them into the pages. On failure pages may have been written in
/// part: the caller zeroes them. Whether the session lived to the end is the caller's question as well.
Status load_batch(const LoadContext& context, std::span<const LoadPiece> pieces, LoadedBytes* loaded,
                  TakenLeases* leases);

/// kInvalid when the piece is malformed or names blocks that the group's pages do not have.
Status check_piece(const LoadPiece& piece, const GroupPages* pages);

void release(const Session& session, const TakenLeases& leases, std::chrono::milliseconds timeout);

}  // namespace kvern
