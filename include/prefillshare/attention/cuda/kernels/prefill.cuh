// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/prefill.cuh - many query tokens of each sequence over its
// pages, causal.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/attend.cuh>
#include <prefillshare/attention/cuda/block/page_boxes.cuh>

namespace prefillshare::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct PrefillArgs {
  KvSource kv;
  const std::uint16_t* q = nullptr;  // [tokens][q_stride]
  std::int64_t q_stride = 0;
  const std::int32_t* query_indptr = nullptr;  // [sequences + 1]
  const std::int32_t* indptr = nullptr;        // [sequences + 1]
  const std::int32_t* indices = nullptr;
  const std::int32_t* last_page_len = nullptr;  // [sequences]
  void* out = nullptr;                          // [tokens][out_stride]
  std::int64_t out_stride = 0;
  ScalarType out_type = ScalarType::kHalf;
  int sequences = 0;
  int kv_heads = 0;
  int group = 0;  // query heads of a K/V head
  float scale_log2 = 0.0F;
  PageMaps maps;       // of kv, if there are boxes
  bool boxes = false;  // of kBoxKeys, which pages have whole ones of
};

namespace detail {

struct PrefillTile {
  int sequence = -1;  // -1: there are fewer tiles
  int tile = 0;       // in the sequence
};

// Tile `number` of all sequences' tiles of `rows` query rows, counted from the end, where the most keys are
// seen. Every warp finds it by itself.
[[nodiscard]] __device__ __forceinline__ PrefillTile find_tile(const PrefillArgs& a, int number, int rows) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  PrefillTile out;
  int before = 0;
  for (int last = a.sequences - 1; last >= 0; last -= 32) {
    const int sequence = last - lane;
    const int tokens = sequence >= 0 ? a.query_indptr[sequence + 1] - a.query_indptr[sequence] : 0;
    const int tiles = (max(tokens, 0) * a.group + rows - 1) / rows;
    int sum = tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFU, sum, static_cast<unsigned>(step));
      if (lane >= step) sum += other;
    }
    const unsigned found = __ballot_sync(0xFFFFFFFFU, before + sum > number);
    if (found != 0U) {
      const int owner = __ffs(static_cast<int>(found)) - 1;
      out.sequence = last - owner;
      out.tile = __shfl_sync(0xFFFFFFFFU, before + sum, owner) - 1 - number;
      return out;
    }
    before += __shfl_sync(0xFFFFFFFFU, sum, 31);
  }
  return out;
}

}  // namespace detail

/// Block (h, i): K/V head h and tile i of query rows, row r being head r % group of token r / group, so that
/// the heads of a group share what is read.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 256 / Shape::kThreads)
    prefill_kernel(const __grid_constant__ PrefillArgs a) {
  extern __shared__ __align__(128) char shared_memory[];
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory));
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const int kv_head = static_cast<int>(blockIdx.x);
  const detail::PrefillTile found = detail::find_tile(a, static_cast<int>(blockIdx.y), Shape::kRows);
  if (found.sequence < 0) return;
  const int first_query = a.query_indptr[found.sequence];
  const int queries = a.query_indptr[found.sequence + 1] - first_query;
  const int page_begin = a.indptr[found.sequence];
  const int pages = a.indptr[found.sequence + 1] - page_begin;
  const int context = pages > 0 ? (pages - 1) * a.kv.page_size + a.last_page_len[found.sequence] : 0;
  const int first_position = context - queries;
  CODEGEMM_ASSERT(first_position >= 0);

  QueryRows rows;
  rows.q = a.q;
  rows.stride = a.q_stride;
  rows.first_token = first_query;
  rows.first_head = kv_head * a.group;
  rows.group = a.group;
  rows.first_row = found.tile * Shape::kRows;
  rows.rows = queries * a.group;
  const int last_row = min(rows.first_row + Shape::kRows, rows.rows) - 1;
  KeyRange keys;
  keys.end = max(0, first_position + last_row / a.group + 1);
  keys.whole = first_position + rows.first_row / a.group + 1;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int lane_row = rows.first_row + detail::warp_row<Shape>() + lane / 4;
  const auto limit = [&](int r, int h) {
    return min(keys.end, first_position + (lane_row + r * 16 + h * 8) / a.group + 1);
  };
  AttendState<Shape> state;
  attend(state, shared, a.kv, a.indices + page_begin, kv_head, rows, keys, limit, a.scale_log2);
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane_row + r * 16 + h * 8;
      if (row >= rows.rows) continue;
      const float sum = state.sum[r][h];
      const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;
      const int token = row / a.group;
      const std::int64_t at =
          (static_cast<std::int64_t>(first_query) + token) * a.out_stride +
          static_cast<std::int64_t>(rows.first_head + row - token * a.group) * Shape::kHeadDim;
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        const float2 sums = state.pair(r, n, h);
        detail::store_pair(a.out, at + state.lane_column() + state.column_step(n), a.out_type,
                           sums.x * inverse, sums.y * inverse);
      }
    }
  }
}

}  // namespace prefillshare::cuda
