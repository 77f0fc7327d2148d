// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/plan.hpp - cuts one multiplication into tasks. Looks at shapes only, never at the workers.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/cpu/configs.hpp>
#include <codegemm/pack.hpp>

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

/// The fewest tokens from which on dequantize-and-multiply is the cheaper way, by CpuCosts.
[[nodiscard]] inline std::int64_t dense_from_tokens(const PackedView& w) noexcept {
  const auto weights = static_cast<double>(w.padded_rows()) * static_cast<double>(w.cols);
  const auto entries = static_cast<double>(w.vectors() * w.format.m);
  const auto builds = static_cast<double>(ceil_div(w.padded_rows(), CpuTiles::kRowChunk));
  const double build = CpuCosts::kLanesBuild * w.format.v * static_cast<double>(w.format.centroids());
  const double gather = CpuCosts::kLanesWord * static_cast<double>(w.row_blocks);
  const double psumbook = entries * (gather + builds * build) / 8.0;  // a token
  const double dense = weights * CpuCosts::kDenseMultiply;            // a token
  const double dequantize = weights * CpuCosts::kDequantize * w.format.m;
  if (psumbook <= dense) return std::numeric_limits<std::int64_t>::max();
  const double tokens = dequantize / (psumbook - dense);
  return tokens > 1e9 ? std::numeric_limits<std::int64_t>::max() : static_cast<std::int64_t>(tokens) + 1;
}

/// Psumbook: tokens go in blocks of 8 lanes, and what is left in 8, 4 or 1; rows in chunks that share one
/// Psumbook; K in splits, where there would be too few tasks else, whose sums are added in a fixed order.
struct PsumbookPlan {
  std::int64_t tokens = 0;
  std::int64_t token_blocks = 0;
  std::int64_t chunk_blocks = 0;  // row blocks in a chunk
  std::int64_t chunks = 0;
  std::int64_t split_tiles = 0;  // tiles in a split
  std::int64_t splits = 0;
  std::int64_t sweep_vectors = 0;  // vectors whose tables are held at once, more than one lane
  // Floats of a worker's scratch and of the partial sums of all splits ([splits][token blocks][rows][lanes]).
  std::int64_t table_floats = 0;
  std::int64_t x_floats = 0;
  std::int64_t sum_floats = 0;
  std::int64_t split_floats = 0;

  [[nodiscard]] int lanes(std::int64_t token_block) const noexcept {
    const std::int64_t left = tokens - token_block * 8;
    return left > 4 ? 8 : left > 1 ? 4 : 1;
  }
  [[nodiscard]] std::int64_t worker_floats() const noexcept {
    return table_floats + x_floats + (splits > 1 ? sum_floats : 2 * sum_floats);
  }
  [[nodiscard]] std::int64_t partial_floats() const noexcept {
    return splits > 1 ? splits * split_floats : 0;
  }
};

[[nodiscard]] inline PsumbookPlan make_psumbook_plan(const PackedView& w, std::int64_t tokens) noexcept {
  PsumbookPlan plan;
  plan.tokens = tokens;
  plan.token_blocks = ceil_div(tokens, 8);
  plan.chunks = std::max<std::int64_t>(1, ceil_div(w.padded_rows(), CpuTiles::kRowChunk));
  plan.chunk_blocks = ceil_div(w.row_blocks, plan.chunks);
  const std::int64_t whole = std::max<std::int64_t>(1, plan.chunks * plan.token_blocks);
  const std::int64_t wanted = std::clamp<std::int64_t>(ceil_div(CpuTiles::kTargetTasks, whole), 1,
                                                       std::max<std::int64_t>(1, w.tiles));
  plan.split_tiles = std::max<std::int64_t>(1, ceil_div(w.tiles, wanted));
  plan.splits = std::max<std::int64_t>(1, ceil_div(w.tiles, plan.split_tiles));

  const std::int64_t lanes = plan.token_blocks > 1 ? 8 : plan.lanes(0);
  const std::int64_t table = w.format.centroids() * w.format.m * lanes;  // of one vector
  plan.sweep_vectors = std::clamp<std::int64_t>(CpuTiles::kLaneTableFloats / table, 1, w.tile_vectors);
  const std::int64_t held = w.tile_vectors * w.format.centroids() * w.format.m;  // one lane
  plan.table_floats = line_floats(std::max(plan.sweep_vectors * table, held));
  plan.x_floats = line_floats(w.tile_vectors * w.format.v * lanes);
  plan.sum_floats = line_floats(plan.chunk_blocks * kPackedRows * lanes);
  const std::int64_t all_lanes = 8 * (plan.token_blocks - 1) + plan.lanes(plan.token_blocks - 1);
  plan.split_floats = line_floats(w.padded_rows() * all_lanes);
  return plan;
}

