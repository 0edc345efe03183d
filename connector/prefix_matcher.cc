#include "connector/prefix_matcher.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <utility>

#include "connector/prefix_search.h"
#include "transport/service_thread.h"
#include "transport/wire.h"

namespace kvern {
namespace {

using SteadyClock = std::chrono::steady_clock;

/// Look-ups that are repeated because a found chunk was evicted or superseded before it was protected. From the second
/// repetition on, the answer is cut at that chunk.
constexpr int kMaxAttempts = 8;
/// The helper's patience with one remote question; its answer is of no use long after the deadline.
constexpr std::uint32_t kRemoteTimeoutFactor = 20;
constexpr std::uint32_t kMinRemoteTimeoutMs = 1000;
/// Questions that wait for the helper thread; more are answered with a miss.
constexpr std::size_t kMaxQuestions = 256;
/// How often the daemon is asked whether what it brings up is there. A round trip costs some 10 us, and what a chunk
/// takes from NVMe is a millisecond.
constexpr std::chrono::milliseconds kPrefetchPoll{2};
/// Room for the rest of a message beside its hashes.
constexpr std::size_t kMatchOverheadBytes = 1024;
/// Hashes that the daemon takes in one message.
constexpr std::size_t kMaxHashes = 1U << 15;
/// Wishes that wait for the helper thread; more are dropped.
constexpr std::size_t kMaxWishes = 256;

struct Question {
  NamespaceId namespace_id;
  std::string hashes;
  std::uint32_t hash_bytes = 0;
  std::uint32_t local_tokens = 0;
  std::uint32_t max_tokens = 0;
  std::uint32_t prompt_tokens = 0;
  std::chrono::milliseconds patience{0};
  bool patient() const { return patience.count() > 0; }
  bool operator==(const Question&) const = default;
};

/// What a request holds. Only the slots and their memory are kept, not the session, so that a claim from before a
/// restart of the daemon does not keep its slab in memory.
struct Claim {
  std::uint64_t session_number = 0;
  std::shared_ptr<HazardSlots> hazards;
  std::shared_ptr<void> resources;
  std::vector<std::uint32_t> slots;

  Claim() = default;
  Claim(Claim&& other) noexcept { swap(other); }
  Claim& operator=(Claim&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Claim() {
    for (const std::uint32_t slot : slots) hazards->clear(slot);
  }
  void swap(Claim& other) noexcept {
    std::swap(session_number, other.session_number);
    std::swap(resources, other.resources);
    std::swap(hazards, other.hazards);
    std::swap(slots, other.slots);
  }
};

/// A question to the daemon and what became of it. A local client asks to have lower tiers searched, and looks into the
/// index when that is over.
struct RemoteMatch {
  std::shared_ptr<const Session> session;
  Question question;
  std::string traceparent;
  std::uint64_t lease_id = 0;
  SteadyClock::time_point ask_at;
  SteadyClock::time_point prefetch_until;  ///< then the daemon is asked for what is there
  SteadyClock::time_point deadline;        ///< then nobody waits any more
  bool asked = false;
  bool answered = false;
  bool leased = false;   ///< the daemon keeps the found chunks until the lease is given back
  bool dropped = false;  ///< nobody waits
  PrefixMatcher::Answer answer;
};

}  // namespace

Status MatcherConfig::validate() const {
  if (block_tokens == 0 || chunk_blocks == 0) {
    return {Code::kInvalid, "block_tokens and chunk_blocks must be positive"};
  }
  if (groups.empty()) return {Code::kInvalid, "a matcher needs at least one KV-cache group"};
  return Status::ok();
}

struct PrefixMatcher::State {
  State(std::shared_ptr<Client> own_client, MatcherConfig matcher_config)
      : client(std::move(own_client)), config(std::move(matcher_config)) {}

  const std::shared_ptr<Client> client;
  const MatcherConfig config;

  mutable std::mutex mutex;
  std::condition_variable wake;
  std::unordered_map<std::string, Claim> claims;
  std::unordered_map<std::string, std::shared_ptr<RemoteMatch>> remote;
  std::deque<std::shared_ptr<RemoteMatch>> questions;
  /// Messages whose answers nobody waits for, each to its own session.
  struct Errand {
    std::shared_ptr<const Session> session;
    wire::HotRequest request;
  };
  std::deque<Errand> errands;
  std::uint64_t next_lease = 1;
  bool stopping = false;
  std::thread helper;  ///< started by the first that needs it

