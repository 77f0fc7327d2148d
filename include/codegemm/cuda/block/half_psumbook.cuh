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

// The word `Offset` bytes behind an address of the shared window.
template <int Offset>
__device__ __forceinline__ unsigned load_word(unsigned address) {
  unsigned out;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(out) : "r"(address), "n"(Offset));
  return out;
}

}  // namespace detail

/// The Psumbook of one granule of 512 activations and one token, for V = 4 and one codebook or V = 8 and two,
/// of 256 centroids. Lane l owns 16 activations, four columns, as in Psumbook. Two inner products share a
/// word: those of columns P and P + 2 of a lane with the same centroid of column P's codebook, P = 0, 1. Word
/// (code, P, lane) lies at byte  code * 256 + P * 128 + lane * 4, so that a lane always reads its own bank.
///
/// Inner products are rounded to fp16 once (2^-12 of each at most, in the mean); what is added up from them
/// is fp32. Activations are multiplied by a power of two first, the granule's own, so that none overflows and
/// what underflows is below 2^-30 of the largest.
///
/// A gather is a permute and a load for each code; the word goes to mma.sync as it is. There a matrix of ones
/// and zeros takes the half that was meant, puts its sum into the column of its row, and adds up four lanes.
/// (A look-up's other half is multiplied by zero: an infinite or NaN activation makes every output NaN.)
///
/// All functions are for whole warps.
template <int V, int Codebooks>
struct HalfPsumbook {
  static_assert((V == 4 && Codebooks == 1) || (V == 8 && Codebooks == 2),
                "codegemm: HalfPsumbook is for V = 4 and one codebook, or V = 8 and two");

  static constexpr int kSets = 4;           ///< columns that a lane owns
  static constexpr int kActivations = 512;  ///< k covered
  /// Bytes of shared memory, kWindowStart behind a multiple of that in the shared window: a code and a lane
  /// become an address by one permute.
  static constexpr int kBytes = static_cast<int>(kHalfTableBytes);
  static constexpr int kCodeBlocks = 32;  ///< blocks of 8 codes
  static constexpr int kStagedBytes =
      static_cast<int>(kHalfStagedBytes);       ///< a granule's activations as stage() leaves them
  static constexpr int kLogV = V == 4 ? 2 : 3;  ///< log2 of V

  /// What a thread holds of 8 centroids (of each codebook).
  struct Centroids {
    unsigned pairs[2];  ///< two values each: of one centroid (V = 4), or of one of each codebook
  };

