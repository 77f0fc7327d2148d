// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/cublas.cuh - a cuBLAS handle, its workspace and its errors.
// Layer: cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device_array.cuh>

namespace codegemm::cuda {

/// A cuBLAS handle with a workspace of its own, so that it allocates nothing in a call and may be captured.
/// Shared by the layers of models that run in one stream at a time.
class Cublas {
 public:
  /// kCudaError, kOutOfMemory.
  [[nodiscard]] static Result<std::shared_ptr<Cublas>> create() {
    constexpr std::size_t kWorkspace = std::size_t{32} << 20;  // what cuBLAS advises for Hopper
    auto memory = DeviceArray<std::byte>::create(kWorkspace);
    if (!memory.ok()) return memory.status();
    cublasHandle_t handle = nullptr;
    if (Status s = status_of(cublasCreate(&handle), "cublasCreate"); !s.ok()) return s;
    return std::shared_ptr<Cublas>(new Cublas(handle, std::move(memory).value()));
  }
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;
  ~Cublas() { cublasDestroy(handle_); }

  /// The handle, for calls in this stream.
  [[nodiscard]] Result<cublasHandle_t> in(cudaStream_t stream) {
    if (bound_ && stream == stream_) return handle_;
    if (Status s = status_of(cublasSetStream(handle_, stream), "cublasSetStream"); !s.ok()) return s;
    // Another stream takes the workspace away.
    if (Status s =
            status_of(cublasSetWorkspace(handle_, memory_.data(), memory_.bytes()), "cublasSetWorkspace");
        !s.ok()) {
      return s;
    }
    stream_ = stream;
    bound_ = true;
    return handle_;
  }

  /// A cuBLAS code as a Status.
  [[nodiscard]] static Status status_of(cublasStatus_t code, const char* what) {
    if (code == CUBLAS_STATUS_SUCCESS) return {};
    return Status(StatusCode::kCudaError,
                  concat(what, ": ", cublasGetStatusName(code), " (", cublasGetStatusString(code), ")"),
                  static_cast<int>(code));
  }

 private:
  Cublas(cublasHandle_t handle, DeviceArray<std::byte> memory)
      : handle_(handle), memory_(std::move(memory)) {}

  cublasHandle_t handle_ = nullptr;
  DeviceArray<std::byte> memory_;
  cudaStream_t stream_ = nullptr;
  bool bound_ = false;
};

}  // namespace codegemm::cuda
