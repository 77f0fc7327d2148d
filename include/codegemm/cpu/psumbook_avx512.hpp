// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/psumbook_avx512.hpp - builds Psumbook tables of one token with AVX-512.
// Layer: cpu (host only).
#pragma once

#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/psumbook_args.hpp>

#if CODEGEMM_HAS_AVX512

#include <immintrin.h>

CODEGEMM_AVX512_CODE_BEGIN

namespace codegemm::detail {

// Tables of kVectors vectors of x from the j-th on, 16 centroids in the lanes. The vectors share the loads of
// the transposed codebook: alone, two of 64 bytes a cycle would bind a core that multiplies as many.
template <int kVecLen, int kVectors>
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE void build_tables_avx512(const PsumbookArgs& a,
                                                                       std::int64_t j) {
  __m512 x[std::size_t{kVectors} * kVecLen];
  CODEGEMM_UNROLL
  for (int d = 0; d < kVectors * kVecLen; ++d) x[d] = _mm512_set1_ps(a.x[j * kVecLen + d]);
  const std::int64_t stride = a.codebook_count * a.centroids;  // from one vector's tables to the next one's
  for (std::int64_t c = 0; c < a.codebook_count; ++c) {
    const float* const codebook = a.codebooks_transposed + c * kVecLen * a.centroids;
    float* const out = a.tables + j * stride + c * a.centroids;
    for (std::int64_t i = 0; i < a.centroids; i += 16) {
      __m512 sums[std::size_t{kVectors}];
      CODEGEMM_UNROLL
      for (int n = 0; n < kVectors; ++n) sums[n] = _mm512_setzero_ps();
      CODEGEMM_UNROLL
      for (int d = 0; d < kVecLen; ++d) {
        const __m512 elements = _mm512_loadu_ps(codebook + d * a.centroids + i);
        CODEGEMM_UNROLL
        for (int n = 0; n < kVectors; ++n) sums[n] = _mm512_fmadd_ps(elements, x[n * kVecLen + d], sums[n]);
      }
      CODEGEMM_UNROLL
      for (int n = 0; n < kVectors; ++n) _mm512_storeu_ps(out + n * stride + i, sums[n]);
    }
  }
}

template <int kVecLen>
CODEGEMM_TARGET_AVX512 void build_psumbook1_avx512(const PsumbookArgs& a) {
  constexpr int kVectors = kVecLen <= 4 ? 4 : kVecLen <= 8 ? 2 : 1;  // 16 registers of x at most
  std::int64_t j = 0;
  for (; j + kVectors <= a.vectors; j += kVectors) build_tables_avx512<kVecLen, kVectors>(a, j);
  for (; j < a.vectors; ++j) build_tables_avx512<kVecLen, 1>(a, j);
}

}  // namespace codegemm::detail

CODEGEMM_AVX512_CODE_END

#endif
