#include "store/s3_tier.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <deque>
#include <stdexcept>
#include <utility>

#include "store/byte_parts.h"
#include "store/event_loop.h"
#include "store/http_client.h"
#include "store/remote_key.h"
#include "store/stream_socket.h"
#include "store/transfer_queue.h"
#include "store/write_budget.h"

namespace kvern {
namespace {

constexpr std::uint64_t kMinPartBytes = std::uint64_t{5} << 20;  // S3's own limits
constexpr std::uint64_t kMaxPartBytes = std::uint64_t{5} << 30;
constexpr std::uint64_t kMaxParts = 10'000;
constexpr std::string_view kPageKeys = "1000";

Status closing() { return {Code::kUnavailable, "the s3 tier is closing"}; }
Status cancelled() { return {Code::kExpired, "the operation was cancelled"}; }
Status busy() { return {Code::kBusy, "too many operations of the s3 tier are under way"}; }

std::optional<std::uint64_t> number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

bool good(const Result<HttpResponse>& response) { return response && response->status / 100 == 2; }

/// Of an answer that should have been 2xx.
Status trouble_of(const Result<HttpResponse>& response, const char* what) {
  if (!response) return response.error();
  return {Code::kUnavailable, std::string("S3 answers ") + what + " with " + std::to_string(response->status)};
}

}  // namespace

Status S3TierConfig::validate() const {
  if (auto status = bucket.validate(); !status) return status;
  if (auto status = check_remote_prefix(prefix); !status) return status;
  if (part_bytes < kMinPartBytes || part_bytes > kMaxPartBytes) {
    return {Code::kInvalid, "part_bytes must be between 5 MiB and 5 GiB"};
  }
  if (probes_per_cell == 0 || parts_at_once == 0 || concurrent_probes == 0 || concurrent_reads == 0 ||
      concurrent_writes == 0 || concurrent_erases == 0 || max_outstanding == 0) {
    return {Code::kInvalid, "probes_per_cell, parts_at_once, max_outstanding and the concurrencies must be at least 1"};
  }
  if (write_queue_bytes == 0 || write_queue_age_ns <= 0) {
    return {Code::kInvalid, "write_queue_bytes and write_queue_age_ns must be above 0"};
  }
  if (connect_timeout_ns <= 0 || find_timeout_ns <= 0 || read_timeout_ns <= 0 || write_timeout_ns <= 0 ||
      attempt_timeout_ns <= 0 || retries.first_pause_ns <= 0 || retries.max_pause_ns < retries.first_pause_ns) {
    return {Code::kInvalid, "timeouts and pauses must be above 0, and max_pause_ns not below first_pause_ns"};
  }
  return breaker.validate();
}

/// Everything but the first few members is touched by the loop's thread alone.
struct S3Tier::Work {
  using OnCancel = std::stop_callback<std::function<void()>>;
  struct Find {
    std::vector<CellQuery> cells;
    std::stop_token token;
    FindDone done;
    std::unique_ptr<OnCancel> on_cancel = {};
    std::uint64_t timer = 0;
    std::vector<std::shared_ptr<S3Call>> calls = {};  ///< under way
    std::vector<TierHit> hits = {};
    std::size_t unanswered = 0;  ///< cells
    bool any_answer = false;
    Status trouble = {};
    bool ended = false;
  };
  struct Probe {
    std::shared_ptr<Find> find;
    std::size_t cell = 0;
    std::size_t tried = 0;  ///< blocks from the end of the cell that are known to be none's last one
  };
  struct Read {
    TierHit hit;
    std::uint64_t offset = 0;
    std::span<std::byte> into;
    std::stop_token token;
    Done done;
    std::unique_ptr<OnCancel> on_cancel = {};
    std::uint64_t turn = 0;  ///< in the queue
    std::shared_ptr<S3Call> call = {};
    bool ended = false;
  };
  struct Write {
    TierObject object;
    Done done;
    std::string key = {};
    // Of an upload in parts:
    std::string upload = {};
    std::vector<std::string> etags = {};
    std::size_t next_part = 0, parts_under_way = 0;
    Status trouble = {};
  };
  struct Erase {
    std::vector<std::string> keys;
    Done done;
    std::size_t next = 0, under_way = 0;
    Status trouble = {};
  };
  struct Listed {
    std::string key;
    std::uint64_t bytes = 0;
  };
  struct Listing {
    std::string prefix;
    std::function<void(std::vector<Listed> page, Done taken)> take;
    Done done;
    std::string continuation = {};
  };

