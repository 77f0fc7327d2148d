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

// round(sums[0..32) * inverse) as 16-bit integers: their low bytes in the first 32 bytes, the high ones in
// the last.
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i round_bytes_vbmi(const float* sums, __m512 inverse,
                                                                            __m512i bytes) {
  return _mm512_permutex2var_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(sums), inverse)), bytes,
                                  _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(sums + 16), inverse)));
}

// The upper half of 16 lanes.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m256 upper_half_avx512(__m512 v) {
  return _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(v), 1));
}

template <int kCodeBits>
CODEGEMM_TARGET_AVX512 FlushStats flush_stats_avx512(const float* sums, std::int64_t entries) {
  constexpr int kCentroids = 1 << kCodeBits;
  FlushStats out;
  __m512 power0 = _mm512_setzero_ps();
  __m512 power1 = power0;
  for (std::int64_t e = 0; e < entries; ++e, sums += kCentroids) {
    __m512 largest = _mm512_setzero_ps();
    if constexpr (kCentroids == 16) {
      const __m512 v = _mm512_loadu_ps(sums);
      largest = _mm512_abs_ps(v);
      power0 = _mm512_fmadd_ps(v, v, power0);
    } else {
      for (int i = 0; i < kCentroids; i += 32) {
        const __m512 v0 = _mm512_loadu_ps(sums + i);
        const __m512 v1 = _mm512_loadu_ps(sums + i + 16);
        largest = _mm512_max_ps(largest, _mm512_max_ps(_mm512_abs_ps(v0), _mm512_abs_ps(v1)));
        power0 = _mm512_fmadd_ps(v0, v0, power0);
        power1 = _mm512_fmadd_ps(v1, v1, power1);
      }
    }
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(largest), upper_half_avx512(largest));
    out.bound += largest_lane_avx2(half);
  }
  const __m512 power = _mm512_add_ps(power0, power1);
  out.power = add_lanes_avx2(_mm256_add_ps(_mm512_castps512_ps256(power), upper_half_avx512(power))) /
              static_cast<float>(kCentroids);
  return out;
}

