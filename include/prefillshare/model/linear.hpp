// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/linear.hpp - what the forward pass asks of a linear layer, and the dense one.
// Layer: model (host only).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// y[T][N] = x[T][K] W^T + bias. N = rows(), K = cols(); parameter_bytes() is what stays in memory.
/// forward() must give the same bits for any number of workers, and may use `workspace`, aligned to 64 bytes,
/// of workspace_bytes(most, workers) for any most >= T.
template <class L>
concept LinearLayer = requires(const L& layer, MatrixView<const float> x, MatrixView<float> y,
                               std::span<std::byte> workspace, Executor& executor) {
  { layer.rows() } -> std::same_as<std::int64_t>;
  { layer.cols() } -> std::same_as<std::int64_t>;
  { layer.parameter_bytes() } -> std::same_as<std::int64_t>;
  { layer.workspace_bytes(std::int64_t{}, int{}) } -> std::same_as<std::size_t>;
  { layer.forward(x, y, workspace, executor) } -> std::same_as<Status>;
};

namespace detail {

/// The operands of layer.forward(), checked once for every kind of layer.
[[nodiscard]] inline Status check_linear(std::int64_t rows, std::int64_t cols, MatrixView<const float> x,
                                         MatrixView<float> y) {
  if (x.cols != cols || y.cols != rows || x.rows != y.rows) {
    return error(StatusCode::kShapeMismatch, "linear layer of ", rows, " x ", cols, ": x is ", x.rows, " x ",
                 x.cols, ", y is ", y.rows, " x ", y.cols);
  }
  return {};
}

inline void add_bias(std::span<const float> bias, MatrixView<float> y) {
  for (std::int64_t t = 0; t < y.rows; ++t) {
    float* row = y.row(t);
    for (std::size_t n = 0; n < bias.size(); ++n) row[n] += bias[n];
  }
}

}  // namespace detail

/// A linear layer on fp32 weights, multiplied by Eigen, which takes its packing buffers from the heap when
/// they exceed 128 KiB. The weights may be shared: a tied head is the embedding table, and a decode module
/// that is the base is the base.
class DenseLinear {
 public:
  DenseLinear() = default;

  /// weights: [rows][cols]; bias: empty or [rows].
  DenseLinear(std::shared_ptr<const std::vector<float>> weights, std::int64_t rows, std::int64_t cols,
              std::vector<float> bias = {})
      : weights_(std::move(weights)), bias_(std::move(bias)), rows_(rows), cols_(cols) {
    CODEGEMM_ASSERT(static_cast<std::int64_t>(weights_->size()) == rows * cols);
    CODEGEMM_ASSERT(bias_.empty() || static_cast<std::int64_t>(bias_.size()) == rows);
  }

  [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }
  [[nodiscard]] std::int64_t cols() const noexcept { return cols_; }
  [[nodiscard]] std::int64_t parameter_bytes() const noexcept {
    return (rows_ * cols_ + static_cast<std::int64_t>(bias_.size())) *
           static_cast<std::int64_t>(sizeof(float));
  }
  /// [rows][cols].
  [[nodiscard]] MatrixView<const float> weights() const noexcept {
    return MatrixView<const float>(weights_ ? weights_->data() : nullptr, rows_, cols_);
  }
  [[nodiscard]] std::span<const float> bias() const noexcept { return bias_; }

  [[nodiscard]] std::size_t workspace_bytes(std::int64_t /*tokens*/, int /*workers*/) const noexcept {
    return 0;
  }

  Status forward(MatrixView<const float> x, MatrixView<float> y, std::span<std::byte> /*workspace*/,
                 Executor& executor) const {
    if (Status status = detail::check_linear(rows_, cols_, x, y); !status.ok()) return status;
    if (x.rows == 0) return {};
    const std::int64_t row_tiles = (rows_ + kRowTile - 1) / kRowTile;
    const std::int64_t token_tiles = (x.rows + kTokenTile - 1) / kTokenTile;
    codegemm::parallel_for(executor, row_tiles * token_tiles, [&](std::int64_t task, int) {
      const std::int64_t first_row = task % row_tiles * kRowTile;
      const std::int64_t first_token = task / row_tiles * kTokenTile;
      multiply_tile(x.rows_from(first_token, std::min(kTokenTile, x.rows - first_token)), y, first_token,
                    first_row, std::min(kRowTile, rows_ - first_row));
    });
    detail::add_bias(bias_, y);
    return {};
  }

 private:
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Stride = Eigen::OuterStride<>;

  // Large enough that Eigen's packing of both operands is a few percent of the products.
  static constexpr std::int64_t kRowTile = 96;
  static constexpr std::int64_t kTokenTile = 512;

  void multiply_tile(MatrixView<const float> x, MatrixView<float> y, std::int64_t first_token,
                     std::int64_t first_row, std::int64_t count) const {
    const Eigen::Map<const RowMajor> w(weights_->data() + first_row * cols_, count, cols_);
    float* out = y.row(first_token) + first_row;
    if (x.rows == 1) {
      const Eigen::Map<const Eigen::VectorXf> xv(x.data, cols_);
      Eigen::Map<Eigen::VectorXf>(out, count).noalias() = w * xv;
      return;
    }
    const Eigen::Map<const RowMajor, 0, Stride> xm(x.data, x.rows, cols_, Stride(x.stride));
    Eigen::Map<RowMajor, 0, Stride>(out, x.rows, count, Stride(y.stride)).noalias() = xm * w.transpose();
  }

  std::shared_ptr<const std::vector<float>> weights_;  // [rows][cols]
  std::vector<float> bias_;                            // [rows] or empty
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
};
static_assert(LinearLayer<DenseLinear>);

}  // namespace prefillshare
