// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/gather_plan.hpp - how a product by gathering is cut into blocks.
// Layer: cuda/regimes (host only, no CUDA headers).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include <codegemm/cuda/block/half_layout.hpp>
#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/cuda/tuning.hpp>

namespace codegemm::cuda {

/// The grid of a gather kernel, (ranks, chunks, groups): splits * groups blocks along K for each range of
/// rows.
struct GatherPlan {
  bool cluster = false;          ///< the splits are the blocks of a cluster, else there is one
  int splits = 0;                ///< parts of K, of each group
  int ranks = 0;                 ///< blocks of a cluster: the splits, with SwiGLU of both halves
  int chunks = 0;                ///< ranges of rows
  int groups = 0;                ///< along K, each of so many splits
  int granules_per_block = 0;    ///< granules of K
  int tiles_per_block = 0;       ///< row tiles
  int tables = 1;                ///< Psumbooks of a block
  std::size_t sums_at = 0;       ///< in a block's shared memory: the sums of its rows
  std::size_t shared_bytes = 0;  ///< of a block
  double cost = 0.0;             ///< estimated cycles

  /// The sums of every group, after the counters.
  [[nodiscard]] std::size_t workspace_bytes(const PackedLayout& l, int tokens) const {
    if (groups <= 1) return 0;
    return kCounterBytes + static_cast<std::size_t>(groups) * static_cast<std::size_t>(l.row_tiles) *
                               static_cast<std::size_t>(tokens * kTileRows) * sizeof(float);
  }
};

/// What plan_gather() knows of a kernel and a card.
struct GatherLimits {
  int multiprocessors = 0;       ///< of the card
  std::size_t shared_bytes = 0;  ///< of a block at most
  std::array<int, 9> clusters =
      {};  ///< [size]: how many clusters of that size run at once, one block a multiprocessor
  std::size_t table_bytes = 0;  ///< a Psumbook
  /// What a block keeps of each granule beside the table: HalfPsumbook, of which there are one or two, behind
  /// the first kWindowStart bytes of the shared window. 0: one table.
  std::size_t staged_bytes = 0;
  int tokens = 1;       ///< of a pass
  int warps = 1;        ///< of a block
  bool halves = false;  ///< SwiGLU
};

/// The cheapest grid by a rough count of cycles, or none (splits 0): a block builds a Psumbook for each of
/// its granules, goes through its tiles, and the sums are added.
[[nodiscard]] inline GatherPlan plan_gather(const PackedLayout& l, const GatherLimits& limits,
                                            const GemmTuning& tuning) {
  // From traces of an H100 and an H200. A tile's set of columns: 16 lookups, 4 shuffles and 4 wavefronts of
  // codes; two tokens share the look-ups of a HalfPsumbook.
  const bool half = limits.staged_bytes > 0;
  const double kTileCycles = half ? 22.0 : 27.0;
  const double kGranuleCycles = half ? 400.0 : 700.0;  // barriers, and the latency of a warp's last tile
  const double kBuildCycles = half ? 80.0 : 500.0;     // a set of columns
  constexpr double kClusterCycles = 1000.0;            // pushing and waiting
  constexpr double kGroupCycles = 6000.0;              // writing, fence, counter, reading
  constexpr double kReadCycles = 4.0;                  // a tile's sums of one group, by the last block
  const double sets = static_cast<double>(l.sets * limits.tokens);
  const double looked_up = half ? static_cast<double>(l.sets) : sets;
  const auto divide_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t granules = std::max<std::int64_t>(l.granules, 1);
  const std::size_t tile_sums = static_cast<std::size_t>(kTileRows * limits.tokens) * sizeof(float);
  GatherPlan best;
  const auto consider = [&](bool cluster, std::int64_t splits, std::int64_t granules_per_block,
                            std::int64_t slots) {
    const std::int64_t blocks = divide_up(granules, granules_per_block);  // along K
    if (slots < 1 || blocks % splits != 0) return;
    const std::int64_t ranks = limits.halves ? 2 * splits : splits;
    GatherPlan p;
    p.cluster = cluster;
    const std::int64_t groups = blocks / splits;
    // A block's shared memory holds the sums of its rows, and those that are pushed to it: for each split,
    // the tiles of its share of the warps.
    const std::int64_t owned =
        cluster ? ranks * divide_up(limits.warps, ranks) : 0;  // warps, over all blocks of the cluster
    const std::size_t head = half ? kWindowStart : 0;
    const auto place = [&](int tables) {  // the most row tiles a block
      p.tables = tables;
      p.sums_at = limits.table_bytes * static_cast<std::size_t>(tables) +
                  limits.staged_bytes * static_cast<std::size_t>(granules_per_block) +
                  (half ? kSquaresBytes + kRowBarrierBytes : 0);
      const std::size_t fixed = head + p.sums_at + static_cast<std::size_t>(owned) * tile_sums + 8;
      if (fixed >= limits.shared_bytes) return std::int64_t{0};
      const auto room = static_cast<std::int64_t>((limits.shared_bytes - fixed) / tile_sums);
      return room * limits.warps / (limits.warps + owned);
    };
    const std::int64_t wanted = least_tiles_per_block(l.first_tile, l.parts, slots / groups, limits.halves);
    std::int64_t most = half && granules_per_block > 1 ? place(2) : 0;
    if (most < wanted) most = place(1);
    if (most < 1) return;
    const std::int64_t tiles = std::min(wanted, most);
    const std::int64_t chunks =
        cut_rows(l.first_tile, l.parts, static_cast<int>(tiles), limits.halves).blocks();
    if (groups > 65535 || chunks > 65535) return;  // limits of a grid
    if (groups > 1 && static_cast<std::size_t>(ranks * chunks) > kCounterBytes / sizeof(unsigned)) return;
    p.splits = static_cast<int>(splits);
    p.ranks = static_cast<int>(ranks);
    p.groups = static_cast<int>(groups);
    p.chunks = static_cast<int>(chunks);
    p.granules_per_block = static_cast<int>(granules_per_block);
    p.tiles_per_block = static_cast<int>(tiles);
    p.shared_bytes = head + p.sums_at + static_cast<std::size_t>(tiles) * tile_sums;
    if (cluster)
      p.shared_bytes += static_cast<std::size_t>(owned * divide_up(tiles, limits.warps)) * tile_sums + 8;
    p.shared_bytes = std::max(p.shared_bytes,
                              std::min(static_cast<std::size_t>(tuning.shared_bytes), limits.shared_bytes));
    const double granule =
        kBuildCycles * sets + kTileCycles * looked_up * static_cast<double>(tiles) + kGranuleCycles;
    const double waves = static_cast<double>(divide_up(chunks * groups, slots));
    p.cost = waves * static_cast<double>(granules_per_block) * granule + (cluster ? kClusterCycles : 0.0);
    if (groups > 1)
      p.cost +=
          kGroupCycles + kReadCycles * static_cast<double>(groups * tiles) / static_cast<double>(splits);
    if (best.splits == 0 || p.cost < best.cost) best = p;
  };
  for (std::int64_t granules_per_block = 1; granules_per_block <= granules; ++granules_per_block) {
    // With more granules a block, its Psumbooks alone cost more than the best so far.
    const double least = kBuildCycles * sets + kTileCycles * looked_up + kGranuleCycles;
    if (best.splits != 0 && static_cast<double>(granules_per_block) * least >= best.cost) break;
    if (!limits.halves) consider(false, 1, granules_per_block, limits.multiprocessors);
    for (int size = 2; size <= tuning.cluster; size += limits.halves ? 2 : 1) {
      consider(true, limits.halves ? size / 2 : size, granules_per_block,
               limits.clusters[static_cast<std::size_t>(size)]);
    }
  }
  return best;
}

}  // namespace codegemm::cuda
