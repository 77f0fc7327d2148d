// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/byte_weights_vbmi.hpp - rebuilds weights as pairs of bytes in the order of AMX's tiles: with 4
// bits a code by byte permutes, 64 weights at a time, else an entry of all elements of a centroid a load.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/amx.hpp>
#include <codegemm/cpu/byte_codebooks.hpp>

#if CODEGEMM_HAS_AVX512
#include <immintrin.h>
#endif

namespace codegemm::detail {

/// Rows of a panel, which are the columns of a tile, and what they take a step of kByteColumns columns.
inline constexpr int kPanelRows = 16;
inline constexpr std::int64_t kPanelStepBytes = std::int64_t{2} * kPanelRows * kByteColumns;

/// A block of 64 rows in some vectors of one tile of codes (v = 2: an even number):
/// out[4 panels][columns / 4][high, low][16 rows][4].
struct RebuildArgs {
  const std::uint8_t* codes;  // [vectors][m][64, or 32 with 4 bits a code]
  std::int64_t ahead;         // how many bytes behind them those lie that are to be asked for meanwhile
  std::int64_t vectors;
  std::int64_t codebook_count;
  std::int64_t centroids;
  const std::int8_t* codebooks;  // as fill_byte_codebooks() has them
  std::int8_t* out;              // 64-byte aligned
  std::int64_t panel_bytes;      // from one panel to the next
};

#if CODEGEMM_HAS_AMX

CODEGEMM_AVX512_CODE_BEGIN

// A step of 16 rows of [high x 4, low x 4] to all high ones and all low ones, where it lies.
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void split_step_vbmi(std::int8_t* step, __m512i high,
                                                                        __m512i low) {
  const __m512i first = _mm512_load_si512(step);
  const __m512i second = _mm512_load_si512(step + 64);
  _mm512_store_si512(step, _mm512_permutex2var_epi32(first, high, second));
  _mm512_store_si512(step + 64, _mm512_permutex2var_epi32(first, low, second));
}

CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m128i load_entry_vbmi(const std::int8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// To `sum` a codebook's entries for one row of a vector (of two with v = 2). table: the codebook's entries
// from the meant part on; codes: of the row in it; next: of the row's second vector.
template <int kVecLen>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m128i
add_entry_vbmi(__m128i sum, const std::int8_t* table, const std::uint8_t* codes, std::int64_t next) {
  constexpr std::int64_t kEntry = byte_entry_bytes(kVecLen);
  sum = _mm_add_epi8(sum, load_entry_vbmi(table + codes[0] * kEntry));
  if constexpr (kVecLen == 2) sum = _mm_add_epi8(sum, load_entry_vbmi(table + codes[next] * kEntry + 8));
  return sum;
}

// One row of a vector (of two with v = 2): 16 bytes of the sum of its centroids' entries from `part` on, of
// which 8 are meant with v <= 4. codes: of the row in the first codebook.
template <int kVecLen, int kCodebooks>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m128i sum_entries_vbmi(const RebuildArgs& a,
                                                                            const std::uint8_t* codes,
                                                                            std::int64_t part) {
  constexpr std::int64_t kEntry = byte_entry_bytes(kVecLen);
  const std::int64_t next = (kCodebooks > 0 ? kCodebooks : a.codebook_count) * std::int64_t{64};
  const std::int64_t step = a.centroids * kEntry;
  const std::int8_t* table = a.codebooks + part;
  __m128i sum = load_entry_vbmi(table + codes[0] * kEntry);
  if constexpr (kVecLen == 2) sum = _mm_add_epi8(sum, load_entry_vbmi(table + codes[next] * kEntry + 8));
  if constexpr (kCodebooks > 0) {
    CODEGEMM_UNROLL
    for (std::int64_t c = 1; c < kCodebooks; ++c) {
      sum = add_entry_vbmi<kVecLen>(sum, table + c * step, codes + c * 64, next);
    }
  } else {
    for (std::int64_t c = 1; c < a.codebook_count; ++c) {
      sum = add_entry_vbmi<kVecLen>(sum, table + c * step, codes + c * 64, next);
    }
  }
  return sum;
}

// Two rows: half as many stores as one by one.
template <int kVecLen, int kCodebooks>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void rebuild_rows_vbmi(const RebuildArgs& a,
                                                                          const std::uint8_t* codes,
                                                                          std::int8_t* out) {
  constexpr std::int64_t kEntry = byte_entry_bytes(kVecLen);
  if constexpr (kVecLen == 4 && kCodebooks == 1) {
    const auto* const first = reinterpret_cast<const __m128i*>(a.codebooks + codes[0] * kEntry);
    const auto* const second = reinterpret_cast<const __m64*>(a.codebooks + codes[1] * kEntry);
    const __m128 both = _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(first)), second);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_castps_si128(both));
  } else {
    for (std::int64_t part = 0; part < (kVecLen == 2 ? 8 : kEntry); part += 16, out += 2 * kPanelStepBytes) {
      const __m128i first = sum_entries_vbmi<kVecLen, kCodebooks>(a, codes, part);
      const __m128i second = sum_entries_vbmi<kVecLen, kCodebooks>(a, codes + 1, part);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi64(first, second));
      if constexpr (kVecLen > 4) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kPanelStepBytes),
                         _mm_unpackhi_epi64(first, second));
      }
    }
  }
}

