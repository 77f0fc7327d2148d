// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/few_tokens.hpp - the Psumbook way: one table lookup and one addition for v weights.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/cpu/kernels.hpp>
#include <codegemm/cpu/lookup_task.hpp>
#include <codegemm/cpu/plan.hpp>
#include <codegemm/cpu/psumbook_task.hpp>
#include <codegemm/pack.hpp>

namespace codegemm::detail {

/// x[first_token + t][first_k + k] to out[k][lanes]; lanes without a token are 0.
inline void interleave_tokens(MatrixView<const float> x, const PsumbookTask& task, std::int64_t first_k,
                              std::int64_t count, float* out) {
  for (std::int64_t t = 0; t < task.lanes; ++t) {
    const float* const row = t < task.tokens ? x.row(task.first_token + t) + first_k : nullptr;
    for (std::int64_t k = 0; k < count; ++k) out[k * task.lanes + t] = row != nullptr ? row[k] : 0.0F;
  }
}

/// sums[blocks * block rows][lanes] = the task's rows times its tokens over its tiles.
inline void run_psumbook_task(const CpuKernels& kernels, const GemmArgs& args, const PsumbookPlan& plan,
                              const PsumbookTask& task, const PsumbookScratch& scratch, float* sums) {
  const PackedView& w = args.w;
  const std::int64_t m = w.format.m;
  const std::int64_t v = w.format.v;
  const std::int64_t segment = w.segment_vectors();
  const bool one = task.lanes == 1;
  const CpuKernels::Build build = kernels.build(task.lanes);
  const CpuKernels::Gather gather = kernels.gather(task.lanes);
  float* const tables = scratch.tables;
  float* const x_tile = scratch.x_tile;
  std::fill_n(sums, task.blocks * w.block_rows * task.lanes, 0.0F);

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
    sweep.stride = count * m * w.entry_words();
    sweep.tables = tables;
    sweep.part = scratch.part;
    sweep.y = sums;
    sweep.octets = task.blocks * w.block_rows / kWordRows;
    sweep.words = w.entry_words();
    const std::uint64_t* const codes = w.tile_codes(tile) + task.first_block * sweep.stride;
    // Vectors [j, next) of the tile share a scale and have their tables in the cache together.
    for (std::int64_t j = 0, next = 0; j < count; j = next) {
      const std::int64_t group = (first + j) / segment;
      const std::int64_t group_end = std::min(count, (group + 1) * segment - first);
      next = one ? group_end : std::min(group_end, j + plan.sweep_vectors);
      sweep.codes = codes + j * m * w.entry_words();
      sweep.entries = (next - j) * m;
      sweep.scales = w.scales + group * w.padded_rows() + task.first_block * w.block_rows;
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
  // 64 sums at a time: as many adders side by side as any processor has.
  constexpr std::int64_t kSums = 64;
  constexpr std::int64_t kRows = kSums / kLanes;
  for (std::int64_t n = 0; n < count; n += kRows) {
    const std::int64_t rows = std::min(kRows, count - n);
    float total[static_cast<std::size_t>(kSums)] = {};
    for (std::int64_t split = 0; split < splits; ++split) {
      const float* const from = sums + split * split_floats + n * kLanes;
      if (rows == kRows) {
        for (std::int64_t i = 0; i < kSums; ++i) total[i] += from[i];
      } else {
        for (std::int64_t i = 0; i < rows * kLanes; ++i) total[i] += from[i];
      }
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      float* const to = y.row(first_token + t) + first_row + n;
      for (std::int64_t row = 0; row < rows; ++row) to[row] = total[row * kLanes + t];
    }
  }
}

using StoreSums = void (*)(MatrixView<float>, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                           const float*, std::int64_t, std::int64_t);

/// store_sums() for 1, 4 or 8 lanes.
[[nodiscard]] inline StoreSums store_sums_for(int lanes) noexcept {
  constexpr StoreSums kByLanes[] = {&store_sums<1>, &store_sums<4>, &store_sums<8>};
  return kByLanes[lanes / 4];
}

/// Stores a task's tokens, summed over the splits: those of a token block from first_row on.
inline void store_block(const GemmArgs& args, const PsumbookPlan& plan, std::int64_t token_block,
                        std::int64_t first_row, std::int64_t rows, const float* sums,
                        std::int64_t token_stride, std::int64_t splits) {
  const std::int64_t token = token_block * 8;
  const std::int64_t tokens = plan.tokens_in(token_block);
  if (!plan.lookup) {
    store_sums_for(plan.lanes(token_block))(args.y, token, tokens, first_row, rows, sums, splits,
                                            plan.split_floats);
    return;
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    store_sums<1>(args.y, token + t, 1, first_row, rows, sums + t * token_stride, splits, plan.split_floats);
  }
}

/// The tasks of one multiplication. All that they need lies together, so that a worker of another core has it
/// after one wait: of the lines that the caller has just written each takes a tenth of a microsecond and
/// more.
class PsumbookTasks {
 public:
  PsumbookTasks(const CpuKernels& kernels, const GemmArgs& args, const PsumbookPlan& plan, int workers)
      : plan_(plan),
        kernels_(kernels),
        w_(args.w),
        args_{w_, args.x, args.y, args.workspace},
        worker_floats_(plan.worker_floats()),
        partial_(args.workspace + workers * worker_floats_) {}
  PsumbookTasks(const PsumbookTasks&) = delete;
  PsumbookTasks& operator=(const PsumbookTasks&) = delete;
  ~PsumbookTasks() = default;

  [[nodiscard]] std::int64_t count() const noexcept { return plan_.chunks * pieces() * plan_.token_blocks; }

  /// Tasks next to one another read the same codes for different tokens.
  void operator()(std::int64_t index, int worker) const {
    ask_for(this, reinterpret_cast<const char*>(arrivals_) - reinterpret_cast<const char*>(this));
    __builtin_prefetch(&arrivals_[index & 1], 1);  // if two meet, where this one arrives first
    const std::int64_t token_block = index % plan_.token_blocks;
    const std::int64_t piece = index / plan_.token_blocks % pieces();
    const std::int64_t chunk = index / plan_.token_blocks / pieces();
    const std::int64_t split = std::min(piece, plan_.splits - 1);
    PsumbookTask task{};
    task.first_block = chunk * plan_.chunk_blocks;
    task.blocks = std::min(plan_.chunk_blocks, w_.row_blocks - task.first_block);
    if (split == plan_.splits - 1) {
      const std::int64_t blocks = ceil_div(task.blocks, plan_.last_parts);
      const std::int64_t before = std::min(task.blocks, (piece - split) * blocks);
      task.first_block += before;
      task.blocks = std::min(blocks, task.blocks - before);
    }
    task.first_tile = split * plan_.split_tiles;
    task.last_tile = std::min(w_.tiles, task.first_tile + plan_.split_tiles);
    task.first_token = token_block * 8;
    task.lanes = plan_.lanes(token_block);
    task.tokens = plan_.tokens_in(token_block);
    if (task.blocks <= 0) return;
    const std::int64_t first_row = task.first_block * w_.block_rows;
    const PsumbookScratch scratch(plan_, args_.workspace + worker * worker_floats_);
    const bool split_k = plan_.splits > 1;
    float* const sums =
        split_k ? partial_sums(token_block, first_row) + split * plan_.split_floats : scratch.sums;
    const std::int64_t token_stride = split_k ? w_.padded_rows() : plan_.chunk_blocks * w_.block_rows;
    if (plan_.meet) {
      const std::int64_t half = task.blocks / 2;
      const BlockOrder::Range upper{0, half};
      const BlockOrder::Range lower{half, task.blocks};
      const BlockOrder order = split == 0 ? BlockOrder{{lower, upper}, 2} : BlockOrder{{upper, lower}, 2};
      run_lookup_task(kernels_, args_, task, order, scratch, sums, token_stride,
                      Meeting{*this, order, split});
    } else if (plan_.lookup) {
      run_lookup_task(kernels_, args_, task, BlockOrder::whole(task.blocks), scratch, sums, token_stride,
                      NobodyWaits{});
    } else {
      run_psumbook_task(kernels_, args_, plan_, task, scratch, sums);
    }
    if (split_k) return;
    const std::int64_t rows = std::min(task.blocks * w_.block_rows, w_.rows - first_row);
    store_block(args_, plan_, token_block, first_row, rows, sums, token_stride, 1);
  }

  /// Adds up the splits of kSumRows rows of a token block.
  static constexpr std::int64_t kSumRows = 1024;
  void add_splits(std::int64_t index) const {
    const std::int64_t token_block = index % plan_.token_blocks;
    const std::int64_t first_row = index / plan_.token_blocks * kSumRows;
    const std::int64_t rows = std::min(kSumRows, w_.rows - first_row);
    if (plan_.token_blocks == 1 && plan_.splits == 2) {
      for (std::int64_t split = 0; split < 2; ++split) {
        ask_for(partial_sums(token_block, first_row) + split * plan_.split_floats, rows * 4);
      }
    }
    store_block(args_, plan_, token_block, first_row, rows, partial_sums(token_block, first_row),
                w_.padded_rows(), plan_.splits);
  }

 private:
  // How many have finished a half of the rows: alone in its line.
  struct alignas(128) Arrivals {
    std::atomic<int> count{0};
  };

  // Two splits of K, each of which ends with the half of the rows that the other has begun with: who comes
  // second finds the other's sums of that half finished, as a rule for a while, and adds them to its own. So
  // nobody waits, and the ways between cores lie in the time of the look-ups.
  struct Meeting {
    const PsumbookTasks& tasks;
    const BlockOrder& order;
    std::int64_t split;
    bool other_was_here = false;

    [[nodiscard]] std::atomic<int>& arrivals(int part) const {
      return tasks.arrivals_[split == 0 ? part : 1 - part].count;
    }
    void begin(int part) {
      if (part == 0) return;
      other_was_here = arrivals(part).load(std::memory_order_acquire) == 1;
      if (!other_was_here) return;
      const auto [first, end] = order.parts[part];
      ask_for(tasks.partial_sums(0, first * kBlockRows) + (1 - split) * tasks.plan_.split_floats,
              (end - first) * kBlockRows * 4);
    }
    void end(int part) const {
      if (!other_was_here && arrivals(part).fetch_add(1, std::memory_order_acq_rel) == 0) return;
      const auto [first, last] = order.parts[part];
      const std::int64_t first_row = first * kBlockRows;
      const std::int64_t rows = std::min(last * kBlockRows, tasks.w_.rows) - first_row;
      if (rows <= 0) return;
      store_block(tasks.args_, tasks.plan_, 0, first_row, rows, tasks.partial_sums(0, first_row),
                  tasks.w_.padded_rows(), 2);
    }
  };

  // Of a chunk: its splits, the last one in parts.
  [[nodiscard]] std::int64_t pieces() const noexcept { return plan_.splits + plan_.last_parts - 1; }

  // Where the partial sums of a token block begin for a row, and how far apart its tokens are in lookups.
  [[nodiscard]] float* partial_sums(std::int64_t token_block, std::int64_t row) const noexcept {
    return partial_ + token_block * w_.padded_rows() * 8 + row * plan_.lanes(token_block);
  }

  PsumbookPlan plan_;
  CpuKernels kernels_;
  PackedView w_;
  GemmArgs args_;  // of w_
  std::int64_t worker_floats_;
  float* partial_;
  mutable Arrivals arrivals_[2];  // by the split that begins with that half
};

/// y = x W^T through Psumbooks, gathered or looked up as the plan says. T, N, K > 0; the workspace is the
/// plan's.
inline void run_psumbook(const CpuKernels& kernels, const GemmArgs& args, const PsumbookPlan& plan,
                         Executor& executor) {
  const PsumbookTasks tasks(kernels, args, plan, executor.workers());
  parallel_for(executor, tasks.count(), tasks);
  if (plan.splits == 1 || plan.meet) return;
  const std::int64_t ranges = ceil_div(args.w.rows, PsumbookTasks::kSumRows);
  parallel_for(executor, ranges * plan.token_blocks,
               [&](std::int64_t index, int) { tasks.add_splits(index); });
}

}  // namespace codegemm::detail
