#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"
#include "transport/wire.pb.h"

namespace kvern {

/// Both sides must agree on this number; a mismatch is refused in a sentence that names both.
constexpr std::uint32_t kProtocolVersion = 1;
/// Largest message on any way in. Larger ones are answered with kInvalid (ring) or dropped by ZeroMQ (control).
constexpr std::size_t kMaxMessageBytes = 1U << 20;
/// Largest number of items in one Reserve, Commit, Fetch or Release.
constexpr int kMaxItems = 1024;

void set_status(const Status& status, wire::StatusMessage* message);
Status to_status(const wire::StatusMessage& message);

/// Stands for the codec of a load whose chunks were stored in several forms.
constexpr std::string_view kMixedCodecs = "mixed";
/// Takes one more chunk into what is said of a load; empty: of none so far.
void add_codec(std::string_view spec, std::string* of_all);

}  // namespace kvern
