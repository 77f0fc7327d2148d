// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/half_psumbook.cuh - a Psumbook of fp16 numbers in shared memory: tensor cores build it
// and add up what is gathered from it.
// Layer: cuda/block (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/centroid_table.cuh>
#include <codegemm/cuda/block/half_layout.hpp>
#include <codegemm/cuda/block/psumbook.cuh>

namespace codegemm::cuda {
namespace detail {

// D = A B of 16 x 8 and 8 x 8 numbers, rounded once: rows lane / 4 and that + 8 of columns 2 (lane % 4) and
// the next.
__device__ __forceinline__ void multiply_halves(unsigned (&d)[2], const unsigned (&a)[2], unsigned b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3}, {%4}, {%5, %5};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(b), "r"(0U));
}

// The word `Offset` bytes behind an address of the shared window.
template <int Offset>
__device__ __forceinline__ unsigned load_word(unsigned address) {
  unsigned out;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(out) : "r"(address), "n"(Offset));
  return out;
}

}  // namespace detail

/// The Psumbook of one granule of 512 activations and one or two tokens, for V = 4 and one codebook or V = 8
/// and two, of 256 centroids. Lane l owns 16 activations, four columns, as in Psumbook. Two inner products
/// share a word. One token: those of columns P and P + 2 of a lane with the same centroid of column P's
/// codebook, P = 0, 1. Two tokens: theirs of a column, of columns P in a first table, P + 2 in a second. Word
/// (code, P, lane) lies at byte  code * 256 + P * 128 + (lane ^ 16 * P) * 4, so that a lane always reads its
/// own bank for each P, and words that a warp builds at once are of different banks.
///
/// Inner products are rounded to fp16 once (2^-12 of each at most, in the mean); what is added up from them
/// is fp32. Activations are multiplied by a power of two first, the granule's own, so that none overflows and
/// what underflows is below 2^-30 of the largest.
///
/// A gather is a permute and a load for each code; the word goes to mma.sync as it is. There a matrix of ones
/// and zeros takes the half that was meant, puts its sum into the column of its row, and adds up four lanes.
/// (The other half is multiplied by zero: an infinite or NaN activation makes every output NaN. Of two tokens
/// such a one is built from zeros and unscale() is NaN, so that the other is not touched.)
///
/// All functions are for whole warps.
template <int V, int Codebooks, int Tokens = 1>
struct HalfPsumbook {
  static_assert(Tokens == 1 || Tokens == 2, "codegemm: HalfPsumbook is for one or two tokens");
  static_assert((V == 4 && Codebooks == 1) || (V == 8 && Codebooks == 2),
                "codegemm: HalfPsumbook is for V = 4 and one codebook, or V = 8 and two");

  static constexpr int kSets = 4;                        ///< columns that a lane owns
  static constexpr int kActivations = kHalfActivations;  ///< k covered
  /// Bytes of shared memory, kWindowStart behind a multiple of that in the shared window: a code and a lane
  /// become an address by one permute.
  static constexpr int kBytes = Tokens * static_cast<int>(kHalfTableBytes);
  static constexpr int kCodeBlocks = 32;  ///< blocks of 8 codes
  static constexpr int kStagedBytes =
      Tokens * static_cast<int>(kHalfStagedBytes);  ///< a granule's activations as stage() leaves them
  static constexpr int kLogV = V == 4 ? 2 : 3;      ///< log2 of V

  /// What a thread holds of 8 centroids (of each codebook): as rows of a product, P = 0 and P = 1 of each in
  /// turn.
  struct Centroids {
    unsigned pairs[2];  ///< two values each, or zeros (V = 4: a row of P has four values, from 4 P on)
  };

