// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/gather.hpp - sums Psumbook entries by the codes of eight rows at a time.
// Layer: cpu (host only).
#pragma once

#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/pack.hpp>

#if CODEGEMM_HAS_AVX2
#include <immintrin.h>
#endif

namespace codegemm::detail {

/// One sweep: the rows of `blocks` row blocks over `entries` entries, all of one scale group.
///   part[n][t] (+)= sum over entries e of tables[e][code(n, e)][t]
///   and at the end of the scale group y[n][t] += scale[n] * part[n][t]
/// A group that needs several sweeps (its tables do not fit into the cache together) keeps its sums in
/// `part`; with one lane they fit, and `first` and `last` are both true.
struct GatherArgs {
  const std::uint64_t* codes;  // the first block's words of the first entry; entries follow one another
  std::int64_t stride;         // words from one row block to the next
  std::int64_t words;          // of an entry in a block: 1, or 4 with 4-bit codes and 8 with others
  const float* tables;         // [entries][2^b][lanes]
  std::int64_t entries;
  const Half* scales;   // [octets * 8]
  float* part;          // [octets * 8][lanes]; not used if `first` and `last`
  float* y;             // [octets * 8][lanes]
  std::int64_t octets;  // eights of rows, from a block's first on
  bool first;           // the group begins here: part starts from 0
  bool last;            // the group ends here: scale it into y
};

// The codes of eight rows over the entries of a sweep, kWords words from entry to entry.
template <int kCodeBits, int kWords>
struct OctetCodes {
  const std::uint64_t* words;
  int shift;  // 4-bit codes: of the half of the bytes that is these rows'

