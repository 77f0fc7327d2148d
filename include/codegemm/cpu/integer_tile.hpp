// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/integer_tile.hpp - the dense way in 16-bit integers: twice the products an instruction.
// Layer: cpu (host only).
//
// A *chunk* is up to kIntegerChunk columns that share a scale group. Weights are sums of rounded centroids,
// below 2^13; a token's activations in a chunk are rounded with a step of their own, so that their magnitudes
// add up to less than 2^18. Sums of products over a chunk are then exact in 32 bits, and each chunk adds
// activation step * scale * codebook step * sum to y in fp32. Rounding the activations costs at most 1.5e-4
// of a chunk's norm, whatever they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/configs.hpp>
#include <codegemm/cpu/dense_tile.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/cpu/lookup_avx2.hpp>
#include <codegemm/pack.hpp>

#if CODEGEMM_HAS_AVX2
#include <immintrin.h>
#endif

namespace codegemm::detail {

/// Magnitudes of a chunk's rounded activations together: with kRoundedWeightMax, and 128 times half a unit of
/// rounding, below 2^31.
inline constexpr float kRoundedTokenSum = 262144.0F - 128.0F;

/// The last column, plus one, of the chunk that begins at column k of a slab that ends at slab_end.
[[nodiscard]] constexpr std::int64_t chunk_end(std::int64_t k, std::int64_t slab_end,
                                               std::int64_t scale_group) noexcept {
  const std::int64_t cut = (k / CpuTiles::kIntegerChunk + 1) * CpuTiles::kIntegerChunk;
  const std::int64_t group_end = scale_group < 0 ? cut : (k / scale_group + 1) * scale_group;
  return std::min({slab_end, cut, group_end});
}

/// The largest rounded activation: its high byte, rounded, is one still.
inline constexpr float kRoundedTokenMax = 127.0F * 256.0F + 127.0F;

/// How to round a chunk of one token: round(x * before * inverse) is an integer of about x / step. Two
/// factors, since together they may be too large for one number.
struct ChunkStep {
  float before = 1.0F;
  float inverse = 0.0F;
  float step = 0.0F;  // NaN where the chunk has a number that is not finite
};

/// Eight rows of `codes.vectors` vectors, out[vectors * v / 2][ld], each element of which holds the rounded
/// weights of two columns, the first in its low half.
struct DequantizePairsArgs {
  CodeRun codes;
  const std::int16_t* codebooks;  // [m][2^b][v]
  std::int64_t ld;
  std::int32_t* out;
};

/// c[6][16] (+)= a slab of x and w, chunk by chunk; the first chunk begins at `first_k`.
struct IntegerTileArgs {
  const std::int32_t* x;  // [depth / 2][6]
  const std::int32_t* w;  // [depth / 2][16]
  const float* x_steps;   // [units][6]: of the chunk that begins in each kIntegerUnit columns
  const float* w_steps;   // [units][ld_steps]
  std::int64_t ld_steps;
  std::int64_t first_k;
  std::int64_t depth;
  std::int64_t scale_group;
  float* c;
  std::int64_t stride;  // of c
  bool accumulate;
};

#if CODEGEMM_HAS_AVX2

struct Magnitudes {
  float sum, largest;
};

// Of x[count] times factor.
CODEGEMM_TARGET_AVX2 inline Magnitudes magnitudes_avx2(const float* x, std::int64_t count, float factor) {
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  const __m256 factors = _mm256_set1_ps(factor);
  __m256 sums = _mm256_setzero_ps();
  __m256 most = _mm256_setzero_ps();
  std::int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    const __m256 v = _mm256_mul_ps(_mm256_and_ps(_mm256_loadu_ps(x + k), no_sign), factors);
    sums = _mm256_add_ps(sums, v);
    most = _mm256_max_ps(most, v);
  }
  Magnitudes out{add_lanes_avx2(sums), largest_lane_avx2(most)};
  for (; k < count; ++k) {
    const float v = std::abs(x[k]) * factor;
    out.sum += v;
    out.largest = std::max(out.largest, v);
  }
  return out;
}

