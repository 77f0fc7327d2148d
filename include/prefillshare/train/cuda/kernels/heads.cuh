// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/heads.cuh - what lies between the QKV projection and attention: bias, norm
// of each head, RoPE; forward and backward.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <prefillshare/model/cuda/kernels/scalars.cuh>
#include <prefillshare/train/cuda/kernels/row_norm.cuh>

namespace prefillshare::cuda::detail {

inline constexpr int kHeadThreads = 256;
inline constexpr int kHeadWarps = kHeadThreads / 32;
inline constexpr int kHeadMost = 256;              // elements of a head
inline constexpr int kHeadPairs = kHeadMost / 64;  // of a lane
inline constexpr int kHeadParts = 132;             // blocks of a backward pass with head norms

struct HeadsShape {
  const float* bias = nullptr;              // [(heads + 2 kv_heads) * head_dim], or null
  const float* q_norm = nullptr;            // [head_dim], or null
  const float* k_norm = nullptr;            // [head_dim], or null
  const float* cos = nullptr;               // [positions][head_dim / 2]
  const float* sin = nullptr;               // the same
  const std::int32_t* positions = nullptr;  // [rows]
  std::int64_t rows = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  float epsilon = 0.0F;
  bool half = true;  // RopeLayout::kHalf

  [[nodiscard]] __host__ __device__ std::int64_t width() const {
    return std::int64_t{heads + 2 * kv_heads} * head_dim;
  }
};

struct HeadsArgs {
  HeadsShape shape;
  const void* in = nullptr;  // [rows][width]: q, k, v of the projection
  void* q = nullptr;         // [rows][q_stride]; may be in
  void* k = nullptr;         // [rows][kv_stride]
  void* v = nullptr;         // [rows][kv_stride]
  std::int64_t q_stride = 0;
  std::int64_t kv_stride = 0;
  const std::int32_t* kv_rows = nullptr;  // [rows]: where k and v of each row go; null: to the same row
};

// Element of a head that pair `pair` begins with, and the other one's distance.
__device__ __forceinline__ int pair_begin(const HeadsShape& s, int pair) { return s.half ? pair : 2 * pair; }
__device__ __forceinline__ int pair_step(const HeadsShape& s) { return s.half ? s.head_dim / 2 : 1; }

// A warp takes one head of one row.
template <class S>
__global__ void __launch_bounds__(kHeadThreads) heads_kernel(const __grid_constant__ HeadsArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const HeadsShape& s = a.shape;
  const int all = s.heads + 2 * s.kv_heads;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kHeadWarps + threadIdx.x / 32;
  const std::int64_t row = item / all;
  if (row >= s.rows) return;
  const int head = static_cast<int>(item - row * all);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const S* const from = static_cast<const S*>(a.in) + row * s.width() + head * s.head_dim;
  const bool is_q = head < s.heads;
  const bool is_v = head >= s.heads + s.kv_heads;
  const std::int64_t kv_row = a.kv_rows == nullptr ? row : a.kv_rows[row];
  S* const to = is_q ? static_cast<S*>(a.q) + row * a.q_stride + head * s.head_dim
                : is_v
                    ? static_cast<S*>(a.v) + kv_row * a.kv_stride + (head - s.heads - s.kv_heads) * s.head_dim
                    : static_cast<S*>(a.k) + kv_row * a.kv_stride + (head - s.heads) * s.head_dim;
  if (is_v && s.bias == nullptr && to == from) return;
  const float* const bias = s.bias == nullptr ? nullptr : s.bias + head * s.head_dim;
  const int step = pair_step(s);
  const int pairs = s.head_dim / 2;
  float2 x[kHeadPairs];
  float squares = 0.0F;
#pragma unroll
  for (int i = 0; i < kHeadPairs; ++i) {
    const int pair = lane + 32 * i;
    if (pair >= pairs) continue;
    const int e = pair_begin(s, pair);
    x[i] = make_float2(load1(from + e), load1(from + e + step));
    if (bias != nullptr) {
      x[i].x += bias[e];
      x[i].y += bias[e + step];
    }
    squares += x[i].x * x[i].x + x[i].y * x[i].y;
  }
  const float* const weight = is_v ? nullptr : is_q ? s.q_norm : s.k_norm;
  float inverse = 1.0F;
  if (weight != nullptr)
    inverse = 1.0F / sqrtf(warp_sum(squares) / static_cast<float>(s.head_dim) + s.epsilon);
  const std::int64_t angle = static_cast<std::int64_t>(s.positions[row]) * pairs;
#pragma unroll
  for (int i = 0; i < kHeadPairs; ++i) {
    const int pair = lane + 32 * i;
    if (pair >= pairs) continue;
    const int e = pair_begin(s, pair);
    float2 out = x[i];
    if (weight != nullptr) {
      out.x *= inverse * weight[e];
      out.y *= inverse * weight[e + step];
    }
    if (!is_v) {
      const float cos = s.cos[angle + pair];
      const float sin = s.sin[angle + pair];
      out = make_float2(out.x * cos - out.y * sin, out.y * cos + out.x * sin);
    }
    store1(to + e, out.x);
    store1(to + e + step, out.y);
  }
}

// Where nothing but RoPE is to be done: eight elements of either half of a head a thread.
[[nodiscard]] inline bool turns_alone(const HeadsShape& s) {
  return s.bias == nullptr && s.q_norm == nullptr && s.half && s.head_dim % 16 == 0;
}

struct TurnArgs {
  HeadsArgs heads;
  float direction = 1.0F;  // -1: back, for gradients
  bool values = false;     // v is copied
};

template <class S>
__global__ void __launch_bounds__(kHeadThreads) turn_kernel(const __grid_constant__ TurnArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const HeadsArgs& a = args.heads;
  const HeadsShape& s = a.shape;
  const int of_head = s.head_dim / 16;
  const int of_row = (s.heads + (args.values ? 2 : 1) * s.kv_heads) * of_head;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x;
  const std::int64_t row = number / of_row;
  if (row >= s.rows) return;
  const int rest = static_cast<int>(number - row * of_row);
  const int head = rest / of_head;
  const int at = (rest - head * of_head) * 8;
  const int other = s.head_dim / 2;
  const S* const from = static_cast<const S*>(a.in) + row * s.width() + head * s.head_dim + at;
  float low[8];
  float high[8];
  load8(from, low);
  load8(from + other, high);
  const bool is_q = head < s.heads;
  const bool is_v = head >= s.heads + s.kv_heads;
  if (!is_v) {
    const std::int64_t angle = static_cast<std::int64_t>(s.positions[row]) * other + at;
    float cos[8];
    float sin[8];
    load8(s.cos + angle, cos);
    load8(s.sin + angle, sin);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = low[i];
      const float y = high[i];
      const float turn = args.direction * sin[i];
      low[i] = x * cos[i] - y * turn;
      high[i] = y * cos[i] + x * turn;
    }
  }
  const std::int64_t kv_row = a.kv_rows == nullptr ? row : a.kv_rows[row];
  S* to = static_cast<S*>(a.q) + row * a.q_stride + head * s.head_dim;
  if (!is_q) {
    const int kv = head - s.heads - (is_v ? s.kv_heads : 0);
    to = static_cast<S*>(is_v ? a.v : a.k) + kv_row * a.kv_stride + kv * s.head_dim;
  }
  store8(to + at, low);
  store8(to + at + other, high);
}

