// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/linear.hpp - what the forward pass asks of a linear layer.
// Layer: model (host only).
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

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

}  // namespace prefillshare
