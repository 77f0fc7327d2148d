// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/dense_tile.hpp - dequantizes eight rows of a vector; multiplies a 6 x 16 tile.
// Layer: cpu (host only).
#pragma once

#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/configs.hpp>
#include <codegemm/cpu/gather.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/pack.hpp>

#if CODEGEMM_HAS_AVX2
#include <immintrin.h>
#endif

namespace codegemm::detail {

/// The codes of eight rows for some vectors of one scale group and tile.
struct CodeRun {
  const std::uint64_t* codes;  // [vectors][m], one every `words` words
  std::int64_t words;
  int shift;  // codes are (word >> shift) & mask, a byte each
  std::uint64_t mask;
  std::int64_t vectors;
  std::int64_t codebook_count;
  std::int64_t centroids;

  /// The codes of vector j in codebook c, a byte a row.
  [[nodiscard]] CODEGEMM_ALWAYS_INLINE std::uint64_t word(std::int64_t j, std::int64_t c) const {
    return codes[(j * codebook_count + c) * words] >> shift & mask;
  }
};

/// Eight rows of `codes.vectors` vectors, out[vectors * v][ld]:
///   out[j * v + d][r] = scale[r] * sum_c codebooks[c][code_c[j][r]][d]
struct DequantizeArgs {
  CodeRun codes;
  const float* codebooks;  // [m][2^b][v]
  const Half* scales;      // [8]
  std::int64_t ld;
  float* out;
};

template <int kVecLen>
void dequantize_portable(const DequantizeArgs& a) {
  for (int r = 0; r < kWordRows; ++r) {
    const float scale = a.scales[r].to_float();
    for (std::int64_t j = 0; j < a.codes.vectors; ++j) {
      float sum[std::size_t{kVecLen}] = {};
      for (std::int64_t c = 0; c < a.codes.codebook_count; ++c) {
        const auto code = static_cast<std::int64_t>(a.codes.word(j, c) >> (8 * r) & 255U);
        const float* const centroid = a.codebooks + (c * a.codes.centroids + code) * kVecLen;
        for (int d = 0; d < kVecLen; ++d) sum[d] += centroid[d];
      }
      for (int d = 0; d < kVecLen; ++d) a.out[(j * kVecLen + d) * a.ld + r] = scale * sum[d];
    }
  }
}

/// c[6][16] (+)= a[depth][6]^T b[depth][16].
struct MicroArgs {
  const float* a;
  const float* b;
  std::int64_t depth;
  float* c;
  std::int64_t stride;  // of c
  bool accumulate;
};

inline void multiply_portable(const MicroArgs& m) {
  constexpr int kTokens = static_cast<int>(CpuTiles::kDenseTokens);
  constexpr int kRows = static_cast<int>(CpuTiles::kDenseRows);
  for (int t = 0; t < kTokens; ++t) {
    float sum[kRows] = {};
    for (std::int64_t k = 0; k < m.depth; ++k) {
      const float x = m.a[k * kTokens + t];
      for (int n = 0; n < kRows; ++n) sum[n] += x * m.b[k * kRows + n];
    }
    float* const c = m.c + t * m.stride;
    for (int n = 0; n < kRows; ++n) c[n] = m.accumulate ? c[n] + sum[n] : sum[n];
  }
}

#if CODEGEMM_HAS_AVX2

// Elements [d, d + 4) of a centroid; two elements and zeros for v = 2.
template <int kVecLen>
CODEGEMM_TARGET_AVX2 inline __m128 load_centroid_avx2(const float* codebook, std::uint64_t code, int d) {
  const float* const from = codebook + code * std::uint64_t{kVecLen} + d;
  if constexpr (kVecLen == 2) {
    return _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(from)));
  } else {
    return _mm_loadu_ps(from);
  }
}

// The centroids of rows r (low half) and r + 4 (high half).
template <int kVecLen>
CODEGEMM_TARGET_AVX2 inline __m256 load_two_rows_avx2(const float* codebook, std::uint64_t codes, int r,
                                                      int d) {
  const __m128 low = load_centroid_avx2<kVecLen>(codebook, (codes >> (8 * r)) & 255U, d);
  const __m128 high = load_centroid_avx2<kVecLen>(codebook, (codes >> (8 * r + 32)) & 255U, d);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}

