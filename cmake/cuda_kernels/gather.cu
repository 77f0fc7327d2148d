// SPDX-License-Identifier: Apache-2.0
//
// cmake/cuda_kernels/gather.cu - gathering from Psumbooks, compiled once (see configs.cuh).
#include <codegemm/cuda/regimes/gather_kernels.cuh>

namespace codegemm::cuda::detail {
CODEGEMM_GATHER_KERNELS()
}
