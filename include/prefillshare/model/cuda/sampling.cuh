// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/sampling.cuh - logits become tokens on the GPU.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <prefillshare/model/cuda/kernels/tokens.cuh>
#include <prefillshare/model/cuda/linear.cuh>

namespace prefillshare::cuda {

/// Puts into the stream: tokens[i] = a draw from softmax(logits[i] / temperature), or the largest logit's id
/// (the lowest among equals). The same bits for the same seed and step.
[[nodiscard]] inline Status sample(MatrixView<const float> logits, const DeviceSampling& how,
                                   std::int32_t* tokens, const Device& device, cudaStream_t stream) {
  if (logits.rows == 0) return {};
  if (logits.rows < 0 || logits.rows > 65535 || logits.cols < 1) {
    return codegemm::error(StatusCode::kInvalidArgument, "sample from logits of ", logits.rows, " x ",
                           logits.cols);
  }
  if (logits.data == nullptr || how.best == nullptr || how.arrived == nullptr || tokens == nullptr ||
      (how.temperatures != nullptr && how.seeds == nullptr)) {
    return codegemm::error(StatusCode::kNullPointer, "sample: logits, scratch, tokens or seeds is null");
  }
  const SampleArgs args{logits.data, logits.stride, static_cast<int>(logits.cols), how, tokens};
  const dim3 grid(static_cast<unsigned>(sample_slices(logits.rows)), static_cast<unsigned>(logits.rows));
  return detail::start(sample_kernel<0>, args, grid, kSampleThreads, device, stream);
}

}  // namespace prefillshare::cuda
