// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/launch.cuh - starts a kernel with cluster and programmatic-launch attributes, and reports
// failure.
// Layer: cuda (host, needs nvcc).
#pragma once

#include <cstddef>

#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device.cuh>

namespace codegemm::cuda {

/// How a kernel is launched.
struct LaunchShape {
  dim3 grid;                     ///< blocks
  unsigned threads = 0;          ///< threads of a block
  std::size_t shared_bytes = 0;  ///< dynamic shared memory of a block
  unsigned cluster = 0;          ///< blocks along x, 0: no clusters
  bool overlap = false;          ///< may start before the kernel before it in the stream has ended
  bool prefer_cache = false;     ///< what shared memory leaves is to be first-level cache
};

/// Starts kernel(args). Never allocates, synchronizes or asks the device; may be captured into a graph.
template <class Args>
[[nodiscard]] inline Status launch(void (*kernel)(Args), const LaunchShape& shape, const Args& args,
                                   cudaStream_t stream) {
  constexpr std::size_t kFreeShared = 48 * 1024;  // more has to be asked for
  if (shape.shared_bytes > kFreeShared) {
    const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(shape.shared_bytes));
    if (code != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return cuda_status(code, "cudaFuncSetAttribute (shared memory)");
    }
  }
  if (shape.prefer_cache) {
    const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                  cudaSharedmemCarveoutMaxL1);
    if (code != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return cuda_status(code, "cudaFuncSetAttribute (carveout)");
    }
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 0) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = shape.cluster;
    a.val.clusterDim.y = 1;
    a.val.clusterDim.z = 1;
  }
  if (shape.overlap) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t code = cudaLaunchKernelEx(&config, kernel, args);
  if (code != cudaSuccess) static_cast<void>(cudaGetLastError());  // reported here, not to the next caller
  return cuda_status(code, "cudaLaunchKernelEx");
}

}  // namespace codegemm::cuda
