// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/kernels/rms_norm.cuh - RMSNorm of rows, and of heads in place.
// Layer: model/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/model/cuda/kernels/scalars.cuh>

namespace prefillshare::cuda {

/// Everything that rms_norm_kernel reads, by value. Pointers are to device memory, 16-byte aligned.
struct RmsNormArgs {
  const float* x = nullptr;                // [..][width], the residual stream
  const float* weight = nullptr;           // [width]
  void* out = nullptr;                     // [rows][width]
  const std::int32_t* row_ends = nullptr;  // [rows + 1]: row i is x's row_ends[i + 1] - 1; null: x's row i
  int width = 0;                           // a multiple of 8
  float epsilon = 0.0F;
};

inline constexpr int kRmsNormThreads = 512;

namespace detail {

// The sum over a block of Warps warps (a power of two), in every thread; always in the same order.
template <int Warps>
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float parts[Warps];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFU, value, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[threadIdx.x % Warps];
#pragma unroll
  for (int step = Warps / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFU, value, step);
  return value;
}

}  // namespace detail

/// A block takes a row. Up to Held * 8 * kRmsNormThreads columns stay in registers; columns beyond are read
/// twice.
template <class T, int Held>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_kernel(const __grid_constant__ RmsNormArgs a) {
  constexpr int kStep = kRmsNormThreads * 8;
  const int first = static_cast<int>(threadIdx.x) * 8;
  float weight[Held][8];
#pragma unroll
  for (int i = 0; i < Held; ++i) {
    const int at = first + i * kStep;
    if (at < a.width) detail::load8(a.weight + at, weight[i]);
  }
  // The product behind is to have its first weights by the time this one row is done.
  codegemm::cuda::detail::allow_next_kernel();
  codegemm::cuda::detail::wait_for_previous_kernel();
  const std::int64_t row = blockIdx.x;
  const std::int64_t from = a.row_ends == nullptr ? row : a.row_ends[row + 1] - 1;
  const float* const x = a.x + from * a.width;
  float held[Held][8];
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < Held; ++i) {
    const int at = first + i * kStep;
    if (at >= a.width) continue;
    detail::load8(x + at, held[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += held[i][j] * held[i][j];
  }
  for (int at = first + Held * kStep; at < a.width; at += kStep) {
    float more[8];
    detail::load8(x + at, more);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += more[j] * more[j];
  }
  const float scale =
      rsqrtf(detail::block_sum<kRmsNormThreads / 32>(sum) / static_cast<float>(a.width) + a.epsilon);
  T* const out = static_cast<T*>(a.out) + row * a.width;
#pragma unroll
  for (int i = 0; i < Held; ++i) {
    const int at = first + i * kStep;
    if (at >= a.width) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) held[i][j] = held[i][j] * scale * weight[i][j];
    detail::store8(out + at, held[i]);
  }
  for (int at = first + Held * kStep; at < a.width; at += kStep) {
    float more[8];
    float by[8];
    detail::load8(x + at, more);
    detail::load8(a.weight + at, by);
#pragma unroll
    for (int j = 0; j < 8; ++j) more[j] = more[j] * scale * by[j];
    detail::store8(out + at, more);
  }
}

/// Everything that head_norm_kernel reads, by value.
struct HeadNormArgs {
  void* x = nullptr;  // [rows][stride], its first q_heads + k_heads heads are normalized in place
  const float* q_weight = nullptr;  // [head_dim]
  const float* k_weight = nullptr;  // [head_dim]
  std::int64_t stride = 0;          // a multiple of 8
  std::int64_t rows = 0;
  int q_heads = 0;
  int k_heads = 0;
  int head_dim = 0;  // a multiple of 8
  float epsilon = 0.0F;
};

inline constexpr int kHeadNormThreads = 128;

/// A warp takes a head of a row.
template <class T>
__global__ void __launch_bounds__(kHeadNormThreads) head_norm_kernel(const __grid_constant__ HeadNormArgs a) {
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const std::int64_t number = (static_cast<std::int64_t>(blockIdx.x) * kHeadNormThreads + threadIdx.x) / 32;
  const int heads = a.q_heads + a.k_heads;
  if (number >= a.rows * heads) return;
  const int head = static_cast<int>(number % heads);
  T* const x =
      static_cast<T*>(a.x) + number / heads * a.stride + static_cast<std::int64_t>(head) * a.head_dim;
  const float* const weight = head < a.q_heads ? a.q_weight : a.k_weight;
  float sum = 0.0F;
  for (int at = static_cast<int>(threadIdx.x % 32) * 8; at < a.head_dim; at += 256) {
    float values[8];
    detail::load8(x + at, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += values[j] * values[j];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFU, sum, step);
  const float scale = rsqrtf(sum / static_cast<float>(a.head_dim) + a.epsilon);
  for (int at = static_cast<int>(threadIdx.x % 32) * 8; at < a.head_dim; at += 256) {
    float values[8];
    float by[8];
    detail::load8(x + at, values);
    detail::load8(weight + at, by);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = values[j] * scale * by[j];
    detail::store8(x + at, values);
  }
}

}  // namespace prefillshare::cuda
