// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/attention_mma.cuh - the attention of attention.cuh on tensor cores, in
// bf16. The query heads of a KV head are rows of one tile: row r is query r / group, head r % group.
// Layer: train/cuda/kernels (device).
// See: Dao, FlashAttention-2 (arXiv 2307.08691) algorithms 1 and 2; without its atomic additions.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include <prefillshare/attention/cuda/block/tensor_core.cuh>
#include <prefillshare/train/cuda/kernels/attention.cuh>
#include <prefillshare/train/cuda/kernels/attention_tile.cuh>

namespace prefillshare::cuda::detail {

// Block (x, y): kRows query rows of tile x (segment, first row) and KV head y.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_mma_kernel(const __grid_constant__ AttentionArgs a) {
  using E = __nv_bfloat16;
  extern __shared__ __align__(16) unsigned char shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  E* const q = reinterpret_cast<E*>(shared);
  E* const pairs = q + Tile::kRows * Tile::kStride;  // [2][k, v]
  const DeviceSegment s = a.segments[a.tiles[2 * blockIdx.x]];
  const int group = a.heads / a.kv_heads;
  const int kv = static_cast<int>(blockIdx.y);
  const GroupedRows rows{s.first, group, kv, a.tiles[2 * blockIdx.x + 1], s.count * group};
  if (rows.begin >= rows.end) return;  // a tile that fills up the grid
  load_tile<Tile, Tile::kRows>(q, a.q, [&](int r) {
    return rows.has(r) ? static_cast<const E*>(a.q) + rows.element(r, a.stride, Tile::kDim) : nullptr;
  });
  const int last = min(rows.begin + Tile::kRows, rows.end) - 1;
  const int keys = s.prefix + last / group + 1;
  const KeyStages<Tile> stages{a, s, kv, keys, pairs};
  stages.load(0, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int mine = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;  // and mine + 8
  const int seen[2] = {s.prefix + rows.query(mine) + 1, s.prefix + rows.query(mine + 8) + 1};
  float out[Tile::kDim / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0F, 0.0F};
  const float scale_log2 = a.scale * kLog2E;
  for (int base = 0, stage = 0; base < keys; base += Tile::kOther, stage ^= 1) {
    const E* const k = stages.take(base, stage);
    const E* const v = k + Tile::kOther * Tile::kStride;
    float p[Tile::kOther / 8][4];
    multiply_rows<Tile, Tile::kOther>(p, q, static_cast<int>(threadIdx.x) / 32 * 16, k);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < Tile::kOther / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = p[n][2 * half + e];
          x = base + n * 8 + lane % 4 * 2 + e < seen[half] ? x * scale_log2 : -INFINITY;
          most = fmaxf(most, x);
        }
      }
      most = fmaxf(top[half], quad_max(most));
      const float shrink = exp2_fast(top[half] - most);  // every row sees the first key
      float part = 0.0F;
#pragma unroll
      for (int n = 0; n < Tile::kOther / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = p[n][2 * half + e];
          x = exp2_fast(x - most);
          part += x;
        }
      }
      sum[half] = sum[half] * shrink + quad_sum(part);
      top[half] = most;
#pragma unroll
      for (int n = 0; n < Tile::kDim / 8; ++n) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
      }
    }
    multiply_add<Tile, Tile::kOther>(out, p, v);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = mine + 8 * half;
    if (!rows.has(r)) continue;
    const std::int64_t item = rows.item(r, a.heads);
    E* const to = static_cast<E*>(a.out) + item * Tile::kDim + lane % 4 * 2;
    const float inverse = 1.0F / sum[half];
#pragma unroll
    for (int n = 0; n < Tile::kDim / 8; ++n)
      store2(to + n * 8, make_float2(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse));
    if (a.lse != nullptr && lane % 4 == 0) a.lse[item] = (top[half] + log2f(sum[half])) * 0.6931471805599453F;
  }
}

