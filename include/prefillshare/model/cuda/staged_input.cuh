// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/staged_input.cuh - small arrays that the host writes anew for each pass, in one
// copy.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <cstddef>
#include <cstring>
#include <span>
#include <utility>

#include <cuda_runtime.h>

#include <codegemm/cuda/device.cuh>
#include <codegemm/cuda/device_array.cuh>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare::cuda {

/// Page-locked memory of the host's and as much on the device, zero at first. Arrays are placed once; then
/// write() and send() as often as wanted. Movable; one thread at a time.
class StagedInput {
 public:
  StagedInput() = default;
  /// `other` is empty then.
  StagedInput(StagedInput&& other) noexcept { swap(other); }
  /// `other` gets what was here.
  StagedInput& operator=(StagedInput&& other) noexcept {
    swap(other);
    return *this;
  }
  StagedInput(const StagedInput&) = delete;
  StagedInput& operator=(const StagedInput&) = delete;
  ~StagedInput() {
    if (sent_ != nullptr) {
      static_cast<void>(cudaEventSynchronize(sent_));
      cudaEventDestroy(sent_);
    }
    cudaFreeHost(host_);
  }

  /// Room for `count` elements of U after those placed before: where they lie, in bytes.
  template <class U>
  std::size_t place(std::size_t count) {
    const std::size_t at = size_;
    size_ += (count * sizeof(U) + 15) / 16 * 16;
    return at;
  }
  /// Once, after everything is placed. kOutOfMemory, kCudaError.
  [[nodiscard]] Status allocate() {
    auto device = codegemm::cuda::DeviceArray<std::byte>::zeros(size_);
    if (!device.ok()) return device.status();
    device_ = std::move(device).value();
    void* host = nullptr;
    if (Status s = codegemm::cuda::cuda_status(cudaMallocHost(&host, size_), "cudaMallocHost"); !s.ok())
      return s;
    host_ = static_cast<std::byte*>(host);
    std::memset(host_, 0, size_);
    return codegemm::cuda::cuda_status(cudaEventCreateWithFlags(&sent_, cudaEventDisableTiming),
                                       "cudaEventCreate");
  }

  /// The device's copy of what was placed at `at`.
  template <class U>
  [[nodiscard]] U* device(std::size_t at) const {
    return reinterpret_cast<U*>(device_.data() + at);
  }

  /// Waits until the last send() has left the host's memory: before the first write() of a pass. kCudaError.
  [[nodiscard]] Status begin() {
    return codegemm::cuda::cuda_status(cudaEventSynchronize(sent_), "cudaEventSynchronize");
  }
  /// Elements from `at` on; the caller placed as many.
  template <class U>
  void write(std::size_t at, std::span<const U> values) {
    if (!values.empty()) std::memcpy(host_ + at, values.data(), values.size_bytes());
  }
  /// Bytes of 0 from `at` on.
  void clear(std::size_t at, std::size_t bytes) { std::memset(host_ + at, 0, bytes); }
  /// Puts a copy of bytes first .. last - 1 to the device into the stream. kCudaError.
  [[nodiscard]] Status send(std::size_t first, std::size_t last, cudaStream_t stream) {
    if (Status s = codegemm::cuda::cuda_status(cudaMemcpyAsync(device_.data() + first, host_ + first,
                                                               last - first, cudaMemcpyHostToDevice, stream),
                                               "cudaMemcpyAsync");
        !s.ok()) {
      return s;
    }
    return codegemm::cuda::cuda_status(cudaEventRecord(sent_, stream), "cudaEventRecord");
  }

 private:
  void swap(StagedInput& other) noexcept {
    std::swap(host_, other.host_);
    std::swap(device_, other.device_);
    std::swap(sent_, other.sent_);
    std::swap(size_, other.size_);
  }

  std::byte* host_ = nullptr;  // page-locked
  codegemm::cuda::DeviceArray<std::byte> device_;
  cudaEvent_t sent_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace prefillshare::cuda
