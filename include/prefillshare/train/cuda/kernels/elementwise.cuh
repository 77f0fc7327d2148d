// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/elementwise.cuh - SwiGLU backward, the gradient of the embedding table,
// cross entropy, distillation, and rounding.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <prefillshare/model/cuda/kernels/scalars.cuh>
#include <prefillshare/train/cuda/kernels/row_norm.cuh>

namespace prefillshare::cuda::detail {

inline constexpr int kElementThreads = 256;

struct SwiGluBackwardArgs {
  const void* d = nullptr;  // [rows][width], the gradient of silu(gate) * up
  void* both = nullptr;     // [rows][2 * width]: gate and up become their gradients
  std::int64_t rows = 0;
  int width = 0;  // a multiple of 8
};

template <class S>
__global__ void __launch_bounds__(kElementThreads)
    swiglu_backward_kernel(const __grid_constant__ SwiGluBackwardArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int parts = a.width / 8;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  const std::int64_t row = number / parts;
  if (row >= a.rows) return;
  const int at = static_cast<int>(number - row * parts) * 8;
  S* const both = static_cast<S*>(a.both) + row * 2 * a.width + at;
  float d[8];
  float gate[8];
  float up[8];
  load8(static_cast<const S*>(a.d) + row * a.width + at, d);
  load8(static_cast<const S*>(both), gate);
  load8(static_cast<const S*>(both + a.width), up);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float sigmoid = 1.0F / (1.0F + __expf(-gate[i]));
    const float of_up = d[i] * gate[i] * sigmoid;
    gate[i] = d[i] * up[i] * sigmoid * (1.0F + gate[i] * (1.0F - sigmoid));
    up[i] = of_up;
  }
  store8(both, gate);
  store8(both + a.width, up);
}

struct EmbedBackwardArgs {
  const float* d = nullptr;                 // [rows][width]
  float* gradient = nullptr;                // [vocab][width], added to
  const std::int32_t* ids = nullptr;        // [gridDim.x], the tokens that occur
  const std::int32_t* row_begin = nullptr;  // [gridDim.x + 1], into rows
  const std::int32_t* rows = nullptr;       // where each of them occurs, ascending
  int width = 0;
};

// A block takes a token and adds the rows where it occurs, in order.
template <int>
__global__ void __launch_bounds__(kElementThreads)
    embed_backward_kernel(const __grid_constant__ EmbedBackwardArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int begin = a.row_begin[blockIdx.x];
  const int end = a.row_begin[blockIdx.x + 1];
  if (begin == end) return;
  float* const to = a.gradient + static_cast<std::int64_t>(a.ids[blockIdx.x]) * a.width;
  for (int column = static_cast<int>(threadIdx.x); column < a.width; column += kElementThreads) {
    float sum = 0.0F;
#pragma unroll 4
    for (int i = begin; i < end; ++i) sum += a.d[static_cast<std::int64_t>(a.rows[i]) * a.width + column];
    to[column] += sum;
  }
}

// Of a batch: read by kernels, since a graph may be replayed for others.
struct LossNumbers {
  float scale = 0.0F;        // of the gradient
  std::int32_t count = 0;    // loss rows; those behind have no gradient
  float label_share = 0.0F;  // of the labels beside a teacher
};

struct CrossEntropyArgs {
  const float* logits = nullptr;         // [gridDim.x][stride]
  const std::int32_t* labels = nullptr;  // [gridDim.x]
  float* losses = nullptr;               // [gridDim.x], -log p(label)
  void* d = nullptr;                     // [gridDim.x][stride], scale * (softmax - one hot); or null
  std::int64_t stride = 0;
  const LossNumbers* numbers = nullptr;
  int first = 0;  // loss row of the first block
  int vocab = 0;
};

inline constexpr int kCrossEntropyThreads = 512;

// The largest of some logits and the sum of their exponentials behind it.
struct SoftmaxPart {
  float top = -INFINITY;
  float total = 0.0F;

  __device__ __forceinline__ void add(const SoftmaxPart& other) {
    const float most = fmaxf(top, other.top);
    if (most == -INFINITY) return;  // neither has any
    total = total * __expf(top - most) + other.total * __expf(other.top - most);
    top = most;
  }
};

// Over the vocab logits at `row`, a multiple of 16 bytes, by a whole block; the same in every thread.
__device__ __forceinline__ SoftmaxPart block_softmax(const float* row, int vocab) {
  constexpr int kWarps = kCrossEntropyThreads / 32;
  __shared__ SoftmaxPart parts[kWarps];
  const int whole = vocab / 4 * 4;
  SoftmaxPart mine;
  for (int i = static_cast<int>(threadIdx.x) * 4; i < whole; i += 4 * kCrossEntropyThreads) {
    const float4 x = *reinterpret_cast<const float4*>(row + i);
    const float most = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    if (most > mine.top) {
      mine.total *= __expf(mine.top - most);
      mine.top = most;
    }
    mine.total +=
        __expf(x.x - mine.top) + __expf(x.y - mine.top) + __expf(x.z - mine.top) + __expf(x.w - mine.top);
  }
  for (int i = whole + static_cast<int>(threadIdx.x); i < vocab; i += kCrossEntropyThreads)
    mine.add({row[i], 1.0F});
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    SoftmaxPart other;
    other.top = __shfl_down_sync(0xFFFFFFFFU, mine.top, lane);
    other.total = __shfl_down_sync(0xFFFFFFFFU, mine.total, lane);
    mine.add(other);
  }
  __syncthreads();  // a call before this one may still read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  SoftmaxPart all = parts[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) all.add(parts[w]);
  return all;
}

