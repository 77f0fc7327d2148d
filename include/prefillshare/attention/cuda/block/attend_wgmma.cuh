// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/attend_wgmma.cuh - one tile of keys for 64 or 128 query rows, on a
// warpgroup of Hopper.
// Layer: attention/cuda/block (device).
#pragma once

#include <cstdint>

#include <prefillshare/attention/cuda/block/attend_products.cuh>
#include <prefillshare/attention/cuda/block/wgmma_products.cuh>

#if CODEGEMM_HAS_WGMMA
namespace prefillshare::cuda::detail {

// Scores of 64 rows become weights, and top, sum and out those after these keys.
template <class Shape, int Columns>
__device__ __forceinline__ void weigh_tile(float (&score)[32], float (&top)[2], float (&sum)[2],
                                           float (&out)[Columns], float scale_log2) {
  float base[2];
  float factor[2];
  bool moved = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float next = top[h];
#pragma unroll
    for (int n = 0; n < 8; ++n) next = fmaxf(next, fmaxf(score[n * 4 + 2 * h], score[n * 4 + 2 * h + 1]));
    next = fmaxf(next, __shfl_xor_sync(0xFFFFFFFFU, next, 1));
    next = fmaxf(next, __shfl_xor_sync(0xFFFFFFFFU, next, 2));
    base[h] = next == -INFINITY ? 0.0F : next * scale_log2;
    factor[h] = exp2_fast(top[h] * scale_log2 - base[h]);
    moved = moved || next != top[h];
    top[h] = next;
  }
  if (__any_sync(0xFFFFFFFFU, moved)) {
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] *= factor[h];
#pragma unroll
    for (int i = 0; i < Columns; ++i) out[i] *= factor[i / 2 % 2];
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    score[i] = exp2_fast(fmaf(score[i], scale_log2, -base[i / 2 % 2]));
    sum[i / 2 % 2] += score[i];
  }
}

// Starts: out += weights * values. With bf16 and 64 rows by what rounding takes from the weights, too.
template <class Shape, int Columns>
__device__ __forceinline__ void multiply_weights(float (&out)[Columns], unsigned (&weights)[4][4],
                                                 unsigned (&rest)[4][4], std::uint64_t values) {
  const auto multiply = [&](unsigned(&a)[4], std::uint64_t at) {
    if constexpr (Shape::kHeadDim == 96) {
      wgmma_values<Shape::kType, 64, 0>(out, a, at);
      wgmma_values<Shape::kType, 32, 32>(out, a, at + (Shape::kColumnTileBytes >> 4));
    } else {
      wgmma_values<Shape::kType, Shape::kHeadDim, 0>(out, a, at);
    }
  };
  codegemm::cuda::detail::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const std::uint64_t at = values + static_cast<std::uint64_t>(k * 128);
    multiply(weights[k], at);
    if constexpr (Shape::kExactWeights) multiply(rest[k], at);
  }
  codegemm::cuda::detail::wgmma_commit();
}

// Scores as fragments of weights; `rest` is what rounding took from them.
template <class Shape>
__device__ __forceinline__ void round_weights(const float (&score)[32], unsigned (&weights)[4][4],
                                              unsigned (&rest)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float low = score[k * 8 + e * 2];
      const float high = score[k * 8 + e * 2 + 1];
      weights[k][e] = pack<Shape::kType>(low, high);
      if constexpr (Shape::kExactWeights) {
        const float2 rounded = unpack<Shape::kType>(weights[k][e]);
        rest[k][e] = pack<Shape::kType>(low - rounded.x, high - rounded.y);
      }
    }
  }
}

// What attend_tile() does, for a Shape with kWgmma. The tile's copies were published. While one 64 rows'
// weights are made the tensor cores work for the other.
template <class Shape, class State, class Limit>
__device__ __forceinline__ void attend_tile_wgmma(State& state, const Queries<Shape>& queries, unsigned stage,
                                                  int first_key, int whole, const Limit& limit,
                                                  float scale_log2) {
  using codegemm::cuda::detail::wgmma_commit;
  using codegemm::cuda::detail::wgmma_fence;
  using codegemm::cuda::detail::wgmma_wait;
  constexpr int kTiles = Shape::kRowTiles;
  constexpr int kColumns = Shape::kHeadDim / 2;
  static_assert(kTiles <= 2 && Shape::kWarpsM == 4 && Shape::kWarpsN == 1);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint64_t keys = codegemm::cuda::detail::describe_tokens(stage);
  const std::uint64_t values = describe_values(stage + Shape::kTileBytes, Shape::kColumnTileBytes);
  float score[kTiles][32];
  unsigned weights[4][4];
  unsigned rest[4][4];

  wgmma_fence();
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
#pragma unroll
    for (int k = 0; k < Shape::kHeadDim / 16; ++k) {
      const auto column =
          static_cast<unsigned>(k / 4 * static_cast<int>(Shape::kColumnTileBytes >> 4) + k % 4 * 2);
      if constexpr (Shape::kQueriesInShared) {
        const auto of_queries =
            static_cast<unsigned>(k / 4 * static_cast<int>(Shape::kRows * 128 >> 4) + k % 4 * 2);
        wgmma_scores<Shape::kType>(
            score[r],
            codegemm::cuda::detail::describe_tokens(queries.shared + static_cast<unsigned>(r) * 64U * 128U) +
                of_queries,
            keys + column, k > 0);
      } else {
        wgmma_scores<Shape::kType>(score[r], queries.fragment[k], keys + column, k > 0);
      }
    }
    wgmma_commit();
  }
  if constexpr (kTiles == 2) {
    wgmma_wait<1>();
  } else {
    wgmma_wait<0>();
  }
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    float(&out)[kColumns] = reinterpret_cast<float(&)[kColumns]>(state.out[r]);
    if (r == 1) wgmma_wait<1>();
    hold(score[r]);
    if (first_key + kTileKeys > whole) {
      const int limits[2] = {limit(r, 0) - first_key - lane % 4 * 2, limit(r, 1) - first_key - lane % 4 * 2};
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (i / 4 * 8 + i % 2 >= limits[i / 2 % 2]) score[r][i] = -INFINITY;
      }
    }
    weigh_tile<Shape>(score[r], state.top[r], state.sum[r], out, scale_log2);
    if (r == 1) {
      // The fragments of the first rows' weights are free.
      wgmma_wait<0>();
      hold(reinterpret_cast<float(&)[kColumns]>(state.out[0]));
    }
    round_weights<Shape>(score[r], weights, rest);
    multiply_weights<Shape>(out, weights, rest, values);
  }
  wgmma_wait<0>();
  hold(reinterpret_cast<float(&)[kColumns]>(state.out[kTiles - 1]));
}

}  // namespace prefillshare::cuda::detail
#endif
