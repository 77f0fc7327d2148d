// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/integer_tile_avx512.hpp - the tile of the integer way with AVX-512: 32 products of 16 bits an
// instruction, and with VNNI their sums too.
// Layer: cpu (host only).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/integer_tile.hpp>

#if CODEGEMM_HAS_AVX512
#include <immintrin.h>

CODEGEMM_AVX512_CODE_BEGIN

namespace codegemm::detail {

/// What a chunk gives: sums[6][16] of `pairs` pairs of columns, x[pairs][6] and w[pairs][16].
using SumChunk = void (*)(const std::int32_t* x, const std::int32_t* w, std::int64_t pairs,
                          std::int32_t* sums);

// Two pairs at a time, into sums of their own: six alone would wait for each other. The arrays are registers.
#define CODEGEMM_SIX_TOKENS _Pragma("GCC unroll 6") for (std::int64_t t = 0; t < 6; ++t)
#define CODEGEMM_SUM_CHUNK(add_products)                                                                     \
  __m512i even[6];                                                                                           \
  __m512i odd[6];                                                                                            \
  CODEGEMM_SIX_TOKENS even[t] = odd[t] = _mm512_setzero_si512();                                             \
  for (; pairs >= 2; pairs -= 2, x += 12, w += 32) {                                                         \
    const __m512i w0 = _mm512_loadu_si512(w);                                                                \
    const __m512i w1 = _mm512_loadu_si512(w + 16);                                                           \
    CODEGEMM_SIX_TOKENS even[t] = add_products(even[t], w0, _mm512_set1_epi32(x[t]));                        \
    CODEGEMM_SIX_TOKENS odd[t] = add_products(odd[t], w1, _mm512_set1_epi32(x[6 + t]));                      \
  }                                                                                                          \
  if (pairs > 0) {                                                                                           \
    const __m512i w0 = _mm512_loadu_si512(w);                                                                \
    CODEGEMM_SIX_TOKENS even[t] = add_products(even[t], w0, _mm512_set1_epi32(x[t]));                        \
  }                                                                                                          \
  CODEGEMM_SIX_TOKENS _mm512_storeu_si512(sums + 16 * t, _mm512_add_epi32(even[t], odd[t]))

CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m512i add_products_avx512(__m512i sums, __m512i a,
                                                                          __m512i b) {
  return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
}

CODEGEMM_TARGET_AVX512 inline void sum_chunk_avx512(const std::int32_t* x, const std::int32_t* w,
                                                    std::int64_t pairs, std::int32_t* sums) {
  CODEGEMM_SUM_CHUNK(add_products_avx512);
}

CODEGEMM_TARGET_AVX512_VBMI inline void sum_chunk_vnni(const std::int32_t* x, const std::int32_t* w,
                                                       std::int64_t pairs, std::int32_t* sums) {
  CODEGEMM_SUM_CHUNK(_mm512_dpwssd_epi32);
}

#undef CODEGEMM_SUM_CHUNK
#undef CODEGEMM_SIX_TOKENS

/// As multiply_pairs_avx2(), with the same result in every bit.
template <SumChunk kSumChunk>
CODEGEMM_TARGET_AVX512 void multiply_pairs_avx512(const IntegerTileArgs& a) {
  const std::int64_t slab_end = a.first_k + a.depth;
  bool accumulate = a.accumulate;
  for (std::int64_t k = a.first_k; k < slab_end;) {
    const std::int64_t end = chunk_end(k, slab_end, a.scale_group);
    const std::int64_t at = (k - a.first_k) / 2;
    alignas(64) std::int32_t sums[6 * 16];
    kSumChunk(a.x + at * 6, a.w + at * 16, (end - k) / 2, sums);
    const std::int64_t unit = (k - a.first_k) / CpuTiles::kIntegerUnit;
    const __m512 w_step = _mm512_loadu_ps(a.w_steps + unit * a.ld_steps);
    for (std::int64_t t = 0; t < 6; ++t) {
      const __m512 step = _mm512_mul_ps(_mm512_set1_ps(a.x_steps[unit * 6 + t]), w_step);
      __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + 16 * t)), step);
      float* const c = a.c + t * a.stride;
      if (accumulate) sum = _mm512_add_ps(sum, _mm512_loadu_ps(c));
      _mm512_storeu_ps(c, sum);
    }
    accumulate = true;
    k = end;
  }
}

}  // namespace codegemm::detail

CODEGEMM_AVX512_CODE_END
#endif
