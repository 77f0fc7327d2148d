// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/attention_tile.cuh - tiles of rows in shared memory and their products on
// tensor cores: what the kernels of attention_mma.cuh are made of.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>

#include <prefillshare/attention/cuda/block/tensor_core.cuh>
#include <prefillshare/train/cuda/kernels/attention.cuh>

namespace prefillshare::cuda::detail {

inline constexpr float kLog2E = 1.4426950408889634F;

// kDim: elements of a head; kOther: rows of the tile that is stepped over.
template <int kHeadDim, int kOtherRows>
struct MmaTile {
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = 64;  // 16 a warp
  static constexpr int kOther = kOtherRows;
  static constexpr int kThreads = 128;
  static constexpr int kStride = kHeadDim + 8;            // of shared rows: no two of eight in the same banks
  static constexpr int kPair = 2 * kOtherRows * kStride;  // elements of two tiles that are stepped over
  // Those of the next step come in while this one's are multiplied.
  static constexpr std::size_t kForwardShared = sizeof(__nv_bfloat16) * (kRows * kStride + 2 * kPair);
  static constexpr std::size_t kBackwardShared =
      sizeof(__nv_bfloat16) * (2 * kRows * kStride + 2 * kPair) + sizeof(float) * 4 * kOther;
};

[[nodiscard]] __device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Rows 0 .. kCount - 1 of a shared tile; from(row) gives where each lies, or null for zeros;
// `anywhere` is an address of the device's memory.
template <class Tile, int kCount, class From>
__device__ __forceinline__ void load_tile(__nv_bfloat16* to, const void* anywhere, From&& from) {
  constexpr int kVectors = Tile::kDim / 8;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kCount * kVectors; i += Tile::kThreads) {
    const int row = i / kVectors;
    const int at = i % kVectors * 8;
    const __nv_bfloat16* const source = from(row);
    copy_or_zero(shared_address(to + row * Tile::kStride + at), source == nullptr ? anywhere : source + at,
                 source != nullptr);
  }
}

// Copies a number into shared memory while the thread goes on, or writes zero there.
__device__ __forceinline__ void copy_number(float* to, const float* from, bool copy) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(copy ? 4 : 0)
               : "memory");
}

// a[16][16] of rows `row` on and columns `column` on.
template <class Tile>
__device__ __forceinline__ void load_a(unsigned (&out)[4], const __nv_bfloat16* tile, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices(out, shared_address(tile + (row + lane / 8 % 2 * 8 + lane % 8) * Tile::kStride + column +
                                    lane / 16 * 8));
}
// b[16][8] twice, of the transpose of rows `row` .. `row` + 15: two column tiles, each of two registers.
template <class Tile>
__device__ __forceinline__ void load_b_rows(unsigned (&out)[4], const __nv_bfloat16* tile, int row,
                                            int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices(out, shared_address(tile + (row + lane / 16 * 8 + lane % 8) * Tile::kStride + column +
                                    lane / 8 % 2 * 8));
}
// b[16][8] twice, of rows `row` .. `row` + 15 as they are and columns `column` .. `column` + 15.
template <class Tile>
__device__ __forceinline__ void load_b_columns(unsigned (&out)[4], const __nv_bfloat16* tile, int row,
                                               int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices_transposed(out, shared_address(tile + (row + lane / 8 % 2 * 8 + lane % 8) * Tile::kStride +
                                               column + lane / 16 * 8));
}