/// Tables in two planes: the low bytes of all entries, then the high ones. The step of the flush, negative
/// where 16 bits are not enough.
template <int kCodeBits>
CODEGEMM_TARGET_AVX512_VBMI float encode_planes_avx512(const EncodeArgs& a) {
  constexpr int kCentroids = 1 << kCodeBits;
  const float step = flush_step(flush_stats_avx512<kCodeBits>(a.sums, a.entries), a.entries);
  const __m512 inverse = _mm512_set1_ps(step > 0.0F ? 1.0F / step : 0.0F);
  if (step < 0.0F) return step;
  if constexpr (kCodeBits == 4) {  // two entries at a time would not be faster: few bytes each
    for (std::int64_t e = 0; e < a.entries; ++e) {
      std::uint8_t* const table = a.tables + e * encoded_bytes(kCodeBits);
      const __m256i q = round16_avx512(a.sums + e * kCentroids, inverse);
      _mm_store_si128(reinterpret_cast<__m128i*>(table), _mm256_cvtepi16_epi8(q));
      _mm_store_si128(reinterpret_cast<__m128i*>(table + kCentroids),
                      _mm256_cvtepi16_epi8(_mm256_srli_epi16(q, 8)));
    }
  } else {
    alignas(64) std::uint8_t order[64];
    for (int i = 0; i < 32; ++i) {
      order[i] = static_cast<std::uint8_t>(4 * i);  // of 128 bytes; the second source begins at 64
      order[32 + i] = static_cast<std::uint8_t>(4 * i + 1);
    }
    const __m512i bytes = _mm512_load_si512(order);
    for (std::int64_t e = 0; e < a.entries; ++e) {
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

// 64 codes and, as masks, their two highest bits where a permute does not look at them.
template <int kCodeBits>
struct CodesVbmi {
  __m512i codes;
  __mmask64 bit7 = 0;
  __mmask64 bit6 = 0;

  CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE explicit CodesVbmi(const std::uint8_t* from)
      : codes(_mm512_loadu_si512(from)) {
    if constexpr (kCodeBits == 8) {
      bit7 = _mm512_movepi8_mask(codes);
      bit6 = _mm512_movepi8_mask(_mm512_add_epi8(codes, codes));
    }
  }
};

// How a table of 256 bytes is looked up: permutes of two registers each, or of one with masks, which need as
// many of the shuffling unit's cycles on Intel's cores, but fewer of the other's.
enum class Permutes : int { kTwoRegisters = 0, kOneRegister = 1 };

// A plane of a table in registers.
template <int kCodeBits, Permutes kPermutes>
struct PlaneVbmi {
  static constexpr int kRegisters = kCodeBits <= 6 ? 1 : 1 << (kCodeBits - 6);
  __m512i part[std::size_t{kRegisters}];

  CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE explicit PlaneVbmi(const std::uint8_t* plane) {
    if constexpr (kCodeBits == 5) {
      part[0] = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(plane)));
    } else {
      CODEGEMM_UNROLL
      for (int i = 0; i < kRegisters; ++i) part[i] = _mm512_loadu_si512(plane + std::int64_t{64} * i);
    }
  }
  CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE __m512i look_up(const CodesVbmi<kCodeBits>& c) const {
    if constexpr (kCodeBits <= 6) {
      return _mm512_permutexvar_epi8(c.codes, part[0]);
    } else if constexpr (kCodeBits == 7) {
      return _mm512_permutex2var_epi8(part[0], c.codes, part[1]);
    } else if constexpr (kPermutes == Permutes::kTwoRegisters) {
      return _mm512_mask_blend_epi8(c.bit7, _mm512_permutex2var_epi8(part[0], c.codes, part[1]),
                                    _mm512_permutex2var_epi8(part[2], c.codes, part[3]));
    } else {
      const __m512i clear =
          _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(c.codes, part[0]), c.bit6, c.codes, part[1]);
      const __m512i set =
          _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(c.codes, part[2]), c.bit6, c.codes, part[3]);
      return _mm512_mask_blend_epi8(c.bit7, clear, set);
    }
  }
};

// Sums of 64 entries of 16 bits that come as planes of bytes. The high bytes are added as bytes: what they
// overflow by would leave the 16 bits of the sum, too. `pairs` adds the low bytes of two rows as one word,
// `odd` those of the second row alone: together they tell the first row's.
struct PlaneSums {
  __m512i high, pairs, odd;

  CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE void clear() { high = pairs = odd = _mm512_setzero_si512(); }
  CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE void add(__m512i low_bytes, __m512i high_bytes) {
    high = _mm512_add_epi8(high, high_bytes);
    pairs = _mm512_add_epi16(pairs, low_bytes);
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(low_bytes, 8));
  }
  // As 16-bit words of rows 0, 2, 4 ... and of rows 1, 3, 5 ...
  CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m512i even_rows() const {
    return _mm512_add_epi16(_mm512_sub_epi16(pairs, _mm512_slli_epi16(odd, 8)), _mm512_slli_epi16(high, 8));
  }
  CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE __m512i odd_rows() const {
    return _mm512_add_epi16(odd, _mm512_and_si512(high, _mm512_set1_epi16(-256)));
  }
};

// y[0..64) += step * scales[n] * sums, whose rows 16 j .. 16 j + 7 are lane j of `low` and the eight after
// them lane j of `high`.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE void add_lanes_avx512(__m512i low, __m512i high, float step,
                                                                    const Half* scales, float* y) {
  const __m512i first_rows = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i last_rows = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  alignas(64) std::int16_t sums[kBlockRows];
  _mm512_storeu_si512(sums, _mm512_permutex2var_epi64(low, first_rows, high));
  _mm512_storeu_si512(sums + 32, _mm512_permutex2var_epi64(low, last_rows, high));
  add_flush_avx512(sums, step, scales, y);
}

