// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_store.cuh - where the sums of a block of decode go: to the
// output, or to parts that the last block adds up.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <prefillshare/attention/cuda/block/attend.cuh>
#include <prefillshare/attention/cuda/kernels/decode_work.cuh>

namespace prefillshare::cuda::detail {

// Four columns of a block's row, times `factor`, to the output.
template <class Shape>
__device__ __forceinline__ void store_row(const DecodeArgs& a, const QueryRows& rows, int row, int column,
                                          const float4& sums, float factor) {
  const int token = (rows.first_row + row) / rows.group;
  const std::int64_t at =
      (rows.first_token + token) * a.out_stride +
      static_cast<std::int64_t>(rows.first_head + rows.first_row + row - token * rows.group) *
          Shape::kHeadDim +
      column;
  store_pair(a.out, at, a.out_type, sums.x * factor, sums.y * factor);
  store_pair(a.out, at + 2, a.out_type, sums.z * factor, sums.w * factor);
}

// The sums of warps that had different keys of the same rows, through shared memory: fn(row, column, sums of
// four columns, largest scaled score, sum of weights) for all of the block's first `count` rows. All threads,
// after a barrier.
template <class Shape, class Fn>
__device__ __forceinline__ void for_warp_sums(const AttendState<Shape>& state, char* shared, float scale_log2,
                                              int count, Fn&& fn) {
  constexpr int kPitch = Shape::kHeadDim + 8;  // floats; the padding spreads rows over the banks
  static_assert(Shape::kWarps * 16 * (kPitch + 2) * 4 <= Shape::kSharedBytes,
                "prefillshare: AttendShape has too few stages for its warps' sums");
  float* const sums = reinterpret_cast<float*>(shared);                                // [warps][16][kPitch]
  float2* const tops = reinterpret_cast<float2*>(sums + Shape::kWarps * 16 * kPitch);  // [warps][16]
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    if (warp_row<Shape>() + row >= count) continue;
    if (lane % 4 == 0) tops[warp * 16 + row] = make_float2(state.top[0][h] * scale_log2, state.sum[0][h]);
#pragma unroll
    for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(sums + (warp * 16 + row) * kPitch + state.lane_column() +
                                 state.column_step(n)) = state.pair(0, n, h);
    }
  }
  __syncthreads();
  constexpr int kQuads = Shape::kHeadDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < count * kQuads; i += Shape::kThreads) {
    const int row = i / kQuads;
    const int column = i % kQuads * 4;
    const int first = row / 16 * Shape::kWarpsN * 16 + row % 16;  // of the first warp that had the row
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < Shape::kWarpsN; ++w) top = fmaxf(top, tops[first + w * 16].x);
    float4 out = {};
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < Shape::kWarpsN; ++w) {
      const float2 t = tops[first + w * 16];
      const float factor = t.x == -INFINITY ? 0.0F : exp2_fast(t.x - top);
      const float4 s = *reinterpret_cast<const float4*>(sums + (first + w * 16) * kPitch + column);
      sum += factor * t.y;
      out.x += factor * s.x;
      out.y += factor * s.y;
      out.z += factor * s.z;
      out.w += factor * s.w;
    }
    fn(row, column, out, top, sum);
  }
}

// The same to the output if the item is whole, else to part `part`.
template <class Shape>
__device__ __forceinline__ void store_keys_split(const AttendState<Shape>& state, char* shared,
                                                 const DecodeArgs& a, const DecodePartials& partials,
                                                 const QueryRows& rows, bool whole, int part) {
  const int count = min(Shape::kRows, rows.rows - rows.first_row);
  for_warp_sums(state, shared, a.scale_log2, count,
                [&](int row, int column, const float4& out, float top, float sum) {
                  if (whole) {
                    store_row<Shape>(a, rows, row, column, out, 1.0F / sum);
                    return;
                  }
                  const std::int64_t at = static_cast<std::int64_t>(part) * partials.rows + row;
                  *reinterpret_cast<float4*>(partials.out + at * Shape::kHeadDim + column) = out;
                  if (column == 0) partials.top[at] = make_float2(top, sum);
                });
}

