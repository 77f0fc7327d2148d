// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/linear.cuh - what the forward pass on the GPU asks of a linear layer, and the layer
// whose weights stay codes.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <codegemm/cuda/device_array.cuh>
#include <codegemm/cuda/launch.cuh>
#include <codegemm/cuda/pack_on_device.cuh>
#include <codegemm/gemm.cuh>
#include <codegemm/quantized_matrix.hpp>
#include <prefillshare/attention/cuda/problem.cuh>

namespace prefillshare::cuda {

using codegemm::Result;
using codegemm::cuda::Device;
using codegemm::cuda::DeviceArray;
using codegemm::cuda::NormedRow;

namespace detail {

// fp32 parts, rounded to T, one after the other on the device.
template <class T>
[[nodiscard]] Result<DeviceArray<T>> upload_rounded(std::span<const std::span<const float>> parts) {
  std::vector<T> rounded;
  std::size_t size = 0;
  for (const std::span<const float> part : parts) size += part.size();
  rounded.reserve(size);
  for (const std::span<const float> part : parts) {
    for (const float value : part) rounded.push_back(static_cast<T>(value));
  }
  return DeviceArray<T>::copy_of(rounded);
}

// A kernel without shared memory of its own choosing, which may start before the one in front has ended.
template <class Args>
[[nodiscard]] Status start(void (*kernel)(Args), const Args& args, dim3 grid, int threads,
                           const Device& device, cudaStream_t stream) {
  codegemm::cuda::LaunchShape shape;
  shape.grid = grid;
  shape.threads = static_cast<unsigned>(threads);
  shape.overlap = device.arch >= 90;
  return codegemm::cuda::launch(kernel, shape, args, stream);
}

}  // namespace detail

/// Device memory that a linear layer needs during a call; one call at a time uses it.
struct LinearMemory {
  std::size_t zeroed = 0;   ///< bytes that the caller zeroed once and each call leaves as they were
  std::size_t scratch = 0;  ///< bytes that need not be cleared

  /// Enough for both.
  [[nodiscard]] friend LinearMemory larger(const LinearMemory& a, const LinearMemory& b) {
    return {std::max(a.zeroed, b.zeroed), std::max(a.scratch, b.scratch)};
  }
};

/// Where a call goes, and with what: device memory of LinearMemory's sizes, aligned to 256 bytes.
struct LinearCall {
  Device device;                  ///< the card
  cudaStream_t stream = nullptr;  ///< where the work is put
  std::span<std::byte> zeroed;    ///< device memory
  std::span<std::byte> scratch;   ///< device memory
};

/// A linear layer on the device: weights of N = rows() x K = cols(), activations of type L::Scalar. Calls put
/// work into a stream, allocate nothing and may be captured into a graph; memory(most) is enough for any
/// number of tokens up to most.
///   forward(x, y, call)     y[T][N] = x[T][K] W^T + bias
///   project(x, y, call)     the same in fp32
///   add(x, sum, call)       sum[T][N] += x[T][K] W^T + bias
///   gated(x, y, call)       y[T][N / 2] = silu(gate) * up, gate being the first half of the rows of W
template <class L>
concept DeviceLinearLayer = requires(const L& layer, MatrixView<const typename L::Scalar> x,
                                     MatrixView<typename L::Scalar> y, MatrixView<float> sum,
                                     const LinearCall& call) {
  { layer.rows() } -> std::same_as<std::int64_t>;
  { layer.cols() } -> std::same_as<std::int64_t>;
  { layer.parameter_bytes() } -> std::same_as<std::int64_t>;
  { layer.memory(std::int64_t{}, call.device) } -> std::same_as<LinearMemory>;
  { layer.forward(x, y, call) } -> std::same_as<Status>;
  { layer.project(x, sum, call) } -> std::same_as<Status>;
  { layer.add(x, sum, call) } -> std::same_as<Status>;
  { layer.gated(x, y, call) } -> std::same_as<Status>;
};

/// A layer that can take one token's row of the residual stream and normalize it on the way, where
/// normalizes(tokens, device) says so: forward(), project() and gated() then have NormedRow for x.
template <class L>
concept NormalizingLayer = requires(const L& layer, const NormedRow& x, MatrixView<typename L::Scalar> y,
                                    MatrixView<float> sum, const LinearCall& call) {
  { layer.normalizes(std::int64_t{}, call.device) } -> std::same_as<bool>;
  { layer.forward(x, y, call) } -> std::same_as<Status>;
  { layer.project(x, sum, call) } -> std::same_as<Status>;
  { layer.gated(x, y, call) } -> std::same_as<Status>;
};

/// A linear layer on codebook-quantized weights, multiplied by codegemm::cuda::run. Owns its weights, which
/// may be several matrices merged along N (Q, K and V; gate and up), each with its codebooks. T: __half or
/// __nv_bfloat16. Configs: the kernels to choose from; a program that knows its formats compiles faster with
/// a shorter list.
template <class T, class Configs = codegemm::cuda::DefaultConfigs>
class DeviceCodeGemmLinear {
 public:
  using Scalar = T;  ///< of activations

