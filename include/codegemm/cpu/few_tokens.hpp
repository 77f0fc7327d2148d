// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/few_tokens.hpp - the Psumbook way: one table lookup and one addition for v weights.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

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
  std::int64_t tokens;  // <= lanes, of lookups <= 8
  int lanes;
};

/// A worker's scratch.
struct PsumbookScratch {
  float* tables;
  std::uint8_t* encoded;
  Flush* flushes;
  float* x_tile;
  float* part;
  float* sums;

  PsumbookScratch(const PsumbookPlan& plan, float* memory)
      : tables(memory),
        encoded(reinterpret_cast<std::uint8_t*>(memory + plan.table_floats)),
        flushes(reinterpret_cast<Flush*>(memory + plan.table_floats + plan.encoded_floats)),
        x_tile(memory + plan.table_floats + plan.encoded_floats + plan.flush_floats),
        part(x_tile + plan.x_floats),
        sums(part + (plan.lookup ? 0 : plan.sum_floats)) {}
};

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

/// The codes of a task in a tile, some of which were asked for. While tables are made, which would leave the
/// memory without work, the next ones are.
struct TileCodes {
  const std::uint8_t* first;
  std::int64_t bytes;
  std::int64_t asked;

  /// Where `count` more begin; null if there are none.
  [[nodiscard]] const std::uint8_t* ask(std::int64_t count) noexcept {
    if (asked >= bytes) return nullptr;
    return first + std::exchange(asked, asked + count);
  }
};

/// Makes the tables of vectors [j, next) of a tile, which share a scale, of integers and appends their
/// flushes; false where that cannot be.
inline bool make_segment(const CpuKernels& kernels, const PackedView& w, const float* x, std::int64_t j,
                         std::int64_t next, const Half* scales, const PsumbookScratch& scratch,
                         TileCodes& codes, std::int64_t& flush_count) {
  if (kernels.make_tables == nullptr || w.codebooks_pairs == nullptr) return false;
  const std::int64_t most = flush_entries(w.format.b);
  const std::int64_t m = w.format.m;
  const std::int64_t end = next * m;
  std::int64_t count = flush_count;
  for (std::int64_t first = j * m; first < end; first += most) {
    const std::int64_t some = std::min(most, end - first);
    const float step = kernels.make_tables(
        {w.codebooks_pairs, w.codebook_pair_step, x + first / m * w.format.v, ceil_div(first % m + some, m),
         m, first % m, some, scratch.encoded + first * encoded_bytes(w.format.b),
         codes.ask(some * w.format.centroids())});
    if (step < 0.0F) return false;
    scratch.flushes[count++] = {first, some, step, scales};
  }
  flush_count = count;
  return true;
}

/// Builds the tables of vectors [j, next) of a tile with activations x, which share a scale, encodes them
/// flush by flush while they are in the first-level cache, and appends the flushes; false where one of them
/// needs more than 16 bits: then all tables are there in fp32.
inline bool encode_segment(const CpuKernels& kernels, const PackedView& w, const float* x, std::int64_t j,
                           std::int64_t next, const Half* scales, const PsumbookScratch& scratch,
                           TileCodes& codes, std::int64_t& flush_count) {
  const std::int64_t most = flush_entries(w.format.b);
  const std::int64_t m = w.format.m;
  const std::int64_t end = next * m;
  std::int64_t count = flush_count;
  std::int64_t built = j;  // vectors
  const auto build_until = [&](std::int64_t last) {
    if (last <= built) return;
    kernels.build1({w.codebooks, w.codebooks_transposed, x + built * w.format.v, last - built, m,
                    w.format.centroids(), scratch.tables + built * m * w.format.centroids()});
    built = last;
  };
  for (std::int64_t first = j * m; first < end; first += most) {
    const std::int64_t some = std::min(most, end - first);
    build_until(ceil_div(first + some, m));
    const float step = kernels.lookup.encode({scratch.tables + first * w.format.centroids(), some,
                                              scratch.encoded + first * encoded_bytes(w.format.b),
                                              codes.ask(some * w.format.centroids())});
    if (step < 0.0F) {
      build_until(next);
      return false;
    }
    if (step > 0.0F) scratch.flushes[count++] = {first, some, step, scales};
  }
  flush_count = count;
  return true;
}

/// Words of a tile from one row block to the next.
[[nodiscard]] inline std::int64_t block_words(const PackedView& w, std::int64_t tile) noexcept {
  return w.vectors_in(tile) * w.format.m * w.entry_words();
}

/// A task's codes in a tile.
[[nodiscard]] inline const std::uint64_t* task_codes(const PackedView& w, const PsumbookTask& task,
                                                     std::int64_t tile) noexcept {
  return w.tile_codes(tile) + task.first_block * block_words(w, tile);
}

/// Asks for `bytes` bytes from `from` on, some of which nothing before has asked for, into the first-level
/// cache.
inline void ask_for(const void* from, std::int64_t bytes) noexcept {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 3);
}

