// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/cublas.cuh - a cuBLAS handle, its workspace and its errors.
// Layer: cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device_array.cuh>

namespace codegemm::cuda {

/// A cuBLAS handle with a workspace of its own, so that it allocates nothing in a call and may be captured.
/// Shared by the layers of models that run in one stream at a time; streams that run beside it are added.
class Cublas {
 public:
  /// kCudaError, kOutOfMemory.
  [[nodiscard]] static Result<std::shared_ptr<Cublas>> create() {
    std::shared_ptr<Cublas> out(new Cublas());
    if (Status s = make(out->any_); !s.ok()) return s;
    return out;
  }
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;
  ~Cublas() {
    release(any_);
    for (Bound& one : added_) release(one);
  }

  /// A handle and a workspace for this stream alone, so that its calls may run beside those of others.
  /// `multiprocessors`: on how many its kernels run, where that is not the whole card; else 0. For a stream
  /// that was added before it takes the place of what was said then. Not while a stream is captured.
  /// kCudaError, kOutOfMemory.
  [[nodiscard]] Status add_stream(cudaStream_t stream, int multiprocessors = 0) {
    for (Bound& one : added_) {
      if (one.stream == stream) return bind(one, stream, multiprocessors);
    }
    Bound made;
    Status status = make(made);
    if (status.ok()) status = bind(made, stream, multiprocessors);
    if (!status.ok()) {
      release(made);
      return status;
    }
    added_.push_back(std::move(made));
    return {};
  }

  /// The handle for calls in this stream: its own, or the one of all streams that were not added.
  [[nodiscard]] Result<cublasHandle_t> in(cudaStream_t stream) {
    for (const Bound& one : added_) {
      if (one.stream == stream) return one.handle;
    }
    if (bound_ && stream == any_.stream) return any_.handle;
    if (Status s = bind(any_, stream, 0); !s.ok()) return s;
    bound_ = true;
    return any_.handle;
  }

  /// Whether a stream was added.
  [[nodiscard]] bool has_added(cudaStream_t stream) const {
    for (const Bound& one : added_) {
      if (one.stream == stream) return true;
    }
    return false;
  }

  /// A cuBLAS code as a Status.
  [[nodiscard]] static Status status_of(cublasStatus_t code, const char* what) {
    if (code == CUBLAS_STATUS_SUCCESS) return {};
    return Status(StatusCode::kCudaError,
                  concat(what, ": ", cublasGetStatusName(code), " (", cublasGetStatusString(code), ")"),
                  static_cast<int>(code));
  }

 private:
  struct Bound {
    cublasHandle_t handle = nullptr;
    DeviceArray<std::byte> memory;
    cudaStream_t stream = nullptr;
  };

  Cublas() = default;

  [[nodiscard]] static Status make(Bound& one) {
    constexpr std::size_t kWorkspace = std::size_t{32} << 20;  // what cuBLAS advises for Hopper
    auto memory = DeviceArray<std::byte>::create(kWorkspace);
    if (!memory.ok()) return memory.status();
    one.memory = std::move(memory).value();
    return status_of(cublasCreate(&one.handle), "cublasCreate");
  }
  [[nodiscard]] static Status bind(Bound& one, cudaStream_t stream, int multiprocessors) {
    if (Status s = status_of(cublasSetStream(one.handle, stream), "cublasSetStream"); !s.ok()) return s;
    // Another stream takes the workspace away.
    if (Status s = status_of(cublasSetWorkspace(one.handle, one.memory.data(), one.memory.bytes()),
                             "cublasSetWorkspace");
        !s.ok()) {
      return s;
    }
    one.stream = stream;
    return status_of(cublasSetSmCountTarget(one.handle, multiprocessors), "cublasSetSmCountTarget");
  }
  static void release(Bound& one) {
    if (one.handle != nullptr) cublasDestroy(one.handle);
  }

  Bound any_;
  std::vector<Bound> added_;  // bound to their streams for good
  bool bound_ = false;
};

}  // namespace codegemm::cuda
