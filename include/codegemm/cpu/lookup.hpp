// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/lookup.hpp - one token: Psumbook entries of 16 bits, looked up by byte permutes in registers.
// Layer: cpu (host only).
#pragma once

#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/cpu/encode_avx512.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/cpu/lookup_args.hpp>
#include <codegemm/cpu/lookup_avx2.hpp>
#include <codegemm/cpu/lookup_avx512.hpp>
#include <codegemm/cpu/lookup_neon.hpp>
#include <codegemm/cpu/lookup_vbmi.hpp>

namespace codegemm::detail {

/// Which functions serve codes of kCodeBits bits; null where looking up in registers does not pay.
struct LookupKernels {
  float (*encode)(const EncodeArgs&) = nullptr;
  void (*lookup)(const LookupArgs&) = nullptr;
  std::int64_t ahead_bytes = 0;  // by how much it asks for codes ahead of those that it reads
};

template <Isa kIsa, int kCodeBits>
[[nodiscard]] constexpr LookupKernels lookup_kernels() noexcept {
  LookupKernels out;
  if constexpr (lookup_cost(kIsa, kCodeBits) == 0.0) {
    return out;
#if CODEGEMM_HAS_AVX512
  } else if constexpr (kIsa == Isa::kAvx512Vbmi) {
    out = {&encode_planes_avx512<kCodeBits>, &lookup_planes_vbmi<kCodeBits>, CpuTiles::kLookupAheadBytes};
  } else if constexpr (kIsa == Isa::kAvx512 && kCodeBits > 4) {
    out = {&encode_words_avx512<kCodeBits>, &lookup_words_avx512<kCodeBits>};
#endif
#if CODEGEMM_HAS_AVX2
  } else if constexpr (has_avx2(kIsa)) {
    out = {&encode_parts_avx2<kCodeBits>, &lookup_parts_avx2<kCodeBits>};
#endif
#if CODEGEMM_HAS_NEON
  } else if constexpr (kIsa == Isa::kNeon) {
    out = {&encode_planes_neon<kCodeBits>, &lookup_planes_neon<kCodeBits>};
#endif
  }
  return out;
}

}  // namespace codegemm::detail
