// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/psumbook_args.hpp - what the kernels that build Psumbooks are given.
// Layer: cpu (host only).
#pragma once

#include <cstdint>

namespace codegemm::detail {

/// What to build: tables[vectors][m][2^b][lanes] with
///   tables[j][c][i][t] = sum_d codebooks[c][i][d] * x[j * v + d][t]
struct PsumbookArgs {
  const float* codebooks;             // [m][2^b][v]
  const float* codebooks_transposed;  // [m][v][2^b]
  const float* x;                     // [vectors * v][lanes], 32-byte aligned if lanes > 1
  std::int64_t vectors;
  std::int64_t codebook_count;  // m
  std::int64_t centroids;       // 2^b, a multiple of 16
  float* tables;                // 32-byte aligned
};

}  // namespace codegemm::detail
