// A ring whose peer does what it likes: pushes and pops of an honest side, mixed with writes of a hostile one to any
// byte, to head and to tail. Before the first hostile write the ring must be a queue; after it nothing may be read
// outside the ring, delivered without its checksum, or reported twice.

#include <fuzzer/FuzzedDataProvider.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <string>

#include "transport/ring.h"

namespace {

using kvern::Code;

void require(bool condition) {
  if (!condition) std::abort();
}

void run(FuzzedDataProvider& input) {
  const std::size_t size = std::size_t{1} << input.ConsumeIntegralInRange(4, 10);
  const std::uint64_t start = input.ConsumeIntegral<std::uint64_t>() & ~std::uint64_t{7};
  const auto memory = std::make_unique<std::byte[]>(size);  // of exactly that size, so that ASan sees every overrun
  const std::span<std::byte> ring(memory.get(), size);
  std::atomic<std::uint64_t> head = start;
  std::atomic<std::uint64_t> tail = start;
  kvern::RingProducer producer(ring, head, tail);
  kvern::RingConsumer consumer(ring, head, tail);
  std::deque<std::string> model;
  bool hostile = false;
  bool push_broken = false;
  bool pop_broken = false;
  while (input.remaining_bytes() > 0) {
    switch (input.ConsumeIntegralInRange(0, 4)) {
      case 0: {
        const std::string payload = input.ConsumeRandomLengthString(size + 1);
        const Code code = producer.push(std::as_bytes(std::span(payload))).code();
        if (code == Code::kOk) model.push_back(payload);
        require(push_broken == (code == Code::kUnavailable));
        push_broken = push_broken || code == Code::kCorrupt;
        break;
      }
      case 1: {
        std::string payload;
        const Code code = consumer.pop(&payload).code();
        if (!hostile) {
          require(code == (model.empty() ? Code::kNotFound : Code::kOk));
          require(model.empty() || payload == model.front());
        }
        if (code == Code::kOk) require(payload.size() + 8 <= size);
        if (code == Code::kOk && !model.empty()) model.pop_front();
        require(pop_broken == (code == Code::kUnavailable));
        pop_broken = pop_broken || code == Code::kCorrupt;
        break;
      }
      case 2:
        hostile = true;
        head = input.ConsumeBool() ? start + input.ConsumeIntegralInRange<std::uint64_t>(0, 2 * size)
                                   : input.ConsumeIntegral<std::uint64_t>();
        break;
      case 3:
        hostile = true;
        tail = input.ConsumeBool() ? start + input.ConsumeIntegralInRange<std::uint64_t>(0, 2 * size)
                                   : input.ConsumeIntegral<std::uint64_t>();
        break;
      case 4:
        hostile = true;
        ring[input.ConsumeIntegralInRange<std::size_t>(0, size - 1)] =
            static_cast<std::byte>(input.ConsumeIntegral<std::uint8_t>());
        break;
    }
    require(!pop_broken || consumer.empty());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider input(data, size);
  run(input);
  return 0;
}
