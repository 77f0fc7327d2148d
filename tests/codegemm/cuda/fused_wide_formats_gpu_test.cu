// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/fused_wide_formats_gpu_test.cu - codes of two bytes on tensor cores.
#include "check_formats.cuh"

namespace codegemm::test {
namespace {

TEST_CASE("cuda gemm: codes of two bytes with every vector length, and two codebooks of them", "[gpu]") {
  check_formats<FusedAlone<cuda::MoreWideConfigs>>({9, 12, 16}, {1, 3, 14, 70}, seed_or(1000));
}

}  // namespace
}  // namespace codegemm::test
