// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: GemmProblem X must be __half, __nv_bfloat16

#include <codegemm/gemm.cuh>

int main() {
#if defined(CODEGEMM_FAULT)
  using X = float;
#else
  using X = codegemm::Half;
#endif
  return codegemm::cuda::GemmProblem<X, float>{}.bias == nullptr ? 0 : 1;
}