// Into the second-level cache: the first has no room for so much beside the tables.
CODEGEMM_TARGET_AVX512 CODEGEMM_ALWAYS_INLINE void prefetch_ahead(const std::uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes), _MM_HINT_T1);
}

// One flush of kBlocks row blocks, `apart` of them from one to the next. The tables stay in registers for all
// of them; codes `ahead` bytes further on are asked for meanwhile.
template <int kCodeBits, int kBlocks, Permutes kPermutes>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void look_up_blocks_vbmi(
    const LookupArgs& a, const Flush& f, std::int64_t block, std::int64_t apart, std::int64_t ahead) {
  const std::int64_t stride = apart * a.stride;
  const std::uint8_t* codes = a.codes + block * a.stride + f.first * kBlockRows;
  const std::uint8_t* table = a.tables + f.first * encoded_bytes(kCodeBits);
  PlaneSums sums[std::size_t{kBlocks}];
  CODEGEMM_UNROLL
  for (int i = 0; i < kBlocks; ++i) sums[i].clear();
  for (std::int64_t e = 0; e < f.count; ++e, codes += kBlockRows, table += encoded_bytes(kCodeBits)) {
    const PlaneVbmi<kCodeBits, kPermutes> low(table);
    const PlaneVbmi<kCodeBits, kPermutes> high(table + (1 << kCodeBits));
    CODEGEMM_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      const std::uint8_t* const from = codes + i * stride;
      prefetch_ahead(from + ahead);
      const CodesVbmi<kCodeBits> index(from);
      sums[i].add(low.look_up(index), high.look_up(index));
    }
  }
  CODEGEMM_UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    const __m512i even = sums[i].even_rows();
    const __m512i odd = sums[i].odd_rows();
    const std::int64_t row = (block + i * apart) * kBlockRows;
    prefetch_scales_avx2(f.scales + row + std::int64_t{kBlocks} * kBlockRows);
    add_lanes_avx512(_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd), f.step,
                     f.scales + row, a.y + row);
  }
}

// The same with 4-bit codes: two entries at a time, one in either half of the registers, and rows 0..31 of
// the block apart from rows 32..63, which lie in the high halves of the same bytes.
template <int kBlocks>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void look_up_nibbles_vbmi(const LookupArgs& a,
                                                                             const Flush& f,
                                                                             std::int64_t block,
                                                                             std::int64_t ahead) {
  constexpr std::int64_t kEntryBytes = code_bytes(4);
  const __m512i mask = _mm512_set1_epi8(15);
  const std::uint8_t* codes = a.codes + block * a.stride + f.first * kEntryBytes;
  const std::uint8_t* table = a.tables + f.first * encoded_bytes(4);
  PlaneSums first[std::size_t{kBlocks}];
  PlaneSums last[std::size_t{kBlocks}];
  CODEGEMM_UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    first[i].clear();
    last[i].clear();
  }
  // Lanes of two tables of two planes: a plane of the first table twice, then that of the second.
  const __m512i low_lanes = _mm512_setr_epi64(0, 1, 0, 1, 4, 5, 4, 5);
  const __m512i high_lanes = _mm512_setr_epi64(2, 3, 2, 3, 6, 7, 6, 7);
  for (std::int64_t e = 0; e < f.count; e += 2, codes += 2 * kEntryBytes, table += 2 * encoded_bytes(4)) {
    const bool two = e + 1 < f.count;
    const __m512i tables =
        two ? _mm512_loadu_si512(table)
            : _mm512_inserti64x4(_mm512_setzero_si512(),
                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)), 0);
    const __m512i low = _mm512_permutexvar_epi64(low_lanes, tables);
    const __m512i high = _mm512_permutexvar_epi64(high_lanes, tables);
    CODEGEMM_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      const std::uint8_t* const from = codes + i * a.stride;
      prefetch_ahead(from + ahead);
      // Without a second entry its table is 0, whatever its codes.
      const __m512i both =
          two ? _mm512_loadu_si512(from)
              : _mm512_inserti64x4(_mm512_setzero_si512(),
                                   _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), 0);
      const __m512i index0 = _mm512_and_si512(both, mask);
      const __m512i index1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
      first[i].add(_mm512_shuffle_epi8(low, index0), _mm512_shuffle_epi8(high, index0));
      last[i].add(_mm512_shuffle_epi8(low, index1), _mm512_shuffle_epi8(high, index1));
    }
  }
  // Of the two entries' sums, in either half, one: rows 0..31 in the first half, 32..63 in the second.
  const __m512i first_halves = _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 10, 11);
  const __m512i last_halves = _mm512_setr_epi64(4, 5, 6, 7, 12, 13, 14, 15);
  const auto join = [&](__m512i x, __m512i y) CODEGEMM_TARGET_AVX512 {
    return _mm512_add_epi16(_mm512_permutex2var_epi64(x, first_halves, y),
                            _mm512_permutex2var_epi64(x, last_halves, y));
  };
  CODEGEMM_UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    const __m512i even = join(first[i].even_rows(), last[i].even_rows());
    const __m512i odd = join(first[i].odd_rows(), last[i].odd_rows());
    const Half* const scales = f.scales + (block + i) * kBlockRows;
    prefetch_scales_avx2(scales + std::int64_t{kBlocks} * kBlockRows);
    add_lanes_avx512(_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd), f.step, scales,
                     a.y + (block + i) * kBlockRows);
  }
}

