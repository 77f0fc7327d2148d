// SPDX-License-Identifier: Apache-2.0
//
// tests/support/random.hpp - the same numbers on every machine, from a seed that is printed on failure.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <numbers>
#include <vector>

namespace codegemm::test {

/// CODEGEMM_TEST_SEED replays another seed than the one written in the test.
[[nodiscard]] inline std::uint64_t seed_or(std::uint64_t written) {
  const char* text = std::getenv("CODEGEMM_TEST_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : written;
}

/// splitmix64: small, and unlike the standard distributions the same everywhere.
class Rng {
 public:
  explicit Rng(std::uint64_t seed) : state_(seed) {}

  [[nodiscard]] std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  /// In [0, bound), bound > 0.
  [[nodiscard]] std::int64_t below(std::int64_t bound) {
    return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(bound));
  }
  /// In [0, 1).
  [[nodiscard]] double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  [[nodiscard]] float uniform(float low, float high) {
    return low + static_cast<float>(uniform()) * (high - low);
  }
  /// Mean 0, standard deviation 1.
  [[nodiscard]] float normal() {
    const double u = 1.0 - uniform();
    return static_cast<float>(std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * uniform()));
  }
  [[nodiscard]] std::vector<float> normals(std::int64_t count) {
    std::vector<float> out(static_cast<std::size_t>(count));
    for (float& x : out) x = normal();
    return out;
  }

 private:
  std::uint64_t state_;
};

}  // namespace codegemm::test
