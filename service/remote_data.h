#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "service/sessions.h"
#include "store/chunk_store.h"
#include "transport/ucx.h"

namespace kvern {

/// What remote clients may write and read: the staging extents that their session has reserved, the containers that it
/// has leased. What is on its way is held until it has arrived, whatever becomes of the session. Thread-safe.
class RemoteData final : public UcxServerHandler {
 public:
  RemoteData(Sessions& sessions, ChunkStore& store) : sessions_(sessions), store_(store) {}

  Result<std::span<std::byte>> begin_push(const std::string& session_token, std::uint64_t reservation_id,
                                          std::uint64_t offset, std::size_t bytes) override;
  void pushed(const std::string& session_token, std::uint64_t reservation_id, const Status& status) override;
  Result<std::span<const std::byte>> begin_pull(const std::string& session_token, std::uint64_t lease_id,
                                                std::uint64_t offset, std::size_t bytes) override;
  void pulled(const std::string& session_token, std::uint64_t lease_id, const Status& status) override;

 private:
  using Key = std::pair<std::string, std::uint64_t>;  ///< token and reservation or lease

  Sessions& sessions_;
  ChunkStore& store_;
  std::mutex mutex_;
  std::multimap<Key, std::shared_ptr<Reservation>> pushes_;
  std::multimap<Key, std::shared_ptr<Lease>> pulls_;
};

}  // namespace kvern
