// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: StaticFormat M must be 1 to 4

#include <codegemm/format.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  using Format = codegemm::StaticFormat<4, 5, 8, -1>;
#else
  using Format = codegemm::StaticFormat<4, 1, 8, -1>;
#endif
  return Format::format().m - 1;
}
