// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/fused_mma_kernels.cuh - starts the kernels on mma.sync. They are compiled with the
// functions here, in every file or once for a program (see configs.cuh).
// Layer: cuda/regimes (host, needs nvcc).
#pragma once

#include <cuda_runtime.h>

#include <codegemm/cuda/configs.cuh>
#include <codegemm/cuda/kernels/fused_mma.cuh>
#include <codegemm/cuda/kernels/fused_mma_tile.cuh>
#include <codegemm/cuda/launch.cuh>

namespace codegemm::cuda::detail {

/// The kernels of a configuration for x of fp16 or bf16, with SwiGLU or without.
template <class Config, PairType Pairs, bool Gated>
struct FusedMmaKernels {
  /// tokens: of the kernel, 8 or 16.
  [[nodiscard]] static Status run(int tokens, const LaunchShape& shape, const FusedMmaArgs& args,
                                  cudaStream_t stream);
  [[nodiscard]] static Status run_tiles(const LaunchShape& shape, const FusedMmaTileArgs& args,
                                        cudaStream_t stream);
};

// Not inline, so that an instantiation elsewhere is enough.
template <class Config, PairType Pairs, bool Gated>
Status FusedMmaKernels<Config, Pairs, Gated>::run(int tokens, const LaunchShape& shape,
                                                  const FusedMmaArgs& args, cudaStream_t stream) {
  return tokens == 8 ? launch(fused_mma_kernel<Config, Pairs, 8, Gated>, shape, args, stream)
                     : launch(fused_mma_kernel<Config, Pairs, 16, Gated>, shape, args, stream);
}
template <class Config, PairType Pairs, bool Gated>
Status FusedMmaKernels<Config, Pairs, Gated>::run_tiles(const LaunchShape& shape,
                                                        const FusedMmaTileArgs& args, cudaStream_t stream) {
  return launch(fused_mma_tile_kernel<Config, Pairs, Gated>, shape, args, stream);
}

// EXTERN: extern, or nothing.
#define CODEGEMM_FUSED_MMA_KERNELS(EXTERN, CONFIG)                                                           \
  EXTERN template struct FusedMmaKernels<CONFIG, PairType::kHalf, false>;                                    \
  EXTERN template struct FusedMmaKernels<CONFIG, PairType::kHalf, true>;                                     \
  EXTERN template struct FusedMmaKernels<CONFIG, PairType::kBFloat16, false>;                                \
  EXTERN template struct FusedMmaKernels<CONFIG, PairType::kBFloat16, true>;
#if defined(CODEGEMM_PRECOMPILED_CUDA)
CODEGEMM_FUSED_CONFIGS(CODEGEMM_FUSED_MMA_KERNELS, extern)
#endif

}  // namespace codegemm::cuda::detail