template <int kVecLen, int kCodebooks>
CODEGEMM_TARGET_AVX512_VBMI void rebuild_gathered_by_vbmi(const RebuildArgs& args) {
  constexpr std::int64_t kTogether = kVecLen == 2 ? 2 : 1;  // vectors
  constexpr std::int64_t kSteps = std::max(1, kVecLen / kByteColumns);
  constexpr std::int64_t kBatch = 32;  // steps that are split while they are in the first-level cache
  const RebuildArgs a = args;          // what is stored might be one of them, as far as a compiler knows
  const __m512i high = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i low = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  const std::int64_t vector_bytes = 64 * (kCodebooks > 0 ? kCodebooks : a.codebook_count);
  const std::uint8_t* codes = a.codes;
  std::int8_t* out = a.out;
  for (std::int64_t j = 0; j < a.vectors;) {
    std::int64_t steps = 0;
    for (; steps < kBatch && j < a.vectors; steps += kSteps, j += kTogether) {
      for (std::int64_t at = 0; at < kTogether * vector_bytes; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + a.ahead + at), _MM_HINT_T1);
      }
      for (std::int64_t panel = 0; panel < 4; ++panel) {
        std::int8_t* const to = out + panel * a.panel_bytes + steps * kPanelStepBytes;
        const std::uint8_t* const from = codes + panel * kPanelRows;
        CODEGEMM_UNROLL
        for (std::int64_t row = 0; row < kPanelRows; row += 2) {
          rebuild_rows_vbmi<kVecLen, kCodebooks>(a, from + row, to + row * 8);
        }
      }
      codes += kTogether * vector_bytes;
    }
    for (std::int64_t panel = 0; panel < 4; ++panel) {
      std::int8_t* const from = out + panel * a.panel_bytes;
      for (std::int64_t step = 0; step < steps; ++step) {
        split_step_vbmi(from + step * kPanelStepBytes, high, low);
      }
    }
    out += steps * kPanelStepBytes;
  }
}

template <int kVecLen>
void rebuild_gathered_vbmi(const RebuildArgs& a) {
  if (a.codebook_count == 1) return rebuild_gathered_by_vbmi<kVecLen, 1>(a);
  if (a.codebook_count == 2) return rebuild_gathered_by_vbmi<kVecLen, 2>(a);
  rebuild_gathered_by_vbmi<kVecLen, 0>(a);
}

// What spreads 4-bit codes over the four columns of a step.
struct SpreadVbmi {
  __m512i first, second;  // rows 0..15 and 16..31 of a register of codes
  __m512i column;         // 16 times the element that the byte is

