// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/lookup_avx512.hpp - register lookups with AVX-512: bytes with VBMI, 16-bit words without.
// Layer: cpu (host only).
//
// With VBMI one permute looks 64 rows up among 128 bytes, so a table of 256 entries is two permutes and a
// blend for the low bytes and the same for the high ones. Without, a permute looks 32 rows up among 64 words.
#pragma once

#include <codegemm/cpu/lookup_args.hpp>
#include <codegemm/cpu/lookup_avx2.hpp>

#if CODEGEMM_HAS_AVX512

CODEGEMM_AVX512_CODE_BEGIN

namespace codegemm::detail {

// round(sums[0..16) * inverse) as 16-bit integers.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m256i round16_avx512(const float* sums, __m512 inverse) {
  return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(sums), inverse)));
}

/// Tables in two planes: the low bytes of all entries, then the high ones. The step of the flush, negative
/// where 16 bits are not enough.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512 float encode_planes_avx512(const EncodeArgs& a) {
  constexpr int kCentroids = 1 << kCodeBits;
  const float step = flush_step(flush_stats_avx2<kCodeBits>(a.sums, a.entries), a.entries);
  const __m512 inverse = _mm512_set1_ps(step > 0.0F ? 1.0F / step : 0.0F);
  if (step < 0.0F) return step;
  for (std::int64_t e = 0; e < a.entries; ++e) {
    std::uint8_t* const table = a.tables + e * encoded_bytes(kCodeBits);
    for (int i = 0; i < kCentroids; i += 16) {
      const __m256i q = round16_avx512(a.sums + e * kCentroids + i, inverse);
      _mm_store_si128(reinterpret_cast<__m128i*>(table + i), _mm256_cvtepi16_epi8(q));
      _mm_store_si128(reinterpret_cast<__m128i*>(table + kCentroids + i),
                      _mm256_cvtepi16_epi8(_mm256_srli_epi16(q, 8)));
    }
  }
  return step;
}

/// Tables of 16-bit words; the same step.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512 float encode_words_avx512(const EncodeArgs& a) {
  constexpr int kCentroids = 1 << kCodeBits;
  const float step = flush_step(flush_stats_avx2<kCodeBits>(a.sums, a.entries), a.entries);
  const __m512 inverse = _mm512_set1_ps(step > 0.0F ? 1.0F / step : 0.0F);
  if (step < 0.0F) return step;
  for (std::int64_t e = 0; e < a.entries; ++e) {
    std::uint8_t* const table = a.tables + e * encoded_bytes(kCodeBits);
    for (std::int64_t i = 0; i < kCentroids; i += 16) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(table + 2 * i),
                         round16_avx512(a.sums + e * kCentroids + i, inverse));
    }
  }
  return step;
}

// y[0..64) += step * scales[n] * sums[n].
CODEGEMM_TARGET_AVX512 inline void add_flush_avx512(const std::int16_t* sums, float step, const Half* scales,
                                                    float* y) {
  const __m512 factor = _mm512_set1_ps(step);
  for (int n = 0; n < kBlockRows; n += 16) {
    const __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + n));
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + n)));
    const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(sum));
    _mm512_storeu_ps(y + n, _mm512_fmadd_ps(_mm512_mul_ps(scale, factor), value, _mm512_loadu_ps(y + n)));
  }
}

// The codes of 64 rows, a byte each.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i load_codes_vbmi(const std::uint8_t* codes) {
  if constexpr (kCodeBits == 4) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i mask = _mm256_set1_epi8(15);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(both, mask)),
                              _mm256_and_si256(_mm256_srli_epi16(both, 4), mask), 1);
  } else {
    return _mm512_loadu_si512(codes);
  }
}

// 64 rows in one plane of a table.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i look_up_plane_vbmi(const std::uint8_t* plane,
                                                                              __m512i codes) {
  if constexpr (kCodeBits == 4) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(plane)));
    return _mm512_shuffle_epi8(table, codes);
  } else if constexpr (kCodeBits == 5) {
    const __m512i table = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(plane)));
    return _mm512_permutexvar_epi8(codes, table);
  } else if constexpr (kCodeBits == 6) {
    return _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(plane));
  } else if constexpr (kCodeBits == 7) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), codes, _mm512_loadu_si512(plane + 64));
  } else {
    const __m512i clear = look_up_plane_vbmi<7>(plane, codes);
    const __m512i set = look_up_plane_vbmi<7>(plane + 128, codes);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), clear, set);
  }
}

