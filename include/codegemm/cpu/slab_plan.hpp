// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/slab_plan.hpp - cuts the dense ways into tasks: rows of W come slab by slab (some columns of
// K) into a worker's memory and are multiplied with tiles of tokens.
// Layer: cpu (host only).
#pragma once

#include <cstdint>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/cpu/configs.hpp>

namespace codegemm::detail {

[[nodiscard]] constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) noexcept {
  return (a + b - 1) / b;
}

[[nodiscard]] constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) noexcept {
  return ceil_div(a, b) * b;
}

// Floats rounded up to whole cache lines: every part of the workspace starts on one.
[[nodiscard]] constexpr std::int64_t line_floats(std::int64_t floats) noexcept {
  return round_up(floats, static_cast<std::int64_t>(kBufferAlignment / sizeof(float)));
}

/// How one of the dense ways cuts.
struct SlabCut {
  std::int64_t tile_tokens;
  std::int64_t depth;  // columns of a slab
  std::int64_t task_rows;
  std::int64_t task_tokens;
  std::int64_t
      unit;  // columns; chunks, whose sums are scaled, begin at multiples of it. 0: nothing is scaled
};

/// The tokens are laid out once, tile by tile and slab by slab; a task brings its rows of one slab after the
/// other into panels and multiplies them with its tokens. Where sums are scaled, steps follow: for each unit
/// of columns those of the chunk that begins there, [slabs][units][task rows] a worker, [slabs][token
/// tiles][units][tile tokens].
struct SlabPlan {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t tokens = 0;
  std::int64_t token_tiles = 0;
  std::int64_t slab_depth = 0;
  std::int64_t slabs = 0;
  std::int64_t row_tasks = 0;
  std::int64_t token_tasks = 0;
  std::int64_t units = 0;  // of a slab
  // Floats of a worker and, of these, those before the steps; the same of the tokens.
  std::int64_t worker_floats = 0;
  std::int64_t panel_floats = 0;
  std::int64_t x_floats = 0;
  std::int64_t x_tile_floats = 0;

  [[nodiscard]] std::int64_t floats(int workers) const noexcept { return x_floats + workers * worker_floats; }
};

/// `packing` weights, or numbers of a token, lie in the place of a float.
[[nodiscard]] inline SlabPlan cut_slabs(std::int64_t rows, std::int64_t cols, std::int64_t tokens,
                                        const SlabCut& cut, std::int64_t packing) noexcept {
  SlabPlan plan;
  plan.rows = rows;
  plan.cols = cols;
  plan.tokens = tokens;
  plan.token_tiles = ceil_div(tokens, cut.tile_tokens);
  plan.slab_depth = cut.depth;
  plan.slabs = ceil_div(cols, cut.depth);
  plan.row_tasks = ceil_div(rows, cut.task_rows);
  plan.token_tasks = ceil_div(tokens, cut.task_tokens);
  plan.units = cut.unit == 0 ? 0 : ceil_div(cut.depth, cut.unit);
  plan.panel_floats = line_floats(cut.task_rows * cut.depth / packing);
  plan.worker_floats = plan.panel_floats + line_floats(cut.task_rows * plan.units);
  plan.x_tile_floats = line_floats(plan.token_tiles * cut.tile_tokens * cols / packing);
  plan.x_floats =
      plan.x_tile_floats + line_floats(plan.slabs * plan.token_tiles * plan.units * cut.tile_tokens);
  return plan;
}

/// Weights dequantized, or transposed, to fp32: panels of 16 rows, tiles of 6 tokens.
[[nodiscard]] inline SlabPlan make_dense_plan(std::int64_t rows, std::int64_t cols,
                                              std::int64_t tokens) noexcept {
  return cut_slabs(rows, cols, tokens,
                   {CpuTiles::kDenseTokens, CpuTiles::kDenseDepth, CpuTiles::kDenseTaskRows,
                    CpuTiles::kDenseTaskTokens, 0},
                   1);
}

/// The same in 16-bit integers.
[[nodiscard]] inline SlabPlan make_integer_plan(std::int64_t rows, std::int64_t cols,
                                                std::int64_t tokens) noexcept {
  return cut_slabs(rows, cols, tokens,
                   {CpuTiles::kDenseTokens, CpuTiles::kIntegerDepth, CpuTiles::kDenseTaskRows,
                    CpuTiles::kDenseTaskTokens, CpuTiles::kIntegerUnit},
                   2);
}

/// Pairs of bytes: blocks of 64 rows, tiles of 16 tokens.
[[nodiscard]] inline SlabPlan make_byte_plan(std::int64_t rows, std::int64_t cols,
                                             std::int64_t tokens) noexcept {
  const std::int64_t depth = cols <= CpuTiles::kAmxDepthMost ? cols : CpuTiles::kAmxDepth;
  return cut_slabs(
      rows, cols, tokens,
      {CpuTiles::kAmxTokens, depth, CpuTiles::kAmxTaskRows, CpuTiles::kAmxTaskTokens, CpuTiles::kAmxColumns},
      2);
}

}  // namespace codegemm::detail
