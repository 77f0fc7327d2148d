// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/fixed_psumbook.cuh - a Psumbook of 16-bit integers: half the shared memory of
// psumbook.cuh's, fewer instructions to build it, sums without rounding.
// Layer: cuda/block (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/tile_layout.hpp>

namespace codegemm::cuda {
namespace detail {

// A 16-bit integer at byte `at` of shared memory.
[[nodiscard]] __device__ __forceinline__ int load_entry(unsigned at) {
  int out;
  asm volatile("ld.shared.s16 %0, [%1];" : "=r"(out) : "r"(at));
  return out;
}

}  // namespace detail

/// The Psumbook of one granule of 512 columns and one token, for 256 centroids a codebook and four columns a
/// lane, numbered p = 0 .. 3 as in Psumbook. An entry is an integer: the inner product times a power of two
/// of the lane's own, chosen from its activations so that no product exceeds 16 bits. So the error of a
/// lane's sum is relative to the largest of its own segments, whatever the other lanes hold.
///
/// Entry (code, p, l) lies at byte  code * 256 + p / 2 * 128 + l * 4 + p % 2 * 2  of the table: a gather never
/// has a bank conflict, and code and lane become an address by one byte permute.
///
/// Centroids are below 64 in size, as pack() makes them. Finite activations are at most 2^110 in size;
/// infinity and NaN make the sums of their lane NaN. For whole blocks of kThreads threads.
template <int V, int Codebooks>
struct FixedPsumbook {
  static_assert((V == 4 && Codebooks == 1) || (V == 8 && Codebooks == 2),
                "codegemm: FixedPsumbook is for v = 4 with one codebook and v = 8 with two");

  static constexpr int kThreads = 512;                    ///< of a block: one for each column of K
  static constexpr int kSpan = 512;                       ///< k covered
  static constexpr int kSegmentsPerLane = 4 / Codebooks;  ///< segments that a lane owns
  static constexpr int kTableBytes = 65536;               ///< entries
  static constexpr int kPad = V == 4 ? 4 : 8;             ///< words after four lanes' activations, for banks
  static constexpr int kFactorsAt = kTableBytes + (512 + 8 * kPad) * 4;  ///< fp32 [32]
  static constexpr int kBytes = kFactorsAt + 32 * 4;  ///< of shared memory, at a multiple of 1024
  static constexpr int kBlocksOf16 = 2;               ///< times 16 centroids that a warp multiplies

  /// Where the table lies in shared memory, of 2^16 bytes: it is the first thing in the dynamic part of a kernel
  /// that has no other, behind what the hardware keeps for itself. A constant, so that it costs no instruction
  /// a lookup.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr unsigned kTableAt = 0;
#else
  static constexpr unsigned kTableAt = 1024;
#endif
  /// What a lane's addresses begin with, once a kernel; stops the kernel where the table lies elsewhere. The
  /// upper bits name the block of a cluster.
  [[nodiscard]] static __device__ __forceinline__ unsigned lane_address(const char* table) {
    const unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(table)) - kTableAt;
    if ((base & 0xFFFFU) != 0) __trap();
    return base + threadIdx.x % 32 * 4;
  }

  /// What a thread holds of a warp's centroids, as bits of fp16: of rows g and g + 8 of a block of 16, element
  /// q (v = 4), or 2q and 2q + 1.
  struct Centroids {
    unsigned a[kBlocksOf16][Codebooks][2];  ///< [blocks][codebooks][rows]
  };

