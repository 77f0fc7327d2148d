// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/encode_avx512.hpp - Psumbook entries to 16 bits with AVX-512, as the look-ups take them.
// Layer: cpu (host only).
#pragma once

#include <cstddef>

#include <codegemm/cpu/lookup_args.hpp>
#include <codegemm/cpu/lookup_avx2.hpp>

#if CODEGEMM_HAS_AVX512

CODEGEMM_AVX512_CODE_BEGIN

namespace codegemm::detail {

// round(sums[0..16) * inverse) as 16-bit integers.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m256i round16_avx512(const float* sums, __m512 inverse) {
  return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(sums), inverse)));
}

// round(sums[0..32) * inverse), whose magnitudes are below 2^15, as 16-bit integers: they are the low bits of
// what 1.5 * 2^23 is added to. Bytes are arranged as `bytes` says.
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i round_bytes_vbmi(const float* sums, __m512 inverse,
                                                                            __m512i bytes) {
  const __m512 round = _mm512_set1_ps(0x1.8p23F);
  const __m512 first = _mm512_fmadd_ps(_mm512_loadu_ps(sums), inverse, round);
  const __m512 second = _mm512_fmadd_ps(_mm512_loadu_ps(sums + 16), inverse, round);
  return _mm512_permutex2var_epi8(_mm512_castps_si512(first), bytes, _mm512_castps_si512(second));
}

// The upper half of 16 lanes.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m256 upper_half_avx512(__m512 v) {
  return _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(v), 1));
}

// Asks for `bytes` bytes of codes into the second-level cache and returns where they end.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE const std::uint8_t* ask_for_entry(const std::uint8_t* codes,
                                                                                std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + i), _MM_HINT_T1);
  }
  return codes + bytes;
}

// Lane i: the largest lane of v[i], in some order of the i.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m512 largest_of_each_avx512(__m512 (&v)[16]) {
  CODEGEMM_UNROLL
  for (int i = 0; i < 8; ++i) {
    v[i] =
        _mm512_max_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE));
  }
  CODEGEMM_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i] =
        _mm512_max_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD));
  }
  CODEGEMM_UNROLL
  for (int i = 0; i < 2; ++i) {
    v[i] = _mm512_max_ps(_mm512_unpacklo_ps(v[i], v[i + 2]), _mm512_unpackhi_ps(v[i], v[i + 2]));
  }
  const __m512 even = _mm512_unpacklo_ps(v[0], v[1]);
  const __m512 odd = _mm512_unpackhi_ps(v[0], v[1]);
  return _mm512_max_ps(even, odd);
}

CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE float add_lanes_avx512(__m512 v) {
  return add_lanes_avx2(_mm256_add_ps(_mm512_castps512_ps256(v), upper_half_avx512(v)));
}

CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE float largest_lane_avx512(__m512 v) {
  return largest_lane_avx2(_mm256_max_ps(_mm512_castps512_ps256(v), upper_half_avx512(v)));
}

// ahead: as EncodeArgs has it; half of those bytes are asked for.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512 FlushStats flush_stats_avx512(const float* sums, std::int64_t entries,
                                                     const std::uint8_t* ahead = nullptr) {
  constexpr int kCentroids = 1 << kCodeBits;
  constexpr int kLargerMagnitude = 0b1011;
  // As many sums side by side as hide how long one takes.
  constexpr int kTogether = kCentroids >= 64 ? 4 : 2;
  FlushStats out;
  __m512 power[std::size_t{kTogether}];
  CODEGEMM_UNROLL
  for (int i = 0; i < kTogether; ++i) power[i] = _mm512_setzero_ps();
  std::int64_t e = 0;
  if constexpr (kCentroids == 16) {  // an entry is one register: sixteen of them at a time
    __m512 bound = _mm512_setzero_ps();
    for (; e + 16 <= entries; e += 16, sums += std::ptrdiff_t{16} * kCentroids) {
      __m512 largest[16];
      CODEGEMM_UNROLL
      for (std::ptrdiff_t i = 0; i < 16; ++i) {
        const __m512 v = _mm512_loadu_ps(sums + i * kCentroids);
        power[i % kTogether] = _mm512_fmadd_ps(v, v, power[i % kTogether]);
        largest[i] = _mm512_abs_ps(v);
      }
      bound = _mm512_add_ps(bound, largest_of_each_avx512(largest));
    }
    out.bound = add_lanes_avx512(bound);
  }
  for (; e < entries; ++e, sums += kCentroids) {
    __m512 largest = _mm512_setzero_ps();
    if constexpr (kCentroids == 16) {
      const __m512 v = _mm512_loadu_ps(sums);
      largest = _mm512_abs_ps(v);
      power[0] = _mm512_fmadd_ps(v, v, power[0]);
    } else {
      for (int i = 0; i < kCentroids; i += 16 * kTogether) {
        __m512 v[std::size_t{kTogether}];
        CODEGEMM_UNROLL
        for (int n = 0; n < kTogether; ++n) {
          v[n] = _mm512_loadu_ps(sums + i + std::ptrdiff_t{16} * n);
          power[n] = _mm512_fmadd_ps(v[n], v[n], power[n]);
        }
        CODEGEMM_UNROLL
        for (int n = 0; n < kTogether; n += 2) v[n] = _mm512_range_ps(v[n], v[n + 1], kLargerMagnitude);
        if constexpr (kTogether == 4) v[0] = _mm512_range_ps(v[0], v[2], kLargerMagnitude);
        largest = _mm512_range_ps(v[0], largest, kLargerMagnitude);
      }
    }
    out.bound += largest_lane_avx512(largest);
    if (ahead != nullptr) ahead = ask_for_entry(ahead, kCentroids / 2);
  }
  CODEGEMM_UNROLL
  for (int i = 1; i < kTogether; ++i) power[0] = _mm512_add_ps(power[0], power[i]);
  out.power = add_lanes_avx512(power[0]) / static_cast<float>(kCentroids);
  return out;
}