// After a part of a tail's item has been stored: the block whose part is the last to arrive adds all of them
// up, in the order of their keys, whoever it is. All threads.
template <class Shape>
__device__ __forceinline__ void merge_if_last(const DecodeArgs& a, const KeyFamily& family,
                                              const QueryRows& rows, int item, int lane) {
  const int begin = family.work_begin + item * family.tiles;
  const int block = family.superblock_of(begin);
  const int parts = family.superblock_of(begin + family.tiles - 1) - block + 1;
  __syncthreads();
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    const auto last = static_cast<unsigned>(parts - 1);
    is_last = atomicInc(a.arrivals + (family.item_begin + item) * a.lanes + lane, last) == last;
    __threadfence();
  }
  if (__syncthreads_or(is_last) == 0) return;
  constexpr int kQuads = Shape::kHeadDim / 4;
  constexpr int kAtOnce = 8;
  const DecodePartials& partials = a.partials[0];
  const int first = (block + family.item_begin + item) * a.lanes + lane;
  const int count = min(Shape::kRows, rows.rows - rows.first_row);
  for (int i = static_cast<int>(threadIdx.x); i < count * kQuads; i += Shape::kThreads) {
    const int row = i / kQuads;
    const int column = i % kQuads * 4;
    float top = -INFINITY;
    float sum = 0.0F;
    float4 out = {};
    for (int part = 0; part < parts; part += kAtOnce) {
      float2 tops[kAtOnce];
      float4 values[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const std::int64_t at =
            static_cast<std::int64_t>(first + min(part + u, parts - 1) * a.lanes) * partials.rows + row;
        tops[u] = __ldcg(partials.top + at);
        values[u] = __ldcg(reinterpret_cast<const float4*>(partials.out + at * Shape::kHeadDim + column));
      }
      float next = top;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) next = fmaxf(next, tops[u].x);
      const float base = next == -INFINITY ? 0.0F : next;
      const float kept = exp2_fast(top - base);
      sum *= kept;
      out.x *= kept;
      out.y *= kept;
      out.z *= kept;
      out.w *= kept;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (part + u >= parts) continue;
        const float factor = exp2_fast(tops[u].x - base);
        sum += factor * tops[u].y;
        out.x += factor * values[u].x;
        out.y += factor * values[u].y;
        out.z += factor * values[u].z;
        out.w += factor * values[u].w;
      }
      top = next;
    }
    store_row<Shape>(a, rows, row, column, out, 1.0F / sum);
  }
}

// Rows of different warps, always to part `part`.
template <class Shape>
__device__ __forceinline__ void store_rows_split(const AttendState<Shape>& state, const DecodeArgs& a,
                                                 const DecodePartials& partials, const QueryRows& rows,
                                                 int part) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = tile_row<Shape>(r) + lane / 4 + 8 * h;
      if (rows.first_row + row >= rows.rows) continue;
      const std::int64_t at = static_cast<std::int64_t>(part) * partials.rows + row;
      if (lane % 4 == 0) partials.top[at] = make_float2(state.top[r][h] * a.scale_log2, state.sum[r][h]);
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(partials.out + at * Shape::kHeadDim + state.lane_column() +
                                   state.column_step(n)) = state.pair(r, n, h);
      }
    }
  }
}

// Zeros for sequences without keys, which are nobody's work. All threads, after the kernel before.
template <int HeadDim>
__device__ __forceinline__ void store_empty(const DecodeArgs& a) {
  const int row_quads = a.kv_heads * a.group * (HeadDim / 4);
  for (int i = static_cast<int>(blockIdx.x); i < a.sequences; i += static_cast<int>(gridDim.x)) {
    const KeyFamily family = load_record(a.families[0] + i);
    if (family.tiles > 0 || family.shared >= 0) continue;
    for (int q = static_cast<int>(threadIdx.x); q < row_quads; q += static_cast<int>(blockDim.x)) {
      const std::int64_t at = i * a.out_stride + q * 4;
      store_pair(a.out, at, a.out_type, 0.0F, 0.0F);
      store_pair(a.out, at + 2, a.out_type, 0.0F, 0.0F);
    }
  }
}

}  // namespace prefillshare::cuda::detail