template <int kCodeBits, int kBlocks, Permutes kPermutes>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void look_up_group_vbmi(const LookupArgs& a,
                                                                           std::int64_t block,
                                                                           std::int64_t apart,
                                                                           std::int64_t ahead) {
  for (const Flush* f = a.flushes; f != a.flushes + a.flush_count; ++f) {
    if constexpr (kCodeBits == 4) {
      look_up_nibbles_vbmi<kBlocks>(a, *f, block, ahead);
    } else {
      look_up_blocks_vbmi<kCodeBits, kBlocks, kPermutes>(a, *f, block, apart, ahead);
    }
  }
}

template <int kCodeBits, Permutes kPermutes>
CODEGEMM_TARGET_AVX512_VBMI void lookup_planes_by_vbmi(const LookupArgs& a) {
  // Three sums a block (six of 4-bit codes) beside the tables: with more, GCC keeps some in memory.
  constexpr int kBlocks = kCodeBits == 4 ? 2 : 4;
  // Where two blocks of 8-bit codes share a page, Intel's cores read ahead of only one of them: every other
  // block first, and then the others.
  constexpr std::int64_t kApart = kCodeBits == 8 && kPermutes == Permutes::kOneRegister ? 2 : 1;
  constexpr std::int64_t kGroup = kApart * kBlocks;
  std::int64_t block = 0;
  for (; block + kGroup <= a.blocks; block += kGroup) {
    const std::int64_t ahead = bytes_ahead(a, block, kGroup);
    for (std::int64_t i = 0; i < kApart; ++i) {
      look_up_group_vbmi<kCodeBits, kBlocks, kPermutes>(a, block + i, kApart, ahead);
    }
  }
  for (; block + kBlocks <= a.blocks; block += kBlocks) {
    look_up_group_vbmi<kCodeBits, kBlocks, kPermutes>(a, block, 1, bytes_ahead(a, block, kBlocks));
  }
  for (; block < a.blocks; ++block) {
    look_up_group_vbmi<kCodeBits, 1, kPermutes>(a, block, 1, bytes_ahead(a, block, 1));
  }
}

template <int kCodeBits>
void lookup_planes_vbmi(const LookupArgs& a) {
  if constexpr (kCodeBits == 8) {
    if (two_register_lookups_are_slow()) {
      return lookup_planes_by_vbmi<kCodeBits, Permutes::kOneRegister>(a);
    }
  }
  lookup_planes_by_vbmi<kCodeBits, Permutes::kTwoRegisters>(a);
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
