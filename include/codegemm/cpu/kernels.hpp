// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/kernels.hpp - the innermost loops of one configuration and instruction set, as functions.
// Layer: cpu (host only).
#pragma once

#include <codegemm/cpu/byte_weights_vbmi.hpp>
#include <codegemm/cpu/dense_tile.hpp>
#include <codegemm/cpu/gather.hpp>
#include <codegemm/cpu/integer_tables_vbmi.hpp>
#include <codegemm/cpu/integer_tile_avx512.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/cpu/lookup.hpp>
#include <codegemm/cpu/psumbook.hpp>

namespace codegemm::detail {

/// The kernels of the integer way; null where the instruction set has none.
struct IntegerKernels {
  void (*dequantize)(const DequantizePairsArgs&) = nullptr;
  void (*multiply)(const IntegerTileArgs&) = nullptr;
  float (*round)(const float* x, std::int64_t count, std::int32_t* out) = nullptr;
  void (*scale)(const Half* scales, std::int64_t count, float step, float* out) = nullptr;
};

template <Isa kIsa, int kVecLen>
[[nodiscard]] constexpr IntegerKernels integer_kernels() noexcept {
  IntegerKernels out;
#if CODEGEMM_HAS_AVX2
  if constexpr (has_avx2(kIsa)) {
    out = {&dequantize_pairs_avx2<kVecLen>, &multiply_pairs_avx2, &round_chunk_avx2, &scale_steps_avx2};
  }
#endif
#if CODEGEMM_HAS_AVX512
  if constexpr (kIsa == Isa::kAvx512) out.multiply = &multiply_pairs_avx512<&sum_chunk_avx512>;
  if constexpr (kIsa == Isa::kAvx512Vbmi) out.multiply = &multiply_pairs_avx512<&sum_chunk_vnni>;
#endif
  return out;
}

/// What rebuilds weights in bytes; null where no tile takes them.
using Rebuild = void (*)(const RebuildArgs&);

template <Isa kIsa, int kVecLen, int kCodeBits>
[[nodiscard]] constexpr Rebuild rebuild_kernel() noexcept {
#if CODEGEMM_HAS_AMX
  if constexpr (kIsa == Isa::kAvx512Vbmi) {
    if constexpr (kCodeBits == 4) return &rebuild_nibbles_vbmi<kVecLen>;
    if constexpr (kCodeBits != 4 && bytes_are_permuted(kCodeBits)) return &rebuild_planes_vbmi<kVecLen>;
    if constexpr (!bytes_are_permuted(kCodeBits)) return &rebuild_gathered_vbmi<kVecLen>;
  }
#endif
  return nullptr;
}

/// What makes tables of 16 bits out of integers; null where the instruction set has no such kernel.
using MakeTables = float (*)(const IntegerTableArgs&);

template <Isa kIsa, int kVecLen, int kCodeBits>
[[nodiscard]] constexpr MakeTables table_kernel() noexcept {
#if CODEGEMM_HAS_AVX512
  if constexpr (makes_integer_tables(kIsa, kCodeBits)) return &make_tables_vbmi<kVecLen, kCodeBits>;
#endif
  return nullptr;
}

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
  MakeTables make_tables;
  Rebuild rebuild;

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
                    integer_kernels<kIsa, kV>(),  lookup_kernels<kIsa, kB>(),
                    table_kernel<kIsa, kV, kB>(), rebuild_kernel<kIsa, kV, kB>()};
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
