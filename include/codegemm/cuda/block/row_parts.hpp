// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/row_parts.hpp - merged matrices: which rows have which codebooks, and which block takes
// which rows.
// Layer: cuda/block (host + device, no CUDA headers).
#pragma once

#include <array>
#include <cstdint>

#include <codegemm/base/macros.hpp>

namespace codegemm::cuda {

/// Matrices that are merged along N (Q, K and V; gate and up), each with codebooks of its own.
inline constexpr int kMaxParts = 4;

/// The first row tile of each part; what follows the last part is the number of all row tiles.
using PartTiles = std::array<std::int32_t, kMaxParts + 1>;

/// Rows in blocks of `tiles_per_block` row tiles, none of them with two sets of codebooks. `halves`: block i
/// takes rows of the first half of the matrix, and whoever works on the second half takes those `half_tiles`
/// further on.
struct RowBlocks {
  std::int32_t first_tile[kMaxParts + 1] = {};   ///< of each part, as PartTiles
  std::int32_t first_block[kMaxParts + 1] = {};  ///< of each part, then the number of all blocks
  std::int32_t tiles_per_block = 0;              ///< row tiles of a block; a part's last block may have fewer
  std::int32_t half_tiles = 0;                   ///< 0: no halves
  std::int32_t half_part = 0;                    ///< what is added to the part in the second half

  /// The row tiles of one block: the part, its first row tile of the whole matrix, and how many.
  struct Block {
    /// @{ See above.
    int part, tile, tiles;  /// @}
  };

  /// Blocks to launch.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr int blocks() const { return first_block[kMaxParts]; }

  /// The tiles of block i, in the first (0) or second (1) half.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr Block block(int i, int half = 0) const {
    int part = 0;
    std::int32_t tile0 = first_tile[0];
    std::int32_t block0 = first_block[0];
    std::int32_t end = first_tile[1];
    for (int p = 1; p < kMaxParts; ++p) {  // no index that is known at run time only: kernels begin with this
      if (i < first_block[p]) break;
      part = p, tile0 = first_tile[p], block0 = first_block[p], end = first_tile[p + 1];
    }
    const int tile = tile0 + (i - block0) * tiles_per_block;
    const int left = end - tile;
    return {part + half * half_part, tile + half * half_tiles,
            left < tiles_per_block ? left : tiles_per_block};
  }
};

/// Cuts `parts` parts. With `halves` there are one or two parts of equal size.
[[nodiscard]] constexpr RowBlocks cut_rows(const PartTiles& first_tile, int parts, int tiles_per_block,
                                           bool halves) {
  RowBlocks out;
  out.tiles_per_block = tiles_per_block;
  const std::int32_t all = first_tile[kMaxParts];
  if (halves) {
    out.half_tiles = all / 2;
    out.half_part = parts - 1;
  }
  const int cut = halves ? 1 : parts;
  for (int p = 0; p <= kMaxParts; ++p) {
    const auto at = static_cast<std::size_t>(p);
    out.first_tile[p] = p == 0 ? 0 : halves ? all / 2 : first_tile[at];
    if (p == 0) continue;
    const std::int32_t tiles = p <= cut ? out.first_tile[p] - out.first_tile[p - 1] : 0;
    out.first_block[p] = out.first_block[p - 1] + (tiles + tiles_per_block - 1) / tiles_per_block;
  }
  return out;
}

/// The fewest row tiles a block with which there are at most `blocks` of them, or one for each part.
[[nodiscard]] constexpr std::int64_t least_tiles_per_block(const PartTiles& first_tile, int parts,
                                                           std::int64_t blocks, bool halves) {
  const std::int64_t all = halves ? first_tile[kMaxParts] / 2 : first_tile[kMaxParts];
  if (all == 0) return 1;
  if (blocks < 1) blocks = 1;
  std::int64_t tiles = (all + blocks - 1) / blocks;
  const int least = halves ? 1 : parts;
  while (tiles < all && blocks >= least &&
         cut_rows(first_tile, parts, static_cast<int>(tiles), halves).blocks() > blocks) {
    ++tiles;
  }
  return tiles;
}

}  // namespace codegemm::cuda
