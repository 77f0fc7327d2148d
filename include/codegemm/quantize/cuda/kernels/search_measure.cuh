// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/kernels/search_measure.cuh - what the beam search of all rows reads of a stretch of
// columns.
// Layer: quantize/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <codegemm/quantize/cuda/kernels/rows.cuh>

namespace codegemm::cuda::detail {

// What all rows share at the vectors of a stretch: Q, the block of H or L, and c Q c^T of every centroid.
struct MeasureArgs {
  const float* cross = nullptr;  // H or L, [cols][cols]
  const float* books = nullptr;  // [m][centroids][v]
  float* q = nullptr;            // [vectors][v][v]
  float* factor = nullptr;       // [vectors][v][v]
  float* norms = nullptr;        // [vectors][m][centroids]
  std::int64_t cols = 0;
  std::int64_t first = 0;  // column of the first vector
  std::int32_t m = 0;
  std::int32_t centroids = 0;
  bool rebuild = false;
};

// Grid: (vectors, m, stretches of kRowThreads centroids).
template <int kVecLen>
__global__ void __launch_bounds__(kRowThreads) measure_kernel(const __grid_constant__ MeasureArgs a) {
  __shared__ float block[kVecLen * kVecLen];
  __shared__ float q[kVecLen * kVecLen];
  const std::int64_t k = a.first + static_cast<std::int64_t>(blockIdx.x) * kVecLen;
  for (int i = static_cast<int>(threadIdx.x); i < kVecLen * kVecLen; i += kRowThreads)
    block[i] = a.cross[(k + i / kVecLen) * a.cols + k + i % kVecLen];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kVecLen * kVecLen; i += kRowThreads) {
    float value = block[i];
    if (a.rebuild) {
      const int row = i / kVecLen;
      const int column = i % kVecLen;
      value = 0.0F;
      for (int d = 0; d <= min(row, column); ++d)
        value += block[row * kVecLen + d] * block[column * kVecLen + d];
    }
    q[i] = value;
    if (blockIdx.y == 0 && blockIdx.z == 0) {
      a.q[static_cast<std::int64_t>(blockIdx.x) * kVecLen * kVecLen + i] = value;
      a.factor[static_cast<std::int64_t>(blockIdx.x) * kVecLen * kVecLen + i] = block[i];
    }
  }
  __syncthreads();
  const int code = static_cast<int>(blockIdx.z) * kRowThreads + static_cast<int>(threadIdx.x);
  if (code >= a.centroids) return;
  const float* const c = a.books + (static_cast<std::int64_t>(blockIdx.y) * a.centroids + code) * kVecLen;
  float x[kVecLen];
#pragma unroll
  for (int d = 0; d < kVecLen; ++d) x[d] = c[d];
  float norm = 0.0F;
#pragma unroll
  for (int i = 0; i < kVecLen; ++i) {
#pragma unroll
    for (int d = 0; d <= i; ++d) norm += (i == d ? 1.0F : 2.0F) * q[i * kVecLen + d] * x[i] * x[d];
  }
  a.norms[(static_cast<std::int64_t>(blockIdx.x) * a.m + blockIdx.y) * a.centroids + code] = norm;
}

}  // namespace codegemm::cuda::detail