/// Dequantize and multiply: the tokens are laid out once as [slabs][token tiles][depth][6]; a task
/// dequantizes some rows slab by slab and multiplies them with some tokens.
struct DensePlan {
  std::int64_t tokens = 0;
  std::int64_t token_tiles = 0;   // of kDenseTokens tokens
  std::int64_t slab_vectors = 0;  // vectors of v along K in a slab
  std::int64_t slabs = 0;
  std::int64_t row_tasks = 0;
  std::int64_t token_tasks = 0;
  std::int64_t worker_floats = 0;
  std::int64_t x_floats = 0;
};

[[nodiscard]] inline DensePlan make_dense_plan(const PackedView& w, std::int64_t tokens) noexcept {
  DensePlan plan;
  plan.tokens = tokens;
  plan.token_tiles = ceil_div(tokens, CpuTiles::kDenseTokens);
  plan.slab_vectors = CpuTiles::kDenseDepth / w.format.v;
  plan.slabs = ceil_div(w.vectors(), plan.slab_vectors);
  plan.row_tasks = ceil_div(w.rows, CpuTiles::kDenseTaskRows);
  plan.token_tasks = ceil_div(tokens, CpuTiles::kDenseTaskTokens);
  plan.worker_floats = line_floats(CpuTiles::kDenseTaskRows * CpuTiles::kDenseDepth);
  plan.x_floats = line_floats(plan.token_tiles * CpuTiles::kDenseTokens * w.cols);
  return plan;
}

/// Which of the ways is taken. kAutomatic is the cheaper one by CpuCosts; the others are for tests.
enum class Regime : int { kAutomatic = 0, kPsumbook = 1, kDense = 2 };

[[nodiscard]] inline Regime choose_regime(const PackedView& w, std::int64_t tokens, Regime asked) noexcept {
  if (asked != Regime::kAutomatic) return asked;
  return tokens >= dense_from_tokens(w) ? Regime::kDense : Regime::kPsumbook;
}

/// Floats of workspace for exactly `tokens` tokens.
[[nodiscard]] inline std::int64_t exact_workspace_floats(const PackedView& w, std::int64_t tokens,
                                                         int workers, Regime asked) noexcept {
  if (tokens <= 0 || w.rows == 0 || w.cols == 0) return 0;
  if (choose_regime(w, tokens, asked) == Regime::kDense) {
    const DensePlan plan = make_dense_plan(w, tokens);
    return plan.x_floats + workers * plan.worker_floats;
  }
  const PsumbookPlan plan = make_psumbook_plan(w, tokens);
  return plan.partial_floats() + workers * plan.worker_floats();
}

/// Floats for any number of tokens up to `tokens`. Fewer tokens may need more, since K is split for them;
/// that ends at kTargetTasks token blocks, and among equally many blocks the most tokens need most.
[[nodiscard]] inline std::int64_t workspace_floats(const PackedView& w, std::int64_t tokens, int workers,
                                                   Regime asked) noexcept {
  std::int64_t most = exact_workspace_floats(w, tokens, workers, asked);
  for (std::int64_t t = 8; t < tokens && t <= 8 * CpuTiles::kTargetTasks; t += 8) {
    most = std::max(most, exact_workspace_floats(w, t, workers, asked));
  }
  const std::int64_t dense = dense_from_tokens(w);
  if (asked == Regime::kAutomatic && dense <= tokens) {  // the last count that is not dense
    most = std::max(most, exact_workspace_floats(w, dense - 1, workers, asked));
  }
  return most;
}

}  // namespace codegemm::detail
