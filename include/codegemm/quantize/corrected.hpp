// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/corrected.hpp - the weights that, on inputs that are off already, come nearest to the
// dense layer's outputs on its own inputs.
// Layer: quantize (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include <Eigen/Cholesky>
#include <Eigen/Core>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/quantize/guarded_loop.hpp>

namespace codegemm {

/// W' = W (C + d I) (H + d I)^-1, [N][K], with H = X^T X and C = Y^T X ([K][K], GramMatrix and
/// CrossGramMatrix) and d = damping times H's mean diagonal: the least-squares solution of W' X^T = W Y^T,
/// held near W by the damping. Quantizing W' in place of W makes up for the errors of the layers before, as
/// far as this layer can: tr((W' - W^) H (W' - W^)^T) is ||W Y^T - W^ X^T||^2 up to a constant. Where Y = X,
/// W' = W. The same bits for any number of workers. kShapeMismatch; kNullPointer; kInvalidArgument for a
/// damping that is not positive and finite or an H that even with it cannot be factored; kOutOfMemory.
[[nodiscard]] inline Result<std::vector<float>> corrected_weights(MatrixView<const float> w,
                                                                  MatrixView<const float> gram,
                                                                  MatrixView<const float> cross,
                                                                  double damping, Executor& executor) {
  const std::int64_t k = w.cols;
  if (w.rows < 0 || k < 0 || w.stride < k || gram.rows != k || gram.cols != k || gram.stride != k ||
      cross.rows != k || cross.cols != k || cross.stride != k) {
    return error(StatusCode::kShapeMismatch, "corrected_weights: H is ", gram.rows, " x ", gram.cols,
                 ", C is ", cross.rows, " x ", cross.cols, ", the weights have ", k, " columns");
  }
  if (w.rows > 0 && k > 0 && (w.data == nullptr || gram.data == nullptr || cross.data == nullptr))
    return error(StatusCode::kNullPointer, "corrected_weights: weights, H or C is null");
  if (!(damping > 0.0) || std::isinf(damping))
    return error(StatusCode::kInvalidArgument, "corrected_weights: damping is ", damping,
                 ", must be positive");
  using Dense = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  try {
    std::vector<float> out(static_cast<std::size_t>(w.rows * k));
    if (out.empty()) return out;
    Dense h = Eigen::Map<const Dense>(gram.data, k, k);
    Dense c = Eigen::Map<const Dense>(cross.data, k, k);
    const float add = static_cast<float>(damping) * h.trace() / static_cast<float>(k);
    h.diagonal().array() += add;
    c.diagonal().array() += add;
    const Eigen::LLT<Dense> factor(h);
    if (factor.info() != Eigen::Success) {
      return error(StatusCode::kInvalidArgument, "corrected_weights: H of ", k, " x ", k, " and damping ",
                   damping, " is not positive definite");
    }
    constexpr std::int64_t kTile = 64;
    detail::guarded_for(executor, (w.rows + kTile - 1) / kTile, [&](std::int64_t task, int) {
      const std::int64_t first = task * kTile;
      const std::int64_t count = std::min(kTile, w.rows - first);
      Dense rows(count, k);
      for (std::int64_t i = 0; i < count; ++i) std::copy_n(w.row(first + i), k, rows.row(i).data());
      Dense right = c.transpose() * rows.transpose();
      factor.solveInPlace(right);
      Eigen::Map<Dense>(out.data() + first * k, count, k) = right.transpose();
    });
    return out;
  } catch (const std::bad_alloc&) {
    return error(StatusCode::kOutOfMemory, "corrected_weights: ", w.rows, " x ", k);
  }
}

}  // namespace codegemm
