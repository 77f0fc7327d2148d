// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/executor.hpp>

#include <cstdint>
#include <vector>

#include <support/catch.hpp>

using codegemm::parallel_for;
using codegemm::SerialExecutor;

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