  Answer match_local(const Session& session, const std::string& request, const Question& question,
                     std::string_view hashes, std::uint32_t limit);
  std::string too_late(const RemoteMatch& match) const;
  Answer match_remote(std::shared_ptr<const Session> session, const std::string& request, Question question,
                      const std::string& traceparent);
  bool is_brought_up(std::shared_ptr<const Session> session, const std::string& request, Question question,
                     const std::string& traceparent);
  const RemoteMatch* find_locked(const Session& session, const std::string& request, const Question& question);
  bool start_locked(std::shared_ptr<const Session> session, const std::string& request, Question question,
                    const std::string& traceparent);
  void put_claim(const std::string& request, Claim claim);
  void give_lease_back(const std::string& request);
  void drop_remote_locked(const std::string& request);
  void release_locked(std::shared_ptr<const Session> session, std::uint64_t lease_id);
  void start_helper_locked();
  void run();
  std::optional<Answer> ask(const RemoteMatch& match, bool prefetch) const;
  std::uint32_t block_limit(const Question& question, std::size_t hash_count) const {
    return static_cast<std::uint32_t>(
        std::min<std::uint64_t>({hash_count, question.max_tokens / config.block_tokens, ~std::uint32_t{0}}));
  }
};

void PrefixMatcher::State::put_claim(const std::string& request, Claim claim) {
  Claim previous;  // its slots are cleared after the new ones stand, and outside of the lock
  const std::lock_guard lock(mutex);
  if (claim.slots.empty()) {
    if (const auto found = claims.find(request); found != claims.end()) {
      previous.swap(found->second);
      claims.erase(found);
    }
    return;
  }
  Claim& place = claims[request];
  previous.swap(place);
  place.swap(claim);
}

PrefixMatcher::Answer PrefixMatcher::State::match_local(const Session& session, const std::string& request,
                                                        const Question& question, std::string_view hashes,
                                                        std::uint32_t limit) {
  const std::uint32_t local = question.local_tokens / config.block_tokens;
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    std::vector<IndexLookup> lookups;
    lookups.reserve(config.groups.size());
    for (const GroupWindow& group : config.groups) {
      lookups.emplace_back(*session.index,
                           PromptHashes{question.namespace_id, group.group, hashes, question.hash_bytes},
                           config.chunk_blocks);
    }
    const Found found = find_common(config, lookups, local, limit, question.prompt_tokens);
    if (found.blocks == 0) {
      put_claim(request, {});
      return {true, 0, found.reason};
    }
    std::vector<const Span*> used;
    std::vector<std::uint32_t> chunks;
    for (std::size_t i = 0; i < lookups.size(); ++i) {
      const std::uint32_t window = config.groups[i].window_tokens;
      const std::uint64_t tokens = std::uint64_t{found.blocks} * config.block_tokens;
      const std::uint32_t begin =
          window == 0 ? local : std::max(local, window_begin(tokens, window, config.block_tokens));
      for (const Span& span : lookups[i].spans()) {
        if (span.begin >= found.blocks || span.end <= begin) continue;
        used.push_back(&span);
        chunks.push_back(span.hit.chunk);
      }
    }
    std::ranges::sort(chunks);
    chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
    Claim claim;
    claim.session_number = session.number;
    claim.hazards = session.hazards;
    claim.resources = session.resources;
    claim.slots.resize(chunks.size());
    if (!session.hazards->publish_all(chunks, claim.slots)) {
      claim.slots.clear();
      put_claim(request, {});
      return {true, 0, "too many claims at once"};
    }
    std::uint32_t invalid_from = limit;
    for (const Span* span : used) {
      if (!session.index->still_valid(span->hit)) invalid_from = std::min(invalid_from, span->begin);
    }
    if (invalid_from == limit) {
      put_claim(request, std::move(claim));
      return {true, found.blocks * config.block_tokens, found.reason};
    }
    if (attempt > 0) limit = invalid_from;
    if (limit <= local) break;
  }
  put_claim(request, {});
  return {true, 0, "evicted during the look-up"};
}

/// The claims of the request stand: the daemon need not hold the chunks any more. The question stays, so that it is not
/// asked again.
void PrefixMatcher::State::give_lease_back(const std::string& request) {
  const std::lock_guard lock(mutex);
  const auto found = remote.find(request);
  if (found == remote.end() || !found->second->leased) return;
  found->second->leased = false;
  release_locked(found->second->session, found->second->lease_id);
}

void PrefixMatcher::State::release_locked(std::shared_ptr<const Session> session, std::uint64_t lease_id) {
  Errand errand{std::move(session), {}};
  errand.request.mutable_release_match()->set_lease_id(lease_id);
  errands.push_back(std::move(errand));
  wake.notify_one();
}

void PrefixMatcher::State::start_helper_locked() {
  if (!helper.joinable()) helper = start_service_thread("kvern-match", [this] { run(); });
}

void PrefixMatcher::State::drop_remote_locked(const std::string& request) {
  const auto found = remote.find(request);
  if (found == remote.end()) return;
  RemoteMatch& match = *found->second;
  match.dropped = true;
  if (match.leased) release_locked(match.session, match.lease_id);
  remote.erase(found);
}

/// What the request asks already; nullptr when it asks nothing yet. A question that is another one by now is dropped.
const RemoteMatch* PrefixMatcher::State::find_locked(const Session& session, const std::string& request,
                                                     const Question& question) {
  const auto found = remote.find(request);
  if (found == remote.end()) return nullptr;
  const RemoteMatch& match = *found->second;
  if (match.session->number == session.number && match.question == question) return &match;
  drop_remote_locked(request);
  return nullptr;
}

/// Asks the daemon; false when it is asked too much already.
bool PrefixMatcher::State::start_locked(std::shared_ptr<const Session> session, const std::string& request,
                                        Question question, const std::string& traceparent) {
  if (questions.size() >= kMaxQuestions) return false;
  start_helper_locked();
  auto match = std::make_shared<RemoteMatch>();
  match->ask_at = SteadyClock::now();
  match->prefetch_until = match->ask_at;
  if (session->lower_tiers) {
    match->prefetch_until += std::max(std::chrono::milliseconds(config.prefetch_deadline_ms), question.patience);
  }
  match->deadline = std::max(match->prefetch_until + std::chrono::milliseconds(config.remote_deadline_ms),
                             match->ask_at + question.patience);
  match->session = std::move(session);
  match->question = std::move(question);
  match->traceparent = traceparent;
  match->lease_id = next_lease++;
  remote[request] = match;
  questions.push_back(std::move(match));
  wake.notify_one();
  return true;
}

std::string PrefixMatcher::State::too_late(const RemoteMatch& match) const {
  const auto waited = std::max(std::chrono::milliseconds(config.remote_deadline_ms), match.question.patience);
  return "no answer within " + std::to_string(waited.count()) + " ms";
}

PrefixMatcher::Answer PrefixMatcher::State::match_remote(std::shared_ptr<const Session> session,
                                                         const std::string& request, Question question,
                                                         const std::string& traceparent) {
  const std::lock_guard lock(mutex);
  if (const auto* match = find_locked(*session, request, question)) {
    if (match->answered) return match->answer;
    if (SteadyClock::now() < match->deadline) return {false, 0, "asked the daemon"};
    return {true, 0, too_late(*match)};
  }
  const bool patient = question.patient();
  if (start_locked(std::move(session), request, std::move(question), traceparent) || patient) {
    return {false, 0, "asked the daemon"};
  }
  return {true, 0, "too many questions at once"};
}

/// For a local client: whether lower tiers have brought up all that they will. The first call starts it.
bool PrefixMatcher::State::is_brought_up(std::shared_ptr<const Session> session, const std::string& request,
                                         Question question, const std::string& traceparent) {
  const std::lock_guard lock(mutex);
  if (const auto* match = find_locked(*session, request, question)) {
    return match->answered || SteadyClock::now() >= match->deadline;
  }
  const bool patient = question.patient();
  return !start_locked(std::move(session), request, std::move(question), traceparent) && !patient;
}

/// nullopt: chunks are still on their way up. Not known: the daemon did not answer.
std::optional<PrefixMatcher::Answer> PrefixMatcher::State::ask(const RemoteMatch& match, bool prefetch) const {
  const Question& question = match.question;
  const std::chrono::milliseconds timeout(
      std::max(kMinRemoteTimeoutMs, kRemoteTimeoutFactor * config.remote_deadline_ms));
  const std::size_t hash_count =
      std::min(question.hashes.size(), kMaxMessageBytes - kMatchOverheadBytes) / question.hash_bytes;
  const std::uint32_t limit = block_limit(question, hash_count);
  const std::uint32_t local = question.local_tokens / config.block_tokens;
  std::vector<BitmapLookup> lookups;
  bool pending = false;
  for (const GroupWindow& group : config.groups) {
    wire::HotRequest request;
    request.set_traceparent(match.traceparent);
    wire::Match* body = request.mutable_match();
    body->set_namespace_id(question.namespace_id.bytes.data(), question.namespace_id.bytes.size());
    body->set_group(group.group);
    body->set_block_hashes(question.hashes.data(), std::size_t{limit} * question.hash_bytes);
    body->set_hash_bytes(question.hash_bytes);
    body->set_lease_id(match.lease_id);
    body->set_first_block(local);
    body->set_prefetch(prefetch);
    wire::HotReply reply;
    Status status = match.session->channel->call(request, &reply, timeout);
    if (status) status = to_status(reply.status());
    if (!status) return Answer{false, 0, status.message()};
    pending = pending || reply.matched().pending();
    lookups.emplace_back(reply.matched().present());
  }
  if (pending) return std::nullopt;
  const Found found = find_common(config, lookups, local, limit, question.prompt_tokens);
  return Answer{true, found.blocks * config.block_tokens, found.reason};
}

void PrefixMatcher::State::run() {
  std::unique_lock lock(mutex);
  while (true) {
    const auto next = std::ranges::min_element(questions, {}, [](const auto& each) { return each->ask_at; });
    const bool due = next != questions.end() && (*next)->ask_at <= SteadyClock::now();
    if (!stopping && !due && errands.empty()) {
      if (next == questions.end()) {
        wake.wait(lock);
      } else {
        wake.wait_until(lock, (*next)->ask_at);
      }
      continue;
    }
    if (!errands.empty()) {
      Errand errand = std::move(errands.front());
      errands.pop_front();
      lock.unlock();
      wire::HotReply reply;
      // A lease of a session that is gone is gone as well, and so is a wish.
      if (errand.session->alive()) {
        static_cast<void>(
            errand.session->channel->call(errand.request, &reply, std::chrono::milliseconds(kMinRemoteTimeoutMs)));
      }
      lock.lock();
      continue;
    }
    if (stopping) return;
    const auto match = *next;
    questions.erase(next);
    if (match->dropped && !match->asked) continue;
    std::optional<Answer> answer;
    if (!match->dropped) {
      const bool prefetch = SteadyClock::now() < match->prefetch_until;
      match->asked = true;
      lock.unlock();
      answer = ask(*match, prefetch);
      lock.lock();
    }
    const auto now = SteadyClock::now();
    if (!answer && !match->dropped) {
      match->ask_at = std::min(now + kPrefetchPoll, match->prefetch_until);
      questions.push_back(match);
      continue;
    }
    // Who is patient wants an answer of the daemon, not that there was none.
    const bool failed = answer && !answer->known;
    if (failed && match->question.patient() && now < match->deadline && match->session->alive()) {
      match->ask_at = now + kPrefetchPoll;
      questions.push_back(match);
      continue;
    }
    match->answer = answer.value_or(Answer{});
    match->answer.known = true;
    match->answered = true;
    if (now >= match->deadline) {
      // The scheduler has been told 0 already, or will be: an answer must not change.
      match->answer = {true, 0, too_late(*match)};
    }
    // A local client's leases stand until it has claims of its own.
    match->leased = !match->dropped && (match->answer.tokens > 0 || match->session->local);
    if (!match->leased) release_locked(match->session, match->lease_id);
  }
}

PrefixMatcher::PrefixMatcher(std::shared_ptr<Client> client, MatcherConfig config) {
  if (const Status status = config.validate(); !status) throw std::invalid_argument(status.message());
  state_ = std::make_shared<State>(std::move(client), std::move(config));
}

PrefixMatcher::~PrefixMatcher() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
    while (!state_->remote.empty()) state_->drop_remote_locked(std::string(state_->remote.begin()->first));
    state_->wake.notify_all();
  }
  if (state_->helper.joinable()) state_->helper.join();
}

