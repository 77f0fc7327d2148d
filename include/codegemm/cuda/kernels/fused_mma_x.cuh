// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/fused_mma_x.cuh - x in fused_mma_kernel: a warp's slab of it comes straight into the
// registers that are fragments.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/tile_pairs.cuh>
#include <codegemm/cuda/kernels/fused_mma_args.cuh>

namespace codegemm::cuda::detail {

// x of a warp's slab: the four k of a step in each lane, of tokens lane / 4 and, with 16 tokens, 8 more.
template <class Shape, int Tokens>
struct SlabOfX {
  static constexpr int kChunkSteps = Shape::kLaneSpan / 4;  // products of a chunk
  static constexpr int kSteps = 4 * kChunkSteps;
  static constexpr int kHalves = Tokens == 8 ? 1 : 2;  // tokens r, and r + 8
  using Words = unsigned[kSteps][2 * kHalves];

  template <class Fn>
  static __device__ __forceinline__ void for_words(Fn&& fn) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) fn(step, i);
    }
  }

  // Those of lane 4 r + q. Whole: every column is there, and rows are aligned.
  template <class Whole>
  static __device__ __forceinline__ void load(const FusedMmaArgs& a, int slab, int r, int q, Whole /*whole*/,
                                              Words& words) {
    constexpr int kOf = Shape::kLaneSpan >= 8 ? 2 : 1;  // steps loaded at once
    const int valid = a.cols - slab * Shape::kSlabSpan;
#pragma unroll
    for (int step = 0; step < kSteps; step += kOf) {
      const int k = (step / kChunkSteps * 4 + q) * Shape::kLaneSpan + step % kChunkSteps * 4;  // of the slab
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        unsigned of_token[kOf * 2];
        // What is no token is the last one again: nobody stores its sums.
        const std::uint16_t* const from =
            a.x + min(r + 8 * i, a.tokens - 1) * a.x_stride + slab * Shape::kSlabSpan + k;
        if constexpr (Whole::value) {
          load_fours<kOf>(from, 4 * kOf, true, of_token);
        } else {
          load_fours<kOf>(from, min(valid - k, 4 * kOf), a.x_aligned, of_token);
        }
#pragma unroll
        for (int s = 0; s < kOf; ++s) {
          words[step + s][i] = of_token[s * 2];
          words[step + s][kHalves + i] = of_token[s * 2 + 1];
        }
      }
    }
  }
};

}  // namespace codegemm::cuda::detail
