// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode.cuh - one query token a sequence over its pages, keys split
// evenly over all blocks.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend.cuh>

namespace prefillshare::cuda {

/// A range of keys and the queries that see all of it: the private tail of a sequence, or pages that a group
/// of sequences shares. Its work is numbered [K/V head][row tile][tile of keys] from work_begin on.
struct alignas(16) KeyFamily {
  int work_begin = 0;
  int tiles = 0;      // of keys; 0: no work
  int key_begin = 0;  // positions in the sequence
  int key_end = 0;
  int page_begin = 0;  // in the table's indices
  int first_token = 0;
  int rows = 0;  // query rows a K/V head
  int row_tiles = 0;
  int item_begin = 0;  // items (family, K/V head, row tile) before its own
  int shared = -1;     // of a tail: the family of its sequence's shared pages, or -1
  int padding[2] = {};
};
static_assert(sizeof(KeyFamily) == 48, "KeyFamily is read as three vectors of 16 bytes");

/// What prepare() leaves for the kernels: families of one kind, and how their work is dealt out. Block b has
/// the numbers from b * quota on.
struct DecodeWork {
  int* header = nullptr;          // [4]: all the work, quota
  int* starts = nullptr;          // [blocks]: the family that block b starts in
  KeyFamily* families = nullptr;  // [count]
};

/// Sums of each part of an item: part (block, item) is number block + item, which two neighbours never share.
struct DecodePartials {
  float* out = nullptr;   // [parts][rows of an item][head_dim]
  float2* top = nullptr;  // [parts][rows of an item]: largest scaled score, base 2, and the sum of weights
  int rows = 0;           // of an item
};

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct DecodeArgs {
  KvSource kv;
  const std::uint16_t* q = nullptr;  // [sequences][q_stride]
  std::int64_t q_stride = 0;
  const std::int32_t* indices = nullptr;
  DecodeWork work;
  DecodePartials partials;
  void* out = nullptr;  // [sequences][out_stride]
  std::int64_t out_stride = 0;
  ScalarType out_type = ScalarType::kHalf;
  int kv_heads = 0;
  int group = 0;  // query heads of a K/V head
  float scale_log2 = 0.0F;
  bool join_previous = false;  // ends after the kernel before it, which nothing else here waits for
};

namespace detail {

[[nodiscard]] __device__ __forceinline__ KeyFamily load_family(const KeyFamily* from) {
  KeyFamily out;
#pragma unroll
  for (int i = 0; i < 3; ++i) reinterpret_cast<int4*>(&out)[i] = reinterpret_cast<const int4*>(from)[i];
  return out;
}

// The sums of warps that had different keys of the same rows, through shared memory: to the output if the
// item is whole, else to part `part`. All threads, after a barrier.
template <class Shape>
__device__ __forceinline__ void store_keys_split(const AttendState<Shape>& state, char* shared,
                                                 const DecodeArgs& a, const QueryRows& rows, bool whole,
                                                 int part) {
  constexpr int kPitch = Shape::kHeadDim + 8;  // floats; the padding spreads rows over the banks
  static_assert(Shape::kWarps * 16 * (kPitch + 2) * 4 <= Shape::kSharedBytes,
                "prefillshare: AttendShape has too few stages for its warps' sums");
  float* const sums = reinterpret_cast<float*>(shared);                                // [warps][16][kPitch]
  float2* const tops = reinterpret_cast<float2*>(sums + Shape::kWarps * 16 * kPitch);  // [warps][16]
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int count = min(16, rows.rows - rows.first_row);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    if (row >= count) continue;
    if (lane % 4 == 0) tops[warp * 16 + row] = make_float2(state.top[0][h] * a.scale_log2, state.sum[0][h]);
#pragma unroll
    for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(sums + (warp * 16 + row) * kPitch + n * 8 + lane % 4 * 2) =
          make_float2(state.out[0][n][2 * h], state.out[0][n][2 * h + 1]);
    }
  }
  __syncthreads();
  constexpr int kQuads = Shape::kHeadDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < count * kQuads; i += Shape::kThreads) {
    const int row = i / kQuads;
    const int column = i % kQuads * 4;
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) top = fmaxf(top, tops[w * 16 + row].x);
    float4 out = {};
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      const float2 t = tops[w * 16 + row];
      const float factor = t.x == -INFINITY ? 0.0F : exp2_fast(t.x - top);
      const float4 s = *reinterpret_cast<const float4*>(sums + (w * 16 + row) * kPitch + column);
      sum += factor * t.y;
      out.x += factor * s.x;
      out.y += factor * s.y;
      out.z += factor * s.z;
      out.w += factor * s.w;
    }
    if (whole) {
      const float inverse = 1.0F / sum;
      const int token = (rows.first_row + row) / rows.group;
      const std::int64_t at =
          (rows.first_token + token) * a.out_stride +
          static_cast<std::int64_t>(rows.first_head + rows.first_row + row - token * rows.group) *
              Shape::kHeadDim +
          column;
      store_pair(a.out, at, a.out_type, out.x * inverse, out.y * inverse);
      store_pair(a.out, at + 2, a.out_type, out.z * inverse, out.w * inverse);
    } else {
      const std::int64_t at = static_cast<std::int64_t>(part) * a.partials.rows + row;
      *reinterpret_cast<float4*>(a.partials.out + at * Shape::kHeadDim + column) = out;
      if (column == 0) a.partials.top[at] = make_float2(top, sum);
    }
  }
}

