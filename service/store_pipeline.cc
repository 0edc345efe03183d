#include "service/store_pipeline.h"

#include <algorithm>
#include <utility>

#include "kernels/container.h"
#include "service/log.h"

namespace kvern {
namespace {

/// Whether the container is what the index says it is.
Status check_container(std::span<const std::byte> bytes, const Lease& lease) {
  auto reader = ContainerReader::parse(bytes);
  if (!reader) return reader.error();
  const ContainerInfo& info = reader->info();
  if (info.key.namespace_id != lease.namespace_id() || info.key.group != lease.group() ||
      std::ranges::find(info.block_hashes, lease.block()) == info.block_hashes.end()) {
    return Status(Code::kCorrupt, "the container belongs to another chunk");
  }
  return reader->verify();
}

}  // namespace

Status StorePipeline::submit(std::shared_ptr<Reservation> reservation, std::vector<std::uint64_t> plane_checksums,
                             Done done) {
  const bool queued = executor_.submit([this, reservation = std::move(reservation),
                                        checksums = std::move(plane_checksums), done = std::move(done)]() mutable {
    const Status status = store(*reservation, [&](std::span<std::byte> out) {
      const auto canonical = reservation->block.bytes().first(reservation->info.shape.raw_bytes());
      return encode_container(*reservation->codec, reservation->info, canonical, checksums, out);
    });
    reservation.reset();
    done(status);
  });
  if (!queued) return Status(Code::kBusy, "too many chunks wait to be encoded: reserve again later");
  return Status::ok();
}

void StorePipeline::begin_work() {
  std::lock_guard lock(mutex_);
  ++unfinished_;
}

void StorePipeline::end_work() {
  std::lock_guard lock(mutex_);
  if (--unfinished_ == 0) idle_.notify_all();
}

bool StorePipeline::wait_idle(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return idle_.wait_for(lock, timeout, [this] { return unfinished_ == 0; });
}

Status StorePipeline::store(const Reservation& reservation, const Encode& encode) {
  const SpanPtr span = child_of(reservation.span, "kvern.encode");
  const Status status = encode_and_publish(reservation, encode, span);
  if (span) span->end(status);
  (status ? stored_ : failed_).fetch_add(1, std::memory_order_relaxed);
  return status;
}

Status StorePipeline::encode_and_publish(const Reservation& reservation, const Encode& encode, const SpanPtr& span) {
  if (cancelled_.load(std::memory_order_relaxed)) return Status(Code::kUnavailable, "the daemon is stopping");
  const Codec& codec = *reservation.codec;
  const ContainerInfo& info = reservation.info;
  if (span) {
    span->set("kvern.codec", info.codec_spec);
    span->set("kvern.tokens", info.shape.tokens);
    span->set("kvern.raw_bytes", info.shape.raw_bytes());
  }
  const auto ticket = store_.begin_write(info, container_max_bytes(codec, info));
  if (!ticket) {
    metrics_.refused(ticket.error().code() == Code::kRefused ? Refusal::kTooLarge : Refusal::kStoreFull);
    return ticket.error();
  }
  if (ticket->extent.offset + ticket->extent.bytes > usable_bytes_()) {
    store_.abort(*ticket);
    metrics_.refused(Refusal::kStoreFull);
    return Status(Code::kBusy, "the DRAM tier is still being reserved");
  }
  const std::int64_t started = clock_.now_ns();
  const auto encoded = encode(store_.bytes(*ticket));
  if (!encoded) {
    store_.abort(*ticket);
    metrics_.refused(encoded.error().code() == Code::kCorrupt ? Refusal::kCorrupt : Refusal::kCodec);
    return encoded.error();
  }
  const double seconds = static_cast<double>(clock_.now_ns() - started) * 1e-9;
  if (span) span->set("kvern.encoded_bytes", *encoded);
  const auto published = store_.publish(*ticket, info, *encoded);
  if (!published) {
    metrics_.refused(Refusal::kStoreFull);
    return published.error();
  }
  if (*published) tiers_.stored(info.key, span);
  Metrics::OfCodec& figures = metrics_.codec(info.codec_spec);
  figures.stored_chunks.Increment();
  figures.stored_raw_bytes.Increment(static_cast<double>(info.shape.raw_bytes()));
  figures.stored_encoded_bytes.Increment(static_cast<double>(*encoded));
  figures.encode_seconds.Observe(seconds);
  return Status::ok();
}

void StorePipeline::verify(std::shared_ptr<Lease> lease) {
  const bool queued = executor_.submit([this, lease = std::move(lease)] {
    const std::string key = ChunkKey{lease->namespace_id(), lease->group(), lease->block()}.to_string();
    for (const StoredShard& shard : lease->chunk().shards) {
      const Status status = check_container(store_.bytes(shard), *lease);
      if (status) continue;
      store_.quarantine(lease->namespace_id(), lease->group(), lease->block());
      log_error("a chunk is corrupt and was quarantined", {{"chunk", key}, {"why", status.message()}});
      return;
    }
    log_warn("a client called a chunk corrupt; its bytes are good here", {{"chunk", key}});
  });
  if (!queued) log_warn("a chunk was called corrupt and could not be looked at: the encode queue is full");
}

}  // namespace kvern