// d[16 rows of the warp][kCount rows of b] = a b^T over kDim.
template <class Tile, int kCount>
__device__ __forceinline__ void multiply_rows(float (&d)[kCount / 8][4], const __nv_bfloat16* a, int a_row,
                                              const __nv_bfloat16* b) {
#pragma unroll
  for (int n = 0; n < kCount / 8; ++n) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0.0F;
#pragma unroll
  for (int k = 0; k < Tile::kDim; k += 16) {
    unsigned left[4];
    load_a<Tile>(left, a, a_row, k);
#pragma unroll
    for (int n = 0; n < kCount; n += 16) {
      unsigned right[4];
      load_b_rows<Tile>(right, b, n, k);
      mma<ScalarType::kBFloat16>(d[n / 8], left, right[0], right[1]);
      mma<ScalarType::kBFloat16>(d[n / 8 + 1], left, right[2], right[3]);
    }
  }
}
// d[16 rows of the warp][kDim] += p b, p being what multiply_rows gave, rounded.
template <class Tile, int kCount>
__device__ __forceinline__ void multiply_add(float (&d)[Tile::kDim / 8][4], const float (&p)[kCount / 8][4],
                                             const __nv_bfloat16* b) {
#pragma unroll
  for (int k = 0; k < kCount; k += 16) {
    unsigned left[4];
    left[0] = pack<ScalarType::kBFloat16>(p[k / 8][0], p[k / 8][1]);
    left[1] = pack<ScalarType::kBFloat16>(p[k / 8][2], p[k / 8][3]);
    left[2] = pack<ScalarType::kBFloat16>(p[k / 8 + 1][0], p[k / 8 + 1][1]);
    left[3] = pack<ScalarType::kBFloat16>(p[k / 8 + 1][2], p[k / 8 + 1][3]);
#pragma unroll
    for (int n = 0; n < Tile::kDim; n += 16) {
      unsigned right[4];
      load_b_columns<Tile>(right, b, k, n);
      mma<ScalarType::kBFloat16>(d[n / 8], left, right[0], right[1]);
      mma<ScalarType::kBFloat16>(d[n / 8 + 1], left, right[2], right[3]);
    }
  }
}

// Four lanes hold a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFU, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFU, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, 2));
}

// Where a head's row of tile row r (query r / group, head r % group of KV head kv) lies.
struct GroupedRows {
  std::int64_t first;  // row of the segment's first query
  int group;
  int kv;
  int begin;  // of the tile
  int end;    // rows of the segment: count * group

  __device__ __forceinline__ bool has(int r) const { return begin + r < end; }
  __device__ __forceinline__ int query(int r) const { return (begin + r) / group; }
  __device__ __forceinline__ int head(int r) const { return kv * group + (begin + r) % group; }
  // Into [rows][heads].
  __device__ __forceinline__ std::int64_t item(int r, int heads) const {
    return (first + query(r)) * heads + head(r);
  }
  __device__ __forceinline__ std::int64_t element(int r, std::int64_t stride, int head_dim) const {
    return (first + query(r)) * stride + head(r) * head_dim;
  }
};

// Keys and values of KV head `kv` that a tile of query rows sees, in two stages: one is read while the other
// is brought.
template <class Tile>
struct KeyStages {
  using E = __nv_bfloat16;
  const AttentionArgs& a;
  const DeviceSegment& s;
  int kv;
  int keys;
  E* pairs;  // [2][k, v]

  __device__ __forceinline__ void load(int base, int stage) const {
    E* const to = pairs + stage * Tile::kPair;
    load_tile<Tile, Tile::kOther>(to, a.q, [&](int r) {
      return base + r < keys ? key_row<E>(a, s, base + r, kv, a.k, a.prefix_k) : nullptr;
    });
    load_tile<Tile, Tile::kOther>(to + Tile::kOther * Tile::kStride, a.q, [&](int r) {
      return base + r < keys ? key_row<E>(a, s, base + r, kv, a.v, a.prefix_v) : nullptr;
    });
    end_copy_group();
  }
  // The pair from key `base` on, which load() was called for; the one behind it is on its way then.
  __device__ __forceinline__ const E* take(int base, int stage) const {
    __syncthreads();  // the tiles before these are used up
    if (base + Tile::kOther < keys) {
      load(base + Tile::kOther, stage ^ 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    return pairs + stage * Tile::kPair;
  }
};

}  // namespace prefillshare::cuda::detail
