// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/normed_row.cuh - activations that a product normalizes itself, instead of a kernel in
// front of it.
// Layer: cuda/kernels (device).
#pragma once

namespace codegemm::cuda {

/// One token's activations x * weight / sqrt(mean(x^2) + epsilon) (RMSNorm). Pointers are to device memory,
/// 16-byte aligned; as many values each as W has columns.
struct NormedRow {
  const float* x = nullptr;       ///< before it is normalized; null: there is none
  const float* weight = nullptr;  ///< RMSNorm's
  float epsilon = 0.0F;           ///< the same
};

namespace detail {

// This thread's share of a row's squares, of a block of Threads. `cols`: a multiple of 4.
template <int Threads>
[[nodiscard]] __device__ __forceinline__ float squares_of(const NormedRow& row, int cols) {
  float sum = 0.0F;
#pragma unroll 1  // one or two in most cases
  for (int at = static_cast<int>(threadIdx.x) * 4; at < cols; at += Threads * 4) {
    const float4 x = *reinterpret_cast<const float4*>(row.x + at);
    sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
  return sum;
}
// Over a warp, in every lane; always in the same order.
[[nodiscard]] __device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFU, value, step);
  return value;
}

}  // namespace detail
}  // namespace codegemm::cuda
