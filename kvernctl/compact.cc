#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <ostream>
#include <string>
#include <vector>

#include "base/keys.h"
#include "kvernctl/commands.h"
#include "transport/compact_handle.h"

namespace kvern {
namespace {

using std::chrono::milliseconds;

int fail(std::ostream& out, const Status& status) {
  out << status.to_string() << "\n";
  return status.code() == Code::kNotFound ? 1 : 2;
}

const char* name(wire::CompactionState state) {
  return state == wire::COMPACTION_READY ? "ready" : state == wire::COMPACTION_FAILED ? "failed" : "pending";
}

std::string percent(std::uint64_t part, std::uint64_t whole) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f %%",
                whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole));
  return text;
}

std::string duration(std::int64_t seconds) {
  constexpr std::int64_t kMinute = 60, kHour = 3600, kDay = 86'400;
  if (seconds < 2 * kMinute) return std::to_string(std::max<std::int64_t>(0, seconds)) + " s";
  if (seconds < 2 * kHour) return std::to_string(seconds / kMinute) + " min";
  return seconds < 2 * kDay ? std::to_string(seconds / kHour) + " h" : std::to_string(seconds / kDay) + " d";
}

std::string about_sizes(const wire::CompactionReport& report, const CompactHandle& handle) {
  std::string text = std::to_string(handle.slots) + " of " + std::to_string(handle.prompt_tokens) + " tokens";
  if (report.state() == wire::COMPACTION_READY) {
    text += ", " + std::to_string(report.stored_bytes()) + " bytes (" +
            percent(report.stored_bytes(), report.raw_bytes()) + " of raw)";
  }
  return text;
}

void show(std::ostream& out, const wire::CompactionReport& report, const CompactHandle& handle) {
  const auto& id = report.namespace_id();
  out << "handle     " << report.handle() << "\n"
      << "state      " << name(report.state()) << (report.reason().empty() ? "" : ": ") << report.reason() << "\n"
      << "method     " << report.method() << "\n"
      << "keeps      " << about_sizes(report, handle) << "\n"
      << "namespace  " << to_hex({reinterpret_cast<const std::uint8_t*>(id.data()), id.size()}) << ", group "
      << report.group() << "\n"
      << "owner      " << report.tenant() << "/" << report.client_name() << "\n"
      << "expires    in " << duration(handle.expires_at - std::time(nullptr)) << "\n";
  if (report.state() != wire::COMPACTION_READY) return;
  out << "made in    " << std::lround(report.seconds() * 1e3) << " ms\n";
  if (report.error_to_come()) out << "error      is being measured\n";
  if (!report.has_error_mean()) return;
  char text[64];
  std::snprintf(text, sizeof text, "%.4f mean, %.4f max over the layers", report.error_mean(), report.error_max());
  out << "error      " << text << "\n";
}

/// The caches that the daemon names.
Result<std::vector<wire::CompactionReport>> ask(ToolSession& session, const std::string& handle, milliseconds wait) {
  wire::ControlRequest request;
  request.mutable_compaction()->set_handle(handle);
  request.mutable_compaction()->set_wait_ms(static_cast<std::uint64_t>(wait.count()));
  wire::ControlReply reply;
  if (const Status status = session.call(request, &reply); !status) return failure(status);
  return std::vector<wire::CompactionReport>(reply.compactions().items().begin(), reply.compactions().items().end());
}

}  // namespace

int run_compact_list(const DaemonAddress& address, std::ostream& out) {
  auto session = ToolSession::open(address);
  if (!session) return fail(out, session.error());
  const auto reports = ask(*session, "", milliseconds(0));
  if (!reports) return fail(out, reports.error());
  for (const auto& report : *reports) {
    const auto handle = CompactHandle::parse(report.handle());
    if (!handle) continue;
    out << report.handle() << "  " << name(report.state()) << "  " << about_sizes(report, *handle) << "  "
        << report.method().substr(0, report.method().find('(')) << "  " << report.tenant() << "/"
        << report.client_name() << "  expires in " << duration(handle->expires_at - std::time(nullptr)) << "\n";
  }
  out << reports->size() << " compact caches\n";
  return 0;
}

int run_compact_show(const DaemonAddress& address, const std::string& handle, std::uint32_t wait_seconds,
                     std::ostream& out) {
  const auto parsed = CompactHandle::parse(handle);
  if (!parsed) return fail(out, parsed.error());
  auto session = ToolSession::open(address);
  if (!session) return fail(out, session.error());
  using SteadyClock = std::chrono::steady_clock;
  const auto until = SteadyClock::now() + std::chrono::seconds(wait_seconds);
  while (true) {
    const auto left = std::chrono::ceil<milliseconds>(until - SteadyClock::now());
    const auto reports = ask(*session, handle, std::clamp(left, milliseconds(0), milliseconds(address.timeout_ms / 2)));
    if (!reports) return fail(out, reports.error());
    if (reports->size() != 1) return fail(out, Status(Code::kInternal, "the daemon's answer names no compact cache"));
    const wire::CompactionReport& report = reports->front();
    const bool to_come = report.state() == wire::COMPACTION_PENDING || report.error_to_come();
    if (to_come && SteadyClock::now() < until) continue;
    show(out, report, *parsed);
    return report.state() == wire::COMPACTION_FAILED ? 1 : 0;
  }
}

int run_compact_delete(const DaemonAddress& address, const std::string& handle, std::ostream& out) {
  auto session = ToolSession::open(address);
  if (!session) return fail(out, session.error());
  wire::ControlRequest request;
  request.mutable_delete_compaction()->set_handle(handle);
  wire::ControlReply reply;
  if (const Status status = session->call(request, &reply); !status) return fail(out, status);
  out << "deleted\n";
  return 0;
}

}  // namespace kvern
