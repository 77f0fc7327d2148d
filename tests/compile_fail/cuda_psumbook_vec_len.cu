// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: Psumbook V must be 2, 4, 8, 16 or 0

#include <codegemm/cuda/block/psumbook.cuh>

int main() {
#if defined(CODEGEMM_FAULT)
  using Book = codegemm::cuda::Psumbook<3, 1, 4>;
#else
  using Book = codegemm::cuda::Psumbook<4, 1, 4>;
#endif
  return Book::kColumns == 128 ? 0 : 1;
}
