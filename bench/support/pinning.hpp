// SPDX-License-Identifier: Apache-2.0
//
// bench/support/pinning.hpp - every worker on a processor of its own, so that the system moves none of them
// while they are timed.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/executor.hpp>

namespace codegemm::bench {

/// The processors that this thread may use: what taskset gave it.
[[nodiscard]] inline cpu_set_t allowed_processors() {
  cpu_set_t out;
  CPU_ZERO(&out);
  sched_getaffinity(0, sizeof(out), &out);
  return out;
}

/// Binds worker i to the i-th of the allowed processors; nothing where there are fewer than workers.
inline void pin_workers(Executor& executor, const cpu_set_t& allowed) {
  const int workers = executor.workers();
  if (CPU_COUNT(&allowed) < workers) return;
  std::atomic<int> arrived{0};
  parallel_for(executor, workers, [&](std::int64_t, int worker) {
    // Nobody goes on until all have come: so none of them takes two tasks.
    arrived.fetch_add(1);
    while (arrived.load() < workers) sched_yield();
    int left = worker;
    for (std::size_t processor = 0; processor < CPU_SETSIZE; ++processor) {
      if (!CPU_ISSET(processor, &allowed) || left-- > 0) continue;
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(processor, &one);
      sched_setaffinity(0, sizeof(one), &one);
      return;
    }
  });
}

/// Lets this thread use all of them again, and with it what it starts.
inline void unpin(const cpu_set_t& allowed) { sched_setaffinity(0, sizeof(allowed), &allowed); }

}  // namespace codegemm::bench
