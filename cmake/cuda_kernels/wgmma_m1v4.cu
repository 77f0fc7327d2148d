// SPDX-License-Identifier: Apache-2.0
//
// cmake/cuda_kernels/wgmma_m1v4.cu - FusedM1V4 on wgmma, compiled once (see configs.cuh).
#include <codegemm/cuda/regimes/fused_wgmma_kernels.cuh>

namespace codegemm::cuda::detail {
CODEGEMM_FUSED_WGMMA_KERNELS(, FusedM1V4)
}
