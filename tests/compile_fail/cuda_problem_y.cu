// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: GemmProblem Y must be float, __half

#include <codegemm/gemm.cuh>

int main() {
#if defined(CODEGEMM_FAULT)
  using Y = double;
#else
  using Y = float;
#endif
  return codegemm::cuda::GemmProblem<codegemm::Half, Y>{}.bias == nullptr ? 0 : 1;
}
