// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/gram.hpp - X^T X of a layer's inputs, summed over a calibration text.
// Layer: quantize (host only).
#pragma once

#include <algorithm>
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

namespace detail {

/// Sums of products of K inputs over tokens, [K][K]: what the two classes below have in common.
class InputSums {
 public:
  [[nodiscard]] std::int64_t inputs() const noexcept { return inputs_; }  ///< K
  [[nodiscard]] std::int64_t tokens() const noexcept { return tokens_; }  ///< tokens added so far

 protected:
  using Dense = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Stride = Eigen::OuterStride<>;
  using Tokens = Eigen::Map<const Dense, 0, Stride>;
  static constexpr std::int64_t kTile = 96;  // rows of the sums that a task takes

  explicit InputSums(const char* name) : name_(name) {}

  /// Zeros.
  [[nodiscard]] Status begin(std::int64_t inputs) {
    if (inputs < 1 || inputs > (1 << 20))
      return error(StatusCode::kInvalidArgument, name_, ": ", inputs, " inputs, must be in 1..", 1 << 20);
    inputs_ = inputs;
    try {
      sums_.resize(static_cast<std::size_t>(inputs * inputs));
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, name_, ": ", inputs, " x ", inputs);
    }
    return {};
  }

  [[nodiscard]] Status check(const char* what, MatrixView<const float> x) const {
    if (x.cols != inputs_ || x.rows < 0 || x.stride < x.cols) {
      return error(StatusCode::kShapeMismatch, name_, " of ", inputs_, " inputs: ", what, " is ", x.rows,
                   " x ", x.cols, " of stride ", x.stride);
    }
    if (x.data == nullptr && x.rows > 0)
      return error(StatusCode::kNullPointer, name_, ": ", what, " is null");
    return {};
  }

  [[nodiscard]] static Tokens map(MatrixView<const float> x) {
    return Tokens(x.data, x.rows, x.cols, Stride(x.stride));
  }

  /// Calls body(i) for each tile of rows, which adds these tokens to it.
  template <class Body>
  [[nodiscard]] Status add_tiles(std::int64_t tokens, Executor& executor, Body&& body) {
    if (tokens == 0) return {};
    try {
      guarded_for(executor, tiles(), [&](std::int64_t task, int) { body(task); });
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, name_, ": no memory to multiply ", tokens, " x ", inputs_);
    }
    tokens_ += tokens;
    return {};
  }
  [[nodiscard]] std::int64_t tiles() const { return (inputs_ + kTile - 1) / kTile; }

  /// The first `width` columns of `count` rows of the sums.
  [[nodiscard]] Eigen::Map<Dense, 0, Stride> rows(std::int64_t first, std::int64_t count,
                                                  std::int64_t width) {
    return {sums_.data() + first * inputs_, count, width, Stride(inputs_)};
  }
  [[nodiscard]] const std::vector<float>& sums() const { return sums_; }
  /// Leaves none behind.
  [[nodiscard]] std::vector<float> take_sums() { return std::move(sums_); }
  /// What makes sums means.
  [[nodiscard]] float scale() const { return tokens_ > 0 ? 1.0F / static_cast<float>(tokens_) : 0.0F; }

 private:
  const char* name_;
  std::int64_t inputs_ = 0;
  std::int64_t tokens_ = 0;
  std::vector<float> sums_;  // [K][K]
};

}  // namespace detail

/// The calibration of one linear layer with K inputs: H = X^T X / T over the T tokens seen, [K][K],
/// symmetric, so that ||(W - W^) X^T||^2 / T = tr((W - W^) H (W - W^)^T). The sums are in fp32
/// over chunks of tokens; the same bits for any number of workers, if the tokens come in the same chunks.
class GramMatrix : public detail::InputSums {
 public:
  /// Zeros for K inputs. kInvalidArgument for K < 1 or above 2^20; kOutOfMemory.
  [[nodiscard]] static Result<GramMatrix> create(std::int64_t inputs) {
    GramMatrix out;
    if (Status status = out.begin(inputs); !status.ok()) return status;
    return out;
  }

  /// Adds the tokens x[T][K]. kShapeMismatch, kNullPointer; kOutOfMemory, after which the sums are of no use.
  [[nodiscard]] Status add(MatrixView<const float> x, Executor& executor) {
    if (Status status = check("x", x); !status.ok()) return status;
    const Tokens tokens = map(x);
    // The lower triangle by tiles; matrix() mirrors it.
    return add_tiles(x.rows, executor, [&](std::int64_t task) {
      const std::int64_t first = (tiles() - 1 - task) * kTile;  // the widest first
      const std::int64_t count = std::min(kTile, inputs() - first);
      rows(first, count, first + count).noalias() +=
          tokens.middleCols(first, count).transpose() * tokens.leftCols(first + count);
    });
  }

  /// H, [K][K] row-major.
  [[nodiscard]] std::vector<float> matrix() const& { return finished(sums()); }
  /// The same in the memory of the sums.
  [[nodiscard]] std::vector<float> matrix() && { return finished(take_sums()); }

 private:
  [[nodiscard]] std::vector<float> finished(std::vector<float> out) const {
    for (std::int64_t i = 0; i < inputs(); ++i) {
      for (std::int64_t j = 0; j <= i; ++j) {
        float& value = out[static_cast<std::size_t>(i * inputs() + j)];
        value *= scale();
        out[static_cast<std::size_t>(j * inputs() + i)] = value;
      }
    }
    return out;
  }

  GramMatrix() : InputSums("GramMatrix") {}
};

/// C = Y^T X / T of two kinds of inputs of one layer at the same T tokens: Y those that it has in the dense
/// model, X those that it has behind layers that were quantized already. [K][K], not symmetric.
class CrossGramMatrix : public detail::InputSums {
 public:
  /// Zeros for K inputs. Errors as GramMatrix::create.
  [[nodiscard]] static Result<CrossGramMatrix> create(std::int64_t inputs) {
    CrossGramMatrix out;
    if (Status status = out.begin(inputs); !status.ok()) return status;
    return out;
  }

  /// Adds y[T][K] and x[T][K], row by row the same tokens. Errors as GramMatrix::add.
  [[nodiscard]] Status add(MatrixView<const float> y, MatrixView<const float> x, Executor& executor) {
    if (Status status = check("y", y); !status.ok()) return status;
    if (Status status = check("x", x); !status.ok()) return status;
    if (x.rows != y.rows) {
      return error(StatusCode::kShapeMismatch, "CrossGramMatrix: y has ", y.rows, " tokens, x has ", x.rows);
    }
    const Tokens left = map(y);
    const Tokens right = map(x);
    return add_tiles(x.rows, executor, [&](std::int64_t task) {
      const std::int64_t first = task * kTile;
      const std::int64_t count = std::min(kTile, inputs() - first);
      rows(first, count, inputs()).noalias() += left.middleCols(first, count).transpose() * right;
    });
  }

  /// C, [K][K] row-major.
  [[nodiscard]] std::vector<float> matrix() const& { return finished(sums()); }
  /// The same in the memory of the sums.
  [[nodiscard]] std::vector<float> matrix() && { return finished(take_sums()); }

 private:
  [[nodiscard]] std::vector<float> finished(std::vector<float> out) const {
    for (float& value : out) value *= scale();
    return out;
  }

  CrossGramMatrix() : InputSums("CrossGramMatrix") {}
};

}  // namespace codegemm