// The same blocks: dq, and delta.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_mma_dq_kernel(const __grid_constant__ AttentionArgs a) {
  using E = __nv_bfloat16;
  extern __shared__ __align__(16) unsigned char shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  E* const q = reinterpret_cast<E*>(shared);
  E* const dout = q + Tile::kRows * Tile::kStride;
  E* const pairs = dout + Tile::kRows * Tile::kStride;  // [2][k, v]
  const DeviceSegment s = a.segments[a.tiles[2 * blockIdx.x]];
  const int group = a.heads / a.kv_heads;
  const int kv = static_cast<int>(blockIdx.y);
  const GroupedRows rows{s.first, group, kv, a.tiles[2 * blockIdx.x + 1], s.count * group};
  if (rows.begin >= rows.end) return;  // a tile that fills up the grid
  load_tile<Tile, Tile::kRows>(q, a.q, [&](int r) {
    return rows.has(r) ? static_cast<const E*>(a.q) + rows.element(r, a.stride, Tile::kDim) : nullptr;
  });
  load_tile<Tile, Tile::kRows>(dout, a.q, [&](int r) {
    return rows.has(r) ? static_cast<const E*>(a.dout) + rows.item(r, a.heads) * Tile::kDim : nullptr;
  });
  end_copy_group();
  const int last = min(rows.begin + Tile::kRows, rows.end) - 1;
  const int keys = s.prefix + last / group + 1;
  const KeyStages<Tile> stages{a, s, kv, keys, pairs};
  stages.load(0, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int mine = warp_row + lane / 4;  // and mine + 8
  const int seen[2] = {s.prefix + rows.query(mine) + 1, s.prefix + rows.query(mine + 8) + 1};
  wait_for_copies<1>();
  __syncthreads();
  float lse[2] = {0.0F, 0.0F};  // in powers of two
  float delta[2] = {0.0F, 0.0F};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = mine + 8 * half;
    float along = 0.0F;
    if (rows.has(r)) {
      const std::int64_t item = rows.item(r, a.heads);
      lse[half] = a.lse[item] * kLog2E;
      const E* const out = static_cast<const E*>(a.out) + item * Tile::kDim;
#pragma unroll
      for (int n = 0; n < Tile::kDim / 8; ++n) {
        const int at = n * 8 + lane % 4 * 2;
        const float2 o = load2(out + at);
        const float2 d = load2(dout + r * Tile::kStride + at);
        along += o.x * d.x + o.y * d.y;
      }
    }
    delta[half] = quad_sum(along);
    if (rows.has(r) && lane % 4 == 0) a.delta[rows.item(r, a.heads)] = delta[half];
  }
  float dq[Tile::kDim / 8][4] = {};
  const float scale_log2 = a.scale * kLog2E;
  for (int base = 0, stage = 0; base < keys; base += Tile::kOther, stage ^= 1) {
    const E* const k = stages.take(base, stage);
    const E* const v = k + Tile::kOther * Tile::kStride;
    float p[Tile::kOther / 8][4];
    float dp[Tile::kOther / 8][4];
    multiply_rows<Tile, Tile::kOther>(p, q, warp_row, k);
    multiply_rows<Tile, Tile::kOther>(dp, dout, warp_row, v);
#pragma unroll
    for (int n = 0; n < Tile::kOther / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        const bool visible = base + n * 8 + lane % 4 * 2 + e % 2 < seen[half];
        const float weight = visible ? exp2_fast(p[n][e] * scale_log2 - lse[half]) : 0.0F;
        p[n][e] = weight * (dp[n][e] - delta[half]) * a.scale;
      }
    }
    multiply_add<Tile, Tile::kOther>(dq, p, k);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = mine + 8 * half;
    if (!rows.has(r)) continue;
    E* const to = static_cast<E*>(a.dq) + rows.element(r, a.stride, Tile::kDim) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Tile::kDim / 8; ++n)
      store2(to + n * 8, make_float2(dq[n][2 * half], dq[n][2 * half + 1]));
  }
}

