#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvern {

/// One representation on a ladder.
struct Rung {
  std::string codec_spec;
  /// Bytes of whole containers of 256 tokens, as a share of the raw bytes.
  double bytes_share = 1;
  /// Relative L2 error of the attention output; 0: lossless.
  double error = 0;
  /// It is made from forms of at most this error: clustering keys that were quantised coarsely adds up errors.
  double source_error_max = 1;
  /// It lies within the bytes of the rung before, so that the step encodes nothing and loses nothing else.
  bool is_part_of_previous = false;
};

/// A namespace's representations, from exact to smallest.
struct LadderProfile {
  std::string name;
  std::vector<Rung> rungs;
  /// kInvalid unless there is a rung, specs are known to the codecs, bytes fall and errors do not.
  Status validate() const;
};

/// `exact`, `balanced` and `compact`; see store/ladder_profiles.cc for where their figures come from.
std::span<const LadderProfile> ladder_profiles();
/// kInvalid, with the names that there are, for any other.
Result<LadderProfile> find_ladder_profile(std::string_view name);

/// The relative error of what this chain stores, where it is known: 0 for lossless ones, and that of the rung for those
/// that stand on a profile.
std::optional<double> known_error(const std::string& codec_spec);

/// How a chunk is stored.
struct StoredForm {
  std::uint8_t rung = 0;
  /// How many lossy encodings lie behind it.
  std::uint8_t lossy_generations = 0;
  bool operator==(const StoredForm&) const = default;
};

/// The rules of one namespace's ladder. Immutable.
class Ladder {
 public:
  /// At most so many lossy encodings lie behind any form: their errors add up unseen.
  static constexpr std::uint8_t kLossyGenerationsMost = 2;

  /// Rungs that miss max_relative_error, the namespace's floor, are cut off. kInvalid when the profile is not valid,
  /// kRefused when no rung is left.
  static Result<Ladder> make(LadderProfile profile, double max_relative_error = 1);

  const std::string& name() const { return profile_.name; }
  std::span<const Rung> rungs() const { return profile_.rungs; }
  const Rung& rung(StoredForm form) const { return profile_.rungs[form.rung]; }
  /// What a fresh chunk is stored as.
  StoredForm first() const { return {0, is_lossy(0)}; }
  /// What a step to the rung would give; nullopt when it is none downwards, or is not allowed.
  std::optional<StoredForm> step(StoredForm from, std::size_t rung) const;
  /// Whether a reader with this floor may have it. A stricter one never gets a weaker form.
  bool may_serve(StoredForm form, double max_relative_error) const { return rung(form).error <= max_relative_error; }

 private:
  explicit Ladder(LadderProfile profile) : profile_(std::move(profile)) {}
  std::uint8_t is_lossy(std::size_t rung) const { return profile_.rungs[rung].error > 0 ? 1 : 0; }

  LadderProfile profile_;
};

}  // namespace kvern