// A block takes a row, at a multiple of 16 bytes. Columns of d from vocab to stride become 0.
template <class S>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const float* const row = a.logits + blockIdx.x * a.stride;
  const SoftmaxPart all = block_softmax(row, a.vocab);
  const int label = a.labels[blockIdx.x];
  if (threadIdx.x == 0) a.losses[blockIdx.x] = logf(all.total) + all.top - row[label];
  if (a.d == nullptr) return;
  S* const d = static_cast<S*>(a.d) + blockIdx.x * a.stride;
  const bool padding = a.first + static_cast<int>(blockIdx.x) >= a.numbers->count;
  const float scale = padding ? 0.0F : a.numbers->scale;
  const float factor = scale / all.total;
  const auto slope = [&](float x, int i) {
    return i >= a.vocab ? 0.0F : __expf(x - all.top) * factor - (i == label ? scale : 0.0F);
  };
  for (int i = static_cast<int>(threadIdx.x) * 4; i < a.stride; i += 4 * kCrossEntropyThreads) {
    const float4 x = *reinterpret_cast<const float4*>(row + i);
    store2(d + i, make_float2(slope(x.x, i), slope(x.y, i + 1)));
    store2(d + i + 2, make_float2(slope(x.z, i + 2), slope(x.w, i + 3)));
  }
}

struct DistillationArgs {
  const float* logits = nullptr;         // [gridDim.x][stride], the student's
  const float* teacher = nullptr;        // [gridDim.x][stride]
  const std::int32_t* labels = nullptr;  // [gridDim.x]
  // [gridDim.x]: (1 - s) sum of p log(p / q) - s log q(label), with p the teacher's softmax, q the student's
  // and s the labels' share.
  float* losses = nullptr;
  void* d = nullptr;  // [gridDim.x][stride], scale * (q - (1 - s) p - s (one hot)); or null
  std::int64_t stride = 0;
  const LossNumbers* numbers = nullptr;
  int first = 0;  // loss row of the first block
  int vocab = 0;
};

// As cross_entropy_kernel.
template <class S>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    distillation_kernel(const __grid_constant__ DistillationArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const float* const row = a.logits + blockIdx.x * a.stride;
  const float* const teacher = a.teacher + blockIdx.x * a.stride;
  const SoftmaxPart q = block_softmax(row, a.vocab);
  const SoftmaxPart p = block_softmax(teacher, a.vocab);
  const float q_log = logf(q.total) + q.top;
  const float p_log = logf(p.total) + p.top;
  S* const d = a.d == nullptr ? nullptr : static_cast<S*>(a.d) + blockIdx.x * a.stride;
  const bool padding = a.first + static_cast<int>(blockIdx.x) >= a.numbers->count;
  const float scale = padding ? 0.0F : a.numbers->scale;
  const float of_label = a.numbers->label_share;
  const int label = a.labels[blockIdx.x];
  float loss = 0.0F;
  const auto slope = [&](float x, float t, int i) {
    if (i >= a.vocab) return 0.0F;
    const float log_p = t - p_log;
    const float log_q = x - q_log;
    const float chance = __expf(log_p) * (1.0F - of_label);
    loss += chance * (log_p - log_q) - (i == label ? of_label * log_q : 0.0F);
    return (__expf(log_q) - chance - (i == label ? of_label : 0.0F)) * scale;
  };
  for (int i = static_cast<int>(threadIdx.x) * 4; i < a.stride; i += 4 * kCrossEntropyThreads) {
    const float4 x = *reinterpret_cast<const float4*>(row + i);
    const float4 t = *reinterpret_cast<const float4*>(teacher + i);
    const float2 low = make_float2(slope(x.x, t.x, i), slope(x.y, t.y, i + 1));
    const float2 high = make_float2(slope(x.z, t.z, i + 2), slope(x.w, t.w, i + 3));
    if (d == nullptr) continue;
    store2(d + i, low);
    store2(d + i + 2, high);
  }
  __shared__ float sums[kCrossEntropyThreads / 32];
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  loss = 0.0F;
  for (int w = 0; w < kCrossEntropyThreads / 32; ++w) loss += sums[w];
  a.losses[blockIdx.x] = loss;
}

struct ZeroArgs {
  uint4* to = nullptr;    // [size]
  std::int64_t size = 0;  // of 16 bytes each
};

template <int>
__global__ void __launch_bounds__(kElementThreads) zero_kernel(const __grid_constant__ ZeroArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at < a.size) a.to[at] = make_uint4(0, 0, 0, 0);
}

struct RoundArgs {
  const float* from = nullptr;  // [size]
  void* to = nullptr;           // [size]
  std::int64_t size = 0;        // a multiple of 8
};

template <class S>
__global__ void __launch_bounds__(kElementThreads) round_kernel(const __grid_constant__ RoundArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * 8;
  if (at >= a.size) return;
  float values[8];
  load8(a.from + at, values);
  store8(static_cast<S*>(a.to) + at, values);
}

}  // namespace prefillshare::cuda::detail
