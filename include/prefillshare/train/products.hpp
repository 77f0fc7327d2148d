// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/products.hpp - the three matrix products of a linear layer's forward and backward pass.
// Layer: train (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include <codegemm/dense.hpp>
#include <codegemm/dense_nn.hpp>
#include <codegemm/quantize/guarded_loop.hpp>
#include <prefillshare/train/tensor.hpp>

namespace prefillshare::detail {

/// Multiplies on an executor, with scratch memory that grows to what the largest product needs and is kept.
/// fp32 goes through codegemm's tile, double through Eigen; the same bits for any number of workers. Shapes
/// are the caller's business. std::bad_alloc where memory is short.
template <TrainScalar T>
class Products {
 public:
  explicit Products(Executor& executor) : executor_(executor) {}

  [[nodiscard]] Executor& executor() const noexcept { return executor_; }

  /// y[T][N] = x[T][K] w[N][K]^T.
  void nt(MatrixView<const T> x, MatrixView<const T> w, MatrixView<T> y) {
    if constexpr (std::is_same_v<T, float>) {
      reserve(codegemm::dense_workspace_bytes(w.rows, w.cols, x.rows, executor_.workers()));
      require(codegemm::dense_gemm(w, x, y, std::as_writable_bytes(scratch_.span()), executor_));
    } else {
      by_rows(y.rows, [&](std::int64_t first, std::int64_t count) {
        eigen_nt<T>(x.rows_from(first, count), w, y.rows_from(first, count));
      });
    }
  }

  /// y[T][N] = x[T][K] w[K][N], or += if `add`.
  void nn(MatrixView<const T> x, MatrixView<const T> w, MatrixView<T> y, bool add) {
    if constexpr (std::is_same_v<T, float>) {
      reserve(codegemm::dense_nn_workspace_bytes(w.rows, w.cols, x.rows, executor_.workers()));
      require(codegemm::dense_gemm_nn(x, w, y, add, std::as_writable_bytes(scratch_.span()), executor_));
    } else {
      by_rows(y.rows, [&](std::int64_t first, std::int64_t count) {
        eigen_nn<T>(x.rows_from(first, count), w, y.rows_from(first, count), add);
      });
    }
  }

  /// y[N][K] = a[T][N]^T b[T][K], or += if `add`.
  void tn(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> y, bool add) {
    if constexpr (std::is_same_v<T, float>) {
      if (turned_.size() < a.rows * a.cols) turned_.resize(a.rows * a.cols);
      const MatrixView<T> turned(turned_.data(), a.cols, a.rows);
      by_rows(a.cols, [&](std::int64_t first, std::int64_t count) {
        map_of<T>(turned.rows_from(first, count)) = map_of<T>(a).middleCols(first, count).transpose();
      });
      nn(turned, b, y, add);
    } else {
      by_rows(y.rows, [&](std::int64_t first, std::int64_t count) {
        const MatrixView<const T> part(a.data + first, a.rows, count, a.stride);
        eigen_tn<T>(part, b, y.rows_from(first, count), add);
      });
    }
  }

 private:
  template <class Body>
  void by_rows(std::int64_t rows, Body&& body) {
    constexpr std::int64_t kRows = 64;
    codegemm::detail::guarded_for(executor_, (rows + kRows - 1) / kRows, [&](std::int64_t task, int) {
      body(task * kRows, std::min(kRows, rows - task * kRows));
    });
  }

  void reserve(std::size_t bytes) {
    const auto floats = static_cast<std::int64_t>(bytes / sizeof(float));
    if (scratch_.size() < floats) scratch_.resize(floats);
  }

  // The shapes come from a validated model, the memory from reserve(): only a fault here can fail.
  static void require([[maybe_unused]] const Status& status) { CODEGEMM_ASSERT(status.ok()); }

  Executor& executor_;
  Tensor<float> scratch_;
  Tensor<T> turned_;  // a^T
};

}  // namespace prefillshare::detail
