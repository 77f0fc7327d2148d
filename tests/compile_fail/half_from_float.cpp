// SPDX-License-Identifier: Apache-2.0
//
// No number becomes a Half silently: the rounding is spelled Half::from_float.
// expect: Half

#include <codegemm/base/numerics.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  const codegemm::Half half = 1.5F;
#else
  const codegemm::Half half = codegemm::Half::from_float(1.5F);
#endif
  return half.to_float() == 1.5F ? 0 : 1;
}
