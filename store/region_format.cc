#include "store/region_format.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <type_traits>

namespace kvern {
namespace {

constexpr std::string_view kSuperblockMagic = "KVERNLOG";
constexpr std::string_view kRegionMagic = "KVERNREG";
constexpr std::string_view kRecordMagic = "KVERNREC";
constexpr std::string_view kFooterMagic = "KVERNFTR";
constexpr std::size_t kMagicBytes = 8;
constexpr std::size_t kTableHeaderBytes = 72;

class Writer {
 public:
  explicit Writer(std::span<std::byte> out) : out_(out) {}
  void bytes(const void* data, std::size_t count) {
    std::memcpy(out_.data() + at_, data, count);
    at_ += count;
  }
  template <typename T>
  void number(T value) {
    static_assert(std::is_integral_v<T>);
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      out_[at_++] = static_cast<std::byte>(static_cast<std::uint64_t>(value) >> (8 * i));
    }
  }
  /// Checksum over everything so far, appended.
  std::uint64_t seal() {
    const std::uint64_t checksum = checksum64(out_.data(), at_);
    number(checksum);
    return checksum;
  }
  std::size_t at() const { return at_; }

 private:
  std::span<std::byte> out_;
  std::size_t at_ = 0;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> in) : in_(in) {}
  bool has(std::size_t count) const { return count <= in_.size() - at_; }
  bool done() const { return at_ == in_.size(); }
  const std::byte* take(std::size_t count) {
    const std::byte* data = in_.data() + at_;
    at_ += count;
    return data;
  }
  template <typename T>
  T number() {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i)
      value |= std::uint64_t{std::to_integer<std::uint8_t>(in_[at_++])} << (8 * i);
    return static_cast<T>(value);
  }
  bool magic(std::string_view text) {
    return has(kMagicBytes) && std::memcmp(take(kMagicBytes), text.data(), kMagicBytes) == 0;
  }
  /// Whether the number here is the checksum over everything before.
  bool sealed(std::uint64_t& checksum) {
    const std::uint64_t expected = checksum64(in_.data(), at_);
    checksum = number<std::uint64_t>();
    return checksum == expected;
  }

 private:
  std::span<const std::byte> in_;
  std::size_t at_ = 0;
};

void clear_from(std::span<std::byte> block, std::size_t at) { std::ranges::fill(block.subspan(at), std::byte{0}); }

void encode_table_header(TableHeader& header, std::string_view magic, std::span<const std::byte> table,
                         std::span<std::byte> out) {
  header.table_bytes = static_cast<std::uint32_t>(table.size());
  header.table_checksum = checksum64(table.data(), table.size());
  Writer writer(out);
  writer.bytes(magic.data(), kMagicBytes);
  writer.number(header.sequence);
  writer.number(header.salt);
  writer.number(header.next);
  writer.number(header.previous);
  writer.number(header.table_bytes);
  writer.number(header.batch);
  writer.number(header.table_checksum);
  writer.number(std::uint64_t{0});
  header.checksum = writer.seal();
}

std::optional<TableHeader> decode_table_header(std::span<const std::byte> bytes, std::string_view magic) {
  Reader reader(bytes);
  if (!reader.magic(magic)) return std::nullopt;
  TableHeader header;
  header.sequence = reader.number<std::uint64_t>();
  header.salt = reader.number<std::uint64_t>();
  header.next = reader.number<std::uint64_t>();
  header.previous = reader.number<std::uint64_t>();
  header.table_bytes = reader.number<std::uint32_t>();
  header.batch = reader.number<std::uint32_t>();
  header.table_checksum = reader.number<std::uint64_t>();
  reader.number<std::uint64_t>();
  if (!reader.sealed(header.checksum)) return std::nullopt;
  return header;
}

std::optional<std::span<const std::byte>> intact(const TableHeader& header, std::span<const std::byte> table) {
  if (checksum64(table.data(), table.size()) != header.table_checksum) return std::nullopt;
  return table;
}

}  // namespace