template <int kCodeBits>
CODEGEMM_TARGET_AVX512_VBMI void lookup_planes_vbmi(const LookupArgs& a) {
  constexpr std::int64_t kEntryBytes = code_bytes(kCodeBits);
  alignas(64) std::int16_t sums[kBlockRows];
  // Unpacking leaves rows 16 j .. 16 j + 7 in lane j of `low` and the eight after them in lane j of `high`.
  const __m512i first_rows = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i last_rows = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (std::int64_t block = 0; block < a.blocks; ++block) {
    for (const Flush* f = a.flushes; f != a.flushes + a.flush_count; ++f) {
      const std::uint8_t* codes = a.codes + block * a.stride + f->first * kEntryBytes;
      const std::uint8_t* table = a.tables + f->first * encoded_bytes(kCodeBits);
      __m512i low = _mm512_setzero_si512();
      __m512i high = low;
      for (std::int64_t e = 0; e < f->count; ++e, codes += kEntryBytes, table += encoded_bytes(kCodeBits)) {
        const __m512i index = load_codes_vbmi<kCodeBits>(codes);
        const __m512i rest = look_up_plane_vbmi<kCodeBits>(table, index);
        const __m512i top = look_up_plane_vbmi<kCodeBits>(table + (1 << kCodeBits), index);
        low = _mm512_add_epi16(low, _mm512_unpacklo_epi8(rest, top));
        high = _mm512_add_epi16(high, _mm512_unpackhi_epi8(rest, top));
      }
      _mm512_storeu_si512(sums, _mm512_permutex2var_epi64(low, first_rows, high));
      _mm512_storeu_si512(sums + 32, _mm512_permutex2var_epi64(low, last_rows, high));
      add_flush_avx512(sums, f->step, f->scales + block * kBlockRows, a.y + block * kBlockRows);
    }
  }
}

// 32 rows in a table of words.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m512i look_up_words_avx512(const std::uint8_t* table,
                                                                           __m512i codes) {
  if constexpr (kCodeBits == 5) {
    return _mm512_permutexvar_epi16(codes, _mm512_loadu_si512(table));
  } else if constexpr (kCodeBits == 6) {
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
  } else {
    const __m512i clear = look_up_words_avx512<kCodeBits - 1>(table, codes);
    const __m512i set = look_up_words_avx512<kCodeBits - 1>(table + encoded_bytes(kCodeBits - 1), codes);
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(1 << (kCodeBits - 1)));
    return _mm512_mask_blend_epi16(upper, clear, set);
  }
}

template <int kCodeBits>
CODEGEMM_TARGET_AVX512 void lookup_words_avx512(const LookupArgs& a) {
  static_assert(kCodeBits >= 5, "codegemm: 4-bit codes have no table of words");
  constexpr std::int64_t kEntryBytes = code_bytes(kCodeBits);
  alignas(64) std::int16_t sums[kBlockRows];
  for (std::int64_t block = 0; block < a.blocks; ++block) {
    for (const Flush* f = a.flushes; f != a.flushes + a.flush_count; ++f) {
      const std::uint8_t* codes = a.codes + block * a.stride + f->first * kEntryBytes;
      const std::uint8_t* table = a.tables + f->first * encoded_bytes(kCodeBits);
      __m512i low = _mm512_setzero_si512();
      __m512i high = low;
      for (std::int64_t e = 0; e < f->count; ++e, codes += kEntryBytes, table += encoded_bytes(kCodeBits)) {
        const auto* const from = reinterpret_cast<const __m256i*>(codes);
        const __m512i index0 = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from));
        const __m512i index1 = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from + 1));
        low = _mm512_add_epi16(low, look_up_words_avx512<kCodeBits>(table, index0));
        high = _mm512_add_epi16(high, look_up_words_avx512<kCodeBits>(table, index1));
      }
      _mm512_storeu_si512(sums, low);
      _mm512_storeu_si512(sums + 32, high);
      add_flush_avx512(sums, f->step, f->scales + block * kBlockRows, a.y + block * kBlockRows);
    }
  }
}

}  // namespace codegemm::detail

CODEGEMM_AVX512_CODE_END

#endif
