// SPDX-License-Identifier: Apache-2.0
//
// cmake/cuda_kernels/wgmma_m2v8.cu - FusedM2V8 on wgmma, compiled once (see configs.cuh).
#include <codegemm/cuda/regimes/fused_wgmma_kernels.cuh>

namespace codegemm::cuda::detail {
CODEGEMM_FUSED_WGMMA_KERNELS(, FusedM2V8)
}
