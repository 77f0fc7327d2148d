// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/executor.hpp>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include <support/catch.hpp>

using codegemm::parallel_for;
using codegemm::SerialExecutor;

namespace {

/// Stands for an engine that has threads already.
class Engine {
 public:
  [[nodiscard]] int threads() const noexcept { return 3; }
  /// body(i) on each thread; returns when all have ended.
  void on_every_thread(const std::function<void(int)>& body) const {
    std::vector<std::thread> threads;
    for (int i = 1; i < this->threads(); ++i) threads.emplace_back(body, i);
    body(0);
    for (std::thread& thread : threads) thread.join();
  }
};

// [guide: executor]
class EngineExecutor final : public codegemm::Executor {
 public:
  explicit EngineExecutor(Engine& engine) : engine_(engine) {}

  [[nodiscard]] int workers() const noexcept override { return engine_.threads(); }
  void run(std::int64_t count, Task task, void* context) override {
    std::atomic<std::int64_t> next{0};
    engine_.on_every_thread([&](int worker) {
      for (std::int64_t i = next++; i < count; i = next++) task(context, i, worker);
    });
  }

 private:
  Engine& engine_;
};
// [guide: end]

}  // namespace

TEST_CASE("serial executor: every task once, in order, all by worker 0") {
  SerialExecutor executor;
  CHECK(executor.workers() == 1);
  std::vector<std::int64_t> order;
  bool other_worker = false;
  parallel_for(executor, 5, [&](std::int64_t task, int worker) {
    order.push_back(task);
    other_worker = other_worker || worker != 0;
  });
  CHECK(order == std::vector<std::int64_t>{0, 1, 2, 3, 4});
  CHECK_FALSE(other_worker);
}

TEST_CASE("parallel_for: no tasks, no call") {
  SerialExecutor executor;
  int calls = 0;
  for (const std::int64_t count : {std::int64_t{0}, std::int64_t{-1}, INT64_MIN}) {
    parallel_for(executor, count, [&](std::int64_t, int) { ++calls; });
  }
  CHECK(calls == 0);
}

TEST_CASE("parallel_for: takes a body that is const, or keeps state of its own") {
  SerialExecutor executor;
  std::int64_t sum = 0;
  const auto constant = [&sum](std::int64_t task, int) { sum += task; };
  parallel_for(executor, 4, constant);
  CHECK(sum == 6);

  auto counting = [calls = 0](std::int64_t, int) mutable { return ++calls; };
  parallel_for(executor, 3, counting);
  CHECK(counting(0, 0) == 4);  // by reference: the caller's object was called, not a copy
}

TEST_CASE("an engine's own threads serve as an executor: every task once") {
  Engine engine;
  EngineExecutor executor(engine);
  std::vector<int> times(1000, 0);
  std::atomic<bool> known_worker{true};
  for (int round = 0; round < 20; ++round) {
    parallel_for(executor, std::ssize(times), [&](std::int64_t task, int worker) {
      ++times[static_cast<std::size_t>(task)];
      if (worker < 0 || worker >= executor.workers()) known_worker = false;
    });
  }
  CHECK(times == std::vector<int>(1000, 20));
  CHECK(known_worker);
}
