// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/integer_tile_amx.hpp - the tile of the integer way with AMX: 16 tokens x 16 rows, whose 16-bit
// numbers are split into two bytes each.
// Layer: cpu (host only).
//
// q = 256 high + low with low in [-128, 127]. Products of bytes add up in 32 bits: the sum of q q' is 65536
// high high' + 256 (high low' + low high') + low low', exact as long as it fits into 32 bits itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/amx.hpp>
#include <codegemm/cpu/integer_tile.hpp>

namespace codegemm::detail {

inline constexpr std::int64_t kAmxTokens = CpuTiles::kAmxTokens, kAmxColumns = CpuTiles::kAmxColumns;

/// c[16][16] (+)= a slab of x and w, chunk by chunk, as IntegerTileArgs; chunks are multiples of kAmxColumns.
struct ByteTileArgs {
  const std::int8_t* x;  // [depth / 64][high, low][16 tokens][64]
  const std::int8_t* w;  // [depth / 4][high, low][16 rows][4]
  const float* x_steps;  // [units][16]
  const float* w_steps;  // [units][ld_steps]
  std::int64_t ld_steps;
  std::int64_t first_k;
  std::int64_t depth;
  std::int64_t scale_group;
  float* c;
  std::int64_t stride;  // of c
  bool accumulate;
};

/// How byte tiles are multiplied, and what a task does before the first and after the last of them.
struct ByteTileKernels {
  void (*begin)() = nullptr;
  void (*multiply)(const ByteTileArgs&) = nullptr;
  void (*end)() = nullptr;
};

/// Splits rounded[count] of one token; count is a multiple of kAmxColumns, out as ByteTileArgs::x.
inline void split_tokens(const std::int16_t* rounded, std::int64_t count, std::int8_t* out) {
  constexpr std::int64_t kPlane = kAmxTokens * kAmxColumns;
  for (std::int64_t k = 0; k < count; k += kAmxColumns, out += 2 * kPlane) {
    for (std::int64_t i = 0; i < kAmxColumns; ++i) {
      const int q = rounded[k + i];
      out[i] = static_cast<std::int8_t>((q + 128) >> 8);
      out[kPlane + i] = static_cast<std::int8_t>(q & 255);
    }
  }
}

#if CODEGEMM_HAS_AMX

CODEGEMM_AVX512_CODE_BEGIN

/// Splits a panel of pairs, [depth / 2][16], where it lies, into ByteTileArgs::w.
CODEGEMM_TARGET_AVX512_VBMI inline void split_panel_vbmi(std::int32_t* panel, std::int64_t depth) {
  alignas(64) std::uint8_t low_bytes[64];
  alignas(64) std::uint8_t high_bytes[64];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 4; ++k) {  // the second pair is in the second register, whose bytes begin at 64
      const int at = 64 * (k / 2) + 4 * row + 2 * (k % 2);
      low_bytes[4 * row + k] = static_cast<std::uint8_t>(at);
      high_bytes[4 * row + k] = static_cast<std::uint8_t>(at + 1);
    }
  }
  const __m512i low = _mm512_load_si512(low_bytes);
  const __m512i high = _mm512_load_si512(high_bytes);
  const __m512i half = _mm512_set1_epi16(128);
  for (std::int64_t k = 0; k < depth; k += 4, panel += 32) {
    const __m512i first = _mm512_loadu_si512(panel);
    const __m512i second = _mm512_loadu_si512(panel + 16);
    _mm512_storeu_si512(
        panel, _mm512_permutex2var_epi8(_mm512_add_epi16(first, half), high, _mm512_add_epi16(second, half)));
    _mm512_storeu_si512(panel + 16, _mm512_permutex2var_epi8(first, low, second));
  }
}

/// Eight tiles of 16 rows of 64 bytes, for this thread until end_tiles_amx().
CODEGEMM_TARGET_AMX inline void begin_tiles_amx() {
  struct alignas(64) Configuration {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  const Configuration tiles;
  _tile_loadconfig(&tiles);
}

/// A thread that keeps tiles in use makes every switch to another one dearer.
CODEGEMM_TARGET_AMX inline void end_tiles_amx() { _tile_release(); }

/// The sums of a chunk: [4][16 tokens][16 rows] of high high', high low', low high', low low'. Four tiles of
/// sums, since one alone would wait for itself.
CODEGEMM_TARGET_AMX inline void sum_chunk_amx(const std::int8_t* x, const std::int8_t* w,
                                              std::int64_t columns, std::int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < columns; k += kAmxColumns, x += 2048, w += 2048) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    _tile_loadd(5, x + 1024, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

/// As multiply_pairs_avx2(), from the same sums.
CODEGEMM_TARGET_AMX inline void multiply_bytes_amx(const ByteTileArgs& a) {
  const std::int64_t slab_end = a.first_k + a.depth;
  bool accumulate = a.accumulate;
  for (std::int64_t k = a.first_k; k < slab_end;) {
    const std::int64_t end = chunk_end(k, slab_end, a.scale_group);
    alignas(64) std::int32_t sums[4 * 256];
    sum_chunk_amx(a.x + (k - a.first_k) * 32, a.w + (k - a.first_k) * 32, end - k, sums);
    const std::int64_t unit = (k - a.first_k) / CpuTiles::kIntegerUnit;
    const __m512 w_step = _mm512_loadu_ps(a.w_steps + unit * a.ld_steps);
    for (std::int64_t t = 0; t < kAmxTokens; ++t) {
      const std::int32_t* const from = sums + 16 * t;
      const __m512i middle = _mm512_add_epi32(_mm512_load_si512(from + 256), _mm512_load_si512(from + 512));
      const __m512i whole = _mm512_add_epi32(
          _mm512_slli_epi32(_mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(from), 8), middle), 8),
          _mm512_load_si512(from + 768));
      const __m512 step = _mm512_mul_ps(_mm512_set1_ps(a.x_steps[unit * kAmxTokens + t]), w_step);
      __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), step);
      float* const c = a.c + t * a.stride;
      if (accumulate) sum = _mm512_add_ps(sum, _mm512_loadu_ps(c));
      _mm512_storeu_ps(c, sum);
    }
    accumulate = true;
    k = end;
  }
}

inline constexpr ByteTileKernels kAmxKernels{&begin_tiles_amx, &multiply_bytes_amx, &end_tiles_amx};

CODEGEMM_AVX512_CODE_END

#endif

}  // namespace codegemm::detail
