// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/executor.hpp - where parallel work runs: on the caller's own threads, by the caller's choice.
// Layer: base (host only).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include <codegemm/base/macros.hpp>

namespace codegemm {

/// Runs the tasks of one parallel loop. The libraries start no thread of their own: every parallel call
/// takes an Executor, and its results do not depend on how many workers the executor has.
class Executor {
 public:
  /// What is run for each task: `context` is the caller's, `worker` the number of the thread it runs on.
  using Task = void (*)(void* context, std::int64_t task, int worker);

  Executor() = default;
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;
  virtual ~Executor() = default;

  /// Upper bound of the worker numbers given to a task, for per-worker scratch memory. At least 1.
  [[nodiscard]] virtual int workers() const noexcept = 0;

  /// Calls task(context, i, worker) once for each i in [0, count) and returns when all have ended. A task
  /// must not throw and must not call run() of the same executor. Not to be called from two threads at once.
  virtual void run(std::int64_t count, Task task, void* context) = 0;
};

/// Calls body(i, worker) for each i in [0, count) on the executor. Allocates nothing.
template <class Body>
void parallel_for(Executor& executor, std::int64_t count, Body&& body) {
  if (count <= 0) return;
  using Plain = std::remove_reference_t<Body>;
  executor.run(
      count,
      [](void* context, std::int64_t task, int worker) { (*static_cast<Plain*>(context))(task, worker); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

/// Everything on the calling thread, in order.
class SerialExecutor final : public Executor {
 public:
  [[nodiscard]] int workers() const noexcept override { return 1; }
  void run(std::int64_t count, Task task, void* context) override {
    for (std::int64_t i = 0; i < count; ++i) task(context, i, 0);
  }
};

}  // namespace codegemm
