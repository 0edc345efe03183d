#include <cmath>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>

#include "kvernctl/commands.h"

namespace kvern {
namespace {

using nlohmann::json;

std::string text(const json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) return "-";
  return found->is_string() ? found->get<std::string>() : found->dump();
}

std::string bytes_text(const json& object, const char* key) {
  double value = object.value(key, 0.0);
  const char* unit = "B";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    if (value < 1024) break;
    value /= 1024;
    unit = next;
  }
  std::string digits = std::to_string(value);
  digits.resize(digits.find('.') + 2);
  return digits + " " + unit;
}

/// "12 %" of whole, "-" when there is nothing.
std::string share(const json& object, const char* part, const char* whole) {
  const double of = object.value(whole, 0.0);
  return of > 0 ? std::to_string(std::lround(100.0 * object.value(part, 0.0) / of)) + " %" : "-";
}

void print_store(const json& store, std::ostream& out) {
  out << "store      " << bytes_text(store, "used_bytes") << " of " << bytes_text(store, "capacity_bytes") << " ("
      << share(store, "used_bytes", "capacity_bytes") << ") in " << text(store, "chunks") << " chunks; "
      << bytes_text(store, "raw_bytes") << " raw, stored at " << share(store, "encoded_bytes", "raw_bytes") << "\n"
      << "           " << text(store, "evicted_chunks") << " evicted, " << text(store, "quarantined_chunks")
      << " quarantined, " << text(store, "incomplete_chunks") << " incomplete, " << text(store, "pinned_chunks")
      << " in use\n";
  const auto forms = store.value("forms", json::array());
  if (forms.size() < 2 && store.value("demoted_chunks", 0) == 0) return;
  out << "forms      " << text(store, "demoted_chunks") << " steps down freed " << bytes_text(store, "demoted_bytes")
      << "\n";
  for (const auto& form : forms) {
    out << "           " << text(form, "chunks") << " chunks, " << bytes_text(form, "bytes") << " as "
        << text(form, "codec") << "\n";
  }
}

void print_tiers(const json& tiers, std::ostream& out) {
  for (const auto& tier : tiers) {
    out << std::left << std::setw(11) << text(tier, "name") << bytes_text(tier, "used_bytes");
    if (tier.value("capacity_bytes", 0.0) > 0) out << " of " << bytes_text(tier, "capacity_bytes");
    out << " in " << text(tier, "chunks") << " chunks, written " << text(tier, "write") << "; "
        << text(tier, "promoted_chunks") << " came up, " << text(tier, "saved_chunks") << " went down, "
        << text(tier, "unsaved_chunks") << " given up, " << text(tier, "corrupt_chunks") << " damaged";
    if (text(tier, "breaker") != "closed") out << "; CUT OFF after failures (" << text(tier, "breaker") << ")";
    out << "\n";
  }
}

void print_sessions(const json& sessions, std::ostream& out) {
  out << "sessions   " << sessions.size() << "\n";
  for (const auto& session : sessions) {
    out << "  " << std::left << std::setw(10) << text(session, "role") << std::setw(9) << text(session, "data_plane")
        << text(session, "client_name") << ", tenant " << text(session, "tenant") << ", staging "
        << bytes_text(session, "staging_used_bytes") << " of " << bytes_text(session, "staging_bytes") << ", "
        << text(session, "leases") << " leases, heard of " << static_cast<int>(session.value("silent_seconds", 0.0))
        << " s ago\n";
    const json attributes = session.value("attributes", json::object());
    for (const auto& [name, value] : attributes.items()) {
      out << "             " << name << " " << (value.is_string() ? value.get<std::string>() : value.dump()) << "\n";
    }
  }
}

void print_namespaces(const json& namespaces, std::ostream& out) {
  out << "namespaces " << namespaces.size() << "\n";
  for (const auto& one : namespaces) {
    out << "  " << text(one, "id") << "  " << text(one, "model") << ", tenant " << text(one, "tenant") << ", codec "
        << text(one, "codec") << ", ladder " << text(one, "ladder") << ", blocks of " << text(one, "block_tokens")
        << " tokens in chunks of " << text(one, "chunk_tokens") << "\n";
  }
}

}  // namespace

int run_status(const DaemonAddress& address, bool as_json, std::ostream& out) {
  auto session = ToolSession::open(address);
  if (!session) {
    out << session.error().to_string() << "\n";
    return 2;
  }
  wire::ControlRequest request;
  request.mutable_status();
  wire::ControlReply reply;
  if (const Status asked = session->call(request, &reply); !asked) {
    out << asked.to_string() << "\n";
    return 2;
  }
  const auto status = json::parse(reply.status_report().json(), nullptr, false);
  if (!status.is_object()) {
    out << "the daemon's status report cannot be read: kvernctl and kvernd are of different builds\n";
    return 2;
  }
  if (as_json) {
    out << status.dump(1) << "\n";
    return 0;
  }
  out << "kvernd     " << text(status, "version") << " at " << address.address << ", " << text(status, "state")
      << ", up " << static_cast<std::uint64_t>(status.value("uptime_seconds", 0.0)) << " s\n";
  const auto pipeline = status.value("pipeline", json::object());
  out << "pipeline   " << text(pipeline, "stored") << " chunks stored, " << text(pipeline, "failed") << " failed, "
      << text(pipeline, "queued") << " queued for " << text(pipeline, "threads") << " threads\n";
  print_store(status.value("store", json::object()), out);
  for (const auto& tenant : status.value("tenants", json::array())) {
    out << "tenant     " << text(tenant, "name") << ": " << bytes_text(tenant, "used_bytes") << " of "
        << bytes_text(tenant, "limit_bytes") << ", " << text(tenant, "refused") << " refused\n";
  }
  print_tiers(status.value("lower_tiers", json::array()), out);
  print_sessions(status.value("sessions", json::array()), out);
  print_namespaces(status.value("namespaces", json::array()), out);
  return 0;
}

}  // namespace kvern
