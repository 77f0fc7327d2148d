// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: Psumbook Sets must be a multiple of Codebooks

#include <codegemm/cuda/block/psumbook.cuh>

int main() {
#if defined(CODEGEMM_FAULT)
  using Book = codegemm::cuda::Psumbook<4, 3, 4>;
#else
  using Book = codegemm::cuda::Psumbook<4, 2, 4>;
#endif
  return Book::kColumns == 128 ? 0 : 1;
}
