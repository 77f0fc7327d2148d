// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: StaticFormat G must be -1 or a multiple of V

#include <codegemm/format.hpp>

int main() {
#if defined(CODEGEMM_FAULT)
  using Format = codegemm::StaticFormat<4, 1, 8, 6>;
#else
  using Format = codegemm::StaticFormat<4, 1, 8, -1>;
#endif
  return Format::format().m - 1;
}
