// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/rank_group.cuh - what a tensor-parallel model asks of the GPUs that it is spread
// over.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <concepts>

#include <cuda_runtime.h>

#include <prefillshare/model/cuda/linear.cuh>

namespace prefillshare::cuda {

/// One rank's end of a group. All ranks make the same calls in the same order, each in a stream of its own;
/// a call puts work into the stream and may be captured into a graph.
///   sum(x, stream)     x[rows][cols], stride = cols, becomes the sum over the ranks: the same bits on all
///                      and in every run
///   gather(y, stream)  columns rank * cols / ranks on of each row of y[rows][cols], cols / ranks of them, go
///                      from each rank to all
template <class G>
concept RankGroup = requires(const G& group, MatrixView<float> x, cudaStream_t stream) {
  { group.rank() } -> std::same_as<int>;
  { group.ranks() } -> std::same_as<int>;
  { group.sum(x, stream) } -> std::same_as<Status>;
  { group.gather(x, stream) } -> std::same_as<Status>;
};

namespace detail {

[[nodiscard]] inline Status check_sum(MatrixView<float> x) {
  if (x.rows >= 0 && x.cols >= 0 && (x.rows <= 1 || x.stride == x.cols)) return {};
  return codegemm::error(StatusCode::kShapeMismatch, "sum over ranks of ", x.rows, " x ", x.cols,
                         " with stride ", x.stride, ": rows must follow one another");
}
[[nodiscard]] inline Status check_gather(MatrixView<float> y, int ranks) {
  if (y.rows >= 0 && y.cols >= 0 && y.cols % ranks == 0 && y.cols <= (1 << 30)) return {};
  return codegemm::error(StatusCode::kShapeMismatch, "gather of ", y.rows, " x ", y.cols,
                         ": the columns are no multiple of ", ranks, " ranks");
}

}  // namespace detail

}  // namespace prefillshare::cuda
