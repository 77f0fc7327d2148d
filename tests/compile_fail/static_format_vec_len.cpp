// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: StaticFormat V must be 2, 4, 8 or 16

#include <codegemm/format.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  using Format = codegemm::StaticFormat<3, 1, 8, -1>;
#else
  using Format = codegemm::StaticFormat<4, 1, 8, -1>;
#endif
  return Format::format().m - 1;
}
