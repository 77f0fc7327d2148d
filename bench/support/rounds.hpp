// SPDX-License-Identifier: Apache-2.0
//
// bench/support/rounds.hpp - contenders that take turns: what disturbs the machine for a while then disturbs
// all of them, in some of the rounds, and their medians still compare.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.hpp"

namespace codegemm::bench {

/// One of those that are compared: does `calls` calls and returns the seconds of each.
struct Contender {
  std::string name;
  std::function<std::vector<double>(std::int64_t calls)> turn;
  /// How long after a turn its threads go on polling, which the next one is not to feel.
  std::chrono::milliseconds rest{0};
  std::vector<double> seconds = {};

  [[nodiscard]] double median_us() const { return median(seconds) * 1e6; }
};

/// Times call(i) for i = 0, 1, 2 ... over all turns, so that copies of the data can take turns, too.
template <class Call>
[[nodiscard]] Contender timed(std::string name, Call call) {
  return {std::move(name), [call, next = std::size_t{0}](std::int64_t calls) mutable {
            std::vector<double> out;
            for (std::int64_t i = 0; i < calls; ++i, ++next) {
              const auto start = std::chrono::steady_clock::now();
              call(next);
              out.push_back(seconds_since(start));
            }
            return out;
          }};
}

/// `rounds` rounds in which each has a turn of about `turn_seconds`, one call at least. A turn before the
/// first tells how many calls that are and is not counted. Every round begins with another one.
inline void run_rounds(std::vector<Contender>& contenders, std::int64_t rounds, double turn_seconds) {
  const auto count = contenders.size();
  std::vector<std::int64_t> calls(count);
  const auto take_turn = [](const Contender& c, std::int64_t times) {
    std::vector<double> out = c.turn(times);
    std::this_thread::sleep_for(c.rest);
    return out;
  };
  for (std::size_t i = 0; i < count; ++i) {
    const double one = median(take_turn(contenders[i], 2));
    calls[i] = static_cast<std::int64_t>(std::clamp(turn_seconds / std::max(one, 1e-7), 1.0, 1e5));
  }
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t at = (i + static_cast<std::size_t>(round)) % count;
      const std::vector<double> times = take_turn(contenders[at], calls[at]);
      contenders[at].seconds.insert(contenders[at].seconds.end(), times.begin(), times.end());
    }
  }
}

}  // namespace codegemm::bench
