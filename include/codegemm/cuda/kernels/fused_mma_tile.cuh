// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/fused_mma_tile.cuh - y = x W^T for many tokens from compute capability 8.0 on:
// weights are looked up straight into the fragments of mma.sync, each once for 128 tokens.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/centroid_table.cuh>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/block/wgmma_fragments.cuh>
#include <codegemm/cuda/kernels/output.cuh>

namespace codegemm::cuda {

/// Everything that the kernel reads, by value. Pointers are to device memory.
struct FusedMmaTileArgs {
  const unsigned char* tiles = nullptr;      // [granules][row_tiles][tile_bytes], see packed_matrix.hpp
  const std::uint16_t* codebooks = nullptr;  // fp16 [parts][m][2^b][v]
  const std::uint16_t* x = nullptr;          // [tokens][x_stride], rows at multiples of 16 bytes
  std::int64_t x_stride = 0;
  int tokens = 0;
  int cols = 0;
  int row_tiles = 0;
  int tile_bytes = 0;
  int scale_steps = 0;  // as PackedLayout
  int code_bits = 0;
  int slabs = 0;  // half granules that have columns
  RowBlocks rows;
  Output out;
};

/// Sizes of a block that host and device agree on.
template <class Config, bool Gated>
struct FusedMmaTileShape {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kWarpTiles = Gated ? 1 : 2;       // row tiles that a warp multiplies at once
  static constexpr int kRowTiles = kWarps * kWarpTiles;  // of a block, with SwiGLU in each half
  static constexpr int kTokens = 128;                    // of a block
  static constexpr int kLaneSpan =
      Config::kSets / Config::kCodebooks * Config::kVecLen;  // k of a packed lane
  static constexpr int kRowBytes = Config::kSets * Config::kCodeBytes;
  static constexpr int kSlabSpan = 16 * kLaneSpan;
  static constexpr int kStagesOfSlab = kLaneSpan / 4;  // of 64 k of x
  static constexpr int kStageBytes = kTokens * 128;
  static constexpr int kStages = 3;
  static constexpr int kCodeBytes = kRowBytes * kHalfLineStride;  // of a slab of a row tile
  static constexpr int kCodeStages = kStagesOfSlab == 1 ? 3 : 2;
  static constexpr int kScratchStride = 20;  // as in fused_wgmma.cuh
  using Table = CentroidTable<Config::kVecLen, Config::kCodebooks>;

