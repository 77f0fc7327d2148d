// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/dense_linear.hpp - a linear layer on fp32 weights.
// Layer: model (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <codegemm/dense.hpp>
#include <prefillshare/model/linear.hpp>

namespace prefillshare {

/// A linear layer on fp32 weights; allocates nothing. The weights may be shared: a tied head is the embedding
/// table, and a decode module that is the base is the base.
class DenseLinear {
 public:
  /// Up to so many tokens (a batch of decoding sequences), each is multiplied as it would be alone, to the
  /// bit.
  static constexpr std::int64_t kFewTokens = 8;

  DenseLinear() = default;

  /// weights: [rows][cols]; bias: empty or [rows].
  DenseLinear(std::shared_ptr<const std::vector<float>> weights, std::int64_t rows, std::int64_t cols,
              std::vector<float> bias = {})
      : weights_(std::move(weights)), bias_(std::move(bias)), rows_(rows), cols_(cols) {
    CODEGEMM_ASSERT(static_cast<std::int64_t>(weights_->size()) == rows * cols);
    CODEGEMM_ASSERT(bias_.empty() || static_cast<std::int64_t>(bias_.size()) == rows);
  }

  /// One that only tells its shape and bias, where weights are read when they are needed; forward() refuses.
  [[nodiscard]] static DenseLinear without_weights(std::int64_t rows, std::int64_t cols,
                                                   std::vector<float> bias = {}) {
    DenseLinear out;
    out.bias_ = std::move(bias);
    out.rows_ = rows;
    out.cols_ = cols;
    return out;
  }

  [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }  ///< N
  [[nodiscard]] std::int64_t cols() const noexcept { return cols_; }  ///< K
  /// Of the weights and the bias.
  [[nodiscard]] std::int64_t parameter_bytes() const noexcept {
    return (rows_ * cols_ + static_cast<std::int64_t>(bias_.size())) *
           static_cast<std::int64_t>(sizeof(float));
  }
  /// [rows][cols]; null without weights.
  [[nodiscard]] MatrixView<const float> weights() const noexcept {
    return MatrixView<const float>(weights_ ? weights_->data() : nullptr, rows_, cols_);
  }
  /// The same, to be kept.
  [[nodiscard]] const std::shared_ptr<const std::vector<float>>& shared_weights() const noexcept {
    return weights_;
  }
  [[nodiscard]] std::span<const float> bias() const noexcept { return bias_; }  ///< [N] or empty

  /// As LinearLayer says.
  [[nodiscard]] std::size_t workspace_bytes(std::int64_t tokens, int workers) const {
    return tokens > kFewTokens ? codegemm::dense_workspace_bytes(rows_, cols_, tokens, workers) : 0;
  }

  /// Y = x W^T + bias.
  Status forward(MatrixView<const float> x, MatrixView<float> y, std::span<std::byte> workspace,
                 Executor& executor) const {
    if (Status status = detail::check_linear(rows_, cols_, x, y); !status.ok()) return status;
    if (x.rows == 0) return {};
    if (weights_ == nullptr && rows_ * cols_ > 0)
      return codegemm::error(StatusCode::kNullPointer, "DenseLinear: ", rows_, " x ", cols_,
                             " without weights");
    if (x.rows > kFewTokens) {
      if (Status status = codegemm::dense_gemm(weights(), x, y, workspace, executor); !status.ok()) {
        return status;
      }
    } else {
      multiply_few(x, y, executor);
    }
    detail::add_bias(bias_, y);
    return {};
  }

 private:
  // Eigen's product of a row-major matrix and a vector reads the weights as fast as memory gives them, and
  // packs nothing; the tile's rows are in a near cache when the next token needs them.
  void multiply_few(MatrixView<const float> x, MatrixView<float> y, Executor& executor) const {
    using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    constexpr std::int64_t kRowTile = 96;
    codegemm::parallel_for(executor, (rows_ + kRowTile - 1) / kRowTile, [&](std::int64_t tile, int) {
      const std::int64_t first = tile * kRowTile;
      const std::int64_t count = std::min(kRowTile, rows_ - first);
      const Eigen::Map<const RowMajor> w(weights_->data() + first * cols_, count, cols_);
      for (std::int64_t t = 0; t < x.rows; ++t) {
        const Eigen::Map<const Eigen::VectorXf> xv(x.row(t), cols_);
        Eigen::Map<Eigen::VectorXf>(y.row(t) + first, count).noalias() = w * xv;
      }
    });
  }

  std::shared_ptr<const std::vector<float>> weights_;  // [rows][cols]
  std::vector<float> bias_;                            // [rows] or empty
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
};
static_assert(LinearLayer<DenseLinear>);

}  // namespace prefillshare
