// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/wgmma_multiplier.cuh - what a warpgroup of Hopper does with 64 query rows
// and a tile of keys at a time: scores, their softmax, and the sums of weighted values.
// Layer: attention/cuda/block (device).
#pragma once

#include <cstdint>

#include <prefillshare/attention/cuda/block/wgmma_products.cuh>

#if CODEGEMM_HAS_WGMMA
namespace prefillshare::cuda::detail {

// The products only start: who waits for them, and when, is the kernel's to say.
template <class Shape>
struct WgmmaMultiplier {
  static constexpr int kSums = Shape::kHeadDim / 2;  // of a thread
  static constexpr ScalarType kType = Shape::kType;

  float score[Shape::kKeys / 2];
  float out[kSums];
  unsigned weights[Shape::kKeys / 16][4];
  unsigned rest[Shape::kExactWeights ? Shape::kKeys / 16 : 1][4];  // what rounding took from them
  float top[2];                                                    // that the exponents are taken from
  float sum[2];                                                    // of this thread's weights
  float factor[2];
  bool moved = false;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) out[i] = 0.0F;
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.0F;
  }
  // Starts: scores of all keys of a tile. Descriptors of the first 16 columns.
  __device__ __forceinline__ void multiply_keys(std::uint64_t queries, std::uint64_t keys) {
#pragma unroll
    for (int k = 0; k < Shape::kHeadDim / 16; ++k) {
      const auto at = static_cast<std::uint64_t>(k / 4 * (Shape::kColumnTileBytes >> 4) + k % 4 * 2);
      wgmma_scores<kType>(score, queries + at, keys + at, k > 0);
    }
    codegemm::cuda::detail::wgmma_commit();
  }
  // Starts: out += weights * values.
  __device__ __forceinline__ void multiply_values(std::uint64_t values) {
#pragma unroll
    for (int k = 0; k < Shape::kKeys / 16; ++k) {
      const std::uint64_t at = values + static_cast<std::uint64_t>(k * 128);
      if constexpr (Shape::kHeadDim == 96) {
        wgmma_values<kType, 64, 0>(out, weights[k], at);
        wgmma_values<kType, 32, 32>(out, weights[k],
                                    at + static_cast<std::uint64_t>(Shape::kColumnTileBytes >> 4));
      } else {
        wgmma_values<kType, Shape::kHeadDim, 0>(out, weights[k], at);
        if constexpr (Shape::kExactWeights) wgmma_values<kType, Shape::kHeadDim, 0>(out, rest[k], at);
      }
    }
    codegemm::cuda::detail::wgmma_commit();
  }
  // Keys from limit on are not seen; relative to the tile's first and this lane's first column.
  __device__ __forceinline__ void mask(int limit0, int limit1) {
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (n * 8 + e % 2 >= (e < 2 ? limit0 : limit1)) score[n * 4 + e] = -INFINITY;
      }
    }
  }
  // Scores become weights. What they are taken from is moved only when weights would pass 2^8, which is
  // seldom after the first tile: then `out` has to be scaled by `factor`.
  __device__ __forceinline__ void weigh(float scale_log2) {
    constexpr float kSlack = 8.0F;
    float most[2];  // of this thread's; of the row only where that is needed
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float a = fmaxf(score[2 * h], score[2 * h + 1]);
      float b = fmaxf(score[4 + 2 * h], score[4 + 2 * h + 1]);
#pragma unroll
      for (int n = 2; n < Shape::kKeys / 8; n += 2) {
        a = fmaxf(a, fmaxf(score[n * 4 + 2 * h], score[n * 4 + 2 * h + 1]));
        b = fmaxf(b, fmaxf(score[n * 4 + 4 + 2 * h], score[n * 4 + 4 + 2 * h + 1]));
      }
      most[h] = fmaxf(fmaxf(a, b), top[h]);
    }
    const bool moves = (most[0] - top[0]) * scale_log2 > kSlack || (most[1] - top[1]) * scale_log2 > kSlack;
    moved = __any_sync(0xFFFFFFFFU, moves) != 0;
    const auto base_of = [scale_log2](float of) { return of == -INFINITY ? 0.0F : of * scale_log2; };
    if (moved) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float next = most[h];
        next = fmaxf(next, __shfl_xor_sync(0xFFFFFFFFU, next, 1));
        next = fmaxf(next, __shfl_xor_sync(0xFFFFFFFFU, next, 2));
        factor[h] = exp2_fast(top[h] * scale_log2 - base_of(next));
        sum[h] *= factor[h];
        top[h] = next;
      }
    }
    const float base[2] = {base_of(top[0]), base_of(top[1])};
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = exp2_fast(fmaf(score[n * 4 + e], scale_log2, -base[e / 2]));
        score[n * 4 + e] = weight;
        sum[e / 2] += weight;
      }
    }
  }
  __device__ __forceinline__ void rescale() {
    if (!moved) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) out[i] *= factor[i / 2 % 2];
  }
  // A score's fragment is a weight's.
  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int k = 0; k < Shape::kKeys / 16; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float low = score[k * 8 + e * 2];
        const float high = score[k * 8 + e * 2 + 1];
        weights[k][e] = pack<kType>(low, high);
        if constexpr (Shape::kExactWeights) {
          const float2 rounded = unpack<kType>(weights[k][e]);
          rest[k][e] = pack<kType>(low - rounded.x, high - rounded.y);
        }
      }
    }
  }
};

}  // namespace prefillshare::cuda::detail
#endif
