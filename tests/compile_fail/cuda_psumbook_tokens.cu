// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: Psumbook Tokens must be 1 or more

#include <codegemm/cuda/block/psumbook.cuh>

int main() {
#if defined(CODEGEMM_FAULT)
  using Book = codegemm::cuda::Psumbook<4, 1, 4, 0>;
#else
  using Book = codegemm::cuda::Psumbook<4, 1, 4, 1>;
#endif
  return Book::kColumns == 128 ? 0 : 1;
}
