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
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i
multiply_16_centroids_vbmi(const std::int32_t* pairs, std::int64_t plane, const __m512i* x) {
  __m512i sums = _mm512_set1_epi32(1 << 15);
  CODEGEMM_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    sums = _mm512_dpwssd_epi32(sums, x[p], _mm512_loadu_si512(pairs + p * plane));
  }
  return sums;
}

// Elements 2 p and 2 p + 1 of a rounded vector.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE std::int32_t pair_of_avx512(const std::int16_t* vector,
                                                                          std::ptrdiff_t p) {
  std::int32_t pair;
  __builtin_memcpy(&pair, vector + 2 * p, sizeof(pair));
  return pair;
}

// Where the byte lies that upper_bytes_vbmi() is to put at `i`: two tables of two planes. Words lie first[0],
// second[0], first[1], second[1] ...
[[nodiscard]] constexpr std::uint8_t upper_byte_place(int i) noexcept {
  const int quarter = i / 16;
  return static_cast<std::uint8_t>(4 * (i % 16) + 2 * (quarter / 2) + quarter % 2);
}

// The vector and the codebook of an entry, which follow one another.
template <int kVecLen, int kCodeBits>
struct EntryCursor {
  const std::int16_t* vector;
  const std::int32_t* pairs;
  std::int64_t m;
  std::int64_t c;
  const std::int32_t* first_pairs;

  EntryCursor(const std::int16_t* rounded, const IntegerTableArgs& a)
      : vector(rounded), pairs(a.pairs + a.codebook * kPairs), m(a.m), c(a.codebook), first_pairs(a.pairs) {}

  void next() {
    pairs += kPairs;
    if (++c < m) return;
    c = 0;
    pairs = first_pairs;
    vector += kVecLen;
  }

 private:
  static constexpr std::int64_t kPairs = std::int64_t{kVecLen / 2} << kCodeBits;  // of a codebook
};

// Tables of 16 centroids, two at a time.
template <int kVecLen>
CODEGEMM_TARGET_AVX512_VBMI void make_small_tables_vbmi(const IntegerTableArgs& a,
                                                        const std::int16_t* rounded, __m512i order) {
  constexpr int kPairs = kVecLen / 2;
  constexpr std::int64_t kTable = encoded_bytes(4);
  EntryCursor<kVecLen, 4> at(rounded, a);
  const std::uint8_t* ahead = a.ahead;
  const auto sums = [&]() CODEGEMM_TARGET_AVX512_VBMI {
    __m512i x[std::size_t{kPairs}];
    CODEGEMM_UNROLL
    for (int p = 0; p < kPairs; ++p) x[p] = _mm512_set1_epi32(pair_of_avx512(at.vector, p));
    const __m512i out = multiply_16_centroids_vbmi<kPairs>(at.pairs, 16, x);
    at.next();
    return out;
  };
  std::int64_t e = 0;
  for (; e + 2 <= a.entries; e += 2) {
    if (ahead != nullptr) ahead = ask_for_entry(ahead, 2 * bytes_asked(4));
    const __m512i first = sums();
    const __m512i second = sums();
    _mm512_storeu_si512(a.tables + e * kTable, upper_bytes_vbmi(first, second, order));
  }
  if (e == a.entries) return;
  const __m512i last = sums();
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.tables + e * kTable),
                      _mm512_castsi512_si256(upper_bytes_vbmi(last, last, order)));
}

// The products of 8 centroids, `plane` apart from one pair of elements to the next, with x.
template <int kPairs>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m256i
multiply_8_centroids_vbmi(const std::int32_t* pairs, std::int64_t plane, const __m256i* x) {
  __m256i sums = _mm256_set1_epi32(1 << 15);
  CODEGEMM_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    sums = _mm256_dpwssd_epi32(sums, x[p],
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + p * plane)));
  }
  return sums;
}

// The upper halves of 8 sums of `first` and of 8 of `second`: in each lane 8 low bytes, then the high ones.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m256i upper_bytes_256_avx512(__m256i first, __m256i second) {
  const __m256i words = _mm256_blend_epi16(_mm256_srli_epi32(first, 16), second, 0xAA);
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15));
  return _mm256_shuffle_epi8(words, order);
}

// Tables of 32 centroids and more, by registers of 256 bits: with 512 Intel's cores lower their clock for
// products (an Ice Lake from 3.4 to 2.8 GHz), and for a while after them the look-ups', too.
template <int kVecLen, int kCodeBits>
CODEGEMM_TARGET_AVX512_VBMI void make_large_tables_vbmi(const IntegerTableArgs& a,
                                                        const std::int16_t* rounded) {
  constexpr std::int64_t kCentroids = std::int64_t{1} << kCodeBits;
  constexpr int kPairs = kVecLen / 2;
  EntryCursor<kVecLen, kCodeBits> at(rounded, a);
  const std::uint8_t* ahead = a.ahead;
  for (std::int64_t e = 0; e < a.entries; ++e, at.next()) {
    if (ahead != nullptr) ahead = ask_for_entry(ahead, bytes_asked(kCodeBits));
    __m256i x[std::size_t{kPairs}];
    CODEGEMM_UNROLL
    for (int p = 0; p < kPairs; ++p) x[p] = _mm256_set1_epi32(pair_of_avx512(at.vector, p));
    std::uint8_t* const table = a.tables + e * encoded_bytes(kCodeBits);
    for (std::int64_t i = 0; i < kCentroids; i += kPairBlock) {
      __m256i bytes[2];
      CODEGEMM_UNROLL
      for (std::int64_t half = 0; half < 2; ++half) {
        const std::int32_t* const pairs = at.pairs + i + half * (kPairBlock / 2);
        bytes[half] = upper_bytes_256_avx512(multiply_8_centroids_vbmi<kPairs>(pairs, kCentroids, x),
                                             multiply_8_centroids_vbmi<kPairs>(pairs + 8, kCentroids, x));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + i), _mm256_unpacklo_epi64(bytes[0], bytes[1]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + kCentroids + i),
                          _mm256_unpackhi_epi64(bytes[0], bytes[1]));
    }
  }
}

/// Makes the tables of a flush; returns its step, or a negative number where the squares of x leave fp32's
/// range or are all 0.
template <int kVecLen, int kCodeBits>
CODEGEMM_TARGET_AVX512_VBMI float make_tables_vbmi(const IntegerTableArgs& a) {
  const float power = sum_squares_avx512(a.x, a.vectors * kVecLen);
  if (!(power > 1e-30F && power < 1e30F)) return -1.0F;
  const float norm = std::sqrt(power);
  alignas(64) std::int16_t rounded[static_cast<std::size_t>(flush_entries(kCodeBits)) * kVecLen + 16];
  round_vectors_avx512(a.x, a.vectors * kVecLen, kTableNorm / norm, rounded);
  if constexpr (kCodeBits == 4) {
    alignas(64) std::uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = upper_byte_place(i);
    make_small_tables_vbmi<kVecLen>(a, rounded, _mm512_load_si512(bytes));
  } else {
    make_large_tables_vbmi<kVecLen, kCodeBits>(a, rounded);
  }
  return a.pair_step * (65536.0F / kTableNorm) * norm;
}

}  // namespace codegemm::detail

CODEGEMM_AVX512_CODE_END

#endif
