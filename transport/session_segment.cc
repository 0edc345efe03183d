#include "transport/session_segment.h"

#include <bit>
#include <memory>
#include <new>
#include <stdexcept>

#include "transport/futex.h"

namespace kvern {
namespace {

constexpr std::size_t kHeaderBytes = 4096;
constexpr std::size_t kLineBytes = 64;
// Bounds that keep the sum of sizes far from overflow, whatever a header says.
constexpr std::uint32_t kMaxHazards = 1U << 24;
constexpr std::uint32_t kMinRingBytes = 1U << 10;
constexpr std::uint32_t kMaxRingBytes = 1U << 30;

using Hazard = std::atomic<std::uint32_t>;
static_assert(Hazard::is_always_lock_free && sizeof(Hazard) == 4);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && sizeof(std::atomic<std::uint64_t>) == 8);

std::size_t hazard_bytes(const SegmentLayout& layout) {
  return (layout.hazard_capacity * sizeof(Hazard) + kLineBytes - 1) / kLineBytes * kLineBytes;
}

bool valid_ring(std::uint32_t bytes) {
  return std::has_single_bit(bytes) && bytes >= kMinRingBytes && bytes <= kMaxRingBytes;
}

}  // namespace

std::size_t SegmentLayout::total_bytes() const {
  return kHeaderBytes + hazard_bytes(*this) + request_ring_bytes + reply_ring_bytes;
}

Status SegmentLayout::validate() const {
  if (hazard_capacity == 0 || hazard_capacity > kMaxHazards) {
    return Status(Code::kInvalid, "hazard_capacity must be 1 to " + std::to_string(kMaxHazards));
  }
  if (!valid_ring(request_ring_bytes) || !valid_ring(reply_ring_bytes)) {
    return Status(Code::kInvalid, "the size of a ring must be a power of two from 1 KiB to 1 GiB");
  }
  return Status::ok();
}

SegmentView SegmentView::create(std::span<std::byte> memory, const SegmentLayout& layout, std::uint64_t session_id,
                                std::uint64_t epoch) {
  if (const Status status = layout.validate(); !status) throw std::invalid_argument(status.message());
  if (memory.size() < layout.total_bytes()) {
    throw std::invalid_argument("a segment needs " + std::to_string(layout.total_bytes()) + " bytes, not " +
                                std::to_string(memory.size()));
  }
  SegmentView view;
  view.header_ = new (memory.data()) SessionHeader{};
  view.layout_ = layout;
  const auto hazards = view.hazards();
  std::uninitialized_value_construct(hazards.begin(), hazards.end());
  SessionHeader& header = *view.header_;
  header.version = SessionHeader::kVersion;
  header.hazard_capacity = layout.hazard_capacity;
  header.request_ring_bytes = layout.request_ring_bytes;
  header.reply_ring_bytes = layout.reply_ring_bytes;
  header.session_id = session_id;
  header.epoch = epoch;
  header.state = static_cast<std::uint32_t>(SessionState::kLive);
  header.magic = SessionHeader::kMagic;
  return view;
}

Result<SegmentView> SegmentView::attach(std::span<std::byte> memory) {
  if (memory.size() < kHeaderBytes) return failure(Code::kInvalid, "the memory is too small for a session segment");
  SegmentView view;
  view.header_ = std::launder(reinterpret_cast<SessionHeader*>(memory.data()));
  const SessionHeader& header = *view.header_;
  if (header.magic != SessionHeader::kMagic) return failure(Code::kInvalid, "the memory holds no session segment");
  if (header.version != SessionHeader::kVersion) {
    return failure(Code::kRefused, "the daemon's session segment has version " + std::to_string(header.version) +
                                       ", this client knows " + std::to_string(SessionHeader::kVersion) +
                                       ": install the same Kvern on both sides");
  }
  view.layout_ = {.hazard_capacity = header.hazard_capacity,
                  .request_ring_bytes = header.request_ring_bytes,
                  .reply_ring_bytes = header.reply_ring_bytes};
  if (const Status status = view.layout_.validate(); !status) return failure(status);
  if (memory.size() < view.layout_.total_bytes()) {
    return failure(Code::kInvalid, "the session segment is larger than its memory");
  }
  return view;
}

void SegmentView::set_state(SessionState state) const {
  header_->state.store(static_cast<std::uint32_t>(state));
  header_->reply_sequence.fetch_add(1);
  futex_wake_all(header_->reply_sequence);
}

std::span<std::atomic<std::uint32_t>> SegmentView::hazards() const {
  auto* start = reinterpret_cast<std::byte*>(header_) + kHeaderBytes;
  return {reinterpret_cast<Hazard*>(start), layout_.hazard_capacity};
}

std::span<const std::atomic<std::uint32_t>> SegmentView::used_hazards() const {
  return hazards().first(std::min(header_->hazard_high_water.load(), layout_.hazard_capacity));
}

std::span<std::byte> SegmentView::request_ring() const {
  return {reinterpret_cast<std::byte*>(header_) + kHeaderBytes + hazard_bytes(layout_), layout_.request_ring_bytes};
}

std::span<std::byte> SegmentView::reply_ring() const {
  return {request_ring().data() + layout_.request_ring_bytes, layout_.reply_ring_bytes};
}

HazardSlots::HazardSlots(const SegmentView& segment) : segment_(segment) {}

std::optional<std::uint32_t> HazardSlots::publish(std::uint32_t chunk) {
  std::uint32_t slot = 0;
  if (!publish_all({&chunk, 1}, {&slot, 1})) return std::nullopt;
  return slot;
}

bool HazardSlots::publish_all(std::span<const std::uint32_t> chunks, std::span<std::uint32_t> slots) {
  const auto hazards = segment_.hazards();
  const std::lock_guard lock(mutex_);
  if (chunks.size() > free_.size() + (hazards.size() - next_)) return false;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    slots[i] = take_locked();
    hazards[slots[i]].store(chunks[i] + 1);
  }
  return true;
}

void HazardSlots::clear(std::uint32_t slot) {
  const std::lock_guard lock(mutex_);
  if (slot >= next_ || segment_.hazards()[slot].exchange(0) == 0) return;
  free_.push_back(slot);
}

std::uint32_t HazardSlots::take_locked() {
  if (!free_.empty()) {
    const std::uint32_t slot = free_.back();
    free_.pop_back();
    return slot;
  }
  // Before the slot is written, so that an evictor that reads the mark first cannot overlook the slot.
  segment_.header().hazard_high_water.store(next_ + 1);
  return next_++;
}

}  // namespace kvern
