// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/thread_pool.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::parallel_for;
using codegemm::ThreadPool;

TEST_CASE("thread pool: as many workers as asked for, at least one") {
  CHECK(ThreadPool(1).workers() == 1);
  CHECK(ThreadPool(3).workers() == 3);
  const auto hardware = static_cast<int>(std::thread::hardware_concurrency());
  CHECK(ThreadPool().workers() == (hardware > 0 ? hardware : 1));
  CHECK(ThreadPool(-5).workers() == ThreadPool().workers());
}

TEST_CASE("thread pool: every task exactly once, by a worker in range") {
  for (const int workers : {1, 2, 3, 8}) {
    ThreadPool pool(workers);
    for (const std::int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
      CAPTURE(workers, count);
      std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
      std::atomic<bool> out_of_range{false};
      parallel_for(pool, count, [&](std::int64_t task, int worker) {
        calls[static_cast<std::size_t>(task)].fetch_add(1);
        if (worker < 0 || worker >= workers) out_of_range = true;
      });
      int wrong = 0;
      for (const std::atomic<int>& n : calls) wrong += n.load() == 1 ? 0 : 1;
      CHECK(wrong == 0);
      CHECK_FALSE(out_of_range.load());
    }
  }
}

TEST_CASE("thread pool: what the tasks wrote is there when run() returns, loop after loop") {
  // Plain memory, no atomics: a missing happens-before shows here under TSan, and as a wrong sum otherwise.
  ThreadPool pool(4);
  std::vector<std::int64_t> numbers(257, 0);
  constexpr int kLoops = 2000;
  for (int loop = 0; loop < kLoops; ++loop) {
    parallel_for(pool, static_cast<std::int64_t>(numbers.size()),
                 [&](std::int64_t task, int) { numbers[static_cast<std::size_t>(task)] += task; });
  }
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    wrong += numbers[i] == static_cast<std::int64_t>(i) * kLoops ? 0 : 1;
  }
  CHECK(wrong == 0);
}

TEST_CASE("thread pool: run() waits for the slowest task, whoever runs it") {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::atomic<int> started{0};
    std::atomic<bool> slow_one_done{false};
    parallel_for(pool, 2, [&](std::int64_t, int worker) {
      ++started;
      while (started < 2) std::this_thread::yield();  // one task for each worker
      if (worker == 0) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      slow_one_done = true;
    });
    REQUIRE(slow_one_done);
  }
}

TEST_CASE("thread pool: no two tasks run under one worker number at a time") {
  ThreadPool pool(4);
  std::vector<int> scratch(4, 0);  // per worker, as the kernels use it: plain
  std::atomic<int> collisions{0};
  for (int loop = 0; loop < 200; ++loop) {
    parallel_for(pool, 64, [&](std::int64_t task, int worker) {
      int& mine = scratch[static_cast<std::size_t>(worker)];
      mine = static_cast<int>(task);
      for (int spin = 0; spin < 20; ++spin) std::atomic_signal_fence(std::memory_order_seq_cst);
      if (mine != static_cast<int>(task)) ++collisions;
    });
  }
  CHECK(collisions == 0);
}

TEST_CASE("thread pool: wakes up after its workers have gone to sleep") {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    std::atomic<int> done{0};
    parallel_for(pool, 9, [&](std::int64_t, int) { ++done; });
    REQUIRE(done == 9);
  }
}

TEST_CASE("thread pool: uneven tasks, with loops of random length in between") {
  const std::uint64_t seed = codegemm::test::seed_or(11);
  CAPTURE(seed);
  codegemm::test::Rng rng(seed);
  ThreadPool pool(3);
  for (int loop = 0; loop < 300; ++loop) {
    const std::int64_t count = rng.below(20);
    std::atomic<std::int64_t> sum{0};
    parallel_for(pool, count, [&](std::int64_t task, int) {
      if (task == 0) std::this_thread::yield();
      sum.fetch_add(task + 1);
    });
    REQUIRE(sum == count * (count + 1) / 2);
  }
}

TEST_CASE("thread pool: made and ended at once, used or not, ends") {
  int used = 0;
  for (int round = 0; round < 50; ++round) {
    ThreadPool pool(4);
    if (round % 2 == 0) continue;
    std::atomic<int> done{0};
    parallel_for(pool, 4, [&](std::int64_t, int) { ++done; });
    used += done.load();
  }
  CHECK(used == 100);
}
