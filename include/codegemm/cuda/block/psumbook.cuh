// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/psumbook.cuh - a Psumbook in shared memory: a block builds it, its warps gather from
// it.
// Layer: cuda/block (device).
// See: examples/05_psumbook_block.cu
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/tile_layout.hpp>

namespace codegemm::cuda {

/// Activations of one token, fp16 or bf16, as bits. Reads beyond `cols` give 0.
struct Activations {
  const std::uint16_t* x = nullptr;  ///< [cols]
  int cols = 0;                      ///< activations
  bool bf16 = false;                 ///< bf16 instead of fp16

  /// The bits of activation k; 0 beyond cols.
  [[nodiscard]] __device__ __forceinline__ std::uint16_t bits(int k) const {
    return k < cols ? x[k] : std::uint16_t{0};
  }
  /// What such bits stand for.
  [[nodiscard]] __device__ __forceinline__ float value(std::uint16_t bits) const {
    return bf16 ? __uint_as_float(static_cast<unsigned>(bits) << 16) : __half2float(__ushort_as_half(bits));
  }
};

/// The Psumbook of one *granule*: 32 * Sets columns, for Tokens tokens. A column is one codebook's inner
/// products with one segment of V activations. Lane l of every warp owns the columns of the segments l * J ..
/// l * J + J - 1 (J = Sets / Codebooks, all codebooks), numbered p = 0 .. Sets - 1: segment l * J + p /
/// Codebooks, codebook p % Codebooks.
///
/// Word (t, code, p, l) lies at byte  plane(t, p) + code * 256 + l * 4, so that
/// - whatever the codes are, a lane reads its own bank: a gather never has a bank conflict;
/// - code and lane become an address by one byte permute: a lookup is permute, load, add.
///
/// V = 0: the vector length is the run-time argument `v`. All functions are for whole warps.
template <int V, int Codebooks, int Sets, int Tokens = 1>
struct Psumbook {
  static_assert(V == 0 || V == 2 || V == 4 || V == 8 || V == 16,
                "codegemm: Psumbook V must be 2, 4, 8, 16 or 0");
  static_assert(Codebooks >= 1 && Sets % Codebooks == 0,
                "codegemm: Psumbook Sets must be a multiple of Codebooks");
  static_assert(Tokens >= 1, "codegemm: Psumbook Tokens must be 1 or more");

  static constexpr int kColumns = 32 * Sets;                 ///< columns of a granule
  static constexpr int kSegmentsPerLane = Sets / Codebooks;  ///< segments that a lane owns
  static constexpr int kSegments = 32 * kSegmentsPerLane;    ///< k covered: kSegments * v
  static constexpr int kPlanes = Sets * Tokens;              ///< one for each set and token

  /// Bytes of shared memory for codes of `bits` bits (4 to 8).
  [[nodiscard]] static __host__ __device__ constexpr int bytes(int bits) {
    return (kPlanes - 1) / 2 * 65536 + (1 << bits) * 256 - (kPlanes % 2) * 128;
  }
  /// Byte offset of position p for a token.
  [[nodiscard]] static __host__ __device__ constexpr int plane(int token, int p) {
    return (token * Sets + p) / 2 * 65536 + (token * Sets + p) % 2 * 128;
  }

  /// k8 steps of one inner product; a v of 2 or 4 fills a half step.
  static constexpr int kSteps = V == 16 ? 2 : 1;
  static constexpr bool kHalfStep = V == 2 || V == 4;  ///< only half of a k8 step is used

  /// What a thread holds of 8 centroids: the B operand of the product. Kept as they were loaded, so that
  /// nothing waits for them before they are used.
  struct Centroids {
    std::uint16_t b[kSteps][2];  ///< two values each
  };
  /// What a thread holds of a position's 32 segments: the A operand, as the bits that were loaded.
  struct Segments {
    std::uint16_t a[2][kSteps][4];  ///< [rows][steps][values]
  };

  /// Centroids 8 * block .. 8 * block + 7 of one codebook.
  [[nodiscard]] static __device__ __forceinline__ Centroids load_centroids(const std::uint16_t* codebook,
                                                                           int block, int v, int step = 0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint16_t* const centroid = codebook + (block * 8 + lane / 4) * v;
    Centroids out;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = (step + s) * 8 + lane % 4;
      out.b[s][0] = V >= 4 || k < v ? centroid[k] : std::uint16_t{0};
      out.b[s][1] = !kHalfStep && (V >= 8 || k + 4 < v) ? centroid[k + 4] : std::uint16_t{0};
    }
    return out;
  }

