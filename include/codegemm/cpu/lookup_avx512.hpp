// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/lookup_avx512.hpp - register lookups of 16-bit words with AVX-512 alone.
// Layer: cpu (host only).
//
// One permute looks 32 rows up among 64 words.
#pragma once

#include <codegemm/cpu/lookup_args.hpp>
#include <codegemm/cpu/lookup_avx2.hpp>

#if CODEGEMM_HAS_AVX512

CODEGEMM_AVX512_CODE_BEGIN

namespace codegemm::detail {

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
  for (std::int64_t block = a.first_block; block < a.end_block; ++block) {
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