  /// Centroids 8 * block .. 8 * block + 7.
  [[nodiscard]] static __device__ __forceinline__ Centroids load_centroids(const std::uint16_t* codebooks,
                                                                           int block) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned p = lane / 4 % 2;
    const unsigned q = lane % 4;
    const unsigned centroid = static_cast<unsigned>(block * 8) + lane / 8;
    const auto* const words = reinterpret_cast<const unsigned*>(codebooks);
    Centroids out;
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {  // and the fourth behind it
      if constexpr (V == 4) {
        out.pairs[i] = q / 2 == p ? __ldg(words + (centroid + i * 4) * 2 + q % 2) : 0U;
      } else {
        out.pairs[i] = __ldg(words + (p * 256 + centroid + i * 4) * 4 + q);
      }
    }
    return out;
  }

  /// The first of the two activations of a granule in word `f` of a lane, 0 <= f < 8: a lane holds its own.
  [[nodiscard]] static __device__ __forceinline__ int activation_of(int lane, int f) {
    return lane * 16 + f * 2;
  }

  /// A warp's 512 activations, as pairs of the type that they have in memory.
  struct Words {
    unsigned of[8];  ///< see activation_of()
  };
  /// The activations from number `k0` on.
  [[nodiscard]] static __device__ __forceinline__ Words load(const Activations& x, int k0) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    Words out;
    if (k0 + kActivations <= x.cols && (reinterpret_cast<std::uintptr_t>(x.x) + k0 * 2ULL) % 16 == 0) {
      const uint4* const from = reinterpret_cast<const uint4*>(x.x + k0 + activation_of(lane, 0));
      const uint4 low = from[0];
      const uint4 high = from[1];
      out.of[0] = low.x, out.of[1] = low.y, out.of[2] = low.z, out.of[3] = low.w;
      out.of[4] = high.x, out.of[5] = high.y, out.of[6] = high.z, out.of[7] = high.w;
    } else {
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        const int k = k0 + activation_of(lane, f);
        out.of[f] = x.bits(k) | static_cast<unsigned>(x.bits(k + 1)) << 16;
      }
    }
    return out;
  }

  /// Leaves them, of one token, in `staged` (kStagedBytes, at a multiple of 16) as build() wants them. One
  /// warp.
  static __device__ __forceinline__ void stage(char* staged, Words words, bool bf16, int token = 0) {
    unsigned most = 0;
#pragma unroll
    for (int f = 0; f < 8; ++f) most = __vmaxu2(most, words.of[f] & 0x7FFF7FFFU);
    most = max(most & 0xFFFFU, most >> 16);
    const int largest = static_cast<int>(__reduce_max_sync(0xFFFFFFFFU, most));
    const bool finite = Tokens == 1 || largest < (bf16 ? 0x7F80 : 0x7C00);
    if (!finite) words = {};
    // Centroids are below 2^6: with activations below 2^(9 - log2 V) inner products stay below 2^15.
    int exponent;
    if (bf16) {
      exponent = min(135 - kLogV - (largest >> 7), 126);
      const float factor = __int_as_float((127 + exponent) << 23);
#pragma unroll
      for (unsigned& word : words.of) {
        const __half2 pair = __floats2half2_rn(__uint_as_float(word << 16) * factor,
                                               __uint_as_float(word & 0xFFFF0000U) * factor);
        word = *reinterpret_cast<const unsigned*>(&pair);
      }
    } else {
      exponent = min(23 - kLogV - (largest >> 10), 15);
      const auto bits = static_cast<unsigned short>((15 + exponent) << 10);
      const __half2 factor = __half2half2(__ushort_as_half(bits));
#pragma unroll
      for (unsigned& word : words.of) word = detail::scale_pair(word, factor);
    }
    keep(staged, words.of, finite ? unscale_of(exponent) : __int_as_float(0x7FC00000), token);
  }
  /// The same of fp32 activations times others, of the 512 columns from number `k0` on, of `cols`, a multiple
  /// of 4.
  static __device__ __forceinline__ void stage_products(char* staged, const float* x, const float* factors,
                                                        int cols, int k0) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    float4 fours[4];
    float4 by[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const int k = k0 + activation_of(lane, 2 * f);
      fours[f] = k < cols ? *reinterpret_cast<const float4*>(x + k) : float4{};
      by[f] = k < cols ? *reinterpret_cast<const float4*>(factors + k) : float4{};
    }
    unsigned most = 0;
    const auto times = [&](float& value, float factor) {
      value *= factor;
      most = max(most, __float_as_uint(value) & 0x7FFFFFFFU);
    };
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      times(fours[f].x, by[f].x);
      times(fours[f].y, by[f].y);
      times(fours[f].z, by[f].z);
      times(fours[f].w, by[f].w);
    }
    const int largest = static_cast<int>(__reduce_max_sync(0xFFFFFFFFU, most));
    const int exponent = min(135 - kLogV - (largest >> 23), 126);
    const float factor = __int_as_float((127 + exponent) << 23);
    unsigned words[8];
    const auto halves = [&](float low, float high) {
      const __half2 pair = __floats2half2_rn(low * factor, high * factor);
      return *reinterpret_cast<const unsigned*>(&pair);
    };
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      words[2 * f] = halves(fours[f].x, fours[f].y);
      words[2 * f + 1] = halves(fours[f].z, fours[f].w);
    }
    keep(staged, words, unscale_of(exponent), 0);
  }
  /// What a token's sums of the granule are to be multiplied by.
  [[nodiscard]] static __device__ __forceinline__ float unscale(const char* staged, int token = 0) {
    return *reinterpret_cast<const float*>(staged + kUnscaleAt + token * 4);
  }

  /// Writes the inner products of 8 centroids: a warp's share of the table. Rows of the product are centroids
  /// of P = 0 and 1 in turn, its columns the halves of four owners' activations (of two tokens the same half
  /// of both): what a thread gets of a row is a word, and that of four products lies together, so that the
  /// lanes of a store hit every bank.
  static __device__ __forceinline__ void build(char* table, const char* staged, const Centroids& centroids,
                                               int block) {
    unsigned lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane));  // what follows from it is not worth registers while warps gather
    const unsigned p = lane / 4 % 2;
    // Thread 4 g + q gets owners 4 q + i and 4 q + i + 16 from products i and i + 4. So row r of the i-th
    // matrix of activations is half r % 2 of owner 4 (r / 2) + i.
    const auto from = static_cast<unsigned>(__cvta_generic_to_shared(staged)) +
                      staged_at(lane / 2 % 4 * 4 + lane / 8) + lane % 2 * 16U;
    char* const to = table + block * 2048 + lane / 8 * 256 + p * 128 + lane % 4 * 16;
