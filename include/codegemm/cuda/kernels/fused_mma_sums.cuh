// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/fused_mma_sums.cuh - sums of fused_mma_kernel on their way from a warp's registers to
// the output: of warps, of a block's windows, of a cluster's splits, in a fixed order.
// Layer: cuda/kernels (device).
#pragma once

#include <cuda_fp16.h>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/kernels/fused_mma_args.cuh>
#include <codegemm/cuda/kernels/output.cuh>

namespace codegemm::cuda::detail {

// What a warp made of a tile with 8 tokens, whose weights are the rows of products: a token's 16 rows, of
// which bit 1 of its number swaps the halves, and bit 2 swaps it with its neighbour, so that a store hits
// every bank once. Without all_tokens there is room for the first alone.
__device__ __forceinline__ void put_tile_sums(float* to, const float (&sums)[1][4], int r, int q,
                                              bool all_tokens) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = q * 32 + ((i % 2) ^ (q >> 1)) * 16 + ((i / 2) ^ (q & 1)) * 8 + r;
    if (all_tokens || (q * 2 + i % 2) == 0) to[at] = sums[0][i];
  }
}

// The same with 16 tokens: eight rows of a token lie together, swapped with the other eight for every other
// pair of tokens, so that a store of four tokens hits every bank once.
__device__ __forceinline__ void put_tile_sums(float* to, const float (&sums)[2][4], int r, int q,
                                              bool /*all_tokens*/) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<float2*>(to + r * 16 + q * 2 + i * 128 + (e ^ (r >> 1 & 1)) * 8) =
          make_float2(sums[e][i * 2], sums[e][i * 2 + 1]);
    }
  }
}

// Adds what the warps of a block put down of a group of tiles, and stores it or leaves it to the block.
template <class Shape, int Tokens>
struct GroupSums {
  static constexpr int kWarps = Shape::kWarps;

  const FusedMmaArgs& a;
  const float* of_stage;  // [tile of the group][warp][the tile's sums, see put_tile_sums()]
  float* block_sums;      // [token][row of the block]
  int tile0;              // the block's first
  int block_rows;
  int log_sums;         // of a tile
  int warps;            // that have a slab of the window
  bool direct = false;  // nothing else is to be added
  bool on_top = false;  // of windows before

  // Tiles [group, end) of the block. All threads.
  __device__ __forceinline__ void add(int group, int end) const {
    if constexpr (Tokens == 8) {
      // A sum a thread, so that no warp comes late to the next barrier.
      for (int i = static_cast<int>(threadIdx.x); i < (end - group) << log_sums; i += kFusedMmaThreads) {
        const int in_tile = i & ((1 << log_sums) - 1);
        const int token = in_tile / 16 ^ in_tile / 64;
        const int row =
            (group + (i >> log_sums)) * kTileRows + ((in_tile >> 3 ^ token >> 1) & 1) * 8 + in_tile % 8;
        const float* const from = of_stage + (((i >> log_sums) * kWarps) << log_sums) + in_tile;
        float sum = *from;
#pragma unroll 5
        for (int w = 1; w < warps; ++w) sum += from[w << log_sums];
        if (direct) {
          if (token < a.tokens && tile0 * kTileRows + row < a.out.rows)
            store_output(a.out, token, tile0 * kTileRows + row, sum);
        } else {
          float& total = block_sums[token * block_rows + row];
          if (on_top) sum += total;
          total = sum;
        }
      }
    } else {
      // Four rows of a token at a time: with 16 tokens a sum a thread takes longer.
      constexpr int kLogFours = Shape::log_tile_sums(Tokens) - 2;
      for (int i = static_cast<int>(threadIdx.x); i < (end - group) << kLogFours; i += kFusedMmaThreads) {
        const int in_tile = i & ((1 << kLogFours) - 1);
        const int token = in_tile / 4;
        const int row = (group + (i >> kLogFours)) * kTileRows + ((i >> 1 ^ token >> 1) & 1) * 8 + i % 2 * 4;
        const float* const from = of_stage + (((i >> kLogFours) * kWarps) << log_sums) + in_tile * 4;
        float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 5
        for (int w = 1; w < warps; ++w) {
          const float4 more = *reinterpret_cast<const float4*>(from + (w << log_sums));
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        if (direct) {
          if (token < a.tokens) store_output4(a.out, token, tile0 * kTileRows + row, sum);
        } else {
          float4& total = *reinterpret_cast<float4*>(block_sums + token * block_rows + row);
          if (on_top) sum.x += total.x, sum.y += total.y, sum.z += total.z, sum.w += total.w;
          total = sum;
        }
      }
    }
  }
};

// Stores the sums of a block's rows [half][token][row]. The blocks of a cluster have a split each: every one
// ends with a share of the rows, of which it adds all splits' sums.
template <class Shape, int Tokens, bool Gated>
__device__ __forceinline__ void store_split_sums(const FusedMmaArgs& a, float* block_sums, int tile0,
                                                 int tiles, int block_rows) {
  const int warp = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int all_rows = min(tiles * kTileRows, a.out.rows - tile0 * kTileRows);
  int from = 0;
  int to = all_rows;
#if __CUDA_ARCH__ >= 900
  const int splits = static_cast<int>(gridDim.x);
  if (splits > 1) {
    cluster_barrier();
    const int share = (all_rows + splits - 1) / splits;
    from = min(static_cast<int>(cluster_rank()) * share, all_rows);
    to = min(from + share, all_rows);
  }
#endif
  const auto sum_splits = [&](float* own) {
    float sum = 0.0F;
#if __CUDA_ARCH__ >= 900
    if (splits > 1) {
      const auto place = static_cast<unsigned>(__cvta_generic_to_shared(own));
      for (int s = 0; s < splits; ++s) sum += load_from(address_in(place, static_cast<unsigned>(s)));
      return sum;
    }
#endif
    return sum + *own;
  };
  for (int token = warp; token < a.tokens; token += Shape::kWarps) {
    for (int row = from + lane; row < to; row += 32) {
      float* const own = block_sums + token * block_rows + row;
      const float sum = sum_splits(own);
      if constexpr (Gated) {
        store_gated(a.out, token, tile0 * kTileRows + row, sum, sum_splits(own + Tokens * block_rows));
      } else {
        store_output(a.out, token, tile0 * kTileRows + row, sum);
      }
    }
  }
#if __CUDA_ARCH__ >= 900
  if (splits > 1) cluster_barrier();  // nobody's shared memory goes while others read it
#endif
}

}  // namespace codegemm::cuda::detail
