// SPDX-License-Identifier: Apache-2.0
//
// codegemm/dense_nn.hpp - y = x W, or y += x W, in fp32 on the CPU: the products of a backward pass.
// Layer: gemm (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/cpu/dense_product.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/cpu/plan.hpp>

namespace codegemm {
namespace detail {

/// Columns [first, first + 48) of w, as far as they exist, to panels[3][depth][16], as run_dense_product()
/// wants them.
inline void copy_slab(MatrixView<const float> w, std::int64_t first, std::int64_t first_k, std::int64_t depth,
                      float* panels) {
  constexpr std::int64_t kColumns = CpuTiles::kDenseRows;
  const std::int64_t end = std::min(first + CpuTiles::kDenseTaskRows, w.cols);
  for (std::int64_t column = first; column < end; column += kColumns) {
    float* out = panels + (column - first) * depth;
    const std::int64_t count = std::min(kColumns, end - column);
    for (std::int64_t k = 0; k < depth; ++k, out += kColumns) {
      const float* const from = w.row(first_k + k) + column;
      if (count == kColumns) {
        std::copy_n(from, kColumns, out);
      } else {
        std::copy_n(from, count, out);
        std::fill_n(out + count, kColumns - count, 0.0F);
      }
    }
  }
}

}  // namespace detail

/// Bytes that dense_gemm_nn() needs for x[T][K] and W[K][N].
[[nodiscard]] inline std::size_t dense_nn_workspace_bytes(std::int64_t inner, std::int64_t cols,
                                                          std::int64_t tokens, int workers) {
  if (inner <= 0 || cols <= 0 || tokens <= 0) return 0;
  return static_cast<std::size_t>(detail::make_dense_plan(cols, inner, tokens).floats(workers)) *
         sizeof(float);
}

/// y[T][N] = x[T][K] W[K][N], or += if `accumulate`, in fp32 with the tile of dense_gemm(). The same bits for
/// any number of workers. Allocates nothing; the workspace is the caller's, 64-byte aligned. Errors:
/// kShapeMismatch, kNullPointer, kWorkspaceTooSmall, kMisaligned; y is then untouched.
[[nodiscard]] inline Status dense_gemm_nn(MatrixView<const float> x, MatrixView<const float> w,
                                          MatrixView<float> y, bool accumulate,
                                          std::span<std::byte> workspace, Executor& executor) {
  if (x.cols != w.rows || y.cols != w.cols || x.rows != y.rows) {
    return error(StatusCode::kShapeMismatch, "dense_gemm_nn: x is ", x.rows, " x ", x.cols, ", W is ", w.rows,
                 " x ", w.cols, ", y is ", y.rows, " x ", y.cols);
  }
  if (x.rows == 0 || w.cols == 0) return {};
  if (y.data == nullptr || (w.rows > 0 && (w.data == nullptr || x.data == nullptr)))
    return error(StatusCode::kNullPointer, "dense_gemm_nn: x, W or y is null");
  if (w.rows == 0) {
    for (std::int64_t t = 0; t < y.rows && !accumulate; ++t) std::fill_n(y.row(t), y.cols, 0.0F);
    return {};
  }
  const detail::SlabPlan plan = detail::make_dense_plan(w.cols, w.rows, x.rows);
  const std::size_t needed = static_cast<std::size_t>(plan.floats(executor.workers())) * sizeof(float);
  if (workspace.size() < needed) {
    return error(StatusCode::kWorkspaceTooSmall, "dense_gemm_nn: workspace has ", workspace.size(),
                 " bytes, ", x.rows, " tokens on ", executor.workers(), " workers need ", needed);
  }
  if (reinterpret_cast<std::uintptr_t>(workspace.data()) % kBufferAlignment != 0) {
    return error(StatusCode::kMisaligned, "dense_gemm_nn: workspace is not aligned to ", kBufferAlignment,
                 " bytes");
  }
  detail::Multiply multiply = &detail::multiply<Isa::kPortable>;
#if CODEGEMM_HAS_AVX2
  if (has_avx2(detect_isa())) multiply = &detail::multiply<Isa::kAvx2>;
#endif
  detail::run_dense_product(
      plan, multiply, x, y, reinterpret_cast<float*>(workspace.data()), executor,
      [&](std::int64_t first, std::int64_t first_k, std::int64_t depth, float* panels) {
        detail::copy_slab(w, first, first_k, depth, panels);
      },
      accumulate);
  return {};
}

}  // namespace codegemm
