// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/add_splits.cuh - the second kernel of a product by wgmma that is split along K.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/tile_layout.hpp>
#include <codegemm/cuda/kernels/output.cuh>

namespace codegemm::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct AddSplitsArgs {
  const float* partials = nullptr;  // [splits][tokens][row_tiles * 16]
  int splits = 0;
  int tokens = 0;
  int row_tiles = 0;
  Output out;
};

/// Adds the splits' sums, always in their order; four rows of a token a thread.
template <int>  // a template: one definition, however many files include this
__global__ void add_splits_kernel(const __grid_constant__ AddSplitsArgs a) {
  detail::allow_next_kernel();
  detail::wait_for_previous_kernel();
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  const int token = static_cast<int>(blockIdx.y);
  const bool gated = a.out.half_rows > 0;
  if (row >= (gated ? a.out.half_rows : a.out.rows)) return;
  const std::int64_t rows = static_cast<std::int64_t>(a.row_tiles) * kTileRows;
  const auto sum_of = [&](int first) {
    const float* const from = a.partials + token * rows + first;
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll 4
    for (int s = 0; s < a.splits; ++s) {
      const float4 more = __ldcg(reinterpret_cast<const float4*>(from + s * a.tokens * rows));
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
  };
  const float4 sum = sum_of(row);
  if (!gated) {
    detail::store_output4(a.out, token, row, sum);
    return;
  }
  const float4 up = sum_of(row + a.out.half_rows);
  detail::store_gated(a.out, token, row, sum.x, up.x);
  detail::store_gated(a.out, token, row + 1, sum.y, up.y);
  detail::store_gated(a.out, token, row + 2, sum.z, up.z);
  detail::store_gated(a.out, token, row + 3, sum.w, up.w);
}

}  // namespace codegemm::cuda
