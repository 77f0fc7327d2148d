// SPDX-License-Identifier: Apache-2.0
//
// tests/bench/finetune_queue_concurrent_test.cpp - runs of the suite finetune side by side: what waits for
// what, and what becomes of the others when one fails.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include <bench/support/finetune_queue.hpp>
#include <support/catch.hpp>

using codegemm::bench::FinetuneQueue;

TEST_CASE("a run begins when those it waits for are done", "[finetune_queue]") {
  for (const std::size_t workers : {1U, 4U}) {
    FinetuneQueue queue;
    std::mutex mutex;
    std::vector<std::size_t> ended;
    std::size_t on_host = 0;
    std::size_t most_on_host = 0;
    std::vector<std::vector<std::size_t>> after(40);
    for (std::size_t i = 0; i < after.size(); ++i) {
      if (i >= 8) after[i] = {i - 8, i / 2};
      const bool host = i % 2 == 1;
      const auto job = [&, i, host](std::size_t worker) {
        {
          const std::lock_guard lock(mutex);
          CHECK(worker < workers);
          for (const std::size_t before : after[i])
            CHECK(std::find(ended.begin(), ended.end(), before) != ended.end());
          if (host) most_on_host = std::max(most_on_host, ++on_host);
        }
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        const std::lock_guard lock(mutex);
        ended.push_back(i);
        if (host) --on_host;
      };
      CHECK(queue.add(job, after[i], host) == i);
    }
    queue.run(workers);
    CHECK(ended.size() == after.size());
    CHECK(most_on_host >= 1);
    CHECK(most_on_host <= std::max<std::size_t>(1, workers / 2));

    FinetuneQueue failing;
    std::atomic<int> begun{0};
    for (int i = 0; i < 100; ++i) {
      failing.add([&, i](std::size_t) {
        ++begun;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        if (i == 2) throw std::runtime_error("the third one");
      });
    }
    CHECK_THROWS_AS(failing.run(workers), std::runtime_error);
    CHECK(begun < 100);
  }
}