  /// Centroids 8 * block .. 8 * block + 7.
  [[nodiscard]] static __device__ __forceinline__ Centroids load_centroids(const std::uint16_t* codebooks,
                                                                           int block) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned centroid = static_cast<unsigned>(block * 8) + lane / 4;
    const auto* const words = reinterpret_cast<const unsigned*>(codebooks);
    Centroids out;
    if constexpr (V == 4) {
      const uint2 both = __ldg(reinterpret_cast<const uint2*>(words) + centroid);
      out.pairs[0] = both.x, out.pairs[1] = both.y;
    } else {
#pragma unroll
      for (unsigned c = 0; c < 2; ++c) out.pairs[c] = __ldg(words + (c * 256 + centroid) * 4 + lane % 4);
    }
    return out;
  }

  /// The first of the two activations of a granule in word `f` of a lane, 0 <= f < 8: words 0 .. 3 and 4 .. 7
  /// are A fragments. Their rows g and g + 8 are two segments of an owner, whose inner products share a word;
  /// their k are those segments of other owners, of one in each lane (V = 4) or in each half of k.
  [[nodiscard]] static __device__ __forceinline__ int activation_of(int lane, int f) {
    const int g = lane / 4;
    const int q = lane % 4;
    const int r = f % 4;
    return V == 4 ? (g + q * 8) * 16 + r % 2 * 8 + f / 4 * 4 + r / 2 * 2
                  : (g + r / 2 * 8 + f / 4 * 16) * 16 + r % 2 * 8 + q * 2;
  }

  /// A warp's 512 activations, as pairs of the type that they have in memory.
  struct Words {
    unsigned of[8];  ///< see activation_of()
  };
  /// The activations from number `k0` on.
  [[nodiscard]] static __device__ __forceinline__ Words load(const Activations& x, int k0) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    Words out;
    constexpr unsigned kBytes = V == 4 ? 16 : 4;  // of a load
    if (k0 + kActivations <= x.cols && (reinterpret_cast<std::uintptr_t>(x.x) + k0 * 2ULL) % kBytes == 0) {
      const std::uint16_t* const from = x.x + k0;
      if constexpr (V == 4) {
#pragma unroll
        for (int f = 0; f < 2; ++f) {  // and f + 2, f + 4, f + 6
          const uint4 eight = *reinterpret_cast<const uint4*>(from + activation_of(lane, f));
          out.of[f] = eight.x, out.of[f + 2] = eight.y, out.of[f + 4] = eight.z, out.of[f + 6] = eight.w;
        }
      } else {
#pragma unroll
        for (int f = 0; f < 8; ++f)
          out.of[f] = *reinterpret_cast<const unsigned*>(from + activation_of(lane, f));
      }
    } else {
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        const int k = k0 + activation_of(lane, f);
        out.of[f] = x.bits(k) | static_cast<unsigned>(x.bits(k + 1)) << 16;
      }
    }
    return out;
  }

  /// Leaves them in `staged` (kStagedBytes, at a multiple of 16) as build() wants them. One warp.
  static __device__ __forceinline__ void stage(char* staged, Words words, bool bf16) {
    unsigned most = 0;
#pragma unroll
    for (int f = 0; f < 8; ++f) most = __vmaxu2(most, words.of[f] & 0x7FFF7FFFU);
    most = max(most & 0xFFFFU, most >> 16);
    const int largest = static_cast<int>(__reduce_max_sync(0xFFFFFFFFU, most));
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
    keep(staged, words.of, exponent);
  }
  /// What a lane holds of RMSNorm's weights for stage_products().
  struct Factors {
    float2 pairs[8];  ///< as the words of stage()
  };
  /// Those of the 512 columns from number `k0` on, of `cols`, an even number.
  [[nodiscard]] static __device__ __forceinline__ Factors load_factors(const float* weight, int cols,
                                                                       int k0) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    Factors out;
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const int k = k0 + activation_of(lane, f);
      out.pairs[f] = k < cols ? __ldg(reinterpret_cast<const float2*>(weight + k)) : make_float2(0.0F, 0.0F);
    }
    return out;
  }
  /// The same as stage() of fp32 activations times these.
  static __device__ __forceinline__ void stage_products(char* staged, const float* x, const Factors& factors,
                                                        int cols, int k0) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    float2 pairs[8];
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const int k = k0 + activation_of(lane, f);
      pairs[f] = k < cols ? *reinterpret_cast<const float2*>(x + k) : make_float2(0.0F, 0.0F);
    }
    unsigned most = 0;
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      pairs[f].x *= factors.pairs[f].x;
      pairs[f].y *= factors.pairs[f].y;
      most = max(most,
                 max(__float_as_uint(pairs[f].x) & 0x7FFFFFFFU, __float_as_uint(pairs[f].y) & 0x7FFFFFFFU));
    }
    const int largest = static_cast<int>(__reduce_max_sync(0xFFFFFFFFU, most));
    const int exponent = min(135 - kLogV - (largest >> 23), 126);
    const float factor = __int_as_float((127 + exponent) << 23);
    unsigned words[8];
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const __half2 pair = __floats2half2_rn(pairs[f].x * factor, pairs[f].y * factor);
      words[f] = *reinterpret_cast<const unsigned*>(&pair);
    }
    keep(staged, words, exponent);
  }
  /// What sums of the granule are to be multiplied by.
  [[nodiscard]] static __device__ __forceinline__ float unscale(const char* staged) {
    return *reinterpret_cast<const float*>(staged + 1024);
  }

  /// Writes the inner products of 8 centroids: a warp's share of the table. Four products with the centroids
  /// in one quarter of k each: a thread's results are then of other owners in each, and the 32 lanes of a
  /// store hit 32 banks.
  static __device__ __forceinline__ void build(char* table, const char* staged, const Centroids& centroids,
                                               int block) {
    unsigned lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane));  // what follows from it is not worth registers while warps gather
    const unsigned g = lane / 4 % 8;
    const unsigned q = lane % 4;
    const uint4 low = reinterpret_cast<const uint4*>(staged)[lane];
    const uint4 high = reinterpret_cast<const uint4*>(staged)[lane + 32];
    const unsigned a[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
    char* const rows = table + block * 2048 + q * 512 + g * 4;
    // In product i centroid g is multiplied with owners 8 ((g / 2 + i) % 4) and up.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned owners = (g / 2 + static_cast<unsigned>(i)) % 4;
      float d[2][4];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        if constexpr (V == 4) {
          detail::mma_pairs<PairType::kHalf>(d[p], a[p], owners == q ? centroids.pairs[0] : 0U,
                                             owners == q ? centroids.pairs[1] : 0U, true);
        } else {
          const unsigned pair = centroids.pairs[p];
          detail::mma_pairs<PairType::kHalf>(d[p], a[0], owners == 0 ? pair : 0U, owners == 1 ? pair : 0U,
                                             true);
          detail::mma_pairs<PairType::kHalf>(d[p], a[1], owners == 2 ? pair : 0U, owners == 3 ? pair : 0U,
                                             false);
        }
      }
      char* const to = rows + (q + static_cast<unsigned>(i)) % 4 * 32;
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        *reinterpret_cast<__half2*>(to + p * 128) = __floats2half2_rn(d[p][0], d[p][2]);
        *reinterpret_cast<__half2*>(to + p * 128 + 256) = __floats2half2_rn(d[p][1], d[p][3]);
      }
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

  /// sums[i] = the sum of row row_slot(lane, i) over the columns of the lane's group of 2^kSummedSteps lanes.
  /// `codes` is the lane's stream of 16 rows, `column` the table's address in the shared window less
  /// kWindowStart (of which the lowest 16 bits are 0) plus 4 * lane.
  template <int Steps>
  static __device__ __forceinline__ void gather(unsigned column, const uint4 (&codes)[4], Ones ones,
                                                float (&sums)[kSums<Steps>]) {
    static_assert(Steps >= 1, "codegemm: HalfPsumbook wants groups of at least two lanes with one scale");
    float d[2][4];
    asm volatile("" : "+r"(ones.bytes[0]), "+r"(ones.bytes[1]));  // two registers, not sixteen
    const auto look = [&](unsigned word, int p) {
      const unsigned at = __byte_perm(word, column, 0x7604U | (static_cast<unsigned>(p) << 4));
      constexpr int kStart = static_cast<int>(kWindowStart);
      return p % 2 == 0 ? detail::load_word<kStart>(at) : detail::load_word<kStart + 128>(at);
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
        for (int p = 0; p < 2; ++p) {  // columns 0 and 1 are low halves, 2 and 3 high ones
          const unsigned a[4] = {look(even, p), look(odd, p), look(even, p + 2), look(odd, p + 2)};
          const int sum = Steps >= 2 ? p : c % 2;
          const bool first = Steps >= 2 ? c == 0 && high == 0 : c < 2 && high == 0 && p == 0;
          detail::mma_pairs<PairType::kHalf>(d[sum], a, low_one, high_one, first);
        }
      }
    }
    if constexpr (Steps >= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i / 2 + i % 2 * 2] = d[0][i] + d[1][i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i % 2 * 4 + i / 4 * 2 + i % 4 / 2] = d[i / 4][i % 4];
    }
  }

 private:
  // Activations times 2^exponent.
  static __device__ __forceinline__ void keep(char* staged, const unsigned (&words)[8], int exponent) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    uint4* const to = reinterpret_cast<uint4*>(staged) + lane;
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
    to[32] = make_uint4(words[4], words[5], words[6], words[7]);
    if (lane == 0) *reinterpret_cast<float*>(staged + 1024) = __int_as_float((127 - exponent) << 23);
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
