// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/few_tokens.hpp - the Psumbook way: one table lookup and one addition for v weights.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/cpu/kernels.hpp>
#include <codegemm/cpu/plan.hpp>
#include <codegemm/pack.hpp>

namespace codegemm::detail {

/// The operands of one multiplication and its workspace, which begins with the workers' scratch.
struct GemmArgs {
  const PackedView& w;
  MatrixView<const float> x;  // [T][K]
  MatrixView<float> y;        // [T][N]
  float* workspace;
};

/// One task's rows [first_block, first_block + blocks) and tiles [first_tile, last_tile).
struct PsumbookTask {
  std::int64_t first_block;
  std::int64_t blocks;
  std::int64_t first_tile;
  std::int64_t last_tile;
  std::int64_t first_token;
  std::int64_t tokens;  // <= lanes
  int lanes;
};

/// x[first_token + t][first_k + k] to out[k][lanes]; lanes without a token are 0.
inline void interleave_tokens(MatrixView<const float> x, const PsumbookTask& task, std::int64_t first_k,
                              std::int64_t count, float* out) {
  for (std::int64_t t = 0; t < task.lanes; ++t) {
    const float* const row = t < task.tokens ? x.row(task.first_token + t) + first_k : nullptr;
    for (std::int64_t k = 0; k < count; ++k) out[k * task.lanes + t] = row != nullptr ? row[k] : 0.0F;
  }
}

/// sums[blocks * 8][lanes] = the task's rows times its tokens over its tiles.
inline void run_psumbook_task(const CpuKernels& kernels, const GemmArgs& args, const PsumbookPlan& plan,
                              const PsumbookTask& task, float* scratch, float* part, float* sums) {
  const PackedView& w = args.w;
  const std::int64_t m = w.format.m;
  const std::int64_t v = w.format.v;
  const std::int64_t segment = w.segment_vectors();
  const bool one = task.lanes == 1;
  const CpuKernels::Build build = kernels.build(task.lanes);
  const CpuKernels::Gather gather = kernels.gather(task.lanes);
  float* const tables = scratch;
  float* const x_tile = scratch + plan.table_floats;
  std::fill_n(sums, task.blocks * kPackedRows * task.lanes, 0.0F);

  for (std::int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const std::int64_t first = tile * w.tile_vectors;
    const std::int64_t count = w.vectors_in(tile);
    const float* x = x_tile;
    if (one) {
      x = args.x.row(task.first_token) + first * v;
    } else {
      interleave_tokens(args.x, task, first * v, count * v, x_tile);
    }
    PsumbookArgs psumbook{w.codebooks, w.codebooks_transposed, x, count, m, w.format.centroids(), tables};
    if (one) build(psumbook);

    GatherArgs sweep{};
    sweep.stride = count * m;
    sweep.tables = tables;
    sweep.part = part;
    sweep.y = sums;
    sweep.blocks = task.blocks;
    const std::uint64_t* const codes = w.tile_codes(tile) + task.first_block * sweep.stride;
    // Vectors [j, next) of the tile share a scale and have their tables in the cache together.
    for (std::int64_t j = 0, next = 0; j < count; j = next) {
      const std::int64_t group = (first + j) / segment;
      const std::int64_t group_end = std::min(count, (group + 1) * segment - first);
      next = one ? group_end : std::min(group_end, j + plan.sweep_vectors);
      sweep.codes = codes + j * m;
      sweep.entries = (next - j) * m;
      sweep.scales = w.scales + group * w.padded_rows() + task.first_block * kPackedRows;
      sweep.first = j == 0 || j == group * segment - first;
      sweep.last = next == group_end;
      if (one) {
        sweep.tables = tables + j * m * w.format.centroids();
      } else {
        psumbook.x = x + j * v * task.lanes;
        psumbook.vectors = next - j;
        build(psumbook);
      }
      gather(sweep);
    }
  }
}

/// y[first_token + t][n] = the sum over splits of sums[n][t], for `count` rows from first_row on.
template <int kLanes>
void store_sums(MatrixView<float> y, std::int64_t first_token, std::int64_t tokens, std::int64_t first_row,
                std::int64_t count, const float* sums, std::int64_t splits, std::int64_t split_floats) {
  for (std::int64_t n = 0; n < count; ++n) {
    float total[std::size_t{kLanes}] = {};
    for (std::int64_t split = 0; split < splits; ++split) {
      const float* const from = sums + split * split_floats + n * kLanes;
      for (int t = 0; t < kLanes; ++t) total[t] += from[t];
    }
    for (std::int64_t t = 0; t < tokens; ++t) y.row(first_token + t)[first_row + n] = total[t];
  }
}

using StoreSums = void (*)(MatrixView<float>, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                           const float*, std::int64_t, std::int64_t);

/// store_sums() for 1, 4 or 8 lanes.
[[nodiscard]] inline StoreSums store_sums_for(int lanes) noexcept {
  constexpr StoreSums kByLanes[] = {&store_sums<1>, &store_sums<4>, &store_sums<8>};
  return kByLanes[lanes / 4];
}

/// y = x W^T through Psumbooks. T, N, K > 0; the workspace is make_psumbook_plan()'s.
inline void run_psumbook(const CpuKernels& kernels, const GemmArgs& args, Executor& executor) {
  const PackedView& w = args.w;
  const PsumbookPlan plan = make_psumbook_plan(w, args.x.rows);
  const std::int64_t worker_floats = plan.worker_floats();
  float* const partial = args.workspace + executor.workers() * worker_floats;

  // Tasks next to one another read the same codes for different tokens.
  const std::int64_t tasks = plan.chunks * plan.splits * plan.token_blocks;
  parallel_for(executor, tasks, [&](std::int64_t index, int worker) {
    const std::int64_t token_block = index % plan.token_blocks;
    const std::int64_t split = index / plan.token_blocks % plan.splits;
    const std::int64_t chunk = index / plan.token_blocks / plan.splits;
    PsumbookTask task{};
    task.first_block = chunk * plan.chunk_blocks;
    task.blocks = std::min(plan.chunk_blocks, w.row_blocks - task.first_block);
    task.first_tile = split * plan.split_tiles;
    task.last_tile = std::min(w.tiles, task.first_tile + plan.split_tiles);
    task.first_token = token_block * 8;
    task.lanes = plan.lanes(token_block);
    task.tokens = std::min<std::int64_t>(task.lanes, plan.tokens - task.first_token);
    if (task.blocks <= 0) return;
    const std::int64_t first_row = task.first_block * kPackedRows;
    float* const scratch = args.workspace + worker * worker_floats;
    float* const part = scratch + plan.table_floats + plan.x_floats;
    float* sums = part + plan.sum_floats;
    if (plan.splits > 1) {
      sums = partial + split * plan.split_floats + token_block * w.padded_rows() * 8 + first_row * task.lanes;
    }
    run_psumbook_task(kernels, args, plan, task, scratch, part, sums);
    if (plan.splits > 1) return;
    const std::int64_t rows = std::min(task.blocks * kPackedRows, w.rows - first_row);
    store_sums_for(task.lanes)(args.y, task.first_token, task.tokens, first_row, rows, sums, 1, 0);
  });
  if (plan.splits == 1) return;

  constexpr std::int64_t kRows = 1024;
  const std::int64_t ranges = ceil_div(w.rows, kRows);
  parallel_for(executor, ranges * plan.token_blocks, [&](std::int64_t index, int) {
    const std::int64_t token_block = index % plan.token_blocks;
    const std::int64_t first_row = index / plan.token_blocks * kRows;
    const std::int64_t rows = std::min(kRows, w.rows - first_row);
    const int lanes = plan.lanes(token_block);
    const std::int64_t tokens = std::min<std::int64_t>(lanes, plan.tokens - token_block * 8);
    const float* const sums = partial + token_block * w.padded_rows() * 8 + first_row * lanes;
    store_sums_for(lanes)(args.y, token_block * 8, tokens, first_row, rows, sums, plan.splits,
                          plan.split_floats);
  });
}

}  // namespace codegemm::detail
