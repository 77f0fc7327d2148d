// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/integer_tables_vbmi.hpp - Psumbook tables of 16 bits out of integers, with VNNI and VBMI.
// Layer: cpu (host only).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/numerics.hpp>
#include <codegemm/cpu/encode_avx512.hpp>
#include <codegemm/cpu/integer_tables.hpp>

#if CODEGEMM_HAS_AVX512

CODEGEMM_AVX512_CODE_BEGIN

namespace codegemm::detail {

// x[0..16), of which only `count` are there; 0 beyond.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m512 load_some_avx512(const float* x, std::int64_t count) {
  if (count >= 16) return _mm512_loadu_ps(x);
  alignas(64) float some[16] = {};
  for (std::int64_t i = 0; i < count; ++i) some[i] = x[i];
  return _mm512_load_ps(some);
}

// The sum of x[i]^2.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE float sum_squares_avx512(const float* x, std::int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m512 v = load_some_avx512(x + i, count - i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return add_lanes_avx512(sum);
}

// out[i] = round(factor * x[i]), up to 15 more than `count`.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE void round_vectors_avx512(const float* x, std::int64_t count,
                                                                        float factor, std::int16_t* out) {
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m512 v = _mm512_mul_ps(load_some_avx512(x + i, count - i), _mm512_set1_ps(factor));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
  }
}

// The upper halves of 16 sums of `first` and of 16 of `second`, byte by byte: 32 low bytes, then the high
// ones.
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i upper_bytes_vbmi(__m512i first, __m512i second,
                                                                            __m512i order) {
  const __m512i words = _mm512_mask_blend_epi16(0xAAAAAAAAU, _mm512_srli_epi32(first, 16), second);
  return _mm512_permutexvar_epi8(order, words);
}

// The products of 16 centroids, `plane` apart from one pair of elements to the next, with x, rounded to their
// upper halves.
template <int kPairs>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i multiply_centroids_vbmi(const std::int32_t* pairs,
                                                                                   std::int64_t plane,
                                                                                   const __m512i* x) {
  __m512i sums = _mm512_set1_epi32(1 << 15);
  CODEGEMM_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    sums = _mm512_dpwssd_epi32(sums, x[p], _mm512_loadu_si512(pairs + p * plane));
  }
  return sums;
}

/// Makes the tables of a flush; returns its step, or a negative number where the squares of x leave fp32's
/// range or are all 0.
template <int kVecLen, int kCodeBits>
CODEGEMM_TARGET_AVX512_VBMI float make_tables_vbmi(const IntegerTableArgs& a) {
  static_assert(kCodeBits >= 5, "codegemm: 16 centroids are fewer than the lanes of two registers");
  constexpr std::int64_t kCentroids = std::int64_t{1} << kCodeBits;
  constexpr int kPairs = kVecLen / 2;
  const float power = sum_squares_avx512(a.x, a.vectors * kVecLen);
  if (!(power > 1e-30F && power < 1e30F)) return -1.0F;
  const float norm = std::sqrt(power);
  alignas(64) std::int16_t rounded[static_cast<std::size_t>(CpuTiles::kFlushEntries) * kVecLen + 16];
  round_vectors_avx512(a.x, a.vectors * kVecLen, kTableNorm / norm, rounded);

  alignas(64) std::uint8_t bytes[64];
  for (int i = 0; i < 16; ++i) {  // words lie first[0], second[0], first[1], second[1] ...
    bytes[i] = static_cast<std::uint8_t>(4 * i);
    bytes[16 + i] = static_cast<std::uint8_t>(4 * i + 2);
    bytes[32 + i] = static_cast<std::uint8_t>(4 * i + 1);
    bytes[48 + i] = static_cast<std::uint8_t>(4 * i + 3);
  }
  const __m512i order = _mm512_load_si512(bytes);
  const std::uint8_t* ahead = a.ahead;
  std::int64_t c = a.codebook;
  const std::int16_t* vector = rounded;
  for (std::int64_t e = 0; e < a.entries; ++e) {
    if (ahead != nullptr) ahead = ask_for_entry(ahead, kCentroids);
    __m512i x[std::size_t{kPairs}];
    CODEGEMM_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      std::int32_t pair;
      __builtin_memcpy(&pair, vector + 2 * p, sizeof(pair));
      x[p] = _mm512_set1_epi32(pair);
    }
    const std::int32_t* const pairs = a.pairs + c * kPairs * kCentroids;
    std::uint8_t* const table = a.tables + e * encoded_bytes(kCodeBits);
    const auto upper_bytes = [&](std::int64_t i) CODEGEMM_TARGET_AVX512_VBMI {
      return upper_bytes_vbmi(multiply_centroids_vbmi<kPairs>(pairs + i, kCentroids, x),
                              multiply_centroids_vbmi<kPairs>(pairs + i + 16, kCentroids, x), order);
    };
    if constexpr (kCodeBits == 5) {
      _mm512_storeu_si512(table, upper_bytes(0));
    } else {
      for (std::int64_t i = 0; i < kCentroids; i += 64) {
        const __m512i first = upper_bytes(i);
        const __m512i second = upper_bytes(i + 32);
        _mm512_storeu_si512(table + i, _mm512_shuffle_i64x2(first, second, 0x44));
        _mm512_storeu_si512(table + kCentroids + i, _mm512_shuffle_i64x2(first, second, 0xEE));
      }
    }
    if (++c == a.m) {
      c = 0;
      vector += kVecLen;
    }
  }
  return a.pair_step * (65536.0F / kTableNorm) * norm;
}

}  // namespace codegemm::detail

CODEGEMM_AVX512_CODE_END

#endif
