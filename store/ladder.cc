#include "store/ladder.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <utility>

#include "kernels/codec.h"

namespace kvern {
namespace {

Status invalid(const LadderProfile& profile, const std::string& what) {
  return {Code::kInvalid, "ladder " + profile.name + ": " + what};
}

}  // namespace

Status LadderProfile::validate() const {
  if (rungs.empty()) return invalid(*this, "it has no rung");
  if (rungs.size() > 255) return invalid(*this, "it has more than 255 rungs");
  for (std::size_t i = 0; i < rungs.size(); ++i) {
    const Rung& rung = rungs[i];
    const std::string where = "rung " + std::to_string(i) + " (" + rung.codec_spec + "): ";
    if (const auto codec = make_codec(rung.codec_spec); !codec) return invalid(*this, where + codec.error().message());
    if (!std::isfinite(rung.bytes_share) || rung.bytes_share <= 0) {
      return invalid(*this, where + "bytes_share must be above 0");
    }
    if (!std::isfinite(rung.error) || rung.error < 0) return invalid(*this, where + "error must not be negative");
    if (i == 0) {
      if (rung.is_part_of_previous) return invalid(*this, where + "there is no rung before it");
      continue;
    }
    if (rung.bytes_share >= rungs[i - 1].bytes_share) {
      return invalid(*this, where + "it must be smaller than the rung before");
    }
    if (rung.error < rungs[i - 1].error) {
      return invalid(*this, where + "it is smaller and more exact than the rung before: leave that one out");
    }
  }
  return Status::ok();
}

Result<LadderProfile> find_ladder_profile(std::string_view name) {
  std::string known;
  for (const LadderProfile& profile : ladder_profiles()) {
    if (profile.name == name) return profile;
    known += (known.empty() ? "" : ", ") + profile.name;
  }
  return failure(Code::kInvalid, "no ladder is called \"" + std::string(name) + "\": use one of " + known);
}

std::optional<double> known_error(const std::string& codec_spec) {
  // Asked for each chunk: containers name their codec in its canonical form.
  static const std::map<std::string, double, std::less<>> of_rungs = [] {
    std::map<std::string, double, std::less<>> errors;
    for (const LadderProfile& profile : ladder_profiles()) {
      for (const Rung& rung : profile.rungs) {
        if (const auto codec = make_codec(rung.codec_spec)) errors.emplace((*codec)->spec(), rung.error);
      }
    }
    return errors;
  }();
  if (const auto found = of_rungs.find(codec_spec); found != of_rungs.end()) return found->second;
  const auto codec = make_codec(codec_spec);
  if (!codec) return std::nullopt;
  if ((*codec)->lossless()) return 0;
  const auto found = of_rungs.find((*codec)->spec());
  return found == of_rungs.end() ? std::nullopt : std::optional(found->second);
}

Result<Ladder> Ladder::make(LadderProfile profile, double max_relative_error) {
  if (const Status status = profile.validate(); !status) return failure(status);
  std::erase_if(profile.rungs, [&](const Rung& rung) { return !(rung.error <= max_relative_error); });
  if (profile.rungs.empty()) {
    return failure(Code::kRefused, "ladder " + profile.name + " has no rung with an error of at most " +
                                       std::to_string(max_relative_error) + ": use a more exact one");
  }
  return Ladder(std::move(profile));
}

std::optional<StoredForm> Ladder::step(StoredForm from, std::size_t to) const {
  if (from.rung >= to || to >= profile_.rungs.size()) return std::nullopt;
  const Rung& rung = profile_.rungs[to];
  if (profile_.rungs[from.rung].error > rung.source_error_max) return std::nullopt;
  const bool encodes = !rung.is_part_of_previous || from.rung + std::size_t{1} != to;
  const auto generations = static_cast<std::uint8_t>(from.lossy_generations + (encodes ? is_lossy(to) : 0));
  if (generations > kLossyGenerationsMost) return std::nullopt;
  return StoredForm{static_cast<std::uint8_t>(to), generations};
}

}  // namespace kvern