PrefixMatcher::Answer PrefixMatcher::match(const std::string& request, int namespace_handle, std::string_view hashes,
                                           std::uint32_t hash_bytes, std::uint32_t local_tokens,
                                           std::uint32_t max_tokens, std::uint32_t prompt_tokens,
                                           const std::string& traceparent, std::chrono::milliseconds patience) {
  State& state = *state_;
  const auto session = state.client->session();
  if (!session || !session->alive()) {
    release(request);
    return {true, 0, "no daemon"};
  }
  const auto namespace_id = session->namespace_id(namespace_handle);
  if (!namespace_id) return {true, 0, session->refusal(namespace_handle)};
  if (hash_bytes == 0 || hash_bytes > BlockHash::kMaxBytes || hashes.size() % hash_bytes != 0) {
    return {true, 0, "malformed block hashes"};
  }
  Question question{*namespace_id, {}, hash_bytes, local_tokens, max_tokens, prompt_tokens, patience};
  const std::uint32_t limit = state.block_limit(question, hashes.size() / hash_bytes);
  if (limit <= local_tokens / state.config.block_tokens) {
    release(request);
    return {true, 0, "nothing to restore"};
  }
  if (session->local) {
    const auto start = SteadyClock::now();
    Answer answer = state.match_local(*session, request, question, hashes, limit);
    if (session->lower_tiers && state.config.prefetch_deadline_ms > 0 &&
        answer.tokens / state.config.block_tokens < limit) {
      question.hashes = hashes;
      if (!state.is_brought_up(session, request, question, traceparent)) return {false, 0, "lower tiers are searched"};
      answer = state.match_local(*session, request, question, hashes, limit);
      state.give_lease_back(request);
    }
    UsageReport usage;
    usage.match_seconds.push_back(std::chrono::duration<double>(SteadyClock::now() - start).count());
    state.client->report(usage);
    return answer;
  }
  question.hashes = hashes;
  return state.match_remote(session, request, std::move(question), traceparent);
}

