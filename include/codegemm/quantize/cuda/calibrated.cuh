// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/calibrated.cuh - quantize_calibrated() on a GPU.
// Layer: quantize/cuda (host, needs nvcc and cuBLAS).
// See: AQLM (arXiv 2401.06118), algorithm 1; codegemm/quantize/calibrated.hpp
#pragma once

#include <utility>

#include <cuda_runtime.h>

#include <codegemm/quantize/cuda/device_steps.cuh>

namespace codegemm::cuda {

/// Quantizes layers on a GPU, one after the other; keeps device memory between them: about five times the
/// largest layer in fp32, and a few times its H. One thread, one stream.
class DeviceQuantizer {
 public:
  /// `stream` must outlive it. kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceQuantizer> create(const Device& device, cudaStream_t stream) {
    Result<detail::DeviceSteps> steps = detail::DeviceSteps::create(device, stream);
    if (!steps.ok()) return steps.status();
    return DeviceQuantizer(*std::move(steps));
  }

  /// As codegemm::quantize_calibrated(), with the same steps, all on the GPU but for the draw of k-means++
  /// and the checks of what is given, for which the executor is; sums are added in another order, so that
  /// codes may differ where two are nearly as good. The same bits on the same card, whatever the number of
  /// workers. `report` may be null. Errors as there; kUnsupported for a layer or beam too large for the
  /// card; kCudaError.
  [[nodiscard]] Result<QuantizedMatrix> quantize_calibrated(MatrixView<const float> weights,
                                                            MatrixView<const float> gram, Format format,
                                                            const CalibratedOptions& options,
                                                            Executor& executor,
                                                            CalibratedReport* report = nullptr) {
    return codegemm::detail::quantize_calibrated_with(weights, gram, format, options, executor, steps_,
                                                      report);
  }

 private:
  explicit DeviceQuantizer(detail::DeviceSteps steps) : steps_(std::move(steps)) {}

  detail::DeviceSteps steps_;
};

}  // namespace codegemm::cuda
