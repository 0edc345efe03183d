#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "connector/client.h"
#include "connector/compaction.h"
#include "connector/device_group.h"
#include "connector/prefix_matcher.h"
#include "connector/transfer_worker.h"

namespace nb = nanobind;

namespace kvern {
namespace {

using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

nb::bytes to_bytes(const BlockHash& hash) { return nb::bytes(hash.bytes().data(), hash.size()); }
nb::bytes to_bytes(const NamespaceId& id) { return nb::bytes(id.bytes.data(), id.bytes.size()); }

nb::list to_list(const std::vector<BlockHash>& hashes) {
  nb::list list;
  for (const BlockHash& hash : hashes) list.append(to_bytes(hash));
  return list;
}

std::vector<BlockHash> split_hashes(const nb::bytes& joined, std::uint32_t hash_bytes) {
  if (hash_bytes == 0 || hash_bytes > BlockHash::kMaxBytes || joined.size() % hash_bytes != 0) {
    throw std::invalid_argument("the block hashes are not a multiple of hash_bytes (1 to 64) long");
  }
  std::vector<BlockHash> hashes;
  hashes.reserve(joined.size() / hash_bytes);
  const auto* bytes = static_cast<const std::uint8_t*>(joined.data());
  for (std::size_t at = 0; at < joined.size(); at += hash_bytes) hashes.emplace_back(std::span(bytes + at, hash_bytes));
  return hashes;
}

const char* name(ClientState state) {
  switch (state) {
    case ClientState::kConnecting:
      return "connecting";
    case ClientState::kReady:
      return "ready";
    case ClientState::kRefused:
      return "refused";
    case ClientState::kClosed:
      return "closed";
  }
  return "unknown";
}

const char* name(JobEvent event) {
  switch (event) {
    case JobEvent::kGathered:
      return "gathered";
    case JobEvent::kStored:
      return "stored";
    case JobEvent::kLoaded:
      return "loaded";
    case JobEvent::kLoadFailed:
      return "load_failed";
    case JobEvent::kCompacting:
      return "compacting";
    case JobEvent::kCompactionFailed:
      return "compaction_failed";
  }
  return "unknown";
}

PagePacking packing_of(const std::string& text) {
  if (text == "rows") return PagePacking::kRows;
  if (text == "cpu_vec") return PagePacking::kCpuVec;
  if (text == "cpu_amx") return PagePacking::kCpuAmx;
  if (text == "opaque") return PagePacking::kOpaque;
  throw std::invalid_argument("packing must be rows, cpu_vec, cpu_amx or opaque, not '" + text + "'");
}

/// Holds a C++ object whose destructor waits for threads: never with the GIL held.
template <typename T>
class Holder {
 public:
  explicit Holder(std::shared_ptr<T> object) : object_(std::move(object)) {}
  Holder(const Holder&) = delete;
  Holder& operator=(const Holder&) = delete;
  ~Holder() {
    const nb::gil_scoped_release unlocked;
    object_.reset();
  }
  T& operator*() const { return *object_; }
  T* operator->() const { return object_.get(); }
  const std::shared_ptr<T>& get() const { return object_; }

