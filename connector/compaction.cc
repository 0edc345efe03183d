#include "connector/compaction.h"

#include <utility>

#include "kernels/compaction.h"

namespace kvern {

Result<CompactionTerms> compaction_terms(std::string_view spec, std::uint32_t prompt_tokens) {
  auto plan = CompactionPlan::make(spec, prompt_tokens);
  if (!plan) return failure(plan.error());
  return CompactionTerms{std::move(plan->chain.spec), plan->slots, plan->query_rows};
}

}  // namespace kvern