  DeviceCodeGemmLinear() = default;

  /// Packs canonical matrices on the current device. bias: empty, or one value for each row
  /// of all of them. Errors: as codegemm::cuda::pack_on_device(), kShapeMismatch, kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceCodeGemmLinear> create(
      std::span<const codegemm::QuantizedMatrixView> parts, std::span<const float> bias = {}) {
    auto packed = codegemm::cuda::pack_on_device(parts);
    if (!packed.ok()) return packed.status();
    return create(packed->view, std::move(packed->bytes), bias);
  }
  /// Weights that lie packed on the device: `view` is of `bytes`.
  [[nodiscard]] static Result<DeviceCodeGemmLinear> create(const codegemm::cuda::DevicePackedView& view,
                                                           DeviceArray<std::byte> bytes,
                                                           std::span<const float> bias = {}) {
    if (!bias.empty() && std::ssize(bias) != view.rows) {
      return codegemm::error(StatusCode::kShapeMismatch, "linear layer of ", view.rows, " x ", view.cols,
                             ": a bias of ", bias.size(), " values");
    }
    DeviceCodeGemmLinear out;
    out.view_ = view;
    out.bytes_ = std::move(bytes);
    if (!bias.empty()) {
      auto low = detail::upload_rounded<T>(std::span(&bias, 1));
      if (!low.ok()) return low.status();
      auto full = DeviceArray<float>::copy_of(bias);
      if (!full.ok()) return full.status();
      out.bias_ = std::move(low).value();
      out.bias32_ = std::move(full).value();
    }
    return out;
  }

  [[nodiscard]] std::int64_t rows() const noexcept { return view_.rows; }  ///< N
  [[nodiscard]] std::int64_t cols() const noexcept { return view_.cols; }  ///< K
  /// Of the packed weights and the bias.
  [[nodiscard]] std::int64_t parameter_bytes() const noexcept {
    return static_cast<std::int64_t>(bytes_.bytes() + bias_.bytes() + bias32_.bytes());
  }
  [[nodiscard]] const codegemm::cuda::DevicePackedView& weights() const noexcept {
    return view_;
  }  ///< packed
  /// As DeviceLinearLayer says.
  [[nodiscard]] LinearMemory memory(std::int64_t tokens, const Device& device) const {
    LinearMemory out;
    // Which kernel serves, and what it needs, changes with the number of tokens and the epilogue.
    const auto count_in = [&](const auto& p) {
      out.zeroed = std::max(out.zeroed, codegemm::cuda::workspace_bytes<Configs>(p, device));
    };
    for (std::int64_t t = 1; t <= tokens; t = t < 256       ? t + 1
                                              : t == tokens ? t + 1
                                                            : std::min(t + 64, tokens)) {
      const MatrixView<const T> x(nullptr, t, cols());
      count_in(problem(x, MatrixView<T>(nullptr, t, rows())));
      count_in(problem(x, MatrixView<float>(nullptr, t, rows())));
      if (rows() % 2 == 0) count_in(gated_problem(x, MatrixView<T>(nullptr, t, rows() / 2)));
    }
    return out;
  }

