// SPDX-License-Identifier: Apache-2.0
//
// codegemm/dense.hpp - y = x W^T with plain fp32 weights on the CPU, without allocating.
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

#if CODEGEMM_HAS_AVX2
#include <immintrin.h>
#endif

namespace codegemm {
namespace detail {

/// out[depth][16] = rows [0, 16) of w, of which `rows` exist.
inline void transpose_panel_portable(const float* w, std::int64_t stride, std::int64_t rows,
                                     std::int64_t first_k, std::int64_t depth, float* out) {
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  for (std::int64_t n = 0; n < kRows; ++n) {
    for (std::int64_t k = first_k; k < depth; ++k) out[k * kRows + n] = n < rows ? w[n * stride + k] : 0.0F;
  }
}

#if CODEGEMM_HAS_AVX2

// Rows n and n + 4, four columns each.
CODEGEMM_TARGET_AVX2 CODEGEMM_ALWAYS_INLINE __m256 two_rows_avx2(const float* w, std::int64_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(w)), _mm_loadu_ps(w + 4 * stride), 1);
}

// Eight rows, whole: 4 x 4 transpositions in both halves of the registers.
CODEGEMM_TARGET_AVX2 inline void transpose_eight_avx2(const float* w, std::int64_t stride, std::int64_t depth,
                                                      float* out) {
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  for (std::int64_t k = 0; k + 4 <= depth; k += 4, out += 4 * kRows) {
    const __m256 r0 = two_rows_avx2(w + k, stride);
    const __m256 r1 = two_rows_avx2(w + k + stride, stride);
    const __m256 r2 = two_rows_avx2(w + k + 2 * stride, stride);
    const __m256 r3 = two_rows_avx2(w + k + 3 * stride, stride);
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
    _mm256_store_ps(out, _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)));
    _mm256_store_ps(out + kRows, _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)));
    _mm256_store_ps(out + 2 * kRows, _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)));
    _mm256_store_ps(out + 3 * kRows, _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23)));
  }
}

#endif

/// Rows of w from first_row on to panels[3][depth][16], as run_dense_product() wants them.
inline void transpose_slab(Isa isa, MatrixView<const float> w, std::int64_t first_row, std::int64_t first_k,
                           std::int64_t depth, float* panels) {
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  const std::int64_t end_row = std::min(first_row + CpuTiles::kDenseTaskRows, w.rows);
  for (std::int64_t row = first_row; row < end_row; row += kRows) {
    const float* const from = w.row(row) + first_k;
    float* const out = panels + (row - first_row) * depth;
    const std::int64_t rows = std::min(kRows, end_row - row);
    std::int64_t done = 0;
#if CODEGEMM_HAS_AVX2
    if (has_avx2(isa) && rows == kRows) {
      transpose_eight_avx2(from, w.stride, depth, out);
      transpose_eight_avx2(from + 8 * w.stride, w.stride, depth, out + 8);
      done = depth / 4 * 4;
    }
#else
    static_cast<void>(isa);
#endif
    transpose_panel_portable(from, w.stride, rows, done, depth, out);
  }
}

/// dense_gemm() with the instruction set chosen by the caller: for tests.
[[nodiscard]] inline Status dense_gemm_with(MatrixView<const float> w, MatrixView<const float> x,
                                            MatrixView<float> y, std::span<std::byte> workspace,
                                            Executor& executor, Isa isa) {
  if (x.cols != w.cols || y.cols != w.rows || x.rows != y.rows) {
    return error(StatusCode::kShapeMismatch, "dense_gemm: W is ", w.rows, " x ", w.cols, ", x is ", x.rows,
                 " x ", x.cols, ", y is ", y.rows, " x ", y.cols);
  }
  if (x.rows == 0 || w.rows == 0) return {};
  if (y.data == nullptr || (w.cols > 0 && (w.data == nullptr || x.data == nullptr))) {
    return error(StatusCode::kNullPointer, "dense_gemm: W, x or y is null");
  }
  if (w.cols == 0) {
    for (std::int64_t t = 0; t < y.rows; ++t) std::fill_n(y.row(t), y.cols, 0.0F);
    return {};
  }
  const SlabPlan plan = make_dense_plan(w.rows, w.cols, x.rows);
  const std::size_t needed = static_cast<std::size_t>(plan.floats(executor.workers())) * sizeof(float);
  if (workspace.size() < needed) {
    return error(StatusCode::kWorkspaceTooSmall, "dense_gemm: workspace has ", workspace.size(), " bytes, ",
                 x.rows, " tokens on ", executor.workers(), " workers need ", needed);
  }
  if (reinterpret_cast<std::uintptr_t>(workspace.data()) % kBufferAlignment != 0) {
    return error(StatusCode::kMisaligned, "dense_gemm: workspace is not aligned to ", kBufferAlignment,
                 " bytes");
  }
  if (!isa_available(isa)) {
    return error(StatusCode::kUnsupported, "dense_gemm: this processor does not run ", isa_name(isa));
  }
  Multiply multiply = &detail::multiply<Isa::kPortable>;
#if CODEGEMM_HAS_AVX2
  if (has_avx2(isa)) multiply = &detail::multiply<Isa::kAvx2>;
#endif
  run_dense_product(plan, multiply, x, y, reinterpret_cast<float*>(workspace.data()), executor,
                    [&](std::int64_t first_row, std::int64_t first_k, std::int64_t depth, float* panels) {
                      transpose_slab(isa, w, first_row, first_k, depth, panels);
                    });
  return {};
}

}  // namespace detail

/// Bytes that dense_gemm() needs for W of rows x cols and any number of tokens up to `tokens`.
[[nodiscard]] inline std::size_t dense_workspace_bytes(std::int64_t rows, std::int64_t cols,
                                                       std::int64_t tokens, int workers) {
  if (rows <= 0 || cols <= 0 || tokens <= 0) return 0;
  return static_cast<std::size_t>(detail::make_dense_plan(rows, cols, tokens).floats(workers)) *
         sizeof(float);
}

/// y[T][N] = x[T][K] W^T for W[N][K] in fp32, with the tile that gemm() multiplies dequantized weights by:
/// meant for many tokens, since it brings W into panels first. Sums in fp32; the same bits for any number of
/// workers. Allocates nothing; the workspace is the caller's, 64-byte aligned. Errors: kShapeMismatch,
/// kNullPointer, kWorkspaceTooSmall, kMisaligned; y is then untouched.
[[nodiscard]] inline Status dense_gemm(MatrixView<const float> w, MatrixView<const float> x,
                                       MatrixView<float> y, std::span<std::byte> workspace,
                                       Executor& executor) {
  return detail::dense_gemm_with(w, x, y, workspace, executor, detect_isa());
}

}  // namespace codegemm
