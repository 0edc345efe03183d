#include "service/otlp.h"

#include <nlohmann/json.hpp>

namespace kvern {
namespace {

using nlohmann::json;

constexpr int kStatusError = 2;  // Status.StatusCode

int kind_number(SpanKind kind) {
  switch (kind) {
    case SpanKind::kInternal:
      return 1;
    case SpanKind::kServer:
      return 2;
    case SpanKind::kClient:
      return 3;
  }
  return 0;
}

json attribute(std::string_view name, std::string_view text) {
  return {{"key", name}, {"value", {{"stringValue", text}}}};
}

json attribute(const SpanAttribute& of) {
  if (!of.number) return attribute(of.name, of.text);
  return {{"key", of.name}, {"value", {{"intValue", std::to_string(*of.number)}}}};
}

json span_json(const FinishedSpan& span, std::int64_t unix_offset_ns) {
  json result = {{"traceId", span.context.trace_id_hex()},
                 {"spanId", span.context.span_id_hex()},
                 {"name", span.name},
                 {"kind", kind_number(span.kind)},
                 {"startTimeUnixNano", std::to_string(span.start_ns + unix_offset_ns)},
                 {"endTimeUnixNano", std::to_string(span.end_ns + unix_offset_ns)}};
  if (span.parent_id) {
    TraceContext parent;
    parent.span_id = *span.parent_id;
    result["parentSpanId"] = parent.span_id_hex();
  }
  json attributes = json::array();
  for (const SpanAttribute& each : span.attributes) attributes.push_back(attribute(each));
  attributes.push_back(attribute("kvern.outcome", code_name(span.status.code())));
  result["attributes"] = std::move(attributes);
  // A miss, or no room at the moment, is an answer and no error.
  switch (span.status.code()) {
    case Code::kOk:
    case Code::kNotFound:
    case Code::kBusy:
      break;
    case Code::kRefused:
    case Code::kInvalid:
    case Code::kCorrupt:
    case Code::kUnavailable:
    case Code::kExpired:
    case Code::kInternal:
      result["status"] = {{"code", kStatusError}, {"message", span.status.message()}};
  }
  return result;
}

}  // namespace

std::string otlp_json(std::span<const FinishedSpan> spans, const TraceResource& resource, std::int64_t unix_offset_ns) {
  json items = json::array();
  for (const FinishedSpan& span : spans) items.push_back(span_json(span, unix_offset_ns));
  const json scope = {{"scope", {{"name", "kvern"}, {"version", resource.service_version}}},
                      {"spans", std::move(items)}};
  const json facts = json::array(
      {attribute("service.name", resource.service_name), attribute("service.version", resource.service_version),
       attribute("service.instance.id", resource.instance), attribute("host.name", resource.host)});
  json of_resource = {{"resource", {{"attributes", facts}}}};
  of_resource["scopeSpans"] = json::array({scope});
  json request;
  request["resourceSpans"] = json::array({std::move(of_resource)});
  // Bytes that are no UTF-8 are replaced: names come from clients.
  return request.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::uint64_t otlp_rejected_spans(std::string_view answer) {
  const json parsed = json::parse(answer, nullptr, false);
  if (!parsed.is_object()) return 0;
  const auto partial = parsed.find("partialSuccess");
  if (partial == parsed.end() || !partial->is_object()) return 0;
  const auto rejected = partial->find("rejectedSpans");
  if (rejected == partial->end()) return 0;
  if (rejected->is_number_unsigned()) return rejected->get<std::uint64_t>();
  if (!rejected->is_string()) return 0;
  std::uint64_t count = 0;
  for (const char c : rejected->get<std::string>()) {
    if (c < '0' || c > '9' || count > UINT32_MAX) return 0;
    count = 10 * count + static_cast<std::uint64_t>(c - '0');
  }
  return count;
}

}  // namespace kvern
