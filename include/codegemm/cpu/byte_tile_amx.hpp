// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/byte_tile_amx.hpp - tiles of bytes with AMX: 16 tokens x 32 rows at a time.
// Layer: cpu (host only).
#pragma once

#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/amx.hpp>
#include <codegemm/cpu/byte_tile.hpp>
#include <codegemm/cpu/byte_weights_vbmi.hpp>

#if CODEGEMM_HAS_AMX

CODEGEMM_AVX512_CODE_BEGIN

namespace codegemm::detail {

// Compilers do not know what memory the instructions of tiles read: all of it is written before.
CODEGEMM_ALWAYS_INLINE void compiler_barrier_amx(const void* memory) {
  asm volatile("" : : "r"(memory) : "memory");
}

/// Eight tiles of rows of 64 bytes for this thread until end_tiles_amx(): 0 to 5 with as many rows as there
/// are tokens, up to 16, 6 and 7, the weights', with 16.
CODEGEMM_TARGET_AMX inline void begin_tiles_amx(std::int64_t tokens) {
  struct alignas(64) Configuration {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Configuration tiles;
  for (int tile = 0; tile < 6; ++tile) {
    tiles.rows[tile] =
        static_cast<std::uint8_t>(tokens < CpuTiles::kAmxTokens ? tokens : CpuTiles::kAmxTokens);
  }
  compiler_barrier_amx(&tiles);  // GCC thinks that only the first bytes are read
  _tile_loadconfig(&tiles);
}

/// A thread that keeps tiles in use makes every switch to another one dearer.
CODEGEMM_TARGET_AMX inline void end_tiles_amx() { _tile_release(); }

// The sums of a chunk: [panel][high high', high low' + low high'][16 tokens][16 rows]. A tile of sums is
// added to again only when two or three others have been.
template <int kPanels>
CODEGEMM_TARGET_AMX CODEGEMM_ALWAYS_INLINE void sum_chunk_amx(const std::int8_t* x, const std::int8_t* w,
                                                              std::int64_t panel_bytes, std::int64_t columns,
                                                              std::int32_t* sums) {
  constexpr std::int64_t kStepBytes = 2 * CpuTiles::kAmxTokens * CpuTiles::kAmxColumns;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kPanels == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t k = 0; k < columns; k += CpuTiles::kAmxColumns, x += kStepBytes, w += kStepBytes) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, kPanelStepBytes);
    _tile_loadd(5, x + kStepBytes / 2, 64);
    if constexpr (kPanels == 2) {
      _tile_loadd(7, w + panel_bytes, kPanelStepBytes);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 5, 6);
      _tile_loadd(6, w + 64, kPanelStepBytes);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbssd(3, 5, 7);
      _tile_loadd(7, w + panel_bytes + 64, kPanelStepBytes);
      _tile_dpbssd(1, 4, 6);
      _tile_dpbssd(3, 4, 7);
    } else {
      _tile_loadd(7, w + 64, kPanelStepBytes);
      _tile_dpbssd(1, 5, 6);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if constexpr (kPanels == 2) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// totals[tokens][panel][16] += x step * w step * (R * high high' + the others).
template <int kPanels>
CODEGEMM_TARGET_AMX CODEGEMM_ALWAYS_INLINE void add_chunk_amx(const ByteTileArgs& a, std::int64_t unit,
                                                              const std::int32_t* sums, float* totals) {
  const __m512i bits = _mm512_set1_epi32(a.radix_bits);
  const float* const x_steps = a.x_steps + unit * CpuTiles::kAmxTokens;
  CODEGEMM_UNROLL
  for (std::int64_t panel = 0; panel < kPanels; ++panel) {
    const __m512 w_step = _mm512_loadu_ps(a.w_steps + unit * CpuTiles::kAmxTaskRows + panel * kPanelRows);
    const std::int32_t* const from = sums + panel * 512;
    float* const to = totals + panel * kPanelRows;
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      const __m512i high = _mm512_sllv_epi32(_mm512_load_si512(from + 16 * t), bits);
      const __m512i whole = _mm512_add_epi32(high, _mm512_load_si512(from + 256 + 16 * t));
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), w_step);
      float* const total = to + t * kPanels * kPanelRows;
      _mm512_store_ps(total, _mm512_fmadd_ps(scaled, _mm512_set1_ps(x_steps[t]), _mm512_load_ps(total)));
    }
  }
}

template <int kPanels>
CODEGEMM_TARGET_AMX void multiply_panels_amx(const ByteTileArgs& a) {
  alignas(64) std::int32_t sums[std::size_t{kPanels} * 512];
  alignas(64) float totals[std::size_t{kPanels} * 256];
  compiler_barrier_amx(a.w);
  for (std::int64_t i = 0; i < a.tokens * kPanels * kPanelRows; i += 16) {
    _mm512_store_ps(totals + i, _mm512_setzero_ps());
  }
  for (std::int64_t i = 0, at = 0; i < a.chunks; at = a.chunk_ends[i++]) {
    sum_chunk_amx<kPanels>(a.x + at * 2 * CpuTiles::kAmxTokens, a.w + at * 2 * kPanelRows, a.panel_bytes,
                           a.chunk_ends[i] - at, sums);
    add_chunk_amx<kPanels>(a, at / CpuTiles::kAmxColumns, sums, totals);
  }
  CODEGEMM_UNROLL
  for (std::int64_t panel = 0; panel < kPanels; ++panel) {
    const std::int64_t rows = a.rows - panel * kPanelRows;
    const auto mask = static_cast<__mmask16>(rows >= kPanelRows ? 0xFFFF : (1 << rows) - 1);
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      float* const c = a.c + t * a.stride + panel * kPanelRows;
      __m512 total = _mm512_load_ps(totals + (t * kPanels + panel) * kPanelRows);
      if (a.accumulate) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, c));
      _mm512_mask_storeu_ps(c, mask, total);
    }
  }
}

/// As ByteTileArgs says.
inline void multiply_bytes_amx(const ByteTileArgs& a) {
  if (a.rows > kPanelRows) return multiply_panels_amx<2>(a);
  multiply_panels_amx<1>(a);
}

inline constexpr ByteTileKernels kAmxKernels{&begin_tiles_amx, &multiply_bytes_amx, &end_tiles_amx};

}  // namespace codegemm::detail

CODEGEMM_AVX512_CODE_END

#endif
