// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/kernels/decode_merge.cuh - the parts of each query row put together by their
// log-sum-exp.
// Layer: attention/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/attention/cuda/kernels/decode.cuh>

namespace prefillshare::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct DecodeMergeArgs {
  DecodeWork tails;
  DecodeWork shared;  // not read where no tail names a shared family
  DecodePartials tail_partials;
  DecodePartials shared_partials;
  void* out = nullptr;  // [sequences][out_stride]
  std::int64_t out_stride = 0;
  ScalarType out_type = ScalarType::kHalf;
  int sequences = 0;
  int kv_heads = 0;
  int group = 0;  // query heads of a K/V head
  int lanes = 1;
};

inline constexpr int kMergeThreads = 128;

namespace detail {

// Consecutive parts that hold one row.
struct RowParts {
  std::int64_t first = 0;  // row number in the partials
  int step = 0;            // rows from part to part
  int count = 0;

  __device__ __forceinline__ void find(const DecodeWork& work, const KeyFamily& family, int kv_head, int row,
                                       int lanes, int item_rows, int part_rows) {
    if (family.tiles == 0) return;
    const int quota = *work.quota;
    const int head_group = kv_head / lanes;
    const int item = head_group * family.row_tiles + row / item_rows;
    const int begin = family.work_begin + item * family.tiles;
    const int block = begin / quota;
    count = (begin + family.tiles - 1) / quota - block + 1;
    const int part = (block + family.item_begin + item) * lanes + kv_head - head_group * lanes;
    first = static_cast<std::int64_t>(part) * part_rows + row % item_rows;
    step = lanes * part_rows;
  }
};

}  // namespace detail

/// RowWarps warps for each query row; the parts are added in the same order every time.
template <int HeadDim, int RowWarps>
__global__ void __launch_bounds__(kMergeThreads)
    decode_merge_kernel(const __grid_constant__ DecodeMergeArgs a) {
  constexpr int kRows = kMergeThreads / 32 / RowWarps;
  constexpr int kColumns = HeadDim / 32;  // of a lane
  __shared__ float warp_out[RowWarps > 1 ? RowWarps : 1][HeadDim];
  __shared__ float warp_sum[RowWarps > 1 ? RowWarps : 1];
  codegemm::cuda::detail::allow_next_kernel();  // it waits for this one's end before it writes
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
  const KeyFamily tail = detail::load_record(a.tails.families + sequence);
  detail::RowParts tails;
  tails.find(a.tails, tail, kv_head, row, a.lanes, kTailRows, a.tail_partials.rows);
  detail::RowParts shared;
  if (tail.shared >= 0) {
    const KeyFamily family = detail::load_record(a.shared.families + tail.shared);
    shared.find(a.shared, family, kv_head, (sequence - family.first_token) * a.group + row, a.lanes,
                rows_of(shared_kind(family.rows)), a.shared_partials.rows);
  }
  codegemm::cuda::detail::wait_for_previous_kernel();
  if (tail.shared < 0 && tails.count == 1) return;  // the block that had it wrote the output
  const int count = shared.count + tails.count;
  const auto row_of = [&](int i) {
    return i < shared.count ? shared.first + static_cast<std::int64_t>(i) * shared.step
                            : tails.first + static_cast<std::int64_t>(i - shared.count) * tails.step;
  };
  const auto top_of = [&](int i) {
    return i < shared.count ? a.shared_partials.top[row_of(i)] : a.tail_partials.top[row_of(i)];
  };
  float top = -INFINITY;
  for (int i = lane; i < count; i += 32) top = fmaxf(top, top_of(i).x);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFU, top, step));
  float out[kColumns] = {};
  float sum = 0.0F;
#pragma unroll 4
  for (int i = rank; i < count; i += RowWarps) {
    const float2 t = top_of(i);
    const float factor = t.x == -INFINITY ? 0.0F : detail::exp2_fast(t.x - top);
    const float* const from =
        (i < shared.count ? a.shared_partials.out : a.tail_partials.out) + row_of(i) * HeadDim + lane;
    sum += factor * t.y;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] += factor * from[c * 32];
  }
  if constexpr (RowWarps > 1) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) warp_out[rank][c * 32 + lane] = out[c];
    if (lane == 0) warp_sum[rank] = sum;
    __syncthreads();
    if (rank > 0) return;
#pragma unroll
    for (int w = 1; w < RowWarps; ++w) {
      sum += warp_sum[w];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] += warp_out[w][c * 32 + lane];
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
