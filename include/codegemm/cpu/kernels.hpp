// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/kernels.hpp - the innermost loops of one configuration and instruction set, as functions.
// Layer: cpu (host only).
#pragma once

#include <codegemm/cpu/dense_tile.hpp>
#include <codegemm/cpu/gather.hpp>
#include <codegemm/cpu/integer_tile.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/cpu/lookup.hpp>
#include <codegemm/cpu/psumbook.hpp>

namespace codegemm::detail {

/// The loops around them are the same for all formats and compiled once: a call through a pointer costs
/// nothing against a sweep over thousands of codes, and the compile time of a user's file does count.
struct CpuKernels {
  using Build = void (*)(const PsumbookArgs&);
  using Gather = void (*)(const GatherArgs&);
  Build build1, build4, build8;  // by lanes
  Gather gather1, gather4, gather8;
  void (*dequantize)(const DequantizeArgs&);
  void (*multiply)(const MicroArgs&);
  IntegerKernels integers;
  LookupKernels lookup;

  [[nodiscard]] Build build(int lanes) const noexcept {
    return lanes == 8 ? build8 : lanes == 4 ? build4 : build1;
  }
  [[nodiscard]] Gather gather(int lanes) const noexcept {
    return lanes == 8 ? gather8 : lanes == 4 ? gather4 : gather1;
  }
};

template <Isa kIsa, class Config>
[[nodiscard]] constexpr CpuKernels cpu_kernels() noexcept {
  constexpr int kV = Config::kVecLen;
  constexpr int kB = Config::kCodeBits;
  static_assert(kV == 2 || kV == 4 || kV == 8 || kV == 16, "codegemm: kVecLen must be 2, 4, 8 or 16");
  static_assert(kB >= 4 && kB <= 8, "codegemm: kCodeBits must be 4 to 8");
  return CpuKernels{&build_psumbook<kIsa, 1, kV>, &build_psumbook<kIsa, 4, kV>,
                    &build_psumbook<kIsa, 8, kV>, &gather<kIsa, 1, kB>,
                    &gather<kIsa, 4, kB>,         &gather<kIsa, 8, kB>,
                    &dequantize<kIsa, kV>,        &multiply<kIsa>,
                    integer_kernels<kIsa, kV>(),  lookup_kernels<kIsa, kB>()};
}

/// The same for an instruction set known at run time; only those are compiled that the target may have.
template <class Config>
[[nodiscard]] CpuKernels cpu_kernels_of(Isa isa) noexcept {
  switch (isa) {
#if CODEGEMM_HAS_AVX2
    case Isa::kAvx2: return cpu_kernels<Isa::kAvx2, Config>();
#endif
#if CODEGEMM_HAS_AVX512
    case Isa::kAvx512: return cpu_kernels<Isa::kAvx512, Config>();
    case Isa::kAvx512Vbmi: return cpu_kernels<Isa::kAvx512Vbmi, Config>();
#endif
#if CODEGEMM_HAS_NEON
    case Isa::kNeon: return cpu_kernels<Isa::kNeon, Config>();
#endif
    default: return cpu_kernels<Isa::kPortable, Config>();
  }
}

}  // namespace codegemm::detail
