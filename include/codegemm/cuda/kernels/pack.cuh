// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/pack.cuh - canonical codes and scales into the layout of the GPU kernels.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/tile_layout.hpp>

namespace codegemm::cuda {

/// Everything that the kernels read, by value: one matrix, which may be a part of what is packed. Pointers
/// are to device memory.
struct PackArgs {
  const std::uint32_t* codes = nullptr;  // canonical: [m][words][rows]
  const __half* scales = nullptr;        // canonical: [groups][rows]
  unsigned char* tiles = nullptr;        // the part's first tile of granule 0
  __half* row_scales = nullptr;          // [rows], where scale_steps is 5
  std::int64_t granule_bytes = 0;        // from a granule to the next
  std::int64_t rows = 0;
  std::int64_t vectors = 0;  // of a row
  std::int64_t words = 0;    // of a row and codebook
  std::int64_t granules = 0;
  std::int64_t tile_count = 0;  // of the part, in a granule
  std::int64_t cols = 0;
  std::int64_t group = 0;  // weights that share a scale
  int m = 0;
  int v = 0;
  int sets = 0;
  int code_bytes = 0;
  int tile_bytes = 0;
  int scale_steps = 0;
  float scale_factor = 1.0F;
};

inline constexpr int kPackThreads = 256;

/// A thread writes 16 bytes of a lane's codes.
template <int>  // a template: one definition, however many files include this
__global__ void __launch_bounds__(kPackThreads) pack_codes_kernel(const __grid_constant__ PackArgs a) {
  const int row_bytes = a.sets * a.code_bytes;
  const std::int64_t pieces = a.granules * a.tile_count * row_bytes * 32;
  const int per_word = 4 / a.code_bytes;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; i < pieces;
       i += static_cast<std::int64_t>(gridDim.x) * kPackThreads) {
    const int lane = static_cast<int>(i % 32);
    const int part = static_cast<int>(i / 32 % row_bytes);
    const std::int64_t tile = i / 32 / row_bytes % a.tile_count;
    const std::int64_t granule = i / 32 / row_bytes / a.tile_count;
    unsigned words[4] = {};
    for (int b = 0; b < 16; ++b) {
      const StreamPlace place = stream_place(row_bytes, part * 16 + b);
      const std::int64_t row = tile * kTileRows + row_slot(lane, place.slot);
      const int p = place.byte / a.code_bytes;
      const std::int64_t vector = (granule * 32 + lane) * (a.sets / a.m) + p / a.m;
      if (row >= a.rows || vector >= a.vectors) continue;
      const std::uint32_t word = a.codes[(p % a.m * a.words + vector / per_word) * a.rows + row];
      const int in_word = static_cast<int>(vector % per_word) * a.code_bytes + place.byte % a.code_bytes;
      words[b / 4] |= (word >> (in_word * 8) & 0xFFU) << (b % 4 * 8);
    }
    unsigned char* const to = a.tiles + granule * a.granule_bytes + tile * a.tile_bytes;
    *reinterpret_cast<uint4*>(to + tile_offset(lane, part * 16)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

/// A thread writes one scale.
template <int>
__global__ void __launch_bounds__(kPackThreads) pack_scales_kernel(const __grid_constant__ PackArgs a) {
  const auto scaled = [&](std::int64_t group, std::int64_t row) {
    return __float2half_rn(__half2float(a.scales[group * a.rows + row]) * a.scale_factor);
  };
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kPackThreads;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (a.scale_steps == 5) {
    for (std::int64_t row = begin; row < a.rows; row += step) a.row_scales[row] = scaled(0, row);
    return;
  }
  const int of_tile = 512 >> a.scale_steps;
  const std::int64_t count = a.granules * a.tile_count * of_tile;
  for (std::int64_t i = begin; i < count; i += step) {
    const int in_tile = static_cast<int>(i % of_tile);
    const int row_in_tile = in_tile % kTileRows;
    const int lane = in_tile / kTileRows << a.scale_steps;
    const std::int64_t tile = i / of_tile % a.tile_count;
    const std::int64_t granule = i / of_tile / a.tile_count;
    const std::int64_t k = (granule * 32 + lane) * (a.sets / a.m) * a.v;
    const std::int64_t row = tile * kTileRows + row_in_tile;
    if (k >= a.cols || row >= a.rows) continue;
    auto* const scales = reinterpret_cast<__half*>(a.tiles + granule * a.granule_bytes + tile * a.tile_bytes +
                                                   a.sets * a.code_bytes * 512);
    scales[scale_offset(a.scale_steps, lane, row_in_tile)] = scaled(k / a.group, row);
  }
}

}  // namespace codegemm::cuda
