// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_merge.cuh - the parts of each query row put together by their
// log-sum-exp.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/block/tensor_core.cuh>
#include <prefillshare/attention/cuda/kernels/decode_work.cuh>

namespace prefillshare::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct DecodeMergeArgs {
  const KeyFamily* tails = nullptr;   // [sequences]
  const KeyFamily* shared = nullptr;  // [groups]
  DecodePartials tail_partials;
  DecodePartials shared_partials;
  void* out = nullptr;  // [sequences][out_stride]
  std::int64_t out_stride = 0;
  ScalarType out_type = ScalarType::kHalf;
  int sequences = 0;
  int kv_heads = 0;
  int group = 0;  // query heads of a K/V head
  int lanes = 1;
  EarlyBlocks early;
  bool few = false;          // see shared_kind()
  bool shared_only = false;  // rows of sequences that share nothing are there already
};

inline constexpr int kMergeThreads = 128;

namespace detail {

// Consecutive parts that hold one row.
struct RowParts {
  std::int64_t first = 0;  // row number in the partials
  int step = 0;            // rows from part to part
  int count = 0;

  __device__ __forceinline__ void find(const KeyFamily& family, const EarlyBlocks& early, int kv_head,
                                       int row, int lanes, int item_rows, int part_rows) {
    if (family.tiles == 0) return;
    const int head_group = kv_head / lanes;
    const int item = head_group * family.row_tiles + row / item_rows;
    const int begin = family.work_begin + item * family.tiles;
    const WorkCut cut = early.cut(family.quota);
    const int block = cut.superblock_of(begin);
    count = cut.superblock_of(begin + family.tiles - 1) - block + 1;
    const int part = (block + family.item_begin + item) * lanes + kv_head - head_group * lanes;
    first = static_cast<std::int64_t>(part) * part_rows + row % item_rows;
    step = lanes * part_rows;
  }
};

// A lane's neighbouring columns, or zeros.
template <int Columns>
__device__ __forceinline__ void load_columns(float (&out)[Columns], const float* from, bool is_there) {
  if constexpr (Columns == 4) {
    const float4 x = is_there ? *reinterpret_cast<const float4*>(from) : float4{};
    out[0] = x.x;
    out[1] = x.y;
    out[2] = x.z;
    out[3] = x.w;
  } else if constexpr (Columns == 2) {
    const float2 x = is_there ? *reinterpret_cast<const float2*>(from) : float2{};
    out[0] = x.x;
    out[1] = x.y;
  } else {
#pragma unroll
    for (int c = 0; c < Columns; ++c) out[c] = is_there ? from[c] : 0.0F;
  }
}

}  // namespace detail

