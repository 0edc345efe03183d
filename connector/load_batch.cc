#include "connector/load_batch.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "base/clock.h"
#include "kernels/container.h"
#include "transport/wire.h"

namespace kvern {
namespace {

using SteadyClock = std::chrono::steady_clock;

/// A piece usually lies in one chunk; each round finds the chunk that holds the last block which is still missing.
constexpr int kMaxRounds = 16;

/// How long after its deadline the daemon's answer is awaited: until it comes the pages, or leases, are the daemon's to
/// dispose of.
constexpr std::chrono::milliseconds kAnswerGrace{5000};

/// Bytes that are pulled ahead of the chunk that is being decoded: enough to keep a network busy while one chunk of
/// 8 MiB is decoded; more only makes pulls wait for each other, and takes memory.
constexpr std::uint64_t kPullWindowBytes = 16ULL << 20;

/// Blocks [begin, end) of a piece that are not in the pages yet.
struct Remaining {
  const LoadPiece* piece = nullptr;
  const GroupPages* pages = nullptr;
  std::size_t begin = 0;
  std::size_t end = 0;
};

void trim_null_blocks(Remaining& rest) {
  const auto& ids = rest.piece->block_ids;
  while (rest.begin < rest.end && ids[rest.begin] == 0) ++rest.begin;
  while (rest.begin < rest.end && ids[rest.end - 1] == 0) --rest.end;
}

std::chrono::milliseconds time_left(const LoadContext& context) {
  return std::max(std::chrono::milliseconds(1),
                  std::chrono::duration_cast<std::chrono::milliseconds>(context.deadline - SteadyClock::now()));
}

Status may_go_on(const LoadContext& context) {
  if (context.cancelled.load(std::memory_order_relaxed)) return {Code::kUnavailable, "cancelled"};
  if (SteadyClock::now() >= context.deadline) return {Code::kUnavailable, "not finished in time"};
  return Status::ok();
}

/// Which (layer, head) of this rank have been decoded. Shards of several writers make up one chunk.
class Coverage {
 public:
  explicit Coverage(const GroupPages& pages)
      : pages_(pages), done_(pages.layers.size() * pages.heads, false), missing_(done_.size()) {}

  /// True when the shard holds something that is still missing.
  bool wants(const wire::ContainerLocation& shard) {
    bool wanted = false;
    visit(shard, [&](std::vector<bool>::reference cell) { wanted = wanted || !cell; });
    return wanted;
  }
  void add(const wire::ContainerLocation& shard) {
    visit(shard, [&](std::vector<bool>::reference cell) {
      if (!cell) --missing_;
      cell = true;
    });
  }
  bool complete() const { return missing_ == 0; }

 private:
  template <typename Function>
  void visit(const wire::ContainerLocation& shard, Function&& function) {
    for (std::size_t layer = 0; layer < pages_.layers.size(); ++layer) {
      if (!within(pages_.layer_begin + layer, shard.layer_begin(), shard.layers())) continue;
      for (std::size_t head = 0; head < pages_.heads; ++head) {
        if (!within(pages_.head_begin + head, shard.head_begin(), shard.heads())) continue;
        function(done_[layer * pages_.heads + head]);
      }
    }
  }
  static bool within(std::uint64_t value, std::uint64_t begin, std::uint64_t count) {
    return value >= begin && value < begin + count;
  }

