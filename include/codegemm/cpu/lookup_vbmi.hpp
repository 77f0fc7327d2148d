// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/lookup_vbmi.hpp - register lookups of bytes with AVX-512 and VBMI.
// Layer: cpu (host only).
//
// One permute looks 64 rows up among 128 bytes, so a table of 256 entries is two permutes and a blend for the
// low bytes and the same for the high ones.
#pragma once

#include <codegemm/cpu/lookup_args.hpp>
#include <codegemm/cpu/lookup_avx512.hpp>

#if CODEGEMM_HAS_AVX512

CODEGEMM_AVX512_CODE_BEGIN

namespace codegemm::detail {

// 64 codes and, as masks, their two highest bits where a permute does not look at them, and both of them.
template <int kCodeBits>
struct CodesVbmi {
  __m512i codes;
  __mmask64 bit7 = 0;
  __mmask64 bit6 = 0;
  __mmask64 both_bits = 0;

  CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE explicit CodesVbmi(const std::uint8_t* from)
      : codes(_mm512_loadu_si512(from)) {
    if constexpr (kCodeBits == 8) {
      bit7 = _mm512_movepi8_mask(codes);
      bit6 = _mm512_movepi8_mask(_mm512_add_epi8(codes, codes));
      both_bits = bit7 & bit6;
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
      // Each permute overwrites what the ones before it had no business with: no blends.
      __m512i bytes = _mm512_permutexvar_epi8(c.codes, part[0]);
      bytes = _mm512_mask_permutexvar_epi8(bytes, c.bit6, c.codes, part[1]);
      bytes = _mm512_mask_permutexvar_epi8(bytes, c.bit7, c.codes, part[2]);
      return _mm512_mask_permutexvar_epi8(bytes, c.both_bits, c.codes, part[3]);
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

// How far ahead of each of kBlocks blocks codes are asked for.
template <int kBlocks>
struct Ahead {
  std::int64_t bytes[std::size_t{kBlocks}];

  // Of blocks `block` and those `apart` from one to the next, `count` at a time.
  Ahead(const LookupArgs& a, std::int64_t block, std::int64_t apart, std::int64_t count) {
    for (int i = 0; i < kBlocks; ++i) bytes[i] = bytes_ahead(a, block + i * apart, count);
  }
};

// One flush of kBlocks row blocks, `apart` of them from one to the next. The tables stay in registers for all
// of them; codes further on are asked for meanwhile.
template <int kCodeBits, int kBlocks, Permutes kPermutes>
CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_ALWAYS_INLINE void look_up_blocks_vbmi(const LookupArgs& a,
                                                                            const Flush& f,
                                                                            std::int64_t block,
                                                                            std::int64_t apart,
                                                                            const Ahead<kBlocks>& ahead) {
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
      prefetch_ahead(from + ahead.bytes[i]);
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
                                                                             const Ahead<kBlocks>& ahead) {
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
      prefetch_ahead(from + ahead.bytes[i]);
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
                                                                           std::int64_t count) {
  const Ahead<kBlocks> ahead(a, block, apart, count);
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
  // block first, and then the others, if there are many.
  constexpr std::int64_t kManyBlocks = 32;
  const std::int64_t apart =
      kCodeBits == 8 && kPermutes == Permutes::kOneRegister && a.end_block - a.first_block >= kManyBlocks ? 2
                                                                                                          : 1;
  const std::int64_t group = apart * kBlocks;
  std::int64_t block = a.first_block;
  for (; block + group <= a.end_block; block += group) {
    for (std::int64_t i = 0; i < apart; ++i) {
      look_up_group_vbmi<kCodeBits, kBlocks, kPermutes>(a, block + i, apart, group);
    }
  }
  for (; block + kBlocks <= a.end_block; block += kBlocks) {
    look_up_group_vbmi<kCodeBits, kBlocks, kPermutes>(a, block, 1, kBlocks);
  }
  for (; block < a.end_block; ++block) {
    look_up_group_vbmi<kCodeBits, 1, kPermutes>(a, block, 1, 1);
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

}  // namespace codegemm::detail

CODEGEMM_AVX512_CODE_END

#endif