  [[nodiscard]] static __host__ __device__ constexpr int table_bytes(int bits) {
    return Config::kCodeBytes == 1 ? Table::bytes(bits) : 0;
  }
  /// Of a slab of a row tile.
  [[nodiscard]] static __host__ __device__ constexpr int scale_bytes(int steps) {
    return steps < 5 ? 512 >> steps : 0;
  }
  /// Of a block. A tile without scales is read beyond its end all the same, see WgmmaFragments: 16 numbers.
  static constexpr int kReadBeyond = 32;
  [[nodiscard]] static __host__ __device__ constexpr int shared_bytes(int bits, int steps) {
    return table_bytes(bits) + kStages * kStageBytes +
           kCodeStages * kRowTiles * (kCodeBytes + scale_bytes(steps)) + kReadBeyond;
  }
};

/// Blocks go over [block of 128 tokens][block of rows]; a warp multiplies 32 rows, or with SwiGLU 16 rows
/// of the first half and after them their partners. x and codes come by asynchronous copies two stages ahead,
/// in which a token's 64 k are eight chunks of 16 bytes, chunk c at c ^ (token % 8). Fragments of weights are
/// those of wgmma, see WgmmaFragments: the rows of mma.sync, tokens are its columns.
template <class Config, PairType Type, bool Gated>
__global__ void __launch_bounds__(256, 1) fused_mma_tile_kernel(const __grid_constant__ FusedMmaTileArgs a) {
  using Shape = FusedMmaTileShape<Config, Gated>;
  using Table = typename Shape::Table;
  constexpr int kTokens = Shape::kTokens;
  constexpr int kWarpTiles = Shape::kWarpTiles;
  constexpr int kStagesOfSlab = Shape::kStagesOfSlab;
  // The table; x of the stages, where later sums go out; codes and scales of the code stages.
  extern __shared__ __align__(1024) char table[];
  char* const x_memory = table + Shape::table_bytes(a.code_bits);
  char* const code_memory = x_memory + Shape::kStages * Shape::kStageBytes;
  const int scale_bytes = Shape::scale_bytes(a.scale_steps);
  const int code_stage_bytes = Shape::kRowTiles * (Shape::kCodeBytes + scale_bytes);

  detail::allow_next_kernel();
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = __shfl_sync(0xFFFFFFFFU, thread / 32, 0);
  const int lane = thread % 32;
  const int row_block = static_cast<int>(blockIdx.x) % a.rows.blocks();
  const int first_token = static_cast<int>(blockIdx.x) / a.rows.blocks() * kTokens;

  detail::WgmmaFragments<Config, Type> fragments[kWarpTiles];
#pragma unroll
  for (auto& f : fragments)
    f.begin(table, a.code_bits, Config::kScaleSteps > 0 ? Config::kScaleSteps : a.scale_steps, lane);
  const unsigned x_at = static_cast<unsigned>(__cvta_generic_to_shared(x_memory));
  const unsigned codes_at = static_cast<unsigned>(__cvta_generic_to_shared(code_memory));
  const int stages = a.slabs * kStagesOfSlab;
  // Stage `stage` of x, and the codes of the slab that begins with it.
  const auto load_stage = [&](int stage, int first_tile) {
    if (stage < stages) {
      const unsigned to = x_at + static_cast<unsigned>(stage % Shape::kStages * Shape::kStageBytes);
#pragma unroll
      for (int i = 0; i < kTokens * 8 / Shape::kThreads; ++i) {
        const int token = (i * Shape::kThreads + thread) / 8;
        const int chunk = thread % 8;
        const int k = stage * 64 + chunk * 8;
        const int valid = first_token + token < a.tokens ? min(max(a.cols - k, 0), 8) : 0;
        detail::copy_16_bytes(to + static_cast<unsigned>(token * 128 + (chunk ^ (token % 8)) * 16),
                              valid > 0 ? a.x + (first_token + token) * a.x_stride + k : a.x, valid * 2);
      }
      if (stage % kStagesOfSlab == 0) {
        const int slab = stage / kStagesOfSlab;
        constexpr int kChunks = 16 * Shape::kRowBytes;  // of 16 bytes of a row tile
        const int scale_chunks = scale_bytes / 16;
        const unsigned to_codes =
            codes_at + static_cast<unsigned>(slab % Shape::kCodeStages * code_stage_bytes);
        const unsigned char* const granule =
            a.tiles + static_cast<std::int64_t>(slab / 2) * a.row_tiles * a.tile_bytes;
        for (int c = thread; c < Shape::kRowTiles * kChunks; c += Shape::kThreads) {
          const int tile = min(first_tile + c / kChunks, a.row_tiles - 1);
          const int owner = c % kChunks % 16;
          const int part = c % kChunks / 16;
          detail::copy_16_bytes(to_codes + static_cast<unsigned>(c / kChunks * Shape::kCodeBytes +
                                                                 part * kHalfLineStride + owner * 16),
                                granule + static_cast<std::int64_t>(tile) * a.tile_bytes +
                                    (part * 32 + slab % 2 * 16 + owner) * 16,
                                16);
        }
        for (int c = thread; c < Shape::kRowTiles * scale_chunks; c += Shape::kThreads) {
          const int tile = min(first_tile + c / scale_chunks, a.row_tiles - 1);
          detail::copy_16_bytes(
              to_codes + static_cast<unsigned>(Shape::kRowTiles * Shape::kCodeBytes + c * 16),
              granule + static_cast<std::int64_t>(tile) * a.tile_bytes + Shape::kRowBytes * 512 +
                  slab % 2 * scale_bytes + c % scale_chunks * 16,
              16);
        }
      }
    }
    detail::commit_copies();
  };
  const unsigned from_x = x_at + static_cast<unsigned>((lane / 16 * 8 + lane % 8) * 128);

  float d[2][kTokens / 8][4] = {};
  // d[of .. of + kWarpTiles) = the warp's tiles of the block's half.
  const auto multiply = [&](int half, auto& sums) {
    const RowBlocks::Block rows = a.rows.block(row_block, half);
    const std::uint16_t* const codebooks =
        a.codebooks + ((rows.part * Config::kCodebooks) << a.code_bits) * Config::kVecLen;
#pragma unroll
    for (auto& f : fragments) f.codebooks = codebooks;
    if constexpr (Config::kCodeBytes == 1)
      Table::fill(table, codebooks, a.code_bits, PairType::kHalf, thread, Shape::kThreads);
    if (half == 0) detail::wait_for_previous_kernel();
#pragma unroll
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) load_stage(stage, rows.tile);
    constexpr int kSteps = 4 * kStagesOfSlab;  // of a slab
    typename detail::WgmmaFragments<Config, Type>::Pairs pairs[kWarpTiles];
    int stage = 0;
    for (int slab = 0; slab < a.slabs; ++slab) {
      const char* const codes = code_memory + slab % Shape::kCodeStages * code_stage_bytes;
      const auto lookup = [&](int step) {
#pragma unroll
        for (int t = 0; t < kWarpTiles; ++t) {
          const int tile = warp * kWarpTiles + t;
          typename detail::WgmmaFragments<Config, Type>::Codes fetched;
          fragments[t].fetch(codes + tile * Shape::kCodeBytes,
                             codes + Shape::kRowTiles * Shape::kCodeBytes + tile * scale_bytes, step,
                             fetched);
          fragments[t].lookup(fetched, step, pairs[t]);
        }
      };
#pragma unroll
      for (int part = 0; part < kStagesOfSlab; ++part, ++stage) {
        detail::wait_for_copies<Shape::kStages - 2>();
        __syncthreads();  // everyone's copies, and everyone has read the stage that is written next
        load_stage(stage + Shape::kStages - 1, rows.tile);
        if (part == 0) lookup(0);
        const unsigned from = from_x + static_cast<unsigned>(stage % Shape::kStages * Shape::kStageBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          unsigned weights[kWarpTiles][4];
#pragma unroll
          for (int t = 0; t < kWarpTiles; ++t) fragments[t].finish(pairs[t], weights[t]);
          // The next weights are on their way while these are multiplied.
          if (part * 4 + step + 1 < kSteps) lookup(part * 4 + step + 1);
          const unsigned chunk = static_cast<unsigned>(step * 2 + lane / 8 % 2);
          const unsigned at = from + (chunk ^ static_cast<unsigned>(lane % 8)) * 16U;
#pragma unroll
          for (int n = 0; n < kTokens / 16; ++n) {
            unsigned tokens[4];
            detail::load_matrices(at + static_cast<unsigned>(n * 16 * 128), tokens);
#pragma unroll
            for (int t = 0; t < kWarpTiles; ++t) {
              detail::mma_pairs<Type>(sums[t][n * 2], weights[t], tokens[0], tokens[1], false);
              detail::mma_pairs<Type>(sums[t][n * 2 + 1], weights[t], tokens[2], tokens[3], false);
            }
          }
        }
      }
    }
    __syncthreads();  // all have read: the memory is for the other half, or for sums
  };
  if constexpr (Gated) {
    multiply(0, reinterpret_cast<float(&)[1][kTokens / 8][4]>(d[0]));
    multiply(1, reinterpret_cast<float(&)[1][kTokens / 8][4]>(d[1]));
  } else {
    multiply(0, d);
  }

