// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/train_stream.cuh - launches and matrix products of a training pass in one stream;
// the first failure is kept and all that comes after it is left out.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <codegemm/cuda/stream_work.cuh>
#include <prefillshare/model/cuda/dense_linear.cuh>
#include <prefillshare/model/cuda/staged_input.cuh>

namespace prefillshare::cuda {

/// What a training pass on the GPU stores weights and activations in: __nv_bfloat16, or float to check it.
template <class S>
concept TrainStorage = std::same_as<S, float> || std::same_as<S, __nv_bfloat16>;

namespace detail {

/// A pass in its stream. Its kernels wait for those before them by themselves.
class TrainStream : public codegemm::cuda::StreamWork {
 public:
  [[nodiscard]] static Result<TrainStream> create(const Device& device, cudaStream_t stream) {
    Result<std::shared_ptr<Cublas>> cublas = Cublas::create();
    if (!cublas.ok()) return cublas.status();
    return TrainStream(device, stream, *std::move(cublas));
  }

  /// Before a capture: the handle is in the stream.
  void bind() {
    blas("cuBLAS", [](cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; });
  }
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    if (ok() && bytes > 0) check(cudaMemcpyAsync(to, from, bytes, kind, stream()), "cudaMemcpyAsync");
  }

  // Row-major products; cuBLAS, which counts columns first, sees every matrix transposed. Sums are fp32.

  /// y[t][n] = x[t][k] w[n][k]^T; rows of y are y_stride apart.
  template <class S, class Y>
  void nt(const S* x, const S* w, Y* y, std::int64_t t, std::int64_t n, std::int64_t k,
          std::int64_t y_stride = 0) {
    multiply<S, Y>(CUBLAS_OP_T, CUBLAS_OP_N, n, t, k, w, k, x, k, 0.0F, y, y_stride > 0 ? y_stride : n);
  }
  /// y[t][k] = d[t][n] w[n][k]; rows of d are d_stride apart.
  template <class S>
  void nn(const S* d, const S* w, S* y, std::int64_t t, std::int64_t n, std::int64_t k,
          std::int64_t d_stride = 0) {
    multiply<S, S>(CUBLAS_OP_N, CUBLAS_OP_N, k, t, n, w, k, d, d_stride > 0 ? d_stride : n, 0.0F, y, k);
  }
  /// g[n][k] += d[t][n]^T x[t][k]; none where g is null.
  template <class S>
  void tn(const S* d, const S* x, float* g, std::int64_t t, std::int64_t n, std::int64_t k,
          std::int64_t d_stride = 0) {
    if (g == nullptr) return;
    multiply<S, float>(CUBLAS_OP_N, CUBLAS_OP_T, k, n, t, x, k, d, d_stride > 0 ? d_stride : n, 1.0F, g, k);
  }

 private:
  TrainStream(const Device& device, cudaStream_t stream, std::shared_ptr<Cublas> cublas)
      : StreamWork(device, stream, std::move(cublas), device.arch >= 90) {}

  template <class T>
  static constexpr cudaDataType_t kType = std::is_same_v<T, float> ? CUDA_R_32F : CUDA_R_16BF;

  template <class S, class Y>
  void multiply(cublasOperation_t op_a, cublasOperation_t op_b, std::int64_t m, std::int64_t n,
                std::int64_t k, const S* a, std::int64_t lda, const S* b, std::int64_t ldb, float beta, Y* c,
                std::int64_t ldc) {
    if (!ok() || m == 0 || n == 0 || k == 0) return;
    const float alpha = 1.0F;
    const auto i = [](std::int64_t x) { return static_cast<int>(x); };
    blas("cublasGemmEx", [&](cublasHandle_t handle) {
      return cublasGemmEx(handle, op_a, op_b, i(m), i(n), i(k), &alpha, a, kType<S>, i(lda), b, kType<S>,
                          i(ldb), &beta, c, kType<Y>, i(ldc), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    });
  }
};

/// Makes arrays and keeps the first failure.
class Allocations {
 public:
  template <class T>
  void make(DeviceArray<T>& array, std::int64_t size) {
    if (!status_.ok()) return;
    Result<DeviceArray<T>> made = DeviceArray<T>::create(static_cast<std::size_t>(size));
    if (made.ok()) {
      array = std::move(made).value();
    } else {
      status_ = made.status();
    }
  }
  template <class T>
  void zeros(DeviceArray<T>& array, std::int64_t size) {
    make(array, size);
    if (!status_.ok() || size == 0) return;
    static_cast<void>(
        status_ = codegemm::cuda::cuda_status(cudaMemset(array.data(), 0, array.bytes()), "cudaMemset"));
  }
  template <class T>
  void copy(DeviceArray<T>& array, std::span<const T> values) {
    if (!status_.ok()) return;
    Result<DeviceArray<T>> made = DeviceArray<T>::copy_of(values);
    if (made.ok()) {
      array = std::move(made).value();
    } else {
      status_ = made.status();
    }
  }
  /// Work that was put into the default stream has ended.
  [[nodiscard]] Status finish() {
    if (status_.ok())
      static_cast<void>(
          status_ = codegemm::cuda::cuda_status(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize"));
    return status_;
  }
  [[nodiscard]] const Status& status() const noexcept { return status_; }

 private:
  Status status_;
};

/// Arrays of integers that a pass reads, packed into one copy to the device.
class PassInput {
 public:
  /// Room for so many integers in up to 16 arrays.
  [[nodiscard]] Status allocate(std::int64_t integers) {
    most_ = integers + 16 * std::int64_t{4};
    at_ = staged_.place<std::int32_t>(static_cast<std::size_t>(most_));
    return staged_.allocate();
  }
  [[nodiscard]] Status begin() {
    used_ = 0;
    return staged_.begin();
  }
  /// Where the array will lie on the device after send().
  template <class T>
  [[nodiscard]] const T* add(std::span<const T> values) {
    static_assert(sizeof(T) % sizeof(std::int32_t) == 0);
    const std::size_t at = at_ + static_cast<std::size_t>(used_) * sizeof(std::int32_t);
    const auto count = static_cast<std::int64_t>(values.size_bytes() / sizeof(std::int32_t));
    CODEGEMM_ASSERT(used_ + count <= most_);
    staged_.write(at, values);
    used_ += (count + 3) / 4 * 4;
    return staged_.device<const T>(at);
  }
  [[nodiscard]] Status send(cudaStream_t stream) {
    if (used_ == 0) return {};
    return staged_.send(at_, at_ + static_cast<std::size_t>(used_) * sizeof(std::int32_t), stream);
  }

 private:
  StagedInput staged_;
  std::size_t at_ = 0;
  std::int64_t most_ = 0;
  std::int64_t used_ = 0;
};

}  // namespace detail
}  // namespace prefillshare::cuda
