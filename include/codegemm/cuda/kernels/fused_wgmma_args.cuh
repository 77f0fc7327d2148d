// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/fused_wgmma_args.cuh - what the host and the kernel of fused_wgmma.cuh agree on.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda.h>

#include <codegemm/cuda/block/centroid_table.cuh>
#include <codegemm/cuda/block/piece_schedule.hpp>
#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/block/tile_layout.hpp>
#include <codegemm/cuda/kernels/output.cuh>

namespace codegemm::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct FusedWgmmaArgs {
  CUtensorMap x;                             // [tokens][cols] in boxes of half a token tile x 64
  const unsigned char* tiles = nullptr;      // [granules][row_tiles][tile_bytes], see packed_matrix.hpp
  const std::uint16_t* codebooks = nullptr;  // fp16 [parts][m][2^b][v]
  // Sums of pieces that another cluster ends, [cutters][2 blocks][2 warpgroups][TokenTile / 8][128 threads]
  float4* partials = nullptr;
  // [cutters][2 blocks][2 warpgroups]: 1 while they are there; of even pieces one for each that they go to
  unsigned* handed_over = nullptr;
  int tokens = 0;
  int row_tiles = 0;
  int tile_bytes = 0;
  int scale_steps = 0;  // as PackedLayout
  int code_bits = 0;
  PieceSchedule schedule;  // its slabs are half granules that have columns
  RowBlocks rows;          // of a cluster: 2 * kRowTiles row tiles; with SwiGLU kRowTiles in each half
  int token_blocks = 0;    // token tiles
  int x_stages = 0;
  int code_stages = 0;
  Output out;
};

/// Sizes of a block that host and device agree on.
template <class Config, int TokenTile, int Groups = 2>
struct FusedWgmmaShape {
  static_assert(TokenTile == 32 || TokenTile == 64 || TokenTile == 128 || TokenTile == 256,
                "codegemm: fused_wgmma_kernel TokenTile must be 32, 64, 128 or 256");
  static constexpr int kMultipliers = Groups * 128;    // threads that multiply
  static constexpr int kThreads = 128 + kMultipliers;  // one warpgroup copies
  static constexpr int kRowTiles = Groups * 4;         // four each
  static constexpr int kLaneSpan =
      Config::kSets / Config::kCodebooks * Config::kVecLen;  // k of a packed lane
  static constexpr int kRowBytes = Config::kSets * Config::kCodeBytes;
  static constexpr int kSlabSpan = 16 * kLaneSpan;
  static constexpr int kStageBytes = TokenTile * 128;  // 64 k of x
  static constexpr int kMaxStages = 8;
  static constexpr int kStagesOfSlab = kLaneSpan / 4;
  static constexpr int kBarrierBytes =  // and the pieces
      (4 * kMaxStages + 2 * kRowTiles) * 8 + static_cast<int>(sizeof(PieceSchedule::Pieces));
  static constexpr int kCodeBytes = kRowBytes * kHalfLineStride;  // of a slab of a row tile
  // A warp's sums on their way out, [16 tokens][16 rows]: a stride at which a fragment's store hits every
  // bank once.
  static constexpr int kScratchStride = 20;
  static constexpr int kScratchFloats = 16 * kScratchStride;
  static constexpr int kScratchBytes = kRowTiles * kScratchFloats * 4;
  static constexpr int kGatedScratchBytes =
      3 * kScratchBytes;  // with SwiGLU: and twice those of the other block
  using Table = CentroidTable<Config::kVecLen, Config::kCodebooks>;

  /// Whether the number of x's stages is a multiple of a slab's: the plan makes it one of four, if it can.
  [[nodiscard]] static __host__ __device__ constexpr bool stages_fit(bool gated) {
    return kStagesOfSlab <= 4 && !(gated && TokenTile == 256);
  }
  [[nodiscard]] static __host__ __device__ constexpr int table_bytes(int bits) {
    return Config::kCodeBytes == 1 ? Table::bytes(bits) : 0;
  }
  /// Of a slab of a row tile.
  [[nodiscard]] static __host__ __device__ constexpr int scale_bytes(int steps) {
    return steps < 5 ? 512 >> steps : 0;
  }
  [[nodiscard]] static __host__ __device__ constexpr int code_stage_bytes(int steps) {
    return kRowTiles * (kCodeBytes + scale_bytes(steps));
  }
};

}  // namespace codegemm::cuda