  /// Position p of the granule whose first activation is number `k0`.
  [[nodiscard]] static __device__ __forceinline__ Segments load_segments(const Activations& x, int k0, int p,
                                                                         int v, int step = 0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Segments out;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < (kHalfStep ? 2 : 4); ++i) {
          const int owner = half * 16 + i % 2 * 8 + lane / 4;
          const int k = (step + s) * 8 + i / 2 * 4 + lane % 4;
          const int segment = owner * kSegmentsPerLane + p / Codebooks;
          out.a[half][s][i] = k < v ? x.bits(k0 + segment * v + k) : std::uint16_t{0};
        }
      }
    }
    return out;
  }

  /// d += the inner products of 8 centroids with the position's 32 segments.
  static __device__ __forceinline__ void multiply(float (&d)[2][4], const Activations& x,
                                                  const Centroids& centroids, const Segments& segments) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if constexpr (kHalfStep) {
          const float a[2] = {x.value(segments.a[half][s][0]), x.value(segments.a[half][s][1])};
          detail::mma_tf32_k4(d[half], a, __half2float(__ushort_as_half(centroids.b[s][0])));
        } else {
          const float a[4] = {x.value(segments.a[half][s][0]), x.value(segments.a[half][s][1]),
                              x.value(segments.a[half][s][2]), x.value(segments.a[half][s][3])};
          const float b[2] = {__half2float(__ushort_as_half(centroids.b[s][0])),
                              __half2float(__ushort_as_half(centroids.b[s][1]))};
          detail::mma_tf32_k8(d[half], a, b);
        }
      }
    }
  }

  /// Writes the 8 x 32 inner products. In a product's fragment eight lanes share a code and differ in the
  /// segment, and four differ in the code alone: stored as they are, they would hit eight banks. Rotated by
  /// the code, the 32 lanes of each store hit 32 banks.
  static __device__ __forceinline__ void store(char* table, int token_plane, int block,
                                               const float (&d)[2][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int q = lane % 4;
    char* const base = table + token_plane + block * 2048 + q * 512 + lane / 4 * 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float v0 = d[0][e], v1 = d[0][2 + e], v2 = d[1][e], v3 = d[1][2 + e];
      const float s0 = (q & 1) != 0 ? v1 : v0, s1 = (q & 1) != 0 ? v2 : v1;
      const float s2 = (q & 1) != 0 ? v3 : v2, s3 = (q & 1) != 0 ? v0 : v3;
      const float r[4] = {(q & 2) != 0 ? s2 : s0, (q & 2) != 0 ? s3 : s1, (q & 2) != 0 ? s0 : s2,
                          (q & 2) != 0 ? s1 : s3};
#pragma unroll
      for (int i = 0; i < 4; ++i) *reinterpret_cast<float*>(base + e * 256 + (i + q) % 4 * 32) = r[i];
    }
  }

  /// The whole granule by all warps of the block, straight from memory. Barriers around it are the caller's:
  /// one before (nobody gathers from the old table any more), one after.
  static __device__ __forceinline__ void build(char* table, const std::uint16_t* codebooks,
                                               const Activations (&x)[Tokens], int k0, int v, int bits) {
    const int warps = static_cast<int>(blockDim.x) / 32;
    const int blocks = 1 << (bits - 3);
    const int steps = V != 0 ? kSteps : (v + 7) / 8;
    for (int i = static_cast<int>(threadIdx.x) / 32; i < blocks * Sets; i += warps) {
      const int p = i % Sets;
      const std::uint16_t* const codebook = codebooks + (p % Codebooks) * (v << bits);
#pragma unroll
      for (int t = 0; t < Tokens; ++t) {
        float d[2][4] = {};
        for (int step = 0; step < steps; step += kSteps) {
          multiply(d, x[t], load_centroids(codebook, i / Sets, v, step), load_segments(x[t], k0, p, v, step));
        }
        store(table, plane(t, p), i / Sets, d);
      }
    }
  }

  /// sums[t][i] = the sum of slot i over the lane's columns. codes is the lane's stream of 16 rows
  /// (tile_layout.hpp): 16 * Sets bytes.
  static __device__ __forceinline__ void gather(const char* table, const uint4 (&codes)[Sets], int lane,
                                                float (&sums)[Tokens][16]) {
    const unsigned lane_byte = static_cast<unsigned>(lane) * 4U;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
      for (int p = 0; p < Sets; ++p) {
        const int byte = stream_offset(Sets, i, p);
        const uint4& four = codes[byte / 16];
        const unsigned word = byte / 4 % 4 == 0   ? four.x
                              : byte / 4 % 4 == 1 ? four.y
                              : byte / 4 % 4 == 2 ? four.z
                                                  : four.w;
        // bytes of the address: lane * 4, the code, 0, 0
        const unsigned at = __byte_perm(word, lane_byte, 0x7604U | (static_cast<unsigned>(byte % 4) << 4));
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          const float psum = *reinterpret_cast<const float*>(table + at + plane(t, p));
          sums[t][i] = p == 0 ? psum : sums[t][i] + psum;
        }
      }
    }
  }
};

namespace detail {

// One step of the transposing reduction over lanes 2^Step apart: each lane keeps the lower half of its slots
// and gets the other lane's values for the same rows, which row_slot() put into that lane's upper half.
template <int Step, int N>
__device__ __forceinline__ void reduce_step(float (&sums)[N]) {
  constexpr int kKeep = 8 >> Step;
#pragma unroll
  for (int i = 0; i < kKeep; ++i) sums[i] += __shfl_xor_sync(0xFFFFFFFFU, sums[i + kKeep], 1 << Step);
}

template <int First, int Last, int N>
__device__ __forceinline__ void reduce_steps(float (&sums)[N]) {
  if constexpr (First < Last) {
    reduce_step<First>(sums);
    reduce_steps<First + 1, Last>(sums);
  }
}

}  // namespace detail

/// Lane l ends with the sum of row row_slot(l, 0) over all lanes, where slot i of lane l held row row_slot(l,
/// i). After the sum over groups of 2^ScaleSteps lanes, slot i is multiplied by scales[i] (i < 16 >>
/// ScaleSteps). ScaleSteps = 5: no scales. The order of the sum is fixed.
template <int ScaleSteps>
[[nodiscard]] __device__ __forceinline__ float reduce_rows(float (&sums)[16], const __half* scales) {
  constexpr int kBefore = ScaleSteps < 4 ? ScaleSteps : 4;
  detail::reduce_steps<0, kBefore>(sums);
  if constexpr (ScaleSteps <= 4) {
#pragma unroll
    for (int i = 0; i < 16 >> kBefore; ++i) sums[i] *= __half2float(scales[i]);
  }
  detail::reduce_steps<kBefore, 4>(sums);
  return sums[0] + __shfl_xor_sync(0xFFFFFFFFU, sums[0], 16);
}

}  // namespace codegemm::cuda