CODEGEMM_TARGET_AVX2 inline ChunkStep chunk_step_avx2(const float* x, std::int64_t count) {
  ChunkStep out;
  Magnitudes m = magnitudes_avx2(x, count, 1.0F);
  if (!(m.sum > 1e-30F && m.sum < 1e30F) && m.sum != 0.0F) {
    out.before = m.sum <= 1e-30F ? 0x1p64F : 0x1p-64F;
    m = magnitudes_avx2(x, count, out.before);
  }
  if (m.sum == 0.0F) return out;
  const float step = std::max(m.sum / kRoundedTokenSum, m.largest / kRoundedTokenMax);
  if (!(step <= std::numeric_limits<float>::max())) {
    out.step = std::numeric_limits<float>::quiet_NaN();
    return out;
  }
  out.inverse = 1.0F / step;
  out.step = step / out.before;
  return out;
}

/// Rounds x[count], at most kIntegerChunk; rounded is 32-byte aligned. Returns the step.
CODEGEMM_TARGET_AVX2 inline float round_values_avx2(const float* x, std::int64_t count,
                                                    std::int16_t* rounded) {
  const ChunkStep how = chunk_step_avx2(x, count);
  const __m256 before = _mm256_set1_ps(how.before);
  const __m256 inverse = _mm256_set1_ps(how.inverse);
  std::int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    const __m256 v = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + k), before), inverse);
    const __m256i q = _mm256_cvtps_epi32(v);
    _mm_store_si128(reinterpret_cast<__m128i*>(rounded + k),
                    _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
  }
  for (; k < count; ++k) {
    const float v = x[k] * how.before * how.inverse;
    rounded[k] = static_cast<std::int16_t>(_mm_cvtss_si32(_mm_set_ss(v)));
  }
  return how.step;
}

/// Rounds x[count] and stores it as pairs, out[count / 2][kDenseTokens]; returns the step.
CODEGEMM_TARGET_AVX2 inline float round_chunk_avx2(const float* x, std::int64_t count, std::int32_t* out) {
  alignas(32) std::int16_t rounded[static_cast<std::size_t>(CpuTiles::kIntegerChunk)];
  const float step = round_values_avx2(x, count, rounded);
  for (std::int64_t k = 0; k < count; k += 2) {
    std::int32_t pair;
    std::memcpy(&pair, rounded + k, sizeof(pair));
    out[k / 2 * CpuTiles::kDenseTokens] = pair;
  }
  return step;
}

/// out[n] = step * scales[n]; count is a multiple of 8.
CODEGEMM_TARGET_AVX2 inline void scale_steps_avx2(const Half* scales, std::int64_t count, float step,
                                                  float* out) {
  const __m256 steps = _mm256_set1_ps(step);
  for (std::int64_t n = 0; n < count; n += 8) {
    _mm256_storeu_ps(out + n, _mm256_mul_ps(steps, load_halves_avx2(scales + n)));
  }
}

// The codes of eight rows, a byte each: as they lie in memory, or half of their bytes.
template <bool kNibbles>
struct RowCodes {
  const std::uint8_t* bytes;
  std::uint64_t word;

  CODEGEMM_ALWAYS_INLINE RowCodes(const std::uint64_t* from, int shift)
      : bytes(reinterpret_cast<const std::uint8_t*>(from)),
        word(kNibbles ? (*from >> shift) & 0x0F0F0F0F0F0F0F0FU : 0) {}
  [[nodiscard]] CODEGEMM_ALWAYS_INLINE std::uint64_t operator[](int row) const {
    return kNibbles ? (word >> (8 * row)) & 255U : bytes[row];
  }
};

// Elements [d, d + 8) of a rounded centroid; all 4 of v = 4 and all 2 of v = 2, with zeros behind them.
template <int kVecLen>
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE __m128i load_rounded_avx2(const std::int16_t* codebook,
                                                                      std::uint64_t code) {
  const std::int16_t* const from = codebook + code * std::uint64_t{kVecLen};
  if constexpr (kVecLen == 2) {
    return _mm_loadu_si32(from);
  } else if constexpr (kVecLen == 4) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  } else {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
}

