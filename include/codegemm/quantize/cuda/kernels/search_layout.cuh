// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/kernels/search_layout.cuh - what the beam search of all rows is given, and
// where it keeps what in shared memory.
// Layer: quantize/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <codegemm/quantize/cuda/kernels/rows.cuh>

namespace codegemm::cuda::detail {

inline constexpr int kSearchColumns = 128;  // between two products with H, as on the host
inline constexpr int kSearchThreads = 256;  // at most
inline constexpr int kSearchPaths = 16;     // at most

struct SearchArgs {
  LayerArgs layer;                // scales and shape
  const float* books = nullptr;   // [m][centroids][v]
  const float* matrix = nullptr;  // H or L, [cols][cols]
  const float* cross = nullptr;   // [rows][beam][width]: what the columns outside mean for these
  const float* q = nullptr;       // of measure_kernel, as the next two
  const float* factor = nullptr;
  const float* norms = nullptr;
  const float* errors_in = nullptr;         // [rows][beam][cols]
  float* errors_out = nullptr;              // the same; may be errors_in where beam is 1
  const std::uint16_t* codes_in = nullptr;  // [rows][beam][m][cols / v]
  std::uint16_t* codes_out = nullptr;       // the same; may be codes_in where beam is 1
  double* losses = nullptr;                 // [rows][beam]
  std::int32_t* counts = nullptr;           // [rows]: paths
  std::int32_t first_row = 0;               // in layer, of row 0 of the arrays above
  std::int32_t first = 0;                   // column
  std::int32_t width = 0;                   // columns
  std::int32_t beam = 0;
  std::int32_t rounds = 0;  // over the codebooks, at each vector
  bool rebuild = false;
};

// The shared memory of a block, in floats; doubles first.
struct SearchLayout {
  int loss, vector_loss, base, partial_loss;
  int path_error, path_cross, error, gradient, u, slab, q, factor;
  int root, parent, partial_index, best_path, best_code, path_codes, codes;
  int floats;

  __host__ __device__ SearchLayout(int v, int m, int beam) {
    int at = 0;
    const auto take = [&](int count) {
      const int begin = at;
      at += count;
      return begin;
    };
    // In doubles.
    loss = take(2 * beam);  // of the row's paths, two sets
    base = take(beam);
    vector_loss = take(2 * beam);  // of the vector's paths, two sets
    partial_loss = take(kSearchThreads / 32);
    at *= 2;
    path_error = take(2 * beam * kSearchColumns);
    path_cross = take(2 * beam * kSearchColumns);
    error = take(2 * beam * v);
    gradient = take(2 * beam * v);
    u = take(beam * v);
    slab = take(v * kSearchColumns);
    q = take(v * v);
    factor = take(v * v);
    root = take(2 * beam);
    parent = take(2 * beam);
    partial_index = take(kSearchThreads / 32);
    best_path = take(beam);
    best_code = take(beam);
    path_codes = take(2 * beam * m * (kSearchColumns / v));
    codes = take(2 * beam * m);
    floats = at;
  }
};

}  // namespace codegemm::cuda::detail
