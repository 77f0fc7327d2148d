// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/lookup_avx2.hpp - register lookups with AVX2: vpshufb over parts of 16 centroids.
// Layer: cpu (host only).
//
// A table is cut into *parts* of 16 centroids, a byte each: parts of the high bytes of its entries, then
// parts of the low ones. A permute looks up 32 rows in one part, whatever the upper bits of their codes, and
// blends on these bits choose among parts. The lowest of them needs no blend: of two neighbours A and B the
// table holds A ^ B and B, and A ^ B is looked up with an index that yields 0 where B is meant.
// For 8 bits a code this takes as long as gathering: 32 permutes and 30 choices for 32 rows.
#pragma once

#include <codegemm/cpu/lookup_args.hpp>

#if CODEGEMM_HAS_AVX2
#include <immintrin.h>

namespace codegemm::detail {

/// Parts that hold one byte of each entry.
[[nodiscard]] constexpr int byte_parts(int code_bits) noexcept { return 1 << (code_bits - 4); }

CODEGEMM_TARGET_AVX2 inline float largest_lane_avx2(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

CODEGEMM_TARGET_AVX2 inline float add_lanes_avx2(__m256 v) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

template <int kCodeBits>
CODEGEMM_TARGET_AVX2 FlushStats flush_stats_avx2(const float* sums, std::int64_t entries) {
  constexpr int kCentroids = 1 << kCodeBits;
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  FlushStats out;
  __m256 power = _mm256_setzero_ps();
  for (std::int64_t e = 0; e < entries; ++e, sums += kCentroids) {
    __m256 largest = _mm256_setzero_ps();
    for (int i = 0; i < kCentroids; i += 8) {
      const __m256 v = _mm256_load_ps(sums + i);
      largest = _mm256_max_ps(largest, _mm256_and_ps(v, no_sign));
      power = _mm256_fmadd_ps(v, v, power);
    }
    out.bound += largest_lane_avx2(largest);
  }
  out.power = add_lanes_avx2(power) / static_cast<float>(kCentroids);
  return out;
}

// round(sums[0..16) * inverse) as 16-bit integers: the first eight and the second.
struct Rounded {
  __m128i first, second;
};

CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE Rounded round_part_avx2(const float* sums, __m256 inverse) {
  const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(sums), inverse));
  const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(sums + 8), inverse));
  return {_mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)),
          _mm_packs_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1))};
}

// parts[0..count): every even one becomes itself ^ its odd neighbour.
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void store_parts_avx2(const __m128i* parts, int count,
                                                                  std::uint8_t* to) {
  for (std::int64_t p = 0; p < count; ++p) {
    const bool even = count > 1 && p % 2 == 0;
    _mm_store_si128(reinterpret_cast<__m128i*>(to + 16 * p),
                    even ? _mm_xor_si128(parts[p], parts[p + 1]) : parts[p]);
  }
}

template <int kCodeBits>
CODEGEMM_TARGET_AVX2 void encode_entry_avx2(const float* sums, __m256 inverse, std::uint8_t* table) {
  constexpr int kParts = byte_parts(kCodeBits);
  __m128i high[std::size_t{kParts}];
  __m128i low[std::size_t{kParts}];
  const __m128i low_byte = _mm_set1_epi16(255);
  for (std::int64_t p = 0; p < kParts; ++p) {
    const Rounded q = round_part_avx2(sums + 16 * p, inverse);
    high[p] = _mm_packus_epi16(_mm_srli_epi16(q.first, 8), _mm_srli_epi16(q.second, 8));
    low[p] = _mm_packus_epi16(_mm_and_si128(q.first, low_byte), _mm_and_si128(q.second, low_byte));
  }
  store_parts_avx2(high, kParts, table);
  store_parts_avx2(low, kParts, table + encoded_bytes(kCodeBits) / 2);
}

