// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/byte_product.hpp - the dense way in tiles of bytes: rebuild 64 rows of a slab of W once,
// multiply all of a task's tokens with it.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/cpu/byte_tile_amx.hpp>
#include <codegemm/cpu/few_tokens.hpp>
#include <codegemm/cpu/integer_tile.hpp>
#include <codegemm/cpu/kernels.hpp>
#include <codegemm/cpu/plan.hpp>
#include <codegemm/pack.hpp>

#if CODEGEMM_HAS_AMX

namespace codegemm::detail {

/// One product in tiles of bytes: its parts, by the plan.
class ByteProduct {
 public:
  ByteProduct(const CpuKernels& kernels, const GemmArgs& args, const SlabPlan& plan, int workers)
      : kernels_(kernels),
        args_(args),
        w_(args.w),
        plan_(plan),
        radix_bits_(byte_radix_bits(args.w.format.m)),
        x_tiles_(reinterpret_cast<std::int8_t*>(args.workspace + workers * plan.worker_floats)),
        x_steps_(args.workspace + workers * plan.worker_floats + plan.x_tile_floats) {}

  /// Rounds the tokens of a tile in a slab.
  void lay_out(std::int64_t tile, std::int64_t slab) const {
    constexpr std::int64_t kPlanes = 2 * kTokens * kColumns;
    const std::int64_t first_k = slab * plan_.slab_depth;
    const std::int64_t slab_end = std::min(plan_.cols, first_k + plan_.slab_depth);
    std::int8_t* const out = tokens_of(tile, first_k, slab_end - first_k);
    float* const steps = steps_of(tile, slab);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      const std::int64_t token = tile * kTokens + t;
      for (std::int64_t k = first_k, end = 0; k < slab_end; k = end) {
        end = chunk_end(k, slab_end, w_.format.g);
        const std::int64_t unit = (k - first_k) / kColumns;
        std::int8_t* const to = out + unit * kPlanes + t * kColumns;
        if (token < plan_.tokens) {
          steps[unit * kTokens + t] = round_bytes_vbmi(args_.x.row(token) + k, end - k, radix_bits_, to);
          continue;
        }
        steps[unit * kTokens + t] = 0.0F;
        for (std::int64_t at = 0; at < (end - k) * 2 * kTokens; at += kPlanes / 2) {
          std::fill_n(to + at, kColumns, std::int8_t{0});
        }
      }
    }
  }

  /// Block `block` of 64 rows in a slab, to a worker's memory: the four panels, and the steps of their chunks
  /// behind them, [units][64].
  void rebuild(std::int64_t block, std::int64_t first_k, std::int64_t depth, float* memory) const {
    const std::int64_t v = w_.format.v;
    const std::int64_t m = w_.format.m;
    const std::int64_t last = (first_k + depth) / v;
    RebuildArgs run{};
    run.codebook_count = m;
    run.centroids = w_.format.centroids();
    run.codebooks = w_.codebooks_bytes;
    run.panel_bytes = depth * 2 * kPanelRows;
    for (std::int64_t j = first_k / v, next = 0; j < last; j = next) {
      next = std::min(last, (j / w_.tile_vectors + 1) * w_.tile_vectors);
      run.codes = codes_of(block, j);
      run.ahead = codes_ahead(block, j) - run.codes;
      run.vectors = next - j;
      run.out = reinterpret_cast<std::int8_t*>(memory) + (j * v - first_k) * 2 * kPanelRows;
      kernels_.rebuild(run);
    }
    float* const steps = memory + plan_.panel_floats;
    const float step = w_.codebook_byte_step * static_cast<float>(1 << radix_bits_);
    for (std::int64_t k = first_k, end = 0; k < first_k + depth; k = end) {
      end = chunk_end(k, first_k + depth, w_.format.g);
      const std::int64_t group = w_.format.g < 0 ? 0 : k / w_.format.g;
      kernels_.integers.scale(w_.scales + group * w_.padded_rows() + block * kBlockRows, kBlockRows, step,
                              steps + (k - first_k) / kColumns * kBlockRows);
    }
  }

