// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/tensor_map.cuh - how tensors are described to the copy engine of compute capability 9.0.
// Layer: cuda (host).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace codegemm::cuda::detail {

// The driver's function that describes a tensor to the copy engine; null where there is none. Asked once, so
// that no program has to link the driver.
[[nodiscard]] inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                              cudaEnableDefault, &found);
    if (code != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

}  // namespace codegemm::cuda::detail
