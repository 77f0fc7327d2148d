// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/fused_formats_gpu_test.cu - every number of codebooks on tensor cores, for vectors of
// two and four weights.
#include "check_formats.cuh"

namespace codegemm::test {
namespace {

// [guide: cuda_lists]
struct Configs {
  using Gather = config_list<>;
  using Fused = cuda::MoreFusedConfigs;
  static constexpr bool kSwiGlu = false;  // no product ends in it: half of the kernels to compile
};
// [guide: end]

using ShortVectors = FusedAlone<decltype(vectors_of<2, 4>(Configs::Fused{}))>;

TEST_CASE("cuda gemm: every number of codebooks on tensor cores, short vectors", "[gpu]") {
  check_formats<ShortVectors>({4, 7, 8}, {3, 14, 70}, seed_or(1));
}

}  // namespace
}  // namespace codegemm::test