  // Out by way of shared memory, 16 tokens at a time: half a tile's rows of a token a lane.
  const RowBlocks::Block block = a.rows.block(row_block);
  float* const scratch = reinterpret_cast<float*>(x_memory) + warp * (16 * Shape::kScratchStride);
  const float* const from = scratch + lane / 2 * Shape::kScratchStride + lane % 2 * 8;
  const auto row_of = [&](int t) {  // with SwiGLU tile 1 is the partner of tile 0
    const int tile = Gated ? block.tile + warp + t * a.rows.half_tiles : block.tile + warp * 2 + t;
    return tile * 16 + lane % 2 * 8;
  };
  const auto transpose = [&](const float(&of)[2][4], float(&sums)[8]) {
    __syncwarp();
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      scratch[(e / 4 * 8 + lane % 4 * 2 + e % 2) * Shape::kScratchStride + lane / 4 + e / 2 % 2 * 8] =
          of[e / 4][e % 4];
    }
    __syncwarp();
    detail::load_eight(from, sums);
  };
  detail::EightRows rows[2];
#pragma unroll
  for (int t = 0; t < 2; ++t) rows[t].load(a.out, row_of(t));
#pragma unroll
  for (int n = 0; n < kTokens / 16; ++n) {
    if (first_token + n * 16 >= a.tokens) break;
    const int token = first_token + n * 16 + lane / 2;
    float sums[2][8];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      transpose(reinterpret_cast<const float(&)[2][4]>(d[t][n * 2]), sums[t]);
      rows[t].finish(sums[t]);
    }
    if constexpr (Gated) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[0][e] = detail::swiglu(sums[0][e], sums[1][e]);
    }
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
      const bool has_rows = warp * kWarpTiles + t < block.tiles;
      if (token < a.tokens && has_rows) rows[t].store(a.out, token, row_of(t), sums[t]);
    }
  }
}

}  // namespace codegemm::cuda
