// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/kernels/search_paths.cuh - the beginning and the end of the rows' beam search.
// Layer: quantize/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <codegemm/quantize/cuda/kernels/rows.cuh>

namespace codegemm::cuda::detail {

struct StartArgs {
  const float* errors = nullptr;         // [rows][cols]
  const std::uint16_t* codes = nullptr;  // [rows][m][vectors]
  float* path_errors = nullptr;          // [rows][beam][cols]
  std::uint16_t* path_codes = nullptr;   // [rows][beam][m][vectors]
  double* losses = nullptr;              // [rows][beam]
  std::int32_t* counts = nullptr;        // [rows]
  std::int32_t cols = 0;
  std::int32_t all_codes = 0;  // m * vectors
  std::int32_t beam = 0;
};

// A row's one path, to begin with; the others are zero, as products read them. A block takes a row.
template <int>
__global__ void __launch_bounds__(kRowThreads) start_paths_kernel(const __grid_constant__ StartArgs a) {
  const std::int64_t row = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < a.beam * a.cols; i += kRowThreads)
    a.path_errors[row * a.beam * a.cols + i] = i < a.cols ? a.errors[row * a.cols + i] : 0.0F;
  for (int i = static_cast<int>(threadIdx.x); i < a.beam * a.all_codes; i += kRowThreads) {
    a.path_codes[row * a.beam * a.all_codes + i] =
        i < a.all_codes ? a.codes[row * a.all_codes + i] : std::uint16_t{0};
  }
  for (int p = static_cast<int>(threadIdx.x); p < a.beam; p += kRowThreads) a.losses[row * a.beam + p] = 0.0;
  if (threadIdx.x == 0) a.counts[row] = 1;
}

struct FinishArgs {
  const std::uint16_t* path_codes = nullptr;  // [rows][beam][m][vectors]
  const double* losses = nullptr;             // [rows][beam]
  const std::int32_t* counts = nullptr;       // [rows]
  const double* start_losses = nullptr;       // [rows]: a path must be below it; or null
  std::uint16_t* codes = nullptr;             // [rows][m][vectors]
  std::int32_t all_codes = 0;
  std::int32_t beam = 0;
};

// A row's best path, the first of equals. A block takes a row.
template <int>
__global__ void __launch_bounds__(kRowThreads) finish_paths_kernel(const __grid_constant__ FinishArgs a) {
  const std::int64_t row = blockIdx.x;
  const double* const losses = a.losses + row * a.beam;
  int best = 0;
  for (int p = 1; p < a.counts[row]; ++p) best = losses[p] < losses[best] ? p : best;
  if (a.start_losses != nullptr && !(losses[best] < a.start_losses[row])) return;
  for (int i = static_cast<int>(threadIdx.x); i < a.all_codes; i += kRowThreads)
    a.codes[row * a.all_codes + i] = a.path_codes[(row * a.beam + best) * a.all_codes + i];
}

}  // namespace codegemm::cuda::detail
