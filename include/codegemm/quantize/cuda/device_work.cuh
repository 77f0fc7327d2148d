// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/device_work.cuh - launches, copies and products of the quantizer in one stream.
// Layer: quantize/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <codegemm/cuda/device_array.cuh>
#include <codegemm/cuda/stream_work.cuh>

namespace codegemm::cuda::detail {

/// What the quantizer does on a device, step by step.
class DeviceWork : public StreamWork {
 public:
  [[nodiscard]] static Result<DeviceWork> create(const Device& device, cudaStream_t stream) {
    Result<std::shared_ptr<Cublas>> cublas = Cublas::create();
    if (!cublas.ok()) return cublas.status();
    return DeviceWork(device, stream, *std::move(cublas));
  }

  /// Waits; the first failure since the last call.
  [[nodiscard]] Status finish() {
    synchronize();
    return take();
  }

  /// Room for `size` elements; what was there is lost where it did not suffice.
  template <class T>
  void reserve(DeviceArray<T>& array, std::int64_t size) {
    if (!ok() || static_cast<std::int64_t>(array.size()) >= size) return;
    synchronize();
    array = {};
    Result<DeviceArray<T>> made = DeviceArray<T>::create(static_cast<std::size_t>(size));
    if (made.ok()) {
      array = std::move(made).value();
    } else {
      keep(made.status());
    }
  }
  template <class T>
  void copy(T* to, const T* from, std::int64_t count, cudaMemcpyKind kind) {
    if (!ok() || count == 0) return;
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(T), kind, stream()),
          "cudaMemcpyAsync");
  }
  /// `values`, which may go then.
  template <class T>
  void put(DeviceArray<T>& array, const std::vector<T>& values) {
    reserve(array, std::ssize(values));
    copy(array.data(), values.data(), std::ssize(values), cudaMemcpyHostToDevice);
    synchronize();
  }
  /// The first `count` elements, once they are there; zeros after a failure.
  template <class T>
  [[nodiscard]] std::vector<T> get(const T* from, std::int64_t count) {
    std::vector<T> out(static_cast<std::size_t>(count));
    copy(out.data(), from, count, cudaMemcpyDeviceToHost);
    synchronize();
    if (!ok()) out.assign(out.size(), T{});
    return out;
  }

  /// out[rows][width] = a[rows][inner] b[inner][width]; rows of a and b are a_stride and b_stride apart.
  void multiply(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                std::int64_t rows, std::int64_t inner, std::int64_t width, float* out) {
    if (rows == 0) return;
    const float one = 1.0F;
    const float zero = 0.0F;
    blas("cublasSgemm", [&](cublasHandle_t handle) {
      return cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_N, narrow(width), narrow(rows), narrow(inner), &one,
                         b, narrow(b_stride), a, narrow(a_stride), &zero, out, narrow(width));
    });
  }

  [[nodiscard]] static int narrow(std::int64_t x) { return static_cast<int>(x); }
  /// a / b, rounded up.
  [[nodiscard]] static std::int64_t divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

 private:
  DeviceWork(const Device& device, cudaStream_t stream, std::shared_ptr<Cublas> cublas)
      : StreamWork(device, stream, std::move(cublas), false) {}
};

}  // namespace codegemm::cuda::detail