struct HeadsBackwardArgs {
  HeadsShape shape;
  const void* raw = nullptr;  // [rows][width], the projection before its bias; read with head norms
  void* d = nullptr;          // [rows][width]: gradients of q, k, v become those of the projection
  float* parts = nullptr;     // [gridDim.x][2: q, k][head_dim], of the norms' gradients; or null
};

// Warps stride over the q and k heads of all rows; v's gradient is the projection's already.
template <class S>
__global__ void __launch_bounds__(kHeadThreads)
    heads_backward_kernel(const __grid_constant__ HeadsBackwardArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ float of_warps[kHeadWarps][2 * kHeadMost];
  const HeadsShape& s = a.shape;
  const int all = s.heads + s.kv_heads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int step = pair_step(s);
  const int pairs = s.head_dim / 2;
  float2 sums[2][kHeadPairs] = {};
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kHeadWarps + warp; item < s.rows * all;
       item += static_cast<std::int64_t>(gridDim.x) * kHeadWarps) {
    const std::int64_t row = item / all;
    const int head = static_cast<int>(item - row * all);
    const bool is_q = head < s.heads;
    S* const d = static_cast<S*>(a.d) + row * s.width() + head * s.head_dim;
    const std::int64_t angle = static_cast<std::int64_t>(s.positions[row]) * pairs;
    float2 dy[kHeadPairs];
#pragma unroll
    for (int i = 0; i < kHeadPairs; ++i) {
      const int pair = lane + 32 * i;
      dy[i] = make_float2(0.0F, 0.0F);
      if (pair >= pairs) continue;
      const int e = pair_begin(s, pair);
      const float2 turned = make_float2(load1(d + e), load1(d + e + step));
      const float cos = s.cos[angle + pair];
      const float sin = -s.sin[angle + pair];
      dy[i] = make_float2(turned.x * cos - turned.y * sin, turned.y * cos + turned.x * sin);
    }
    const float* const weight = is_q ? s.q_norm : s.k_norm;
    if (weight != nullptr) {
      const S* const raw = static_cast<const S*>(a.raw) + row * s.width() + head * s.head_dim;
      const float* const bias = s.bias == nullptr ? nullptr : s.bias + head * s.head_dim;
      float2 x[kHeadPairs];
      float squares = 0.0F;
      float along = 0.0F;
#pragma unroll
      for (int i = 0; i < kHeadPairs; ++i) {
        const int pair = lane + 32 * i;
        x[i] = make_float2(0.0F, 0.0F);
        if (pair >= pairs) continue;
        const int e = pair_begin(s, pair);
        x[i] = make_float2(load1(raw + e), load1(raw + e + step));
        if (bias != nullptr) {
          x[i].x += bias[e];
          x[i].y += bias[e + step];
        }
        squares += x[i].x * x[i].x + x[i].y * x[i].y;
        along += dy[i].x * weight[e] * x[i].x + dy[i].y * weight[e + step] * x[i].y;
      }
      const float inverse = 1.0F / sqrtf(warp_sum(squares) / static_cast<float>(s.head_dim) + s.epsilon);
      along = warp_sum(along) * inverse * inverse * inverse / static_cast<float>(s.head_dim);
#pragma unroll
      for (int i = 0; i < kHeadPairs; ++i) {
        const int pair = lane + 32 * i;
        if (pair >= pairs) continue;
        const int e = pair_begin(s, pair);
        const float2 weighted = make_float2(dy[i].x * x[i].x * inverse, dy[i].y * x[i].y * inverse);
        // No index that is known at run time only: the sums stay in registers.
        sums[0][i].x += is_q ? weighted.x : 0.0F;
        sums[0][i].y += is_q ? weighted.y : 0.0F;
        sums[1][i].x += is_q ? 0.0F : weighted.x;
        sums[1][i].y += is_q ? 0.0F : weighted.y;
        dy[i].x = dy[i].x * weight[e] * inverse - x[i].x * along;
        dy[i].y = dy[i].y * weight[e + step] * inverse - x[i].y * along;
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadPairs; ++i) {
      const int pair = lane + 32 * i;
      if (pair >= pairs) continue;
      const int e = pair_begin(s, pair);
      store1(d + e, dy[i].x);
      store1(d + e + step, dy[i].y);
    }
  }
  if (a.parts == nullptr) return;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
#pragma unroll
    for (int i = 0; i < kHeadPairs; ++i) {
      const int pair = lane + 32 * i;
      if (pair >= pairs) continue;
      const int e = which * s.head_dim + pair_begin(s, pair);
      of_warps[warp][e] = sums[which][i].x;
      of_warps[warp][e + step] = sums[which][i].y;
    }
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < 2 * s.head_dim; e += kHeadThreads) {
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kHeadWarps; ++w) sum += of_warps[w][e];
    a.parts[static_cast<std::int64_t>(blockIdx.x) * 2 * s.head_dim + e] = sum;
  }
}

}  // namespace prefillshare::cuda::detail