/// Tables in two planes: the low bytes of all entries, then the high ones. The step of the flush, negative
/// where 16 bits are not enough.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512_VBMI float encode_planes_avx512(const EncodeArgs& a) {
  constexpr int kCentroids = 1 << kCodeBits;
  constexpr bool kAsk = kCentroids >= 128;  // a cache line or more in either pass
  const FlushStats stats = flush_stats_avx512<kCodeBits>(a.sums, a.entries, kAsk ? a.ahead : nullptr);
  const float step = flush_step(stats, a.entries);
  const __m512 inverse = _mm512_set1_ps(step > 0.0F ? 1.0F / step : 0.0F);
  if (step < 0.0F) return step;
  alignas(64) std::uint8_t order[64];
  for (int i = 0; i < 32; ++i) {     // of 128 bytes; the second source begins at 64
    if constexpr (kCodeBits == 4) {  // two tables
      order[i] = static_cast<std::uint8_t>(4 * (i % 16) + i / 16);
      order[32 + i] = static_cast<std::uint8_t>(64 + order[i]);
    } else {  // 32 centroids of both planes
      order[i] = static_cast<std::uint8_t>(4 * i);
      order[32 + i] = static_cast<std::uint8_t>(4 * i + 1);
    }
  }
  const __m512i bytes = _mm512_load_si512(order);
  if constexpr (kCodeBits == 4) {
    std::int64_t e = 0;
    for (; e + 2 <= a.entries; e += 2) {
      _mm512_storeu_si512(a.tables + e * encoded_bytes(kCodeBits),
                          round_bytes_vbmi(a.sums + e * kCentroids, inverse, bytes));
    }
    if (e < a.entries) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(a.sums + e * kCentroids), inverse));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.tables + e * encoded_bytes(kCodeBits)),
                          _mm512_castsi512_si256(_mm512_permutex2var_epi8(q, bytes, q)));
    }
  } else {
    const std::uint8_t* ahead = kAsk && a.ahead != nullptr ? a.ahead + a.entries * kCentroids / 2 : nullptr;
    for (std::int64_t e = 0; e < a.entries; ++e) {
      if (ahead != nullptr) ahead = ask_for_entry(ahead, kCentroids / 2);
      const float* const sums = a.sums + e * kCentroids;
      std::uint8_t* const table = a.tables + e * encoded_bytes(kCodeBits);
      for (int i = 0; i < kCentroids; i += 32) {
        const __m512i q = round_bytes_vbmi(sums + i, inverse, bytes);
        _mm256_store_si256(reinterpret_cast<__m256i*>(table + i), _mm512_castsi512_si256(q));
        _mm256_store_si256(reinterpret_cast<__m256i*>(table + kCentroids + i),
                           _mm512_extracti64x4_epi64(q, 1));
      }
    }
  }
  return step;
}

/// Tables of 16-bit words; the same step.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512 float encode_words_avx512(const EncodeArgs& a) {
  constexpr int kCentroids = 1 << kCodeBits;
  const float step = flush_step(flush_stats_avx512<kCodeBits>(a.sums, a.entries), a.entries);
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

}  // namespace codegemm::detail

CODEGEMM_AVX512_CODE_END

#endif
