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

/// Rows [first_row, first_row + 48), columns [first_k, first_k + depth), whole vectors, to
/// panels[3][depth][16]; rows beyond the matrix but inside a panel of 16 are 0.
inline void dequantize_slab(const CpuKernels& kernels, const PackedView& w, std::int64_t first_row,
                            std::int64_t first_k, std::int64_t depth, float* panels) {
  constexpr std::int64_t kRows = CpuTiles::kDenseRows;
  const std::int64_t first = first_k / w.format.v;
  const std::int64_t last = first + depth / w.format.v;
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
      std::int64_t j = first;
      while (j < last) {  // [j, next) share tile and scale
        const std::int64_t tile = j / w.tile_vectors;
        const std::int64_t next = std::min({last, (tile + 1) * w.tile_vectors, (j / segment + 1) * segment});
        const std::int64_t entry = (block * w.vectors_in(tile) + j - tile * w.tile_vectors) * m;
        a.codes = w.tile_codes(tile) + entry * a.words + octet % block_octets % a.words;
        a.scales = w.scales + j / segment * w.padded_rows() + octet * kWordRows;
        a.vectors = next - j;
        a.out = out + (j - first) * w.format.v * kRows;
        kernels.dequantize(a);
        j = next;
      }
    }
  }
}

/// y = x W^T by dequantized weights. T, N, K > 0; the workspace is make_dense_plan()'s.
inline void run_dense(const CpuKernels& kernels, const GemmArgs& args, Executor& executor) {
  const PackedView& w = args.w;
  run_dense_product(make_dense_plan(w.rows, w.cols, args.x.rows), kernels.multiply, args.x, args.y,
                    args.workspace, executor,
                    [&](std::int64_t first_row, std::int64_t first_k, std::int64_t depth, float* panels) {
                      dequantize_slab(kernels, w, first_row, first_k, depth, panels);
                    });
}

}  // namespace codegemm::detail