  const GroupPages& pages_;
  std::vector<bool> done_;
  std::size_t missing_;
};

/// The container says of itself that it is the one which was asked for.
Status check_identity(const ContainerInfo& info, const LoadContext& context, const GroupPages& pages,
                      const wire::ContainerLocation& shard) {
  const ShardShape& shape = info.shape;
  if (info.key.namespace_id != context.namespace_id || info.key.group != pages.group) {
    return {Code::kCorrupt, "the container belongs to another namespace or group"};
  }
  if (shape.layer_begin != shard.layer_begin() || shape.layers != shard.layers() ||
      shape.head_begin != shard.head_begin() || shape.heads != shard.heads()) {
    return {Code::kCorrupt, "the container holds other layers or heads than the daemon said"};
  }
  if (shape.dtype != pages.dtype || shape.key_dim != pages.key_dim || shape.value_dim != pages.value_dim ||
      info.block_tokens != pages.block_tokens || info.group_layers != pages.group_layers ||
      info.model_heads != pages.model_heads) {
    return {Code::kCorrupt, "the container's shape is not that of the registered KV-cache group"};
  }
  return Status::ok();
}

/// Blocks [first, first + count) of the chunk are the last count remaining ones of the piece.
struct Overlap {
  std::size_t first = 0;
  std::size_t count = 0;
};
std::optional<Overlap> find_overlap(const ContainerInfo& info, const Remaining& rest) {
  const auto& chunk = info.block_hashes;
  const auto& wanted = rest.piece->hashes;
  const auto last = std::ranges::find(chunk, wanted[rest.end - 1]);
  if (last == chunk.end()) return std::nullopt;
  Overlap overlap{static_cast<std::size_t>(last - chunk.begin()), 1};
  while (overlap.first > 0 && overlap.count < rest.end - rest.begin &&
         chunk[overlap.first - 1] == wanted[rest.end - 1 - overlap.count]) {
    --overlap.first;
    ++overlap.count;
  }
  return overlap;
}

/// The shards of a fetched chunk that the pages need, on their way.
struct PulledShard {
  const wire::ContainerLocation* shard = nullptr;
  std::unique_ptr<Transfer> transfer;
};
std::vector<PulledShard> pull_shards(const LoadContext& context, const wire::FetchedItem& item,
                                     const GroupPages& pages) {
  std::vector<PulledShard> pulled;
  Coverage coverage(pages);
  for (const wire::ContainerLocation& shard : item.shards()) {
    if (!coverage.wants(shard)) continue;
    coverage.add(shard);
    pulled.push_back({&shard, context.session.data_plane->start_pull(item.lease_id(), shard.offset(), shard.bytes())});
  }
  return pulled;
}

std::uint64_t bytes_of(std::span<const PulledShard> pulled) {
  std::uint64_t bytes = 0;
  for (const PulledShard& pull : pulled) bytes += pull.shard->bytes();
  return bytes;
}

/// Decodes what the fetched chunk holds of the piece and shortens the rest by it. kCorrupt: the bytes are to blame.
Status decode_chunk(const LoadContext& context, std::span<PulledShard> pulled, Remaining& rest, LoadedBytes* loaded) {
  const GroupPages& pages = *rest.pages;
  const std::uint32_t layer_end = pages.layer_begin + static_cast<std::uint32_t>(pages.layers.size());
  const std::uint32_t head_end = pages.head_begin + pages.heads;
  Coverage coverage(pages);
  std::optional<Overlap> common;
  for (const PulledShard& pull : pulled) {
    const wire::ContainerLocation& shard = *pull.shard;
    if (Status status = may_go_on(context); !status) return status;
    auto bytes = pull.transfer->wait();
    if (!bytes) return bytes.error();
    auto reader = ContainerReader::parse(bytes->bytes());
    if (!reader) return reader.error();
    const ContainerInfo& info = reader->info();
    if (Status status = check_identity(info, context, pages, shard); !status) return status;
    const auto overlap = find_overlap(info, rest);
    if (!overlap) return {Code::kCorrupt, "the container does not hold the block that was asked for"};
    if (common && (common->first != overlap->first || common->count != overlap->count)) {
      return {Code::kCorrupt, "the shards of the chunk hold different blocks"};
    }
    common = overlap;
    const auto ids = std::span(rest.piece->block_ids).subspan(rest.end - overlap->count, overlap->count);
    const auto first_token = static_cast<std::uint32_t>(overlap->first) * pages.block_tokens;
    const auto tokens = static_cast<std::uint32_t>(overlap->count) * pages.block_tokens;
    if (DeviceGroup* device = context.device(pages.group)) {
      const PageTarget target{ids, static_cast<std::uint32_t>(overlap->first)};
      Status decoded = device->with_coder([&](PageCoder& coder) {
        return decode_pages(coder, device->cache(), target, *reader, bytes->bytes(), nullptr);
      });
      if (!decoded) return decoded;
      coverage.add(shard);
      loaded->encoded_bytes += shard.bytes();
      add_codec(info.codec_spec, &loaded->codec_spec);
      continue;
    }
    PageSink sink(pages, ids, first_token, info.shape.layer_begin, info.shape.head_begin);
    if (Status status = reader->decode(pages.layer_begin, layer_end, pages.head_begin, head_end,
                                       {first_token, first_token + tokens}, sink);
        !status) {
      return status;
    }
    coverage.add(shard);
    loaded->encoded_bytes += shard.bytes();
    add_codec(info.codec_spec, &loaded->codec_spec);
  }
  if (!coverage.complete() || !common) return {Code::kNotFound, "the stored shards do not cover this rank's heads"};
  loaded->tokens += common->count * pages.block_tokens;
  loaded->raw_bytes += pages.shape(static_cast<std::uint32_t>(common->count)).raw_bytes();
  rest.end -= common->count;
  return Status::ok();
}

/// One Fetch for the last missing block of each piece of a group, and the decoding of what came.
Status fetch_and_decode(const LoadContext& context, std::uint16_t group, std::span<Remaining*> wanted,
                        LoadedBytes* loaded, TakenLeases* leases) {
  if (Status status = may_go_on(context); !status) return status;
  wire::HotRequest request;
  request.set_traceparent(context.traceparent);
  wire::Fetch* fetch = request.mutable_fetch();
  fetch->set_namespace_id(context.namespace_id.bytes.data(), context.namespace_id.bytes.size());
  fetch->set_group(group);
  for (const Remaining* rest : wanted) {
    const auto hash = rest->piece->hashes[rest->end - 1].bytes();
    fetch->add_items()->set_block_hash(hash.data(), hash.size());
  }
  wire::HotReply reply;
  Status status = context.session.channel->call(request, &reply, time_left(context) + kAnswerGrace);
  if (status) status = to_status(reply.status());
  if (!status) return status;
  const auto& items = reply.fetched().items();
  std::vector<std::uint64_t> taken;
  for (const wire::FetchedItem& item : items) {
    if (to_status(item.status())) taken.push_back(item.lease_id());
  }
  if (static_cast<std::size_t>(items.size()) != wanted.size()) {
    leases->good.insert(leases->good.end(), taken.begin(), taken.end());
    return {Code::kInvalid, "the daemon answered for another number of chunks than were asked for"};
  }
  std::vector<std::vector<PulledShard>> pulled;
  std::uint64_t pulled_bytes = 0;
  for (int i = 0; i < items.size() && status; ++i) {
    status = to_status(items[i].status());
    if (!status) break;
    const auto index = static_cast<std::size_t>(i);
    while (pulled.size() < wanted.size() && (pulled.size() <= index || pulled_bytes < kPullWindowBytes)) {
      const auto& next = items[static_cast<int>(pulled.size())];
      if (!to_status(next.status())) break;
      pulled.push_back(pull_shards(context, next, *wanted[pulled.size()]->pages));
      pulled_bytes += bytes_of(pulled.back());
    }
    status = decode_chunk(context, pulled[index], *wanted[index], loaded);
    pulled_bytes -= bytes_of(pulled[index]);
    pulled[index].clear();
    if (status.code() == Code::kCorrupt) {
      std::erase(taken, items[i].lease_id());
      leases->corrupt.push_back(items[i].lease_id());
    }
  }
  leases->good.insert(leases->good.end(), taken.begin(), taken.end());
  return status;
}

/// Has the daemon load the pieces of a group into pages that it knows by the number. On failure all of them are zeroed
/// when an answer came, and in any state when none did.
Status load_pages(const LoadContext& context, std::uint64_t pages_id, std::span<const Remaining> wanted,
                  LoadedBytes* loaded) {
  if (Status status = may_go_on(context); !status) return status;
  const GroupPages& pages = *wanted.front().pages;
  wire::HotRequest request;
  request.set_traceparent(context.traceparent);
  wire::LoadPages* body = request.mutable_load_pages();
  body->set_pages_id(pages_id);
  body->set_namespace_id(context.namespace_id.bytes.data(), context.namespace_id.bytes.size());
  body->set_group(pages.group);
  body->set_hash_bytes(static_cast<std::uint32_t>(wanted.front().piece->hashes[wanted.front().begin].size()));
  const auto left = time_left(context);
  body->set_deadline_ns(Clock::system().now_ns() + std::chrono::nanoseconds(left).count());
  for (const Remaining& rest : wanted) {
    wire::LoadPagesItem* item = body->add_items();
    for (std::size_t i = rest.begin; i < rest.end; ++i) {
      const auto hash = rest.piece->hashes[i].bytes();
      item->mutable_block_hashes()->append(reinterpret_cast<const char*>(hash.data()), hash.size());
      item->add_block_ids(rest.piece->block_ids[i]);
    }
  }
  wire::HotReply reply;
  loaded->by_daemon = true;
  Status status = context.session.channel->call(request, &reply, left + kAnswerGrace);
  if (status) status = to_status(reply.status());
  if (!status) return status;
  const auto& items = reply.pages_loaded().items();
  if (static_cast<std::size_t>(items.size()) != wanted.size()) {
    return {Code::kInvalid, "the daemon answered for another number of pieces than were asked for"};
  }
  for (const wire::LoadedPagesItem& item : items) {
    if (Status each = to_status(item.status()); !each) return each;
    loaded->tokens += item.tokens();
    loaded->raw_bytes += item.raw_bytes();
    loaded->encoded_bytes += item.encoded_bytes();
    add_codec(item.codec_spec(), &loaded->codec_spec);
  }
  return Status::ok();
}

/// Takes the pieces out that the daemon can load into pages itself, and has it load them.
Status load_by_daemon(const LoadContext& context, std::vector<Remaining>& all, LoadedBytes* loaded) {
  std::map<std::uint16_t, std::vector<Remaining>> by_group;
  for (const Remaining& rest : all) {
    if (rest.begin < rest.end && context.device(rest.piece->group) != nullptr) {
      by_group[rest.piece->group].push_back(rest);
    }
  }
  for (const auto& entry : by_group) {
    const std::uint16_t group = entry.first;
    const auto pages_id = context.device(group)->pages_id(context.session, time_left(context) / 2);
    if (!pages_id) continue;
    if (Status status = load_pages(context, *pages_id, entry.second, loaded); !status) return status;
    std::erase_if(all, [&](const Remaining& rest) { return rest.piece->group == group; });
  }
  return Status::ok();
}

}  // namespace

Status check_piece(const LoadPiece& piece, const GroupPages* pages) {
  if (pages == nullptr) {
    return {Code::kInvalid, "KV-cache group " + std::to_string(piece.group) + " is not registered"};
  }
  if (piece.hashes.size() != piece.block_ids.size()) {
    return {Code::kInvalid, "as many block hashes as block ids are needed"};
  }
  for (const std::uint32_t id : piece.block_ids) {
    if (!pages->has_block(id)) {
      return {Code::kInvalid, "block " + std::to_string(id) + " lies outside of the registered pages"};
    }
  }
  return Status::ok();
}

Status load_batch(const LoadContext& context, std::span<const LoadPiece> pieces, LoadedBytes* loaded,
                  TakenLeases* leases) {
  std::vector<Remaining> all;
  for (const LoadPiece& piece : pieces) {
    all.push_back({&piece, context.pages(piece.group), 0, piece.hashes.size()});
    trim_null_blocks(all.back());
  }
  if (Status status = load_by_daemon(context, all, loaded); !status) return status;
  for (int round = 0; round < kMaxRounds; ++round) {
    std::map<std::uint16_t, std::vector<Remaining*>> by_group;
    for (Remaining& rest : all) {
      if (rest.begin < rest.end) by_group[rest.piece->group].push_back(&rest);
    }
    if (by_group.empty()) return Status::ok();
    for (auto& [group, wanted] : by_group) {
      if (Status status = fetch_and_decode(context, group, wanted, loaded, leases); !status) return status;
      for (Remaining* rest : wanted) trim_null_blocks(*rest);
    }
  }
  return {Code::kNotFound, "the blocks of one piece are spread over too many chunks"};
}

void release(const Session& session, const TakenLeases& leases, std::chrono::milliseconds timeout) {
  if (leases.good.empty() && leases.corrupt.empty()) return;
  wire::HotRequest request;
  wire::Release* body = request.mutable_release();
  body->mutable_lease_ids()->Add(leases.good.begin(), leases.good.end());
  body->mutable_corrupt_lease_ids()->Add(leases.corrupt.begin(), leases.corrupt.end());
  wire::HotReply reply;
  // Leases of a session that is gone are gone as well.
  static_cast<void>(session.channel->call(request, &reply, timeout));
}

}  // namespace kvern
