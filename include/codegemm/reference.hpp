// SPDX-License-Identifier: Apache-2.0
//
// codegemm/reference.hpp - the right answer, by plain loops in double.
// Layer: data (host only).
#pragma once

#include <cstdint>

#include <codegemm/base/matrix_view.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm {

/// One weight: W[n, k] = s[n, k / g] * sum_c C_c[code_c[n, k / v]][k % v]. Exact in double up to the last
/// rounding: products and sums of a few fp16 numbers.
[[nodiscard]] inline double reference_weight(const QuantizedMatrixView& w, std::int64_t n, std::int64_t k) {
  const std::int64_t v = w.format.v;
  double sum = 0.0;
  for (std::int64_t c = 0; c < w.format.m; ++c) {
    const std::int64_t centroid = c * w.format.centroids() + w.code(c, n, k / v);
    sum += static_cast<double>(w.codebooks[centroid * v + k % v].to_float());
  }
  return static_cast<double>(w.scale(n, k)) * sum;
}

/// W as a dense matrix, out[N][K]. The view must be valid and `out` of its shape: nothing is checked here.
template <class T>
void reference_dequantize(const QuantizedMatrixView& w, MatrixView<T> out) {
  for (std::int64_t n = 0; n < w.rows; ++n) {
    for (std::int64_t k = 0; k < w.cols; ++k) out.row(n)[k] = static_cast<T>(reference_weight(w, n, k));
  }
}

/// y[T][N] = x[T][K] W^T, summed in double. The view must be valid and the shapes must fit.
template <class X, class Y>
void reference_gemm(const QuantizedMatrixView& w, MatrixView<X> x, MatrixView<Y> y) {
  for (std::int64_t n = 0; n < w.rows; ++n) {
    for (std::int64_t t = 0; t < x.rows; ++t) y.row(t)[n] = Y{0};
    for (std::int64_t k = 0; k < w.cols; ++k) {
      const double weight = reference_weight(w, n, k);
      for (std::int64_t t = 0; t < x.rows; ++t) {
        y.row(t)[n] += static_cast<Y>(static_cast<double>(x.row(t)[k]) * weight);
      }
    }
  }
}

}  // namespace codegemm
