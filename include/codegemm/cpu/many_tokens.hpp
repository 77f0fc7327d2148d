// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/many_tokens.hpp - the dense way: dequantize some rows into the cache, multiply with many
// tokens.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/cpu/dense_product.hpp>
#include <codegemm/cpu/few_tokens.hpp>
#include <codegemm/cpu/kernels.hpp>
#include <codegemm/cpu/plan.hpp>
#include <codegemm/pack.hpp>

namespace codegemm::detail {

/// Visits the codes of rows [first_row, first_row + 48) and columns [first_k, first_k + depth), whole
/// vectors, eight rows at a time. visit(row, k, run, group): the run is of rows first_row + row onwards and,
/// from column first_k + k on, of one tile and scale group. absent(row): those eight rows lie beyond the
/// matrix, but in a panel of 16 that does not.
template <class Visit, class Absent>
void visit_codes(const PackedView& w, std::int64_t first_row, std::int64_t first_k, std::int64_t depth,
                 Visit&& visit, Absent&& absent) {
  const std::int64_t first = first_k / w.format.v;
  const std::int64_t last = first + depth / w.format.v;
  const std::int64_t m = w.format.m;
  const std::int64_t segment = w.segment_vectors();
  // Rows in whole panels of 16; those in blocks, and those beyond.
  const std::int64_t rows =
      round_up(std::min(CpuTiles::kDenseTaskRows, w.rows - first_row), CpuTiles::kDenseRows);
  const std::int64_t end = std::min(rows, w.padded_rows() - first_row);
  const bool wide = w.block_rows == kBlockRows;
  CodeRun run{};
  run.words = w.entry_words();
  run.mask = w.format.b == 4 ? 0x0F0F0F0F0F0F0F0FU : ~std::uint64_t{0};
  run.codebook_count = m;
  run.centroids = w.format.centroids();
  for (std::int64_t j = first, next = 0; j < last; j = next) {
    const std::int64_t tile = j / w.tile_vectors;
    const std::int64_t group = j / segment;
    next = std::min({last, (tile + 1) * w.tile_vectors, (group + 1) * segment});
    run.vectors = next - j;
    const std::int64_t block_words = w.vectors_in(tile) * m * run.words;
    const std::uint64_t* const codes = w.tile_codes(tile) + (j - tile * w.tile_vectors) * m * run.words;
    for (std::int64_t row = 0; row < end; row += kWordRows) {
      const std::int64_t octet = (first_row + row) / kWordRows;
      const std::int64_t block = wide ? octet / (kBlockRows / kWordRows) : octet;
      const std::int64_t in_block = wide ? octet % (kBlockRows / kWordRows) : 0;
      const bool upper = in_block >= run.words;  // half of the bytes
      run.shift = upper ? 4 : 0;
      run.codes = codes + block * block_words + in_block - (upper ? run.words : 0);
      visit(row, (j - first) * w.format.v, run, group);
    }
  }
  for (std::int64_t row = end; row < rows; row += kWordRows) absent(row);
}

/// y = x W^T by dequantized weights in fp32. T, N, K > 0; the workspace is make_dense_plan()'s.
inline void run_dense(const CpuKernels& kernels, const GemmArgs& args, Executor& executor) {
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  const PackedView& w = args.w;
  const auto fill = [&](std::int64_t first_row, std::int64_t first_k, std::int64_t depth, float* panels) {
    const auto out_of = [&](std::int64_t row) { return panels + row / kRows * kRows * depth + row % kRows; };
    visit_codes(
        w, first_row, first_k, depth,
        [&](std::int64_t row, std::int64_t k, const CodeRun& run, std::int64_t group) {
          const Half* const scales = w.scales + group * w.padded_rows() + first_row + row;
          kernels.dequantize({run, w.codebooks, scales, kRows, out_of(row) + k * kRows});
        },
        [&](std::int64_t row) {
          for (std::int64_t k = 0; k < depth; ++k) std::fill_n(out_of(row) + k * kRows, kWordRows, 0.0F);
        });
  };
  run_dense_product(make_dense_plan(w.rows, w.cols, args.x.rows), kernels.multiply, args.x, args.y,
                    args.workspace, executor, fill);
}

/// Rows [first_row, first_row + 48) of a slab of W in 16-bit integers, as far as they exist, to a worker's
/// memory: panels[3][depth / 2][16] of pairs of columns, and the steps of their chunks behind them,
/// [units][48].
inline void fill_integers(const IntegerKernels& kernels, const PackedView& w, const SlabPlan& plan,
                          std::int64_t first_row, std::int64_t first_k, std::int64_t depth, float* memory) {
  auto* const panels = reinterpret_cast<std::int32_t*>(memory);
  float* const steps = memory + plan.panel_floats;
  const auto out_of = [&](std::int64_t row) {
    return panels + row / CpuTiles::kDenseRows * CpuTiles::kDenseRows * depth / 2 +
           row % CpuTiles::kDenseRows;
  };
  visit_codes(
      w, first_row, first_k, depth,
      [&](std::int64_t row, std::int64_t k, const CodeRun& run, std::int64_t) {
        kernels.dequantize(
            {run, w.codebooks_rounded, CpuTiles::kDenseRows, out_of(row) + k / 2 * CpuTiles::kDenseRows});
      },
      [&](std::int64_t row) {
        for (std::int64_t pair = 0; pair < depth / 2; ++pair) {
          std::fill_n(out_of(row) + pair * CpuTiles::kDenseRows, kWordRows, 0);
        }
      });
  const std::int64_t rows = std::min(CpuTiles::kDenseTaskRows, w.padded_rows() - first_row);
  for (std::int64_t k = first_k, end = 0; k < first_k + depth; k = end) {
    end = chunk_end(k, first_k + depth, w.format.g);
    const std::int64_t group = w.format.g < 0 ? 0 : k / w.format.g;
    const Half* const scales = w.scales + group * w.padded_rows() + first_row;
    float* const out = steps + (k - first_k) / CpuTiles::kIntegerUnit * CpuTiles::kDenseTaskRows;
    kernels.scale(scales, rows, w.codebook_step, out);
    std::fill_n(out + rows, CpuTiles::kDenseTaskRows - rows, 0.0F);
  }
}

/// How run_tiles() multiplies in 16-bit integers.
class IntegerWay {
 public:
  IntegerWay(const CpuKernels& kernels, const GemmArgs& args, const SlabPlan& plan, int workers)
      : kernels_(kernels.integers),
        w_(args.w),
        x_(args.x),
        plan_(plan),
        x_tiles_(reinterpret_cast<std::int32_t*>(args.workspace + workers * plan.worker_floats)),
        x_steps_(args.workspace + workers * plan.worker_floats + plan.x_tile_floats) {}

