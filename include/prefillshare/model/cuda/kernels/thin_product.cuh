// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/kernels/thin_product.cuh - dense weights times a few tokens: a decode step reads
// every weight once, and this reads them as fast as memory gives them.
// Layer: model/cuda/kernels (device).
#pragma once

#include <cstdint>
#include <type_traits>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/model/cuda/kernels/scalars.cuh>

namespace prefillshare::cuda {

/// What becomes of the sums.
enum class ThinOutput : int {
  kStore,     ///< y = x W^T + bias, of the weights' type
  kStoreF32,  ///< y = x W^T, fp32
  kAddF32,    ///< y += x W^T, fp32
  kGated,     ///< y = silu(gate) * up, the gate being the first half of the rows of W
};

/// Everything that thin_product_kernel reads, by value. Pointers are to device memory, 16-byte aligned.
struct ThinProductArgs {
  const void* weights = nullptr;  // [rows][cols]
  const void* x = nullptr;        // [tokens][x_stride]
  const void* bias = nullptr;     // [rows] or null; for kStore
  void* y = nullptr;              // [tokens][y_stride]
  std::int64_t x_stride = 0;      // a multiple of 8
  std::int64_t y_stride = 0;
  ThinOutput output = ThinOutput::kStore;
  int rows = 0;  // a multiple of thin_rows<Tiles>
  int cols = 0;  // a multiple of kThinCols
  int tokens = 0;
};

inline constexpr int kThinWarps = 8;
inline constexpr int kThinThreads = kThinWarps * 32;
inline constexpr int kThinCols = 64;  // that a warp takes at a time
inline constexpr int kThinTokens = 8;
/// Rows of W that a block takes, all columns of them.
template <int Tiles>
inline constexpr int thin_rows = 16 * Tiles;

namespace detail {

// Weights are used once: they are not to push x out of the first-level cache.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(from));
  return out;
}

// sum[16][8] += a[16][16] b[16][8].
template <class T>
__device__ __forceinline__ void multiply_tile(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2,
                                              unsigned a3, unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

}  // namespace detail

/// A block takes 16 * Tiles rows of W, its warps every eighth piece of 64 columns of them; the warps' sums are
/// added in their order. Up to kThinTokens tokens.
///
/// A product of 16 rows and 16 columns does not care which columns they are, as long as x has the same: so a
/// thread takes eight columns that lie beside each other, 16 bytes, as its share of two such products. The
/// first pieces of W are asked for before the kernel in front has ended; those of x, each of which a block
/// reads once, are on their way together with the weights that they belong to.
template <class T, int Tiles>
__global__ void __launch_bounds__(kThinThreads, 2)
    thin_product_kernel(const __grid_constant__ ThinProductArgs a) {
  constexpr int kDepth = Tiles == 1 ? 4 : 2;  // pieces that are on their way
  constexpr int kRows = thin_rows<Tiles>;
  __shared__ float parts[kThinWarps][kThinTokens][kRows + 4];

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4;    // a row of each eight, and a token
  const int quarter = lane % 4;  // whose eight columns of each 32
  const int pieces = a.cols / kThinCols;
  // With a gate each tile has eight of its rows and the eight that they gate.
  const bool gated = a.output == ThinOutput::kGated;
  const int values = gated ? kRows / 2 : kRows;  // of a token, that this block makes
  const int first = static_cast<int>(blockIdx.x) * values;
  const auto row_of = [&](int tile, int half) {
    return first + group + (gated ? tile * 8 + half * (a.rows / 2) : tile * 16 + half * 8);
  };
  const T* rows[Tiles][2];
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[tile][half] = static_cast<const T*>(a.weights) +
                         static_cast<std::int64_t>(row_of(tile, half)) * a.cols + quarter * 8;
    }
  }
  uint4 held[kDepth][Tiles][2][2];  // piece, tile, upper or lower eight rows, columns below 32 or from 32 on
  const auto fetch = [&](uint4(&to)[Tiles][2][2], int piece) {
    if (piece >= pieces) return;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        to[tile][half][0] = detail::load_once(rows[tile][half] + piece * kThinCols);
        to[tile][half][1] = detail::load_once(rows[tile][half] + piece * kThinCols + 32);
      }
    }
  };
  uint4 tokens[kDepth][2];  // the same columns of x
  const T* const x = static_cast<const T*>(a.x) + group * a.x_stride + quarter * 8;
  const bool there = group < a.tokens;
  const auto fetch_tokens = [&](uint4(&to)[2], int piece) {
    if (piece >= pieces || !there) return;
    to[0] = *reinterpret_cast<const uint4*>(x + piece * kThinCols);
    to[1] = *reinterpret_cast<const uint4*>(x + piece * kThinCols + 32);
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    tokens[d][0] = tokens[d][1] = make_uint4(0, 0, 0, 0);
    fetch(held[d], warp + d * kThinWarps);
  }
  codegemm::cuda::detail::allow_next_kernel();
  codegemm::cuda::detail::wait_for_previous_kernel();
