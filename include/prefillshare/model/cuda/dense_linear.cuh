// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/dense_linear.cuh - a linear layer on fp16 or bf16 weights, multiplied by cuBLAS,
// one token by a kernel of its own: the base model's, and what CodeGEMM is measured against.
// Layer: model/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <codegemm/cuda/cublas.cuh>
#include <codegemm/cuda/cublas_products.cuh>
#include <prefillshare/model/cuda/kernels/stream_product.cuh>
#include <prefillshare/model/cuda/kernels/tokens.cuh>
#include <prefillshare/model/cuda/linear.cuh>

namespace prefillshare::cuda {

using codegemm::cuda::Cublas;
using codegemm::cuda::CublasProduct;
using codegemm::cuda::CublasProducts;

/// What multiplies one token by dense weights.
enum class OneToken {
  kStream,  ///< stream_product_kernel, where it serves: compute capability 9.0, an even N
  kCublas,  ///< as more tokens
};

/// A linear layer on dense weights; sums are fp32. The weights may be shared: a tied head is the embedding
/// table. Merged matrices simply follow one another. One token's product reads weights before the kernel in
/// front has ended: that must not be the one that writes them. T: __half or __nv_bfloat16.
template <class T>
class DeviceDenseLinear {
 public:
  using Scalar = T;  ///< of weights and activations

  DeviceDenseLinear() = default;

  /// weights: [rows][cols] on the device. bias: empty or [rows]; for forward() only. kShapeMismatch,
  /// kUnsupported (sides that cuBLAS counts in 32 bits; a K that is no multiple of 8), kOutOfMemory,
  /// kCudaError.
  [[nodiscard]] static Result<DeviceDenseLinear> create(std::shared_ptr<Cublas> cublas,
                                                        std::shared_ptr<const DeviceArray<T>> weights,
                                                        std::int64_t rows, std::int64_t cols,
                                                        std::span<const float> bias = {}) {
    constexpr std::int64_t kMost = 1 << 30;
    if (rows < 1 || cols < 1 || rows > kMost || cols > kMost || cols % 8 != 0) {
      return codegemm::error(StatusCode::kUnsupported, "dense linear layer of ", rows, " x ", cols,
                             ": sides must be 1 to ", kMost, ", and K a multiple of 8");
    }
    if (cublas == nullptr || weights == nullptr) {
      return codegemm::error(StatusCode::kNullPointer, "dense linear layer of ", rows, " x ", cols, ": no ",
                             cublas == nullptr ? "cuBLAS handle" : "weights");
    }
    if (!bias.empty() && rows % 8 != 0) {
      return codegemm::error(StatusCode::kUnsupported, "dense linear layer of ", rows, " x ", cols,
                             " with a bias: N must be a multiple of 8");
    }
    if (static_cast<std::int64_t>(weights->size()) != rows * cols ||
        (!bias.empty() && std::ssize(bias) != rows)) {
      return codegemm::error(StatusCode::kShapeMismatch, "dense linear layer of ", rows, " x ", cols, ": ",
                             weights->size(), " weights and a bias of ", bias.size());
    }
    DeviceDenseLinear out;
    out.cublas_ = std::move(cublas);
    out.weights_ = std::move(weights);
    out.rows_ = rows;
    out.cols_ = cols;
    if (!bias.empty()) {
      auto on_device = detail::upload_rounded<T>(std::span(&bias, 1));
      if (!on_device.ok()) return on_device.status();
      out.bias_ = std::move(on_device).value();
    }
    return out;
  }

  [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }  ///< N
  [[nodiscard]] std::int64_t cols() const noexcept { return cols_; }  ///< K
  /// Of the weights and the bias.
  [[nodiscard]] std::int64_t parameter_bytes() const noexcept {
    return static_cast<std::int64_t>((weights_ ? weights_->bytes() : 0) + bias_.bytes());
  }
  /// [rows][cols], device memory.
  [[nodiscard]] const std::shared_ptr<const DeviceArray<T>>& weights() const noexcept { return weights_; }
  /// Before the first call.
  void set_one_token(OneToken kernel) noexcept { one_token_ = kernel; }
  /// Products for which an algorithm was searched go that way, in streams that were not added to the cuBLAS
  /// handle. Before the first call; null: all as cuBLAS chooses.
  void set_products(std::shared_ptr<const CublasProducts> products) noexcept {
    products_ = std::move(products);
  }
  /// What cuBLAS multiplies where y is T, or fp32 that is stored or added to.
  [[nodiscard]] CublasProduct product(std::int64_t tokens, bool full = false, bool adds = false) const {
    return {rows_, cols_, tokens, kType, full ? CUDA_R_32F : kType, adds};
  }

