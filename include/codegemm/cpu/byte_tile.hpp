// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/byte_tile.hpp - the dense way in pairs of bytes: what a tile multiplies, and how activations
// are rounded for it.
// Layer: cpu (host only).
//
// Weights and activations are q = R high + low (byte_codebooks.hpp). The sum of q q' over a chunk (as
// integer_tile.hpp has them) is R (R high high' + high low' + low high') without low low', which is below
// 1e-4 of its norm for anything but single huge activations, and 5e-4 with them. The rest is exact in 32
// bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/amx.hpp>
#include <codegemm/cpu/configs.hpp>

#if CODEGEMM_HAS_AVX512
#include <immintrin.h>
#endif

namespace codegemm::detail {

/// 16 tokens times up to 32 rows of a slab, chunk by chunk: c[tokens][rows] (+)=.
struct ByteTileArgs {
  const std::int8_t* x;      // [depth / 64][high, low][16 tokens][64]
  const std::int8_t* w;      // [2 panels][depth / 4][high, low][16 rows][4]
  std::int64_t panel_bytes;  // from one panel to the next
  const float* x_steps;      // [depth / 64][16]: of the chunk that begins there
  const float* w_steps;      // [depth / 64][64]
  int radix_bits;
  const std::int64_t* chunk_ends;  // [chunks], the last is the depth: columns of the slab
  std::int64_t chunks;
  std::int64_t tokens;  // that exist
  std::int64_t rows;
  float* c;
  std::int64_t stride;  // of c
  bool accumulate;
};

/// How tiles of bytes are multiplied, and what a task does before the first and after the last of them.
struct ByteTileKernels {
  void (*begin)(std::int64_t tokens) = nullptr;  // no tile has more
  void (*multiply)(const ByteTileArgs&) = nullptr;
  void (*end)() = nullptr;
};

#if CODEGEMM_HAS_AMX

CODEGEMM_AVX512_CODE_BEGIN

/// Rounds x[count] of one token, a multiple of 64, to bytes as ByteTileArgs::x has them. Returns the step:
/// NaN where a number is not finite.
CODEGEMM_TARGET_AVX512_VBMI inline float round_bytes_vbmi(const float* x, std::int64_t count, int radix_bits,
                                                          std::int8_t* out) {
  constexpr std::int64_t kPlane = CpuTiles::kAmxTokens * CpuTiles::kAmxColumns;
  constexpr std::uint32_t kInfinity = 0x7F800000U;
  const __m512i no_sign = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most = _mm512_setzero_si512();  // as integers, in whose order NaN is the largest
  for (std::int64_t k = 0; k < count; k += 16) {
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + k), no_sign));
  }
  const std::uint32_t largest_bits = _mm512_reduce_max_epu32(most);
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof(largest));
  const float before = largest < 1e-30F ? 0x1p64F : 1.0F;  // else 1 / step might be too large for a number
  const int half = 1 << (radix_bits - 1);
  const float step = largest * before / static_cast<float>(2 * half * 127 + half - 1);
  const bool usable = largest_bits < kInfinity && largest_bits != 0;
  const __m512 factor = _mm512_set1_ps(usable ? before : 0.0F);
  const __m512 inverse = _mm512_set1_ps(usable ? 1.0F / step : 0.0F);
  const __m512i rounding = _mm512_set1_epi32(half);
  const __m512i bits = _mm512_set1_epi32(radix_bits);
  for (std::int64_t k = 0; k < count; k += CpuTiles::kAmxColumns, out += 2 * kPlane) {
    for (std::int64_t i = 0; i < CpuTiles::kAmxColumns; i += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + k + i), factor), inverse);
      const __m512i q = _mm512_cvtps_epi32(scaled);
      const __m512i high = _mm512_srav_epi32(_mm512_add_epi32(q, rounding), bits);
      const __m512i low = _mm512_sub_epi32(q, _mm512_sllv_epi32(high, bits));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kPlane + i), _mm512_cvtepi32_epi8(low));
    }
  }
  if (largest_bits >= kInfinity) return std::numeric_limits<float>::quiet_NaN();
  return usable ? step / before : 0.0F;
}

CODEGEMM_AVX512_CODE_END

#endif

}  // namespace codegemm::detail
