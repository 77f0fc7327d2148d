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

/// Where a 6 x 16 tile goes.
struct TileTarget {
  float* c;
  std::int64_t stride;
  bool accumulate;
};

/// A tile at the edge: multiply(TileTarget) computes it whole beside y, and the part that exists is copied.
template <class MultiplyTile>
void multiply_edge(MultiplyTile&& multiply, const TileTarget& to, std::int64_t tokens, std::int64_t rows) {
  constexpr std::int64_t kTokens = CpuTiles::kDenseTokens;
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  float whole[static_cast<std::size_t>(kTokens * kRows)];
  multiply(TileTarget{whole, kRows, false});
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < rows; ++n) {
      float& c = to.c[t * to.stride + n];
      c = to.accumulate ? c + whole[t * kRows + n] : whole[t * kRows + n];
    }
  }
}

/// y = x W^T, or y += x W^T if `accumulate`, tile by tile and slab by slab. T, N, K > 0; workspace:
/// plan.floats(), of which the first workers * plan.worker_floats are the workers'. A Way knows what the
/// numbers are:
///   lay_out(tile)                               brings 6 tokens into the workspace, before all else
///   fill(first_row, first_k, depth, memory)     48 rows of a slab of W, as far as they exist, to a worker's
///   multiply(tile, row, first_k, depth, memory, TileTarget)   16 of them, from the row-th on, times 6 tokens
template <class Way>
void run_tiles(const SlabPlan& plan, MatrixView<float> y, float* workspace, Executor& executor, Way&& way,
               bool accumulate = false) {
  constexpr std::int64_t kTokens = CpuTiles::kDenseTokens;
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  parallel_for(executor, plan.token_tiles, [&](std::int64_t tile, int) { way.lay_out(tile); });

  constexpr std::int64_t kTaskTiles = CpuTiles::kDenseTaskTokens / kTokens;
  parallel_for(executor, plan.row_tasks * plan.token_tasks, [&](std::int64_t index, int worker) {
    const std::int64_t first_tile = index % plan.token_tasks * kTaskTiles;
    const std::int64_t last_tile = std::min(plan.token_tiles, first_tile + kTaskTiles);
    const std::int64_t first_row = index / plan.token_tasks * CpuTiles::kDenseTaskRows;
    const std::int64_t end_row = std::min(first_row + CpuTiles::kDenseTaskRows, plan.rows);
    float* const memory = workspace + worker * plan.worker_floats;
    for (std::int64_t slab = 0; slab < plan.slabs; ++slab) {
      const std::int64_t first_k = slab * plan.slab_depth;
      const std::int64_t depth = std::min(plan.slab_depth, plan.cols - first_k);
      way.fill(first_row, first_k, depth, memory);
      for (std::int64_t row = first_row; row < end_row; row += kRows) {
        for (std::int64_t tile = first_tile; tile < last_tile; ++tile) {
          const auto multiply = [&](const TileTarget& to) {
            way.multiply(tile, row - first_row, first_k, depth, memory, to);
          };
          const TileTarget to{y.row(tile * kTokens) + row, y.stride, accumulate || slab > 0};
          const std::int64_t tokens = std::min(kTokens, plan.tokens - tile * kTokens);
          const std::int64_t rows = std::min(kRows, plan.rows - row);
          if (tokens == kTokens && rows == kRows) {
            multiply(to);
          } else {
            multiply_edge(multiply, to, tokens, rows);
          }
        }
      }
    }
  });
}

using Multiply = void (*)(const MicroArgs&);

/// x of a slab as [token tiles][depth][6]: rows of x itself are K apart and would share cache sets.
inline void lay_out_tokens(const SlabPlan& plan, MatrixView<const float> x, std::int64_t tile,
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

/// y = x W^T in fp32, or y += x W^T if `accumulate`. fill(first_row, first_k, depth, panels) brings rows
/// [first_row, first_row + 48) of W, as far as they exist, and columns [first_k, first_k + depth) to
/// panels[3][depth][16]; rows beyond the matrix but inside a panel of 16 are 0. T, N, K > 0; workspace:
/// plan.floats().
template <class Fill>
void run_dense_product(const SlabPlan& plan, Multiply multiply, MatrixView<const float> x,
                       MatrixView<float> y, float* workspace, Executor& executor, Fill&& fill,
                       bool accumulate = false) {
  struct Way {
    const SlabPlan& plan;
    Multiply multiply_tile;
    MatrixView<const float> x;
    float* x_tiles;
    Fill& fill_panels;

    void lay_out(std::int64_t tile) const { lay_out_tokens(plan, x, tile, x_tiles); }
    void fill(std::int64_t first_row, std::int64_t first_k, std::int64_t depth, float* panels) const {
      fill_panels(first_row, first_k, depth, panels);
    }
    void multiply(std::int64_t tile, std::int64_t row, std::int64_t first_k, std::int64_t depth,
                  const float* panels, const TileTarget& to) const {
      const float* const a = x_tiles + (first_k * plan.token_tiles + tile * depth) * CpuTiles::kDenseTokens;
      multiply_tile({a, panels + row * depth, depth, to.c, to.stride, to.accumulate});
    }
  };
  run_tiles(plan, y, workspace, executor,
            Way{plan, multiply, x, workspace + executor.workers() * plan.worker_floats, fill}, accumulate);
}

}  // namespace codegemm::detail
