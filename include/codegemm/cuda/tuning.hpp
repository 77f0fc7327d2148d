// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/tuning.hpp - what a call may tune; zeros and defaults leave it to the planners.
// Layer: cuda (host only, no CUDA headers).
#pragma once

#include <cstddef>

namespace codegemm::cuda {

/// Ways of making the product, by how many tokens they are for.
enum class Regime {
  kAuto,        ///< the fastest that serves the problem, by the crossovers in crossovers.hpp
  kGather,      ///< Psumbook: few tokens
  kFusedMma,    ///< weights looked up into mma.sync
  kFusedWgmma,  ///< weights looked up into wgmma: many tokens, compute capability 9.0
};

/// The head of every workspace: counters, zero before and after each call of any size. What lies behind it is
/// left as it is, so that calls of different sizes can share a workspace.
inline constexpr std::size_t kCounterBytes = 16384;

/// Choices of one call; the defaults fit an H100, and zeros leave a choice to the planner of the regime.
struct GemmTuning {
  /// Most blocks that add their sums through each other's shared memory, 1 (none) to 8. Gather and fused mma.
  int cluster = 8;
  /// How far the second-level cache is ahead, in tiles of a warp, 0 to 15. Gather (where a warp has at most
  /// three tiles) and fused mma.
  int rounds_ahead = 1;
  int shared_bytes = 0;           ///< gather: shared memory of a block at least
  Regime regime = Regime::kAuto;  ///< which kernel
  /// Fused: parts of K, up to 8; wgmma: pieces that a product of the last, unfilled wave is cut into.
  int splits = 0;
  int token_tile = 0;  ///< fused wgmma: tokens of a block, 32, 64, 128 or 256
  int warpgroups = 0;  ///< fused wgmma: that multiply, 64 rows each: 2, or with 128 tokens and no SwiGLU 3
};

}  // namespace codegemm::cuda
