#include "store/transfer_queue.h"

#include <utility>

namespace kvern {

TransferQueue::TransferQueue(EventLoop& loop, std::string server, const TransferLimits& limits)
    : loop_(loop),
      server_(std::move(server)),
      write_age_ns_(limits.write_age_ns),
      reads_{.limit = limits.concurrent_reads},
      writes_{.limit = limits.concurrent_writes} {}

std::uint64_t TransferQueue::read(Start start, GiveUp give_up) {
  return add(reads_, std::move(start), std::move(give_up));
}

std::uint64_t TransferQueue::write(Start start, GiveUp give_up) {
  return add(writes_, std::move(start), std::move(give_up));
}

std::uint64_t TransferQueue::add(Lane& lane, Start start, GiveUp give_up) {
  const std::uint64_t id = next_id_++;
  if (closed_) {
    give_up(*closed_);
    return id;
  }
  lane.waiting.push_back({id, loop_.now_ns(), std::move(start), std::move(give_up)});
  pump();
  return id;
}

void TransferQueue::read_ended() { ended(reads_); }
void TransferQueue::write_ended() { ended(writes_); }

void TransferQueue::ended(Lane& lane) {
  --lane.under_way;
  pump();
}

bool TransferQueue::withdraw(std::uint64_t read) {
  const bool waited = std::erase_if(reads_.waiting, [read](const Waiting& each) { return each.id == read; }) > 0;
  if (waited) pump();  // writes may have waited for it
  return waited;
}

void TransferQueue::close(const Status& why) {
  closed_ = why;
  if (age_timer_) loop_.cancel(*std::exchange(age_timer_, std::nullopt));
  for (Lane* lane : {&reads_, &writes_}) {
    for (const Waiting& each : std::exchange(lane->waiting, {})) each.give_up(why);
  }
}

void TransferQueue::pump() {
  if (std::exchange(pumping_, true)) return;  // what ends at once must not nest
  while (start_one(reads_) || (reads_.waiting.empty() && start_one(writes_))) continue;
  pumping_ = false;
  watch_age();
}

bool TransferQueue::start_one(Lane& lane) {
  if (lane.under_way >= lane.limit || lane.waiting.empty()) return false;
  const Start start = std::move(lane.waiting.front().start);
  lane.waiting.pop_front();
  ++lane.under_way;
  start();
  return true;
}

void TransferQueue::watch_age() {
  if (age_timer_ || writes_.waiting.empty()) return;
  age_timer_ = loop_.at(writes_.waiting.front().since_ns + write_age_ns_, [this] {
    age_timer_.reset();
    give_up_old_writes();
    pump();
  });
}

void TransferQueue::give_up_old_writes() {
  auto& waiting = writes_.waiting;
  while (!waiting.empty() && waiting.front().since_ns + write_age_ns_ <= loop_.now_ns()) {
    const GiveUp give_up = std::move(waiting.front().give_up);
    waiting.pop_front();
    give_up({Code::kBusy, server_ + " takes writes more slowly than they come; this one has waited too long"});
  }
}

}  // namespace kvern
