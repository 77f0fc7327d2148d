// SPDX-License-Identifier: Apache-2.0
//
// bench/support/contender.hpp - one of those whose times a benchmark compares.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
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

}  // namespace codegemm::bench