void PrefixMatcher::retain(int namespace_handle, std::uint16_t group, std::string_view hashes, std::uint32_t hash_bytes,
                           std::uint64_t seconds) {
  State& state = *state_;
  const auto session = state.client->session();
  if (!session || !session->alive()) return;
  const auto namespace_id = session->namespace_id(namespace_handle);
  if (!namespace_id || hash_bytes == 0 || hash_bytes > BlockHash::kMaxBytes || hashes.size() % hash_bytes != 0) return;
  const std::size_t piece =
      std::min(kMaxHashes, (kMaxMessageBytes - kMatchOverheadBytes) / hash_bytes) * std::size_t{hash_bytes};
  const std::lock_guard lock(state.mutex);
  state.start_helper_locked();
  for (; !hashes.empty() && state.errands.size() < kMaxWishes; hashes.remove_prefix(std::min(piece, hashes.size()))) {
    State::Errand errand{session, {}};
    wire::Retain* body = errand.request.mutable_retain();
    body->set_namespace_id(namespace_id->bytes.data(), namespace_id->bytes.size());
    body->set_group(group);
    body->set_block_hashes(hashes.data(), std::min(piece, hashes.size()));
    body->set_hash_bytes(hash_bytes);
    body->set_retain_seconds(seconds);
    state.errands.push_back(std::move(errand));
  }
  state.wake.notify_one();
}

void PrefixMatcher::release(const std::string& request) {
  state_->put_claim(request, {});
  const std::lock_guard lock(state_->mutex);
  state_->drop_remote_locked(request);
}

std::size_t PrefixMatcher::claims() const {
  const auto session = state_->client->session();
  const std::uint64_t number = session ? session->number : 0;
  const std::lock_guard lock(state_->mutex);
  const auto local =
      std::ranges::count_if(state_->claims, [&](const auto& entry) { return entry.second.session_number == number; });
  const auto remote = std::ranges::count_if(state_->remote, [&](const auto& entry) {
    return entry.second->session->number == number && entry.second->leased;
  });
  return static_cast<std::size_t>(local + remote);
}

}  // namespace kvern
