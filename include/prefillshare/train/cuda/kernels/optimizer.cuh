// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/optimizer.cuh - the end of a step over all parameters at once: the norm of
// the gradient, whether all is finite, and AdamW.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <prefillshare/model/cuda/kernels/scalars.cuh>
#include <prefillshare/train/cuda/kernels/row_norm.cuh>

namespace prefillshare::cuda::detail {

inline constexpr int kOptimizerThreads = 256;
inline constexpr int kSquareParts = 1056;  // blocks of the norm

// What the end of a step knows, on the device and, after it, on the host.
struct StepState {
  double squares = 0.0;     // of the gradient, before clipping
  double loss = 0.0;        // sum over the target tokens
  float factor = 0.0F;      // of the gradient: clipping
  std::int32_t finite = 0;  // losses and gradient; else nothing is updated
};

struct SquaresArgs {
  const float* values = nullptr;  // [size]
  double* parts = nullptr;        // [gridDim.x]
  std::int64_t size = 0;          // a multiple of 4
};

template <int>
__global__ void __launch_bounds__(kOptimizerThreads) squares_kernel(const __grid_constant__ SquaresArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ double shared[kOptimizerThreads / 32];
  double sum = 0.0;
  for (std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kOptimizerThreads + threadIdx.x) * 4;
       at < a.size; at += static_cast<std::int64_t>(gridDim.x) * kOptimizerThreads * 4) {
    const float4 g = *reinterpret_cast<const float4*>(a.values + at);
    sum += static_cast<double>(g.x * g.x + g.y * g.y + (g.z * g.z + g.w * g.w));
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xFFFFFFFFU, sum, lane);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0;
#pragma unroll
  for (int w = 0; w < kOptimizerThreads / 32; ++w) sum += shared[w];
  a.parts[blockIdx.x] = sum;
}

struct FinishStepArgs {
  const double* parts = nullptr;  // [count], of squares
  const float* losses = nullptr;  // [loss_count]
  StepState* state = nullptr;
  std::int64_t loss_count = 0;
  int count = 0;
  double clip = 0.0;  // 0: none
};

// One block.
template <int>
__global__ void __launch_bounds__(kOptimizerThreads)
    finish_step_kernel(const __grid_constant__ FinishStepArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ double shared[2][kOptimizerThreads];
  double squares = 0.0;
  double loss = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < a.count; i += kOptimizerThreads) squares += a.parts[i];
  for (std::int64_t i = threadIdx.x; i < a.loss_count; i += kOptimizerThreads)
    loss += static_cast<double>(a.losses[i]);
  shared[0][threadIdx.x] = squares;
  shared[1][threadIdx.x] = loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  squares = loss = 0.0;
  for (int i = 0; i < kOptimizerThreads; ++i) {
    squares += shared[0][i];
    loss += shared[1][i];
  }
  a.state->squares = squares;
  a.state->loss = loss;
  a.state->finite = isfinite(squares) && isfinite(loss) ? 1 : 0;
  const double norm = sqrt(squares);
  a.state->factor = a.clip > 0.0 && norm > a.clip ? static_cast<float>(a.clip / norm) : 1.0F;
}

struct AdamWArgs {
  float* values = nullptr;           // [size]
  const float* gradients = nullptr;  // [size]
  float* first = nullptr;            // [size], mean gradients
  float* second = nullptr;           // [size], mean squares
  void* low = nullptr;               // [decayed], the values in S; or null
  const StepState* state = nullptr;
  const float* shares = nullptr;  // [size / 4], of the rate; or null: 1
  std::int64_t size = 0;          // a multiple of 4
  std::int64_t decayed = 0;       // weight decay acts on the first so many; a multiple of 4
  float beta1 = 0.0F;
  float beta2 = 0.0F;
  float epsilon = 0.0F;
  float root = 0.0F;    // 1 / sqrt(1 - beta2^t)
  float rate = 0.0F;    // learning rate / (1 - beta1^t)
  float shrink = 0.0F;  // 1 - learning rate * weight decay
};

// Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, in the order of operations of AdamW::update().
template <class S>
__global__ void __launch_bounds__(kOptimizerThreads) adamw_kernel(const __grid_constant__ AdamWArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  if (a.state->finite == 0) return;
  const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kOptimizerThreads + threadIdx.x) * 4;
  if (at >= a.size) return;
  const float factor = a.state->factor;
  const float share = a.shares == nullptr ? 1.0F : a.shares[at / 4];
  const float rate = a.rate * share;
  const float shrink = at < a.decayed ? a.shrink : 1.0F;
  const float4 g4 = *reinterpret_cast<const float4*>(a.gradients + at);
  const float4 v4 = *reinterpret_cast<const float4*>(a.values + at);
  const float4 m4 = *reinterpret_cast<const float4*>(a.first + at);
  const float4 s4 = *reinterpret_cast<const float4*>(a.second + at);
  const float g[4] = {g4.x, g4.y, g4.z, g4.w};
  float value[4] = {v4.x, v4.y, v4.z, v4.w};
  float m[4] = {m4.x, m4.y, m4.z, m4.w};
  float v[4] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float gradient = g[i] * factor;
    m[i] = m[i] * a.beta1 + gradient * (1.0F - a.beta1);
    v[i] = v[i] * a.beta2 + gradient * gradient * (1.0F - a.beta2);
    value[i] = value[i] * shrink - m[i] * rate / (sqrtf(v[i]) * a.root + a.epsilon);
  }
  *reinterpret_cast<float4*>(a.values + at) = make_float4(value[0], value[1], value[2], value[3]);
  *reinterpret_cast<float4*>(a.first + at) = make_float4(m[0], m[1], m[2], m[3]);
  *reinterpret_cast<float4*>(a.second + at) = make_float4(v[0], v[1], v[2], v[3]);
  if (a.low != nullptr && at < a.decayed) {
    S* const low = static_cast<S*>(a.low) + at;
    store2(low, make_float2(value[0], value[1]));
    store2(low + 2, make_float2(value[2], value[3]));
  }
}

}  // namespace prefillshare::cuda::detail