  /// As NormalizingLayer says.
  [[nodiscard]] bool normalizes(std::int64_t tokens, const Device& device) const {
    return tokens == 1 && streams(device);
  }

  /// As DeviceLinearLayer says: gated() keeps both halves.
  [[nodiscard]] LinearMemory memory(std::int64_t tokens, const Device& /*device*/) const {
    return {0, static_cast<std::size_t>(tokens * rows_) * sizeof(T)};
  }

  /// As DeviceLinearLayer says.
  [[nodiscard]] Status forward(MatrixView<const T> x, MatrixView<T> y, const LinearCall& call) const {
    if (is_one(x, y.rows, y.cols, call)) return stream(x.data, {}, y.data, StreamOutput::kStore, call);
    if (Status s = multiply(x, y.data, y.rows, y.cols, y.stride, kType, 0.0F, call); !s.ok()) return s;
    if (bias_.size() == 0 || x.rows == 0) return {};
    const AddBiasArgs args{y.data, bias_.data(), y.rows, y.stride, static_cast<int>(rows_)};
    return start_columns(add_bias_kernel<T>, args, y.rows * (rows_ / 8), call);
  }
  /// The same.
  [[nodiscard]] Status project(MatrixView<const T> x, MatrixView<float> y, const LinearCall& call) const {
    if (is_one(x, y.rows, y.cols, call)) return stream(x.data, {}, y.data, StreamOutput::kStoreF32, call);
    return multiply(x, y.data, y.rows, y.cols, y.stride, CUDA_R_32F, 0.0F, call);
  }
  /// The same.
  [[nodiscard]] Status add(MatrixView<const T> x, MatrixView<float> sum, const LinearCall& call) const {
    if (is_one(x, sum.rows, sum.cols, call)) return stream(x.data, {}, sum.data, StreamOutput::kAddF32, call);
    return multiply(x, sum.data, sum.rows, sum.cols, sum.stride, CUDA_R_32F, 1.0F, call);
  }
  /// The same.
  [[nodiscard]] Status gated(MatrixView<const T> x, MatrixView<T> y, const LinearCall& call) const {
    if (y.cols * 2 != rows_ || y.cols % 8 != 0 || y.rows != x.rows) {
      return codegemm::error(StatusCode::kShapeMismatch, "gated linear layer of ", rows_, " x ", cols_,
                             ": y is ", y.rows, " x ", y.cols);
    }
    if (is_one(x, y.rows, rows_, call)) return stream(x.data, {}, y.data, StreamOutput::kGated, call);
    const std::size_t needed = static_cast<std::size_t>(x.rows * rows_) * sizeof(T);
    if (call.scratch.size() < needed) {
      return codegemm::error(StatusCode::kWorkspaceTooSmall, "gated linear layer: scratch of ",
                             call.scratch.size(), " bytes, needs ", needed);
    }
    T* const both = reinterpret_cast<T*>(call.scratch.data());
    if (Status s = multiply(x, both, x.rows, rows_, rows_, kType, 0.0F, call); !s.ok()) return s;
    if (x.rows == 0) return {};
    SwiGluArgs args;
    args.both = both;
    args.out = y.data;
    args.rows = y.rows;
    args.out_stride = y.stride;
    args.width = static_cast<int>(y.cols);
    return start_columns(swiglu_kernel<T>, args, y.rows * (y.cols / 8), call);
  }

  /// As NormalizingLayer says; kUnsupported where normalizes() says no.
  [[nodiscard]] Status forward(const NormedRow& x, MatrixView<T> y, const LinearCall& call) const {
    return stream_normed(x, y.data, y.rows, y.cols, StreamOutput::kStore, call);
  }
  /// The same.
  [[nodiscard]] Status project(const NormedRow& x, MatrixView<float> y, const LinearCall& call) const {
    return stream_normed(x, y.data, y.rows, y.cols, StreamOutput::kStoreF32, call);
  }
  /// The same.
  [[nodiscard]] Status gated(const NormedRow& x, MatrixView<T> y, const LinearCall& call) const {
    return stream_normed(x, y.data, y.rows, y.cols * 2, StreamOutput::kGated, call);
  }

 private:
  static constexpr cudaDataType_t kType = std::is_same_v<T, __half> ? CUDA_R_16F : CUDA_R_16BF;

  template <class Args>
  [[nodiscard]] static Status start_columns(void (*kernel)(Args), const Args& args, std::int64_t threads,
                                            const LinearCall& call) {
    const dim3 grid(static_cast<unsigned>((threads + kColumnThreads - 1) / kColumnThreads));
    return detail::start(kernel, args, grid, kColumnThreads, call.device, call.stream);
  }