  OctetCodes(const GatherArgs& a, std::int64_t octet) {
    constexpr std::int64_t kOctets = kCodeBits == 4 ? 2 * kWords : kWords;
    words = a.codes + octet / kOctets * a.stride + octet % kWords;
    shift = kCodeBits == 4 && octet % kOctets >= kWords ? 4 : 0;
  }
  [[nodiscard]] CODEGEMM_ALWAYS_INLINE std::uint64_t operator[](std::int64_t entry) const {
    const std::uint64_t bytes = words[entry * kWords];
    return kCodeBits == 4 ? (bytes >> shift) & 0x0F0F0F0F0F0F0F0FU : bytes;
  }
};

template <int kLanes, int kCodeBits, int kWords>
void gather_portable(const GatherArgs& a) {
  constexpr std::int64_t kTable = (std::int64_t{1} << kCodeBits) * kLanes;
  for (std::int64_t octet = 0; octet < a.octets; ++octet) {
    const OctetCodes<kCodeBits, kWords> codes(a, octet);
    float sum[kWordRows * std::size_t{kLanes}] = {};
    float* const part = a.part + octet * kWordRows * kLanes;
    if (!a.first) {
      for (int i = 0; i < kWordRows * kLanes; ++i) sum[i] = part[i];
    }
    const float* table = a.tables;
    for (std::int64_t e = 0; e < a.entries; ++e, table += kTable) {
      std::uint64_t word = codes[e];
      for (int r = 0; r < kWordRows; ++r, word >>= 8) {
        const float* const entry = table + (word & 255U) * kLanes;
        for (int t = 0; t < kLanes; ++t) sum[r * kLanes + t] += entry[t];
      }
    }
    if (!a.last) {
      for (int i = 0; i < kWordRows * kLanes; ++i) part[i] = sum[i];
      continue;
    }
    float* const y = a.y + octet * kWordRows * kLanes;
    for (int r = 0; r < kWordRows; ++r) {
      const float scale = a.scales[octet * kWordRows + r].to_float();
      for (int t = 0; t < kLanes; ++t) y[r * kLanes + t] += scale * sum[r * kLanes + t];
    }
  }
}

#if CODEGEMM_HAS_AVX2

CODEGEMM_TARGET_AVX2 inline __m256 load_halves_avx2(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

struct Sums1 {
  __m128 s0, s1, s2, s3, s4, s5, s6, s7;
};

// sums.sR += table[byte R of *word] for the eight rows of a word. Written out because the instruction counts
// decide here and compilers miss them: half of the bytes are taken out of a register by moves (%b, %h), for
// which it is shifted once, and half by loads of their own. By moves alone the arithmetic units bind a core
// that has three loads a cycle, by loads alone the loads do. In C++ the load is not folded into the addition.
template <int kOffset>  // in bytes, from `table`
CODEGEMM_TARGET_AVX2 inline void add_word_avx2(const std::uint64_t* word, const float* table, Sums1& sums) {
  std::uint64_t bytes;
  std::uint64_t low;
  std::uint64_t high;
  asm("movl (%[word]), %k[bytes]\n\t"
      "movzbl %b[bytes], %k[low]\n\t"
      "movzbl %h[bytes], %k[high]\n\t"
      "vaddss %c[offset](%[table],%q[low],4), %[s0], %[s0]\n\t"
      "vaddss %c[offset](%[table],%q[high],4), %[s1], %[s1]\n\t"
      "movzbl 4(%[word]), %k[low]\n\t"
      "movzbl 5(%[word]), %k[high]\n\t"
      "vaddss %c[offset](%[table],%q[low],4), %[s4], %[s4]\n\t"
      "vaddss %c[offset](%[table],%q[high],4), %[s5], %[s5]\n\t"
      "shrl $16, %k[bytes]\n\t"
      "movzbl %b[bytes], %k[low]\n\t"
      "movzbl %h[bytes], %k[high]\n\t"
      "vaddss %c[offset](%[table],%q[low],4), %[s2], %[s2]\n\t"
      "vaddss %c[offset](%[table],%q[high],4), %[s3], %[s3]\n\t"
      "movzbl 6(%[word]), %k[low]\n\t"
      "movzbl 7(%[word]), %k[high]\n\t"
      "vaddss %c[offset](%[table],%q[low],4), %[s6], %[s6]\n\t"
      "vaddss %c[offset](%[table],%q[high],4), %[s7], %[s7]"
      : [s0] "+x"(sums.s0), [s1] "+x"(sums.s1), [s2] "+x"(sums.s2), [s3] "+x"(sums.s3), [s4] "+x"(sums.s4),
        [s5] "+x"(sums.s5), [s6] "+x"(sums.s6), [s7] "+x"(sums.s7), [bytes] "=&Q"(bytes), [low] "=&R"(low),
        [high] "=&R"(high)
      : [word] "r"(word), [table] "r"(table), [offset] "i"(kOffset)
      : "cc", "memory");
}

template <int kCodeBits, int kWords>
CODEGEMM_TARGET_AVX2 void gather1_avx2(const GatherArgs& a) {
  constexpr std::int64_t kTable = std::int64_t{1} << kCodeBits;
  constexpr int kTableBytes = 4 << kCodeBits;
  const __m128 zero = _mm_setzero_ps();
  for (std::int64_t octet = 0; octet < a.octets; ++octet) {
    const OctetCodes<kCodeBits, kWords> codes(a, octet);
    Sums1 sums{zero, zero, zero, zero, zero, zero, zero, zero};
    const float* table = a.tables;
    if constexpr (kWords == 1) {
      const std::uint64_t* word = codes.words;
      const std::uint64_t* const end = word + a.entries;
      for (; end - word >= 4; word += 4, table += 4 * kTable) {
        _mm_prefetch(reinterpret_cast<const char*>(word) + CpuTiles::kGatherPrefetchBytes, _MM_HINT_T0);
        add_word_avx2<0>(word, table, sums);
        add_word_avx2<kTableBytes>(word + 1, table, sums);
        add_word_avx2<2 * kTableBytes>(word + 2, table, sums);
        add_word_avx2<3 * kTableBytes>(word + 3, table, sums);
      }
      for (; word != end; ++word, table += kTable) add_word_avx2<0>(word, table, sums);
    } else {
      for (std::int64_t e = 0; e < a.entries; ++e, table += kTable) {
        const std::uint64_t word = codes[e];
        add_word_avx2<0>(&word, table, sums);
      }
    }
    const __m128 low = _mm_movelh_ps(_mm_unpacklo_ps(sums.s0, sums.s1), _mm_unpacklo_ps(sums.s2, sums.s3));
    const __m128 high = _mm_movelh_ps(_mm_unpacklo_ps(sums.s4, sums.s5), _mm_unpacklo_ps(sums.s6, sums.s7));
    const __m256 sum = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
    const __m256 scale = load_halves_avx2(a.scales + octet * 8);
    float* const y = a.y + octet * 8;
    _mm256_store_ps(y, _mm256_fmadd_ps(scale, sum, _mm256_load_ps(y)));
  }
}

CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE __m128 add_scaled_avx2(__m128 to, float scale, __m128 v) {
  return _mm_fmadd_ps(_mm_set1_ps(scale), v, to);
}
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE __m256 add_scaled_avx2(__m256 to, float scale, __m256 v) {
  return _mm256_fmadd_ps(_mm256_set1_ps(scale), v, to);
}

template <int kLanes>
struct RegisterAvx2;
template <>
struct RegisterAvx2<4> {
  using Type = __m128;
};
template <>
struct RegisterAvx2<8> {
  using Type = __m256;
};

// The sums of kLanes tokens of a row.
template <int kLanes>
struct LanesAvx2 {
  using Register = typename RegisterAvx2<kLanes>::Type;
  Register sums;

  CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void load(const float* from) {
    sums = *reinterpret_cast<const Register*>(from);
  }
  CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add(const float* from) {
    sums += *reinterpret_cast<const Register*>(from);
  }
  CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void store(float* to) const {
    *reinterpret_cast<Register*>(to) = sums;
  }
  CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE void add_scaled_to(float* y, float scale) const {
    auto* const to = reinterpret_cast<Register*>(y);
    *to = add_scaled_avx2(*to, scale, sums);
  }
};

// Tokens in the lanes: an entry is one load. With optimization the sums are registers.
template <int kLanes, int kCodeBits, int kWords>
CODEGEMM_TARGET_AVX2 void gather_lanes_avx2(const GatherArgs& a) {
  constexpr std::int64_t kTable = std::int64_t{kLanes} << kCodeBits;
  constexpr std::ptrdiff_t kStep = kLanes;  // from a row to the next
  alignas(32) float scales[8];
  for (std::int64_t octet = 0; octet < a.octets; ++octet) {
    const OctetCodes<kCodeBits, kWords> codes(a, octet);
    float* const part = a.part + octet * 8 * kLanes;
    LanesAvx2<kLanes> sums[8] = {};
    if (!a.first) {
      CODEGEMM_UNROLL
      for (int r = 0; r < 8; ++r) sums[r].load(part + r * kStep);
    }
    const float* table = a.tables;
    for (std::int64_t e = 0; e < a.entries; ++e, table += kTable) {
      const std::uint64_t word = codes[e];
      CODEGEMM_UNROLL
      for (int r = 0; r < 8; ++r) sums[r].add(table + ((word >> (8 * r)) & 255U) * kLanes);
    }
    if (!a.last) {
      CODEGEMM_UNROLL
      for (int r = 0; r < 8; ++r) sums[r].store(part + r * kStep);
      continue;
    }
    _mm256_store_ps(scales, load_halves_avx2(a.scales + octet * 8));
    float* const y = a.y + octet * 8 * kLanes;
    CODEGEMM_UNROLL
    for (int r = 0; r < 8; ++r) sums[r].add_scaled_to(y + r * kStep, scales[r]);
  }
}

#endif

template <Isa kIsa, int kLanes, int kCodeBits, int kWords>
void gather_words(const GatherArgs& a) {
#if CODEGEMM_HAS_AVX2
  if constexpr (has_avx2(kIsa) && kLanes == 1) return gather1_avx2<kCodeBits, kWords>(a);
  if constexpr (has_avx2(kIsa) && kLanes > 1) return gather_lanes_avx2<kLanes, kCodeBits, kWords>(a);
#endif
  if constexpr (!has_avx2(kIsa)) gather_portable<kLanes, kCodeBits, kWords>(a);
}

template <Isa kIsa, int kLanes, int kCodeBits>
void gather(const GatherArgs& a) {
  static_assert(kLanes == 1 || kLanes == 4 || kLanes == 8, "codegemm: a Psumbook has 1, 4 or 8 lanes");
  if constexpr (kCodeBits == 4) {
    gather_words<kIsa, kLanes, kCodeBits, 4>(a);
  } else if (a.words == 1) {
    gather_words<kIsa, kLanes, kCodeBits, 1>(a);
  } else {
    gather_words<kIsa, kLanes, kCodeBits, 8>(a);
  }
}

}  // namespace codegemm::detail