// Block (x, y): kRows keys of tile x (segment, first key) and KV head y; steps over the query rows.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kDim <= 64 ? 3 : 2)
    attention_mma_dkv_kernel(const __grid_constant__ AttentionArgs a) {
  using E = __nv_bfloat16;
  extern __shared__ __align__(16) unsigned char shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  E* const k = reinterpret_cast<E*>(shared);
  E* const v = k + Tile::kRows * Tile::kStride;
  E* const pairs = v + Tile::kRows * Tile::kStride;                          // [2][q, dout]
  float* const numbers = reinterpret_cast<float*>(pairs + 2 * Tile::kPair);  // [2][lse, delta][kOther]
  const DeviceSegment s = a.segments[a.tiles[2 * blockIdx.x]];
  const int group = a.heads / a.kv_heads;
  const int kv = static_cast<int>(blockIdx.y);
  const int first_key = a.tiles[2 * blockIdx.x + 1];
  if (first_key >= s.count) return;  // a tile that fills up the grid
  const auto key_at = [&](const void* from, int r) -> const E* {
    if (first_key + r >= s.count) return nullptr;
    return static_cast<const E*>(from) + std::int64_t{s.first + first_key + r} * a.kv_stride +
           kv * Tile::kDim;
  };
  const auto load_queries = [&](int begin, int stage) {
    const GroupedRows rows{s.first, group, kv, begin, s.count * group};
    E* const to = pairs + stage * Tile::kPair;
    load_tile<Tile, Tile::kOther>(to, a.q, [&](int r) {
      return rows.has(r) ? static_cast<const E*>(a.q) + rows.element(r, a.stride, Tile::kDim) : nullptr;
    });
    load_tile<Tile, Tile::kOther>(to + Tile::kOther * Tile::kStride, a.q, [&](int r) {
      return rows.has(r) ? static_cast<const E*>(a.dout) + rows.item(r, a.heads) * Tile::kDim : nullptr;
    });
    for (int i = static_cast<int>(threadIdx.x); i < 2 * Tile::kOther; i += Tile::kThreads) {
      const int r = i % Tile::kOther;
      const bool there = rows.has(r);
      const float* const from = i < Tile::kOther ? a.lse : a.delta;
      copy_number(numbers + stage * 2 * Tile::kOther + i, from + (there ? rows.item(r, a.heads) : 0), there);
    }
    end_copy_group();
  };
  load_tile<Tile, Tile::kRows>(k, a.q, [&](int r) { return key_at(a.k, r); });
  load_tile<Tile, Tile::kRows>(v, a.q, [&](int r) { return key_at(a.v, r); });
  load_queries(first_key * group, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int mine = warp_row + lane / 4;  // and mine + 8
  float dk[Tile::kDim / 8][4] = {};
  float dv[Tile::kDim / 8][4] = {};
  const float scale_log2 = a.scale * kLog2E;
  const int end = s.count * group;
  for (int begin = first_key * group, stage = 0; begin < end; begin += Tile::kOther, stage ^= 1) {
    const GroupedRows rows{s.first, group, kv, begin, end};
    const E* const q = pairs + stage * Tile::kPair;
    const E* const dout = q + Tile::kOther * Tile::kStride;
    const float* const lse = numbers + stage * 2 * Tile::kOther;
    const float* const delta = lse + Tile::kOther;
    __syncthreads();  // the tiles before these are used up
    if (begin + Tile::kOther < end) {
      load_queries(begin + Tile::kOther, stage ^ 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    float p[Tile::kOther / 8][4];   // [keys][queries]
    float dp[Tile::kOther / 8][4];  // the same
    multiply_rows<Tile, Tile::kOther>(p, k, warp_row, q);
    multiply_rows<Tile, Tile::kOther>(dp, v, warp_row, dout);
#pragma unroll
    for (int n = 0; n < Tile::kOther / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = n * 8 + lane % 4 * 2 + e % 2;
        const int key = first_key + mine + 8 * (e / 2);
        const bool visible = rows.has(column) && key * group <= begin + column;
        p[n][e] = visible ? exp2_fast(p[n][e] * scale_log2 - lse[column] * kLog2E) : 0.0F;
        dp[n][e] = p[n][e] * (dp[n][e] - delta[column]) * a.scale;
      }
    }
    multiply_add<Tile, Tile::kOther>(dv, p, dout);
    multiply_add<Tile, Tile::kOther>(dk, dp, q);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + mine + 8 * half;
    if (key >= s.count) continue;
    const std::int64_t to = std::int64_t{s.first + key} * a.kv_stride + kv * Tile::kDim + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Tile::kDim / 8; ++n) {
      store2(static_cast<E*>(a.dk) + to + n * 8, make_float2(dk[n][2 * half], dk[n][2 * half + 1]));
      store2(static_cast<E*>(a.dv) + to + n * 8, make_float2(dv[n][2 * half], dv[n][2 * half + 1]));
    }
  }
}

}  // namespace prefillshare::cuda::detail
