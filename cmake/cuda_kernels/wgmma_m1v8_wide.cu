// SPDX-License-Identifier: Apache-2.0
//
// cmake/cuda_kernels/wgmma_m1v8_wide.cu - FusedM1V8Wide on wgmma, compiled once (see configs.cuh).
#include <codegemm/cuda/regimes/fused_wgmma_kernels.cuh>

namespace codegemm::cuda::detail {
CODEGEMM_FUSED_WGMMA_KERNELS(, FusedM1V8Wide)
}
