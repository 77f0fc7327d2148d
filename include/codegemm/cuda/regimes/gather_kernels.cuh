// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/gather_kernels.cuh - starts the kernels that gather from Psumbooks. They are compiled
// with the functions here, in every file or once for a program (see configs.cuh).
// Layer: cuda/regimes (host, needs nvcc).
#pragma once

#include <cuda_runtime.h>

#include <codegemm/cuda/configs.cuh>
#include <codegemm/cuda/kernels/gather.cuh>
#include <codegemm/cuda/launch.cuh>

namespace codegemm::cuda::detail {

/// The kernels of a configuration (or of Narrow<it>) for one or two tokens.
template <class Config, int Tokens>
struct GatherKernels {
  [[nodiscard]] static Status run(bool cluster, const LaunchShape& shape, const GatherArgs& args,
                                  cudaStream_t stream);
};

// Not inline, so that an instantiation elsewhere is enough.
template <class Config, int Tokens>
Status GatherKernels<Config, Tokens>::run(bool cluster, const LaunchShape& shape, const GatherArgs& args,
                                          cudaStream_t stream) {
  // A small block is taken in clusters alone.
  if constexpr (Config::kThreads != Narrow<Config>::kThreads) {
    if (!cluster) return launch(gather_kernel<Config, Tokens, false>, shape, args, stream);
  }
  return launch(gather_kernel<Config, Tokens, true>, shape, args, stream);
}

#define CODEGEMM_GATHER_KERNELS_TUNED(EXTERN, CONFIG)                                                        \
  EXTERN template struct GatherKernels<CONFIG, 1>;                                                           \
  EXTERN template struct GatherKernels<CONFIG, 2>;                                                           \
  EXTERN template struct GatherKernels<Narrow<CONFIG>, 1>;
#define CODEGEMM_GATHER_KERNELS_ANY(EXTERN, CODEBOOKS, SETS)                                                 \
  EXTERN template struct GatherKernels<GatherAny<CODEBOOKS, SETS>, 1>;
// EXTERN: extern, or nothing.
#define CODEGEMM_GATHER_KERNELS(EXTERN)                                                                      \
  CODEGEMM_GATHER_KERNELS_TUNED(EXTERN, GatherM1V4G128)                                                      \
  CODEGEMM_GATHER_KERNELS_TUNED(EXTERN, GatherM2V8G128)                                                      \
  CODEGEMM_GATHER_KERNELS_TUNED(EXTERN, GatherM1V4G32)                                                       \
  CODEGEMM_GATHER_KERNELS_TUNED(EXTERN, GatherM1V4Row)                                                       \
  CODEGEMM_GATHER_KERNELS_TUNED(EXTERN, GatherM2V8Row)                                                       \
  CODEGEMM_GATHER_KERNELS_ANY(EXTERN, 1, 1)                                                                  \
  CODEGEMM_GATHER_KERNELS_ANY(EXTERN, 1, 2)                                                                  \
  CODEGEMM_GATHER_KERNELS_ANY(EXTERN, 1, 4)                                                                  \
  CODEGEMM_GATHER_KERNELS_ANY(EXTERN, 2, 2)                                                                  \
  CODEGEMM_GATHER_KERNELS_ANY(EXTERN, 2, 4)                                                                  \
  CODEGEMM_GATHER_KERNELS_ANY(EXTERN, 3, 3)                                                                  \
  CODEGEMM_GATHER_KERNELS_ANY(EXTERN, 4, 4)
#if defined(CODEGEMM_PRECOMPILED_CUDA)
CODEGEMM_GATHER_KERNELS(extern)
#endif

}  // namespace codegemm::cuda::detail
