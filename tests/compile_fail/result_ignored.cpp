// SPDX-License-Identifier: Apache-2.0
//
// A Result that nobody looks at is a warning, and an error here.
// expect: nodiscard|unused-result

#include <codegemm/base/status.hpp>

namespace {
codegemm::Result<int> half_of(int k) {
  if (k % 2 != 0) return codegemm::error(codegemm::StatusCode::kInvalidArgument, k, " is odd");
  return k / 2;
}
}  // namespace

int main() {
#if defined(CODEGEMM_FAULT)
  half_of(8);
  return 0;
#else
  return half_of(8).ok() ? 0 : 1;
#endif
}
