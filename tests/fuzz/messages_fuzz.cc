// Bytes as a peer may send them, taken for every message that a daemon or a client reads: on its own, and as the
// payload of a ring's frame; for handles and manifests of compact caches too. What can be parsed must survive being
// written and read again.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "base/trace.h"
#include "transport/compact_handle.h"
#include "transport/ring.h"
#include "transport/wire.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

template <typename Message>
bool parse(const std::string& bytes) {
  Message message;
  if (!message.ParseFromString(bytes)) return false;
  const std::string written = message.SerializeAsString();
  Message again;
  require(again.ParseFromString(written));
  require(again.ByteSizeLong() == written.size());
  return true;
}

std::string through_a_ring(const std::string& payload) {
  constexpr std::size_t kRingBytes = 1U << 17;  // larger than any input (see max_len)
  static const auto memory = std::make_unique<std::byte[]>(kRingBytes);
  static std::atomic<std::uint64_t> head = 0;
  static std::atomic<std::uint64_t> tail = 0;
  const std::span<std::byte> ring(memory.get(), kRingBytes);
  kvern::RingProducer producer(ring, head, tail);
  kvern::RingConsumer consumer(ring, head, tail);
  std::string received;
  require(producer.push(std::as_bytes(std::span(payload))).is_ok());
  require(consumer.pop(&received).is_ok());
  require(consumer.empty());
  return received;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace wire = kvern::wire;
  const std::string bytes = through_a_ring(std::string(reinterpret_cast<const char*>(data), size));
  require(bytes.size() == size);
  if (const auto context = kvern::TraceContext::parse(bytes)) {
    require(kvern::TraceContext::parse(context->traceparent()).has_value());
  }
  parse<wire::HotRequest>(bytes);
  parse<wire::ControlRequest>(bytes);
  parse<wire::Admit>(bytes);
  wire::HotReply hot;
  if (hot.ParseFromString(bytes)) static_cast<void>(kvern::to_status(hot.status()));
  wire::ControlReply control;
  if (control.ParseFromString(bytes)) static_cast<void>(kvern::to_status(control.status()));
  parse<wire::Admitted>(bytes);
  parse<wire::CompactManifest>(bytes);
  if (const auto handle = kvern::CompactHandle::parse(bytes)) {
    require(handle->text == bytes && handle->slots <= handle->prompt_tokens);
  }
  return 0;
}
