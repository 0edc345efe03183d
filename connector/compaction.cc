#include "connector/compaction.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "connector/client.h"
#include "connector/shard_message.h"
#include "kernels/compaction.h"
#include "kernels/rope.h"
#include "kernels/slot_pages.h"
#include "transport/compact_handle.h"
#include "transport/wire.h"

namespace kvern {
namespace {

using std::chrono::milliseconds;

/// Queries in one message; leaves room for the rest of it.
constexpr std::size_t kQueryPieceBytes = kMaxMessageBytes / 2;
/// How soon at the earliest a daemon that lets nobody wait is asked once more.
constexpr milliseconds kAskedAgain{50};

/// One control call of the session, with the status of its answer.
Status call(const Session& session, wire::ControlRequest& request, wire::ControlReply* reply, milliseconds timeout) {
  request.set_session_token(session.token);
  if (Status sent = session.control->call(request, reply, timeout); !sent) return sent;
  return to_status(reply->status());
}

CompactionState state_of(wire::CompactionState state) {
  switch (state) {
    case wire::COMPACTION_PENDING:
      return CompactionState::kPending;
    case wire::COMPACTION_READY:
      return CompactionState::kReady;
    case wire::COMPACTION_FAILED:
      return CompactionState::kFailed;
    default:
      return CompactionState::kUnknown;
  }
}

CompactionInfo info_of(const wire::CompactionReport& report) {
  CompactionInfo info;
  info.handle = report.handle();
  info.state = state_of(report.state());
  info.reason = report.reason();
  if (const auto handle = CompactHandle::parse(report.handle())) {
    info.prompt_tokens = handle->prompt_tokens;
    info.slots = handle->slots;
    info.expires_at = handle->expires_at;
  }
  info.method = report.method();
  std::memcpy(info.namespace_id.bytes.data(), report.namespace_id().data(),
              std::min(info.namespace_id.bytes.size(), report.namespace_id().size()));
  info.group = static_cast<std::uint16_t>(report.group());
  info.stored_bytes = report.stored_bytes();
  info.raw_bytes = report.raw_bytes();
  if (report.has_error_mean()) info.error_mean = report.error_mean();
  if (report.has_error_max()) info.error_max = report.error_max();
  info.owner = report.tenant() + "/" + report.client_name();
  info.seconds = report.seconds();
  info.error_to_come = report.error_to_come();
  info.layer_slots.assign(report.layer_slots().begin(), report.layer_slots().end());
  return info;
}

/// As many bytes of queries as the job says, for each layer.
bool has_queries(const CompactionJob& job, const GroupPages& pages) {
  const std::size_t bytes = std::size_t{job.query_rows} * job.query_heads * pages.key_dim * dtype_bytes(pages.dtype);
  return job.queries.size() == pages.layers.size() && bytes > 0 &&
         std::ranges::all_of(job.queries, [&](const std::string& layer) { return layer.size() == bytes; });
}

CompactionInfo unknown(const std::string& handle, std::string reason) {
  CompactionInfo info;
  info.handle = handle;
  info.reason = std::move(reason);
  return info;
}

}  // namespace

Result<CompactionTerms> compaction_terms(std::string_view spec, std::uint32_t prompt_tokens, SlotLayout layout,
                                         std::uint32_t page_tokens) {
  auto plan = CompactionPlan::make(spec, prompt_tokens, layout, page_tokens);
  if (!plan) return failure(plan.error());
  return CompactionTerms{std::move(plan->chain.spec), plan->slots, plan->query_rows, plan->layout};
}

Result<KeyRotation> key_rotation(std::string_view fact) {
  const auto rotation = rope::Parameters::parse(fact);
  if (!rotation) return failure(rotation.error());
  return KeyRotation{rotation->style == rope::Style::kInterleaved, rotation->inverse_frequencies()};
}

Result<std::vector<std::vector<std::pair<std::uint32_t, std::uint32_t>>>> slot_places(
    SlotLayout layout, std::span<const std::uint32_t> pages_of_layers, std::uint32_t blocks) {
  const auto pages = slot_pages(layout, pages_of_layers, blocks);
  if (!pages) return failure(pages.error());
  std::vector<std::vector<std::pair<std::uint32_t, std::uint32_t>>> places;
  for (const auto& layer : *pages) {
    auto& of_layer = places.emplace_back();
    for (const SlotPage& page : layer) of_layer.emplace_back(page.layer, page.block);
  }
  return places;
}

Status check_compaction(const CompactionJob& job, const GroupPages& pages) {
  const auto wrong = [](std::string why) { return Status(Code::kInvalid, std::move(why)); };
  const auto handle = CompactHandle::parse(job.handle);
  if (!handle) return handle.error();
  if (handle->prompt_tokens != job.prompt_tokens || handle->slots != job.slots ||
      handle->expires_at != job.expires_at) {
    return wrong("tokens, slots and expiry are not those of the handle");
  }
  if (job.hash_bytes < CompactHandle::kMinHashBytes || job.hash_bytes > CompactHandle::kMaxHashBytes) {
    return wrong("block hashes of compact caches have 16 to 32 bytes");
  }
  if (job.source_hashes != handle->source_hashes(pages.block_tokens, job.hash_bytes) ||
      job.slot_hashes != handle->slot_hashes(pages.block_tokens, job.hash_bytes)) {
    return wrong("the hashes are not those that the handle stands for");
  }
  if (pages.packing == PagePacking::kOpaque) return wrong("pages of unknown layout cannot be compacted");
  return Status::ok();
}

Status send_compaction(const Session& session, const NamespaceId& namespace_id, const CompactionJob& job,
                       const GroupPages& pages, milliseconds timeout) {
  wire::ControlRequest request;
  wire::ControlReply reply;
  request.set_traceparent(job.traceparent);
  wire::Compact* compact = request.mutable_compact();
  compact->set_handle(job.handle);
  compact->set_namespace_id(namespace_id.bytes.data(), namespace_id.bytes.size());
  compact->set_group(job.group);
  compact->set_spec(job.spec);
  compact->set_hash_bytes(job.hash_bytes);
  compact->set_group_layers(pages.group_layers);
  compact->set_model_heads(pages.model_heads);
  describe_shard(pages.shape(1), compact->mutable_shard());
  // Queries that are missing are for the daemon to refuse: it drops the prompt's chunks, and knows why for those who
  // ask.
  const bool captured = has_queries(job, pages);
  compact->set_query_rows(captured ? job.query_rows : 0);
  compact->set_query_heads(job.query_heads);
  if (Status taken = call(session, request, &reply, timeout); !taken) return taken;

  std::uint64_t offset = 0;
  if (!captured) return Status::ok();
  for (const std::string& layer : job.queries) {
    for (std::size_t at = 0; at < layer.size(); at += kQueryPieceBytes) {
      request.Clear();
      wire::CompactQueries* queries = request.mutable_compact_queries();
      queries->set_handle(job.handle);
      queries->set_layer_begin(pages.layer_begin);
      queries->set_head_begin(pages.head_begin);
      queries->set_offset(offset);
      queries->set_data(layer.substr(at, kQueryPieceBytes));
      if (Status taken = call(session, request, &reply, timeout); !taken) return taken;
      offset += queries->data().size();
    }
  }
  return Status::ok();
}

CompactionInfo ask_compaction(const Session* session, const std::string& handle, milliseconds wait, bool early,
                              milliseconds call_timeout) {
  if (session == nullptr) return unknown(handle, "no daemon answers");
  if (handle.empty()) return unknown(handle, "this is no handle");
  using SteadyClock = std::chrono::steady_clock;
  const auto until = SteadyClock::now() + wait;
  while (true) {
    const auto left = std::chrono::ceil<milliseconds>(until - SteadyClock::now());
    const auto slice = std::clamp(left, milliseconds(0), call_timeout / 2);
    wire::ControlRequest request;
    wire::ControlReply reply;
    request.mutable_compaction()->set_handle(handle);
    request.mutable_compaction()->set_wait_ms(static_cast<std::uint64_t>(slice.count()));
    request.mutable_compaction()->set_early(early);
    const auto asked = SteadyClock::now();
    const Status answered = call(*session, request, &reply, call_timeout);
    if (!answered) return unknown(handle, answered.message());
    if (reply.compactions().items_size() != 1) return unknown(handle, "the daemon's answer names no compact cache");
    CompactionInfo info = info_of(reply.compactions().items(0));
    const bool to_come = info.state == CompactionState::kPending || (info.error_to_come && !early);
    const auto now = SteadyClock::now();
    if (!to_come || now >= until) return info;
    // The daemon does not hold everybody's question, and answers others at once.
    std::this_thread::sleep_until(std::min({until, asked + slice, asked + kAskedAgain}));
  }
}

Result<std::vector<std::uint32_t>> ask_layer_slots(const Session& session, const NamespaceId& namespace_id,
                                                   std::uint16_t group, const BlockHash& block, milliseconds timeout) {
  wire::ControlRequest request;
  wire::ControlReply reply;
  auto* query = request.mutable_layer_slots();
  query->set_namespace_id(namespace_id.bytes.data(), namespace_id.bytes.size());
  query->set_group(group);
  query->set_block_hash(block.bytes().data(), block.size());
  if (Status answered = call(session, request, &reply, timeout); !answered) return failure(answered);
  const auto& slots = reply.layer_slots().slots();
  return std::vector<std::uint32_t>(slots.begin(), slots.end());
}

Result<bool> delete_compaction(const Session& session, const std::string& handle, milliseconds timeout) {
  wire::ControlRequest request;
  wire::ControlReply reply;
  request.mutable_delete_compaction()->set_handle(handle);
  const Status deleted = call(session, request, &reply, timeout);
  if (deleted.code() == Code::kNotFound) return false;
  if (!deleted) return failure(deleted);
  return true;
}

Result<std::vector<CompactionInfo>> list_compactions(const Session& session, milliseconds timeout) {
  wire::ControlRequest request;
  wire::ControlReply reply;
  request.mutable_compaction();
  if (Status listed = call(session, request, &reply, timeout); !listed) return failure(listed);
  std::vector<CompactionInfo> infos;
  for (const auto& report : reply.compactions().items()) infos.push_back(info_of(report));
  return infos;
}

}  // namespace kvern