  /// As DeviceLinearLayer says; errors as codegemm::cuda::run().
  [[nodiscard]] Status forward(MatrixView<const T> x, MatrixView<T> y, const LinearCall& call) const {
    return run(problem(x, y), call);
  }
  /// The same.
  [[nodiscard]] Status project(MatrixView<const T> x, MatrixView<float> y, const LinearCall& call) const {
    return run(problem(x, y), call);
  }
  /// The same.
  [[nodiscard]] Status add(MatrixView<const T> x, MatrixView<float> sum, const LinearCall& call) const {
    auto p = problem(x, sum);
    p.residual = sum;
    return run(p, call);
  }
  /// The same.
  [[nodiscard]] Status gated(MatrixView<const T> x, MatrixView<T> y, const LinearCall& call) const {
    return run(gated_problem(x, y), call);
  }

  /// As NormalizingLayer says.
  [[nodiscard]] bool normalizes(std::int64_t tokens, const Device& device) const {
    const MatrixView<const T> x(nullptr, tokens, cols());
    const auto takes = [&](const auto& p) { return codegemm::cuda::normalizes<Configs>(p, device); };
    return takes(problem(x, MatrixView<T>(nullptr, tokens, rows()))) &&
           (rows() % 2 != 0 || takes(gated_problem(x, MatrixView<T>(nullptr, tokens, rows() / 2))));
  }
  /// The same.
  [[nodiscard]] Status forward(const NormedRow& x, MatrixView<T> y, const LinearCall& call) const {
    return run(normed(x, problem(one_row(), y)), call);
  }
  /// The same.
  [[nodiscard]] Status project(const NormedRow& x, MatrixView<float> y, const LinearCall& call) const {
    return run(normed(x, problem(one_row(), y)), call);
  }
  /// The same.
  [[nodiscard]] Status gated(const NormedRow& x, MatrixView<T> y, const LinearCall& call) const {
    return run(normed(x, gated_problem(one_row(), y)), call);
  }

 private:
  [[nodiscard]] MatrixView<const T> one_row() const { return {nullptr, 1, cols()}; }
  template <class Problem>
  [[nodiscard]] static Problem normed(const NormedRow& x, Problem p) {
    p.normed = x;
    return p;
  }
  template <class Y>
  [[nodiscard]] codegemm::cuda::GemmProblem<T, Y> problem(MatrixView<const T> x, MatrixView<Y> y) const {
    codegemm::cuda::GemmProblem<T, Y> p;
    p.weights = view_;
    p.x = x;
    p.y = y;
    if constexpr (std::is_same_v<Y, float>) {
      p.bias = bias32_.data();
    } else {
      p.bias = bias_.data();
    }
    return p;
  }
  [[nodiscard]] codegemm::cuda::GemmProblem<T, T> gated_problem(MatrixView<const T> x,
                                                                MatrixView<T> y) const {
    auto p = problem(x, y);
    p.activation = codegemm::cuda::Activation::kSwiGlu;
    return p;
  }
  template <class Problem>
  [[nodiscard]] static Status run(const Problem& p, const LinearCall& call) {
    return codegemm::cuda::run<Configs>(p, call.device, call.zeroed.data(), call.zeroed.size(), call.stream);
  }

  codegemm::cuda::DevicePackedView view_;
  DeviceArray<std::byte> bytes_;
  DeviceArray<T> bias_;        // [rows] or empty
  DeviceArray<float> bias32_;  // the same
};

}  // namespace prefillshare::cuda