// Rows r (low half) and r + 4 (high half).
template <int kVecLen, class Codes>
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE __m256i load_two_rounded_avx2(const std::int16_t* codebook,
                                                                          const Codes& codes, int r) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load_rounded_avx2<kVecLen>(codebook, codes[r])),
                                 load_rounded_avx2<kVecLen>(codebook, codes[r + 4]), 1);
}

// Rows r and r + 4 side by side, then a 4 x 4 transposition of pairs in each half. The arguments are copied,
// since what is stored might be one of them as far as a compiler knows.
template <int kVecLen, bool kNibbles>
CODEGEMM_TARGET_AVX2 void dequantize_pairs_of_avx2(const DequantizePairsArgs& a) {
  const CodeRun run = a.codes;
  const std::int16_t* const codebooks = a.codebooks;
  const std::int64_t codebook_values = run.centroids * kVecLen;
  const std::int64_t ld = a.ld;
  std::int32_t* out = a.out;
  const std::uint64_t* codes = run.codes;
  for (std::int64_t j = 0; j < run.vectors; ++j) {
    const std::uint64_t* const vector_codes = codes;
    codes += run.codebook_count * run.words;
    for (int d = 0; d < kVecLen; d += std::min(kVecLen, 8)) {
      const RowCodes<kNibbles> first(vector_codes, run.shift);
      __m256i r0 = load_two_rounded_avx2<kVecLen>(codebooks + d, first, 0);
      __m256i r1 = load_two_rounded_avx2<kVecLen>(codebooks + d, first, 1);
      __m256i r2 = load_two_rounded_avx2<kVecLen>(codebooks + d, first, 2);
      __m256i r3 = load_two_rounded_avx2<kVecLen>(codebooks + d, first, 3);
      const std::uint64_t* more_codes = vector_codes;
      const std::int16_t* codebook = codebooks + d;
      for (std::int64_t c = 1; c < run.codebook_count; ++c) {
        more_codes += run.words;
        codebook += codebook_values;
        const RowCodes<kNibbles> more(more_codes, run.shift);
        r0 = _mm256_add_epi16(r0, load_two_rounded_avx2<kVecLen>(codebook, more, 0));
        r1 = _mm256_add_epi16(r1, load_two_rounded_avx2<kVecLen>(codebook, more, 1));
        r2 = _mm256_add_epi16(r2, load_two_rounded_avx2<kVecLen>(codebook, more, 2));
        r3 = _mm256_add_epi16(r3, load_two_rounded_avx2<kVecLen>(codebook, more, 3));
      }
      const __m256i low01 = _mm256_unpacklo_epi32(r0, r1);
      const __m256i low23 = _mm256_unpacklo_epi32(r2, r3);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(low01, low23));
      if constexpr (kVecLen > 2) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + ld), _mm256_unpackhi_epi64(low01, low23));
      }
      if constexpr (kVecLen > 4) {
        const __m256i high01 = _mm256_unpackhi_epi32(r0, r1);
        const __m256i high23 = _mm256_unpackhi_epi32(r2, r3);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + 2 * ld), _mm256_unpacklo_epi64(high01, high23));
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + 3 * ld), _mm256_unpackhi_epi64(high01, high23));
      }
      out += std::min(kVecLen, 8) / 2 * ld;
    }
  }
}

template <int kVecLen>
CODEGEMM_TARGET_AVX2 void dequantize_pairs_avx2(const DequantizePairsArgs& a) {
  if (a.codes.mask == ~std::uint64_t{0}) {
    dequantize_pairs_of_avx2<kVecLen, false>(a);
  } else {
    dequantize_pairs_of_avx2<kVecLen, true>(a);
  }
}

struct IntegerSums {
  __m256i s00, s01, s10, s11, s20, s21, s30, s31, s40, s41, s50, s51;
};

