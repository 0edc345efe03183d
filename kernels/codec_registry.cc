#include "kernels/codec_registry.h"

#include <algorithm>
#include <array>

/// Every step of a codec chain that there is, one line each.
#define KVERN_STEPS(EVICT, UNROTATE, MERGE, CLUSTER, QUANTISE, ENTROPY) \
  EVICT(cake)                                                           \
  EVICT(windowkv)                                                       \
  EVICT(snapkv)                                                         \
  EVICT(h2o)                                                            \
  EVICT(streaming)                                                      \
  EVICT(knorm)                                                          \
  EVICT(keydiff)                                                        \
  UNROTATE(unrotate)                                                    \
  MERGE(minicache)                                                      \
  CLUSTER(centroid)                                                     \
  QUANTISE(raw)                                                         \
  QUANTISE(int8)                                                        \
  QUANTISE(fp8)                                                         \
  QUANTISE(int4)                                                        \
  QUANTISE(int3)                                                        \
  QUANTISE(int2)                                                        \
  QUANTISE(int8r)                                                       \
  ENTROPY(zstd)

namespace kvern {

#define KVERN_CANONICAL(name) CanonicalStep canonical_##name;
#define KVERN_WRAPPER(name) MakeWrapper make_##name##_wrapper;
#define KVERN_REDUCER(name) MakeReducer make_##name##_reducer;
#define KVERN_FORM(name) MakeForm make_##name##_form;
KVERN_STEPS(KVERN_CANONICAL, KVERN_WRAPPER, KVERN_REDUCER, KVERN_REDUCER, KVERN_FORM, KVERN_WRAPPER)
#undef KVERN_CANONICAL
#undef KVERN_WRAPPER
#undef KVERN_REDUCER
#undef KVERN_FORM

namespace {

#define KVERN_EVICT(name) StepEntry{#name, StepKind::kEvict, canonical_##name},
#define KVERN_UNROTATE(name) StepEntry{#name, StepKind::kUnrotate, make_##name##_wrapper},
#define KVERN_MERGE(name) StepEntry{#name, StepKind::kMerge, make_##name##_reducer},
#define KVERN_CLUSTER(name) StepEntry{#name, StepKind::kCluster, make_##name##_reducer},
#define KVERN_QUANTISE(name) StepEntry{#name, StepKind::kQuantise, make_##name##_form},
#define KVERN_ENTROPY(name) StepEntry{#name, StepKind::kEntropy, make_##name##_wrapper},
const auto kSteps = std::to_array<StepEntry>(
    {KVERN_STEPS(KVERN_EVICT, KVERN_UNROTATE, KVERN_MERGE, KVERN_CLUSTER, KVERN_QUANTISE, KVERN_ENTROPY)});

}  // namespace

std::span<const StepEntry> all_steps() { return kSteps; }

Result<const StepEntry*> find_step(std::string_view name) {
  const auto entry = std::ranges::find(kSteps, name, &StepEntry::name);
  if (entry != kSteps.end()) return entry;
  std::string names;
  for (const StepEntry& step : kSteps) names.append(names.empty() ? "" : ", ").append(step.name);
  return failure(Code::kInvalid, "there is no codec '" + std::string(name) + "'; there are: " + names);
}

}  // namespace kvern
