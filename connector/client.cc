#include "connector/client.h"

#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "connector/endpoint.h"
#include "kernels/align.h"
#include "kernels/container.h"
#include "transport/admission.h"
#include "transport/event_fd.h"
#include "transport/service_thread.h"
#include "transport/ucx.h"
#include "transport/wire.h"

namespace kvern {
namespace {

using std::chrono::milliseconds;

/// How long a client that ends waits for the daemon to take its goodbye.
constexpr milliseconds kGoodbyeTimeout{200};
/// How long close() lets a control call go on before it cuts it.
constexpr milliseconds kCloseGrace{500};
/// Durations that are kept until the next heartbeat; more would be a flood, and the histogram has its shape by then.
constexpr std::size_t kMaxDurations = 1024;
/// Events are asked for this often while somebody takes them.
constexpr milliseconds kEventInterval{1000};
constexpr milliseconds kMinHeartbeatInterval{50};

void tell_user(const std::string& line) { std::fprintf(stderr, "kvern: %s\n", line.c_str()); }

bool connection_ended(int fd) {
  pollfd item{.fd = fd, .events = POLLRDHUP, .revents = 0};
  return ::poll(&item, 1, 0) > 0 && (item.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

/// Ends all waits on the session, from any thread.
void end_session(const Session& session) {
  session.ended->store(true);
  session.channel->close();
  session.data_plane->close();
}

/// Watches the admission connection of a local session, so that the daemon's death ends every wait at once, and keeps
/// the heartbeat word fresh.
class ConnectionWatch {
 public:
  ConnectionWatch(std::shared_ptr<const Session> session, milliseconds interval, const EventFd& ended)
      : session_(std::move(session)), interval_(interval), ended_(ended) {
    thread_ = start_service_thread("kvern-watch", [this] { run(); });
  }
  ~ConnectionWatch() {
    stop_.signal();
    thread_.join();
  }
  ConnectionWatch(const ConnectionWatch&) = delete;
  ConnectionWatch& operator=(const ConnectionWatch&) = delete;

 private:
  void run() {
    while (true) {
      session_->segment->header().client_heartbeat_ns.store(Clock::system().now_ns());
      pollfd items[] = {{.fd = session_->connection->get(), .events = POLLRDHUP, .revents = 0},
                        {.fd = stop_.fd(), .events = POLLIN, .revents = 0}};
      const int ready = ::poll(items, 2, static_cast<int>(interval_.count()));
      if (items[1].revents != 0) return;
      if ((ready > 0 && items[0].revents != 0) || !session_->alive()) break;
    }
    end_session(*session_);
    session_->control->close();
    ended_.signal();
  }

  const std::shared_ptr<const Session> session_;
  const milliseconds interval_;
  const EventFd& ended_;
  EventFd stop_;
  std::thread thread_;
};

struct LocalMemory {
  SharedMemory index;
  SharedMemory segment;
};

std::string host_of(const std::string& address) {
  const std::size_t begin = address.find("://");
  const std::string rest = begin == std::string::npos ? address : address.substr(begin + 3);
  std::string host = rest.substr(0, rest.rfind(':'));
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';  // an IPv6 address
  return bracketed ? host.substr(1, host.size() - 2) : host;
}

bool may_use_ucx(const ClientConfig& config) {
  return config.data_plane == "ucx" || !config.address.starts_with("unix://");
}

/// A thread or a descriptor that the system refuses is a connection that failed, and not the engine's end.
template <typename Function>
auto without_throwing(Function function) -> decltype(function()) {
  try {
    return function();
  } catch (const std::exception& error) {
    return failure(Code::kUnavailable, error.what());
  }
}

wire::DataPlaneKind plane_kind(const std::string& name) {
  if (name == "shm") return wire::DATA_PLANE_SHM;
  return name == "ucx" ? wire::DATA_PLANE_UCX : wire::DATA_PLANE_AUTO;
}

}  // namespace

Status ClientConfig::validate() const {
  if (!address.starts_with("unix://") && !address.starts_with("tcp://")) {
    return {Code::kInvalid,
            "the address must be unix:///path/to/kvernd.sock or tcp://host:port, not '" + address + "'"};
  }
  if (data_plane != "auto" && data_plane != "shm" && data_plane != "ucx") {
    return {Code::kInvalid, "data_plane must be auto, shm or ucx, not '" + data_plane + "'"};
  }
  if (data_plane == "shm" && !address.starts_with("unix://")) {
    return {Code::kInvalid, "data_plane = shm needs the daemon's Unix socket (unix:///…), not " + address};
  }
  if (connect_timeout_ms == 0 || call_timeout_ms == 0 || backoff_min_ms == 0 || backoff_max_ms < backoff_min_ms) {
    return {Code::kInvalid, "time-outs must be positive and backoff_max_ms not below backoff_min_ms"};
  }
  return Status::ok();
}

bool Session::alive() const {
  if (ended->load() || !channel->alive()) return false;
  if (segment) {
    const auto word = segment->header().state.load();
    if (word != static_cast<std::uint32_t>(SessionState::kLive) &&
        word != static_cast<std::uint32_t>(SessionState::kStopping)) {
      return false;
    }
  }
  return !connection || !connection_ended(connection->get());
}

void Session::wait_for_daemons_end(std::chrono::milliseconds at_most) const {
  if (!daemon || !*daemon) return;
  pollfd item{.fd = daemon->get(), .events = POLLIN, .revents = 0};
  ::poll(&item, 1, static_cast<int>(at_most.count()));
}

std::optional<NamespaceId> Session::namespace_id(int handle) const {
  const auto at = static_cast<std::size_t>(handle);
  return handle >= 0 && at < namespace_ids.size() ? namespace_ids[at] : std::nullopt;
}

std::string Session::refusal(int handle) const {
  const auto at = static_cast<std::size_t>(handle);
  return handle >= 0 && at < refusals.size() ? refusals[at] : "the namespace is not registered yet";
}

/// thread runs run(). mutex guards what other threads look at; the rest belongs to the thread.
struct Client::State {
  explicit State(ClientConfig client_config) : config(std::move(client_config)), attributes(config.attributes) {}

  const ClientConfig config;
  EventFeed events;
  EventFd wake;

  mutable std::mutex mutex;
  mutable std::condition_variable changed;
  std::vector<NamespaceSpec> specs;
  std::shared_ptr<const Session> live;
  ClientState state = ClientState::kConnecting;
  std::string problem = "not connected yet";
  std::uint64_t session_count = 0;
  std::map<std::string, UsageReport> usage;  ///< by codec_spec
  std::map<std::string, std::string> attributes;
  std::map<std::string, std::string> told_next;  ///< of them, what the next heartbeat carries
  std::shared_ptr<ControlClient> control;        ///< in use by the thread
  bool stopping = false;
  bool finished = false;

  std::vector<std::string> told_refusals;  ///< by handle: what the user knows already
  std::string told_problem;
  milliseconds heartbeat_interval{1000};
  milliseconds session_timeout{10'000};
  std::mt19937 random{std::random_device{}()};
  std::thread thread;

  void run();
  bool stop_requested() const {
    const std::lock_guard lock(mutex);
    return stopping;
  }
  void sleep(milliseconds duration);
  Result<std::shared_ptr<const Session>> connect();
  Result<wire::Welcome> greet(ControlClient& to) const;
  Status admit(const wire::Welcome& welcome, Session& session) const;
  Status attach_remote(const wire::Welcome& welcome, Session& session) const;
  Status register_namespaces(Session& session);
  void publish(std::shared_ptr<const Session> next);
  /// Returns why the session ended.
  std::string serve(std::shared_ptr<const Session> session);
  Status beat(const Session& session);
  void send_usage(const Session& session);
};

void Client::State::sleep(milliseconds duration) {
  std::unique_lock lock(mutex);
  changed.wait_for(lock, duration, [&] { return stopping; });
}

Result<wire::Welcome> Client::State::greet(ControlClient& to) const {
  wire::ControlRequest request;
  wire::Hello* hello = request.mutable_hello();
  hello->mutable_versions()->set_protocol(kProtocolVersion);
  hello->mutable_versions()->set_container(kContainerVersion);
  hello->set_role(config.scheduler ? wire::ROLE_SCHEDULER : wire::ROLE_WORKER);
  {
    const std::lock_guard lock(mutex);
    hello->mutable_attributes()->insert(attributes.begin(), attributes.end());
  }
  hello->set_client_name(config.client_name.empty() ? "pid " + std::to_string(::getpid()) : config.client_name);
  hello->set_data_plane(plane_kind(config.data_plane));
  hello->set_staging_bytes(config.staging_bytes);
  if (may_use_ucx(config)) {
    auto version = ucx_version();
    if (!version) return failure(version.error());
    hello->mutable_versions()->set_ucx(*version);
  }
  wire::ControlReply reply;
  if (Status sent = to.call(request, &reply, milliseconds(config.connect_timeout_ms)); !sent) return failure(sent);
  if (Status status = to_status(reply.status()); !status) return failure(status);
  if (!reply.has_welcome()) return failure(Code::kInvalid, "the daemon did not answer the greeting with a welcome");
  const wire::Welcome& welcome = reply.welcome();
  if (welcome.versions().protocol() != kProtocolVersion) {
    return failure(Code::kRefused, "the daemon speaks protocol " + std::to_string(welcome.versions().protocol()) +
                                       ", this client " + std::to_string(kProtocolVersion) +
                                       ": install the same Kvern on both sides");
  }
  return welcome;
}

Status Client::State::admit(const wire::Welcome& welcome, Session& session) const {
  auto admitted =
      request_admission(welcome.admission_path(), welcome.session_token(), milliseconds(config.connect_timeout_ms));
  if (!admitted) return admitted.error();
  if (Status status = to_status(admitted->answer.status()); !status) return status;
  auto slab = SharedMemory::map(std::move(admitted->slab), admitted->answer.slab_bytes(), false);
  if (!slab) return slab.error();
  auto index = SharedMemory::map(std::move(admitted->index), admitted->answer.index_bytes(), false);
  if (!index) return index.error();
  auto segment = SharedMemory::map(std::move(admitted->segment), admitted->answer.segment_bytes(), true);
  if (!segment) return segment.error();
  auto staging = SharedMemory::map(std::move(admitted->staging), admitted->answer.staging_bytes(), true);
  if (!staging) return staging.error();

  // Or the first store pays for a page fault every 4 KiB. Kernels before 5.14 do not know it: then it does.
  if (!config.scheduler) ::madvise(staging->bytes().data(), staging->bytes().size(), MADV_POPULATE_WRITE);

  auto view = SegmentView::attach(segment->bytes());
  if (!view) return view.error();
  auto reader = BlockIndexReader::attach(index->bytes());
  if (!reader) {
    return {Code::kRefused,
            "the daemon's index has a layout that this client does not know: install the same Kvern on "
            "both sides"};
  }
  session.local = true;
  session.admission_path = welcome.admission_path();
  session.connection = std::make_shared<UniqueFd>(std::move(admitted->connection));
  session.daemon = std::make_shared<UniqueFd>(std::move(admitted->daemon));
  session.index = *reader;
  session.segment = *view;
  session.hazards = std::make_shared<HazardSlots>(*view);
  session.channel = make_ring_channel(*view, std::move(admitted->doorbell));
  session.data_plane = make_shm_data_plane(std::move(*slab), std::move(*staging));
  session.resources = std::make_shared<LocalMemory>(LocalMemory{std::move(*index), std::move(*segment)});
  return Status::ok();
}

Status Client::State::attach_remote(const wire::Welcome& welcome, Session& session) const {
  if (welcome.ucx_port() == 0) {
    return {Code::kRefused, "the daemon at " + config.address +
                                " has no UCX listener, which other hosts need: set "
                                "ucx_listen in its configuration"};
  }
  UcxClientConfig ucx;
  ucx.host = welcome.ucx_host().empty() ? host_of(config.address) : welcome.ucx_host();
  ucx.port = static_cast<std::uint16_t>(welcome.ucx_port());
  ucx.session_token = welcome.session_token();
  ucx.staging_bytes = welcome.staging_bytes();
  auto plane = make_ucx_data_plane(ucx);
  if (!plane) return plane.error();
  session.channel = make_control_channel(session.control, welcome.session_token());
  session.data_plane = std::move(*plane);
  return Status::ok();
}

Status Client::State::register_namespaces(Session& session) {
  std::vector<NamespaceSpec> wanted;
  {
    const std::lock_guard lock(mutex);
    wanted = specs;
  }
  told_refusals.resize(wanted.size());
  for (std::size_t handle = session.namespace_ids.size(); handle < wanted.size(); ++handle) {
    wire::ControlRequest request;
    request.set_session_token(session.token);
    for (const auto& [name, value] : wanted[handle].fields) {
      wire::NamespaceField* field = request.mutable_register_namespace()->add_fields();
      field->set_name(name);
      field->set_value(value);
    }
    wire::ControlReply reply;
    Status status = session.control->call(request, &reply, milliseconds(config.call_timeout_ms));
    if (!status) return status;
    status = to_status(reply.status());
    if (status.code() == Code::kExpired || status.code() == Code::kUnavailable) return status;
    std::optional<NamespaceId> id;
    if (status) {
      const std::string& bytes = reply.namespace_registered().namespace_id();
      id.emplace();
      if (bytes.size() != id->bytes.size()) return {Code::kInvalid, "the daemon gave a namespace no valid id"};
      std::memcpy(id->bytes.data(), bytes.data(), bytes.size());
    } else if (told_refusals[handle] != status.message()) {
      told_refusals[handle] = status.message();
      tell_user("the daemon refused the namespace, nothing is stored or restored: " + status.message());
    }
    session.namespace_ids.push_back(id);
    session.codec_specs.push_back(reply.namespace_registered().codec_spec());
    session.refusals.push_back(status ? std::string() : status.message());
  }
  return Status::ok();
}

Result<std::shared_ptr<const Session>> Client::State::connect() {
  auto control_config = control_client_config(config);
  if (!control_config) return failure(control_config.error());
  auto session = std::make_shared<Session>();
  try {
    session->control = std::make_shared<ControlClient>(*control_config);
  } catch (const std::exception& error) {
    return failure(Code::kRefused, error.what());
  }
  {
    const std::lock_guard lock(mutex);
    if (stopping) return failure(Code::kUnavailable, "closed");
    control = session->control;
  }
  auto welcome = greet(*session->control);
  if (!welcome) return failure(welcome.error());
  session->session_id = welcome->session_id();
  session->epoch = welcome->epoch();
  session->lower_tiers = welcome->lower_tiers();
  session->token = welcome->session_token();
  session->ended = std::make_shared<std::atomic<bool>>(false);
  heartbeat_interval = std::max(kMinHeartbeatInterval, milliseconds(welcome->heartbeat_interval_ms()));
  session_timeout = std::max(2 * heartbeat_interval, milliseconds(welcome->session_timeout_ms()));
  const bool local = config.data_plane != "ucx" && !welcome->admission_path().empty();
  if (!local && config.data_plane == "shm") {
    return failure(Code::kRefused, "data_plane = shm, but the daemon offers no shared memory to this client");
  }
  // A client on the Unix socket never falls back to the network: that would be slow without anybody knowing.
  if (!local && config.data_plane == "auto" && config.address.starts_with("unix://")) {
    return failure(Code::kRefused, "the daemon at " + config.address +
                                       " offers no shared memory; set data_plane = ucx to go over the network");
  }
  if (Status status = local ? admit(*welcome, *session) : attach_remote(*welcome, *session); !status) {
    return failure(status);
  }
  if (Status status = register_namespaces(*session); !status) return failure(status);
  return session;
}

void Client::State::publish(std::shared_ptr<const Session> next) {
  const std::lock_guard lock(mutex);
  live = std::move(next);
  state = ClientState::kReady;
  problem.clear();
  changed.notify_all();
}

void Client::State::send_usage(const Session& to) {
  std::map<std::string, UsageReport> all_due;
  {
    const std::lock_guard lock(mutex);
    all_due = std::exchange(usage, {});
  }
  for (const auto& [codec_spec, due] : all_due) {
    wire::HotRequest request;
    wire::Report* report = request.mutable_report();
    report->set_hit_tokens(due.hit_tokens);
    report->set_requested_tokens(due.requested_tokens);
    report->set_loaded_tokens(due.loaded_tokens);
    report->set_loaded_raw_bytes(due.loaded_raw_bytes);
    report->set_loaded_encoded_bytes(due.loaded_encoded_bytes);
    report->set_failed_loads(due.failed_loads);
    report->set_codec_spec(codec_spec);
    report->mutable_load_seconds()->Add(due.load_seconds.begin(), due.load_seconds.end());
    report->mutable_match_seconds()->Add(due.match_seconds.begin(), due.match_seconds.end());
    wire::HotReply reply;
    // Metrics that get lost with a session are not worth a repetition.
    static_cast<void>(to.channel->call(request, &reply, milliseconds(config.call_timeout_ms)));
  }
}

Status Client::State::beat(const Session& to) {
  wire::ControlRequest request;
  request.set_session_token(to.token);
  auto* told = request.mutable_heartbeat()->mutable_attributes();
  {
    const std::lock_guard lock(mutex);
    told->insert(told_next.begin(), told_next.end());
    told_next.clear();
  }
  wire::ControlReply reply;
  const Status sent = to.control->call(request, &reply, heartbeat_interval);
  if (!sent) {
    const std::lock_guard lock(mutex);
    told_next.insert(told->begin(), told->end());  // what is newer stays
  }
  return sent ? to_status(reply.status()) : sent;
}

std::string Client::State::serve(std::shared_ptr<const Session> current) {
  std::optional<ConnectionWatch> watch;
  if (current->local) watch.emplace(current, heartbeat_interval / 2, wake);
  using SteadyClock = std::chrono::steady_clock;
  auto last_answer = SteadyClock::now();
  auto next_beat = last_answer + heartbeat_interval;
  auto next_events = last_answer;
  while (!stop_requested()) {
    if (!current->alive())
      return "the daemon at " + config.address + " is gone, does not answer or has ended the session";
    auto now = SteadyClock::now();
    if (now >= next_beat) {
      const Status status = beat(*current);
      now = SteadyClock::now();
      next_beat = now + heartbeat_interval;
      if (status.code() == Code::kExpired) return "the daemon has ended the session: " + status.message();
      if (status) last_answer = now;
      // On this host the connection itself tells; a daemon that is merely busy is waited for.
      if (!current->local && now - last_answer > session_timeout) return status.message();
      send_usage(*current);
    }
    if (events.snapshot_wanted() || (events.wanted() && now >= next_events)) {
      next_events = now + kEventInterval;
      const Status status = events.refresh(*current, config.call_timeout_ms);
      if (status.code() == Code::kExpired) return "the daemon has ended the session: " + status.message();
    }
    std::size_t wanted = 0;
    {
      const std::lock_guard lock(mutex);
      wanted = specs.size();
    }
    if (wanted > current->namespace_ids.size()) {
      auto next = std::make_shared<Session>(*current);
      if (Status status = register_namespaces(*next); !status) return status.message();
      current = next;
      publish(current);
      continue;
    }
    const auto until = events.wanted() ? std::min(next_beat, next_events) : next_beat;
    const auto wait = std::chrono::ceil<milliseconds>(std::max(until - SteadyClock::now(), SteadyClock::duration(0)));
    pollfd item{.fd = wake.fd(), .events = POLLIN, .revents = 0};
    ::poll(&item, 1, static_cast<int>(wait.count()));
    wake.drain();
  }
  if (current->alive()) {
    wire::ControlRequest request;
    request.set_session_token(current->token);
    request.mutable_goodbye();
    wire::ControlReply reply;
    static_cast<void>(current->control->call(request, &reply, kGoodbyeTimeout));
  }
  return "closed";
}

void Client::State::run() {
  milliseconds delay{config.backoff_min_ms};
  while (!stop_requested()) {
    auto connected = without_throwing([this] { return connect(); });
    std::string why;
    bool refused = false;
    if (connected) {
      auto fresh = std::make_shared<Session>(**connected);
      {
        const std::lock_guard lock(mutex);
        fresh->number = ++session_count;
      }
      connected = fresh;
      events.reset();
      publish(fresh);
      tell_user("connected to " + config.address + ", data plane " + std::string(fresh->data_plane->name()));
      told_problem.clear();
      delay = milliseconds(config.backoff_min_ms);
      const auto served = without_throwing([&]() -> Result<std::string> { return serve(fresh); });
      why = served ? *served : served.error().message();
      end_session(*fresh);
    } else {
      why = connected.error().message();
      refused = connected.error().code() == Code::kRefused || connected.error().code() == Code::kInvalid;
    }
    {
      const std::lock_guard lock(mutex);
      live.reset();
      control.reset();
      state = refused ? ClientState::kRefused : ClientState::kConnecting;
      problem = why;
      changed.notify_all();
      if (stopping) break;
    }
    connected = failure(Code::kUnavailable, why);
    if (told_problem.empty()) tell_user(why + "; trying again in the background");
    told_problem = why;
    const auto span = delay.count();
    sleep(milliseconds(std::uniform_int_distribution<std::int64_t>(span / 2, span)(random)));
    delay = std::min(2 * delay, milliseconds(config.backoff_max_ms));
  }
  const std::lock_guard lock(mutex);
  state = ClientState::kClosed;
  problem = "the client was closed";
  finished = true;
  changed.notify_all();
}

Client::Client(ClientConfig config) {
  if (const Status status = config.validate(); !status) throw std::invalid_argument(status.message());
  if (!config.profiles.empty()) align::set_profile_folder(config.profiles);
  // Here and not where it is needed: the engine's thread, which reads the environment all the time, is in this call.
  if (may_use_ucx(config)) prepare_ucx_environment();
  state_ = std::make_unique<State>(std::move(config));
  state_->thread = start_service_thread("kvern-client", [state = state_.get()] { state->run(); });
}

Client::~Client() { close(); }

void Client::close() {
  {
    std::unique_lock lock(state_->mutex);
    state_->stopping = true;
    state_->changed.notify_all();
    state_->wake.signal();
    if (!state_->changed.wait_for(lock, kCloseGrace, [&] { return state_->finished; }) && state_->control) {
      state_->control->close();
    }
  }
  if (state_->thread.joinable()) state_->thread.join();
}

int Client::add_namespace(NamespaceSpec spec) {
  const std::lock_guard lock(state_->mutex);
  state_->specs.push_back(std::move(spec));
  state_->wake.signal();
  return static_cast<int>(state_->specs.size() - 1);
}

std::shared_ptr<const Session> Client::session() const {
  const std::lock_guard lock(state_->mutex);
  return state_->live;
}

ClientState Client::state() const {
  const std::lock_guard lock(state_->mutex);
  return state_->state;
}

std::string Client::problem() const {
  const std::lock_guard lock(state_->mutex);
  return state_->problem;
}

bool Client::wait_ready(std::uint32_t timeout_ms) const {
  std::unique_lock lock(state_->mutex);
  const auto ready = [&] { return state_->live && state_->live->namespace_ids.size() >= state_->specs.size(); };
  state_->changed.wait_for(lock, milliseconds(timeout_ms), [&] { return ready() || state_->finished; });
  return ready();
}

std::uint64_t Client::session_count() const {
  const std::lock_guard lock(state_->mutex);
  return state_->session_count;
}

const ClientConfig& Client::config() const { return state_->config; }

EventFeed& Client::events() { return state_->events; }

void Client::describe(const std::string& attribute, std::string value) {
  const std::lock_guard lock(state_->mutex);
  state_->told_next[attribute] = value;
  state_->attributes[attribute] = std::move(value);
}

void Client::report(const UsageReport& usage) {
  const std::lock_guard lock(state_->mutex);
  UsageReport& sum = state_->usage[usage.codec_spec];
  sum.hit_tokens += usage.hit_tokens;
  sum.requested_tokens += usage.requested_tokens;
  sum.loaded_tokens += usage.loaded_tokens;
  sum.loaded_raw_bytes += usage.loaded_raw_bytes;
  sum.loaded_encoded_bytes += usage.loaded_encoded_bytes;
  sum.failed_loads += usage.failed_loads;
  const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
    to.insert(to.end(), from.begin(),
              from.begin() + static_cast<std::ptrdiff_t>(
                                 std::min(from.size(), kMaxDurations - std::min(kMaxDurations, to.size()))));
  };
  append(sum.load_seconds, usage.load_seconds);
  append(sum.match_seconds, usage.match_seconds);
}

}  // namespace kvern
