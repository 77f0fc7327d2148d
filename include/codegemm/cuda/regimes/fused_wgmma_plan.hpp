// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/fused_wgmma_plan.hpp - how a fused product by wgmma is cut into clusters and splits.
// Layer: cuda/regimes (host only, no CUDA headers).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/cuda/block/piece_schedule.hpp>
#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/cuda/tuning.hpp>

namespace codegemm::cuda {

/// Clusters of two blocks go over token_blocks * row blocks products.
struct FusedWgmmaPlan {
  int token_tile = 0;             ///< 0: does not fit
  int token_blocks = 0;           ///< blocks of tokens
  int row_tiles = 0;              ///< of a row block
  int groups = 2;                 ///< warpgroups of a block that multiply
  PieceSchedule schedule;         ///< which cluster makes what
  int x_stages = 0;               ///< activations under way
  int code_stages = 0;            ///< codes under way
  std::size_t shared_bytes = 0;   ///< of a block
  std::size_t partial_bytes = 0;  ///< sums of products in pieces
  double cost = 0.0;              ///< estimated cycles
};

/// What plan_fused_wgmma() knows of a kernel and a card.
struct FusedWgmmaLimits {
  int cluster_pairs = 0;             ///< clusters of two that run at once
  std::size_t shared_bytes = 0;      ///< of a block at most
  std::size_t table_bytes = 0;       ///< a block's codebooks
  std::size_t code_stage_bytes = 0;  ///< of one stage
  std::size_t other_bytes = 0;       ///< barriers, and sums on their way out
  std::size_t group_bytes = 0;       ///< of these for a third warpgroup, 0: there is none
  int lane_span = 0;                 ///< weights of a row that a lane owns
  double lookup_cycles = 0.0;        ///< of 128 rows x 16 k, beyond those of the format with the fewest
  double step_cycles = 0.0;          ///< of 128 rows x 16 k at least: centroids that come from memory
  bool halves = false;               ///< SwiGLU
};

/// The cheapest plan by a rough count of cycles; at most 32 MiB of partial sums.
[[nodiscard]] inline FusedWgmmaPlan plan_fused_wgmma(const PackedLayout& l, std::int64_t cols,
                                                     std::int64_t tokens, const FusedWgmmaLimits& limits,
                                                     const GemmTuning& tuning) {
  constexpr std::size_t kMaxPartialBytes = (std::size_t{32} << 20) - kCounterBytes;
  constexpr double kProductCycles = 1000.0;  // filling the stages
  constexpr double kTokenCycles = 20.0;      // of the output
  constexpr double kHandOverCycles = 2000.0;
  constexpr double kPartialBytesACycle = 22.0;  // of a block, while others move theirs
  constexpr double kEvenBytesACycle = 17.0;     // while all do
  const auto divide_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t slab_span = std::int64_t{16} * limits.lane_span;
  const std::int64_t slabs = divide_up(cols, slab_span);
  FusedWgmmaPlan best;
  if (limits.cluster_pairs < 1) return best;
  struct Tile {
    int tokens, groups;
  };
  for (const auto [tile, groups] : {Tile{32, 2}, Tile{64, 2}, Tile{128, 2}, Tile{256, 2}, Tile{128, 3}}) {
    if (tuning.token_tile != 0 && tile != tuning.token_tile) continue;
    if (tuning.warpgroups != 0 && groups != tuning.warpgroups) continue;
    if (groups == 3 && (limits.halves || limits.group_bytes == 0)) continue;
    const int row_tiles = limits.halves ? 8 : groups * 8;  // of a cluster, in each half
    const std::int64_t row_blocks = cut_rows(l.first_tile, l.parts, row_tiles, limits.halves).blocks();
    const std::size_t stage = static_cast<std::size_t>(tile) * 128;
    // With few tokens a slab is multiplied before the next one has come from memory.
    int x_stages = 0;
    int code_stages = 0;
    std::size_t fixed = 0;
    for (const int stages : {8, 4, 3}) {
      if (stages == 3 && !(limits.halves && tile == 256)) break;  // see FusedWgmmaShape::stages_fit()
      for (code_stages = tile < 128 ? 4 : tile == 128 ? 3 : 2; code_stages >= 2; --code_stages) {
        fixed = limits.table_bytes + limits.other_bytes + (groups == 3 ? limits.group_bytes : 0) +
                static_cast<std::size_t>(code_stages * groups) * (limits.code_stage_bytes / 2);
        if (fixed + static_cast<std::size_t>(stages) * stage > limits.shared_bytes) continue;
        x_stages = stages;
        break;
      }
      if (x_stages > 0) break;
    }
    if (x_stages == 0) continue;
    const std::int64_t token_blocks = divide_up(tokens, tile);
    const std::int64_t products = token_blocks * row_blocks;
    const double steps_of_slab = limits.lane_span;  // of 16 k
    // As measured on an H200, in cycles of its clock: products, the chain of a few tokens' look-ups, and
    // shared memory.
    const double of_pair =
        std::max({0.9 * tile + 32.0, 0.47 * tile + 88.0, 0.75 * tile + 51.0 + limits.lookup_cycles});
    const double step = std::max(of_pair, limits.step_cycles) * groups / 2.0;
    const double slab_cycles = steps_of_slab * step;
    const double product_cycles = kProductCycles + kTokenCycles * tile;  // beside its slabs
    for (int splits = 1; splits <= 8; ++splits) {
      if (tuning.splits != 0 && splits != tuning.splits) continue;
      if (splits > slabs && splits > 1) continue;
      FusedWgmmaPlan p;
      p.schedule =
          schedule_pieces(products, slabs, limits.cluster_pairs, splits, x_stages < 4 ? 1 : tile / 8);
      const PieceSchedule& s = p.schedule;
      if (s.clusters < 1) continue;
      const std::int64_t rest = products - std::int64_t{s.whole} * s.clusters;  // products in pieces
      const bool cut = s.cutters > rest;
      if (cut && (x_stages < 4 || groups > 2)) continue;  // sums of the other pieces come in by way of four
      const std::size_t piece_bytes = static_cast<std::size_t>(tile) * 2 * 128 * sizeof(float);
      p.partial_bytes = cut ? static_cast<std::size_t>(s.cutters) * piece_bytes : 0;
      if (p.partial_bytes > kMaxPartialBytes) continue;
      const std::size_t counters =
          static_cast<std::size_t>(s.cutters) * (s.even_pieces > 1 ? 4 * kMostEvenPieces : 4);
      if (cut && counters > kCounterBytes / sizeof(unsigned)) continue;
      p.token_tile = tile;
      p.token_blocks = static_cast<int>(token_blocks);
      p.row_tiles = row_tiles;
      p.groups = groups;
      p.x_stages = x_stages;
      p.code_stages = code_stages;
      p.shared_bytes = fixed + static_cast<std::size_t>(x_stages) * stage;
      p.cost = s.whole * (static_cast<double>(slabs) * slab_cycles + product_cycles);
      const double block_bytes = static_cast<double>(piece_bytes) / 2.0;
      if (s.even_pieces > 1) {  // each hands over all but its share, and gets as much
        const double share = 1.0 / s.even_pieces;
        p.cost += static_cast<double>(divide_up(slabs, s.even_pieces)) * slab_cycles + kProductCycles +
                  kTokenCycles * tile * share + kHandOverCycles +
                  2.0 * (1.0 - share) * block_bytes / kEvenBytesACycle;
      } else if (rest > 0) {
        const auto longest = static_cast<double>(divide_up(s.shared_slabs, s.cutters));
        p.cost += longest * slab_cycles + product_cycles;
        // A cluster hands over one piece and adds the others of a product.
        const auto pieces = static_cast<double>(divide_up(s.cutters, rest));
        if (cut) p.cost += kProductCycles + kHandOverCycles + pieces * block_bytes / kPartialBytesACycle;
      }
      if (best.token_tile == 0 || p.cost < best.cost) best = p;
    }
  }
  return best;
}

}  // namespace codegemm::cuda
