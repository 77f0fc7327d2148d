// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/kernels/cholesky.cuh - the Cholesky factor of a small block, and what is added to a
// diagonal.
// Layer: quantize/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace codegemm::cuda::detail {

inline constexpr int kFactorBlock = 64;  // columns factored at once
inline constexpr int kFactorThreads = 256;

struct FactorBlockArgs {
  float* block = nullptr;  // [size][size], rows `stride` apart
  std::int32_t* failed = nullptr;
  std::int64_t stride = 0;
  std::int32_t size = 0;  // at most kFactorBlock
};

// One block of threads. The lower triangle becomes L; failed is set where a pivot is not positive.
template <int>
__global__ void __launch_bounds__(kFactorThreads)
    factor_block_kernel(const __grid_constant__ FactorBlockArgs args) {
  __shared__ float a[kFactorBlock][kFactorBlock + 1];
  const int n = args.size;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < n * n; i += kFactorThreads)
    a[i / n][i % n] = args.block[i / n * args.stride + i % n];
  for (int j = 0; j < n; ++j) {
    __syncthreads();
    const float pivot = a[j][j];
    if (!(pivot > 0.0F) || !isfinite(pivot)) {
      if (thread == 0) *args.failed = 1;
      return;
    }
    const float root = sqrtf(pivot);
    __syncthreads();  // all have read it
    for (int i = j + thread; i < n; i += kFactorThreads) a[i][j] = i == j ? root : a[i][j] / root;
    __syncthreads();
    const int rest = n - j - 1;
    for (int i = thread; i < rest * rest; i += kFactorThreads) {
      const int row = j + 1 + i / rest;
      const int column = j + 1 + i % rest;
      if (column <= row) a[row][column] -= a[row][j] * a[column][j];
    }
  }
  __syncthreads();
  for (int i = thread; i < n * n; i += kFactorThreads) {
    if (i % n <= i / n) args.block[i / n * args.stride + i % n] = a[i / n][i % n];
  }
}

inline constexpr int kDampThreads = 256;

struct DampArgs {
  float* gram = nullptr;   // [size][size]
  float* cross = nullptr;  // the same
  double damping = 0.0;    // in shares of gram's mean diagonal
  std::int32_t size = 0;
};

// One block of threads adds the damping to both diagonals.
template <int>
__global__ void __launch_bounds__(kDampThreads) damp_kernel(const __grid_constant__ DampArgs args) {
  __shared__ double sums[kDampThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t step = static_cast<std::int64_t>(args.size) + 1;
  double sum = 0.0;
  for (int i = thread; i < args.size; i += kDampThreads) sum += static_cast<double>(args.gram[i * step]);
  sums[thread] = sum;
  for (int half = kDampThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  __syncthreads();
  const auto add = static_cast<float>(args.damping * sums[0] / static_cast<double>(args.size));
  for (int i = thread; i < args.size; i += kDampThreads) {
    args.gram[i * step] += add;
    args.cross[i * step] += add;
  }
}

}  // namespace codegemm::cuda::detail
