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
#include <codegemm/cpu/few_tokens.hpp>
#include <codegemm/cpu/kernels.hpp>
#include <codegemm/cpu/plan.hpp>
#include <codegemm/pack.hpp>

namespace codegemm::detail {

/// A 6 x 16 tile at the edge: computed whole beside y, and the part that exists is copied.
inline void multiply_edge(const CpuKernels& kernels, MicroArgs m, std::int64_t tokens, std::int64_t rows) {
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  float whole[static_cast<std::size_t>(CpuTiles::kDenseTokens * kRows)];
  float* const c = m.c;
  const bool accumulate = m.accumulate;
  m.c = whole;
  m.accumulate = false;
  const std::int64_t stride = m.stride;
  m.stride = kRows;
  kernels.multiply(m);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < rows; ++n) {
      float& to = c[t * stride + n];
      to = accumulate ? to + whole[t * kRows + n] : whole[t * kRows + n];
    }
  }
}

/// Rows [first_row, first_row + 48) of vectors [first, last) to panels[3][depth][16]; rows beyond the matrix
/// but inside a panel of 16 are 0.
inline void dequantize_slab(const CpuKernels& kernels, const PackedView& w, std::int64_t first_row,
                            std::int64_t first, std::int64_t last, float* panels) {
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  const std::int64_t depth = (last - first) * w.format.v;
  const std::int64_t m = w.format.m;
  const std::int64_t segment = w.segment_vectors();
  const std::int64_t block_octets = w.block_rows / kWordRows;
  const std::int64_t end_row = std::min(first_row + CpuTiles::kDenseTaskRows, w.rows);
  for (std::int64_t row = first_row; row < end_row; row += kRows) {
    float* const panel = panels + (row - first_row) * depth;
    for (std::int64_t half = 0; half < kRows / kWordRows; ++half) {
      const std::int64_t octet = row / kWordRows + half;
      const std::int64_t block = octet / block_octets;
      float* const out = panel + half * kWordRows;
      if (block >= w.row_blocks) {
        for (std::int64_t k = 0; k < depth; ++k) std::fill_n(out + k * kRows, kWordRows, 0.0F);
        continue;
      }
      DequantizeArgs a{};
      a.words = w.entry_words();
      a.shift = octet % block_octets >= a.words ? 4 : 0;
      a.mask = w.format.b == 4 ? 0x0F0F0F0F0F0F0F0FU : ~std::uint64_t{0};
      a.codebooks = w.codebooks;
      a.codebook_count = m;
      a.centroids = w.format.centroids();
      a.ld = kRows;
      for (std::int64_t j = first, next = first; j < last; j = next) {  // [j, next) share tile and scale
        const std::int64_t tile = j / w.tile_vectors;
        next = std::min({last, (tile + 1) * w.tile_vectors, (j / segment + 1) * segment});
        const std::int64_t entry = (block * w.vectors_in(tile) + j - tile * w.tile_vectors) * m;
        a.codes = w.tile_codes(tile) + entry * a.words + octet % block_octets % a.words;
        a.scales = w.scales + j / segment * w.padded_rows() + octet * kWordRows;
        a.vectors = next - j;
        a.out = out + (j - first) * w.format.v * kRows;
        kernels.dequantize(a);
      }
    }
  }
}

/// y = x W^T by dequantized weights. T, N, K > 0; the workspace is make_dense_plan()'s.
inline void run_dense(const CpuKernels& kernels, const GemmArgs& args, Executor& executor) {
  constexpr std::int64_t kTokens = CpuTiles::kDenseTokens;
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  const PackedView& w = args.w;
  const DensePlan plan = make_dense_plan(w, args.x.rows);
  const std::int64_t slab_depth = plan.slab_vectors * w.format.v;
  const std::int64_t padded_tokens = plan.token_tiles * kTokens;
  float* const x_tiles = args.workspace + executor.workers() * plan.worker_floats;

  // A slab's token tiles lie one behind the other: rows of x itself are K apart and would share cache sets.
  parallel_for(executor, plan.token_tiles, [&](std::int64_t tile, int) {
    for (std::int64_t slab = 0; slab < plan.slabs; ++slab) {
      const std::int64_t first_k = slab * slab_depth;
      const std::int64_t depth = std::min(slab_depth, w.cols - first_k);
      float* const out = x_tiles + first_k * padded_tokens + tile * kTokens * depth;
      for (std::int64_t t = 0; t < kTokens; ++t) {
        const std::int64_t token = tile * kTokens + t;
        const float* const row = token < plan.tokens ? args.x.row(token) + first_k : nullptr;
        for (std::int64_t k = 0; k < depth; ++k) out[k * kTokens + t] = row != nullptr ? row[k] : 0.0F;
      }
    }
  });

  constexpr std::int64_t kTaskTiles = CpuTiles::kDenseTaskTokens / kTokens;
  parallel_for(executor, plan.row_tasks * plan.token_tasks, [&](std::int64_t index, int worker) {
    const std::int64_t first_tile = index % plan.token_tasks * kTaskTiles;
    const std::int64_t last_tile = std::min(plan.token_tiles, first_tile + kTaskTiles);
    const std::int64_t first_row = index / plan.token_tasks * CpuTiles::kDenseTaskRows;
    const std::int64_t end_row = std::min(first_row + CpuTiles::kDenseTaskRows, w.rows);
    float* const panels = args.workspace + worker * plan.worker_floats;
    for (std::int64_t slab = 0; slab < plan.slabs; ++slab) {
      const std::int64_t first = slab * plan.slab_vectors;
      const std::int64_t last = std::min(first + plan.slab_vectors, w.vectors());
      const std::int64_t depth = (last - first) * w.format.v;
      dequantize_slab(kernels, w, first_row, first, last, panels);
      const float* const x_slab = x_tiles + slab * slab_depth * padded_tokens;
      for (std::int64_t row = first_row; row < end_row; row += kRows) {
        for (std::int64_t tile = first_tile; tile < last_tile; ++tile) {
          const MicroArgs micro{x_slab + tile * kTokens * depth,
                                panels + (row - first_row) * depth,
                                depth,
                                args.y.row(tile * kTokens) + row,
                                args.y.stride,
                                slab > 0};
          const std::int64_t tokens = std::min(kTokens, plan.tokens - tile * kTokens);
          const std::int64_t rows = std::min(kRows, w.rows - row);
          if (tokens == kTokens && rows == kRows) {
            kernels.multiply(micro);
          } else {
            multiply_edge(kernels, micro, tokens, rows);
          }
        }
      }
    }
  });
}

}  // namespace codegemm::detail
