// SPDX-License-Identifier: Apache-2.0
//
// bench/support/rounds.hpp - contenders that take turns, by Google Benchmark: what disturbs the machine for a
// while then disturbs all of them, in some of the turns, and their medians still compare.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include "contender.hpp"
#include "machine.hpp"

namespace codegemm::bench {

/// Prints nothing: contenders keep their times.
class SilentReporter : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>&) override {}
};

/// Google Benchmark with the repetitions of all registered in a random order.
inline void initialize_rounds() {
  static const bool once = [] {
    char program[] = "rounds";
    char interleaving[] = "--benchmark_enable_random_interleaving=true";
    char* arguments[] = {program, interleaving, nullptr};
    int count = 2;
    benchmark::Initialize(&count, arguments);
    return true;
  }();
  static_cast<void>(once);
}

/// Each has `rounds` turns of about `turn_seconds`, one call at least, in a random order of all. A turn
/// before them tells how many calls that are and is not counted.
inline void run_rounds(std::vector<Contender>& contenders, std::int64_t rounds, double turn_seconds) {
  initialize_rounds();
  benchmark::ClearRegisteredBenchmarks();
  const auto take_turn = [](const Contender& c, std::int64_t calls) {
    std::vector<double> times = c.turn(calls);
    std::this_thread::sleep_for(c.rest);
    return times;
  };
  std::exception_ptr failure;
  for (Contender& c : contenders) {
    const double one = median(take_turn(c, 2));
    const auto calls = static_cast<std::int64_t>(std::clamp(turn_seconds / std::max(one, 1e-7), 1.0, 1e5));
    benchmark::RegisterBenchmark(c.name.c_str(),
                                 [&c, &failure, take_turn](benchmark::State& state) {
                                   try {
                                     const std::vector<double> times = take_turn(c, state.max_iterations);
                                     auto next = times.begin();
                                     for ([[maybe_unused]] auto _ : state) state.SetIterationTime(*next++);
                                     c.seconds.insert(c.seconds.end(), times.begin(), times.end());
                                   } catch (...) {
                                     failure = std::current_exception();
                                     state.SkipWithError("failed");
                                   }
                                 })
        ->UseManualTime()
        ->Iterations(calls)
        ->Repetitions(static_cast<int>(rounds));
  }
  SilentReporter reporter;
  benchmark::RunSpecifiedBenchmarks(&reporter);
  if (failure != nullptr) std::rethrow_exception(failure);
}

}  // namespace codegemm::bench
