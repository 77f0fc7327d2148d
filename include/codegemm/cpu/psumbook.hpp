// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/psumbook.hpp - builds Psumbook tables: every centroid times every activation vector.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/cpu/psumbook_args.hpp>
#include <codegemm/cpu/psumbook_avx512.hpp>

#if CODEGEMM_HAS_AVX2
#include <immintrin.h>
#endif

namespace codegemm::detail {

template <int kLanes, int kVecLen>
void build_psumbook_portable(const PsumbookArgs& a) {
  float* out = a.tables;
  for (std::int64_t j = 0; j < a.vectors; ++j) {
    const float* const x = a.x + j * kVecLen * kLanes;
    for (std::int64_t i = 0; i < a.codebook_count * a.centroids; ++i) {
      const float* const centroid = a.codebooks + i * kVecLen;
      for (int t = 0; t < kLanes; ++t) {
        float sum = 0.0F;
        for (int d = 0; d < kVecLen; ++d) sum += centroid[d] * x[d * kLanes + t];
        out[t] = sum;
      }
      out += kLanes;
    }
  }
}

// Elements of a vector of x that are held in registers at a time.
template <int kVecLen>
inline constexpr int kHeldElements = std::min(kVecLen, 8);

#if CODEGEMM_HAS_AVX2

// One token: eight centroids in the lanes, out of the transposed codebook.
template <int kVecLen>
CODEGEMM_TARGET_AVX2 void build_psumbook1_avx2(const PsumbookArgs& a) {
  constexpr int kHeld = kHeldElements<kVecLen>;
  std::int64_t j = 0;
  if constexpr (kVecLen <= 4) {  // two vectors of x share the loads of the codebook
    for (; j + 1 < a.vectors; j += 2) {
      __m256 x[2 * std::size_t{kVecLen}];
      CODEGEMM_UNROLL
      for (int d = 0; d < 2 * kVecLen; ++d) x[d] = _mm256_broadcast_ss(a.x + j * kVecLen + d);
      for (std::int64_t c = 0; c < a.codebook_count; ++c) {
        const float* const codebook = a.codebooks_transposed + c * kVecLen * a.centroids;
        float* const out0 = a.tables + (j * a.codebook_count + c) * a.centroids;
        float* const out1 = out0 + a.codebook_count * a.centroids;
        for (std::int64_t i = 0; i < a.centroids; i += 8) {
          __m256 sum0 = _mm256_setzero_ps();
          __m256 sum1 = _mm256_setzero_ps();
          CODEGEMM_UNROLL
          for (int d = 0; d < kVecLen; ++d) {
            const __m256 elements = _mm256_loadu_ps(codebook + d * a.centroids + i);
            sum0 = _mm256_fmadd_ps(elements, x[d], sum0);
            sum1 = _mm256_fmadd_ps(elements, x[kVecLen + d], sum1);
          }
          _mm256_store_ps(out0 + i, sum0);
          _mm256_store_ps(out1 + i, sum1);
        }
      }
    }
  }
  for (; j < a.vectors; ++j) {
    for (int first = 0; first < kVecLen; first += kHeld) {
      __m256 x[std::size_t{kHeld}];
      CODEGEMM_UNROLL
      for (int d = 0; d < kHeld; ++d) x[d] = _mm256_broadcast_ss(a.x + j * kVecLen + first + d);
      for (std::int64_t c = 0; c < a.codebook_count; ++c) {
        const float* const codebook = a.codebooks_transposed + (c * kVecLen + first) * a.centroids;
        float* const out = a.tables + (j * a.codebook_count + c) * a.centroids;
        for (std::int64_t i = 0; i < a.centroids; i += 8) {
          __m256 sum = _mm256_setzero_ps();
          if (first != 0) sum = _mm256_load_ps(out + i);
          CODEGEMM_UNROLL
          for (int d = 0; d < kHeld; ++d) {
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(codebook + d * a.centroids + i), x[d], sum);
          }
          _mm256_store_ps(out + i, sum);
        }
      }
    }
  }
}

