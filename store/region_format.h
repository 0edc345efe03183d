#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "base/keys.h"
#include "store/block_io.h"

namespace kvern {

/// What the NVMe log writes beside the objects (docs/format.md): a superblock at the start of each file, a header at
/// the start of each region, a record in front of the data of each batch, a footer at the end of a region that is
/// closed. Little-endian; everything under XXH3-64. Decoding is safe on any bytes.

inline constexpr std::uint32_t kLogVersion = 1;

using LogId = std::array<std::uint8_t, 16>;

struct Superblock {
  LogId log{};                     ///< drawn when the log is made: what names another one is not of this log
  std::uint64_t region_bytes = 0;  ///< of the regions that the file is cut into
};

struct RegionHeader {
  LogId log{};
  std::uint32_t region = 0;           ///< its number in the file
  std::uint64_t sequence = 0;         ///< grows by every region that is opened
  std::uint64_t oldest_sequence = 0;  ///< what has a lower one was reclaimed, whatever it says of itself
  std::uint64_t salt = 0;             ///< random: tables with another one are of a former life of the region
};

/// The head of a record or a footer.
struct TableHeader {
  std::uint64_t sequence = 0;  ///< of the region
  std::uint64_t salt = 0;      ///< of the region
  std::uint64_t next = 0;      ///< where the next record will lie, from the start of the region
  std::uint64_t previous = 0;  ///< checksum of the record before, or of the region's header: a chain that nothing of a
                               ///< former life of these bytes can continue
  std::uint32_t table_bytes = 0;
  std::uint32_t batch = 0;  ///< of a record: its number in the region; of a footer: how many there are
  std::uint64_t table_checksum = 0;
  std::uint64_t checksum = 0;  ///< of all fields above
};

/// One line of a table. Lines take effect in their order.
struct LogEntry {
  enum class Kind : std::uint8_t { kObject = 1, kErase = 2, kEraseNamespace = 3, kEraseAll = 4 };
  Kind kind = Kind::kObject;
  std::uint16_t group = 0;
  NamespaceId namespace_id;
  std::vector<BlockHash> blocks;  ///< of an object; the last block of the key that is erased
  std::uint32_t page = 0;         ///< of an object: where it lies in the region, in kBlockAlignment
  std::uint32_t pages = 0;        ///< its length
  std::uint64_t first_page_checksum = 0;
};

/// Bytes that a table needs in front of or behind its header, whole blocks.
std::uint64_t table_block_bytes(std::uint64_t table_bytes);
std::uint64_t entry_bytes(const LogEntry& entry);
void append_entry(std::vector<std::byte>& table, const LogEntry& entry);
/// Calls function with every entry; false, perhaps after some calls, when the bytes are not a table.
bool read_table(std::span<const std::byte> table, const std::function<void(const LogEntry&)>& function);

enum class Decoded { kOk, kNothing, kOtherVersion };

/// block.size() is kBlockAlignment.
void encode(const Superblock& superblock, std::span<std::byte> block);
Decoded decode(std::span<const std::byte> block, Superblock& superblock);
/// Returns the checksum, which the first record of the region continues.
std::uint64_t encode(const RegionHeader& header, std::span<std::byte> block);
/// The same checksum; nullopt when the block is not a header.
std::optional<std::uint64_t> decode(std::span<const std::byte> block, RegionHeader& header);

/// Fills table_bytes and both checksums, and block, whose size is table_block_bytes(table.size()).
void encode_record(TableHeader& header, std::span<const std::byte> table, std::span<std::byte> block);
void encode_footer(TableHeader& header, std::span<const std::byte> table, std::span<std::byte> block);
/// The head alone, at the start (record) or the end (footer) of bytes.
std::optional<TableHeader> decode_record_header(std::span<const std::byte> bytes);
std::optional<TableHeader> decode_footer_header(std::span<const std::byte> bytes);
/// The table behind (record) or in front of (footer) the header; nullopt when bytes are too few or not intact.
std::optional<std::span<const std::byte>> record_table(const TableHeader& header, std::span<const std::byte> bytes);
std::optional<std::span<const std::byte>> footer_table(const TableHeader& header, std::span<const std::byte> bytes);

/// Whether the first two blocks of a file are those of a log, perhaps a damaged one or one of another version.
bool looks_like_log(std::span<const std::byte> content);

}  // namespace kvern
