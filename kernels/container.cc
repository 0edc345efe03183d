#include "kernels/container.h"

#include "kernels/container_layout.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <new>

#include "base/parallel.h"
#include "kernels/chain.h"
#include "kernels/checksum.h"
#include "kernels/copy.h"
#include "kernels/demote.h"
#include "kernels/scratch.h"

namespace kvern {
namespace {

static_assert(std::endian::native == std::endian::little, "fields are copied as they lie in memory");

constexpr std::string_view kMagic = "KVERNBOX";
constexpr std::uint32_t kLayerSlotsVersion = 2;  ///< the first one that can hold layer_slots, and has them
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kFixedBytes = 112;
constexpr std::size_t kSectionEntryBytes = 48;
constexpr std::size_t kChecksumBytes = 8;
/// Memory is read and written in turns of this size, a page: large enough for the prefetchers, small enough for the
/// buffers between core and memory to have something of both.
constexpr std::size_t kPieceBytes = 4096;
constexpr std::uint8_t kHasKey = 1;
constexpr std::uint8_t kHasValue = 2;

constexpr std::size_t align_up(std::size_t value, std::size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

std::size_t header_size(const ContainerInfo& info, std::string_view spec, std::size_t sections) {
  std::size_t bytes = kFixedBytes + spec.size();
  for (const BlockHash& hash : info.block_hashes) bytes += 1 + hash.size();
  bytes += info.layer_slots.size() * sizeof(std::uint32_t);
  return align_up(align_up(bytes, 8) + sections * kSectionEntryBytes + kChecksumBytes, kAlignment);
}

/// What must hold of the description of a shard whether it is written or read.
Status check_info(const ContainerInfo& info) {
  const ShardShape& shape = info.shape;
  if (Status status = shape.validate(); !status) return status;
  if (std::uint64_t{shape.layer_begin} + shape.layers > info.group_layers) {
    return {Code::kInvalid, "the shard's layers lie outside the group's " + std::to_string(info.group_layers)};
  }
  if (std::uint64_t{shape.head_begin} + shape.heads > info.model_heads) {
    return {Code::kInvalid, "the shard's heads lie outside the model's " + std::to_string(info.model_heads)};
  }
  if (info.block_tokens == 0 || shape.tokens % info.block_tokens != 0 ||
      shape.tokens / info.block_tokens != info.block_hashes.size()) {
    return {Code::kInvalid, std::to_string(info.block_hashes.size()) + " blocks of " +
                                std::to_string(info.block_tokens) + " tokens are not the shard's " +
                                std::to_string(shape.tokens) + " tokens"};
  }
  if (std::ranges::any_of(info.block_hashes, [](const BlockHash& hash) { return hash.size() == 0; })) {
    return {Code::kInvalid, "a block hash is empty"};
  }
  if (!(info.block_hashes.back() == info.key.last_block)) {
    return {Code::kInvalid, "the last block hash is not the one that names the chunk"};
  }
  if (!info.layer_slots.empty() && info.layer_slots.size() != info.group_layers) {
    return {Code::kInvalid, std::to_string(info.layer_slots.size()) + " layers keep slots, of the group's " +
                                std::to_string(info.group_layers)};
  }
  const auto no_pages = [&](std::uint32_t slots) { return slots == 0 || slots % info.block_tokens != 0; };
  if (std::ranges::any_of(info.layer_slots, no_pages)) {
    return {Code::kInvalid, "a layer's slots are no whole blocks"};
  }
  return Status::ok();
}

/// The shape as codecs see it when they encode and decode.
ShardShape placed(const ContainerInfo& info) {
  ShardShape shape = info.shape;
  shape.position = info.position;
  shape.exact_tail = info.exact_tail;
  return shape;
}

class FieldWriter {
 public:
  explicit FieldWriter(std::span<std::byte> out) : out_(out) {}
  template <typename T>
  void put(T value) {
    put_bytes(&value, sizeof value);
  }
  void put_bytes(const void* bytes, std::size_t count) {
    if (count > 0) std::memcpy(out_.data() + at_, bytes, count);
    at_ += count;
  }
  void pad_to(std::size_t position) {
    std::memset(out_.data() + at_, 0, position - at_);
    at_ = position;
  }
  std::size_t position() const { return at_; }

 private:
  std::span<std::byte> out_;
  std::size_t at_ = 0;
};

/// Reads fields up to the end of its bytes; past it everything is zero and good() is false.
class FieldReader {
 public:
  explicit FieldReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  template <typename T>
  T get() {
    T value{};
    const auto field = get_bytes(sizeof value);
    if (field.size() == sizeof value) std::memcpy(&value, field.data(), sizeof value);
    return value;
  }
  std::span<const std::byte> get_bytes(std::size_t count) {
    if (!good_ || count > bytes_.size() - at_) {
      good_ = false;
      return {};
    }
    at_ += count;
    return bytes_.subspan(at_ - count, count);
  }
  void skip_to(std::size_t position) { get_bytes(position - at_); }
  bool good() const { return good_; }
  std::size_t position() const { return at_; }
  std::size_t left() const { return bytes_.size() - at_; }

 private:
  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  bool good_ = true;
};

/// From the namespace to what stands before the section table. Says what is wrong with it, null: nothing.
const char* read_description(FieldReader& fields, std::uint32_t version, ContainerInfo& info,
                             std::uint32_t& section_count) {
  ShardShape& shape = info.shape;
  const auto namespace_bytes = fields.get_bytes(info.key.namespace_id.bytes.size());
  info.key.group = fields.get<std::uint16_t>();
  shape.dtype = static_cast<DType>(fields.get<std::uint8_t>());
  fields.get<std::uint8_t>();
  for (std::uint32_t* field :
       {&shape.layer_begin, &shape.layers, &shape.head_begin, &shape.heads, &shape.tokens, &shape.key_dim,
        &shape.value_dim, &info.block_tokens, &info.group_layers, &info.model_heads, &info.lossy_generations}) {
    *field = fields.get<std::uint32_t>();
  }
  info.position = fields.get<std::uint64_t>();
  const auto block_count = fields.get<std::uint32_t>();
  section_count = fields.get<std::uint32_t>();
  const auto spec_bytes = fields.get<std::uint32_t>();
  info.previous_tag = fields.get<std::uint32_t>();
  if (!fields.good()) return "its header is too short";
  std::ranges::copy(namespace_bytes, std::as_writable_bytes(std::span(info.key.namespace_id.bytes)).begin());
  const auto spec = fields.get_bytes(spec_bytes);
  info.codec_spec.assign(reinterpret_cast<const char*>(spec.data()), spec.size());
  if (block_count > shape.tokens || block_count > fields.left()) return "its block hashes do not fit";
  info.block_hashes.reserve(block_count);
  for (std::uint32_t i = 0; i < block_count; ++i) {
    const auto hash = fields.get_bytes(fields.get<std::uint8_t>());
    const auto block = BlockHash::from_bytes({reinterpret_cast<const std::uint8_t*>(hash.data()), hash.size()});
    if (!block) return "a block hash is empty, too long or cut off";
    info.block_hashes.push_back(*block);
  }
  if (info.block_hashes.empty()) return "it has no blocks";
  info.key.last_block = info.block_hashes.back();
  if (version < kLayerSlotsVersion) return nullptr;
  if (info.group_layers == 0 || info.group_layers > fields.left() / sizeof(std::uint32_t)) {
    return "its layers' slots do not fit";
  }
  info.layer_slots.resize(info.group_layers);
  for (std::uint32_t& slots : info.layer_slots) slots = fields.get<std::uint32_t>();
  return nullptr;
}

/// The planes of a section in the order layer, part, head.
template <typename Visit>
void for_each_plane(const SectionExtent& extent, Visit visit) {
  for (std::uint32_t layer = extent.layer; layer < extent.layer + extent.layers; ++layer) {
    for (const Part part : {Part::kKey, Part::kValue}) {
      if (part == Part::kKey ? !extent.has_key : !extent.has_value) continue;
      for (std::uint32_t head = extent.head; head < extent.head + extent.heads; ++head) visit(layer, part, head);
    }
  }
}

std::size_t plane_index(const ShardShape& shape, std::uint32_t layer, Part part, std::uint32_t head) {
  return (std::size_t{2} * layer + static_cast<std::size_t>(part)) * shape.heads + head;
}

std::string describe(const SectionExtent& extent) {
  const char* parts = extent.has_key ? (extent.has_value ? "K and V" : "K") : "V";
  std::string text = "layer " + std::to_string(extent.layer);
  if (extent.layers > 1) text += " to " + std::to_string(extent.layer + extent.layers - 1);
  text += std::string(", ") + parts + ", head " + std::to_string(extent.head);
  if (extent.heads > 1) text += " to " + std::to_string(extent.head + extent.heads - 1);
  return text;
}

/// Compares a plane's checksum with the one that the writer announced.
class PlaneCheck {
 public:
  PlaneCheck(const ShardShape& shape, std::span<const std::uint64_t> announced)
      : shape_(shape), announced_(announced) {}
  Status operator()(std::uint32_t layer, Part part, std::uint32_t head, std::uint64_t seen) const {
    if (announced_.empty() || seen == announced_[plane_index(shape_, layer, part, head)]) return Status::ok();
    const SectionExtent plane{layer, 1, head, 1, part == Part::kKey, part == Part::kValue};
    return {Code::kCorrupt, describe(plane) + ": the bytes differ from those that the writer announced"};
  }

 private:
  const ShardShape& shape_;
  std::span<const std::uint64_t> announced_;
};

/// Takes the planes of a section into memory that nobody else can write, in pieces, and verifies them. Encoding reads
/// its input more than once: what was verified must be what is encoded.
class Intake {
 public:
  Intake(const ShardShape& shape, std::span<const std::byte> canonical, PlaneCheck check)
      : shape_(shape), canonical_(canonical), check_(check) {}

  void start(const SectionExtent& extent, std::byte* to) {
    planes_.clear();
    for_each_plane(extent, [&](std::uint32_t layer, Part part, std::uint32_t head) {
      planes_.push_back({layer, part, head});
    });
    to_ = to;
    next_ = 0;
    begin_plane();
  }
  /// Takes about that many bytes more.
  void advance(std::size_t bytes) {
    while (bytes > 0 && next_ < planes_.size()) {
      const std::size_t piece = std::min(bytes, left_.size());
      checksum_.copy(to_, left_.data(), piece);
      to_ += piece;
      bytes -= piece;
      left_ = left_.subspan(piece);
      if (!left_.empty()) continue;
      const Plane& plane = planes_[next_++];
      if (status_) status_ = check_(plane.layer, plane.part, plane.head, checksum_.digest());
      begin_plane();
    }
  }
  /// Takes the rest of the section.
  Status finish() {
    advance(std::numeric_limits<std::size_t>::max());
    return status_;
  }

 private:
  struct Plane {
    std::uint32_t layer;
    Part part;
    std::uint32_t head;
  };
  void begin_plane() {
    checksum_ = Checksum64();
    if (next_ == planes_.size()) return;
    const Plane& plane = planes_[next_];
    left_ =
        canonical_.subspan(shape_.plane_offset(plane.layer, plane.part, plane.head), shape_.plane_bytes(plane.part));
  }

  const ShardShape& shape_;
  std::span<const std::byte> canonical_;
  PlaneCheck check_;
  std::vector<Plane> planes_;
  std::size_t next_ = 0;
  std::span<const std::byte> left_;
  Checksum64 checksum_;
  std::byte* to_ = nullptr;
  Status status_;
};

/// Where sections go: one behind the other, aligned, the gaps filled with zeros.
class SectionWriter {
 public:
  SectionWriter(std::span<std::byte> out, std::size_t offset, std::vector<SectionInfo>& sections)
      : out_(out), offset_(offset), sections_(sections) {}
  std::byte* next() const { return out_.data() + offset_; }
  std::size_t offset() const { return offset_; }
  void finish(const SectionExtent& extent, std::size_t bytes, std::uint64_t checksum) {
    sections_.push_back({extent, offset_, bytes, checksum});
    const std::size_t end = offset_ + bytes;
    offset_ = align_up(end, kAlignment);
    std::memset(out_.data() + end, 0, offset_ - end);
  }

 private:
  std::span<std::byte> out_;
  std::size_t offset_;
  std::vector<SectionInfo>& sections_;
};

Status copy_sections(const ShardShape& shape, const std::vector<SectionPlan>& plan,
                     std::span<const std::byte> canonical, const PlaneCheck& check, SectionWriter& writer) {
  Status status;
  for (const SectionPlan& section : plan) {
    for_each_plane(section.extent, [&](std::uint32_t layer, Part part, std::uint32_t head) {
      const std::size_t bytes = shape.plane_bytes(part);
      const std::uint64_t checksum =
          stream_copy_checksum(writer.next(), canonical.data() + shape.plane_offset(layer, part, head), bytes);
      if (status) status = check(layer, part, head, checksum);
      writer.finish(section.extent, bytes, checksum);
    });
    if (!status) break;
  }
  return status;
}

template <typename Size>
std::size_t largest(const std::vector<SectionPlan>& plan, Size size) {
  std::size_t bytes = 0;
  for (const SectionPlan& section : plan) bytes = std::max(bytes, size(section));
  return bytes;
}

Status encode_sections(const Codec& codec, const ShardShape& shape, const std::vector<SectionPlan>& plan,
                       std::span<const std::byte> canonical, const PlaneCheck& check, SectionWriter& writer) {
  // Both stay in the L2 cache.
  const Scratch planes(largest(plan, [&](const auto& section) { return section.extent.raw_bytes(shape); }));
  const Scratch encoded(largest(plan, [](const auto& section) { return section.max_bytes; }));
  Intake intake(shape, canonical, check);
  intake.start(plan.front().extent, planes.data());
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const SectionExtent& extent = plan[i].extent;
    if (Status status = intake.finish(); !status) return status;
    const auto size =
        codec.encode(shape, extent, planes.first(extent.raw_bytes(shape)), encoded.first(plan[i].max_bytes));
    if (!size) return {size.error().code(), describe(extent) + ": " + size.error().message()};
    // The next section is read while this one is written: memory does both at once.
    if (i + 1 < plan.size()) intake.start(plan[i + 1].extent, planes.data());
    Checksum64 checksum;
    for (std::size_t at = 0; at < *size;) {
      const std::size_t piece = std::min(kPieceBytes, *size - at);
      checksum.stream_copy(writer.next() + at, encoded.data() + at, piece);
      at += piece;
      if (i + 1 < plan.size()) intake.advance(2 * kPieceBytes);
    }
    writer.finish(extent, *size, checksum.digest());
  }
  return Status::ok();
}

void write_header(const ContainerInfo& info, std::string_view spec, const std::vector<SectionInfo>& sections,
                  std::size_t container_bytes, std::span<std::byte> out) {
  const ShardShape& shape = info.shape;
  FieldWriter fields(out);
  fields.put_bytes(kMagic.data(), kMagic.size());
  fields.put(info.layer_slots.empty() ? std::uint32_t{1} : kLayerSlotsVersion);
  fields.put(static_cast<std::uint32_t>(out.size()));
  fields.put(static_cast<std::uint64_t>(container_bytes));
  fields.put_bytes(info.key.namespace_id.bytes.data(), info.key.namespace_id.bytes.size());
  fields.put(info.key.group);
  fields.put(static_cast<std::uint8_t>(shape.dtype));
  fields.put(std::uint8_t{0});
  for (const std::uint32_t field :
       {shape.layer_begin, shape.layers, shape.head_begin, shape.heads, shape.tokens, shape.key_dim, shape.value_dim,
        info.block_tokens, info.group_layers, info.model_heads, info.lossy_generations}) {
    fields.put(field);
  }
  fields.put(info.position);
  fields.put(static_cast<std::uint32_t>(info.block_hashes.size()));
  fields.put(static_cast<std::uint32_t>(sections.size()));
  fields.put(static_cast<std::uint32_t>(spec.size()));
  fields.put(info.previous_tag);
  fields.put_bytes(spec.data(), spec.size());
  for (const BlockHash& hash : info.block_hashes) {
    fields.put(static_cast<std::uint8_t>(hash.size()));
    fields.put_bytes(hash.bytes().data(), hash.size());
  }
  for (const std::uint32_t slots : info.layer_slots) fields.put(slots);
  fields.pad_to(align_up(fields.position(), 8));
  for (const SectionInfo& section : sections) {
    fields.put(section.offset);
    fields.put(section.bytes);
    fields.put(section.checksum);
    const SectionExtent& extent = section.extent;
    for (const std::uint32_t field : {extent.layer, extent.layers, extent.head, extent.heads}) fields.put(field);
    fields.put(static_cast<std::uint64_t>((extent.has_key ? kHasKey : 0) | (extent.has_value ? kHasValue : 0)));
  }
  fields.pad_to(out.size() - kChecksumBytes);
  fields.put(fast_checksum64(out.data(), out.size() - kChecksumBytes));
}

/// Runs body(i) for each i, pieces of neighbours on the executor's threads: sections are small beside a task.
void in_pieces(Executor* executor, std::size_t count, const std::function<void(std::size_t)>& body) {
  constexpr std::size_t kPieces = 8;
  const std::size_t piece = (count + kPieces - 1) / kPieces;
  parallel_for(executor, executor == nullptr ? 1 : kPieces, [&](std::size_t at) {
    const std::size_t begin = executor == nullptr ? 0 : at * piece;
    const std::size_t end = executor == nullptr ? count : std::min(count, begin + piece);
    for (std::size_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace

std::size_t block_hashes_offset(std::string_view codec_spec) { return kFixedBytes + codec_spec.size(); }

std::size_t plane_count(const ShardShape& shape) { return std::size_t{2} * shape.layers * shape.heads; }

std::size_t container_max_bytes(const Codec& codec, const ContainerInfo& info) {
  if (!codec.accepts(info.shape)) return 0;
  const auto plan = codec.plan(info.shape);
  std::size_t bytes = header_size(info, codec.spec(), plan.size());
  for (const SectionPlan& section : plan) bytes += align_up(section.max_bytes, kAlignment);
  return bytes;
}

Result<std::size_t> encode_container(const Codec& codec, const ContainerInfo& info,
                                     std::span<const std::byte> canonical,
                                     std::span<const std::uint64_t> plane_checksums, std::span<std::byte> out) {
  const ShardShape& shape = info.shape;
  if (Status status = check_info(info); !status) return failure(status);
  if (Status status = codec.accepts(shape); !status) return failure(status);
  if (canonical.size() != shape.raw_bytes()) {
    return failure(Code::kInvalid, "the shard has " + std::to_string(shape.raw_bytes()) + " bytes, but " +
                                       std::to_string(canonical.size()) + " were given");
  }
  if (!plane_checksums.empty() && plane_checksums.size() != plane_count(shape)) {
    return failure(Code::kInvalid, "the shard has " + std::to_string(plane_count(shape)) + " planes, but " +
                                       std::to_string(plane_checksums.size()) + " checksums were given");
  }
  const auto plan = codec.plan(shape);
  const std::size_t header_bytes = header_size(info, codec.spec(), plan.size());
  std::size_t room = header_bytes;
  for (const SectionPlan& section : plan) room += align_up(section.max_bytes, kAlignment);
  if (out.size() < room) {
    return failure(Code::kInvalid, "the container may take " + std::to_string(room) + " bytes, but there are " +
                                       std::to_string(out.size()));
  }

  std::vector<SectionInfo> sections;
  sections.reserve(plan.size());
  SectionWriter writer(out, header_bytes, sections);
  const PlaneCheck check(shape, plane_checksums);
  const Status status = codec.verbatim() ? copy_sections(shape, plan, canonical, check, writer)
                                         : encode_sections(codec, placed(info), plan, canonical, check, writer);
  if (!status) return failure(status);
  write_header(info, codec.spec(), sections, writer.offset(), out.first(header_bytes));
  return writer.offset();
}

std::size_t container_header_bytes(const Codec& codec, const ContainerInfo& info) {
  return header_size(info, codec.spec(), codec.plan(info.shape).size());
}

Result<std::size_t> seal_container(const Codec& codec, const ContainerInfo& info, std::span<std::byte> out,
                                   Executor* executor) {
  if (Status status = check_info(info); !status) return failure(status);
  if (Status status = codec.accepts(info.shape); !status) return failure(status);
  const auto plan = codec.plan(info.shape);
  const std::size_t header_bytes = header_size(info, codec.spec(), plan.size());
  std::vector<SectionInfo> sections;
  sections.reserve(plan.size());
  std::size_t offset = header_bytes;
  for (const SectionPlan& section : plan) {
    sections.push_back({section.extent, offset, section.max_bytes, 0});
    offset += align_up(section.max_bytes, kAlignment);
  }
  if (out.size() < offset) return failure(Code::kInvalid, "the container is larger than its room");
  in_pieces(executor, sections.size(), [&](std::size_t i) {
    sections[i].checksum = fast_checksum64(out.data() + sections[i].offset, sections[i].bytes);
  });
  write_header(info, codec.spec(), sections, offset, out.first(header_bytes));
  return offset;
}

std::optional<ContainerInfo> peek_container_info(std::span<const std::byte> start) {
  FieldReader fields(start);
  const auto magic = fields.get_bytes(kMagic.size());
  const auto version = fields.get<std::uint32_t>();
  fields.get<std::uint32_t>();
  fields.get<std::uint64_t>();
  if (!fields.good() || std::memcmp(magic.data(), kMagic.data(), kMagic.size()) != 0) return std::nullopt;
  if (version == 0 || version > kContainerVersion) return std::nullopt;
  ContainerInfo info;
  std::uint32_t section_count = 0;
  if (read_description(fields, version, info, section_count) != nullptr) return std::nullopt;
  return info;
}

Result<ContainerReader> ContainerReader::parse(std::span<const std::byte> bytes) {
  const auto corrupt = [](std::string why) { return failure(Code::kCorrupt, "container: " + std::move(why)); };

  // These fields and the checksum keep their places in every version.
  FieldReader start(bytes);
  const auto magic = start.get_bytes(kMagic.size());
  start.get<std::uint32_t>();
  const auto header_bytes = start.get<std::uint32_t>();
  if (!start.good() || std::memcmp(magic.data(), kMagic.data(), kMagic.size()) != 0) {
    return corrupt("it does not begin like one");
  }
  if (header_bytes < start.position() + kChecksumBytes || header_bytes > bytes.size()) {
    return corrupt("its header of " + std::to_string(header_bytes) + " bytes does not fit " +
                   std::to_string(bytes.size()));
  }
  // Parsed from a copy, so that what was verified is what is read even when the memory belongs to somebody else.
  std::vector<std::byte> header(header_bytes);
  Checksum64 checksum;
  checksum.copy(header.data(), bytes.data(), header_bytes - kChecksumBytes);
  std::uint64_t expected = 0;
  std::memcpy(&expected, bytes.data() + header_bytes - kChecksumBytes, kChecksumBytes);
  if (checksum.digest() != expected) return corrupt("its header fails its checksum");

  FieldReader fields(std::span<const std::byte>(header).first(header_bytes - kChecksumBytes));
  fields.get_bytes(kMagic.size());
  const auto version = fields.get<std::uint32_t>();
  if (version > kContainerVersion) {
    return failure(Code::kRefused, "the container has format version " + std::to_string(version) +
                                       ", written by a newer Kvern; this one reads versions up to " +
                                       std::to_string(kContainerVersion));
  }
  if (version == 0) return corrupt("there is no format version 0");
  fields.get<std::uint32_t>();

  ContainerReader reader;
  ContainerInfo& info = reader.info_;
  ShardShape& shape = info.shape;
  const auto container_bytes = fields.get<std::uint64_t>();
  std::uint32_t section_count = 0;
  if (const char* why = read_description(fields, version, info, section_count)) return corrupt(why);
  if (Status status = shape.validate(); !status) return corrupt(status.message());
  if (Status status = check_info(info); !status) return corrupt(status.message());

  auto codec = make_codec(info.codec_spec);
  if (!codec) return failure(Code::kRefused, "the container's codec: " + codec.error().message());
  reader.codec_ = std::move(*codec);
  if (reader.codec_->spec() != info.codec_spec) return corrupt("its codec spec is not canonical");
  if (Status status = reader.codec_->accepts(shape); !status) return corrupt(status.message());

  // The plan says all that the table may say, but for the encoded sizes. Its size is bounded by the shape's.
  fields.skip_to(align_up(fields.position(), 8));
  const auto plan = reader.codec_->plan(shape);
  if (plan.size() != section_count)
    return corrupt("it has " + std::to_string(section_count) + " sections, not " + std::to_string(plan.size()));
  std::uint64_t offset = header_bytes;
  if (offset % kAlignment != 0) return corrupt("its header is not a multiple of 64 bytes long");
  reader.sections_.reserve(std::min<std::size_t>(section_count, fields.left() / kSectionEntryBytes));
  for (const SectionPlan& planned : plan) {
    SectionInfo section;
    section.offset = fields.get<std::uint64_t>();
    section.bytes = fields.get<std::uint64_t>();
    section.checksum = fields.get<std::uint64_t>();
    SectionExtent& extent = section.extent;
    for (std::uint32_t* field : {&extent.layer, &extent.layers, &extent.head, &extent.heads}) {
      *field = fields.get<std::uint32_t>();
    }
    const auto parts = fields.get<std::uint64_t>();
    extent.has_key = (parts & kHasKey) != 0;
    extent.has_value = (parts & kHasValue) != 0;
    if (!fields.good()) return corrupt("its section table does not fit the header");
    if (extent != planned.extent || section.bytes > planned.max_bytes || section.offset != offset) {
      return corrupt("section " + std::to_string(reader.sections_.size()) + " is not where or what the codec stores");
    }
    offset = align_up(offset + section.bytes, kAlignment);
    reader.sections_.push_back(section);
  }
  if (offset != container_bytes || container_bytes > bytes.size()) {
    return corrupt("it should have " + std::to_string(offset) + " bytes; it says " + std::to_string(container_bytes) +
                   " and has " + std::to_string(bytes.size()));
  }
  reader.bytes_ = bytes.first(container_bytes);
  reader.size_bytes_ = container_bytes;
  return reader;
}

namespace {

Status check_section(std::uint64_t seen, const SectionInfo& section, std::size_t number) {
  if (seen == section.checksum) return Status::ok();
  return {Code::kCorrupt, "section " + std::to_string(number) + " (" + describe(section.extent) +
                              ") of the container fails its checksum"};
}

bool overlaps(std::uint32_t begin, std::uint32_t count, std::uint32_t from, std::uint32_t to) {
  return begin < to && from < begin + count;
}

/// Hands the rows of wanted layers on and, in turns with them, hashes the next section: memory reads that one while it
/// writes these.
class ReadingAhead final : public RowSink {
 public:
  ReadingAhead(RowSink& sink, std::uint32_t first_layer, std::uint32_t last_layer, std::span<const std::byte> next)
      : sink_(sink), first_layer_(first_layer), last_layer_(last_layer), next_(next) {}

  void write(std::uint32_t layer, Part part, std::uint32_t head, std::uint32_t token, std::uint32_t count,
             const std::byte* rows) override {
    // A section of several layers is decoded whole.
    if (layer >= first_layer_ && layer < last_layer_) sink_.write(layer, part, head, token, count, rows);
    advance(kPieceBytes);
  }
  std::uint32_t preferred_rows() const override { return sink_.preferred_rows(); }
  /// The checksum of the next section.
  std::uint64_t finish() {
    advance(next_.size());
    return checksum_.digest();
  }

 private:
  void advance(std::size_t bytes) {
    const auto piece = next_.first(std::min(bytes, next_.size()));
    checksum_.update(piece.data(), piece.size());
    next_ = next_.subspan(piece.size());
  }

  RowSink& sink_;
  std::uint32_t first_layer_;
  std::uint32_t last_layer_;
  std::span<const std::byte> next_;
  Checksum64 checksum_;
};

}  // namespace

Status ContainerReader::verify(Executor* executor) const {
  std::vector<std::uint64_t> checksums(sections_.size());
  in_pieces(executor, sections_.size(), [&](std::size_t i) {
    const auto payload = bytes_.subspan(sections_[i].offset, sections_[i].bytes);
    checksums[i] = fast_checksum64(payload.data(), payload.size());
  });
  for (std::size_t i = 0; i < sections_.size(); ++i) {
    if (Status status = check_section(checksums[i], sections_[i], i); !status) return status;
  }
  return Status::ok();
}

Result<std::size_t> ContainerReader::write_base(std::span<std::byte> out) const {
  const auto chain = parse_chunk_chain(info_.codec_spec);
  if (!chain) return failure(chain.error());
  // Sections of longer chains hold more than one plane of rows, or something else.
  if (chain->steps.size() != 1 || chain->form->base_spec().empty()) {
    return failure(Code::kRefused, info_.codec_spec + " has no base to demote to; encode it again");
  }
  const PlaneForm& form = *chain->form;
  const auto base = make_codec(form.base_spec());
  if (!base) return failure(base.error());
  const std::size_t room = container_max_bytes(**base, info_);
  if (out.size() < room) {
    return failure(Code::kInvalid, "the container may take " + std::to_string(room) + " bytes, but there are " +
                                       std::to_string(out.size()));
  }
  const std::size_t header_bytes = header_size(info_, form.base_spec(), sections_.size());
  std::vector<SectionInfo> written;
  written.reserve(sections_.size());
  SectionWriter writer(out, header_bytes, written);
  for (std::size_t i = 0; i < sections_.size(); ++i) {
    const SectionInfo& section = sections_[i];
    const auto payload = bytes_.subspan(section.offset, section.bytes);
    if (Status status = check_section(fast_checksum64(payload.data(), payload.size()), section, i); !status) {
      return failure(std::move(status));
    }
    const Part part = section.extent.has_key ? Part::kKey : Part::kValue;
    const PlaneShape plane{info_.shape.dtype, part, info_.shape.tokens,
                           part == Part::kKey ? info_.shape.key_dim : info_.shape.value_dim};
    const auto kept = demote_section(form, plane, payload);
    if (!kept) return failure(kept.error());
    const std::uint64_t checksum = stream_copy_checksum(writer.next(), kept->data(), kept->size());
    writer.finish(section.extent, kept->size(), checksum);
  }
  write_header(info_, form.base_spec(), written, writer.offset(), out.first(header_bytes));
  return writer.offset();
}

/// A plane of a verbatim codec: hashed whole, the tokens handed on in the same pass.
Status ContainerReader::copy_hashing(std::size_t number, TokenRange tokens, RowSink& sink) const {
  const SectionInfo& section = sections_[number];
  const Part part = section.extent.has_key ? Part::kKey : Part::kValue;
  const std::size_t row_bytes = info_.shape.row_bytes(part);
  const auto payload = bytes_.subspan(section.offset, section.bytes);
  if (payload.size() != info_.shape.plane_bytes(part)) {
    return {Code::kCorrupt, "section " + std::to_string(number) + " (" + describe(section.extent) +
                                ") of the container is not as long as its plane"};
  }
  const std::uint32_t preferred = sink.preferred_rows();
  Checksum64 checksum;
  checksum.update(payload.data(), tokens.begin * row_bytes);
  for (std::uint32_t token = tokens.begin; token < tokens.end;) {
    const std::uint32_t run = preferred == 0 ? tokens.end - token : preferred - token % preferred;
    const std::uint32_t count = std::min(run, tokens.end - token);
    sink.write_hashing(section.extent.layer, part, section.extent.head, token, count,
                       payload.subspan(token * row_bytes, count * row_bytes), checksum);
    token += count;
  }
  checksum.update(payload.data() + tokens.end * row_bytes, payload.size() - tokens.end * row_bytes);
  return check_section(checksum.digest(), section, number);
}

Status ContainerReader::decode(std::uint32_t layer_begin, std::uint32_t layer_end, std::uint32_t head_begin,
                               std::uint32_t head_end, TokenRange tokens, RowSink& sink) const {
  const ShardShape& shape = info_.shape;
  if (tokens.begin > tokens.end || tokens.end > shape.tokens) {
    return {Code::kInvalid, "tokens " + std::to_string(tokens.begin) + " to " + std::to_string(tokens.end) +
                                " lie outside the chunk's " + std::to_string(shape.tokens)};
  }
  // From the model's numbers to the shard's.
  const auto relative = [](std::uint32_t value, std::uint32_t begin) { return value > begin ? value - begin : 0; };
  const std::uint32_t first_layer = relative(layer_begin, shape.layer_begin);
  const std::uint32_t last_layer = relative(layer_end, shape.layer_begin);
  const std::uint32_t first_head = relative(head_begin, shape.head_begin);
  const std::uint32_t last_head = relative(head_end, shape.head_begin);
  std::vector<std::size_t> wanted;
  for (std::size_t i = 0; i < sections_.size(); ++i) {
    const SectionExtent& extent = sections_[i].extent;
    if (overlaps(extent.layer, extent.layers, first_layer, last_layer) &&
        overlaps(extent.head, extent.heads, first_head, last_head)) {
      wanted.push_back(i);
    }
  }
  if (codec_->verbatim() && sink.accepts_unverified()) {
    for (const std::size_t section : wanted) {
      if (Status status = copy_hashing(section, tokens, sink); !status) return status;
    }
    return Status::ok();
  }
  const auto payload = [&](std::size_t index) {
    if (index == wanted.size()) return std::span<const std::byte>{};
    return bytes_.subspan(sections_[wanted[index]].offset, sections_[wanted[index]].bytes);
  };
  const ShardShape in_place = placed(info_);
  const auto first = payload(0);
  std::uint64_t checksum = fast_checksum64(first.data(), first.size());
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const SectionInfo& section = sections_[wanted[i]];
    if (Status status = check_section(checksum, section, wanted[i]); !status) return status;
    ReadingAhead ahead(sink, first_layer, last_layer, payload(i + 1));
    const Status status = codec_->decode(in_place, section.extent, payload(i), tokens, first_head, last_head, ahead);
    if (!status) {
      return {status.code(),
              "section " + std::to_string(wanted[i]) + " (" + describe(section.extent) + "): " + status.message()};
    }
    checksum = ahead.finish();
  }
  return Status::ok();
}

}  // namespace kvern