/// The step of the flush, negative where 16 bits are not enough; its `tables` are then of no use.
template <int kCodeBits>
CODEGEMM_TARGET_AVX2 float encode_parts_avx2(const EncodeArgs& a) {
  constexpr std::int64_t kCentroids = std::int64_t{1} << kCodeBits;
  const float step = flush_step(flush_stats_avx2<kCodeBits>(a.sums, a.entries), a.entries);
  const __m256 inverse = _mm256_set1_ps(step > 0.0F ? 1.0F / step : 0.0F);
  if (step < 0.0F) return step;
  for (std::int64_t e = 0; e < a.entries; ++e) {
    encode_entry_avx2<kCodeBits>(a.sums + e * kCentroids, inverse, a.tables + e * encoded_bytes(kCodeBits));
  }
  return step;
}

// Where the sums of a flush go: y[n] += step * scales[n] * sum[n].
struct FlushTarget {
  __m256 step;
  const Half* scales;
  float* y;
};

// Those of the next block, two lines: they come seldom, and an addition that waits for memory stops the rest.
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void prefetch_scales_avx2(const Half* scales) {
  _mm_prefetch(reinterpret_cast<const char*>(scales), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(scales + kBlockRows / 2), _MM_HINT_T0);
}

CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_rows8_avx2(__m128i sums, const FlushTarget& to,
                                                                int row) {
  const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(to.scales + row)));
  const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sums));
  float* const y = to.y + row;
  _mm256_store_ps(y, _mm256_fmadd_ps(_mm256_mul_ps(scale, to.step), value, _mm256_load_ps(y)));
}

// Unpacking bytes leaves rows 0..7 and 16..23 in `low`, 8..15 and 24..31 in `high`.
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_rows32_avx2(__m256i low, __m256i high,
                                                                 const FlushTarget& to, int row) {
  add_rows8_avx2(_mm256_castsi256_si128(low), to, row);
  add_rows8_avx2(_mm256_castsi256_si128(high), to, row + 8);
  add_rows8_avx2(_mm256_extracti128_si256(low, 1), to, row + 16);
  add_rows8_avx2(_mm256_extracti128_si256(high, 1), to, row + 24);
}

CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE __m256i load_part_avx2(const std::uint8_t* table,
                                                                   std::int64_t part) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table + 16 * part)));
}

// The codes of 32 rows as indices for the parts, and with bit 5 or 6 of the code on top.
struct PartIndex {
  __m256i even;  // top bit set, so that a permute yields 0, where bit 4 is set
  __m256i odd;
  __m256i bit5, bit6;
};

CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE PartIndex part_index_avx2(__m256i codes) {
  PartIndex out;
  out.bit6 = _mm256_add_epi8(codes, codes);
  out.bit5 = _mm256_add_epi8(out.bit6, out.bit6);
  const __m256i bit4 = _mm256_add_epi8(out.bit5, out.bit5);
  out.odd = _mm256_and_si256(codes, _mm256_set1_epi8(15));
  out.even = _mm256_or_si256(out.odd, _mm256_and_si256(bit4, _mm256_set1_epi8(-128)));
  return out;
}

// Looks codes up in kParts parts, which are chosen by kParts's bits from bit 4 on.
template <int kParts>
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE __m256i look_up_parts_avx2(const std::uint8_t* table,
                                                                       const PartIndex& index) {
  if constexpr (kParts == 1) {
    return _mm256_shuffle_epi8(load_part_avx2(table, 0), index.odd);
  } else if constexpr (kParts == 2) {
    return _mm256_xor_si256(_mm256_shuffle_epi8(load_part_avx2(table, 0), index.even),
                            _mm256_shuffle_epi8(load_part_avx2(table, 1), index.odd));
  } else {
    const __m256i clear = look_up_parts_avx2<kParts / 2>(table, index);
    const __m256i set = look_up_parts_avx2<kParts / 2>(table + std::int64_t{8} * kParts, index);
    return _mm256_blendv_epi8(clear, set, kParts == 4 ? index.bit5 : index.bit6);
  }
}