  Work(S3TierConfig tier_config, const Clock& clock);
  void close();
  std::shared_ptr<S3Call> make_call(std::string method, std::string key, std::int64_t timeout_ns) const;

  void start(const std::shared_ptr<Find>& find);
  void pump_probes();
  void send(const Probe& probe);
  void probed(Probe probe, std::size_t block, const Result<HttpResponse>& response);
  void finish(Find& find, Result<std::vector<TierHit>> hits);
  static Result<std::vector<TierHit>> known(Find& find);

  void start(const std::shared_ptr<Read>& read);
  void send(const std::shared_ptr<Read>& read);
  static Status judge(const Read& read, const Result<HttpResponse>& response);
  void finish(Read& read, Status status);

  void start(const std::shared_ptr<Write>& write);
  void send(const std::shared_ptr<Write>& write);
  void put(const std::shared_ptr<Write>& write);
  void put_in_parts(const std::shared_ptr<Write>& write);
  void put_parts(const std::shared_ptr<Write>& write);
  void complete(const std::shared_ptr<Write>& write);
  void abort(const std::shared_ptr<Write>& write);
  void sent(Write& write, Status status);
  void finish(Write& write, Status status);
  std::uint64_t part_bytes_of(std::uint64_t object_bytes) const;

  void go_on(const std::shared_ptr<Erase>& erase);
  void go_on(const std::shared_ptr<Listing>& listing);

  std::string key_of(const ChunkKey& key) const { return remote_object_name(config.prefix, key); }

