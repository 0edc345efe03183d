#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>

#include "base/status.h"
#include "store/event_loop.h"

namespace kvern {

struct TransferLimits {
  std::uint32_t concurrent_reads = 1;
  std::uint32_t concurrent_writes = 1;
  std::int64_t write_age_ns = 0;  ///< a write that waits for longer is given up
};

/// Whose turn it is among a remote tier's reads and writes, each in its order. Writes start only while no read waits: a
/// prompt waits for a read, nobody for a write. For the loop's thread alone.
class TransferQueue {
 public:
  using Start = std::function<void()>;
  using GiveUp = std::function<void(Status)>;

  /// server: for people, in the reason why a write was given up. The loop outlives the queue, which is closed, or the
  /// loop stopped, before it goes.
  TransferQueue(EventLoop& loop, std::string server, const TransferLimits& limits);

  /// Calls start, perhaps at once, and read_ended() or write_ended() is to follow; or else give_up. Names the transfer.
  std::uint64_t read(Start start, GiveUp give_up);
  std::uint64_t write(Start start, GiveUp give_up);
  void read_ended();
  void write_ended();

  /// Of a read that is not wanted any more. True: it was waiting, and neither of its functions will be called. False:
  /// it has started.
  bool withdraw(std::uint64_t read);

  /// Gives up all that waits and whatever is still to come.
  void close(const Status& why);

 private:
  struct Waiting {
    std::uint64_t id;
    std::int64_t since_ns;
    Start start;
    GiveUp give_up;
  };
  struct Lane {
    std::uint32_t limit;
    std::uint32_t under_way = 0;
    std::deque<Waiting> waiting = {};
  };

  std::uint64_t add(Lane& lane, Start start, GiveUp give_up);
  void ended(Lane& lane);
  void pump();
  bool start_one(Lane& lane);
  void watch_age();
  void give_up_old_writes();

  EventLoop& loop_;
  const std::string server_;
  const std::int64_t write_age_ns_;
  Lane reads_, writes_;
  std::optional<Status> closed_;
  bool pumping_ = false;
  std::optional<std::uint64_t> age_timer_;
  std::uint64_t next_id_ = 1;
};

}  // namespace kvern
