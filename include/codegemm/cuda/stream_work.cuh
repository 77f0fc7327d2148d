// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/stream_work.cuh - launches and products in one stream of which the first failure is kept.
// Layer: cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <codegemm/cuda/cublas.cuh>
#include <codegemm/cuda/launch.cuh>

namespace codegemm::cuda {

/// A sequence of steps in one stream: the first failure is kept and what comes after it is left out, until
/// take() gives it. What does the steps derives from it. One thread at a time.
class StreamWork {
 public:
  [[nodiscard]] const Device& device() const noexcept { return device_; }  ///< where it runs
  [[nodiscard]] cudaStream_t stream() const noexcept { return stream_; }   ///< in which it runs
  [[nodiscard]] bool ok() const noexcept { return status_.ok(); }          ///< nothing has failed
  /// A failure, unless there was one before.
  void keep(Status status) {
    if (ok()) status_ = std::move(status);
  }
  /// The first failure since the last call.
  [[nodiscard]] Status take() { return std::exchange(status_, Status()); }

  /// What a CUDA call gave; a failure is not left for the next caller.
  void check(cudaError_t code, const char* what) {
    if (code != cudaSuccess) static_cast<void>(cudaGetLastError());
    keep(cuda_status(code, what));
  }
  /// Waits for all that is in the stream.
  void synchronize() {
    if (ok()) check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
  /// Sets bytes to zero.
  void zero(void* to, std::size_t bytes) {
    if (ok() && bytes > 0) check(cudaMemsetAsync(to, 0, bytes, stream_), "cudaMemsetAsync");
  }

  /// Launches kernel(args); an empty grid is nothing to do.
  template <class Args>
  void start(void (*kernel)(Args), const Args& args, dim3 grid, int threads, std::size_t shared = 0) {
    if (!ok() || grid.x == 0 || grid.y == 0) return;
    LaunchShape shape;
    shape.grid = grid;
    shape.threads = static_cast<unsigned>(threads);
    shape.shared_bytes = shared;
    shape.overlap = overlap_;
    keep(launch(kernel, shape, args, stream_));
  }
  /// A grid along x.
  template <class Args>
  void start(void (*kernel)(Args), const Args& args, std::int64_t blocks, int threads) {
    start(kernel, args, dim3(static_cast<unsigned>(blocks)), threads);
  }
  /// body(handle) gives a cublasStatus_t. cuBLAS counts columns first: it sees every matrix transposed.
  template <class Body>
  void blas(const char* what, Body&& body) {
    if (!ok()) return;
    const Result<cublasHandle_t> handle = cublas_->in(stream_);
    keep(handle.ok() ? Cublas::status_of(body(*handle), what) : handle.status());
  }

 protected:
  /// `overlap`: kernels may start before the one before them has ended, and wait for it themselves.
  StreamWork(const Device& device, cudaStream_t stream, std::shared_ptr<Cublas> cublas, bool overlap)
      : device_(device), stream_(stream), cublas_(std::move(cublas)), overlap_(overlap) {}

 private:
  Device device_;
  cudaStream_t stream_ = nullptr;
  std::shared_ptr<Cublas> cublas_;
  bool overlap_ = false;
  Status status_;
};

}  // namespace codegemm::cuda