  const S3TierConfig config;
  WriteBudget budget;
  std::atomic<std::uint32_t> outstanding{0};  ///< finds and reads
  EventLoop loop;
  HttpClient http;
  S3Client client;
  bool closed = false;
  std::deque<Probe> waiting_probes;
  std::size_t probes_under_way = 0;
  TransferQueue queue;
};

S3Tier::Work::Work(S3TierConfig tier_config, const Clock& clock)
    : config(std::move(tier_config)),
      budget(config.write_queue_bytes),
      loop("kvern-s3", clock),
      http(loop, {.ca_file = config.ca_file,
                  .proxy = config.proxy,
                  .max_connections = config.concurrent_probes + config.concurrent_reads +
                                     config.concurrent_writes * config.parts_at_once + config.concurrent_erases,
                  .connect_timeout_ns = config.connect_timeout_ns}),
      client(loop, http, config.bucket, config.retries),
      queue(loop, "S3", {config.concurrent_reads, config.concurrent_writes, config.write_queue_age_ns}) {}

void S3Tier::Work::close() {
  closed = true;
  queue.close(closing());
  client.close();
  for (auto& probe : std::exchange(waiting_probes, {})) finish(*probe.find, failure(closing()));
}

std::shared_ptr<S3Call> S3Tier::Work::make_call(std::string method, std::string key, std::int64_t timeout_ns) const {
  auto call = std::make_shared<S3Call>();
  call->method = std::move(method);
  call->key = std::move(key);
  call->attempt_timeout_ns = std::min(config.attempt_timeout_ns, timeout_ns);
  call->deadline_ns = loop.now_ns() + timeout_ns;
  return call;
}

// ---- find: a HEAD for each cell's last block, and for the one before it where there is none, ...

void S3Tier::Work::start(const std::shared_ptr<Find>& find) {
  if (closed) return finish(*find, failure(closing()));
  if (find->token.stop_requested()) return finish(*find, failure(cancelled()));
  find->hits.resize(find->cells.size());
  find->unanswered = find->cells.size();
  if (find->cells.empty()) return finish(*find, std::move(find->hits));
  find->on_cancel = std::make_unique<OnCancel>(find->token, [this, weak = std::weak_ptr(find)] {
    static_cast<void>(loop.post([this, weak] {
      if (const auto late = weak.lock()) finish(*late, failure(cancelled()));
      pump_probes();
    }));
  });
  find->timer = loop.at(loop.now_ns() + config.find_timeout_ns, [this, weak = std::weak_ptr(find)] {
    const auto late = weak.lock();
    if (late == nullptr) return;
    late->timer = 0;
    if (late->trouble) late->trouble = {Code::kUnavailable, "S3 did not answer in time"};
    finish(*late, known(*late));
    pump_probes();
  });
  for (std::size_t cell = 0; cell < find->cells.size(); ++cell) waiting_probes.push_back({find, cell, 0});
  pump_probes();
}

void S3Tier::Work::pump_probes() {
  while (!closed && probes_under_way < config.concurrent_probes && !waiting_probes.empty()) {
    const Probe probe = std::move(waiting_probes.front());
    waiting_probes.pop_front();
    if (!probe.find->ended) send(probe);
  }
}

void S3Tier::Work::send(const Probe& probe) {
  const CellQuery& query = probe.find->cells[probe.cell];
  const std::size_t block = query.blocks.size() - 1 - probe.tried;
  auto call = make_call("HEAD", key_of({query.namespace_id, query.group, query.blocks[block]}), config.find_timeout_ns);
  call->done = [this, probe, block, raw = call.get()](const Result<HttpResponse>& response) {
    --probes_under_way;
    std::erase_if(probe.find->calls, [raw](const auto& each) { return each.get() == raw; });
    probed(probe, block, response);
    pump_probes();
  };
  ++probes_under_way;
  probe.find->calls.push_back(call);
  client.call(call);
}

void S3Tier::Work::probed(Probe probe, std::size_t block, const Result<HttpResponse>& response) {
  Find& find = *probe.find;
  const CellQuery& query = find.cells[probe.cell];
  if (!response) {
    find.trouble = response.error();
  } else {
    find.any_answer = true;
    const auto bytes = number(response->header("content-length"));
    if (good(response) && bytes && *bytes > 0 && *bytes % kTierAlignment == 0) {
      find.hits[probe.cell] = {.key = {query.namespace_id, query.group, query.blocks[block]},
                               .bytes = *bytes,
                               .blocks = static_cast<std::uint32_t>(block + 1)};
    } else if (++probe.tried < std::min<std::size_t>(config.probes_per_cell, query.blocks.size())) {
      waiting_probes.push_back(std::move(probe));
      return;
    }
  }
  if (--find.unanswered == 0) finish(find, known(find));
}

/// What the answers so far say; the trouble where there are none.
Result<std::vector<TierHit>> S3Tier::Work::known(Find& find) {
  if (!find.any_answer) return failure(find.trouble);
  return std::move(find.hits);
}

void S3Tier::Work::finish(Find& find, Result<std::vector<TierHit>> hits) {
  if (std::exchange(find.ended, true)) return;
  find.on_cancel.reset();
  if (find.timer != 0) loop.cancel(find.timer);
  for (const auto& call : std::exchange(find.calls, {})) {
    client.cancel(call);
    --probes_under_way;
  }
  outstanding.fetch_sub(1);
  const auto done = std::move(find.done);
  done(std::move(hits));
}

// ---- read: one range

void S3Tier::Work::start(const std::shared_ptr<Read>& read) {
  if (read->token.stop_requested()) return finish(*read, cancelled());
  read->on_cancel = std::make_unique<OnCancel>(read->token, [this, weak = std::weak_ptr(read)] {
    static_cast<void>(loop.post([this, weak] {
      const auto late = weak.lock();
      if (late == nullptr || late->ended) return;
      if (!queue.withdraw(late->turn)) {
        client.cancel(std::exchange(late->call, nullptr));
        queue.read_ended();
      }
      finish(*late, cancelled());
    }));
  });
  read->turn = queue.read([this, read] { send(read); }, [this, read](Status why) { finish(*read, std::move(why)); });
}

void S3Tier::Work::send(const std::shared_ptr<Read>& read) {
  auto call = make_call("GET", key_of(read->hit.key), config.read_timeout_ns);
  call->headers["range"] =
      "bytes=" + std::to_string(read->offset) + "-" + std::to_string(read->offset + read->into.size() - 1);
  call->into = read->into;
  call->done = [this, read](const Result<HttpResponse>& response) {
    read->call.reset();
    finish(*read, judge(*read, response));
    queue.read_ended();
  };
  read->call = call;
  client.call(call);
}

Status S3Tier::Work::judge(const Read& read, const Result<HttpResponse>& response) {
  if (!response) return response.error();
  if (response->status == 404) return {Code::kNotFound, "the object is gone"};
  const std::string_view range = response->header("content-range");  // "bytes 0-4095/8192"
  const std::size_t slash = range.rfind('/');
  const auto total = slash == std::string_view::npos ? std::nullopt : number(range.substr(slash + 1));
  if (response->status == 416 || (total && *total != read.hit.bytes)) {
    return {Code::kNotFound, "the object was replaced by another one"};
  }
  if (response->status != 206 || !total) {
    return {Code::kUnavailable, "the S3 server does not answer range requests with ranges"};
  }
  if (response->received_in_place != read.into.size()) {
    return {Code::kUnavailable, "S3 sent " + std::to_string(response->received_in_place) + " of " +
                                    std::to_string(read.into.size()) + " bytes"};
  }
  return Status::ok();
}

void S3Tier::Work::finish(Read& read, Status status) {
  if (std::exchange(read.ended, true)) return;
  read.on_cancel.reset();
  outstanding.fetch_sub(1);
  const auto done = std::move(read.done);
  done(std::move(status));
}

// ---- write

void S3Tier::Work::start(const std::shared_ptr<Write>& write) {
  queue.write([this, write] { send(write); }, [this, write](Status why) { finish(*write, std::move(why)); });
}

/// Looks first: what another daemon has stored already need not cross the network again.
void S3Tier::Work::send(const std::shared_ptr<Write>& write) {
  write->key = key_of(write->object.key);
  auto call = make_call("HEAD", write->key, config.write_timeout_ns);
  call->done = [this, write](const Result<HttpResponse>& response) {
    if (!response) return sent(*write, response.error());
    const std::uint64_t bytes = write->object.bytes();
    if (good(response) && number(response->header("content-length")) == bytes) return sent(*write, Status::ok());
    if (bytes <= config.part_bytes) return put(write);
    put_in_parts(write);
  };
  client.call(call);
}

void S3Tier::Work::put(const std::shared_ptr<Write>& write) {
  auto call = make_call("PUT", write->key, config.write_timeout_ns);
  call->headers["content-type"] = "application/octet-stream";
  call->body = write->object.pieces;
  call->hold = write->object.hold;
  call->done = [this, write](const Result<HttpResponse>& response) {
    sent(*write, good(response) ? Status::ok() : trouble_of(response, "an upload"));
  };
  client.call(call);
}

std::uint64_t S3Tier::Work::part_bytes_of(std::uint64_t object_bytes) const {
  return std::max(config.part_bytes, (object_bytes + kMaxParts - 1) / kMaxParts);
}

void S3Tier::Work::put_in_parts(const std::shared_ptr<Write>& write) {
  auto call = make_call("POST", write->key, config.write_timeout_ns);
  call->query = {{"uploads", ""}};
  call->headers["content-type"] = "application/octet-stream";
  call->done = [this, write](const Result<HttpResponse>& response) {
    if (!good(response)) return sent(*write, trouble_of(response, "the start of an upload"));
    auto ids = xml_texts(response->text, "UploadId");
    if (ids.size() != 1 || ids.front().empty()) {
      return sent(*write, {Code::kUnavailable, "S3 starts an upload without naming it"});
    }
    write->upload = std::move(ids.front());
    const std::uint64_t part = part_bytes_of(write->object.bytes());
    write->etags.resize(static_cast<std::size_t>((write->object.bytes() + part - 1) / part));
    put_parts(write);
  };
  client.call(call);
}

void S3Tier::Work::put_parts(const std::shared_ptr<Write>& write) {
  const std::uint64_t part_bytes = part_bytes_of(write->object.bytes());
  while (write->trouble && write->parts_under_way < config.parts_at_once && write->next_part < write->etags.size()) {
    const std::size_t part = write->next_part++;
    auto call = make_call("PUT", write->key, config.write_timeout_ns);
    call->query = {{"partNumber", std::to_string(part + 1)}, {"uploadId", write->upload}};
    call->body = slice(write->object.pieces, part * part_bytes, part_bytes);
    call->hold = write->object.hold;
    call->done = [this, write, part](const Result<HttpResponse>& response) {
      --write->parts_under_way;
      if (good(response)) {
        write->etags[part] = response->header("etag");
      } else {
        write->trouble = trouble_of(response, "a part of an upload");
      }
      put_parts(write);
    };
    ++write->parts_under_way;
    client.call(call);
  }
  if (write->parts_under_way > 0) return;
  if (!write->trouble) return abort(write);
  if (write->next_part == write->etags.size()) complete(write);
}

void S3Tier::Work::complete(const std::shared_ptr<Write>& write) {
  const auto body = std::make_shared<std::string>("<CompleteMultipartUpload>");
  for (std::size_t i = 0; i < write->etags.size(); ++i) {
    *body += "<Part><PartNumber>" + std::to_string(i + 1) + "</PartNumber><ETag>" + xml_escape(write->etags[i]) +
             "</ETag></Part>";
  }
  *body += "</CompleteMultipartUpload>";
  auto call = make_call("POST", write->key, config.write_timeout_ns);
  call->query = {{"uploadId", write->upload}};
  call->headers["content-type"] = "application/xml";
  call->body = {std::as_bytes(std::span(*body))};
  call->hold = body;
  call->done = [this, write](const Result<HttpResponse>& response) {
    // S3 begins to answer with 200 before it knows whether it succeeds.
    const auto errors = good(response) ? xml_texts(response->text, "Code") : std::vector<std::string>();
    if (good(response) && errors.empty()) return sent(*write, Status::ok());
    write->trouble = errors.empty() ? trouble_of(response, "the end of an upload")
                                    : Status(Code::kUnavailable, "S3 ends an upload with " + errors.front());
    abort(write);
  };
  client.call(call);
}

/// The parts would be kept, and paid for, otherwise. Nobody waits for it.
void S3Tier::Work::abort(const std::shared_ptr<Write>& write) {
  auto call = make_call("DELETE", write->key, config.write_timeout_ns);
  call->query = {{"uploadId", write->upload}};
  call->done = [](const Result<HttpResponse>&) {};
  client.call(call);
  sent(*write, write->trouble);
}

void S3Tier::Work::sent(Write& write, Status status) {
  finish(write, std::move(status));
  queue.write_ended();
}

void S3Tier::Work::finish(Write& write, Status status) {
  write.object.hold.reset();
  const auto done = std::move(write.done);
  done(std::move(status));
  budget.give_back(write.object.bytes());  // last: who drains has heard of it
}

// ---- erase

void S3Tier::Work::go_on(const std::shared_ptr<Erase>& erase) {
  if (closed && erase->next < erase->keys.size()) {
    erase->trouble = closing();
    erase->next = erase->keys.size();
  }
  while (erase->under_way < config.concurrent_erases && erase->next < erase->keys.size()) {
    auto call = make_call("DELETE", erase->keys[erase->next++], config.write_timeout_ns);
    call->done = [this, erase](const Result<HttpResponse>& response) {
      --erase->under_way;
      if (!good(response) && !(response && response->status == 404))
        erase->trouble = trouble_of(response, "a deletion");
      go_on(erase);
    };
    ++erase->under_way;
    client.call(call);
  }
  if (erase->under_way > 0 || erase->next < erase->keys.size() || !erase->done) return;
  std::exchange(erase->done, nullptr)(erase->trouble);
}

// ---- all keys that begin alike, a page at a time

void S3Tier::Work::go_on(const std::shared_ptr<Listing>& listing) {
  if (closed) return listing->done(closing());
  auto call = make_call("GET", "", config.write_timeout_ns);
  call->query = {{"list-type", "2"}, {"prefix", listing->prefix}, {"max-keys", std::string(kPageKeys)}};
  if (!listing->continuation.empty()) call->query.emplace_back("continuation-token", listing->continuation);
  call->done = [this, listing](const Result<HttpResponse>& response) {
    if (!good(response)) return listing->done(trouble_of(response, "a listing"));
    const auto next = xml_texts(response->text, "NextContinuationToken");
    listing->continuation = next.empty() ? std::string() : next.front();
    const auto keys = xml_texts(response->text, "Key");
    const auto sizes = xml_texts(response->text, "Size");
    if (keys.size() != sizes.size()) {
      return listing->done({Code::kUnavailable, "S3 lists keys without their sizes"});
    }
    std::vector<Listed> page;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (keys[i].starts_with(listing->prefix)) page.push_back({keys[i], number(sizes[i]).value_or(0)});
    }
    listing->take(std::move(page), [this, listing](const Status& status) {
      if (!status || listing->continuation.empty()) return listing->done(status);
      go_on(listing);
    });
  };
  client.call(call);
}

