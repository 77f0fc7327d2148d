// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/fused_mma_copies.cuh - a warp's next tiles in fused_mma_kernel: their codes and
// scales by asynchronous copies, some tiles ahead of the products.
// Layer: cuda/kernels (device).
#pragma once

#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/kernels/fused_mma_args.cuh>

namespace codegemm::cuda::detail {

// What a block multiplies: slabs [slab0, slab1) of `tiles` row tiles from tile0 on.
struct BlockTiles {
  int slab0;
  int slab1;
  int tile0;
  int tiles;
};

// Copies of a warp's tiles in their order [half][window][tile], each into the stage that was multiplied last.
// A stage is read at FusedMmaShape::staged_offset(), its scales behind its codes.
template <class Shape, bool Gated>
struct StagedTiles {
  const FusedMmaArgs& a;
  BlockTiles block;
  unsigned stage_bytes;
  unsigned first_stage;  // from the beginning of shared memory
  int first_slab;        // of the warp
  int slab;              // copied now
  int half = 0;
  int left = 0;                         // tiles of the slab
  unsigned to;                          // stage
  const unsigned char* from = nullptr;  // the lane's first 16 bytes
  int to_scales = 0;                    // from there, for lanes 0 to 15
  unsigned lane_to;                     // the lane's place in the stage at 0

  __device__ __forceinline__ StagedTiles(const FusedMmaArgs& args, const BlockTiles& tiles, int warp,
                                         const char* shared, int table_bytes, int scale_steps)
      : a(args), block(tiles), stage_bytes(static_cast<unsigned>(Shape::stage_bytes(scale_steps))) {
    first_stage =
        static_cast<unsigned>(table_bytes) + static_cast<unsigned>(warp * Shape::kCodeStages) * stage_bytes;
    first_slab = slab = block.slab0 + warp;
    to = first_stage;
    lane_to = static_cast<unsigned>(__cvta_generic_to_shared(shared)) +
              Shape::staged_place(lane() % 16, lane() / 16);
  }

  __device__ __forceinline__ void advance(unsigned& stage_at) const {
    stage_at += stage_bytes;
    if (stage_at == first_stage + Shape::kCodeStages * stage_bytes) stage_at = first_stage;
  }
  // Takes up `slab`, if it is one of the block's.
  __device__ __forceinline__ void begin() {
    if (slab >= block.slab1) return;
    const int odd = slab % 2;
    const unsigned granule_bytes = static_cast<unsigned>(a.row_tiles) * static_cast<unsigned>(a.tile_bytes);
    const auto tile = static_cast<unsigned>(block.tile0 + half * a.rows.half_tiles);
    from = a.tiles +
           (static_cast<unsigned>(slab / 2) * granule_bytes + tile * static_cast<unsigned>(a.tile_bytes)) +
           (lane() / 16 * 512 + odd * 256 + lane() % 16 * 16);
    to_scales = Shape::kRowBytes * 512 + odd * (scale_bytes() - 256);
    left = block.tiles;
  }
  // Asks for the next tile, if there is one, and ends a group of copies. All lanes.
  __device__ __forceinline__ void next() {
    if (left > 0) {
      const unsigned at = to + lane_to;
#pragma unroll
      for (int i = 0; i < (Shape::kRowBytes + 1) / 2; ++i) {
        if (i < Shape::kRowBytes / 2 || lane() < 16)
          copy_16_bytes(at + static_cast<unsigned>(i * 512), from + i * 1024);
      }
#pragma unroll 1
      for (int i = 0; i < scale_bytes(); i += 256) {
        if (lane() < 16 && lane() * 16 < scale_bytes() - i) {
          copy_16_bytes(at + static_cast<unsigned>(Shape::kStagedCodeBytes + i), from + (to_scales + i));
        }
      }
      from += a.tile_bytes;
      advance(to);
      if (--left == 0) {
        slab += Shape::kWarps;
        if (Gated && slab >= block.slab1 && half == 0) {
          half = 1;
          slab = first_slab;
        }
        begin();
      }
    }
    commit_copies();
  }

 private:
  [[nodiscard]] static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  [[nodiscard]] __device__ __forceinline__ int scale_bytes() const {
    return static_cast<int>(stage_bytes) - Shape::kStagedCodeBytes;
  }
};

}  // namespace codegemm::cuda::detail