// Rows r and r + 4 side by side, then a 4 x 4 transposition in each half.
template <int kVecLen>
CODEGEMM_TARGET_AVX2 void dequantize_avx2(const DequantizeArgs& a) {
  const __m256 scale = load_halves_avx2(a.scales);
  float* out = a.out;
  const CodeRun& run = a.codes;
  for (std::int64_t j = 0; j < run.vectors; ++j, out += kVecLen * a.ld) {
    const std::uint64_t word0 = run.word(j, 0);
    for (int d = 0; d < kVecLen; d += 4) {
      __m256 r0 = load_two_rows_avx2<kVecLen>(a.codebooks, word0, 0, d);
      __m256 r1 = load_two_rows_avx2<kVecLen>(a.codebooks, word0, 1, d);
      __m256 r2 = load_two_rows_avx2<kVecLen>(a.codebooks, word0, 2, d);
      __m256 r3 = load_two_rows_avx2<kVecLen>(a.codebooks, word0, 3, d);
      for (std::int64_t c = 1; c < run.codebook_count; ++c) {
        const float* const codebook = a.codebooks + c * run.centroids * kVecLen;
        const std::uint64_t word = run.word(j, c);
        r0 = _mm256_add_ps(r0, load_two_rows_avx2<kVecLen>(codebook, word, 0, d));
        r1 = _mm256_add_ps(r1, load_two_rows_avx2<kVecLen>(codebook, word, 1, d));
        r2 = _mm256_add_ps(r2, load_two_rows_avx2<kVecLen>(codebook, word, 2, d));
        r3 = _mm256_add_ps(r3, load_two_rows_avx2<kVecLen>(codebook, word, 3, d));
      }
      const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
      const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
      float* const to = out + d * a.ld;
      _mm256_store_ps(to, _mm256_mul_ps(scale, _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23))));
      _mm256_store_ps(to + a.ld, _mm256_mul_ps(scale, _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23))));
      if constexpr (kVecLen > 2) {
        const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
        const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
        _mm256_store_ps(to + 2 * a.ld,
                        _mm256_mul_ps(scale, _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23))));
        _mm256_store_ps(to + 3 * a.ld,
                        _mm256_mul_ps(scale, _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23))));
      }
    }
  }
}

CODEGEMM_TARGET_AVX2 inline void store_tile_row_avx2(float* c, bool accumulate, __m256 low, __m256 high) {
  if (accumulate) {
    low = _mm256_add_ps(low, _mm256_loadu_ps(c));
    high = _mm256_add_ps(high, _mm256_loadu_ps(c + 8));
  }
  _mm256_storeu_ps(c, low);
  _mm256_storeu_ps(c + 8, high);
}

// Twelve sums, two loads of weights and six broadcasts of x: 12 multiply-adds for 8 loads.
CODEGEMM_TARGET_AVX2 inline void multiply_avx2(const MicroArgs& m) {
  const __m256 zero = _mm256_setzero_ps();
  __m256 c00 = zero, c01 = zero, c10 = zero, c11 = zero, c20 = zero, c21 = zero;
  __m256 c30 = zero, c31 = zero, c40 = zero, c41 = zero, c50 = zero, c51 = zero;
  const float* a = m.a;
  const float* b = m.b;
  for (std::int64_t k = 0; k < m.depth; ++k, a += 6, b += 16) {
    const __m256 b0 = _mm256_load_ps(b);
    const __m256 b1 = _mm256_load_ps(b + 8);
    __m256 x = _mm256_broadcast_ss(a);
    c00 = _mm256_fmadd_ps(x, b0, c00);
    c01 = _mm256_fmadd_ps(x, b1, c01);
    x = _mm256_broadcast_ss(a + 1);
    c10 = _mm256_fmadd_ps(x, b0, c10);
    c11 = _mm256_fmadd_ps(x, b1, c11);
    x = _mm256_broadcast_ss(a + 2);
    c20 = _mm256_fmadd_ps(x, b0, c20);
    c21 = _mm256_fmadd_ps(x, b1, c21);
    x = _mm256_broadcast_ss(a + 3);
    c30 = _mm256_fmadd_ps(x, b0, c30);
    c31 = _mm256_fmadd_ps(x, b1, c31);
    x = _mm256_broadcast_ss(a + 4);
    c40 = _mm256_fmadd_ps(x, b0, c40);
    c41 = _mm256_fmadd_ps(x, b1, c41);
    x = _mm256_broadcast_ss(a + 5);
    c50 = _mm256_fmadd_ps(x, b0, c50);
    c51 = _mm256_fmadd_ps(x, b1, c51);
  }
  store_tile_row_avx2(m.c, m.accumulate, c00, c01);
  store_tile_row_avx2(m.c + m.stride, m.accumulate, c10, c11);
  store_tile_row_avx2(m.c + 2 * m.stride, m.accumulate, c20, c21);
  store_tile_row_avx2(m.c + 3 * m.stride, m.accumulate, c30, c31);
  store_tile_row_avx2(m.c + 4 * m.stride, m.accumulate, c40, c41);
  store_tile_row_avx2(m.c + 5 * m.stride, m.accumulate, c50, c51);
}

#endif

template <Isa kIsa, int kVecLen>
void dequantize(const DequantizeArgs& a) {
#if CODEGEMM_HAS_AVX2
  if constexpr (has_avx2(kIsa)) return dequantize_avx2<kVecLen>(a);
#endif
  if constexpr (!has_avx2(kIsa)) dequantize_portable<kVecLen>(a);
}

template <Isa kIsa>
void multiply(const MicroArgs& m) {
#if CODEGEMM_HAS_AVX2
  if constexpr (has_avx2(kIsa)) return multiply_avx2(m);
#endif
  if constexpr (!has_avx2(kIsa)) multiply_portable(m);
}

}  // namespace codegemm::detail
