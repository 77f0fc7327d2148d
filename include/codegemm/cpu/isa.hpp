// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/isa.hpp - which instruction set the CPU kernels may use, found out when the program runs.
// Layer: cpu (host only).
#pragma once

#include <codegemm/base/macros.hpp>

namespace codegemm {

/// What a kernel is written in. kAvx2 means AVX2 with FMA.
enum class Isa : int { kPortable = 0, kAvx2 = 1 };

/// The best of this machine; asked of the processor once.
[[nodiscard]] inline Isa detect_isa() noexcept {
#if CODEGEMM_HAS_AVX2
  static const Isa best =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::kAvx2 : Isa::kPortable;
  return best;
#else
  return Isa::kPortable;
#endif
}

}  // namespace codegemm
