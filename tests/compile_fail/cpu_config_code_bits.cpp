// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: kCodeBits must be 4 to 8

#include <codegemm/cpu/kernels.hpp>

namespace {
template <int V, int B>
struct Row {
  static constexpr int kVecLen = V, kCodeBits = B;
};
}  // namespace

int main() {
#if defined(CODEGEMM_FAULT)
  using Config = Row<4, 9>;
#else
  using Config = Row<4, 8>;
#endif
  return codegemm::detail::cpu_kernels<codegemm::Isa::kPortable, Config>().multiply == nullptr ? 1 : 0;
}
