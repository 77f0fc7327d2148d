// SPDX-License-Identifier: Apache-2.0
//
// bench/support/machine.hpp - what the numbers were measured on, and how fast its memory is.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/executor.hpp>
#include <codegemm/cpu/isa.hpp>

namespace codegemm::bench {

[[nodiscard]] inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// What a part of the values, 0 to 1, is below; 0 of none.
[[nodiscard]] inline double quantile(std::vector<double> values, double part) {
  if (values.empty()) return 0.0;
  const auto index = static_cast<std::ptrdiff_t>(part * static_cast<double>(values.size()));
  const auto at = values.begin() + std::min(index, std::ssize(values) - 1);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

[[nodiscard]] inline double median(std::vector<double> values) { return quantile(std::move(values), 0.5); }

/// The processor's name as Linux tells it.
[[nodiscard]] inline std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const std::size_t at = line.find(": ");
    if (at != std::string::npos) return line.substr(at + 2);
  }
  return "unknown";
}

/// Today in UTC, "2026-11-24".
[[nodiscard]] inline std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[16];
  std::strftime(text, sizeof(text), "%Y-%m-%d", &parts);
  return text;
}

/// The commit that scripts/bench puts into the environment.
[[nodiscard]] inline std::string commit() {
  const char* const text = std::getenv("CODEGEMM_COMMIT");
  return text != nullptr && *text != '\0' ? text : "unknown";
}

struct MemorySpeed {
  double read_gb_per_s = 0.0;
  double copy_gb_per_s = 0.0;  // bytes read plus bytes written
};

/// The sum of `count` words, a multiple of 16.
[[nodiscard]] inline std::uint64_t sum_words(const std::uint64_t* words, std::int64_t count) {
  std::uint64_t sums[16] = {};  // that many, so that the processor need not wait for its own sums
  for (std::int64_t w = 0; w < count; w += 16) {
    for (std::int64_t lane = 0; lane < 16; ++lane) sums[lane] += words[w + lane];
  }
  std::uint64_t all = 0;
  for (const std::uint64_t part : sums) all += part;
  return all;
}

/// Reads and copies 256 MiB on all workers of the executor; the best of five.
[[nodiscard]] inline MemorySpeed measure_memory(Executor& executor) {
  constexpr std::int64_t kWords = std::int64_t{1} << 25;
  constexpr std::int64_t kChunk = std::int64_t{1} << 17;  // 1 MiB
  std::vector<std::uint64_t> from(static_cast<std::size_t>(kWords), 1);
  std::vector<std::uint64_t> to(static_cast<std::size_t>(kWords), 2);
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(kWords / kChunk));
  constexpr double kBytes = static_cast<double>(kWords) * sizeof(std::uint64_t);
  MemorySpeed speed;
  for (int i = 0; i < 5; ++i) {
    auto start = std::chrono::steady_clock::now();
    parallel_for(executor, kWords / kChunk, [&](std::int64_t chunk, int) {
      sums[static_cast<std::size_t>(chunk)] = sum_words(from.data() + chunk * kChunk, kChunk);
    });
    speed.read_gb_per_s = std::max(speed.read_gb_per_s, kBytes / seconds_since(start) * 1e-9);
    start = std::chrono::steady_clock::now();
    parallel_for(executor, kWords / kChunk, [&](std::int64_t chunk, int) {
      std::memcpy(to.data() + chunk * kChunk, from.data() + chunk * kChunk,
                  static_cast<std::size_t>(kChunk) * sizeof(std::uint64_t));
    });
    speed.copy_gb_per_s = std::max(speed.copy_gb_per_s, 2.0 * kBytes / seconds_since(start) * 1e-9);
    from[static_cast<std::size_t>(i)] = sums[static_cast<std::size_t>(i)];  // the reading is not left out
  }
  return speed;
}

/// The object that a kept result says it was measured on.
[[nodiscard]] inline nlohmann::json machine_json(const Executor& executor) {
  return {
    {"cpu", cpu_name()}, {"cores", std::thread::hardware_concurrency()}, {"threads", executor.workers()},
        {"isa", isa_name(detect_isa())},
#if defined(__clang__)
    {
      "compiler", "clang " __clang_version__
    }
  };
#else
    {
      "compiler", "gcc " __VERSION__
    }
  };
#endif
}

}  // namespace codegemm::bench