// ---- the tier

S3Tier::S3Tier(S3TierConfig config, const Clock& clock, TierObserver* observer)
    : Tier("s3", config.breaker, clock, observer) {
  if (const auto status = config.validate(); !status) throw std::invalid_argument("s3: " + status.message());
  // Or every request would fail for it, one by one.
  if (!config.ca_file.empty()) {
    const auto tls = TlsContext::create(config.ca_file, "", "");
    if (!tls) throw std::invalid_argument("s3: " + tls.error().message());
  }
  work_ = std::make_unique<Work>(std::move(config), clock);
}

S3Tier::~S3Tier() {
  work_->loop.stop([this] { work_->close(); });
}

void S3Tier::do_find(std::vector<CellQuery> cells, std::stop_token cancel, FindDone done) {
  if (work_->outstanding.fetch_add(1) >= work_->config.max_outstanding) {
    work_->outstanding.fetch_sub(1);
    return done(failure(busy()));
  }
  auto find = std::make_shared<Work::Find>(
      Work::Find{.cells = std::move(cells), .token = std::move(cancel), .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), find] { work->start(find); })) find->done(failure(closing()));
}

void S3Tier::do_read(const TierHit& hit, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
                     Done done) {
  if (work_->outstanding.fetch_add(1) >= work_->config.max_outstanding) {
    work_->outstanding.fetch_sub(1);
    return done(busy());
  }
  auto read = std::make_shared<Work::Read>(
      Work::Read{.hit = hit, .offset = offset, .into = into, .token = std::move(cancel), .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), read] { work->start(read); })) read->done(closing());
}

