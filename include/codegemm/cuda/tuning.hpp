// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/tuning.hpp - what a call may tune; zeros and defaults leave it to the planners.
// Layer: cuda (host only, no CUDA headers).
#pragma once

#include <cstddef>

namespace codegemm::cuda {

/// Ways of making the product, by how many tokens they are for.
enum class Regime {
  kAuto,        ///< the fastest that serves the problem, by the crossovers in configs.cuh
  kGather,      ///< Psumbook: few tokens
  kFusedMma,    ///< weights looked up into mma.sync
  kFusedWgmma,  ///< weights looked up into wgmma: many tokens, compute capability 9.0
};

/// The head of every workspace: counters, zero before and after each call of any size. What lies behind it is
/// left as it is, so that calls of different sizes can share a workspace.
inline constexpr std::size_t kCounterBytes = 16384;

struct GemmTuning {
  int cluster = 8;  ///< most blocks that add their sums through each other's shared memory; 1: none
  int rounds_ahead =
      1;  ///< gather: how far the second-level cache is ahead, in rounds of a tile a warp; at most 15
  int shared_bytes = 0;  ///< gather: shared memory of a block at least
  Regime regime = Regime::kAuto;
  int splits = 0;      ///< fused: parts of K
  int token_tile = 0;  ///< fused wgmma: tokens of a block, 32, 64, 128 or 256
};

}  // namespace codegemm::cuda
