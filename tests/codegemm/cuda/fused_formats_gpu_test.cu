// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/fused_formats_gpu_test.cu - every vector length and number of codebooks on tensor
// cores.
#include "check_gemm.cuh"

namespace codegemm::test {
namespace {

// [guide: cuda_lists]
struct Configs {
  using Gather = config_list<>;
  using Fused = cuda::MoreFusedConfigs;
  static constexpr bool kSwiGlu = false;  // no product ends in it: half of the kernels to compile
};
// [guide: end]

TEST_CASE("cuda gemm: every vector length and number of codebooks on tensor cores", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(1);
  for_each_config(cuda::MoreFusedConfigs{}, [&](auto c) {
    for (const int b : {4, 7, 8}) {
      for (const int g : {-1, 16 * c.kVecLen, 128}) {
        for (const std::int64_t tokens : {3, 14, 70}) {
          const Case one{{c.kVecLen, c.kCodebooks, b, g}, 83, 1040, tokens, true, 8};
          const int served = check_in<Configs, Half, float>(one, device, seed++);
          CHECK(served == (device.arch == 90 ? 2 : 1));
        }
      }
    }
  });
}

struct WideConfigs {
  using Gather = config_list<>;
  using Fused = cuda::MoreWideConfigs;
  static constexpr bool kSwiGlu = false;
};

TEST_CASE("cuda gemm: codes of two bytes with every vector length, and two codebooks of them", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(1000);
  for_each_config(cuda::MoreWideConfigs{}, [&](auto c) {
    for (const int b : {9, 12, 16}) {
      for (const int g : {-1, 16 * c.kVecLen, 128}) {
        for (const std::int64_t tokens : {1, 3, 14, 70}) {
          const Case one{{c.kVecLen, c.kCodebooks, b, g}, 83, 1040, tokens, true, 8};
          const int served = check_in<WideConfigs, Half, float>(one, device, seed++);
          CHECK(served == (device.arch == 90 ? 2 : 1));
        }
      }
    }
  });
}

}  // namespace
}  // namespace codegemm::test
