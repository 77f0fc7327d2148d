// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/corrected.cuh - corrected_weights() on a GPU.
// Layer: quantize/cuda (host, needs nvcc and cuBLAS).
// See: codegemm/quantize/corrected.hpp
#pragma once

#include <cstdint>
#include <utility>

#include <codegemm/quantize/cuda/cholesky.cuh>
#include <codegemm/quantize/cuda/device_work.cuh>

namespace codegemm::cuda {

/// W' = W (C + d I) (H + d I)^-1 for layers that have their inputs in common: H is factored once. One thread,
/// one stream.
class DeviceCorrection {
 public:
  /// `stream` must outlive it. kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceCorrection> create(const Device& device, cudaStream_t stream) {
    Result<detail::DeviceWork> work = detail::DeviceWork::create(device, stream);
    if (!work.ok()) return work.status();
    DeviceCorrection out(*std::move(work));
    out.work_.reserve(out.failed_, 1);
    if (Status s = out.work_.finish(); !s.ok()) return s;
    return out;
  }

  /// H = gram[k][k] and C = cross[k][k], device memory, in whatever scale, are damped and H becomes its
  /// factor; both are read by correct(). Waits. kInvalidArgument as corrected_weights(), kCudaError.
  [[nodiscard]] Status prepare(float* gram, float* cross, std::int64_t k, double damping) {
    if (!(damping > 0.0))
      return error(StatusCode::kInvalidArgument, "corrected_weights: damping is ", damping,
                   ", must be positive");
    factor_ = gram;
    cross_ = cross;
    inputs_ = k;
    detail::DampArgs args;
    args.gram = gram;
    args.cross = cross;
    args.damping = damping;
    args.size = static_cast<std::int32_t>(k);
    work_.start(detail::damp_kernel<0>, args, 1, detail::kDampThreads);
    detail::factor_lower(work_, gram, k, failed_.data());
    const bool failed = work_.get(failed_.data(), 1).front() != 0;
    if (Status s = work_.finish(); !s.ok()) return s;
    if (!failed) return {};
    return error(StatusCode::kInvalidArgument, "corrected_weights: H of ", k, " x ", k, " and damping ",
                 damping, " is not positive definite");
  }

  /// out[rows][k] for weights[rows][k], both device memory; in the stream.
  [[nodiscard]] Status correct(const float* weights, std::int64_t rows, float* out) {
    work_.multiply(weights, inputs_, cross_, inputs_, rows, inputs_, inputs_, out);
    detail::solve_factored(work_, factor_, inputs_, rows, out);
    return work_.finish();
  }

 private:
  explicit DeviceCorrection(detail::DeviceWork work) : work_(std::move(work)) {}

  detail::DeviceWork work_;
  DeviceArray<std::int32_t> failed_;
  const float* factor_ = nullptr;
  const float* cross_ = nullptr;
  std::int64_t inputs_ = 0;
};

}  // namespace codegemm::cuda