#pragma unroll
  for (int d = 0; d < kDepth; ++d) fetch_tokens(tokens[d], warp + d * kThinWarps);

  float sums[Tiles][4] = {};
  for (int begin = warp; begin < pieces; begin += kDepth * kThinWarps) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int piece = begin + d * kThinWarps;
      if (piece >= pieces) break;
      const uint4 low = tokens[d][0];
      const uint4 high = tokens[d][1];
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        auto& sum = sums[tile];
        const auto& w = held[d][tile];
        detail::multiply_tile<T>(sum, w[0][0].x, w[1][0].x, w[0][0].y, w[1][0].y, low.x, low.y);
        detail::multiply_tile<T>(sum, w[0][0].z, w[1][0].z, w[0][0].w, w[1][0].w, low.z, low.w);
        detail::multiply_tile<T>(sum, w[0][1].x, w[1][1].x, w[0][1].y, w[1][1].y, high.x, high.y);
        detail::multiply_tile<T>(sum, w[0][1].z, w[1][1].z, w[0][1].w, w[1][1].w, high.z, high.w);
      }
      fetch(held[d], piece + kDepth * kThinWarps);
      fetch_tokens(tokens[d], piece + kDepth * kThinWarps);
    }
  }
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      parts[warp][quarter * 2 + i % 2][tile * 16 + i / 2 * 8 + group] = sums[tile][i];
    }
  }
  __syncthreads();
  const auto sum_of = [&](int token, int row) {
    float sum = parts[0][token][row];
#pragma unroll
    for (int w = 1; w < kThinWarps; ++w) sum += parts[w][token][row];
    return sum;
  };
  for (int i = static_cast<int>(threadIdx.x); i < values * a.tokens; i += kThinThreads) {
    const int token = i / values;
    const int at = i % values;
    const std::int64_t to = token * a.y_stride + first + at;
    switch (a.output) {
      case ThinOutput::kGated: {
        const float gate = sum_of(token, at / 8 * 16 + at % 8);
        const float up = sum_of(token, at / 8 * 16 + 8 + at % 8);
        static_cast<T*>(a.y)[to] = static_cast<T>(gate / (1.0F + __expf(-gate)) * up);
        break;
      }
      case ThinOutput::kStore: {
        const float bias =
            a.bias == nullptr ? 0.0F : static_cast<float>(static_cast<const T*>(a.bias)[first + at]);
        static_cast<T*>(a.y)[to] = static_cast<T>(sum_of(token, at) + bias);
        break;
      }
      case ThinOutput::kStoreF32: static_cast<float*>(a.y)[to] = sum_of(token, at); break;
      case ThinOutput::kAddF32: static_cast<float*>(a.y)[to] += sum_of(token, at); break;
    }
  }
}

}  // namespace prefillshare::cuda
