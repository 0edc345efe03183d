#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/trace.h"

namespace kvern {

/// OTLP, the protocol of OpenTelemetry collectors, in JSON over HTTP: ids in hexadecimal digits, 64-bit numbers as
/// texts, enums as numbers (opentelemetry-proto 1.x, "JSON Protobuf Encoding").

/// Who the spans are of.
struct TraceResource {
  std::string service_name;
  std::string service_version;
  std::string instance;  ///< tells daemons of one name apart
  std::string host;
};

/// An ExportTraceServiceRequest. unix_offset_ns: what the spans' times are behind unix time.
std::string otlp_json(std::span<const FinishedSpan> spans, const TraceResource& resource, std::int64_t unix_offset_ns);

/// Spans that the answer, of an unknown server, says it has not taken; 0 when it says nothing that one could read.
std::uint64_t otlp_rejected_spans(std::string_view answer);

}  // namespace kvern
