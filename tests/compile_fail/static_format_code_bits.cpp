// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: StaticFormat B must be 4 to 16

#include <codegemm/format.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  using Format = codegemm::StaticFormat<4, 1, 17, -1>;
#else
  using Format = codegemm::StaticFormat<4, 1, 8, -1>;
#endif
  return Format::format().m - 1;
}
