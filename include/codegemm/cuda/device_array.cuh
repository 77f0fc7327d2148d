// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/device_array.cuh - device memory that is freed with its owner.
// Layer: cuda (host, needs nvcc).
#pragma once

#include <cstddef>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device.cuh>

namespace codegemm::cuda {

/// `size` elements on the current device, aligned to 256 bytes. Movable. The calls of this library take
/// pointers and own nothing; this is for those who have no allocator of their own.
template <class T>
class DeviceArray {
  static_assert(std::is_trivially_copyable_v<T>, "codegemm: DeviceArray copies its elements as bytes");

 public:
  DeviceArray() = default;
  /// `other` is empty then.
  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  /// `other` gets what was here.
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  /// Not initialized. kOutOfMemory with the bytes that could not be had; kCudaError.
  [[nodiscard]] static Result<DeviceArray> create(std::size_t size) {
    DeviceArray out;
    if (size == 0) return out;
    if (size > std::numeric_limits<std::size_t>::max() / sizeof(T)) {
      return error(StatusCode::kOutOfMemory, "device memory: ", size, " elements of ", sizeof(T), " bytes");
    }
    const cudaError_t code = cudaMalloc(reinterpret_cast<void**>(&out.data_), size * sizeof(T));
    if (code != cudaSuccess) {
      static_cast<void>(cudaGetLastError());  // reported here, not to the next caller
      out.data_ = nullptr;
      if (code != cudaErrorMemoryAllocation) return cuda_status(code, "cudaMalloc");
      return error(StatusCode::kOutOfMemory, "device memory: no ", size * sizeof(T), " bytes");
    }
    out.size_ = size;
    return out;
  }
  /// A copy of host memory, complete on return. Errors as create().
  [[nodiscard]] static Result<DeviceArray> copy_of(std::span<const T> values) {
    Result<DeviceArray> out = create(values.size());
    if (!out.ok() || values.empty()) return out;
    if (Status s =
            cuda_status(cudaMemcpy(out->data(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice),
                        "cudaMemcpy");
        !s.ok()) {
      return s;
    }
    // cudaMemcpy from pageable memory may return before the device has the last of it.
    if (Status s = cuda_status(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize"); !s.ok()) return s;
    return out;
  }
  /// Every byte 0, complete on return. Errors as create().
  [[nodiscard]] static Result<DeviceArray> zeros(std::size_t size) {
    Result<DeviceArray> out = create(size);
    if (!out.ok() || size == 0) return out;
    if (Status s = cuda_status(cudaMemset(out->data(), 0, size * sizeof(T)), "cudaMemset"); !s.ok()) return s;
    // cudaMemset of device memory need not have ended when it returns.
    if (Status s = cuda_status(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize"); !s.ok()) return s;
    return out;
  }

  [[nodiscard]] T* data() const noexcept { return data_; }           ///< device memory, null where empty
  [[nodiscard]] std::size_t size() const noexcept { return size_; }  ///< elements
  [[nodiscard]] std::size_t bytes() const noexcept { return size_ * sizeof(T); }  ///< of all elements

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace codegemm::cuda
