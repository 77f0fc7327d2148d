// SPDX-License-Identifier: Apache-2.0
//
// expect: codegemm: a Psumbook has 1, 4 or 8 lanes

#include <codegemm/cpu/kernels.hpp>

#if defined(CODEGEMM_FAULT)
constexpr int kLanes = 2;
#else
constexpr int kLanes = 4;
#endif

void run(const codegemm::detail::GatherArgs& args);
void run(const codegemm::detail::GatherArgs& args) {
  codegemm::detail::gather<codegemm::Isa::kPortable, kLanes, 8>(args);
}

int main() { return 0; }
