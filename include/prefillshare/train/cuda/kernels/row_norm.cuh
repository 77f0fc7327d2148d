// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/row_norm.cuh - RMSNorm of rows of the residual stream, forward and
// backward, fused with the additions next to it.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <codegemm/cuda/block/intrinsics.cuh>

namespace prefillshare::cuda::detail {

using codegemm::cuda::detail::allow_next_kernel;
using codegemm::cuda::detail::wait_for_previous_kernel;

__device__ __forceinline__ float2 load2(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 load2(const __nv_bfloat16* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}
__device__ __forceinline__ void store2(float* to, float2 x) { *reinterpret_cast<float2*>(to) = x; }
__device__ __forceinline__ void store2(__nv_bfloat16* to, float2 x) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __float22bfloat162_rn(x);
}
__device__ __forceinline__ float load1(const float* from) { return *from; }
__device__ __forceinline__ float load1(const __nv_bfloat16* from) { return __bfloat162float(*from); }
__device__ __forceinline__ void store1(float* to, float x) { *to = x; }
__device__ __forceinline__ void store1(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// The same sum in every lane, in an order that never changes.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xFFFFFFFFU, x, lane);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, lane));
  return x;
}

inline constexpr int kNormThreads = 256;
inline constexpr int kNormPairs = 16;                   // of a thread, at most
inline constexpr int kNormFewPairs = 9;                 // of a thread, for rows of up to 576: fewer registers
inline constexpr int kNormWarpWidth = 64 * kNormPairs;  // widest row of one warp
inline constexpr int kNormWidth = kNormWarpWidth * kNormThreads / 32;  // widest row of a block
inline constexpr int kNormParts = 396;  // blocks of a backward pass, each with a sum of its own

// The sum over the threads of a row, where kWarps warps share it.
template <int kWarps>
__device__ __forceinline__ float row_sum(float x, float* shared) {
  x = warp_sum(x);
  if constexpr (kWarps > 1) {
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0F;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x += shared[warp];
  }
  return x;
}

struct NormArgs {
  const float* x = nullptr;              // [*][width]
  const void* delta = nullptr;           // [rows][width], added to x; or null
  float* sum = nullptr;                  // [rows][width], x + delta; or null. May be x
  const std::int32_t* chosen = nullptr;  // [rows]: row i reads x[chosen[i]]; null: x[i]
  const float* weight = nullptr;         // [width]
  void* out = nullptr;                   // [rows][width], normalized; null: the sum alone
  std::int64_t rows = 0;
  int width = 0;  // even
  float epsilon = 0.0F;
};

// sum = x + delta; out = weight * sum / rms(sum). kWarps: 1, or all warps of a block for wide rows.
template <class S, int kWarps, int kPairs>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const __grid_constant__ NormArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kStep = 32 * kWarps;
  __shared__ float shared[kNormThreads / 32];
  const int at = static_cast<int>(threadIdx.x) % kStep;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kNormThreads / kStep) + threadIdx.x / kStep;
  const bool live = row < a.rows;
  float2 value[kPairs];
  float squares = 0.0F;
  if (live) {
    const std::int64_t from = a.chosen == nullptr ? row : a.chosen[row];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = 2 * (at + i * kStep);
      value[i] = make_float2(0.0F, 0.0F);
      if (column >= a.width) continue;
      value[i] = load2(a.x + from * a.width + column);
      if (a.delta != nullptr) {
        const float2 d = load2(static_cast<const S*>(a.delta) + row * a.width + column);
        value[i].x += d.x;
        value[i].y += d.y;
      }
      if (a.sum != nullptr) store2(a.sum + row * a.width + column, value[i]);
      squares += value[i].x * value[i].x + value[i].y * value[i].y;
    }
  }
  squares = row_sum<kWarps>(squares, shared);
  if (!live || a.out == nullptr) return;
  const float inverse = 1.0F / sqrtf(squares / static_cast<float>(a.width) + a.epsilon);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int column = 2 * (at + i * kStep);
    if (column >= a.width) continue;
    const float2 w = load2(a.weight + column);
    store2(static_cast<S*>(a.out) + row * a.width + column,
           make_float2(value[i].x * inverse * w.x, value[i].y * inverse * w.y));
  }
}

struct NormBackwardArgs {
  const float* x = nullptr;              // [*][width], what was normalized
  const float* weight = nullptr;         // [width]
  const void* dy = nullptr;              // [rows][width], the gradient of the norm's output
  float* dx = nullptr;                   // [*][width], added to (or set) the gradient of x
  void* dx_low = nullptr;                // [*][width], a copy in S; or null
  const std::int32_t* chosen = nullptr;  // [rows]: row i of dy belongs to row chosen[i] of x and dx; or null
  float* parts = nullptr;                // [gridDim.x][width], of the weight's gradient; or null
  std::int64_t rows = 0;
  int width = 0;
  float epsilon = 0.0F;
  bool add = false;  // to dx
};

