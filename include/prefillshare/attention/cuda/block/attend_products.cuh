// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/attend_products.cuh - the two products of attention on mma.sync: queries
// times a tile of keys, weights times a tile of values.
// Layer: attention/cuda/block (device).
#pragma once

#include <cstdint>

#include <prefillshare/attention/cuda/block/page_loader.cuh>

namespace prefillshare::cuda {

/// Query rows of one K/V head: row r is head first_head + r % group of token first_token + r / group.
struct QueryRows {
  const std::uint16_t* q = nullptr;  ///< [tokens][stride]
  std::int64_t stride = 0;           ///< elements from a token to the next
  std::int64_t first_token = 0;      ///< of these rows
  int first_head = 0;                ///< of these rows
  int group = 1;                     ///< query heads of a K/V head
  int first_row = 0;                 ///< of this block
  int rows = 0;                      ///< rows from here on do not exist
};

namespace detail {

// The first row of this warp, in the block.
template <class Shape>
[[nodiscard]] __device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / 32 / Shape::kWarpsN * Shape::kWarpRows;
}

// The first row of this warp's row tile r, in the block.
template <class Shape>
[[nodiscard]] __device__ __forceinline__ int tile_row(int r) {
  return Shape::kWgmma ? r * 64 + static_cast<int>(threadIdx.x) / 32 * 16 : warp_row<Shape>() + r * 16;
}

[[nodiscard]] __device__ __forceinline__ const std::uint16_t* query_row(const QueryRows& rows, int row,
                                                                        int head_dim) {
  const int token = row / rows.group;
  return rows.q + (rows.first_token + token) * rows.stride +
         static_cast<std::int64_t>(rows.first_head + row - token * rows.group) * head_dim;
}

// The warp's rows of Q as fragments of A, or all rows of the block into shared memory. Products with fp8 keys
// take the columns in another order: lane l of four has kQuarter columns from kQuarter * l on, four a step,
// so that its part of a row of K lies together.
template <class Shape>
struct Queries {
  static constexpr int kSteps = Shape::kHeadDim / 16;
  static constexpr int kQuarter = Shape::kHeadDim / 4;
  unsigned fragment[Shape::kQueriesInShared ? 1 : kSteps][4];
  unsigned shared;

  // In shared memory they are complete at the block's next barrier.
  __device__ __forceinline__ void load(const QueryRows& rows, unsigned shared_memory) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (Shape::kQueriesInShared) {
      constexpr int kChunks = Shape::kHeadDim / 8;
      const unsigned base = shared_memory + Shape::kQueriesAt;
      for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows * kChunks; i += Shape::kThreads) {
        const int row = rows.first_row + i / kChunks;
        const bool there = row < rows.rows;
        const std::uint16_t* const from = query_row(rows, there ? row : 0, Shape::kHeadDim) + i % kChunks * 8;
        if constexpr (Shape::kWgmma) {
          const int mine = i / kChunks;
          const int chunk = i % kChunks;
          copy_or_zero(base + static_cast<unsigned>(chunk / 8 * Shape::kRows * 128 + mine * 128 +
                                                    ((chunk ^ mine) & 7) * 16),
                       from, there);
          continue;
        }
        const unsigned to = base + static_cast<unsigned>(i / kChunks * Shape::kQueryRowBytes);
        if constexpr (Shape::kFp8) {
          const int column = i % kChunks * 8;
          const int step = column % kQuarter / 4;
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            const int at = (step + pair / 2) * 16 + column / kQuarter * 2 + pair % 2 * 8;
            copy_4_or_zero(to + static_cast<unsigned>(at * 2), from + pair * 2, there);
          }
        } else {
          copy_or_zero(to + static_cast<unsigned>(i % kChunks * 16), from, there);
        }
      }
      shared = Shape::kWgmma
                   ? base
                   : base + static_cast<unsigned>((warp_row<Shape>() + lane % 16) * Shape::kQueryRowBytes +
                                                  lane / 16 * 16);
    } else {
      const int row = rows.first_row + warp_row<Shape>() + lane / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool there = row + 8 * h < rows.rows;
        const std::uint16_t* const from = query_row(rows, there ? row + 8 * h : 0, Shape::kHeadDim) +
                                          lane % 4 * (Shape::kFp8 ? kQuarter : 2);
        constexpr int kStep = Shape::kFp8 ? 4 : 16;
        constexpr int kSecond = Shape::kFp8 ? 2 : 8;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          fragment[k][h] = there ? *reinterpret_cast<const unsigned*>(from + k * kStep) : 0U;
          fragment[k][h + 2] = there ? *reinterpret_cast<const unsigned*>(from + k * kStep + kSecond) : 0U;
        }
      }
    }
  }
  __device__ __forceinline__ void get(int k, unsigned (&out)[Shape::kRowTiles][4]) const {
    if constexpr (Shape::kQueriesInShared) {
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        load_matrices(out[r], shared + static_cast<unsigned>(r * 16 * Shape::kQueryRowBytes + k * 32));
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[0][e] = fragment[k][e];
    }
  }
};

