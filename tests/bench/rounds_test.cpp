// SPDX-License-Identifier: Apache-2.0

#include <sched.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include <bench/support/pinning.hpp>
#include <bench/support/rounds.hpp>
#include <codegemm/base/thread_pool.hpp>
#include <support/catch.hpp>

using namespace codegemm;
using namespace codegemm::bench;

namespace {

// Says that a call takes `seconds`, and writes down whose turn it was.
Contender pretender(const std::string& name, double seconds, std::vector<std::string>& turns) {
  return {name, [name, seconds, &turns](std::int64_t calls) {
            turns.push_back(name + std::to_string(calls));
            return std::vector<double>(static_cast<std::size_t>(calls), seconds);
          }};
}

}  // namespace

TEST_CASE("each contender has a turn of about as long, and every round begins with another", "[rounds]") {
  std::vector<std::string> turns;
  std::vector<Contender> contenders = {pretender("a", 0.25, turns), pretender("b", 1.0, turns),
                                       pretender("c", 8.0, turns)};
  run_rounds(contenders, 4, 1.0);
  CHECK(turns == std::vector<std::string>{"a2", "b2", "c2",  // not counted
                                          "a4", "b1", "c1", "b1", "c1", "a4", "c1", "a4", "b1",  //
                                          "a4", "b1", "c1"});
  CHECK(contenders[0].seconds.size() == 16);
  CHECK(contenders[1].seconds.size() == 4);
  CHECK(contenders[2].seconds.size() == 4);
  CHECK(contenders[0].median_us() == 0.25e6);
}

TEST_CASE("calls are numbered over all turns", "[rounds]") {
  std::vector<std::size_t> calls;
  Contender counted = timed("counted", [&](std::size_t call) { calls.push_back(call); });
  CHECK(counted.turn(2).size() == 2);
  CHECK(counted.turn(3).size() == 3);
  CHECK(calls == std::vector<std::size_t>{0, 1, 2, 3, 4});
}

TEST_CASE("a contender that rests keeps the next one waiting", "[rounds]") {
  std::vector<std::string> turns;
  std::vector<Contender> contenders = {pretender("a", 1.0, turns)};
  contenders[0].rest = std::chrono::milliseconds(5);
  const auto start = std::chrono::steady_clock::now();
  run_rounds(contenders, 3, 1.0);
  CHECK(seconds_since(start) >= 4 * 5e-3);
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
