// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/fused_long_formats_gpu_test.cu - the same as fused_formats_gpu_test.cu for vectors of
// eight and sixteen weights.
#include "check_formats.cuh"

namespace codegemm::test {
namespace {

using LongVectors = FusedAlone<decltype(vectors_of<8, 16>(cuda::MoreFusedConfigs{}))>;

TEST_CASE("cuda gemm: every number of codebooks on tensor cores, long vectors", "[gpu]") {
  check_formats<LongVectors>({4, 7, 8}, {3, 14, 70}, seed_or(500));
}

}  // namespace
}  // namespace codegemm::test
