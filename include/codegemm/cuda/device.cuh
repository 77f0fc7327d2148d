// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/device.cuh - what the calls need to know of a GPU, asked once.
// Layer: cuda (host, needs nvcc).
#pragma once

#include <array>

#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>

namespace codegemm::cuda {

/// A failed CUDA call as a Status: the code is kept, `what` names the call.
[[nodiscard]] inline Status cuda_status(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return {};
  return Status(StatusCode::kCudaError,
                concat(what, ": ", cudaGetErrorName(code), " (", cudaGetErrorString(code), ")"),
                static_cast<int>(code));
}

/// Properties of one GPU. Ask once, when the program starts, and pass to every call.
struct Device {
  int arch = 0;             ///< compute capability as 10 * major + minor: 80, 90
  int multiprocessors = 0;  ///< of the card
  int shared_bytes = 0;     ///< most shared memory of a block
  /// [size]: clusters of so many blocks that run at once, one block a multiprocessor; 0 where there are no
  /// clusters. A cluster lies within a group of multiprocessors, and the groups of one card differ in size.
  std::array<int, 9> clusters = {};
  /// Whether this program's code for the card has wgmma: with compute capability 9.0 where it was built for
  /// sm_90a, not sm_90. Without it many tokens go through mma.sync.
  bool wgmma = true;
  int memory_bits = 0;  ///< width of the memory's bus
};

namespace detail {

template <int>  // a template: one definition, however many files include this
__global__ void cluster_probe_kernel() {}

inline constexpr int kWgmmaProbeBytes = 4096;

// Never launched: its shared memory tells what it was compiled for, which the host cannot know otherwise.
template <int>
__global__ void wgmma_probe_kernel() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ volatile char bytes[kWgmmaProbeBytes];
  bytes[threadIdx.x] = 0;
#endif
}

// How many clusters of `size` blocks run at once if each block fills a multiprocessor.
[[nodiscard]] inline Status probe_clusters(int size, int shared_bytes, int& out) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(size);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(512);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cuda_status(cudaOccupancyMaxActiveClusters(&out, cluster_probe_kernel<0>, &config),
                     "cudaOccupancyMaxActiveClusters");
}

}  // namespace detail

/// The current device, which must have this number. kCudaError where there is none.
[[nodiscard]] inline Result<Device> query_device(int number) {
  int major = 0;
  int minor = 0;
  Device out;
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    return cuda_status(cudaDeviceGetAttribute(&value, attribute, number), "cudaDeviceGetAttribute");
  };
  if (Status s = ask(major, cudaDevAttrComputeCapabilityMajor); !s.ok()) return s;
  if (Status s = ask(minor, cudaDevAttrComputeCapabilityMinor); !s.ok()) return s;
  if (Status s = ask(out.multiprocessors, cudaDevAttrMultiProcessorCount); !s.ok()) return s;
  if (Status s = ask(out.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin); !s.ok()) return s;
  if (Status s = ask(out.memory_bits, cudaDevAttrGlobalMemoryBusWidth); !s.ok()) return s;
  out.arch = major * 10 + minor;
  out.wgmma = false;
  if (out.arch < 90) return out;
  cudaFuncAttributes probe = {};
  if (Status s =
          cuda_status(cudaFuncGetAttributes(&probe, detail::wgmma_probe_kernel<0>), "cudaFuncGetAttributes");
      !s.ok()) {
    return s;
  }
  out.wgmma = probe.sharedSizeBytes >= detail::kWgmmaProbeBytes;
  if (Status s =
          cuda_status(cudaFuncSetAttribute(detail::cluster_probe_kernel<0>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, out.shared_bytes),
                      "cudaFuncSetAttribute");
      !s.ok()) {
    return s;
  }
  for (int size = 1; size <= 8; ++size) {
    if (Status s =
            detail::probe_clusters(size, out.shared_bytes, out.clusters[static_cast<std::size_t>(size)]);
        !s.ok()) {
      return s;
    }
  }
  return out;
}

}  // namespace codegemm::cuda