/// Asks for a line of each page of `bytes` bytes from `from` on: finding a page takes as long as a line, and
/// all are found side by side.
inline void ask_for_pages(const void* from, std::int64_t bytes) noexcept {
  constexpr std::int64_t kPageBytes = 4096;
  const auto* const first = static_cast<const char*>(from);
  for (std::int64_t i = 0; i < bytes; i += kPageBytes) __builtin_prefetch(first + i, 0, 2);
  if (bytes > 0) __builtin_prefetch(first + bytes - 1, 0, 2);
}

/// Bytes of a task's codes in a tile.
[[nodiscard]] inline std::int64_t task_bytes(const PackedView& w, const PsumbookTask& task,
                                             std::int64_t tile) noexcept {
  return task.blocks * block_words(w, tile) * 8;
}

/// Asks for what a task's first tables are made of, and for its first codes.
inline void ask_for_first(const PackedView& w, const PsumbookTask& task, std::int64_t bytes) noexcept {
  const std::int64_t values = w.format.m * w.format.centroids() * w.format.v;
  if (w.codebooks_pairs != nullptr) {
    ask_for(w.codebooks_pairs, values * 2);
  } else {
    ask_for(w.codebooks_transposed, values * 4);
  }
  const std::int64_t there = task_bytes(w, task, task.first_tile);
  ask_for_pages(task_codes(w, task, task.first_tile), there);
  ask_for(task_codes(w, task, task.first_tile), std::min(bytes, there));
}

/// sums[t][blocks * 64], `sum_stride` apart, = the task's rows times its tokens over its tiles. A scale group
/// that 16 bits do not serve is gathered from its fp32 tables.
inline void run_lookup_task(const CpuKernels& kernels, const GemmArgs& args, const PsumbookTask& task,
                            const PsumbookScratch& scratch, float* sums, std::int64_t sum_stride) {
  const PackedView& w = args.w;
  const std::int64_t m = w.format.m;
  const std::int64_t segment = w.segment_vectors();
  const std::int64_t words = w.entry_words();
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    std::fill_n(sums + t * sum_stride, task.blocks * kBlockRows, 0.0F);
  }
  const bool ask = kernels.lookup.ahead_bytes > 0;
  const std::int64_t first_bytes = CpuTiles::kLookupFirstBytes;
  if (ask) ask_for_first(w, task, first_bytes);
  for (std::int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const std::int64_t first = tile * w.tile_vectors;
    const std::int64_t count = w.vectors_in(tile);
    const std::int64_t stride = block_words(w, tile);
    const std::uint64_t* const codes = task_codes(w, task, tile);
    if (ask && tile + 1 < task.last_tile) {
      ask_for_pages(task_codes(w, task, tile + 1), task_bytes(w, task, tile + 1));
    }
    TileCodes asked{reinterpret_cast<const std::uint8_t*>(codes), task_bytes(w, task, tile),
                    tile == task.first_tile ? first_bytes : kernels.lookup.ahead_bytes};
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      const float* const x = args.x.row(task.first_token + t) + first * w.format.v;
      float* const y = sums + t * sum_stride;
      std::int64_t flush_count = 0;
      for (std::int64_t j = 0, next = 0; j < count; j = next) {  // [j, next) share a scale
        const std::int64_t group = (first + j) / segment;
        next = std::min(count, (group + 1) * segment - first);
        const std::int64_t entries = (next - j) * m;
        const Half* const scales = w.scales + group * w.padded_rows() + task.first_block * kBlockRows;
        if (ask && t == 0) ask_for(scales, task.blocks * kBlockRows * 2);
        if (make_segment(kernels, w, x, j, next, scales, scratch, asked, flush_count)) continue;
        if (encode_segment(kernels, w, x, j, next, scales, scratch, asked, flush_count)) continue;
        kernels.gather1({codes + j * m * words, stride, words, scratch.tables + j * m * w.format.centroids(),
                         entries, scales, nullptr, y, task.blocks * kBlockRows / kWordRows, true, true});
      }
      const bool go_on = t + 1 == task.tokens && tile + 1 < task.last_tile;
      const std::uint64_t* const read_next = go_on ? task_codes(w, task, tile + 1) : codes;
      kernels.lookup.lookup({reinterpret_cast<const std::uint8_t*>(codes), stride * 8, scratch.encoded,
                             scratch.flushes, flush_count, y, task.blocks,
                             reinterpret_cast<const std::uint8_t*>(read_next)});
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
    ask_for(this, sizeof(*this));
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
    if (plan_.lookup) {
      run_lookup_task(kernels_, args_, task, scratch, sums, token_stride);
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
};

/// y = x W^T through Psumbooks, gathered or looked up as the plan says. T, N, K > 0; the workspace is the
/// plan's.
inline void run_psumbook(const CpuKernels& kernels, const GemmArgs& args, const PsumbookPlan& plan,
                         Executor& executor) {
  const PsumbookTasks tasks(kernels, args, plan, executor.workers());
  parallel_for(executor, tasks.count(), tasks);
  if (plan.splits == 1) return;
  const std::int64_t ranges = ceil_div(args.w.rows, PsumbookTasks::kSumRows);
  parallel_for(executor, ranges * plan.token_blocks,
               [&](std::int64_t index, int) { tasks.add_splits(index); });
}

}  // namespace codegemm::detail