// Rows of different warps, always to part `part`.
template <class Shape>
__device__ __forceinline__ void store_rows_split(const AttendState<Shape>& state, const DecodeArgs& a,
                                                 const QueryRows& rows, int part) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row<Shape>() + r * 16 + lane / 4 + 8 * h;
      if (rows.first_row + row >= rows.rows) continue;
      const std::int64_t at = static_cast<std::int64_t>(part) * a.partials.rows + row;
      if (lane % 4 == 0) a.partials.top[at] = make_float2(state.top[r][h] * a.scale_log2, state.sum[r][h]);
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(a.partials.out + at * Shape::kHeadDim + n * 8 + lane % 4 * 2) =
            make_float2(state.out[r][n][2 * h], state.out[r][n][2 * h + 1]);
      }
    }
  }
}

}  // namespace detail

/// Block b takes its numbers of the work, which may end one item and begin another; items that one block has
/// wholly, of sequences that share nothing, go to the output at once, the rest through decode_merge_kernel.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2) decode_kernel(const __grid_constant__ DecodeArgs a) {
  extern __shared__ __align__(128) char shared_memory[];
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory));
  if (!a.join_previous) codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const int block = static_cast<int>(blockIdx.x);
  const int all = a.work.header[0];
  const int quota = a.work.header[1];
  int at = block * quota;  // at most `all` plus a quota a block: checked by prepare()'s bounds
  const int end = min(at + quota, all);
  int number = at < end ? a.work.starts[block] : 0;
  while (at < end) {
    const KeyFamily family = detail::load_family(a.work.families + number);
    if (family.tiles == 0) {
      ++number;
      continue;
    }
    const int offset = at - family.work_begin;
    const int item = offset / family.tiles;
    const int tile = offset - item * family.tiles;
    const int count = min(family.tiles - tile, end - at);
    const int kv_head = item / family.row_tiles;
    const int row_tile = item - kv_head * family.row_tiles;
    QueryRows rows;
    rows.q = a.q;
    rows.stride = a.q_stride;
    rows.first_token = family.first_token;
    rows.first_head = kv_head * a.group;
    rows.group = a.group;
    rows.first_row = row_tile * Shape::kRows;
    rows.rows = family.rows;
    KeyRange keys;
    keys.begin = family.key_begin + tile * kTileKeys;
    keys.end = min(family.key_end, keys.begin + count * kTileKeys);
    keys.whole = keys.end;
    int limit[Shape::kRowTiles][2];
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) limit[r][0] = limit[r][1] = keys.end;
    AttendState<Shape> state;
    attend(state, shared, a.kv, a.indices + family.page_begin, kv_head, rows, keys, limit, a.scale_log2);
    const int part = block + family.item_begin + item;
    if constexpr (Shape::kWarpsN > 1) {
      __syncthreads();
      detail::store_keys_split(state, shared_memory, a, rows, family.shared < 0 && count == family.tiles,
                               part);
    } else {
      detail::store_rows_split(state, a, rows, part);
    }
    at += count;
    if (at == family.work_begin + family.tiles * a.kv_heads * family.row_tiles) ++number;
    if (at < end) __syncthreads();  // before shared memory is written again
  }
  if (a.join_previous) codegemm::cuda::detail::wait_for_previous_kernel();
}

}  // namespace prefillshare::cuda