// sums += *x (a pair) times w0 and w1. Written out since the sums of six tokens, the weights and two
// temporaries are all registers there are: compilers load every *x first, and spill.
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_token_avx2(const std::int32_t& x, __m256i w0, __m256i w1,
                                                                __m256i& sum0, __m256i& sum1) {
  __m256i first;
  __m256i second;
  asm("vpbroadcastd %[x], %[second]\n\t"
      "vpmaddwd %[w0], %[second], %[first]\n\t"
      "vpmaddwd %[w1], %[second], %[second]\n\t"
      "vpaddd %[first], %[sum0], %[sum0]\n\t"
      "vpaddd %[second], %[sum1], %[sum1]"
      : [sum0] "+x"(sum0), [sum1] "+x"(sum1), [first] "=&x"(first), [second] "=&x"(second)
      : [w0] "x"(w0), [w1] "x"(w1), [x] "m"(x));
}

CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_pair_avx2(const std::int32_t* x, const std::int32_t* w,
                                                               IntegerSums& s) {
  const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 8));
  add_token_avx2(x[0], w0, w1, s.s00, s.s01);
  add_token_avx2(x[1], w0, w1, s.s10, s.s11);
  add_token_avx2(x[2], w0, w1, s.s20, s.s21);
  add_token_avx2(x[3], w0, w1, s.s30, s.s31);
  add_token_avx2(x[4], w0, w1, s.s40, s.s41);
  add_token_avx2(x[5], w0, w1, s.s50, s.s51);
}

// One token's 16 sums of a chunk to c.
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_chunk_avx2(float* c, bool accumulate, float x_step,
                                                                __m256 w_step0, __m256 w_step1, __m256i s0,
                                                                __m256i s1) {
  const __m256 step = _mm256_set1_ps(x_step);
  __m256 low = _mm256_mul_ps(_mm256_cvtepi32_ps(s0), _mm256_mul_ps(step, w_step0));
  __m256 high = _mm256_mul_ps(_mm256_cvtepi32_ps(s1), _mm256_mul_ps(step, w_step1));
  store_tile_row_avx2(c, accumulate, low, high);
}

CODEGEMM_TARGET_AVX2 inline void multiply_pairs_avx2(const IntegerTileArgs& a) {
  constexpr std::int64_t kUnit = CpuTiles::kIntegerUnit;
  const std::int64_t slab_end = a.first_k + a.depth;
  bool accumulate = a.accumulate;
  for (std::int64_t k = a.first_k; k < slab_end;) {
    const std::int64_t end = chunk_end(k, slab_end, a.scale_group);
    const std::int64_t at = (k - a.first_k) / 2;
    const std::int32_t* x = a.x + at * 6;
    const std::int32_t* w = a.w + at * 16;
    const __m256i zero = _mm256_setzero_si256();
    IntegerSums s{zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero};
    std::int64_t pairs = (end - k) / 2;
    for (; pairs >= 4; pairs -= 4, x += 24, w += 64) {
      add_pair_avx2(x, w, s);
      add_pair_avx2(x + 6, w + 16, s);
      add_pair_avx2(x + 12, w + 32, s);
      add_pair_avx2(x + 18, w + 48, s);
    }
    for (; pairs > 0; --pairs, x += 6, w += 16) add_pair_avx2(x, w, s);
    const std::int64_t unit = (k - a.first_k) / kUnit;
    const float* const x_step = a.x_steps + unit * 6;
    const __m256 w_step0 = _mm256_loadu_ps(a.w_steps + unit * a.ld_steps);
    const __m256 w_step1 = _mm256_loadu_ps(a.w_steps + unit * a.ld_steps + 8);
    add_chunk_avx2(a.c, accumulate, x_step[0], w_step0, w_step1, s.s00, s.s01);
    add_chunk_avx2(a.c + a.stride, accumulate, x_step[1], w_step0, w_step1, s.s10, s.s11);
    add_chunk_avx2(a.c + 2 * a.stride, accumulate, x_step[2], w_step0, w_step1, s.s20, s.s21);
    add_chunk_avx2(a.c + 3 * a.stride, accumulate, x_step[3], w_step0, w_step1, s.s30, s.s31);
    add_chunk_avx2(a.c + 4 * a.stride, accumulate, x_step[4], w_step0, w_step1, s.s40, s.s41);
    add_chunk_avx2(a.c + 5 * a.stride, accumulate, x_step[5], w_step0, w_step1, s.s50, s.s51);
    accumulate = true;
    k = end;
  }
}

#endif

}  // namespace codegemm::detail
