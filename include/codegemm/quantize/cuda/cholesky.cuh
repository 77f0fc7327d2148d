// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/cholesky.cuh - the Cholesky factor of a large matrix on a GPU.
// Layer: quantize/cuda (host, needs nvcc and cuBLAS).
// See: Golub and Van Loan, Matrix Computations, 4.2.6 (block Cholesky)
#pragma once

#include <algorithm>
#include <cstdint>

#include <codegemm/quantize/cuda/device_work.cuh>
#include <codegemm/quantize/cuda/kernels/cholesky.cuh>

namespace codegemm::cuda::detail {

/// The lower triangle of matrix[n][n], device memory, becomes L of matrix = L L^T; the upper one is left as
/// it is, or not: it has no meaning. By blocks of columns: a kernel factors the block on the diagonal, cuBLAS
/// solves for what is below it and takes both from the rest. `failed` (device memory) is set to 1 where the
/// matrix is not positive definite in fp32, else to 0; then L is of no use.
inline void factor_lower(DeviceWork& work, float* matrix, std::int64_t n, std::int32_t* failed) {
  work.zero(failed, sizeof(std::int32_t));
  const auto i = [](std::int64_t x) { return DeviceWork::narrow(x); };
  for (std::int64_t at = 0; at < n; at += kFactorBlock) {
    const std::int64_t width = std::min<std::int64_t>(kFactorBlock, n - at);
    const std::int64_t rest = n - at - width;
    float* const own = matrix + at * n + at;
    FactorBlockArgs args;
    args.block = own;
    args.failed = failed;
    args.stride = n;
    args.size = static_cast<std::int32_t>(width);
    work.start(factor_block_kernel<0>, args, 1, kFactorThreads);
    if (rest == 0) return;
    // Column by column this is U^T U with U = L^T: below means right of.
    const float one = 1.0F;
    const float minus = -1.0F;
    float* const below = own + width * n;
    work.blas("cublasStrsm", [&](cublasHandle_t handle) {
      return cublasStrsm(handle, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_T, CUBLAS_DIAG_NON_UNIT,
                         i(width), i(rest), &one, own, i(n), below, i(n));
    });
    work.blas("cublasSsyrk", [&](cublasHandle_t handle) {
      return cublasSsyrk(handle, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_T, i(rest), i(width), &minus, below, i(n),
                         &one, below + width, i(n));
    });
  }
}

/// x[rows][n] becomes x (L L^T)^-1, L as factor_lower() leaves it.
inline void solve_factored(DeviceWork& work, const float* factor, std::int64_t n, std::int64_t rows,
                           float* x) {
  const float one = 1.0F;
  for (const cublasOperation_t operation : {CUBLAS_OP_T, CUBLAS_OP_N}) {
    work.blas("cublasStrsm", [&](cublasHandle_t handle) {
      return cublasStrsm(handle, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, operation, CUBLAS_DIAG_NON_UNIT,
                         DeviceWork::narrow(n), DeviceWork::narrow(rows), &one, factor, DeviceWork::narrow(n),
                         x, DeviceWork::narrow(n));
    });
  }
}

}  // namespace codegemm::cuda::detail
