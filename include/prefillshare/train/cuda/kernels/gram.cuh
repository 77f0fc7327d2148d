// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/gram.cuh - sums over calibration tokens become means.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <prefillshare/train/cuda/kernels/row_norm.cuh>

namespace prefillshare::cuda::detail {

inline constexpr int kGramThreads = 256;

struct MeanGramArgs {
  float* gram = nullptr;   // [size][size]; the upper triangle becomes the lower one's mirror image
  float* cross = nullptr;  // [size][size]
  std::int64_t size = 0;
  float scale = 1.0F;
};

// A thread takes a number of each.
template <int>
__global__ void __launch_bounds__(kGramThreads) mean_gram_kernel(const __grid_constant__ MeanGramArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kGramThreads + threadIdx.x;
  if (number >= args.size * args.size) return;
  args.cross[number] *= args.scale;
  const std::int64_t row = number / args.size;
  const std::int64_t column = number - row * args.size;
  if (column > row) return;
  const float mean = args.gram[number] * args.scale;
  args.gram[number] = mean;
  args.gram[column * args.size + row] = mean;
}

}  // namespace prefillshare::cuda::detail
