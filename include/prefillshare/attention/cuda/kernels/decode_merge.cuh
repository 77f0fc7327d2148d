// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_merge.cuh - the parts of each query row put together by their
// log-sum-exp.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
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
  bool few = false;          // see shared_kind()
  bool shared_only = false;  // rows of sequences that share nothing are there already
  bool parts_only = false;   // none is: whole items are parts, too
};

inline constexpr int kMergeThreads = 128;

namespace detail {

// Consecutive parts that hold one row.
struct RowParts {
  std::int64_t first = 0;  // row number in the partials
  int step = 0;            // rows from part to part
  int count = 0;

  __device__ __forceinline__ void find(const KeyFamily& family, int kv_head, int row, int lanes,
                                       int item_rows, int part_rows) {
    if (family.tiles == 0) return;
    const int head_group = kv_head / lanes;
    const int item = head_group * family.row_tiles + row / item_rows;
    const int begin = family.work_begin + item * family.tiles;
    const int block = family.superblock_of(begin);
    count = family.superblock_of(begin + family.tiles - 1) - block + 1;
    const int part = (block + family.item_begin + item) * lanes + kv_head - head_group * lanes;
    first = static_cast<std::int64_t>(part) * part_rows + row % item_rows;
    step = lanes * part_rows;
  }
};

}  // namespace detail

/// RowWarps warps for each query row; the parts are added in the same order every time.
template <int HeadDim, int RowWarps>
__global__ void __launch_bounds__(kMergeThreads, 8)
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
  const int number = static_cast<int>(blockIdx.x) * kRows + warp / RowWarps;
  if (number >= a.sequences * heads) return;  // the grid has ended when its waiting blocks have
  const int sequence = number / heads;
  const int head = number - sequence * heads;
  const int kv_head = head / a.group;
  const int row = head - kv_head * a.group;

  // prepare() had ended when the kernel before this one began, so that what it left may be read at once.
  const KeyFamily tail = detail::load_record(a.tails + sequence);
  detail::RowParts tails;
  tails.find(tail, kv_head, row, a.lanes, kTailRows, a.tail_partials.rows);
  detail::RowParts shared;
  if (tail.shared >= 0) {
    const KeyFamily family = detail::load_record(a.shared + tail.shared);
    shared.find(family, kv_head, (sequence - family.first_token) * a.group + row, a.lanes,
                rows_of(shared_kind(family.rows, a.few)), a.shared_partials.rows);
  }
  codegemm::cuda::detail::wait_for_previous_kernel();
  // The blocks that had it wrote the output.
  if (tail.shared < 0 && (a.shared_only || (!a.parts_only && tails.count <= 1))) return;
  const int count = shared.count + tails.count;
  // So many parts are asked for before the first is there. More would need registers that the blocks of
  // decode_kernel leave to this one, so that it waits beside them.
  constexpr int kAtOnce = RowWarps > 1 ? 6 : 4;
  float top = -INFINITY;
  float sum = 0.0F;
  float out[kColumns] = {};
  for (int i = rank; i < count; i += RowWarps * kAtOnce) {
    float2 tops[kAtOnce];
    float values[kAtOnce][kColumns];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int part = i + u * RowWarps;
      const bool is_there = part < count;
      const bool is_shared = part < shared.count;
      const DecodePartials& partials = is_shared ? a.shared_partials : a.tail_partials;
      const std::int64_t at = is_shared
                                  ? shared.first + static_cast<std::int64_t>(part) * shared.step
                                  : tails.first + static_cast<std::int64_t>(part - shared.count) * tails.step;
      tops[u] = is_there ? partials.top[at] : make_float2(-INFINITY, 0.0F);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        values[u][c] = is_there ? partials.out[at * HeadDim + c * 32 + lane] : 0.0F;
      }
    }
    float next = top;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) next = fmaxf(next, tops[u].x);
    const float base = next == -INFINITY ? 0.0F : next;
    const float kept = detail::exp2_fast(top - base);
    sum *= kept;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] *= kept;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const float factor = detail::exp2_fast(tops[u].x - base);
      sum += factor * tops[u].y;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] += factor * values[u][c];
    }
    top = next;
  }
  if constexpr (RowWarps > 1) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) warp_out[warp / RowWarps][rank][c * 32 + lane] = out[c];
    if (lane == 0) warp_sums[warp / RowWarps][rank] = make_float2(top, sum);
    __syncthreads();
    if (rank > 0) return;
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
      for (int c = 0; c < kColumns; ++c) out[c] += factor * warp_out[warp / RowWarps][w][c * 32 + lane];
    }
  }
  const float inverse = sum > 0.0F ? 1.0F / sum : (sum == 0.0F ? 0.0F : sum);  // no keys: zeros; NaN stays
  const std::int64_t at = sequence * a.out_stride + static_cast<std::int64_t>(head) * HeadDim + lane;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    codegemm::cuda::detail::store_scalar(a.out, at + c * 32, a.out_type, out[c] * inverse);
  }
}

}  // namespace prefillshare::cuda