  /// The centroids that this thread's warp builds with, fp16 [Codebooks][256][V].
  [[nodiscard]] static __device__ __forceinline__ Centroids load_centroids(const std::uint16_t* codebooks) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    Centroids out;
#pragma unroll
    for (int i = 0; i < kBlocksOf16; ++i) {
#pragma unroll
      for (int c = 0; c < Codebooks; ++c) {
        const std::uint16_t* const at =
            codebooks + (c * 256 + (warp / 2 + i * 8) * 16 + lane / 4) * V + lane % 4 * (V / 4);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if constexpr (V == 4)
            out.a[i][c][r] = __ldg(at + r * 8 * V);
          else
            out.a[i][c][r] = __ldg(reinterpret_cast<const unsigned*>(at + r * 8 * V));
        }
      }
    }
    return out;
  }

  /// Thread t gives activation t of the granule (0 beyond K). Behind it the block meets (__syncthreads) before
  /// build(); before it, all have called build() for the granule before.
  static __device__ __forceinline__ void stage(char* table, float x) {
    // The largest sum of |x| over a segment of this thread's lane of the granule, 2^-8 of it: exponents of a
    // product's bound, 64 times the sum, then stay below 255. As an integer, so that NaN is the largest.
    float sum = fabsf(x) * 0x1p-8F;
#pragma unroll
    for (int step = 1; step < V; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFU, sum, step);
    unsigned most = __float_as_uint(sum);
#pragma unroll
    for (int step = V; step < 16; step *= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFU, most, step));
    // most < 2^(e - 126): 64 * 2^8 * most * 2^(127 - e) < 2^15, with room for the rounding since a centroid
    // is at most 63.97.
    const unsigned e = max(most >> 23, 1U);
    const int t = static_cast<int>(threadIdx.x);
    reinterpret_cast<float*>(table + kTableBytes)[t + t / 64 * kPad] = x * __uint_as_float((254U - e) << 23);
    if (t % 16 == 0) reinterpret_cast<float*>(table + kFactorsAt)[t / 16] = __uint_as_float(e << 23);
  }

  /// What a lane's sums are multiplied by, once they are staged; held in a register from before the barrier
  /// behind build() on.
  [[nodiscard]] static __device__ __forceinline__ float factor(const char* table) {
    return reinterpret_cast<const float*>(table + kFactorsAt)[threadIdx.x % 32];
  }

  /// Fills the table from what is staged. The block meets before anybody gathers.
  static __device__ __forceinline__ void build(char* table, const Centroids& centroids) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int pair = warp % 2;  // positions 2 * pair and the next, which share a word of the table
    const int g = lane / 4;
    const int q = lane % 4;
    // Operand B: eight lanes of the granule in each of four products. Which ones, is chosen for the stores: a
    // thread ends up with lanes 4q .. 4q + 3 and 16 + 4q .. 16 + 4q + 3.
    const float* const staged = reinterpret_cast<const float*>(table + kTableBytes);
    constexpr int kOperands = Codebooks == 1 ? 2 : 1;  // segments: one codebook has one for each position
    float b[kOperands][4][V / 4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int owner = n / 2 * 16 + g / 2 * 4 + n % 2 * 2 + g % 2;
#pragma unroll
      for (int s = 0; s < kOperands; ++s) {
#pragma unroll
        for (int j = 0; j < V / 4; ++j) {
          b[s][n][j] = staged[owner * 16 + owner / 4 * kPad + (pair * kOperands + s) * V + q * (V / 4) + j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBlocksOf16; ++i) {
      float a[Codebooks][V / 2];  // rows g and g + 8 of the first half of k, then of the second
#pragma unroll
      for (int c = 0; c < Codebooks; ++c) {
#pragma unroll
        for (int j = 0; j < V / 2; ++j) {
          const unsigned bits = centroids.a[i][c][j % 2] >> (j / 2 * 16);
          a[c][j] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
        }
      }
      unsigned words[2][8];  // [codes g and g + 8][lanes]
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float low[4];
        float high[4];
        if constexpr (V == 4) {
          detail::product_tf32_k4(low, a[0], b[0][n][0]);
          detail::product_tf32_k4(high, a[0], b[kOperands - 1][n][0]);
        } else {
          detail::product_tf32_k8(low, a[0], b[0][n]);
          detail::product_tf32_k8(high, a[Codebooks - 1], b[kOperands - 1][n]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          words[k / 2][n * 2 + k % 2] =
              __byte_perm(__float_as_uint(low[k] + kMagic), __float_as_uint(high[k] + kMagic), 0x5410U);
        }
      }
      // Eight threads store at a time, of two codes: one stores its upper lanes first.
      const bool odd = g % 2 != 0;
      char* const to = table + ((warp / 2 + i * 8) * 16 + g) * 256 + pair * 128 + q * 16;
      char* const first = to + (odd ? 64 : 0);
      char* const second = to + (odd ? 0 : 64);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const unsigned(&w)[8] = words[r];
        *reinterpret_cast<uint4*>(first + r * 2048) =
            make_uint4(odd ? w[4] : w[0], odd ? w[5] : w[1], odd ? w[6] : w[2], odd ? w[7] : w[3]);
        *reinterpret_cast<uint4*>(second + r * 2048) =
            make_uint4(odd ? w[0] : w[4], odd ? w[1] : w[5], odd ? w[2] : w[6], odd ? w[3] : w[7]);
      }
    }
  }

  /// sums[i] = the sum of slot i over the lane's columns. codes is the lane's stream of 16 rows
  /// (tile_layout.hpp), address and factor what lane_address() and factor() gave.
  static __device__ __forceinline__ void gather(unsigned address, const uint4 (&codes)[4], float factor,
                                                float (&sums)[16]) {
    const float offset = -kMagic * factor;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int byte = stream_offset(4, i, 0);
      const uint4& four = codes[byte / 16];
      const unsigned word = byte / 4 % 4 == 0   ? four.x
                            : byte / 4 % 4 == 1 ? four.y
                            : byte / 4 % 4 == 2 ? four.z
                                                : four.w;
      int entry[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        // bytes of the address: that of the lane, the code, the block in the cluster
        const unsigned at = __byte_perm(word, address, 0x7604U | (static_cast<unsigned>(p) << 4));
        entry[p] = detail::load_entry(at + kTableAt + static_cast<unsigned>(p / 2 * 128 + p % 2 * 2));
      }
      // The bits of kMagic plus an integer of up to 22 bits are those of their sum.
      const int sum = entry[0] + entry[1] + entry[2];
      sums[i] = fmaf(__int_as_float(sum + entry[3] + __float_as_int(kMagic)), factor, offset);
    }
  }

 private:
  static constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: its last bit stands for 1
};

}  // namespace codegemm::cuda
