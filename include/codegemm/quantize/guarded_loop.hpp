// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/guarded_loop.hpp - a parallel loop whose tasks may run out of memory.
// Layer: quantize (host only).
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <utility>

#include <codegemm/base/executor.hpp>

namespace codegemm::detail {

/// parallel_for() for tasks that allocate. An Executor's tasks must not let an exception out; here the first
/// std::bad_alloc goes on to the calling thread once all tasks have ended, where the quantizers turn it into
/// kOutOfMemory.
template <class Body>
void guarded_for(Executor& executor, std::int64_t count, Body&& body) {
  std::atomic<bool> failed{false};
  std::exception_ptr first;
  parallel_for(executor, count, [&](std::int64_t task, int worker) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      body(task, worker);
    } catch (const std::bad_alloc&) {
      if (!failed.exchange(true)) first = std::current_exception();
    }
  });
  if (first != nullptr) std::rethrow_exception(first);
}

}  // namespace codegemm::detail
