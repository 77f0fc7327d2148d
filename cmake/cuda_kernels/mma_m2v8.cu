// SPDX-License-Identifier: Apache-2.0
//
// cmake/cuda_kernels/mma_m2v8.cu - FusedM2V8 on mma.sync, compiled once (see configs.cuh).
#include <codegemm/cuda/regimes/fused_mma_kernels.cuh>

namespace codegemm::cuda::detail {
CODEGEMM_FUSED_MMA_KERNELS(, FusedM2V8)
}
