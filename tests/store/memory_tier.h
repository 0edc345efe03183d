#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "store/tier.h"

namespace kvern::testing {

/// A tier in memory whose operations end when the test says so (run()), or at once (immediate). What it ends with can
/// be set. One thread.
class MemoryTier final : public Tier {
 public:
  explicit MemoryTier(const Clock& clock, TierObserver* observer = nullptr, BreakerConfig breaker = {})
      : Tier("memory", breaker, clock, observer) {}
  ~MemoryTier() override {
    immediate = true;
    while (run()) {
    }
  }

  /// Ends the oldest operation; false when there is none.
  bool run() {
    if (waiting.empty()) return false;
    const auto operation = std::move(waiting.front());
    waiting.pop_front();
    operation();
    return true;
  }

  struct Object {
    ChunkKey key;
    std::vector<std::byte> bytes;
  };
  std::map<std::string, Object> objects;  ///< by key, as text
  std::deque<std::function<void()>> waiting;
  bool immediate = true;
  Status broken;  ///< what operations end with unless it is OK
  std::size_t finds = 0, reads = 0, writes = 0;

 private:
  void later(std::function<void()> operation) {
    waiting.push_back(std::move(operation));
    if (immediate) run();
  }
  void do_find(std::vector<CellQuery> cells, std::stop_token, FindDone done) override {
    ++finds;
    later([this, cells = std::move(cells), done = std::move(done)] {
      if (!broken) return done(failure(broken));
      std::vector<TierHit> hits(cells.size());
      for (std::size_t i = 0; i < cells.size(); ++i) {
        for (std::size_t blocks = cells[i].blocks.size(); blocks > 0 && hits[i].bytes == 0; --blocks) {
          const ChunkKey key{cells[i].namespace_id, cells[i].group, cells[i].blocks[blocks - 1]};
          const auto object = objects.find(key.to_string());
          if (object != objects.end()) hits[i] = {key, object->second.bytes.size(), static_cast<std::uint32_t>(blocks)};
        }
      }
      done(std::move(hits));
    });
  }
  void do_read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
               Done done) override {
    ++reads;
    later([this, hit, offset, into, cancel = std::move(cancel), done = std::move(done)] {
      if (cancel.stop_requested()) return done(Status(Code::kExpired, "cancelled"));
      if (!broken) return done(broken);
      const auto object = objects.find(hit.key.to_string());
      if (object == objects.end()) return done(Status(Code::kNotFound, "gone"));
      std::memcpy(into.data(), object->second.bytes.data() + offset, into.size());
      done(Status::ok());
    });
  }
  void do_write(TierObject object, Done done) override {
    ++writes;
    later([this, object = std::move(object), done = std::move(done)] {
      if (!broken) return done(broken);
      Object& place = objects[object.key.to_string()];
      place = {object.key, {}};
      for (const auto& piece : object.pieces) place.bytes.insert(place.bytes.end(), piece.begin(), piece.end());
      done(Status::ok());
    });
  }
  void do_erase(std::vector<ChunkKey> keys, Done done) override {
    for (const auto& key : keys) objects.erase(key.to_string());
    done(broken);
  }
  void do_erase_all(const NamespaceSet& namespaces, Done done) override {
    std::erase_if(objects, [&](const auto& entry) { return entry.first.starts_with(namespaces.hex_prefix()); });
    done(broken);
  }
  void do_list(const NamespaceSet& namespaces, PageDone page, Done done) override {
    later([this, namespaces, page = std::move(page), done = std::move(done)] {
      for (const auto& [name, object] : objects) {
        if (broken && name.starts_with(namespaces.hex_prefix())) page({{object.key, object.bytes.size()}});
      }
      done(broken);
    });
  }
  Status do_drain(std::int64_t) override { return Status::ok(); }
  TierStats do_stats() const override { return {.objects = objects.size()}; }
};

}  // namespace kvern::testing
