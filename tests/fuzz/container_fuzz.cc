#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include "base/keys.h"
#include "kernels/container.h"

namespace {

using namespace kvern;

/// Reads every byte that it is given and insists that rows lie inside the shard.
class CheckingSink final : public RowSink {
 public:
  explicit CheckingSink(const ShardShape& shape) : shape_(shape) {}
  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    if (layer >= shape_.layers || head >= shape_.heads || count == 0 || token + count > shape_.tokens) std::abort();
    sum_ ^= checksum64(rows, count * shape_.row_bytes(part));
  }
  std::uint32_t preferred_rows() const override { return 16; }

 private:
  ShardShape shape_;
  std::uint64_t sum_ = 0;
};

/// Gives the bytes a header checksum that fits, so that the fuzzer gets past it.
void seal(std::vector<std::byte>& bytes) {
  std::uint32_t header_bytes = 0;
  if (bytes.size() < 16) return;
  std::memcpy(&header_bytes, bytes.data() + 12, sizeof header_bytes);
  if (header_bytes < 24 || header_bytes > bytes.size()) return;
  const std::uint64_t checksum = checksum64(bytes.data(), header_bytes - sizeof checksum);
  std::memcpy(bytes.data() + header_bytes - sizeof checksum, &checksum, sizeof checksum);
}

void read(std::span<const std::byte> bytes) {
  const auto reader = ContainerReader::parse(bytes);
  if (!reader) return;
  const ShardShape& shape = reader->info().shape;
  CheckingSink sink(shape);
  const TokenRange tokens{shape.tokens / 3, shape.tokens};
  const Status status = reader->decode(0, ~0U, 0, ~0U, tokens, sink);
  if (!status && status.code() != Code::kCorrupt) std::abort();
  // Decoders alone, on sections whose checksum does not hold.
  for (const SectionInfo& section : reader->sections()) {
    const Status decoded = reader->codec().decode(shape, section.extent, bytes.subspan(section.offset, section.bytes),
                                                  tokens, 0, shape.heads, sink);
    if (!decoded && decoded.code() != Code::kCorrupt) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::byte> bytes(size);
  if (size > 0) std::memcpy(bytes.data(), data, size);
  read(bytes);
  seal(bytes);
  read(bytes);
  return 0;
}