  template <int kVecLen>
  CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void load() {
    alignas(64) std::uint8_t rows[64];
    alignas(64) std::uint8_t columns[64];
    for (int i = 0; i < 64; ++i) {
      const int d = i % 4;
      const bool second_vector = kVecLen == 2 && d >= 2;  // its codes are in the upper half
      rows[i] = static_cast<std::uint8_t>(i / 4 + (second_vector ? 32 : 0));
      columns[i] = static_cast<std::uint8_t>(16 * (kVecLen == 2 ? d % 2 : d));
    }
    first = _mm512_load_si512(rows);
    second = _mm512_add_epi8(first, _mm512_set1_epi8(16));
    column = _mm512_load_si512(columns);
  }
};

// Adds a codebook's centroids to the sums [panel][step][high, low], or sets them to these.
template <int kVecLen, int kSteps, bool kFirst>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void add_nibbles_vbmi(
    const std::uint8_t* codes, std::int64_t next_vector, const std::int8_t* table, const SpreadVbmi& spread,
    __m512i (&sums)[4][std::size_t{kSteps}][2]) {
  constexpr int kAndOr = 0xEA;  // (a & b) | c
  const __m512i mask = _mm512_set1_epi8(15);
  const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  __m512i source;
  if constexpr (kVecLen == 2) {
    source = _mm512_inserti64x4(_mm512_castsi256_si512(rows),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + next_vector)), 1);
  } else {
    source = _mm512_castsi256_si512(rows);
  }
  const __m512i first = _mm512_permutexvar_epi8(spread.first, source);
  const __m512i second = _mm512_permutexvar_epi8(spread.second, source);
  __m512i index[4];
  index[0] = _mm512_ternarylogic_epi64(first, mask, spread.column, kAndOr);
  index[1] = _mm512_ternarylogic_epi64(second, mask, spread.column, kAndOr);
  index[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi16(first, 4), mask, spread.column, kAndOr);
  index[3] = _mm512_ternarylogic_epi64(_mm512_srli_epi16(second, 4), mask, spread.column, kAndOr);
  CODEGEMM_UNROLL
  for (std::int64_t step = 0; step < kSteps; ++step) {
    const __m512i high = _mm512_loadu_si512(table + step * 128);
    const __m512i low = _mm512_loadu_si512(table + step * 128 + 64);
    CODEGEMM_UNROLL
    for (int panel = 0; panel < 4; ++panel) {
      const __m512i high_bytes = _mm512_permutexvar_epi8(index[panel], high);
      const __m512i low_bytes = _mm512_permutexvar_epi8(index[panel], low);
      sums[panel][step][0] = kFirst ? high_bytes : _mm512_add_epi8(sums[panel][step][0], high_bytes);
      sums[panel][step][1] = kFirst ? low_bytes : _mm512_add_epi8(sums[panel][step][1], low_bytes);
    }
  }
}

template <int kVecLen>
CODEGEMM_TARGET_AVX512_VBMI void rebuild_nibbles_vbmi(const RebuildArgs& args) {
  constexpr std::int64_t kTogether = kVecLen == 2 ? 2 : 1;  // vectors
  constexpr int kAllSteps = std::max(1, kVecLen / kByteColumns);
  constexpr int kSteps = std::min(kAllSteps, 2);  // 16 registers of sums
  const RebuildArgs a = args;
  const std::int64_t next_vector = 32 * a.codebook_count;
  SpreadVbmi spread;
  spread.load<kVecLen>();
  const std::uint8_t* codes = a.codes;
  std::int8_t* out = a.out;
  for (std::int64_t j = 0; j < a.vectors; j += kTogether) {
    for (std::int64_t at = 0; at < kTogether * next_vector; at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + a.ahead + at), _MM_HINT_T1);
    }
    for (std::int64_t first = 0; first < kAllSteps; first += kSteps) {
      __m512i sums[4][std::size_t{kSteps}][2];
      const std::int8_t* table = a.codebooks + first * 128;
      add_nibbles_vbmi<kVecLen, kSteps, true>(codes, next_vector, table, spread, sums);
      for (std::int64_t c = 1; c < a.codebook_count; ++c) {
        table += byte_permute_bytes(kVecLen);
        add_nibbles_vbmi<kVecLen, kSteps, false>(codes + 32 * c, next_vector, table, spread, sums);
      }
      CODEGEMM_UNROLL
      for (int panel = 0; panel < 4; ++panel) {
        std::int8_t* const to = out + panel * a.panel_bytes;
        CODEGEMM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          _mm512_store_si512(to + step * kPanelStepBytes, sums[panel][step][0]);
          _mm512_store_si512(to + step * kPanelStepBytes + 64, sums[panel][step][1]);
        }
      }
      out += kSteps * kPanelStepBytes;
    }
    codes += kTogether * next_vector;
  }
}

