#include "store/demoter.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "kernels/container.h"
#include "store/chunk_record.h"
#include "store/lease.h"

namespace kvern {
namespace {

// How often a thread that yields looks whether others still have work.
constexpr std::chrono::milliseconds kYield{1};

DemotionRefusal refusal_of(Code code) {
  switch (code) {
    case Code::kBusy:
      return DemotionRefusal::kNoRoom;
    case Code::kExpired:
      return DemotionRefusal::kError;
    case Code::kCorrupt:
      return DemotionRefusal::kCorrupt;
    case Code::kNotFound:
      return DemotionRefusal::kGone;
    default:
      return DemotionRefusal::kCodec;
  }
}

}  // namespace

std::string_view refusal_name(DemotionRefusal why) {
  switch (why) {
    case DemotionRefusal::kInUse:
      return "in_use";
    case DemotionRefusal::kNoRoom:
      return "no_room";
    case DemotionRefusal::kCodec:
      return "codec";
    case DemotionRefusal::kError:
      return "error";
    case DemotionRefusal::kCorrupt:
      return "corrupt";
    case DemotionRefusal::kGone:
      return "gone";
    case DemotionRefusal::kCount:
      break;
  }
  return "unknown";
}

Demoter::Demoter(ChunkStore& store, const DemoterConfig& config, const Clock& clock, DemotionObserver& observer,
                 std::function<bool()> others_have_work, std::function<std::uint64_t()> usable_bytes)
    : store_(store),
      config_(config),
      clock_(clock),
      observer_(observer),
      others_have_work_(std::move(others_have_work)),
      usable_bytes_(std::move(usable_bytes)) {
  for (std::size_t i = 0; i < config_.threads; ++i) threads_.emplace_back([this] { run(); });
}

void Demoter::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

void Demoter::wake() {
  {
    std::lock_guard lock(mutex_);
    ++wakes_;
  }
  changed_.notify_all();
}

void Demoter::run() {
  pthread_setname_np(pthread_self(), "kvern-demote");
  // Without the right to it the thread keeps its priority, and still yields between chunks.
  const sched_param parameters{};
  pthread_setschedparam(pthread_self(), SCHED_IDLE, &parameters);
  Transcoder transcoder;
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    changed_.wait(lock, [&] { return stopping_ || wakes_ != seen; });
    seen = wakes_;
    while (!stopping_) {
      lock.unlock();
      yield_to_others();
      const bool more = step(transcoder);
      lock.lock();
      if (!more) break;
    }
  }
}

void Demoter::yield_to_others() {
  const std::int64_t until_ns = clock_.now_ns() + config_.patience_ns;
  std::unique_lock lock(mutex_);
  while (!stopping_ && others_have_work_() && clock_.now_ns() < until_ns) changed_.wait_for(lock, kYield);
}

bool Demoter::step(Transcoder& transcoder) {
  auto order = store_.next_demotion();
  if (!order) {
    if (order.error().code() == Code::kBusy) observer_.refused(DemotionRefusal::kInUse);
    return false;
  }
  const Status done = carry_out(*order, transcoder);
  if (!done) {
    const DemotionRefusal why = refusal_of(done.code());
    observer_.refused(why);
    if (why == DemotionRefusal::kCorrupt) {
      store_.quarantine(order->key.namespace_id, order->key.group, order->key.last_block);
    } else if (why != DemotionRefusal::kNoRoom) {
      store_.exempt_from_demotion(*order);
    }
  }
  store_.unpin(order->chunk.pin);
  return done || done.code() != Code::kBusy;
}

/// kExpired: the new form is weaker than allowed.
Status Demoter::carry_out(const DemotionOrder& order, Transcoder& transcoder) {
  const std::int64_t started_ns = clock_.now_ns();
  const auto codec = make_codec(order.codec_spec, order.rotation);
  if (!codec) return codec.error();
  std::vector<ContainerReader> old_forms;
  std::uint64_t bytes_before = 0;
  std::uint64_t room = 0;
  for (const StoredShard& shard : order.chunk.shards) {
    auto reader = ContainerReader::parse(store_.bytes(shard));
    if (!reader) return Status(Code::kCorrupt, reader.error().message());
    const std::size_t most = container_max_bytes(**codec, reader->info());
    if (most == 0) return Status(Code::kRefused, order.codec_spec + " does not take the shape");
    room += padded_bytes(most);
    bytes_before += shard.extent.bytes;
    old_forms.push_back(std::move(*reader));
  }
  const auto ticket = make_room(room);
  if (!ticket) return ticket.error();
  const auto object = store_.bytes(*ticket);
  std::vector<LoadedShard> new_forms;
  double error = 0;
  std::uint64_t end = 0;
  Status status;
  for (const ContainerReader& old_form : old_forms) {
    const auto made = transcoder.run(old_form, **codec, order.to.lossy_generations, object.subspan(end));
    status = status_of(made);
    if (!status) break;
    // Relative errors of two steps add up at most.
    error = std::max(error, order.error + made->error);
    new_forms.push_back({old_form.info(), end, made->bytes});
    end += padded_bytes(made->bytes);
  }
  if (status && order.error_max < 1 && !(error <= order.error_max)) {
    status = Status(Code::kExpired, "it came out with an error of " + std::to_string(error));
  }
  std::uint64_t bytes_after = 0;
  for (const LoadedShard& shard : new_forms) bytes_after += shard.bytes;
  if (status && bytes_after >= bytes_before)
    status = Status(Code::kRefused, order.codec_spec + " does not make it smaller");
  if (!status) {
    store_.abort(*ticket);
    return status;
  }
  status = store_.replace(*ticket, order, new_forms);
  if (!status) return status;
  observer_.demoted(order.codec_spec, bytes_before, bytes_after, error,
                    static_cast<double>(clock_.now_ns() - started_ns) * 1e-9);
  return status;
}

Result<WriteTicket> Demoter::make_room(std::uint64_t bytes) {
  auto ticket = store_.begin_load(bytes);
  if (ticket && usable_bytes_ && ticket->extent.offset + ticket->extent.bytes > usable_bytes_()) {
    store_.abort(*ticket);
    return failure(Code::kBusy, "the DRAM tier is still being reserved");
  }
  if (!ticket && ticket.error().code() == Code::kRefused) {
    return failure(Code::kBusy, ticket.error().message());
  }
  return ticket;
}

}  // namespace kvern
