// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/gather_args.cuh - what the host and the kernel of gather.cuh agree on.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/kernels/normed_row.cuh>
#include <codegemm/cuda/kernels/output.cuh>

namespace codegemm::cuda {

inline constexpr int kMostRanks = 8;  ///< blocks of a cluster

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct GatherArgs {
  const unsigned char* tiles = nullptr;      // [granules][row_tiles][tile_bytes], see packed_matrix.hpp
  const std::uint16_t* codebooks = nullptr;  // fp16 [parts][m][2^b][v]
  const std::uint16_t* x = nullptr;          // [tokens][x_stride]
  NormedRow normed;                          // in place of x: one token, with a Psumbook of fp16
  float* partials = nullptr;     // [groups][tokens][row_tiles * 16], where there are several groups
  unsigned* counters = nullptr;  // [chunks][splits of a group], zero before and after
  std::int64_t x_stride = 0;
  int cols = 0;
  int row_tiles = 0;
  int granules = 0;
  RowBlocks rows;  // chunks; its halves are those of SwiGLU
  int granules_per_block = 0;
  int splits = 0;           // of a group
  bool copies_row = false;  // normed, see RowCopy
  // In a block's shared memory, from its first Psumbook on: the sums of its rows, before them kSquaresBytes,
  // before these kRowBarrierBytes; for a cluster what its blocks push here, and the barrier.
  int sums_at = 0;
  int pushed_at = 0;
  int barrier_at = 0;
  int tables = 1;              // Psumbooks of a block
  int most = 0;                // tiles of a warp
  int slots = 0;               // tiles that are pushed to a block by each
  unsigned ranks_inverse = 0;  // 65536 / blocks of a cluster, rounded up
  unsigned most_inverse = 0;   // 65536 / tiles of a warp, rounded up
  int tile_bytes = 0;
  unsigned granule_bytes = 0;  // row_tiles * tile_bytes
  int scale_steps = 0;         // log2 of the lanes that share a scale; 5: no scales in the tiles
  int v = 0;
  int code_bits = 0;
  int rounds_ahead = 0;  // in a round each warp sums a tile; how far the second-level cache is ahead
  ScalarType x_type = ScalarType::kHalf;
  Output out;
};

}  // namespace codegemm::cuda
