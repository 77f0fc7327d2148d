// SPDX-License-Identifier: Apache-2.0
//
// A Status that nobody looks at is a warning, and an error here.
// expect: nodiscard|unused-result

#include <codegemm/base/status.hpp>

namespace {
codegemm::Status check(int k) {
  if (k % 4 != 0)
    return codegemm::error(codegemm::StatusCode::kInvalidArgument, "K = ", k, " is not a multiple of 4");
  return {};
}
}  // namespace

int main() {
#if defined(CODEGEMM_FAULT)
  check(8);
  return 0;
#else
  return check(8).ok() ? 0 : 1;
#endif
}