  // Stages of a warp's ring; below 2 the columns are too many.
  [[nodiscard]] int ring_stages(const Device& device) const {
    constexpr int kSystem = 1024;  // static shared memory, and what aligns the dynamic
    const std::int64_t room =
        device.shared_bytes - kSystem - kStreamBarrierBytes - stream_x_bytes(static_cast<int>(cols_));
    return static_cast<int>(
        std::min<std::int64_t>(room / (kStreamWarps * kStreamStageBytes), kStreamMostStages));
  }
  [[nodiscard]] bool streams(const Device& device) const {
    return one_token_ == OneToken::kStream && device.arch >= 90 && rows_ % 2 == 0 && ring_stages(device) >= 2;
  }
  // What multiply() would refuse is left to it.
  [[nodiscard]] bool is_one(const MatrixView<const T>& x, std::int64_t y_rows, std::int64_t y_cols,
                            const LinearCall& call) const {
    return x.rows == 1 && y_rows == 1 && x.cols == cols_ && y_cols == rows_ && streams(call.device) &&
           reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
  }
  [[nodiscard]] Status stream_normed(const NormedRow& x, void* y, std::int64_t y_rows, std::int64_t y_cols,
                                     StreamOutput output, const LinearCall& call) const {
    if (y_rows != 1 || y_cols != rows_) {
      return codegemm::error(StatusCode::kShapeMismatch, "dense linear layer of ", rows_, " x ", cols_,
                             ": y is ", y_rows, " x ", y_cols, " for a normed row");
    }
    if (!normalizes(1, call.device)) {
      return codegemm::error(StatusCode::kUnsupported, "dense linear layer of ", rows_, " x ", cols_,
                             ": its kernel for one token normalizes no row");
    }
    return stream(nullptr, x, y, output, call);
  }
  [[nodiscard]] Status stream(const T* x, const NormedRow& norm, void* y, StreamOutput output,
                              const LinearCall& call) const {
    StreamProductArgs args;
    args.weights = weights_->data();
    args.x = x;
    args.norm = norm;
    args.bias = bias_.size() == 0 ? nullptr : bias_.data();
    args.y = y;
    args.output = output;
    args.rows = static_cast<int>(rows_);
    args.cols = static_cast<int>(cols_);
    args.stages = ring_stages(call.device);
    codegemm::cuda::LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(std::min<std::int64_t>(call.device.multiprocessors, rows_ / 2)));
    shape.threads = kStreamThreads;
    shape.shared_bytes = static_cast<std::size_t>(stream_x_bytes(args.cols) + kStreamBarrierBytes +
                                                  args.stages * kStreamWarps * kStreamStageBytes);
    shape.overlap = true;
    return codegemm::cuda::launch(stream_product_kernel<T>, shape, args, call.stream);
  }

  // cuBLAS counts columns first: y^T[N][T] = W[N][K] x^T, each row-major matrix being a column-major
  // transpose.
  [[nodiscard]] Status multiply(MatrixView<const T> x, void* y, std::int64_t y_rows, std::int64_t y_cols,
                                std::int64_t y_stride, cudaDataType_t type, float beta,
                                const LinearCall& call) const {
    if (x.cols != cols_ || y_cols != rows_ || x.rows != y_rows) {
      return codegemm::error(StatusCode::kShapeMismatch, "dense linear layer of ", rows_, " x ", cols_,
                             ": x is ", x.rows, " x ", x.cols, ", y is ", y_rows, " x ", y_cols);
    }
    if (x.rows == 0) return {};
    if (products_ != nullptr && x.stride == cols_ && y_stride == rows_ && !cublas_->has_added(call.stream)) {
      const CublasProduct wanted = product(x.rows, type == CUDA_R_32F, beta != 0.0F);
      if (products_->has(wanted)) return products_->run(wanted, weights_->data(), x.data, y, call.stream);
    }
    const Result<cublasHandle_t> handle = cublas_->in(call.stream);
    if (!handle.ok()) return handle.status();
    const float alpha = 1.0F;
    return Cublas::status_of(
        cublasGemmEx(*handle, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(rows_), static_cast<int>(x.rows),
                     static_cast<int>(cols_), &alpha, weights_->data(), kType, static_cast<int>(cols_),
                     x.data, kType, static_cast<int>(x.stride), &beta, y, type, static_cast<int>(y_stride),
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "cublasGemmEx");
  }

  std::shared_ptr<Cublas> cublas_;
  std::shared_ptr<const CublasProducts> products_;
  std::shared_ptr<const DeviceArray<T>> weights_;  // [rows][cols]
  DeviceArray<T> bias_;                            // [rows] or empty
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  OneToken one_token_ = OneToken::kStream;
};

}  // namespace prefillshare::cuda