 private:
  std::shared_ptr<T> object_;
};

const char* name(CompactionState state) {
  switch (state) {
    case CompactionState::kUnknown:
      return "unknown";
    case CompactionState::kPending:
      return "pending";
    case CompactionState::kReady:
      return "ready";
    case CompactionState::kFailed:
      return "failed";
  }
  return "unknown";
}

nb::dict to_dict(const CompactionInfo& info) {
  nb::dict dict;
  dict["handle"] = info.handle;
  dict["state"] = name(info.state);
  dict["reason"] = info.reason;
  dict["prompt_tokens"] = info.prompt_tokens;
  dict["slots"] = info.slots;
  dict["method"] = info.method;
  dict["namespace"] = to_bytes(info.namespace_id);
  dict["group"] = info.group;
  dict["stored_bytes"] = info.stored_bytes;
  dict["raw_bytes"] = info.raw_bytes;
  dict["error_mean"] = info.error_mean;
  dict["error_max"] = info.error_max;
  dict["layer_slots"] = info.layer_slots;
  dict["expires_at"] = info.expires_at;
  dict["owner"] = info.owner;
  dict["seconds"] = info.seconds;
  return dict;
}

std::chrono::milliseconds call_timeout(const Client& client) {
  return std::chrono::milliseconds(client.config().call_timeout_ms);
}

using PyClient = Holder<Client>;
using PyMatcher = Holder<PrefixMatcher>;
using PyWorker = Holder<TransferWorker>;

void bind_client(nb::module_& module) {
  nb::class_<PyClient>(module, "Client")
      .def(
          "__init__",
          [](PyClient* self, std::string address, bool scheduler, std::string client_name,
             std::map<std::string, std::string> attributes, std::string data_plane, std::string server_key_file,
             std::string client_key_file, bool insecure, std::string profiles, std::uint64_t staging_bytes,
             std::uint32_t connect_timeout_ms, std::uint32_t call_timeout_ms, std::uint32_t backoff_min_ms,
             std::uint32_t backoff_max_ms) {
            ClientConfig config;
            config.address = std::move(address);
            config.scheduler = scheduler;
            config.client_name = std::move(client_name);
            config.attributes = std::move(attributes);
            config.data_plane = std::move(data_plane);
            config.server_key_file = std::move(server_key_file);
            config.client_key_file = std::move(client_key_file);
            config.insecure = insecure;
            config.profiles = std::move(profiles);
            config.staging_bytes = staging_bytes;
            config.connect_timeout_ms = connect_timeout_ms;
            config.call_timeout_ms = call_timeout_ms;
            config.backoff_min_ms = backoff_min_ms;
            config.backoff_max_ms = backoff_max_ms;
            // With the GIL: may set UCX's variables, and no Python thread reads the environment meanwhile.
            new (self) PyClient(std::make_shared<Client>(std::move(config)));
          },
          nb::arg("address"), nb::kw_only(), nb::arg("scheduler"), nb::arg("client_name") = "",
          nb::arg("attributes") = std::map<std::string, std::string>(), nb::arg("data_plane") = "auto",
          nb::arg("server_key_file") = "", nb::arg("client_key_file") = "", nb::arg("insecure") = false,
          nb::arg("profiles") = "", nb::arg("staging_bytes") = 256U << 20, nb::arg("connect_timeout_ms") = 2000,
          nb::arg("call_timeout_ms") = 10'000, nb::arg("backoff_min_ms") = 100, nb::arg("backoff_max_ms") = 5000)
      .def(
          "add_namespace",
          [](PyClient& self, std::map<std::string, std::string> fields) {
            return self->add_namespace({std::move(fields)});
          },
          nb::arg("fields"), ReleaseGil())
      .def_prop_ro(
          "state", [](PyClient& self) { return std::string(name(self->state())); }, ReleaseGil())
      .def_prop_ro(
          "problem", [](PyClient& self) { return self->problem(); }, ReleaseGil())
      .def_prop_ro(
          "session_count", [](PyClient& self) { return self->session_count(); }, ReleaseGil())
      .def_prop_ro(
          "data_plane",
          [](PyClient& self) {
            const auto session = self->session();
            return session ? std::string(session->data_plane->name()) : std::string();
          },
          ReleaseGil())
      .def_prop_ro(
          "epoch",
          [](PyClient& self) {
            const auto session = self->session();
            return session ? session->epoch : 0;
          },
          ReleaseGil())
      .def(
          "namespace_id",
          [](PyClient& self, int handle) -> std::optional<nb::bytes> {
            std::optional<NamespaceId> id;
            {
              const nb::gil_scoped_release unlocked;
              if (const auto session = self->session()) id = session->namespace_id(handle);
            }
            if (!id) return std::nullopt;
            return to_bytes(*id);
          },
          nb::arg("handle"))
      .def(
          "namespace_refusal",
          [](PyClient& self, int handle) {
            const auto session = self->session();
            const bool answered = session && static_cast<std::size_t>(handle) < session->refusals.size();
            return answered ? session->refusal(handle) : std::string();
          },
          nb::arg("handle"), ReleaseGil())
      .def(
          "wait_ready", [](PyClient& self, std::uint32_t timeout_ms) { return self->wait_ready(timeout_ms); },
          nb::arg("timeout_ms"), ReleaseGil())
      .def("take_removed",
           [](PyClient& self) {
             RemovedEvents events;
             {
               const nb::gil_scoped_release unlocked;
               events = self->events().take_removed();
             }
             nb::list removed;
             for (const RemovedBlocks& blocks : events.removed) {
               removed.append(
                   nb::make_tuple(to_bytes(blocks.namespace_id), blocks.group, to_list(blocks.hashes), blocks.reason));
             }
             return nb::make_tuple(events.lost, removed);
           })
      .def(
          "request_snapshot", [](PyClient& self, int handle) { self->events().request_snapshot(handle); },
          nb::arg("handle"), ReleaseGil())
      .def("take_snapshot",
           [](PyClient& self) -> nb::object {
             std::optional<NamespaceSnapshot> snapshot;
             {
               const nb::gil_scoped_release unlocked;
               snapshot = self->events().take_snapshot();
             }
             if (!snapshot) return nb::none();
             nb::list chunks;
             for (const HeldBlocks& chunk : snapshot->chunks) {
               chunks.append(nb::make_tuple(chunk.group, to_list(chunk.hashes), chunk.tokens));
             }
             return nb::make_tuple(snapshot->handle, chunks, snapshot->complete);
           })
      .def(
          "describe",
          [](PyClient& self, const std::string& attribute, std::string value) {
            self->describe(attribute, std::move(value));
          },
          nb::arg("attribute"), nb::arg("value"), ReleaseGil())
      .def(
          "report",
          [](PyClient& self, std::uint64_t hit_tokens, std::uint64_t requested_tokens) {
            UsageReport usage;
            usage.hit_tokens = hit_tokens;
            usage.requested_tokens = requested_tokens;
            self->report(usage);
          },
          nb::arg("hit_tokens"), nb::arg("requested_tokens"), ReleaseGil())
      .def(
          "compaction",
          [](PyClient& self, const std::string& handle, std::uint32_t wait_ms, bool early) {
            CompactionInfo info;
            {
              const nb::gil_scoped_release unlocked;
              const auto session = self->session();
              info =
                  ask_compaction(session.get(), handle, std::chrono::milliseconds(wait_ms), early, call_timeout(*self));
              if (!session) info.reason = "no daemon: " + self->problem();
            }
            return to_dict(info);
          },
          nb::arg("handle"), nb::arg("wait_ms") = 0, nb::arg("early") = false)
      .def(
          "layer_slots",
          [](PyClient& self, int namespace_handle, std::uint16_t group, const nb::bytes& block_hash) {
            const auto block =
                BlockHash::from_bytes({reinterpret_cast<const std::uint8_t*>(block_hash.c_str()), block_hash.size()});
            if (!block) throw nb::value_error("a block hash has 1 to 64 bytes");
            const nb::gil_scoped_release unlocked;
            const auto session = self->session();
            const auto id = session ? session->namespace_id(namespace_handle) : std::nullopt;
            if (!id) throw std::runtime_error("no daemon: " + self->problem());
            auto slots = ask_layer_slots(*session, *id, group, *block, call_timeout(*self));
            if (!slots) throw std::runtime_error(slots.error().message());
            return *slots;
          },
          nb::arg("namespace_handle"), nb::arg("group"), nb::arg("block_hash"))
      .def(
          "delete_compaction",
          [](PyClient& self, const std::string& handle) {
            const auto session = self->session();
            if (!session) throw std::runtime_error("no daemon: " + self->problem());
            const auto deleted = delete_compaction(*session, handle, call_timeout(*self));
            if (!deleted) throw std::runtime_error(deleted.error().message());
            return *deleted;
          },
          nb::arg("handle"), ReleaseGil())
      .def("compactions",
           [](PyClient& self) {
             Result<std::vector<CompactionInfo>> infos;
             {
               const nb::gil_scoped_release unlocked;
               const auto session = self->session();
               infos = session ? list_compactions(*session, call_timeout(*self))
                               : failure(Code::kUnavailable, "no daemon: " + self->problem());
             }
             if (!infos) throw std::runtime_error(infos.error().message());
             nb::list list;
             for (const CompactionInfo& info : *infos) list.append(to_dict(info));
             return list;
           })
      .def(
          "close", [](PyClient& self) { self->close(); }, ReleaseGil());
}

void bind_matcher(nb::module_& module) {
  nb::class_<PyMatcher>(module, "PrefixMatcher")
      .def(
          "__init__",
          [](PyMatcher* self, const PyClient& client, std::uint32_t block_tokens, std::uint32_t chunk_blocks,
             const std::vector<std::pair<std::uint16_t, std::uint32_t>>& groups, std::uint32_t remote_deadline_ms,
             std::uint32_t prefetch_deadline_ms) {
            MatcherConfig config;
            config.block_tokens = block_tokens;
            config.chunk_blocks = chunk_blocks;
            for (const auto& [group, window] : groups) config.groups.push_back({group, window});
            config.remote_deadline_ms = remote_deadline_ms;
            config.prefetch_deadline_ms = prefetch_deadline_ms;
            new (self) PyMatcher(std::make_shared<PrefixMatcher>(client.get(), std::move(config)));
          },
          nb::arg("client"), nb::kw_only(), nb::arg("block_tokens"), nb::arg("chunk_blocks"), nb::arg("groups"),
          nb::arg("remote_deadline_ms") = 50, nb::arg("prefetch_deadline_ms") = 2000)
      .def(
          "match",
          [](PyMatcher& self, const std::string& request, int handle, const nb::bytes& hashes, std::uint32_t hash_bytes,
             std::uint32_t local_tokens, std::uint32_t max_tokens, std::uint32_t prompt_tokens,
             const std::string& traceparent, std::uint32_t patience_ms) {
            const std::string_view view(static_cast<const char*>(hashes.data()), hashes.size());
            PrefixMatcher::Answer answer;
            {
              const nb::gil_scoped_release unlocked;
              answer = self->match(request, handle, view, hash_bytes, local_tokens, max_tokens, prompt_tokens,
                                   traceparent, std::chrono::milliseconds(patience_ms));
            }
            return std::make_tuple(answer.known, answer.tokens, std::move(answer.reason));
          },
          nb::arg("request"), nb::arg("namespace"), nb::arg("hashes"), nb::arg("hash_bytes"), nb::arg("local_tokens"),
          nb::arg("max_tokens"), nb::arg("prompt_tokens"), nb::arg("traceparent") = "", nb::arg("patience_ms") = 0)
      .def(
          "retain",
          [](PyMatcher& self, int handle, std::uint16_t group, const nb::bytes& hashes, std::uint32_t hash_bytes,
             std::uint64_t seconds) {
            self->retain(handle, group, {hashes.c_str(), hashes.size()}, hash_bytes, seconds);
          },
          nb::arg("namespace"), nb::arg("group"), nb::arg("hashes"), nb::arg("hash_bytes"), nb::arg("seconds"))
      .def(
          "release", [](PyMatcher& self, const std::string& request) { self->release(request); }, nb::arg("request"),
          ReleaseGil())
      .def_prop_ro(
          "claims", [](PyMatcher& self) { return self->claims(); }, ReleaseGil());
}

using LayerTuple =
    std::tuple<std::uintptr_t, std::size_t, std::uint32_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;

void bind_worker(nb::module_& module) {
  nb::class_<PyWorker>(module, "TransferWorker")
      .def(
          "__init__",
          [](PyWorker* self, const PyClient& client, std::uint32_t threads, std::uint32_t max_queued_jobs,
             std::uint32_t load_timeout_ms, std::uint32_t store_timeout_ms) {
            const WorkerConfig config{threads, max_queued_jobs, load_timeout_ms, store_timeout_ms};
            new (self) PyWorker(std::make_shared<TransferWorker>(client.get(), config));
          },
          nb::arg("client"), nb::kw_only(), nb::arg("threads") = 1, nb::arg("max_queued_jobs") = 4096,
          nb::arg("load_timeout_ms") = 30'000, nb::arg("store_timeout_ms") = 30'000)
      .def(
          "register_group",
          [](PyWorker& self, std::uint16_t group, const std::string& packing, const std::string& dtype,
             std::uint32_t block_tokens, std::uint32_t pages_per_block, std::uint32_t heads, std::uint32_t head_begin,
             std::uint32_t model_heads, std::uint32_t layer_begin, std::uint32_t group_layers, std::uint32_t key_dim,
             std::uint32_t value_dim, const std::vector<LayerTuple>& layers, bool on_device) {
            const auto type = dtype_from_name(dtype);
            if (!type) {
              throw std::invalid_argument("dtype must be float32, float16, bfloat16 or opaque, not '" + dtype + "'");
            }
            GroupPages pages;
            pages.group = group;
            pages.packing = packing_of(packing);
            pages.dtype = *type;
            pages.block_tokens = block_tokens;
            pages.pages_per_block = pages_per_block;
            pages.heads = heads;
            pages.head_begin = head_begin;
            pages.model_heads = model_heads;
            pages.layer_begin = layer_begin;
            pages.group_layers = group_layers;
            pages.key_dim = key_dim;
            pages.value_dim = value_dim;
            for (const auto& [address, reachable, count, page, head, token, value] : layers) {
              pages.layers.push_back(
                  {reinterpret_cast<std::byte*>(address), reachable, count, page, head, token, value});
            }
            if (on_device && !pages.layers.empty()) {
              auto device = cuda_engine_device(pages.layers.front().base);
              if (!device) throw std::invalid_argument(device.error().message());
              pages.device = std::move(*device);
            }
            if (const Status status = self->register_group(std::move(pages)); !status) {
              throw std::invalid_argument(status.message());
            }
          },
          nb::kw_only(), nb::arg("group"), nb::arg("packing"), nb::arg("dtype"), nb::arg("block_tokens"),
          nb::arg("pages_per_block"), nb::arg("heads"), nb::arg("head_begin"), nb::arg("model_heads"),
          nb::arg("layer_begin"), nb::arg("group_layers"), nb::arg("key_dim"), nb::arg("value_dim"), nb::arg("layers"),
          nb::arg("on_device") = false, ReleaseGil())
      .def(
          "submit_store",
          [](PyWorker& self, std::uint64_t id, int handle, std::uint16_t group, std::string codec,
             std::uint32_t hash_bytes,
             std::vector<std::tuple<nb::bytes, std::vector<std::uint32_t>, std::uint64_t, nb::bytes>> chunks,
             std::uintptr_t ready_event, std::string traceparent) {
            StoreJob job;
            job.traceparent = std::move(traceparent);
            job.ready_event = ready_event;
            job.id = id;
            job.namespace_handle = handle;
            job.group = group;
            job.codec_spec = std::move(codec);
            for (auto& [hashes, blocks, position, previous] : chunks) {
              job.chunks.push_back(
                  {split_hashes(hashes, hash_bytes), std::move(blocks), position,
                   BlockHash::from_bytes({static_cast<const std::uint8_t*>(previous.data()), previous.size()})});
            }
            const nb::gil_scoped_release unlocked;
            self->submit_store(std::move(job));
          },
          nb::arg("job"), nb::arg("namespace"), nb::arg("group"), nb::arg("codec"), nb::arg("hash_bytes"),
          nb::arg("chunks"), nb::arg("ready_event") = 0, nb::arg("traceparent") = "")
      .def(
          "submit_load",
          [](PyWorker& self, std::uint64_t id, int handle, std::uint32_t hash_bytes,
             std::vector<std::tuple<std::uint16_t, std::uint32_t, nb::bytes, std::vector<std::uint32_t>>> pieces,
             std::uintptr_t ready_event, std::string traceparent) {
            LoadJob job;
            job.traceparent = std::move(traceparent);
            job.ready_event = ready_event;
            job.id = id;
            job.namespace_handle = handle;
            for (auto& [group, blocks_before, hashes, blocks] : pieces) {
              job.pieces.push_back({group, blocks_before, split_hashes(hashes, hash_bytes), std::move(blocks)});
            }
            const nb::gil_scoped_release unlocked;
            self->submit_load(std::move(job));
          },
          nb::arg("job"), nb::arg("namespace"), nb::arg("hash_bytes"), nb::arg("pieces"), nb::arg("ready_event") = 0,
          nb::arg("traceparent") = "")
      .def(
          "submit_compaction",
          [](PyWorker& self, std::uint64_t id, int handle_of_namespace, std::string handle, std::string spec,
             std::uint16_t group, std::uint32_t prompt_tokens, std::uint32_t slots, std::int64_t expires_at,
             std::uint32_t hash_bytes, const nb::bytes& source_hashes, const nb::bytes& slot_hashes,
             std::uint32_t query_rows, std::uint32_t query_heads,
             const std::vector<nb::ndarray<nb::ro, nb::device::cpu, nb::c_contig>>& queries, std::string traceparent) {
            CompactionJob job;
            job.traceparent = std::move(traceparent);
            job.id = id;
            job.namespace_handle = handle_of_namespace;
            job.handle = std::move(handle);
            job.spec = std::move(spec);
            job.group = group;
            job.prompt_tokens = prompt_tokens;
            job.slots = slots;
            job.expires_at = expires_at;
            job.hash_bytes = hash_bytes;
            job.source_hashes = split_hashes(source_hashes, hash_bytes);
            job.slot_hashes = split_hashes(slot_hashes, hash_bytes);
            job.query_rows = query_rows;
            job.query_heads = query_heads;
            for (const auto& layer : queries) {
              job.queries.emplace_back(static_cast<const char*>(layer.data()), layer.nbytes());
            }
            const nb::gil_scoped_release unlocked;
            self->submit_compaction(std::move(job));
          },
          nb::arg("job"), nb::arg("namespace"), nb::arg("handle"), nb::arg("spec"), nb::arg("group"),
          nb::arg("prompt_tokens"), nb::arg("slots"), nb::arg("expires_at"), nb::arg("hash_bytes"),
          nb::arg("source_hashes"), nb::arg("slot_hashes"), nb::arg("query_rows"), nb::arg("query_heads"),
          nb::arg("queries"), nb::arg("traceparent") = "")
      .def("poll",
           [](PyWorker& self) {
             std::vector<JobResult> results;
             {
               const nb::gil_scoped_release unlocked;
               results = self->poll();
             }
             nb::list list;
             for (JobResult& result : results) {
               list.append(nb::make_tuple(result.id, name(result.event), result.stored_chunks, result.reason,
                                          result.seconds, result.raw_bytes, result.encoded_bytes));
             }
             return list;
           })
      .def(
          "wait_gathered",
          [](PyWorker& self, const std::vector<std::uint64_t>& jobs, std::uint32_t timeout_ms) {
            return self->wait_gathered(jobs, timeout_ms);
          },
          nb::arg("jobs"), nb::arg("timeout_ms"), ReleaseGil())
      .def(
          "cancel_load", [](PyWorker& self, std::uint64_t job) { self->cancel_load(job); }, nb::arg("job"),
          ReleaseGil())
      .def(
          "drain", [](PyWorker& self, std::uint32_t timeout_ms) { return self->drain(timeout_ms); },
          nb::arg("timeout_ms"), ReleaseGil())
      .def_prop_ro(
          "in_flight", [](PyWorker& self) { return self->in_flight(); }, ReleaseGil());
}

SlotLayout slot_layout_of(std::string_view name) {
  for (const SlotLayout layout : {SlotLayout::kRectangular, SlotLayout::kPool, SlotLayout::kShift}) {
    if (slot_layout_name(layout) == name) return layout;
  }
  throw std::invalid_argument("there is no slot layout " + std::string(name));
}

void bind_compaction(nb::module_& module) {
  module.def(
      "compaction_plan",
      [](const std::string& spec, std::uint32_t prompt_tokens, const std::string& layout, std::uint32_t page_tokens) {
        auto terms = compaction_terms(spec, prompt_tokens, slot_layout_of(layout), page_tokens);
        if (!terms) throw std::invalid_argument(terms.error().message());
        return std::make_tuple(std::move(terms->spec), terms->slots, terms->query_rows,
                               std::string(slot_layout_name(terms->layout)));
      },
      nb::arg("spec"), nb::arg("prompt_tokens"), nb::arg("layout") = "rectangular", nb::arg("page_tokens") = 0);
  module.def(
      "rotation_frequencies",
      [](const std::string& rotation) {
        auto turns = key_rotation(rotation);
        if (!turns) throw std::invalid_argument(turns.error().message());
        return std::make_pair(turns->interleaved, std::move(turns->frequencies));
      },
      nb::arg("rotation"));
  module.def(
      "slot_pages",
      [](const std::string& layout, const std::vector<std::uint32_t>& pages_of_layers, std::uint32_t blocks) {
        auto places = slot_places(slot_layout_of(layout), pages_of_layers, blocks);
        if (!places) throw std::invalid_argument(places.error().message());
        return std::move(*places);
      },
      nb::arg("layout"), nb::arg("pages_of_layers"), nb::arg("blocks"));
}

}  // namespace
}  // namespace kvern

NB_MODULE(_kvern, module) {
  module.attr("__version__") = KVERN_VERSION;
  module.attr("PROTOCOL_VERSION") = kvern::kProtocolVersion;
  kvern::bind_compaction(module);
  kvern::bind_client(module);
  kvern::bind_matcher(module);
  kvern::bind_worker(module);
}
