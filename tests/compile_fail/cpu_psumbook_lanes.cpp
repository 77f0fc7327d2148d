// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: a Psumbook has 1, 4 or 8 lanes

#include <codegemm/cpu/kernels.hpp>

#if defined(CODEGEMM_FAULT)
constexpr int kLanes = 2;
#else
constexpr int kLanes = 4;
#endif

void run(const codegemm::detail::PsumbookArgs& args);
void run(const codegemm::detail::PsumbookArgs& args) {
  codegemm::detail::build_psumbook<codegemm::Isa::kPortable, kLanes, 4>(args);
}

int main() { return 0; }