  /// A task's tiles of tokens with the rows that are in `memory`.
  void multiply(const ByteTileKernels& tiles, std::int64_t first_tile, std::int64_t last_tile,
                std::int64_t block, std::int64_t slab, const float* memory) const {
    const std::int64_t first_k = slab * plan_.slab_depth;
    const std::int64_t depth = std::min(plan_.slab_depth, plan_.cols - first_k);
    const std::int64_t rows = std::min<std::int64_t>(kBlockRows, plan_.rows - block * kBlockRows);
    ByteTileArgs a{};
    a.panel_bytes = depth * 2 * kPanelRows;
    a.radix_bits = radix_bits_;
    std::int64_t ends[kMostUnits];
    a.chunk_ends = ends;
    for (std::int64_t k = first_k; k < first_k + depth;) {
      k = chunk_end(k, first_k + depth, w_.format.g);
      ends[a.chunks++] = k - first_k;
    }
    a.stride = args_.y.stride;
    a.accumulate = slab > 0;
    for (std::int64_t row = 0; row < rows; row += kRowsOfTile) {
      a.w = reinterpret_cast<const std::int8_t*>(memory) + row * depth * 2;
      a.w_steps = memory + plan_.panel_floats + row;
      a.rows = std::min(kRowsOfTile, rows - row);
      for (std::int64_t tile = first_tile; tile < last_tile; ++tile) {
        a.x = tokens_of(tile, first_k, depth);
        a.x_steps = steps_of(tile, slab);
        a.tokens = std::min(kTokens, plan_.tokens - tile * kTokens);
        a.c = args_.y.row(tile * kTokens) + block * kBlockRows + row;
        tiles.multiply(a);
      }
    }
  }

 private:
  static constexpr std::int64_t kTokens = CpuTiles::kAmxTokens;
  static constexpr std::int64_t kColumns = CpuTiles::kAmxColumns;
  static constexpr std::int64_t kRowsOfTile = std::int64_t{2} * kPanelRows;  // two panels
  static constexpr std::size_t kMostUnits = CpuTiles::kAmxDepthMost / CpuTiles::kAmxColumns;
  static_assert(CpuTiles::kAmxDepth <= CpuTiles::kAmxDepthMost);
  static_assert(CpuTiles::kAmxTaskRows == kBlockRows);

  // Of a tile in the slab at first_k: as ByteTileArgs::x, and steps [units][16].
  [[nodiscard]] std::int8_t* tokens_of(std::int64_t tile, std::int64_t first_k, std::int64_t depth) const {
    return x_tiles_ + (first_k * plan_.token_tiles + tile * depth) * 2 * kTokens;
  }
  [[nodiscard]] float* steps_of(std::int64_t tile, std::int64_t slab) const {
    return x_steps_ + (slab * plan_.token_tiles + tile) * plan_.units * kTokens;
  }

  [[nodiscard]] const std::uint8_t* codes_of(std::int64_t block, std::int64_t j) const {
    const std::int64_t tile = j / w_.tile_vectors;
    const std::int64_t vector_words = w_.format.m * w_.entry_words();
    const std::uint64_t* const codes = w_.tile_codes(tile) + block * w_.vectors_in(tile) * vector_words;
    return reinterpret_cast<const std::uint8_t*>(codes + (j - tile * w_.tile_vectors) * vector_words);
  }

  // What is asked for while vectors from j on are rebuilt: those of the next slab, in the end of the next
  // block.
  [[nodiscard]] const std::uint8_t* codes_ahead(std::int64_t block, std::int64_t j) const {
    const std::int64_t then = j + plan_.slab_depth / w_.format.v;
    if (then < w_.vectors()) return codes_of(block, then);
    if (block + 1 < w_.row_blocks) return codes_of(block + 1, then % w_.vectors());
    return codes_of(block, j);
  }

  const CpuKernels& kernels_;
  const GemmArgs& args_;
  const PackedView& w_;
  const SlabPlan& plan_;
  int radix_bits_;
  std::int8_t* x_tiles_;
  float* x_steps_;
};

/// y = x W^T in tiles of bytes. T, N, K > 0; the workspace is make_byte_plan()'s.
inline void run_bytes(const CpuKernels& kernels, const GemmArgs& args, Executor& executor,
                      const ByteTileKernels& tiles) {
  const SlabPlan plan = make_byte_plan(args.w.rows, args.w.cols, args.x.rows);
  const ByteProduct product(kernels, args, plan, executor.workers());
  parallel_for(executor, plan.token_tiles * plan.slabs,
               [&](std::int64_t index, int) { product.lay_out(index / plan.slabs, index % plan.slabs); });
  constexpr std::int64_t kTaskTiles = CpuTiles::kAmxTaskTokens / CpuTiles::kAmxTokens;
  parallel_for(executor, plan.row_tasks * plan.token_tasks, [&](std::int64_t index, int worker) {
    const std::int64_t first_tile = index % plan.token_tasks * kTaskTiles;
    const std::int64_t last_tile = std::min(plan.token_tiles, first_tile + kTaskTiles);
    const std::int64_t block = index / plan.token_tasks;
    float* const memory = args.workspace + worker * plan.worker_floats;
    tiles.begin(plan.tokens);
    for (std::int64_t slab = 0; slab < plan.slabs; ++slab) {
      const std::int64_t first_k = slab * plan.slab_depth;
      product.rebuild(block, first_k, std::min(plan.slab_depth, plan.cols - first_k), memory);
      product.multiply(tiles, first_tile, last_tile, block, slab, memory);
    }
    tiles.end();
  });
}

}  // namespace codegemm::detail

#endif
