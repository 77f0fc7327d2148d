// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/wgmma_groups.hpp - how many weights a warp looks up between two of its products.
// Layer: cuda/block (host + device, no CUDA headers).
#pragma once

#include <codegemm/base/macros.hpp>

namespace codegemm::cuda {

/// Steps of 16 k whose weights are looked up at once: the more, the less of a look-up's latency is seen. As
/// many as sums leave registers for, and an even number of groups in a slab.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int wgmma_group(int lane_span, int token_tile) {
  if (token_tile <= 128 && lane_span >= 16) return 8;
  return token_tile < 256 && lane_span >= 8 ? 4 : 2;
}

/// Stages of x, 64 k each, that this takes at least: those of one group are multiplied while a warp waits for
/// those of the next two.
[[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int wgmma_least_stages(int group) {
  return group <= 4 ? 3 : 3 * group / 4;
}

}  // namespace codegemm::cuda
