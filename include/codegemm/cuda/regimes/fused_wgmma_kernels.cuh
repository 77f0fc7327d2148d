// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/fused_wgmma_kernels.cuh - starts the kernels on wgmma. They are compiled with the
// function here, in every file or once for a program (see configs.cuh).
// Layer: cuda/regimes (host, needs nvcc).
#pragma once

#include <cuda_runtime.h>

#include <codegemm/cuda/configs.cuh>
#include <codegemm/cuda/kernels/fused_wgmma.cuh>
#include <codegemm/cuda/launch.cuh>

namespace codegemm::cuda::detail {

/// The kernels of a configuration for x of fp16 or bf16, with SwiGLU or without.
template <class Config, PairType Pairs, bool Gated>
struct FusedWgmmaKernels {
  /// Tokens of a tile: 32, 64, 128 or 256. groups: warpgroups that multiply, 2, or 3 with 128 and no SwiGLU.
  [[nodiscard]] static Status run(int token_tile, int groups, const LaunchShape& shape,
                                  const FusedWgmmaArgs& args, cudaStream_t stream);
};

// Not inline, so that an instantiation elsewhere is enough.
template <class Config, PairType Pairs, bool Gated>
Status FusedWgmmaKernels<Config, Pairs, Gated>::run(int token_tile, int groups, const LaunchShape& shape,
                                                    const FusedWgmmaArgs& args, cudaStream_t stream) {
  if constexpr (!Gated) {
    if (token_tile == 128 && groups == 3)
      return launch(fused_wgmma_kernel<Config, Pairs, 128, false, 3>, shape, args, stream);
  }
  switch (token_tile) {
    case 32: return launch(fused_wgmma_kernel<Config, Pairs, 32, Gated>, shape, args, stream);
    case 64: return launch(fused_wgmma_kernel<Config, Pairs, 64, Gated>, shape, args, stream);
    case 128: return launch(fused_wgmma_kernel<Config, Pairs, 128, Gated>, shape, args, stream);
    default: return launch(fused_wgmma_kernel<Config, Pairs, 256, Gated>, shape, args, stream);
  }
}

// EXTERN: extern, or nothing.
#define CODEGEMM_FUSED_WGMMA_KERNELS(EXTERN, CONFIG)                                                         \
  EXTERN template struct FusedWgmmaKernels<CONFIG, PairType::kHalf, false>;                                  \
  EXTERN template struct FusedWgmmaKernels<CONFIG, PairType::kHalf, true>;                                   \
  EXTERN template struct FusedWgmmaKernels<CONFIG, PairType::kBFloat16, false>;                              \
  EXTERN template struct FusedWgmmaKernels<CONFIG, PairType::kBFloat16, true>;
#if defined(CODEGEMM_PRECOMPILED_CUDA)
CODEGEMM_FUSED_CONFIGS(CODEGEMM_FUSED_WGMMA_KERNELS, extern)
CODEGEMM_FUSED_WGMMA_KERNELS(extern, FusedM1V4G32)
#endif

}  // namespace codegemm::cuda::detail
