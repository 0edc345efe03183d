#include "service/control_service.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/container.h"
#include "service/log.h"
#include "store/lease.h"
#include "transport/wire.h"

namespace kvern {
namespace {

constexpr std::string_view kDefaultTenant = "default";
constexpr std::size_t kMaxAttributeBytes = 256;
constexpr std::size_t kMaxNameBytes = 128;
// A page of events, well below the size of a message.
constexpr std::size_t kMaxEventBytes = kMaxMessageBytes / 2;
constexpr std::uint64_t kMaxSnapshotChunks = 1U << 16;
constexpr std::size_t kMaxSnapshotHashBytes = 32U << 20;  // clients take replies of 64 MiB

Status refused(std::string why) { return Status(Code::kRefused, std::move(why)); }

/// Client text for logs and reports: cut, and nothing but printable ASCII, so that nobody writes into a terminal.
std::string plain(std::string_view text, std::size_t most) {
  std::string result(text.substr(0, most));
  std::ranges::replace_if(
      result, [](char c) { return c < ' ' || c > '~'; }, '?');
  return result;
}

template <typename Message>
std::map<std::string, std::string> attributes_of(const Message& message) {
  std::map<std::string, std::string> attributes;
  for (const auto& [name, value] : message.attributes()) {
    if (attributes.size() >= Session::kMaxAttributes) break;
    attributes.emplace(plain(name, kMaxAttributeBytes), plain(value, kMaxAttributeBytes));
  }
  return attributes;
}

std::string join_hashes(std::span<const BlockHash> blocks, std::uint32_t hash_bytes) {
  std::string joined;
  joined.reserve(blocks.size() * hash_bytes);
  for (const BlockHash& block : blocks) {
    joined.append(reinterpret_cast<const char*>(block.bytes().data()), block.bytes().size());
  }
  return joined;
}

std::uint32_t hash_bytes_of(std::span<const BlockHash> blocks) {
  return blocks.empty() ? 0 : static_cast<std::uint32_t>(blocks.front().size());
}

Result<std::optional<NamespaceId>> optional_namespace(const std::string& bytes) {
  NamespaceId id;
  if (bytes.empty()) return std::optional<NamespaceId>();
  if (bytes.size() != id.bytes.size()) return failure(Code::kInvalid, "a namespace id has 16 bytes");
  std::memcpy(id.bytes.data(), bytes.data(), id.bytes.size());
  return std::optional<NamespaceId>(id);
}

Result<BlockHash> block_of(const std::string& hash) {
  const auto block = BlockHash::from_bytes({reinterpret_cast<const std::uint8_t*>(hash.data()), hash.size()});
  if (!block) return failure(Code::kInvalid, "a block hash has 1 to 64 bytes");
  return *block;
}

void tell_refused(const wire::Hello& hello, const Status& why) {
  log_warn("a client was refused", {{"client", plain(hello.client_name(), kMaxNameBytes)}, {"why", why.message()}});
}

CompactionAsker asker_of(const Session& session) {
  const SessionIdentity& identity = session.identity();
  return {.session = session.id(),
          .tenant = identity.tenant,
          .client_name = identity.client_name,
          .sees_all = identity.role == SessionRole::kTool && identity.local};
}

std::string version_or_none(const std::string& version) { return version.empty() ? "none" : version; }

}  // namespace

void ControlService::handle(const ControlPeer& peer, wire::ControlRequest request, ControlReplyFunction reply) {
  parts_.metrics.control_requests.Increment();
  wire::ControlReply answer;
  answer.set_sequence(request.sequence());
  const auto finish = [&](const Status& status) {
    set_status(status, answer.mutable_status());
    reply(std::move(answer));
  };
  // What takes long is done elsewhere: this thread serves everybody's messages.
  const auto submit = [&](std::function<void()> task) {
    if (!parts_.administration.submit(std::move(task))) {
      finish(Status(Code::kBusy, "too many questions wait: ask again later"));
    }
  };
  if (request.has_hello()) {
    auto identity = hello(peer, request.hello());
    if (!identity) return finish(identity.error());
    const bool allocates = identity->plane == SessionPlane::kUcx && identity->staging_bytes > 0;
    auto work = [this, identity = std::move(*identity), answer, reply, request = std::move(request)]() mutable {
      set_status(open_session(std::move(identity), request, &answer), answer.mutable_status());
      reply(std::move(answer));
    };
    return allocates ? submit(std::move(work)) : work();
  }
  const auto session = authenticate(peer, request);
  if (!session) return finish(session.error());

  const auto later = [&](auto work) {
    submit([work = std::move(work), answer, reply, session = *session, request = std::move(request)]() mutable {
      const Status status = work(*session, request, &answer);
      set_status(status, answer.mutable_status());
      reply(std::move(answer));
    });
  };

  switch (request.body_case()) {
    case wire::ControlRequest::kRegisterNamespace:
      return finish(register_namespace(**session, request.register_namespace(), answer.mutable_namespace_registered()));
    case wire::ControlRequest::kRegisterDevicePages:
      return later([this](Session& of, const wire::ControlRequest& asked, wire::ControlReply* to) {
        return register_device_pages(of, asked.register_device_pages(), to->mutable_device_pages_registered());
      });
    case wire::ControlRequest::kHeartbeat:
      (*session)->add_attributes(attributes_of(request.heartbeat()));
      return finish(Status::ok());
    case wire::ControlRequest::kGoodbye:
      parts_.sessions.end((*session)->id(), SessionEnd::kGoodbye);
      return finish(Status::ok());
    case wire::ControlRequest::kHot: {
      auto* hot = request.mutable_hot();
      return parts_.hot.handle((*session)->id(), std::move(*hot),
                               [sequence = request.sequence(), reply = std::move(reply)](wire::HotReply hot_reply) {
                                 wire::ControlReply wrapped;
                                 wrapped.set_sequence(sequence);
                                 *wrapped.mutable_hot() = std::move(hot_reply);
                                 set_status(Status::ok(), wrapped.mutable_status());
                                 reply(std::move(wrapped));
                               });
    }
    case wire::ControlRequest::kPollEvents:
      return finish(poll_events(**session, request.poll_events(), answer.mutable_events()));
    case wire::ControlRequest::kSnapshot:
      return later([this](const Session& of, const wire::ControlRequest& asked, wire::ControlReply* to) {
        return snapshot(of, asked.snapshot(), to->mutable_snapshot());
      });
    case wire::ControlRequest::kCompact:
    case wire::ControlRequest::kCompactQueries:
    case wire::ControlRequest::kCompaction:
    case wire::ControlRequest::kDeleteCompaction:
      if (parts_.compactions == nullptr) return finish(refused("this daemon makes no compact caches"));
      if (request.has_compact()) {
        return later([this](const Session& of, const wire::ControlRequest& asked, wire::ControlReply*) {
          return compact(of, asked);
        });
      }
      if (request.has_compact_queries()) {
        return finish(parts_.compactions->add_queries(asker_of(**session), request.compact_queries()));
      }
      if (request.has_delete_compaction()) {
        return later([this](const Session& of, const wire::ControlRequest& asked, wire::ControlReply*) {
          return parts_.compactions->erase(asker_of(of), asked.delete_compaction().handle());
        });
      }
      return find_compactions(**session, request, std::move(reply));
    case wire::ControlRequest::kLayerSlots:
      return finish(layer_slots(**session, request.layer_slots(), answer.mutable_layer_slots()));
    case wire::ControlRequest::kExplain:
    case wire::ControlRequest::kFlush:
    case wire::ControlRequest::kStatus: {
      const bool admin = (*session)->identity().role == SessionRole::kTool && parts_.admins.contains(peer.public_key);
      if (!peer.local && !admin) {
        parts_.metrics.protocol_error(ProtocolError::kForbidden);
        return finish(
            refused("status, explain and flush concern all tenants: they are for this host, and for tools whose "
                    "line in [server] allowed_clients_file ends with \"admin\""));
      }
      if (request.has_flush()) {
        const auto scope = flush_scope(request.flush());
        if (!scope) return finish(scope.error());
        return submit([this, scope = *scope, answer, reply] { flush(scope, answer, reply); });
      }
      return later([this](const Session&, const wire::ControlRequest& asked, wire::ControlReply* to) {
        return administrate(asked, to);
      });
    }
    case wire::ControlRequest::kHello:
    case wire::ControlRequest::BODY_NOT_SET:
      break;
  }
  parts_.metrics.protocol_error(ProtocolError::kUnknownBody);
  finish(Status(Code::kInvalid, "the request has no body that this daemon knows"));
}

void ControlService::malformed(const ControlPeer& peer, const Status& why) {
  parts_.metrics.protocol_error(ProtocolError::kMalformed);
  log_warn("a peer sent what is no request", {{"peer", peer.local ? "local" : "remote"}, {"why", why.message()}});
}

Result<SessionIdentity> ControlService::identify(const ControlPeer& peer, const wire::Hello& hello) const {
  const auto& versions = hello.versions();
  if (versions.protocol() != kProtocolVersion) {
    return failure(Code::kRefused, "the client speaks protocol " + std::to_string(versions.protocol()) +
                                       ", this daemon " + std::to_string(kProtocolVersion) +
                                       ": install the same Kvern on both sides");
  }
  if (versions.container() > kContainerVersion) {
    return failure(Code::kRefused, "the client writes containers of version " + std::to_string(versions.container()) +
                                       ", this daemon reads up to " + std::to_string(kContainerVersion) +
                                       ": install a newer kvernd");
  }
  SessionIdentity identity;
  switch (hello.role()) {
    case wire::ROLE_SCHEDULER:
      identity.role = SessionRole::kScheduler;
      break;
    case wire::ROLE_WORKER:
      identity.role = SessionRole::kWorker;
      break;
    case wire::ROLE_TOOL:
      identity.role = SessionRole::kTool;
      break;
    default:
      return failure(Code::kInvalid, "the client names no role that this daemon knows");
  }
  identity.local = peer.local;
  identity.public_key = peer.public_key;
  identity.tenant = kDefaultTenant;
  if (const auto tenant = parts_.tenants.find(peer.public_key); !peer.local && tenant != parts_.tenants.end()) {
    identity.tenant = tenant->second;
  }
  identity.client_name = plain(hello.client_name(), kMaxNameBytes);
  identity.staging_bytes = hello.staging_bytes();
  identity.attributes = attributes_of(hello);
  if (identity.role == SessionRole::kTool) {
    identity.staging_bytes = 0;
    return identity;
  }

  const std::string& configured = parts_.config.server.data_plane;
  const bool wants_shm = hello.data_plane() == wire::DATA_PLANE_SHM;
  const bool wants_ucx = hello.data_plane() == wire::DATA_PLANE_UCX;
  if ((wants_shm && configured == "ucx") || (wants_ucx && configured == "shm")) {
    return failure(Code::kRefused, "the client forces data_plane " + std::string(wants_shm ? "shm" : "ucx") +
                                       ", this daemon [server] data_plane = " + configured);
  }
  if (!peer.local && (wants_shm || configured == "shm")) {
    return failure(Code::kRefused, "shared memory needs the daemon's Unix socket; over TCP data travels by UCX");
  }
  const bool ucx = !peer.local || wants_ucx || configured == "ucx";
  identity.plane = ucx ? SessionPlane::kUcx : SessionPlane::kShm;
  if (!ucx) return identity;
  if (parts_.ucx.version.empty()) {
    return failure(Code::kRefused, "this daemon does not listen for UCX: set [server] ucx_listen");
  }
  if (versions.ucx() != parts_.ucx.version) {
    return failure(Code::kRefused, "the client has UCX " + version_or_none(versions.ucx()) + ", this daemon " +
                                       parts_.ucx.version + "; different versions do not understand each other");
  }
  return identity;
}

Result<SessionIdentity> ControlService::hello(const ControlPeer& peer, const wire::Hello& request) {
  if (stopping_.load(std::memory_order_relaxed)) return failure(Code::kUnavailable, "the daemon is stopping");
  auto identity = identify(peer, request);
  if (!identity) {
    parts_.metrics.protocol_error(ProtocolError::kVersion);
    tell_refused(request, identity.error());
  }
  return identity;
}

Status ControlService::open_session(SessionIdentity identity, const wire::ControlRequest& request,
                                    wire::ControlReply* reply) {
  const auto opened = parts_.sessions.open(std::move(identity), request.sequence());
  if (!opened) {
    tell_refused(request.hello(), opened.error());
    return opened.error();
  }
  const Session& session = **opened;
  const bool uses_ucx = session.identity().plane == SessionPlane::kUcx;
  wire::Welcome* welcome = reply->mutable_welcome();
  welcome->mutable_versions()->set_protocol(kProtocolVersion);
  welcome->mutable_versions()->set_container(kContainerVersion);
  welcome->mutable_versions()->set_ucx(parts_.ucx.version);
  welcome->mutable_versions()->set_software(KVERN_VERSION);
  welcome->set_session_id(session.id());
  welcome->set_session_token(session.token());
  welcome->set_epoch(parts_.epoch);
  welcome->set_heartbeat_interval_ms(parts_.config.sessions.heartbeat_interval_ms);
  welcome->set_session_timeout_ms(parts_.config.sessions.timeout_ms);
  welcome->set_staging_bytes(session.identity().staging_bytes);
  welcome->set_lower_tiers(parts_.tiers.has_tiers());
  if (session.identity().plane == SessionPlane::kShm) welcome->set_admission_path(parts_.config.admission_path());
  if (uses_ucx) {
    welcome->set_ucx_host(parts_.ucx.host);
    welcome->set_ucx_port(parts_.ucx.port);
  }
  if (session.identity().role == SessionRole::kTool) return Status::ok();  // kvernctl in a loop would fill the log
  log_info("session opened", {{"session", session.id()},
                              {"role", role_name(session.identity().role)},
                              {"client", session.identity().client_name},
                              {"control_plane", session.identity().local ? "unix" : "tcp"},
                              {"data_plane", plane_name(session.identity().plane)},
                              {"tenant", session.identity().tenant}});
  return Status::ok();
}

Result<std::shared_ptr<Session>> ControlService::authenticate(const ControlPeer& peer,
                                                              const wire::ControlRequest& request) {
  auto session = parts_.sessions.authenticate(request.session_token());
  if (!session) {
    parts_.metrics.protocol_error(ProtocolError::kBadToken);
    return session;
  }
  const SessionIdentity& identity = (*session)->identity();
  if (identity.local != peer.local || identity.public_key != peer.public_key) {
    parts_.metrics.protocol_error(ProtocolError::kBadToken);
    return failure(Code::kRefused, "the token belongs to a session that came another way, or with another key");
  }
  if (const Status fresh = (*session)->accept_sequence(request.sequence()); !fresh) {
    parts_.metrics.protocol_error(ProtocolError::kSequence);
    return failure(fresh);
  }
  return session;
}

Status ControlService::register_namespace(Session& session, const wire::RegisterNamespace& request,
                                          wire::NamespaceRegistered* answer) {
  std::vector<std::pair<std::string, std::string>> fields;
  fields.reserve(static_cast<std::size_t>(request.fields_size()));
  for (const auto& field : request.fields()) fields.emplace_back(field.name(), field.value());
  auto space = parts_.namespaces.add(fields, session.identity().tenant);
  if (!space) {
    log_warn("a namespace was refused",
             {{"session", session.id()}, {"why", plain(space.error().message(), 2 * kMaxAttributeBytes)}});
    return space.error();
  }
  // Before the session can name it: what is there and too weak must not be found.
  parts_.store.set_terms((*space)->id, (*space)->storage);
  if (Status added = session.add_namespace(*space); !added) return added;
  answer->set_namespace_id((*space)->id.bytes.data(), (*space)->id.bytes.size());
  answer->set_codec_spec((*space)->codec_spec);
  answer->set_tenant((*space)->tenant);
  return Status::ok();
}

Status ControlService::register_device_pages(Session& session, const wire::RegisterDevicePages& request,
                                             wire::DevicePagesRegistered* answer) {
  if (session.identity().plane != SessionPlane::kShm || parts_.devices == nullptr) {
    return refused("pages on a device are reached from the same host by sessions with shared memory only");
  }
  const auto id = parts_.devices->register_pages(session, request);
  if (!id) {
    log_warn("pages on a device are not used",
             {{"session", session.id()}, {"why", plain(id.error().message(), 2 * kMaxAttributeBytes)}});
    return id.error();
  }
  answer->set_pages_id(*id);
  return Status::ok();
}

Status ControlService::compact(const Session& session, const wire::ControlRequest& asked) {
  const wire::Compact& request = asked.compact();
  if (stopping_.load(std::memory_order_relaxed)) return Status(Code::kUnavailable, "the daemon is stopping");
  const auto id = optional_namespace(request.namespace_id());
  if (!id) return id.error();
  const auto space = *id ? session.find_namespace(**id) : nullptr;
  if (!space) return Status(Code::kInvalid, "this session has not registered the namespace of the compact cache");
  CompactionAsker asker = asker_of(session);
  if (parts_.tracer != nullptr)
    asker.span = parts_.tracer->start("kvern.compact", SpanKind::kServer, asked.traceparent());
  if (!asker.span) return parts_.compactions->begin(asker, space, request);
  describe(*asker.span, session);
  asker.span->set("kvern.namespace", space->id.to_hex());
  const Status taken = parts_.compactions->begin(asker, space, request);
  asker.span->end(taken);
  return taken;
}

Status ControlService::layer_slots(const Session& session, const wire::LayerSlotsQuery& request,
                                   wire::LayerSlots* answer) const {
  const auto space = named_namespace(session, request.namespace_id(), request.group());
  if (!space) return space.error();
  const auto block = block_of(request.block_hash());
  if (!block) return block.error();
  const auto group = static_cast<std::uint16_t>(request.group());
  auto pinned = parts_.store.pin((*space)->id, group, *block, PinFor::kClaimed);
  if (!pinned) return Status(Code::kNotFound, "its first slots are not in DRAM");
  const Lease held(parts_.store, std::move(*pinned), (*space)->id, group, *block);
  const auto container = ContainerReader::parse(parts_.store.bytes(held.chunk().shards.front()));
  if (!container) return container.error();
  const auto& slots = container->info().layer_slots;
  answer->mutable_slots()->Assign(slots.begin(), slots.end());
  return Status::ok();
}

void ControlService::find_compactions(const Session& session, const wire::ControlRequest& request,
                                      ControlReplyFunction reply) {
  const auto answer = [sequence = request.sequence(),
                       reply = std::move(reply)](Result<std::vector<wire::CompactionReport>> reports) {
    wire::ControlReply to;
    to.set_sequence(sequence);
    set_status(status_of(reports), to.mutable_status());
    if (reports) to.mutable_compactions()->mutable_items()->Assign(reports->begin(), reports->end());
    reply(std::move(to));
  };
  if (!request.compaction().handle().empty()) {
    return parts_.compactions->find(asker_of(session), request.compaction(), answer);
  }
  // To look at the chunks of all of them takes a while.
  const bool queued = parts_.administration.submit([this, asker = asker_of(session), query = request.compaction(),
                                                    answer] { parts_.compactions->find(asker, query, answer); });
  if (!queued) answer(failure(Code::kBusy, "too many questions wait: ask again later"));
}

Status ControlService::offer(const wire::Admit& request, std::vector<UniqueFd> descriptors) {
  const auto session = parts_.sessions.authenticate(request.session_token());
  if (!session) {
    parts_.metrics.protocol_error(ProtocolError::kBadToken);
    return session.error();
  }
  if ((*session)->local() == nullptr) return refused("only an admitted session can offer descriptors");
  return (*session)->offer(std::move(descriptors));
}

Status ControlService::poll_events(const Session& session, const wire::PollEvents& request,
                                   wire::Events* answer) const {
  const bool sees_all = session.identity().role == SessionRole::kTool && session.identity().local;
  std::size_t bytes = 0;
  const auto page = parts_.events.read(request.cursor(), [&](const EventLog::Removal& removal) {
    if (!sees_all && !session.find_namespace(removal.key.namespace_id)) return true;
    bytes += removal.blocks.size() * BlockHash::kMaxBytes;
    if (bytes > kMaxEventBytes && answer->removed_size() > 0) return false;
    auto* removed = answer->add_removed();
    const std::uint32_t hash_bytes = hash_bytes_of(removal.blocks);
    removed->set_namespace_id(removal.key.namespace_id.bytes.data(), removal.key.namespace_id.bytes.size());
    removed->set_group(removal.key.group);
    removed->set_block_hashes(join_hashes(removal.blocks, hash_bytes));
    removed->set_hash_bytes(hash_bytes);
    removed->set_reason(removal.reason);
    return true;
  });
  answer->set_next_cursor(page.next_cursor);
  answer->set_lost(page.lost);
  return Status::ok();
}

Status ControlService::snapshot(const Session& session, const wire::SnapshotQuery& request,
                                wire::Snapshot* answer) const {
  const auto id = optional_namespace(request.namespace_id());
  if (!id) return id.error();
  const bool sees_all = session.identity().role == SessionRole::kTool && session.identity().local;
  if (!sees_all && (!*id || !session.find_namespace(**id))) {
    return refused("a session sees the chunks of namespaces that it has registered");
  }
  const std::uint64_t limit = std::min(request.limit() == 0 ? kMaxSnapshotChunks : request.limit(), kMaxSnapshotChunks);
  // The cursor comes first: what leaves in between is named twice rather than never.
  answer->set_events_cursor(parts_.events.next_cursor());
  const NamespaceSet namespaces = *id ? NamespaceSet(**id) : NamespaceSet::all();
  const auto chunks = parts_.store.snapshot(namespaces, static_cast<std::size_t>(limit) + 1);
  answer->set_truncated(chunks.size() > limit);
  std::size_t hash_bytes_sum = 0;
  for (const auto& chunk : std::span(chunks).first(std::min<std::size_t>(chunks.size(), limit))) {
    for (const BlockHash& hash : chunk.blocks) hash_bytes_sum += hash.size();
    if (hash_bytes_sum > kMaxSnapshotHashBytes) {
      answer->set_truncated(true);
      break;
    }
    auto* description = answer->add_chunks();
    const std::uint32_t hash_bytes = hash_bytes_of(chunk.blocks);
    description->set_namespace_id(chunk.key.namespace_id.bytes.data(), chunk.key.namespace_id.bytes.size());
    description->set_group(chunk.key.group);
    description->set_block_hashes(join_hashes(chunk.blocks, hash_bytes));
    description->set_hash_bytes(hash_bytes);
    description->set_tokens(chunk.tokens);
    description->set_encoded_bytes(chunk.encoded_bytes);
    description->set_raw_bytes(chunk.raw_bytes);
    description->set_codec_spec(chunk.codec_spec);
    description->set_shards(chunk.shards);
  }
  return Status::ok();
}

Status ControlService::administrate(const wire::ControlRequest& request, wire::ControlReply* reply) {
  if (request.has_status()) {
    reply->mutable_status_report()->set_json(parts_.inspector.status_json(stopping_.load()));
    if (request.status().with_metrics()) reply->mutable_status_report()->set_metrics(parts_.metrics_text());
    return Status::ok();
  }
  const auto id = optional_namespace(request.explain().namespace_id());
  if (!id) return id.error();
  const auto block = block_of(request.explain().block_hash());
  if (!block) return block.error();
  for (auto& line : parts_.inspector.explain(*block, *id)) reply->mutable_explanation()->add_lines(std::move(line));
  return Status::ok();
}

Result<FlushScope> ControlService::flush_scope(const wire::FlushQuery& request) {
  const auto id = optional_namespace(request.namespace_id());
  if (!id) return failure(id.error());
  if (*id && !request.tenant().empty()) {
    return failure(Code::kInvalid, "a namespace has one tenant: name the namespace or the tenant");
  }
  FlushScope scope;
  if (*id) scope.namespaces = **id;
  if (!request.tenant().empty()) scope.namespaces = namespaces_of_tenant(request.tenant());
  if (!request.block_hash().empty()) {
    const auto block = block_of(request.block_hash());
    if (!block) return failure(block.error());
    scope.prefix = *block;
  }
  return scope;
}

/// Lower tiers may take minutes: the thread that starts it does not wait for them.
void ControlService::flush(const FlushScope& scope, wire::ControlReply answer, ControlReplyFunction reply) {
  parts_.tiers.flush(scope, [answer = std::move(answer), reply = std::move(reply)](const FlushedChunks& dram,
                                                                                   const Status& lower) mutable {
    auto* flushed = answer.mutable_flushed();
    flushed->set_chunks(dram.chunks);
    flushed->set_bytes(dram.bytes);
    flushed->set_held(dram.held);
    log_info("flushed", {{"chunks", dram.chunks}, {"bytes", dram.bytes}, {"held", dram.held}});
    const bool whole = lower || lower.code() == Code::kNotFound;
    set_status(whole ? lower : Status(lower.code(), "DRAM is flushed, a lower tier is not: " + lower.message()),
               answer.mutable_status());
    reply(std::move(answer));
  });
}

void ControlService::admit(std::uint64_t connection, const wire::Admit& request, PeerProcess peer,
                           wire::Admitted* answer, std::vector<int>* descriptors) {
  const pid_t pid = peer.pid;
  const auto session = parts_.sessions.admit(connection, request.session_token(), std::move(peer));
  if (!session) {
    if (session.error().code() == Code::kExpired) parts_.metrics.protocol_error(ProtocolError::kBadToken);
    log_warn("a process was not admitted", {{"pid", pid}, {"why", session.error().message()}});
    return set_status(session.error(), answer->mutable_status());
  }
  const auto* local = (*session)->local();
  const auto staging = (*session)->staging();
  answer->set_slab_bytes(parts_.slab_bytes);
  answer->set_index_bytes(parts_.index_bytes);
  answer->set_segment_bytes(local->segment_memory.bytes().size());
  answer->set_staging_bytes(staging->capacity_bytes());
  set_status(Status::ok(), answer->mutable_status());
  // The descriptors are sent after this returned; a session that ends meanwhile must not close them, for their numbers
  // could be another session's by then.
  last_admitted_ = *session;
  last_connection_ = connection;
  *descriptors = {parts_.slab_fd, parts_.index_fd, local->segment_memory.fd(), staging->fd(), local->doorbell.get()};
}

void ControlService::closed(std::uint64_t connection) {
  parts_.sessions.connection_closed(connection);
  if (connection == last_connection_) last_admitted_.reset();
}

}  // namespace kvern
