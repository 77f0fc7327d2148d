// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: FixedPsumbook is for v = 4 with one codebook and v = 8 with two

#include <codegemm/cuda/block/fixed_psumbook.cuh>

int main() {
#if defined(CODEGEMM_FAULT)
  using Book = codegemm::cuda::FixedPsumbook<8, 1>;
#else
  using Book = codegemm::cuda::FixedPsumbook<8, 2>;
#endif
  return Book::kSpan == 512 ? 0 : 1;
}