  void lay_out(std::int64_t tile) const {
    for (std::int64_t t = 0; t < kTokens; ++t) {
      const std::int64_t token = tile * kTokens + t;
      for (std::int64_t first_k = 0; first_k < plan_.cols; first_k += plan_.slab_depth) {
        const std::int64_t slab_end = std::min(plan_.cols, first_k + plan_.slab_depth);
        std::int32_t* const out = tokens_of(tile, first_k, slab_end - first_k) + t;
        float* const steps = steps_of(tile, first_k) + t;
        if (token >= plan_.tokens) {
          for (std::int64_t pair = 0; pair < (slab_end - first_k) / 2; ++pair) out[pair * kTokens] = 0;
          for (std::int64_t unit = 0; unit < plan_.units; ++unit) steps[unit * kTokens] = 0.0F;
          continue;
        }
        for (std::int64_t k = first_k, end = 0; k < slab_end; k = end) {
          end = chunk_end(k, slab_end, w_.format.g);
          steps[(k - first_k) / kUnit * kTokens] =
              kernels_.round(x_.row(token) + k, end - k, out + (k - first_k) / 2 * kTokens);
        }
      }
    }
  }

  void fill(std::int64_t first_row, std::int64_t first_k, std::int64_t depth, float* memory) const {
    fill_integers(kernels_, w_, plan_, first_row, first_k, depth, memory);
  }

  void multiply(std::int64_t tile, std::int64_t row, std::int64_t first_k, std::int64_t depth,
                const float* memory, const TileTarget& to) const {
    const auto* const panels = reinterpret_cast<const std::int32_t*>(memory);
    kernels_.multiply({tokens_of(tile, first_k, depth), panels + row * depth / 2, steps_of(tile, first_k),
                       memory + plan_.panel_floats + row, CpuTiles::kDenseTaskRows, first_k, depth,
                       w_.format.g, to.c, to.stride, to.accumulate});
  }

 private:
  static constexpr std::int64_t kTokens = CpuTiles::kDenseTokens;
  static constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  static constexpr std::int64_t kUnit = CpuTiles::kIntegerUnit;

  // Of a tile in the slab at first_k: pairs of columns [depth / 2][6], and steps [units][6].
  [[nodiscard]] std::int32_t* tokens_of(std::int64_t tile, std::int64_t first_k, std::int64_t depth) const {
    return x_tiles_ + (first_k * plan_.token_tiles + tile * depth) / 2 * kTokens;
  }
  [[nodiscard]] float* steps_of(std::int64_t tile, std::int64_t first_k) const {
    return x_steps_ + (first_k / plan_.slab_depth * plan_.token_tiles + tile) * plan_.units * kTokens;
  }

  IntegerKernels kernels_;
  const PackedView& w_;
  MatrixView<const float> x_;
  const SlabPlan& plan_;
  std::int32_t* x_tiles_;
  float* x_steps_;
};

/// y = x W^T in 16-bit integers. T, N, K > 0; the workspace is make_integer_plan()'s.
inline void run_integer(const CpuKernels& kernels, const GemmArgs& args, Executor& executor) {
  const SlabPlan plan = make_integer_plan(args.w.rows, args.w.cols, args.x.rows);
  run_tiles(plan, args.y, args.workspace, executor, IntegerWay(kernels, args, plan, executor.workers()));
}

}  // namespace codegemm::detail