// Eight tokens in the lanes; a centroid's elements are broadcast, for two vectors of x where registers allow.
template <int kVecLen>
CODEGEMM_TARGET_AVX2 void build_psumbook8_avx2(const PsumbookArgs& a) {
  constexpr int kHeld = kHeldElements<kVecLen>;
  const std::int64_t count = a.codebook_count * a.centroids;
  std::int64_t j = 0;
  if constexpr (kVecLen <= 4) {
    for (; j + 1 < a.vectors; j += 2) {
      __m256 x[2 * std::size_t{kVecLen}];
      CODEGEMM_UNROLL
      for (int d = 0; d < 2 * kVecLen; ++d) x[d] = _mm256_load_ps(a.x + (j * kVecLen + d) * 8);
      const float* centroid = a.codebooks;
      float* out = a.tables + j * count * 8;
      for (std::int64_t i = 0; i < count; ++i, centroid += kVecLen, out += 8) {
        __m256 sum0 = _mm256_setzero_ps();
        __m256 sum1 = _mm256_setzero_ps();
        CODEGEMM_UNROLL
        for (int d = 0; d < kVecLen; ++d) {
          const __m256 element = _mm256_broadcast_ss(centroid + d);
          sum0 = _mm256_fmadd_ps(element, x[d], sum0);
          sum1 = _mm256_fmadd_ps(element, x[kVecLen + d], sum1);
        }
        _mm256_store_ps(out, sum0);
        _mm256_store_ps(out + count * 8, sum1);
      }
    }
  }
  for (; j < a.vectors; ++j) {
    float* const out = a.tables + j * count * 8;
    for (int first = 0; first < kVecLen; first += kHeld) {
      __m256 x[std::size_t{kHeld}];
      CODEGEMM_UNROLL
      for (int d = 0; d < kHeld; ++d) x[d] = _mm256_load_ps(a.x + (j * kVecLen + first + d) * 8);
      const float* centroid = a.codebooks + first;
      for (std::int64_t i = 0; i < count; ++i, centroid += kVecLen) {
        __m256 sum = _mm256_setzero_ps();
        if (first != 0) sum = _mm256_load_ps(out + i * 8);
        CODEGEMM_UNROLL
        for (int d = 0; d < kHeld; ++d) sum = _mm256_fmadd_ps(_mm256_broadcast_ss(centroid + d), x[d], sum);
        _mm256_store_ps(out + i * 8, sum);
      }
    }
  }
}

// Four tokens in the lanes.
template <int kVecLen>
CODEGEMM_TARGET_AVX2 void build_psumbook4_avx2(const PsumbookArgs& a) {
  constexpr int kHeld = kHeldElements<kVecLen>;
  const std::int64_t count = a.codebook_count * a.centroids;
  for (std::int64_t j = 0; j < a.vectors; ++j) {
    float* const out = a.tables + j * count * 4;
    for (int first = 0; first < kVecLen; first += kHeld) {
      __m128 x[std::size_t{kHeld}];
      CODEGEMM_UNROLL
      for (int d = 0; d < kHeld; ++d) x[d] = _mm_load_ps(a.x + (j * kVecLen + first + d) * 4);
      const float* centroid = a.codebooks + first;
      for (std::int64_t i = 0; i < count; ++i, centroid += kVecLen) {
        __m128 sum = _mm_setzero_ps();
        if (first != 0) sum = _mm_load_ps(out + i * 4);
        CODEGEMM_UNROLL
        for (int d = 0; d < kHeld; ++d) sum = _mm_fmadd_ps(_mm_broadcast_ss(centroid + d), x[d], sum);
        _mm_store_ps(out + i * 4, sum);
      }
    }
  }
}

#endif

template <Isa kIsa, int kLanes, int kVecLen>
void build_psumbook(const PsumbookArgs& a) {
  static_assert(kLanes == 1 || kLanes == 4 || kLanes == 8, "codegemm: a Psumbook has 1, 4 or 8 lanes");
#if CODEGEMM_HAS_AVX512
  if constexpr (has_avx512(kIsa) && kLanes == 1) return build_psumbook1_avx512<kVecLen>(a);
#endif
#if CODEGEMM_HAS_AVX2
  if constexpr (has_avx2(kIsa) && !has_avx512(kIsa) && kLanes == 1) return build_psumbook1_avx2<kVecLen>(a);
  if constexpr (has_avx2(kIsa) && kLanes == 4) return build_psumbook4_avx2<kVecLen>(a);
  if constexpr (has_avx2(kIsa) && kLanes == 8) return build_psumbook8_avx2<kVecLen>(a);
#endif
  if constexpr (!has_avx2(kIsa)) build_psumbook_portable<kLanes, kVecLen>(a);
}

}  // namespace codegemm::detail