/// RowWarps warps for each query row; the parts are added in the same order every time. The blocks of
/// decode_kernel leave registers for one block of this on a multiprocessor, which then waits beside them.
template <int HeadDim, int RowWarps>
__global__ void __launch_bounds__(kMergeThreads, 6)
    decode_merge_kernel(const __grid_constant__ DecodeMergeArgs a) {
  constexpr int kRows = kMergeThreads / 32 / RowWarps;
  constexpr int kColumns = HeadDim / 32;  // of a lane
  constexpr int kSharedRows = RowWarps > 1 ? kRows : 1;
  __shared__ float warp_out[kSharedRows][RowWarps][HeadDim];
  __shared__ float2 warp_sums[kSharedRows][RowWarps];  // largest score, and the sum of weights
  codegemm::cuda::detail::allow_next_kernel();         // it waits for this one's end before it writes
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int rank = warp % RowWarps;
  const int heads = a.kv_heads * a.group;
  // The grid has ended when its waiting blocks have. A row of more warps is its block's only one.
  for (int number = static_cast<int>(blockIdx.x) * kRows + warp / RowWarps; number < a.sequences * heads;
       number += static_cast<int>(gridDim.x) * kRows) {
    const int sequence = number / heads;
    const int head = number - sequence * heads;
    const int kv_head = head / a.group;
    const int row = head - kv_head * a.group;

    // prepare() had ended when the kernel before this one began, so that what it left may be read at once.
    const KeyFamily tail = detail::load_record(a.tails + sequence);
    detail::RowParts tails;
    tails.find(tail, a.early, kv_head, row, a.lanes, kTailRows, a.tail_partials.rows);
    detail::RowParts shared;
    if (tail.shared >= 0) {
      const KeyFamily family = detail::load_record(a.shared + tail.shared);
      shared.find(family, a.early, kv_head, (sequence - family.first_token) * a.group + row, a.lanes,
                  rows_of(shared_kind(family.rows, a.few)), a.shared_partials.rows);
    }
    codegemm::cuda::detail::wait_for_previous_kernel();
    // The blocks that had it wrote the output.
    if (tail.shared < 0 && (a.shared_only || tails.count <= 1)) continue;
    const int count = shared.count + tails.count;
    constexpr int kAtOnce = 12;  // parts that are asked for before the first is there
    float top = -INFINITY;
    float sum = 0.0F;
    float out[kColumns] = {};
    for (int first = rank; first < count; first += RowWarps * kAtOnce) {
      const auto row_of = [&](int part) {
        return part < shared.count
                   ? shared.first + static_cast<std::int64_t>(part) * shared.step
                   : tails.first + static_cast<std::int64_t>(part - shared.count) * tails.step;
      };
      // Lanes i and i + 16 have the i-th part's largest score and sum.
      const int mine = first + lane % 16 * RowWarps;
      float2 own = make_float2(-INFINITY, 0.0F);
      if (lane % 16 < kAtOnce && mine < count) {
        own = (mine < shared.count ? a.shared_partials.top : a.tail_partials.top)[row_of(mine)];
      }
      float values[kAtOnce][kColumns];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int part = first + u * RowWarps;
        const float* const from = part < shared.count ? a.shared_partials.out : a.tail_partials.out;
        detail::load_columns(values[u], from + row_of(part) * HeadDim + lane * kColumns, part < count);
      }
      float next = fmaxf(top, own.x);
#pragma unroll
      for (int step = 1; step < 16; step *= 2) next = fmaxf(next, __shfl_xor_sync(0xFFFFFFFFU, next, step));
      const float base = next == -INFINITY ? 0.0F : next;
      const float kept = detail::exp2_fast(top - base);
      const float factor = detail::exp2_fast(own.x - base);
      float added = factor * own.y;
#pragma unroll
      for (int step = 1; step < 16; step *= 2) added += __shfl_xor_sync(0xFFFFFFFFU, added, step);
      sum = sum * kept + added;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] *= kept;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const float of_part = __shfl_sync(0xFFFFFFFFU, factor, u);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) out[c] += of_part * values[u][c];
      }
      top = next;
    }
    if constexpr (RowWarps > 1) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) warp_out[warp / RowWarps][rank][lane * kColumns + c] = out[c];
      if (lane == 0) warp_sums[warp / RowWarps][rank] = make_float2(top, sum);
      __syncthreads();
      if (rank > 0) continue;
      float base = -INFINITY;
#pragma unroll
      for (int w = 0; w < RowWarps; ++w) base = fmaxf(base, warp_sums[warp / RowWarps][w].x);
      if (base == -INFINITY) base = 0.0F;
      sum = 0.0F;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] = 0.0F;
#pragma unroll
      for (int w = 0; w < RowWarps; ++w) {
        const float factor = detail::exp2_fast(warp_sums[warp / RowWarps][w].x - base);
        sum += factor * warp_sums[warp / RowWarps][w].y;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          out[c] += factor * warp_out[warp / RowWarps][w][lane * kColumns + c];
        }
      }
    }
    const float inverse = sum > 0.0F ? 1.0F / sum : (sum == 0.0F ? 0.0F : sum);  // no keys: zeros; NaN stays
    const std::int64_t at =
        sequence * a.out_stride + static_cast<std::int64_t>(head) * HeadDim + lane * kColumns;
    if constexpr (kColumns % 2 == 0) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        detail::store_pair(a.out, at + c, a.out_type, out[c] * inverse, out[c + 1] * inverse);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        codegemm::cuda::detail::store_scalar(a.out, at + c, a.out_type, out[c] * inverse);
      }
    }
  }
}

}  // namespace prefillshare::cuda