// Four columns of a plane, 64 rows each in the order of permute_rows_vbmi(), to the four panels' steps.
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void store_columns_vbmi(const __m512i (&columns)[4],
                                                                           std::int8_t* out,
                                                                           std::int64_t panel_bytes) {
  const __m512i low01 = _mm512_unpacklo_epi8(columns[0], columns[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(columns[2], columns[3]);
  const __m512i high01 = _mm512_unpackhi_epi8(columns[0], columns[1]);
  const __m512i high23 = _mm512_unpackhi_epi8(columns[2], columns[3]);
  _mm512_store_si512(out, _mm512_unpacklo_epi16(low01, low23));
  _mm512_store_si512(out + panel_bytes, _mm512_unpackhi_epi16(low01, low23));
  _mm512_store_si512(out + 2 * panel_bytes, _mm512_unpacklo_epi16(high01, high23));
  _mm512_store_si512(out + 3 * panel_bytes, _mm512_unpackhi_epi16(high01, high23));
}

// 64 codes such that four columns of bytes, interleaved lane by lane, come out as rows 0..15, 16..31, ...
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i permute_rows_vbmi(const std::uint8_t* codes,
                                                                             __m512i order) {
  return _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
}

template <int kVecLen>
CODEGEMM_TARGET_AVX512_VBMI void rebuild_planes_vbmi(const RebuildArgs& args) {
  constexpr std::int64_t kTogether = kVecLen == 2 ? 2 : 1;  // vectors
  constexpr int kSteps = std::max(1, kVecLen / kByteColumns);
  const RebuildArgs a = args;
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const std::int64_t vector_bytes = 64 * a.codebook_count;
  const std::uint8_t* codes = a.codes;
  std::int8_t* out = a.out;
  for (std::int64_t j = 0; j < a.vectors; j += kTogether, codes += kTogether * vector_bytes) {
    for (std::int64_t at = 0; at < kTogether * vector_bytes; at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + a.ahead + at), _MM_HINT_T1);
    }
    for (std::int64_t step = 0; step < kSteps; ++step, out += kPanelStepBytes) {
      __m512i high[4];
      __m512i low[4];
      CODEGEMM_UNROLL
      for (int d = 0; d < 4; ++d) high[d] = low[d] = _mm512_setzero_si512();
      for (std::int64_t c = 0; c < a.codebook_count; ++c) {
        const __m512i first = permute_rows_vbmi(codes + 64 * c, order);
        const __m512i second = kVecLen == 2 ? permute_rows_vbmi(codes + vector_bytes + 64 * c, order) : first;
        const std::int8_t* const table = a.codebooks + (c * kVecLen + step * kByteColumns) * kBytePlanes;
        CODEGEMM_UNROLL
        for (int d = 0; d < 4; ++d) {
          const std::int8_t* const plane = table + (kVecLen == 2 ? d % 2 : d) * kBytePlanes;
          const __m512i index = d < 2 ? first : second;
          high[d] = _mm512_add_epi8(high[d], _mm512_permutexvar_epi8(index, _mm512_loadu_si512(plane)));
          low[d] = _mm512_add_epi8(low[d], _mm512_permutexvar_epi8(index, _mm512_loadu_si512(plane + 64)));
        }
      }
      store_columns_vbmi(high, out, a.panel_bytes);
      store_columns_vbmi(low, out + 64, a.panel_bytes);
    }
  }
}

CODEGEMM_AVX512_CODE_END

#endif

}  // namespace codegemm::detail
