// SPDX-License-Identifier: Apache-2.0
//
// cmake/cuda_kernels/mma_m1v4.cu - FusedM1V4 on mma.sync, compiled once (see configs.cuh).
#include <codegemm/cuda/regimes/fused_mma_kernels.cuh>

namespace codegemm::cuda::detail {
CODEGEMM_FUSED_MMA_KERNELS(, FusedM1V4)
}
