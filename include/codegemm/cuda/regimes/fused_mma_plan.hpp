// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/fused_mma_plan.hpp - how a fused product by mma.sync is cut into blocks and warps.
// Layer: cuda/regimes (host only, no CUDA headers).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/cuda/tuning.hpp>

namespace codegemm::cuda {

/// The grid is (splits, blocks); the splits are a cluster.
struct FusedMmaPlan {
  int splits = 0;                ///< 0: does not fit
  int blocks = 0;                ///< of rows
  int tiles_per_block = 0;       ///< row tiles
  int slabs_per_split = 0;       ///< slabs of K
  std::size_t shared_bytes = 0;  ///< of a block
  double cost = 0.0;             ///< estimated cycles
};

/// What plan_fused_mma() knows of a kernel and a card.
struct FusedMmaLimits {
  int multiprocessors = 0;           ///< of the card
  std::size_t shared_bytes = 0;      ///< of a block at most
  std::array<int, 9> clusters = {};  ///< as Device::clusters
  std::size_t table_bytes = 0;       ///< a block's codebooks, and codes on their way
  std::size_t sum_bytes = 0;         ///< of the warps, for two groups of row tiles
  int tokens = 0;                    ///< of a pass, padded
  int warps = 0;                     ///< of a block
  bool halves = false;               ///< SwiGLU
  int window_cycles = 900;           ///< until x is in registers
  int slab_cycles = 0;               ///< of a warp's slab of a tile: wavefronts of 128 bytes of shared memory
};

/// The cheapest grid by a rough count of cycles. Shared memory is what a multiprocessor runs out of: lookups,
/// and the sums of the warps.
[[nodiscard]] inline FusedMmaPlan plan_fused_mma(const PackedLayout& l, const FusedMmaLimits& limits,
                                                 const GemmTuning& tuning) {
  constexpr double kTileLatency = 900.0;     // of one warp alone
  constexpr double kClusterCycles = 2200.0;  // two barriers of a cluster and reading between them
  const auto divide_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t slabs = 2 * l.granules;
  const int halves = limits.halves ? 2 : 1;  // one after the other
  FusedMmaPlan best;
  for (int splits = 1; splits <= std::min(tuning.cluster, 8); ++splits) {
    if (tuning.splits != 0 && splits != tuning.splits) continue;
    const std::int64_t slots =
        splits == 1 ? limits.multiprocessors : limits.clusters[static_cast<std::size_t>(splits)];
    const std::int64_t slabs_per_split = divide_up(slabs, splits);
    if (slots < 1 || (splits - 1) * slabs_per_split >= slabs) continue;
    FusedMmaPlan p;
    std::size_t fixed = limits.table_bytes + limits.sum_bytes;
    if (fixed > limits.shared_bytes) continue;
    std::int64_t per_block = least_tiles_per_block(l.first_tile, l.parts, slots, limits.halves);
    if (splits > 1 || slabs_per_split > limits.warps || limits.halves) {
      // The sums of a block's rows have to fit: else there are more blocks than run at once.
      const std::size_t tile = static_cast<std::size_t>(kTileRows * limits.tokens * halves) * sizeof(float);
      const auto room = static_cast<std::int64_t>((limits.shared_bytes - fixed) / tile);
      if (room < 1) continue;
      per_block = std::min(per_block, room);
      fixed += static_cast<std::size_t>(per_block) * tile;
    }
    p.splits = splits;
    p.blocks = cut_rows(l.first_tile, l.parts, static_cast<int>(per_block), limits.halves).blocks();
    p.tiles_per_block = static_cast<int>(per_block);
    p.slabs_per_split = static_cast<int>(slabs_per_split);
    p.shared_bytes = fixed;
    if (p.blocks > 65535) continue;  // limit of a grid
    double work = 0.0;
    for (std::int64_t slab = 0; slab < slabs_per_split; slab += limits.warps) {
      const double active = static_cast<double>(std::min<std::int64_t>(limits.warps, slabs_per_split - slab));
      work += limits.window_cycles +
              static_cast<double>(per_block) * std::max(active * limits.slab_cycles, kTileLatency);
    }
    p.cost =
        static_cast<double>(divide_up(p.blocks, slots)) * halves * work + (splits > 1 ? kClusterCycles : 0.0);
    if (best.splits == 0 || p.cost < best.cost) best = p;
  }
  return best;
}

}  // namespace codegemm::cuda
