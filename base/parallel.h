#pragma once

#include <cstddef>
#include <functional>

namespace kvern {

class Executor;

/// Runs body(0) … body(count - 1), each once, in any order, on the calling thread and, where executor is given, on its
/// threads as well; returns when all have run. Tasks that the executor does not take are run by the caller, so it never
/// waits for a queue. Results must depend on the index alone, never on the thread. body must not throw.
void parallel_for(Executor* executor, std::size_t count, const std::function<void(std::size_t)>& body);

}  // namespace kvern