// 32 rows, from `row` on, over a flush; codes of this half of the rows, 64 bytes from entry to entry.
template <int kCodeBits>
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_parts_avx2(const std::uint8_t* codes,
                                                                const std::uint8_t* tables,
                                                                std::int64_t entries, const FlushTarget& to,
                                                                int row) {
  constexpr int kParts = byte_parts(kCodeBits);
  __m256i low = _mm256_setzero_si256();
  __m256i high = low;
  for (std::int64_t e = 0; e < entries; ++e, codes += kBlockRows, tables += encoded_bytes(kCodeBits)) {
    const PartIndex index = part_index_avx2(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m256i top = look_up_parts_avx2<kParts>(tables, index);
    const __m256i rest = look_up_parts_avx2<kParts>(tables + encoded_bytes(kCodeBits) / 2, index);
    low = _mm256_add_epi16(low, _mm256_unpacklo_epi8(rest, top));
    high = _mm256_add_epi16(high, _mm256_unpackhi_epi8(rest, top));
  }
  add_rows32_avx2(low, high, to, row);
}

struct NibbleSums {
  __m256i low0, high0, low1, high1;
};

CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_nibbles_avx2(const std::uint8_t* codes,
                                                                  const std::uint8_t* table,
                                                                  NibbleSums& sums) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i first = _mm256_and_si256(both, mask);
  const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  const __m256i top = load_part_avx2(table, 0);
  const __m256i rest = load_part_avx2(table, 1);
  const __m256i top0 = _mm256_shuffle_epi8(top, first);
  const __m256i rest0 = _mm256_shuffle_epi8(rest, first);
  const __m256i top1 = _mm256_shuffle_epi8(top, second);
  const __m256i rest1 = _mm256_shuffle_epi8(rest, second);
  sums.low0 = _mm256_add_epi16(sums.low0, _mm256_unpacklo_epi8(rest0, top0));
  sums.high0 = _mm256_add_epi16(sums.high0, _mm256_unpackhi_epi8(rest0, top0));
  sums.low1 = _mm256_add_epi16(sums.low1, _mm256_unpacklo_epi8(rest1, top1));
  sums.high1 = _mm256_add_epi16(sums.high1, _mm256_unpackhi_epi8(rest1, top1));
}

// 64 rows over a flush, 4 bits a code. Two entries a round: 64 bytes of codes, and those of a later page are
// asked for, since the processor's own prefetching ends at each 4 KiB.
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_nibble_flush_avx2(const std::uint8_t* codes,
                                                                       const std::uint8_t* tables,
                                                                       std::int64_t entries,
                                                                       const FlushTarget& to) {
  const __m256i zero = _mm256_setzero_si256();
  NibbleSums sums{zero, zero, zero, zero};
  for (; entries > 1; entries -= 2, codes += kBlockRows, tables += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + CpuTiles::kPrefetchBytes), _MM_HINT_T0);
    add_nibbles_avx2(codes, tables, sums);
    add_nibbles_avx2(codes + kBlockRows / 2, tables + 32, sums);
  }
  if (entries > 0) add_nibbles_avx2(codes, tables, sums);
  add_rows32_avx2(sums.low0, sums.high0, to, 0);
  add_rows32_avx2(sums.low1, sums.high1, to, kBlockRows / 2);
}

template <int kCodeBits>
CODEGEMM_TARGET_AVX2 void lookup_parts_avx2(const LookupArgs& a) {
  constexpr std::int64_t kEntryBytes = code_bytes(kCodeBits);
  for (std::int64_t block = a.first_block; block < a.end_block; ++block) {
    for (const Flush* f = a.flushes; f != a.flushes + a.flush_count; ++f) {
      const std::uint8_t* const codes = a.codes + block * a.stride + f->first * kEntryBytes;
      const std::uint8_t* const tables = a.tables + f->first * encoded_bytes(kCodeBits);
      prefetch_scales_avx2(f->scales + (block + 1) * kBlockRows);
      const FlushTarget to{_mm256_set1_ps(f->step), f->scales + block * kBlockRows, a.y + block * kBlockRows};
      if constexpr (kCodeBits == 4) {
        add_nibble_flush_avx2(codes, tables, f->count, to);
      } else {
        add_parts_avx2<kCodeBits>(codes, tables, f->count, to, 0);
        add_parts_avx2<kCodeBits>(codes + kBlockRows / 2, tables, f->count, to, kBlockRows / 2);
      }
    }
  }
}

}  // namespace codegemm::detail

#endif