std::uint64_t table_block_bytes(std::uint64_t table_bytes) {
  return (kTableHeaderBytes + table_bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
}

std::uint64_t entry_bytes(const LogEntry& entry) {
  std::uint64_t bytes = 1 + 2 + 16 + 2;
  for (const auto& block : entry.blocks) bytes += 1 + block.size();
  return entry.kind == LogEntry::Kind::kObject ? bytes + 16 : bytes;
}

void append_entry(std::vector<std::byte>& table, const LogEntry& entry) {
  const std::size_t at = table.size();
  table.resize(at + entry_bytes(entry));
  Writer writer{std::span(table).subspan(at)};
  writer.number(static_cast<std::uint8_t>(entry.kind));
  writer.number(entry.group);
  writer.bytes(entry.namespace_id.bytes.data(), entry.namespace_id.bytes.size());
  writer.number(static_cast<std::uint16_t>(entry.blocks.size()));
  if (entry.kind == LogEntry::Kind::kObject) {
    writer.number(entry.page);
    writer.number(entry.pages);
    writer.number(entry.first_page_checksum);
  }
  for (const auto& block : entry.blocks) {
    writer.number(static_cast<std::uint8_t>(block.size()));
    writer.bytes(block.bytes().data(), block.size());
  }
}

bool read_table(std::span<const std::byte> table, const std::function<void(const LogEntry&)>& function) {
  Reader reader(table);
  LogEntry entry;
  while (!reader.done()) {
    if (!reader.has(1 + 2 + 16 + 2)) return false;
    const auto kind = reader.number<std::uint8_t>();
    if (kind < 1 || kind > 4) return false;
    entry.kind = static_cast<LogEntry::Kind>(kind);
    entry.group = reader.number<std::uint16_t>();
    std::memcpy(entry.namespace_id.bytes.data(), reader.take(16), 16);
    const std::size_t blocks = reader.number<std::uint16_t>();
    const bool named = entry.kind == LogEntry::Kind::kObject || entry.kind == LogEntry::Kind::kErase;
    if (named != (blocks > 0)) return false;
    if (entry.kind == LogEntry::Kind::kObject) {
      if (!reader.has(16)) return false;
      entry.page = reader.number<std::uint32_t>();
      entry.pages = reader.number<std::uint32_t>();
      entry.first_page_checksum = reader.number<std::uint64_t>();
    }
    entry.blocks.clear();
    for (std::size_t i = 0; i < blocks; ++i) {
      if (!reader.has(1)) return false;
      const std::size_t bytes = reader.number<std::uint8_t>();
      if (bytes == 0 || bytes > BlockHash::kMaxBytes || !reader.has(bytes)) return false;
      entry.blocks.emplace_back(
          std::span<const std::uint8_t>(reinterpret_cast<const std::uint8_t*>(reader.take(bytes)), bytes));
    }
    function(entry);
  }
  return true;
}

void encode(const Superblock& superblock, std::span<std::byte> block) {
  Writer writer(block);
  writer.bytes(kSuperblockMagic.data(), kMagicBytes);
  writer.number(kLogVersion);
  writer.number(std::uint32_t{0});
  writer.bytes(superblock.log.data(), superblock.log.size());
  writer.number(superblock.region_bytes);
  writer.seal();
  clear_from(block, writer.at());
}

Decoded decode(std::span<const std::byte> block, Superblock& superblock) {
  Reader reader(block);
  if (!reader.magic(kSuperblockMagic)) return Decoded::kNothing;
  // The version keeps its place for good; what follows it need not.
  if (reader.number<std::uint32_t>() != kLogVersion) return Decoded::kOtherVersion;
  reader.number<std::uint32_t>();
  std::memcpy(superblock.log.data(), reader.take(superblock.log.size()), superblock.log.size());
  superblock.region_bytes = reader.number<std::uint64_t>();
  std::uint64_t checksum = 0;
  return reader.sealed(checksum) ? Decoded::kOk : Decoded::kNothing;
}

std::uint64_t encode(const RegionHeader& header, std::span<std::byte> block) {
  Writer writer(block);
  writer.bytes(kRegionMagic.data(), kMagicBytes);
  writer.number(header.region);
  writer.number(std::uint32_t{0});
  writer.bytes(header.log.data(), header.log.size());
  writer.number(header.sequence);
  writer.number(header.oldest_sequence);
  writer.number(header.salt);
  const std::uint64_t checksum = writer.seal();
  clear_from(block, writer.at());
  return checksum;
}

std::optional<std::uint64_t> decode(std::span<const std::byte> block, RegionHeader& header) {
  Reader reader(block);
  if (!reader.magic(kRegionMagic)) return std::nullopt;
  header.region = reader.number<std::uint32_t>();
  reader.number<std::uint32_t>();
  std::memcpy(header.log.data(), reader.take(header.log.size()), header.log.size());
  header.sequence = reader.number<std::uint64_t>();
  header.oldest_sequence = reader.number<std::uint64_t>();
  header.salt = reader.number<std::uint64_t>();
  std::uint64_t checksum = 0;
  if (!reader.sealed(checksum)) return std::nullopt;
  return checksum;
}

void encode_record(TableHeader& header, std::span<const std::byte> table, std::span<std::byte> block) {
  encode_table_header(header, kRecordMagic, table, block.first(kTableHeaderBytes));
  std::ranges::copy(table, block.begin() + static_cast<std::ptrdiff_t>(kTableHeaderBytes));
  clear_from(block, kTableHeaderBytes + table.size());
}

void encode_footer(TableHeader& header, std::span<const std::byte> table, std::span<std::byte> block) {
  const std::size_t padding = block.size() - kTableHeaderBytes - table.size();
  std::ranges::fill(block.first(padding), std::byte{0});
  std::ranges::copy(table, block.begin() + static_cast<std::ptrdiff_t>(padding));
  encode_table_header(header, kFooterMagic, table, block.last(kTableHeaderBytes));
}

std::optional<TableHeader> decode_record_header(std::span<const std::byte> bytes) {
  return bytes.size() < kTableHeaderBytes ? std::nullopt
                                          : decode_table_header(bytes.first(kTableHeaderBytes), kRecordMagic);
}

std::optional<TableHeader> decode_footer_header(std::span<const std::byte> bytes) {
  return bytes.size() < kTableHeaderBytes ? std::nullopt
                                          : decode_table_header(bytes.last(kTableHeaderBytes), kFooterMagic);
}

std::optional<std::span<const std::byte>> record_table(const TableHeader& header, std::span<const std::byte> bytes) {
  if (bytes.size() < kTableHeaderBytes + std::size_t{header.table_bytes}) return std::nullopt;
  return intact(header, bytes.subspan(kTableHeaderBytes, header.table_bytes));
}

std::optional<std::span<const std::byte>> footer_table(const TableHeader& header, std::span<const std::byte> bytes) {
  if (bytes.size() < kTableHeaderBytes + std::size_t{header.table_bytes}) return std::nullopt;
  return intact(header, bytes.last(kTableHeaderBytes + header.table_bytes).first(header.table_bytes));
}

bool looks_like_log(std::span<const std::byte> content) {
  const auto begins = [&](std::size_t at, std::string_view magic) {
    return content.size() >= at + kMagicBytes && std::memcmp(content.data() + at, magic.data(), kMagicBytes) == 0;
  };
  return begins(0, kSuperblockMagic) || begins(kBlockAlignment, kRegionMagic);
}

}  // namespace kvern
