// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/plan.hpp - how a product is cut into blocks.
// Layer: cuda (host only, no CUDA headers).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include <codegemm/cuda/packed_matrix.hpp>

namespace codegemm::cuda {

/// What a call may tune; the defaults fit an H100.
struct GatherTuning {
  int cluster = 8;  ///< most blocks that push their sums into each other's shared memory; 0: always through memory
  int rounds_ahead = 1;     ///< how far the second-level cache is ahead, in rounds of a tile a warp; at most 15
  int shared_bytes = 0;     ///< shared memory of a block at least: more than half of a multiprocessor's keeps others off
};

/// The grid of a gather kernel: `splits` blocks along K for each of `chunks` ranges of rows.
struct GatherPlan {
  bool cluster = false;  // the splits of a chunk are one cluster
  int splits = 0;
  int granules_per_block = 0;
  int chunks = 0;
  int tiles_per_block = 0;
  std::size_t shared_bytes = 0;
  double cost = 0.0;  // estimated cycles

  /// A counter for each row tile, and the sums of every split.
  [[nodiscard]] std::size_t workspace_bytes(const PackedLayout& l, int tokens) const {
    if (cluster || splits <= 1) return 0;
    return counter_bytes(l) + static_cast<std::size_t>(l.row_tiles) * static_cast<std::size_t>(splits) *
                                  static_cast<std::size_t>(tokens * kTileRows) * sizeof(float);
  }
  [[nodiscard]] static std::size_t counter_bytes(const PackedLayout& l) {
    return (static_cast<std::size_t>(l.row_tiles) * sizeof(unsigned) + 255) / 256 * 256;
  }
};

/// What plan_gather() knows of a kernel and a card.
struct GatherLimits {
  int multiprocessors = 0;
  std::size_t shared_bytes = 0;       // of a block at most
  std::array<int, 9> clusters = {};   // [size]: how many clusters of that size run at once, one block a multiprocessor
  std::size_t table_bytes = 0;        // a block's Psumbook
  int tokens = 1;                     // of a pass
  int warps = 1;                      // of a block
};

/// The cheapest grid by a rough count of cycles: a block builds a Psumbook for each of its granules, goes through its
/// tiles, and the splits are summed.
[[nodiscard]] inline GatherPlan plan_gather(const PackedLayout& l, const GatherLimits& limits, const GatherTuning& tuning) {
  constexpr double kTileCycles = 34.0;       // a tile and set of columns
  constexpr double kBuildCycles = 500.0;     // a set of columns
  constexpr double kClusterCycles = 1500.0;  // pushing and waiting
  constexpr double kMemoryCycles = 15000.0;  // writing, fence, counter, reading
  const auto divide_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t granules = std::max<std::int64_t>(l.granules, 1);
  GatherPlan best;
  const auto consider = [&](bool cluster, std::int64_t granules_per_block, std::int64_t slots) {
    GatherPlan p;
    p.cluster = cluster;
    const std::int64_t splits = divide_up(granules, granules_per_block);
    const std::size_t tile_sums = static_cast<std::size_t>(kTileRows * limits.tokens) * sizeof(float);
    // A block's shared memory holds the sums of its rows, and those that are pushed to it: for each split, the tiles of
    // its share of the warps.
    const std::int64_t owned = cluster ? splits * divide_up(limits.warps, splits) : 0;  // warps, over all splits
    const std::size_t fixed = limits.table_bytes + static_cast<std::size_t>(owned) * tile_sums + 8;
    const auto room = static_cast<std::int64_t>((limits.shared_bytes - fixed) / tile_sums);
    const std::int64_t most = room * limits.warps / (limits.warps + owned);
    const std::int64_t wanted = std::clamp<std::int64_t>(slots, 1, l.row_tiles);
    const std::int64_t tiles = std::min(divide_up(l.row_tiles, wanted), most);
    const std::int64_t chunks = divide_up(l.row_tiles, tiles);
    p.splits = static_cast<int>(splits);
    p.granules_per_block = static_cast<int>(granules_per_block);
    p.chunks = static_cast<int>(chunks);
    p.tiles_per_block = static_cast<int>(tiles);
    p.shared_bytes = limits.table_bytes + static_cast<std::size_t>(tiles) * tile_sums;
    if (cluster) p.shared_bytes += static_cast<std::size_t>(owned * divide_up(tiles, limits.warps)) * tile_sums + 8;
    p.shared_bytes = std::max(p.shared_bytes, std::min(static_cast<std::size_t>(tuning.shared_bytes), limits.shared_bytes));
    const double waves = static_cast<double>(divide_up(chunks, std::max<std::int64_t>(slots, 1)));
    const double work = static_cast<double>(granules_per_block) * l.sets * limits.tokens *
                        (kBuildCycles + static_cast<double>(tiles) * kTileCycles);
    p.cost = waves * work + (splits == 1 ? 0.0 : cluster ? kClusterCycles : kMemoryCycles);
    if (best.splits == 0 || p.cost < best.cost) best = p;
  };
  for (int size = 1; size <= tuning.cluster; ++size) {
    const int slots = limits.clusters[static_cast<std::size_t>(size)];
    const std::int64_t granules_per_block = divide_up(granules, size);
    if (slots > 0 && divide_up(granules, granules_per_block) == size) consider(true, granules_per_block, slots);
  }
  for (std::int64_t granules_per_block = 1; granules_per_block <= granules; ++granules_per_block) {
    if (best.cluster && tuning.cluster == 8 && granules_per_block > 16) break;
    const std::int64_t splits = divide_up(granules, granules_per_block);
    consider(false, granules_per_block, std::max<std::int64_t>(limits.multiprocessors / splits, 1));
  }
  return best;
}

}  // namespace codegemm::cuda