template <class S, int kWarps, int kPairs>
__global__ void __launch_bounds__(kNormThreads, kPairs <= kNormFewPairs ? 3 : 2)
    norm_backward_kernel(const __grid_constant__ NormBackwardArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kStep = 32 * kWarps;
  constexpr int kRows = kNormThreads / kStep;
  __shared__ float shared[kNormThreads / 32];
  const int at = static_cast<int>(threadIdx.x) % kStep;
  float2 sums[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) sums[i] = make_float2(0.0F, 0.0F);
  const std::int64_t mine = threadIdx.x / kStep;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRows; first < a.rows;
       first += static_cast<std::int64_t>(gridDim.x) * kRows) {
    const std::int64_t row = first + mine;
    const bool live = row < a.rows;
    const std::int64_t where = !live ? 0 : a.chosen == nullptr ? row : a.chosen[row];
    float2 x[kPairs];
    float2 d[kPairs];
    float squares = 0.0F;
    float along = 0.0F;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = 2 * (at + i * kStep);
      x[i] = d[i] = make_float2(0.0F, 0.0F);
      if (!live || column >= a.width) continue;
      x[i] = load2(a.x + where * a.width + column);
      d[i] = load2(static_cast<const S*>(a.dy) + row * a.width + column);
      const float2 w = load2(a.weight + column);
      squares += x[i].x * x[i].x + x[i].y * x[i].y;
      along += d[i].x * w.x * x[i].x + d[i].y * w.y * x[i].y;
    }
    squares = row_sum<kWarps>(squares, shared);
    along = row_sum<kWarps>(along, shared);
    const float inverse = 1.0F / sqrtf(squares / static_cast<float>(a.width) + a.epsilon);
    along *= inverse * inverse * inverse / static_cast<float>(a.width);
    if (!live) continue;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = 2 * (at + i * kStep);
      if (column >= a.width) continue;
      const float2 w = load2(a.weight + column);
      float2 out =
          make_float2(d[i].x * w.x * inverse - x[i].x * along, d[i].y * w.y * inverse - x[i].y * along);
      float* const to = a.dx + where * a.width + column;
      if (a.add) {
        const float2 old = load2(to);
        out.x += old.x;
        out.y += old.y;
      }
      store2(to, out);
      if (a.dx_low != nullptr) store2(static_cast<S*>(a.dx_low) + where * a.width + column, out);
      sums[i].x += d[i].x * x[i].x * inverse;
      sums[i].y += d[i].y * x[i].y * inverse;
    }
  }
  if (a.parts == nullptr) return;
  float* const part = a.parts + static_cast<std::int64_t>(blockIdx.x) * a.width;
  if constexpr (kWarps > 1) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = 2 * (at + i * kStep);
      if (column < a.width) store2(part + column, sums[i]);
    }
  } else {
    __shared__ float of_warps[kRows][64 * kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = 2 * (at + i * kStep);
      if (column < a.width) store2(&of_warps[mine][column], sums[i]);
    }
    __syncthreads();
    for (int column = static_cast<int>(threadIdx.x); column < a.width; column += kNormThreads) {
      float sum = 0.0F;
#pragma unroll
      for (int warp = 0; warp < kRows; ++warp) sum += of_warps[warp][column];
      part[column] = sum;
    }
  }
}

struct AddPartsArgs {
  const float* parts = nullptr;  // [groups][stride][width]
  float* out = nullptr;          // [groups][width], added to
  std::int64_t stride = 0;       // parts from one group to the next
  int count = 0;                 // parts of a group that are there
  int width = 0;
};

inline constexpr int kAddPartsThreads = 128;

// Block (x, y): some columns of group y. Parts are added in their order.
template <int>
__global__ void __launch_bounds__(kAddPartsThreads) add_parts_kernel(const __grid_constant__ AddPartsArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int column = static_cast<int>(blockIdx.x) * kAddPartsThreads + static_cast<int>(threadIdx.x);
  if (column >= a.width) return;
  const std::int64_t group = blockIdx.y;
  const float* const from = a.parts + group * a.stride * a.width + column;
  float sum = 0.0F;
#pragma unroll 8
  for (int part = 0; part < a.count; ++part) sum += from[static_cast<std::int64_t>(part) * a.width];
  a.out[group * a.width + column] += sum;
}

struct ColumnSumsArgs {
  const void* d = nullptr;  // [rows][width]
  float* parts = nullptr;   // [gridDim.y][width]
  std::int64_t rows = 0;
  int width = 0;
};

inline constexpr int kColumnParts = 64;

// Part y: the sums of rows y, y + gridDim.y, ...
template <class S>
__global__ void __launch_bounds__(kAddPartsThreads)
    column_sums_kernel(const __grid_constant__ ColumnSumsArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int column = static_cast<int>(blockIdx.x) * kAddPartsThreads + static_cast<int>(threadIdx.x);
  if (column >= a.width) return;
  float sum = 0.0F;
  for (std::int64_t row = blockIdx.y; row < a.rows; row += gridDim.y)
    sum += load1(static_cast<const S*>(a.d) + row * a.width + column);
  a.parts[static_cast<std::int64_t>(blockIdx.y) * a.width + column] = sum;
}

}  // namespace prefillshare::cuda::detail
