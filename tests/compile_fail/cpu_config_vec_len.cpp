// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: kVecLen must be 2, 4, 8 or 16

#include <codegemm/cpu/kernels.hpp>

namespace {
template <int V, int B>
struct Row {
  static constexpr int kVecLen = V, kCodeBits = B;
};
}  // namespace

int main() {
#if defined(CODEGEMM_FAULT)
  using Config = Row<3, 8>;
#else
  using Config = Row<4, 8>;
#endif
  return codegemm::detail::cpu_kernels<codegemm::Isa::kPortable, Config>().multiply == nullptr ? 1 : 0;
}
