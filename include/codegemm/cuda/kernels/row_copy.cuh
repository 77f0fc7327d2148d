// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/row_copy.cuh - a row that a gather block normalizes, by copies into shared memory.
// Layer: cuda/kernels (device).
#pragma once

#include <codegemm/cuda/block/half_layout.hpp>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/kernels/gather_args.cuh>

namespace codegemm::cuda::detail {

// The row, and behind it RMSNorm's weights of the block's granules, come to where the block's first table
// will be. Loads would stand in a line behind those of the first tiles.
struct RowCopy {
  int first = 0;  // column of the granules

#if __CUDA_ARCH__ >= 900
  // One warp, before it waits for the kernel in front. The block or its cluster meets before anyone waits at
  // the barrier.
  __device__ __forceinline__ void prepare(const GatherArgs& a, unsigned table, unsigned barrier) const {
    if (threadIdx.x % 32 != 0) return;
    const unsigned row = static_cast<unsigned>(a.cols) * 4U;
    const int columns = min(a.granules_per_block * kHalfActivations, a.cols - first);
    const unsigned share = static_cast<unsigned>(columns) * 4U;
    init_barrier(barrier, 1);
    publish_barriers();
    arrive_and_expect(barrier, row + share);
    copy_bulk(table + row, a.normed.weight + first, share, barrier);
  }
  __device__ __forceinline__ void start(const GatherArgs& a, unsigned table, unsigned barrier) const {
    if (threadIdx.x % 32 != 0) return;
    copy_bulk(table, a.normed.x, static_cast<unsigned>(a.cols) * 4U, barrier);
  }
#endif

  // The row and the weights as if they were whole, after the wait.
  [[nodiscard]] __device__ __forceinline__ NormedRow in(const char* table, const NormedRow& row,
                                                        int cols) const {
    NormedRow out = row;
    out.x = reinterpret_cast<const float*>(table);
    out.weight = out.x + cols - first;
    return out;
  }
};

}  // namespace codegemm::cuda::detail