void S3Tier::do_write(TierObject object, Done done) {
  if (!work_->budget.take(object.bytes())) return done({Code::kBusy, "the s3 tier's write queue is full"});
  auto write = std::make_shared<Work::Write>(Work::Write{.object = std::move(object), .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), write] { work->start(write); })) work_->finish(*write, closing());
}

void S3Tier::do_erase(std::vector<ChunkKey> keys, Done done) {
  auto erase = std::make_shared<Work::Erase>(Work::Erase{.keys = {}, .done = std::move(done)});
  for (const auto& key : keys) erase->keys.push_back(work_->key_of(key));
  if (!work_->loop.post([work = work_.get(), erase] { work->go_on(erase); })) erase->done(closing());
}

void S3Tier::do_erase_all(const NamespaceSet& namespaces, Done done) {
  auto listing = std::make_shared<Work::Listing>(
      Work::Listing{.prefix = remote_names_of(work_->config.prefix, namespaces),
                    .take =
                        [work = work_.get()](std::vector<Work::Listed> page, Done taken) {
                          auto erase = std::make_shared<Work::Erase>(Work::Erase{.keys = {}, .done = std::move(taken)});
                          for (auto& each : page) erase->keys.push_back(std::move(each.key));
                          work->go_on(erase);
                        },
                    .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), listing] { work->go_on(listing); })) listing->done(closing());
}

void S3Tier::do_list(const NamespaceSet& namespaces, PageDone page, Done done) {
  auto listing = std::make_shared<Work::Listing>(Work::Listing{
      .prefix = remote_names_of(work_->config.prefix, namespaces),
      .take =
          [work = work_.get(), page = std::move(page)](const std::vector<Work::Listed>& objects, const Done& taken) {
            std::vector<TierHit> hits;
            for (const auto& each : objects) {
              const auto key = parse_remote_object_name(work->config.prefix, each.key);
              if (key) hits.push_back({.key = *key, .bytes = each.bytes});
            }
            page(std::move(hits));
            taken(Status::ok());
          },
      .done = std::move(done)});
  if (!work_->loop.post([work = work_.get(), listing] { work->go_on(listing); })) listing->done(closing());
}

Status S3Tier::do_drain(std::int64_t timeout_ns) {
  if (work_->budget.wait_empty(timeout_ns)) return Status::ok();
  return {Code::kExpired, "the s3 tier still has writes under way"};
}

TierStats S3Tier::do_stats() const { return {.queued_bytes = work_->budget.taken_bytes()}; }

}  // namespace kvern
