// SPDX-License-Identifier: Apache-2.0

#include <sched.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include <bench/support/contender.hpp>
#include <bench/support/pinning.hpp>
#include <codegemm/base/thread_pool.hpp>
#include <support/catch.hpp>

using namespace codegemm;
using namespace codegemm::bench;

TEST_CASE("calls are numbered over all turns", "[contender]") {
  std::vector<std::size_t> calls;
  Contender counted = timed("counted", [&](std::size_t call) { calls.push_back(call); });
  CHECK(counted.turn(2).size() == 2);
  CHECK(counted.turn(3).size() == 3);
  CHECK(calls == std::vector<std::size_t>{0, 1, 2, 3, 4});
  CHECK(counted.seconds.empty());
  counted.seconds = {3e-6, 1e-6, 2e-6};
  CHECK(counted.median_us() == 2e-6 * 1e6);
}

TEST_CASE("every worker has one processor, and no two the same", "[pinning]") {
  const cpu_set_t allowed = allowed_processors();
  if (CPU_COUNT(&allowed) < 2) return;
  ThreadPool pool(2);
  pin_workers(pool, allowed);
  std::vector<cpu_set_t> own(2);
  std::vector<int> tasks(2);
  while (tasks[0] == 0 || tasks[1] == 0) {
    parallel_for(pool, 16, [&](std::int64_t, int worker) {
      own[static_cast<std::size_t>(worker)] = allowed_processors();
      ++tasks[static_cast<std::size_t>(worker)];
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    });
  }
  CHECK(CPU_COUNT(&own[0]) == 1);
  CHECK(CPU_COUNT(&own[1]) == 1);
  CHECK(CPU_EQUAL(&own[0], &own[1]) == 0);
  unpin(allowed);
  const cpu_set_t now = allowed_processors();
  CHECK(CPU_EQUAL(&now, &allowed) != 0);
}

TEST_CASE("with more workers than processors nothing is bound", "[pinning]") {
  cpu_set_t allowed = allowed_processors();
  ThreadPool pool(CPU_COUNT(&allowed) + 1);
  pin_workers(pool, allowed);
  const cpu_set_t now = allowed_processors();
  CHECK(CPU_EQUAL(&now, &allowed) != 0);
}