#pragma unroll
    for (unsigned i = 0; i < 2 * Tokens; ++i) {
      const unsigned high = i % 2;
      unsigned halves[4];
      detail::load_matrices(from + high * staged_at(16) + i / 2 * kHalfStagedBytes, halves);
      unsigned d[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) detail::multiply_halves(d[j], centroids.pairs, halves[j]);
      char* const words = to + (p ^ high) * 64 + i / 2 * kHalfTableBytes;
      *reinterpret_cast<uint4*>(words) = make_uint4(d[0][0], d[1][0], d[2][0], d[3][0]);
      *reinterpret_cast<uint4*>(words + 1024) = make_uint4(d[0][1], d[1][1], d[2][1], d[3][1]);
    }
  }

  /// Ones and zeros of gather(), a byte for each pair of slots that gets 1.0's high byte in the lanes that
  /// hold the column of the pair's rows.
  struct Ones {
    unsigned bytes[2];  ///< of fp16's 1.0, each 0x3C or 0
  };
  /// For scales of groups of 2^Steps lanes.
  template <int Steps>
  [[nodiscard]] static __device__ __forceinline__ Ones ones() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int n = lane / 4;  // column of the product
    const int q = lane % 4;  // whose words they are
    // Lane 4 g + q ends with rows (row_slot(4 g + q, slot)): column 2 q + h is for slots of q's row bits.
    int pair;
    bool none = false;
    if constexpr (Steps >= 2) {
      pair = ((n >> 1 & 1) * 4 + (n >> 2) * 2 + (n & 1)) ^ (q % 2 * 4 + q / 2 * 2);
    } else {  // lanes 2 and 3 of four have columns of their own
      none = n >> 2 != q / 2;
      pair = ((n >> 1 & 1) ^ q % 2) * 2 + (n & 1);
    }
    Ones out;
    out.bytes[0] = none || pair >= 4 ? 0U : 0x3CU << (8 * pair);
    out.bytes[1] = none || pair < 4 ? 0U : 0x3CU << (8 * (pair - 4));
    return out;
  }

  /// Values that a lane ends with: one for each of its first slots, after the sum over 2^kSummedSteps lanes.
  template <int Steps>
  static constexpr int kSums = Steps >= 2 ? 4 : 8;
  /// @copydoc kSums
  template <int Steps>
  static constexpr int kSummedSteps = Steps >= 2 ? 2 : 1;

  /// Where a lane finds its words of P = 0 (the lowest byte) and 1 (the next), see gather().
  [[nodiscard]] static __device__ __forceinline__ unsigned column_bytes(int lane) {
    return static_cast<unsigned>(lane * 4) | (128U + static_cast<unsigned>((lane ^ 16) * 4)) << 8;
  }

  /// sums[t][i] = token t's sum of row row_slot(lane, i) over the columns of the lane's group of
  /// 2^kSummedSteps lanes.
  /// `codes` is the lane's stream of 16 rows, `column` the table's address in the shared window less
  /// kWindowStart (of which the lowest 16 bits are 0) plus column_bytes(lane).
  template <int Steps>
  static __device__ __forceinline__ void gather(unsigned column, const uint4 (&codes)[4], Ones ones,
                                                float (&sums)[Tokens][kSums<Steps>]) {
    static_assert(Steps >= 1, "codegemm: HalfPsumbook wants groups of at least two lanes with one scale");
    float d[Tokens][2][4];
    asm volatile("" : "+r"(ones.bytes[0]), "+r"(ones.bytes[1]));  // two registers, not sixteen
    const auto look = [&](unsigned word, int p) {
      const auto column_byte = static_cast<unsigned>(4 + p % 2);
      const unsigned at = __byte_perm(word, column, 0x7600U | (static_cast<unsigned>(p) << 4) | column_byte);
      constexpr int kStart = static_cast<int>(kWindowStart);
      return Tokens == 1 || p < 2 ? detail::load_word<kStart>(at)
                                  : detail::load_word<kStart + static_cast<int>(kHalfTableBytes)>(at);
    };
#pragma unroll
    for (int c = 0; c < 4; ++c) {  // slots 2 c, 2 c + 8, 2 c + 1, 2 c + 9
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const unsigned even = high == 0 ? codes[c].x : codes[c].y;
        const unsigned odd = high == 0 ? codes[c].z : codes[c].w;
        const int pair = Steps >= 2 ? high * 4 + c : high * 2 + c / 2;
        const unsigned byte = static_cast<unsigned>(pair % 4);
        const unsigned low_one = __byte_perm(ones.bytes[pair / 4], 0U, 0x4404U | (byte << 4));
        const unsigned high_one = __byte_perm(ones.bytes[pair / 4], 0U, 0x0444U | (byte << 12));
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const unsigned a[4] = {look(even, p), look(odd, p), look(even, p + 2), look(odd, p + 2)};
          const int sum = Steps >= 2 ? p : c % 2;
          const bool first = Steps >= 2 ? c == 0 && high == 0 : c < 2 && high == 0 && p == 0;
          if constexpr (Tokens == 1) {  // columns 0 and 1 are low halves, 2 and 3 high ones
            detail::mma_pairs<PairType::kHalf>(d[0][sum], a, low_one, high_one, first);
          } else {
            detail::mma_pairs<PairType::kHalf>(d[0][sum], a, low_one, low_one, first);
            detail::mma_pairs<PairType::kHalf>(d[1][sum], a, high_one, high_one, first);
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      if constexpr (Steps >= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][i / 2 + i % 2 * 2] = d[t][0][i] + d[t][1][i];
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[t][i % 2 * 4 + i / 4 * 2 + i % 4 / 2] = d[t][i / 4][i % 4];
      }
    }
  }

 private:
  // An owner's activations; the gaps spread the rows of a matrix over all banks.
  [[nodiscard]] static __device__ __forceinline__ unsigned staged_at(unsigned owner) {
    return owner * 32 + owner / 4 * 32;
  }
  static constexpr int kUnscaleAt = 1280;

  [[nodiscard]] static __device__ __forceinline__ float unscale_of(int exponent) {
    return __int_as_float((127 - exponent) << 23);
  }

  // Activations times 2^exponent: an owner's halves side by side, or those of two tokens and the second
  // halves of both further on.
  static __device__ __forceinline__ void keep(char* staged, const unsigned (&words)[8], float unscale,
                                              int token) {
    const unsigned lane = threadIdx.x % 32;
    char* const to = staged + staged_at(lane) + token * 16;
    constexpr std::size_t kNext = Tokens == 1 ? 16 : kHalfStagedBytes;
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    *reinterpret_cast<uint4*>(to + kNext) = make_uint4(words[4], words[5], words[6], words[7]);
    if (lane == 0) *reinterpret_cast<float*>(staged + kUnscaleAt + token * 4) = unscale;
  }
};

/// The rest of reduce_rows() for what HalfPsumbook::gather() leaves.
template <int ScaleSteps, int N>
[[nodiscard]] __device__ __forceinline__ float reduce_summed_rows(float (&sums)[N], const __half* scales) {
  constexpr int kSummed = N == 4 ? 2 : 1;
  constexpr int kBefore = ScaleSteps < 4 ? ScaleSteps : 4;
  static_assert(N == 4 || N == 8, "codegemm: reduce_summed_rows has four or eight sums");
  detail::reduce_steps<kSummed, kBefore>(sums);
  if constexpr (ScaleSteps <= 4) {
#pragma unroll
    for (int i = 0; i < 16 >> kBefore; ++i) sums[i] *= __half2float(scales[i]);
  }
  detail::reduce_steps<kBefore, 4>(sums);
  return sums[0] + __shfl_xor_sync(0xFFFFFFFFU, sums[0], 16);
}

}  // namespace codegemm::cuda
