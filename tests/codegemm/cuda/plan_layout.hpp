// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/plan_layout.hpp - the layout of a matrix, as plans look at it.
#pragma once

#include <codegemm/cuda/packed_matrix.hpp>

namespace codegemm::test {

/// One part of `rows` x `cols` weights, 512 of them a granule.
[[nodiscard]] inline cuda::PackedLayout layout_of(std::int64_t rows, std::int64_t cols) {
  cuda::PackedLayout out;
  out.granules = (cols + 511) / 512;
  out.row_tiles = (rows + cuda::kTileRows - 1) / cuda::kTileRows;
  for (std::size_t i = 1; i < out.first_tile.size(); ++i)
    out.first_tile[i] = static_cast<std::int32_t>(out.row_tiles);
  return out;
}

}  // namespace codegemm::test
