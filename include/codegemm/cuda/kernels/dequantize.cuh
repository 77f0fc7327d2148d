// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/dequantize.cuh - packed weights as a plain matrix.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/block/tile_layout.hpp>
#include <codegemm/cuda/kernels/output.cuh>

namespace codegemm::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct DequantizeArgs {
  const unsigned char* tiles = nullptr;       // [granules][row_tiles][tile_bytes], see packed_matrix.hpp
  const std::uint16_t* codebooks = nullptr;   // fp16 [parts][m][2^b][v]
  const std::uint16_t* row_scales = nullptr;  // fp16 [rows], or null where the tiles hold the scales
  void* w = nullptr;                          // [rows][w_stride]
  std::int64_t w_stride = 0;
  int rows = 0;
  int cols = 0;
  int row_tiles = 0;
  RowBlocks part_rows;  // of a tile each
  int tile_bytes = 0;
  int codebook_count = 0;
  int sets = 0;
  int code_bytes = 0;
  int code_bits = 0;
  int scale_steps = 0;
  float unscale = 1.0F;
  ScalarType type = ScalarType::kHalf;
};

/// Block (i, granule) writes row tile i. Each weight is summed in fp32 and rounded once.
template <int V>
__global__ void dequantize_kernel(const __grid_constant__ DequantizeArgs a) {
  const int row_tile = static_cast<int>(blockIdx.x);
  const int granule = static_cast<int>(blockIdx.y);
  const unsigned char* const tile =
      a.tiles + (static_cast<std::int64_t>(granule) * a.row_tiles + row_tile) * a.tile_bytes;
  const int per_lane = a.sets / a.codebook_count;
  const int vectors = 32 * per_lane;
  const int row_bytes = a.sets * a.code_bytes;
  const std::uint16_t* const codebooks =
      a.codebooks + ((a.part_rows.block(row_tile).part * a.codebook_count) << a.code_bits) * V;
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * vectors; i += static_cast<int>(blockDim.x)) {
    const int lane = i % vectors / per_lane;
    const int vector = i % vectors % per_lane;
    const int row = row_tile * kTileRows + i / vectors;
    const int k = (granule * vectors + i % vectors) * V;
    if (row >= a.rows || k >= a.cols) continue;
    const int slot = row_slot(lane, row % kTileRows);
    float sum[V] = {};
    for (int c = 0; c < a.codebook_count; ++c) {
      unsigned code = 0;
      for (int byte = 0; byte < a.code_bytes; ++byte) {
        const int at = (vector * a.codebook_count + c) * a.code_bytes + byte;
        code |= static_cast<unsigned>(tile[tile_offset(lane, stream_offset(row_bytes, slot, at))])
                << (8 * byte);
      }
      const std::uint16_t* const centroid =
          codebooks + ((static_cast<unsigned>(c) << a.code_bits) + code) * V;
#pragma unroll
      for (int e = 0; e < V; ++e) sum[e] += __half2float(__ushort_as_half(__ldg(centroid + e)));
    }
    float scale = a.unscale;
    if (a.scale_steps == 5) {
      scale *= __half2float(__ushort_as_half(a.row_scales[row]));
    } else {
      const int first = lane >> a.scale_steps << a.scale_steps;
      const auto* const scales = reinterpret_cast<const unsigned short*>(tile + row_bytes * 512);
      scale *= __half2float(__ushort_as_half(scales[scale_offset(a.scale_steps, first, row % kTileRows)]));
    }
#pragma unroll
    for (int e = 0; e < V; ++e) detail::store_scalar(a.w, row * a.w_stride + k + e, a.type, sum[e] * scale);
  }
}

}  // namespace codegemm::cuda
