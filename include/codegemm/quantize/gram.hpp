// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/gram.hpp - X^T X of a layer's inputs, summed over a calibration text.
// Layer: quantize (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/quantize/guarded_loop.hpp>

namespace codegemm {

/// The calibration of one linear layer with K inputs: H = X^T X / T over the T tokens seen, [K][K],
/// symmetric, so that ||(W - W^) X^T||^2 / T = tr((W - W^) H (W - W^)^T). The sums are in fp32
/// over chunks of tokens; the same bits for any number of workers, if the tokens come in the same chunks.
class GramMatrix {
 public:
  /// Zeros for K inputs. kInvalidArgument for K < 1 or above 2^20; kOutOfMemory.
  [[nodiscard]] static Result<GramMatrix> create(std::int64_t inputs) {
    if (inputs < 1 || inputs > (1 << 20))
      return error(StatusCode::kInvalidArgument, "GramMatrix: ", inputs, " inputs, must be in 1..", 1 << 20);
    GramMatrix out;
    out.inputs_ = inputs;
    try {
      out.sums_.resize(static_cast<std::size_t>(inputs * inputs));
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "GramMatrix: ", inputs, " x ", inputs);
    }
    return out;
  }

  /// Adds the tokens x[T][K]. kShapeMismatch; kOutOfMemory, after which the sums are of no use.
  [[nodiscard]] Status add(MatrixView<const float> x, Executor& executor) {
    if (x.cols != inputs_) {
      return error(StatusCode::kShapeMismatch, "GramMatrix of ", inputs_, " inputs: x has ", x.cols);
    }
    if (x.rows == 0) return {};
    const std::int64_t tiles = (inputs_ + kTile - 1) / kTile;
    const Eigen::Map<const Dense, 0, Stride> tokens(x.data, x.rows, x.cols, Stride(x.stride));
    // The lower triangle by tiles; matrix() mirrors it.
    try {
      detail::guarded_for(executor, tiles, [&](std::int64_t task, int) {
        const std::int64_t first = (tiles - 1 - task) * kTile;  // the widest first
        const std::int64_t count = std::min(kTile, inputs_ - first);
        Eigen::Map<Dense, 0, Stride>(sums_.data() + first * inputs_, count, first + count, Stride(inputs_))
            .noalias() += tokens.middleCols(first, count).transpose() * tokens.leftCols(first + count);
      });
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "GramMatrix: no memory to multiply ", x.rows, " x ", x.cols);
    }
    tokens_ += x.rows;
    return {};
  }

  [[nodiscard]] std::int64_t inputs() const noexcept { return inputs_; }  ///< K
  [[nodiscard]] std::int64_t tokens() const noexcept { return tokens_; }  ///< rows of X added so far

  /// H, [K][K] row-major.
  [[nodiscard]] std::vector<float> matrix() const {
    std::vector<float> out(sums_.size());
    const float scale = tokens_ > 0 ? 1.0F / static_cast<float>(tokens_) : 0.0F;
    for (std::int64_t i = 0; i < inputs_; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) {
        const float value = scale * sums_[static_cast<std::size_t>(i * inputs_ + j)];
        out[static_cast<std::size_t>(i * inputs_ + j)] = value;
        out[static_cast<std::size_t>(j * inputs_ + i)] = value;
      }
    }
    return out;
  }

 private:
  using Dense = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Stride = Eigen::OuterStride<>;
  static constexpr std::int64_t kTile = 96;

  GramMatrix() = default;

  std::int64_t inputs_ = 0;
  std::int64_t tokens_ = 0;
  std::vector<float> sums_;  // [K][K], the lower triangle
};

/// C = Y^T X / T of two kinds of inputs of one layer at the same T tokens: Y those that it has in the dense
/// model, X those that it has behind layers that were quantized already. [K][K], not symmetric.
class CrossGramMatrix {
 public:
  /// Zeros for K inputs. Errors as GramMatrix::create.
  [[nodiscard]] static Result<CrossGramMatrix> create(std::int64_t inputs) {
    if (inputs < 1 || inputs > (1 << 20)) {
      return error(StatusCode::kInvalidArgument, "CrossGramMatrix: ", inputs, " inputs, must be in 1..",
                   1 << 20);
    }
    CrossGramMatrix out;
    out.inputs_ = inputs;
    try {
      out.sums_.resize(static_cast<std::size_t>(inputs * inputs));
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "CrossGramMatrix: ", inputs, " x ", inputs);
    }
    return out;
  }

  /// Adds y[T][K] and x[T][K], row by row the same tokens. kShapeMismatch; kOutOfMemory, after which the sums
  /// are of no use.
  [[nodiscard]] Status add(MatrixView<const float> y, MatrixView<const float> x, Executor& executor) {
    if (x.cols != inputs_ || y.cols != inputs_ || x.rows != y.rows) {
      return error(StatusCode::kShapeMismatch, "CrossGramMatrix of ", inputs_, " inputs: y is ", y.rows,
                   " x ", y.cols, ", x is ", x.rows, " x ", x.cols);
    }
    if (x.rows == 0) return {};
    constexpr std::int64_t kTile = 96;
    const Eigen::Map<const Dense, 0, Stride> left(y.data, y.rows, y.cols, Stride(y.stride));
    const Eigen::Map<const Dense, 0, Stride> right(x.data, x.rows, x.cols, Stride(x.stride));
    try {
      detail::guarded_for(executor, (inputs_ + kTile - 1) / kTile, [&](std::int64_t task, int) {
        const std::int64_t first = task * kTile;
        const std::int64_t count = std::min(kTile, inputs_ - first);
        Eigen::Map<Dense>(sums_.data() + first * inputs_, count, inputs_).noalias() +=
            left.middleCols(first, count).transpose() * right;
      });
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "CrossGramMatrix: no memory to multiply ", x.rows, " x ",
                   x.cols);
    }
    tokens_ += x.rows;
    return {};
  }

  [[nodiscard]] std::int64_t inputs() const noexcept { return inputs_; }  ///< K
  [[nodiscard]] std::int64_t tokens() const noexcept { return tokens_; }  ///< rows added so far

  /// C, [K][K] row-major.
  [[nodiscard]] std::vector<float> matrix() const {
    std::vector<float> out = sums_;
    const float scale = tokens_ > 0 ? 1.0F / static_cast<float>(tokens_) : 0.0F;
    for (float& value : out) value *= scale;
    return out;
  }

 private:
  using Dense = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Stride = Eigen::OuterStride<>;

  CrossGramMatrix() = default;

  std::int64_t inputs_ = 0;
  std::int64_t tokens_ = 0;
  std::vector<float> sums_;  // [K][K]
};

}  // namespace codegemm