// score += the warp's rows of Q times its keys of the tile in `stage`. Swizzled: 128 bytes of all keys lie
// together, in the 128-byte swizzle.
template <bool Swizzled = false, class Shape>
__device__ __forceinline__ void multiply_keys(float (&score)[Shape::kRowTiles][Shape::kWarpKeys / 8][4],
                                              const Queries<Shape>& queries, unsigned stage, int key_at) {
  constexpr int kTiles = Shape::kWarpKeys / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (Shape::kFp8) {
    constexpr int kQuarter = Queries<Shape>::kQuarter;  // bytes of a row that a lane reads
    constexpr int kWords = kQuarter % 16 == 0 ? 4 : 2;  // at once, a word a step
    static_assert(!Swizzled || (kQuarter == 32 && kWords == 4));
    constexpr int kPitch = Swizzled ? 128 : Shape::kRowBytes;
    const int byte = lane % 4 * kQuarter;
    const unsigned at = stage + static_cast<unsigned>((key_at + lane / 4) * kPitch +
                                                      (Swizzled ? byte ^ lane / 4 * 16 : byte));
#pragma unroll
    for (int k = 0; k < Shape::kHeadDim / 16; k += kWords) {
      unsigned a[kWords][Shape::kRowTiles][4];
#pragma unroll
      for (int w = 0; w < kWords; ++w) queries.get(k + w, a[w]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        unsigned words[kWords];
        load_words(words, (Swizzled ? at ^ static_cast<unsigned>(k * 4) : at + static_cast<unsigned>(k * 4)) +
                              static_cast<unsigned>(n * 8 * kPitch));
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const unsigned low = widen_fp8<Shape::kType>(words[w] & 0xFFFFU);
          const unsigned high = widen_fp8<Shape::kType>(words[w] >> 16);
#pragma unroll
          for (int r = 0; r < Shape::kRowTiles; ++r) mma<Shape::kType>(score[r][n], a[w][r], low, high);
        }
      }
    }
  } else {
    constexpr int kPitch = Swizzled ? 128 : Shape::kRowBytes;
    const int chunk = Swizzled ? lane / 8 % 2 ^ lane % 8 : lane / 8 % 2;
    const unsigned k_at =
        stage + static_cast<unsigned>((key_at + lane % 8 + lane / 16 * 8) * kPitch + chunk * 16);
#pragma unroll
    for (int k = 0; k < Shape::kHeadDim / 16; ++k) {
      unsigned a[Shape::kRowTiles][4];
      queries.get(k, a);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        unsigned b[4];
        const auto row = static_cast<unsigned>(n * 8 * kPitch);
        load_matrices(b, Swizzled ? (k_at ^ static_cast<unsigned>(k % 4 * 32)) + row +
                                        static_cast<unsigned>(k / 4) * Shape::kColumnTileBytes
                                  : k_at + row + static_cast<unsigned>(k * 32));
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
          mma<Shape::kType>(score[r][n], a[r], b[0], b[1]);
          mma<Shape::kType>(score[r][n + 1], a[r], b[2], b[3]);
        }
      }
    }
  }
}

// out += weights times 16 rows of V, `v_at` being this lane's address of the first columns for ldmatrix.
// rest: what rounding took from the weights. Swizzled: see multiply_keys().
template <class Shape, bool Swizzled = false>
__device__ __forceinline__ void multiply_values(float (&out)[Shape::kRowTiles][Shape::kHeadDim / 8][4],
                                                const unsigned (&weights)[Shape::kRowTiles][4],
                                                const unsigned (&rest)[Shape::kRowTiles][4], unsigned v_at) {
  const auto multiply = [&](int n, unsigned b0, unsigned b1) {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      mma<Shape::kType>(out[r][n], weights[r], b0, b1);
      if constexpr (Shape::kExactWeights) mma<Shape::kType>(out[r][n], rest[r], b0, b1);
    }
  };
  if constexpr (Shape::kFp8) {
    // Two neighbours of a row are one number for ldmatrix: a lane gets them of two keys, and gives the even
    // columns to one product and the odd ones to another.
#pragma unroll
    for (int d = 0; d < Shape::kHeadDim / 32; ++d) {
      unsigned b[4];
      load_matrices_transposed(
          b, Swizzled ? v_at ^ static_cast<unsigned>(d * 32) : v_at + static_cast<unsigned>(d * 32));
#pragma unroll
      for (int e = 0; e < 4; ++e) b[e] = __byte_perm(b[e], 0U, 0x3120U);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned first = b[2 * half];
        const unsigned second = b[2 * half + 1];
        multiply(4 * d + 2 * half, widen_fp8<Shape::kType>(first & 0xFFFFU),
                 widen_fp8<Shape::kType>(second & 0xFFFFU));
        multiply(4 * d + 2 * half + 1, widen_fp8<Shape::kType>(first >> 16),
                 widen_fp8<Shape::kType>(second >> 16));
      }
    }
  } else {
#pragma unroll
    for (int d = 0; d < Shape::kHeadDim / 8; d += 2) {
      unsigned b[4];
      load_matrices_transposed(b, Swizzled ? (v_at ^ static_cast<unsigned>(d % 8 * 16)) +
                                                 static_cast<unsigned>(d / 8) * Shape::kColumnTileBytes
                                           : v_at + static_cast<unsigned>(d * 16));
      multiply(d, b[0], b[1]);
      multiply(d + 1, b[2], b[3]);
    }
  }
}

}  // namespace detail
}  // namespace prefillshare::cuda
