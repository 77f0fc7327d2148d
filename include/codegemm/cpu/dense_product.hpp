// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/dense_product.hpp - the loops around the 6 x 16 tile, wherever the weights come from.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/cpu/dense_tile.hpp>
#include <codegemm/cpu/plan.hpp>

namespace codegemm::detail {

using Multiply = void (*)(const MicroArgs&);

/// A 6 x 16 tile at the edge: computed whole beside y, and the part that exists is copied.
inline void multiply_edge(Multiply multiply, MicroArgs m, std::int64_t tokens, std::int64_t rows) {
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  float whole[static_cast<std::size_t>(CpuTiles::kDenseTokens * kRows)];
  float* const c = m.c;
  const bool accumulate = m.accumulate;
  m.c = whole;
  m.accumulate = false;
  const std::int64_t stride = m.stride;
  m.stride = kRows;
  multiply(m);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < rows; ++n) {
      float& to = c[t * stride + n];
      to = accumulate ? to + whole[t * kRows + n] : whole[t * kRows + n];
    }
  }
}

/// x of a slab as [token tiles][depth][6]: rows of x itself are K apart and would share cache sets.
inline void lay_out_tokens(const DensePlan& plan, MatrixView<const float> x, std::int64_t tile,
                           float* x_tiles) {
  constexpr std::int64_t kTokens = CpuTiles::kDenseTokens;
  for (std::int64_t slab = 0; slab < plan.slabs; ++slab) {
    const std::int64_t first_k = slab * plan.slab_depth;
    const std::int64_t depth = std::min(plan.slab_depth, plan.cols - first_k);
    float* const out = x_tiles + first_k * plan.token_tiles * kTokens + tile * kTokens * depth;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      const std::int64_t token = tile * kTokens + t;
      const float* const row = token < plan.tokens ? x.row(token) + first_k : nullptr;
      for (std::int64_t k = 0; k < depth; ++k) out[k * kTokens + t] = row != nullptr ? row[k] : 0.0F;
    }
  }
}

/// y = x W^T, or y += x W^T if `accumulate`. fill(first_row, first_k, depth, panels) brings rows [first_row,
/// first_row + 48) of W, as far as they exist, and columns [first_k, first_k + depth) to
/// panels[3][depth][16]; rows beyond the matrix but inside a panel of 16 are 0. T, N, K > 0; workspace:
/// plan.floats().
template <class Fill>
void run_dense_product(const DensePlan& plan, Multiply multiply, MatrixView<const float> x,
                       MatrixView<float> y, float* workspace, Executor& executor, Fill&& fill,
                       bool accumulate = false) {
  constexpr std::int64_t kTokens = CpuTiles::kDenseTokens;
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  float* const x_tiles = workspace + executor.workers() * plan.worker_floats;
  parallel_for(executor, plan.token_tiles,
               [&](std::int64_t tile, int) { lay_out_tokens(plan, x, tile, x_tiles); });

  constexpr std::int64_t kTaskTiles = CpuTiles::kDenseTaskTokens / kTokens;
  parallel_for(executor, plan.row_tasks * plan.token_tasks, [&](std::int64_t index, int worker) {
    const std::int64_t first_tile = index % plan.token_tasks * kTaskTiles;
    const std::int64_t last_tile = std::min(plan.token_tiles, first_tile + kTaskTiles);
    const std::int64_t first_row = index / plan.token_tasks * CpuTiles::kDenseTaskRows;
    const std::int64_t end_row = std::min(first_row + CpuTiles::kDenseTaskRows, plan.rows);
    float* const panels = workspace + worker * plan.worker_floats;
    for (std::int64_t slab = 0; slab < plan.slabs; ++slab) {
      const std::int64_t first_k = slab * plan.slab_depth;
      const std::int64_t depth = std::min(plan.slab_depth, plan.cols - first_k);
      fill(first_row, first_k, depth, panels);
      const float* const x_slab = x_tiles + first_k * plan.token_tiles * kTokens;
      for (std::int64_t row = first_row; row < end_row; row += kRows) {
        for (std::int64_t tile = first_tile; tile < last_tile; ++tile) {
          const MicroArgs micro{x_slab + tile * kTokens * depth,
                                panels + (row - first_row) * depth,
                                depth,
                                y.row(tile * kTokens) + row,
                                y.stride,
                                accumulate || slab > 0};
          const std::int64_t tokens = std::min(kTokens, plan.tokens - tile * kTokens);
          const std::int64_t rows = std::min(kRows, plan.rows - row);
          if (tokens == kTokens && rows == kRows) {
            multiply(micro);
          } else {
            multiply_edge(multiply, micro, tokens, rows);
          }
        }
      }
    }
  });
}

}  // namespace codegemm::detail
