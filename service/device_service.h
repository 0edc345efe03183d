#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/executor.h"
#include "base/keys.h"
#include "base/status.h"
#include "service/device.h"
#include "service/device_pages.h"
#include "service/metrics.h"
#include "service/namespaces.h"
#include "service/session.h"
#include "service/store_pipeline.h"
#include "store/chunk_store.h"
#include "transport/wire.h"

namespace kvern {

/// Chunks between pages on devices and the store: gathered and encoded there before they cross the bus, decoded there
/// after. Thread-safe.
class DeviceService {
 public:
  struct Parts {
    ChunkStore& store;
    StorePipeline& pipeline;
    Executor& encoders;  ///< share the work of checksums
    Metrics& metrics;
    const Clock& clock;
    std::span<std::byte> slab;
    std::function<std::uint64_t()> usable_bytes;  ///< of the slab
    OpenDevice open;
    std::size_t threads = 4;  ///< chunks under way on each device
  };
  explicit DeviceService(Parts parts) : parts_(std::move(parts)) {}

  /// Maps the pages into this process and gives them to the session; the number that hot messages name. Takes the
  /// descriptors that the session has offered. May take long. kInvalid, kRefused in a sentence.
  Result<std::uint64_t> register_pages(Session& session, const wire::RegisterDevicePages& request);

  /// Gathers the blocks, encodes them with the reservation's codec, and publishes the chunk, unless the gathering ended
  /// after the deadline (0: none). done is called on a thread of the device; not at all when a failure comes back.
  Status store(std::shared_ptr<DevicePages> pages, std::shared_ptr<Reservation> reservation,
               std::vector<std::uint32_t> block_ids, std::int64_t deadline_ns, StorePipeline::Done done);

  struct LoadRequest {
    std::shared_ptr<DevicePages> pages;
    std::shared_ptr<const Namespace> space;
    std::uint16_t group = 0;
    std::vector<BlockHash> hashes;         ///< that follow each other
    std::vector<std::uint32_t> block_ids;  ///< as many; 0: skip
    std::int64_t deadline_ns = 0;          ///< 0: none
  };
  struct Loaded {
    std::uint32_t tokens = 0;
    std::uint64_t raw_bytes = 0;
    std::uint64_t encoded_bytes = 0;
    std::string codec_spec;  ///< of the chunks, by add_codec()
  };
  /// Decodes the chunks that hold the blocks into the pages. On failure all blocks of the request are zeroed, unless
  /// the pages were revoked, before done is called.
  Status load(LoadRequest request, std::function<void(const Status& status, const Loaded& loaded)> done);

  struct Figures {
    std::string uuid;
    std::uint64_t pinned_bytes = 0;
    PageCoder::Moved moved;
  };
  std::vector<Figures> figures() const;
  /// Waits until the devices have nothing to do.
  void drain();

 private:
  Result<std::shared_ptr<Device>> device(const std::string& uuid);
  bool is_late(std::int64_t deadline_ns) const;
  Status load_now(const LoadRequest& request, Loaded* loaded);
  Status load_piece(const LoadRequest& request, std::size_t begin, std::size_t* end, Loaded* loaded);

  const Parts parts_;
  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Device>> devices_;  ///< by uuid, from their first use on
};

}  // namespace kvern
