// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/fused_mma_args.cuh - what the host and the kernel of fused_mma.cuh agree on.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/centroid_table.cuh>
#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/kernels/output.cuh>

namespace codegemm::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct FusedMmaArgs {
  const unsigned char* tiles = nullptr;      // [granules][row_tiles][tile_bytes], see packed_matrix.hpp
  const std::uint16_t* codebooks = nullptr;  // fp16 [parts][m][2^b][v]
  const std::uint16_t* x = nullptr;          // [tokens][x_stride]
  std::int64_t x_stride = 0;
  int tokens = 0;
  int cols = 0;
  int row_tiles = 0;
  int slabs = 0;  // half granules
  int tile_bytes = 0;
  int scale_steps = 0;  // as PackedLayout
  int code_bits = 0;
  RowBlocks rows;  // its halves are those of SwiGLU
  int slabs_per_split = 0;
  int group = 0;                // row tiles between two barriers
  int tiles_ahead = 0;          // how far the second-level cache is ahead, where codes come straight from it
  bool x_aligned = false;       // every row of x starts at a multiple of 16 bytes
  unsigned codebook_bytes = 0;  // codes of two bytes: of all codebooks
  Output out;
};

inline constexpr int kFusedMmaThreads = 512;

/// Sizes of a block that host and device agree on.
template <class Config, int Tokens>
struct FusedMmaShape {
  static_assert(Tokens == 8 || Tokens == 16, "codegemm: fused_mma_kernel Tokens must be 8 or 16");
  static constexpr int kLaneSpan = Config::kSets / Config::kCodebooks * Config::kVecLen;  // k of a lane
  static constexpr int kWarps = kFusedMmaThreads / 32;
  static constexpr int kRowBytes = Config::kSets * Config::kCodeBytes;
  static constexpr int kSlabSpan = 16 * kLaneSpan;                    // k of a slab
  static constexpr int kMostGroup = Config::kCodeBytes == 2 ? 1 : 4;  // row tiles between two barriers
  /// With weights as rows of a product, the halves of a centroid of four values are registers that do not
  /// follow each other: looked up one by one, in planes of their own, they need not be moved. Where weights
  /// are multiplied or added first, that puts them in place.
  static constexpr int kPieces =
      Config::kVecLen == 16 ||
              (Tokens == 8 && Config::kVecLen == 4 && Config::kCodebooks == 1 && Config::kScaleSteps >= 2)
          ? 2
          : 1;
  using Table = CentroidTable<Config::kVecLen, Config::kCodebooks, kPieces>;

  /// Whether codes and scales of a warp come by asynchronous copies into shared memory. A lane's pieces of
  /// them are 8 bytes, and of four lines a warp: loaded straight they take its pipe four times as long as
  /// copied in whole ones. Large tables leave no room for it.
  static constexpr bool kStaged = Config::kCodeBytes == 1 && Table::kRowSets == 1;
  static constexpr int kCodeStages = 3;
  /// Codes of a warp's slab of a tile: kRowBytes rows of 16 bytes a lane, see staged_place().
  static constexpr int kStagedCodeBytes = kRowBytes * 256;

  /// Where 16 bytes number `chunk` of a lane lie: of any two that follow each other in a lane's stream the
  /// banks differ.
  [[nodiscard]] static __host__ __device__ constexpr unsigned staged_place(int lane, int chunk) {
    return static_cast<unsigned>(chunk * 256 + ((lane * 16) ^ (chunk % 2 * 64)));
  }
  /// The same for byte `offset` of a lane's stream.
  [[nodiscard]] static __host__ __device__ constexpr unsigned staged_offset(int lane, int offset) {
    return staged_place(lane, offset / 16) + static_cast<unsigned>(offset % 16);
  }
  [[nodiscard]] static __host__ __device__ constexpr int scale_bytes(int steps) {
    return steps < 5 ? 512 >> steps : 0;
  }
  /// Of a warp: codes, then scales.
  [[nodiscard]] static __host__ __device__ constexpr int stage_bytes(int steps) {
    return kStagedCodeBytes + scale_bytes(steps);
  }
  /// Of a block.
  [[nodiscard]] static __host__ __device__ constexpr int staged_bytes(int steps) {
    return kStaged ? kWarps * kCodeStages * stage_bytes(steps) : 0;
  }

  [[nodiscard]] static __host__ __device__ constexpr int table_bytes(int bits) {
    return Config::kCodeBytes == 1 ? Table::bytes(bits) : 0;
  }
  /// log2 of the floats of a warp's tile. Where codebooks stay in global memory, the less a block has of
  /// shared memory, the more of them the first-level cache holds: then one token has the room of one.
  [[nodiscard]] static __host__ __device__ constexpr int log_tile_sums(int tokens) {
    return Config::kCodeBytes == 2 && tokens == 1 ? 4 : Tokens == 8 ? 7 : 8;
  }
  /// Of all warps, for one group of tiles and the next.
  [[nodiscard]] static __host__ __device__ constexpr int sum_bytes(int tokens, int group) {
    return (2 * group * kWarps * 4) << log_tile_sums(tokens);
  }
};

}  // namespace codegemm::cuda
