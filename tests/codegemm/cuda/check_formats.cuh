// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/check_formats.cuh - every configuration of a list on tensor cores. The lists are long,
// and compile in several programs side by side.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "check_gemm.cuh"

namespace codegemm::test {

// The configurations for vectors of Least to Most weights.
template <int Least, int Most, class... Kept>
constexpr auto vectors_of(config_list<> /*list*/, config_list<Kept...> kept = {}) {
  return kept;
}
template <int Least, int Most, class C, class... Rest, class... Kept>
constexpr auto vectors_of(config_list<C, Rest...> /*list*/, config_list<Kept...> kept = {}) {
  if constexpr (C::kVecLen >= Least && C::kVecLen <= Most) {
    return vectors_of<Least, Most>(config_list<Rest...>{}, config_list<Kept..., C>{});
  } else {
    return vectors_of<Least, Most>(config_list<Rest...>{}, kept);
  }
}

template <class Configs>
void check_formats(std::initializer_list<int> bits, std::initializer_list<std::int64_t> tokens,
                   std::uint64_t seed) {
  const cuda::Device device = gpu_or_skip();
  static_assert(Configs::Fused::kSize > 0);
  for_each_config(typename Configs::Fused{}, [&](auto c) {
    for (const int b : bits) {
      for (const int g : {-1, 16 * c.kVecLen, 128}) {
        for (const std::int64_t count : tokens) {
          const Case one{{c.kVecLen, c.kCodebooks, b, g}, 83, 1040, count, true, 8};
          const int served = check_in<Configs, Half, float>(one, device, seed++);
          CHECK(served == (device.arch == 90 ? 2 : 1));
        }
      }
    }
  });
}

}  // namespace codegemm::test
