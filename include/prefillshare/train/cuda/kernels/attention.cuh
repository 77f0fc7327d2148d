// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/attention.cuh - causal grouped-query attention over segments of a batch,
// each behind a prefix of constant keys and values, forward and backward; a warp a row, for fp32 and for
// head sizes that the tensor-core kernels do not take.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <prefillshare/train/cuda/kernels/row_norm.cuh>

namespace prefillshare::cuda::detail {

// Rows [first, first + count) of a batch, behind rows [prefix_first, prefix_first + prefix) of a cache.
struct DeviceSegment {
  std::int32_t first = 0;
  std::int32_t count = 0;
  std::int32_t prefix = 0;
  std::int32_t prefix_first = 0;
};

struct AttentionArgs {
  const void* q = nullptr;         // [rows][stride], heads of head_dim
  const void* k = nullptr;         // [rows][kv_stride], kv_heads of head_dim; null: all keys are in the cache
  const void* v = nullptr;         // the same
  const void* prefix_k = nullptr;  // [cache rows][prefix_stride]
  const void* prefix_v = nullptr;  // the same
  std::int64_t stride = 0;
  std::int64_t kv_stride = 0;
  std::int64_t prefix_stride = 0;
  const DeviceSegment* segments = nullptr;
  const std::int32_t* segment_of = nullptr;  // [rows]
  const std::int32_t* tiles = nullptr;       // [tiles][2]: segment and first row in it, see the kernel
  void* out = nullptr;                       // [rows][heads * head_dim]
  float* lse = nullptr;                      // [rows][heads], log of the sum of exp(scale * score); or null
  // Backward only.
  const void* dout = nullptr;  // [rows][heads * head_dim]
  void* dq = nullptr;          // [rows][stride]
  void* dk = nullptr;          // [rows][stride]
  void* dv = nullptr;          // [rows][stride]
  float* delta = nullptr;      // [rows][heads], written with dq, read for dk and dv
  std::int64_t rows = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  float scale = 0.0F;
};

inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = 32 * kAttentionWarps;
inline constexpr int kAttentionHead = 256;  // largest head
inline constexpr int kAttentionPerLane = kAttentionHead / 32;

// Row `key` of a segment's keys or values: the prefix first.
template <class S>
__device__ __forceinline__ const S* key_row(const AttentionArgs& a, const DeviceSegment& s, int key, int kv,
                                            const void* own, const void* prefix) {
  return key < s.prefix || own == nullptr
             ? static_cast<const S*>(prefix) + std::int64_t{s.prefix_first + key} * a.prefix_stride +
                   kv * a.head_dim
             : static_cast<const S*>(own) + std::int64_t{s.first + key - s.prefix} * a.kv_stride +
                   kv * a.head_dim;
}

template <class S>
__device__ __forceinline__ float dot_with(const float* shared, const S* row, int head_dim) {
  float sum = 0.0F;
  for (int d = 0; d < head_dim; d += 2) {
    const float2 pair = load2(row + d);
    sum += shared[d] * pair.x + shared[d + 1] * pair.y;
  }
  return sum;
}

// Writes a head's row to this warp's shared memory.
template <class S>
__device__ __forceinline__ void stage_row(float* shared, const S* row, int head_dim) {
  __syncwarp();
  for (int d = static_cast<int>(threadIdx.x) % 32; d < head_dim; d += 32) shared[d] = load1(row + d);
  __syncwarp();
}

// A warp's place in its block, and the row and head that it takes.
struct WarpItem {
  int lane;
  int warp;
  std::int64_t item;  // into [rows][heads]
  std::int64_t row;
  int head;
};
__device__ __forceinline__ WarpItem warp_item(int heads) {
  WarpItem out;
  out.lane = static_cast<int>(threadIdx.x) % 32;
  out.warp = static_cast<int>(threadIdx.x) / 32;
  out.item = static_cast<std::int64_t>(blockIdx.x) * kAttentionWarps + out.warp;
  out.row = out.item / heads;
  out.head = static_cast<int>(out.item - out.row * heads);
  return out;
}

// A warp takes a query row and a head.
template <class S>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_kernel(const __grid_constant__ AttentionArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ float queries[kAttentionWarps][kAttentionHead];
  const auto [lane, warp, item, row, head] = warp_item(a.heads);
  if (row >= a.rows) return;
  const int kv = head / (a.heads / a.kv_heads);
  const DeviceSegment s = a.segments[a.segment_of[row]];
  const int keys = s.prefix + static_cast<int>(row) - s.first + 1;
  float* const query = queries[warp];
  stage_row(query, static_cast<const S*>(a.q) + row * a.stride + head * a.head_dim, a.head_dim);
  float top = -INFINITY;
  float sum = 0.0F;
  float out[kAttentionPerLane] = {};
  for (int base = 0; base < keys; base += 32) {
    const int key = base + lane;
    float score = -INFINITY;
    if (key < keys) score = dot_with(query, key_row<S>(a, s, key, kv, a.k, a.prefix_k), a.head_dim) * a.scale;
    const float now = fmaxf(top, warp_max(score));
    const float p = key < keys ? __expf(score - now) : 0.0F;
    const float shrink = __expf(top - now);
    sum = sum * shrink + warp_sum(p);
    top = now;
#pragma unroll
    for (int i = 0; i < kAttentionPerLane; ++i) out[i] *= shrink;
    for (int j = 0; j < 32 && base + j < keys; ++j) {
      const float weight = __shfl_sync(0xFFFFFFFFU, p, j);
      const S* const value = key_row<S>(a, s, base + j, kv, a.v, a.prefix_v);
#pragma unroll
      for (int i = 0; i < kAttentionPerLane; ++i) {
        const int d = lane + 32 * i;
        if (d < a.head_dim) out[i] += weight * load1(value + d);
      }
    }
  }
  S* const to = static_cast<S*>(a.out) + item * a.head_dim;
#pragma unroll
  for (int i = 0; i < kAttentionPerLane; ++i) {
    const int d = lane + 32 * i;
    if (d < a.head_dim) store1(to + d, out[i] / sum);
  }
  if (a.lse != nullptr && lane == 0) a.lse[item] = top + logf(sum);
}

// The same for dq, and delta = the product of a row's output and its gradient.
template <class S>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_dq_kernel(const __grid_constant__ AttentionArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ float queries[kAttentionWarps][kAttentionHead];
  __shared__ float gradients[kAttentionWarps][kAttentionHead];
  const auto [lane, warp, item, row, head] = warp_item(a.heads);
  if (row >= a.rows) return;
  const int kv = head / (a.heads / a.kv_heads);
  const DeviceSegment s = a.segments[a.segment_of[row]];
  const int keys = s.prefix + static_cast<int>(row) - s.first + 1;
  float* const query = queries[warp];
  float* const gradient = gradients[warp];
  stage_row(query, static_cast<const S*>(a.q) + row * a.stride + head * a.head_dim, a.head_dim);
  stage_row(gradient, static_cast<const S*>(a.dout) + item * a.head_dim, a.head_dim);
  float delta = 0.0F;
  for (int d = lane; d < a.head_dim; d += 32)
    delta += gradient[d] * load1(static_cast<const S*>(a.out) + item * a.head_dim + d);
  delta = warp_sum(delta);
  if (lane == 0) a.delta[item] = delta;
  const float lse = a.lse[item];
  float dq[kAttentionPerLane] = {};
  for (int base = 0; base < keys; base += 32) {
    const int key = base + lane;
    float ds = 0.0F;
    if (key < keys) {
      const float score = dot_with(query, key_row<S>(a, s, key, kv, a.k, a.prefix_k), a.head_dim);
      const float dp = dot_with(gradient, key_row<S>(a, s, key, kv, a.v, a.prefix_v), a.head_dim);
      ds = __expf(score * a.scale - lse) * (dp - delta) * a.scale;
    }
    for (int j = 0; j < 32 && base + j < keys; ++j) {
      const float weight = __shfl_sync(0xFFFFFFFFU, ds, j);
      const S* const k = key_row<S>(a, s, base + j, kv, a.k, a.prefix_k);
#pragma unroll
      for (int i = 0; i < kAttentionPerLane; ++i) {
        const int d = lane + 32 * i;
        if (d < a.head_dim) dq[i] += weight * load1(k + d);
      }
    }
  }
  S* const to = static_cast<S*>(a.dq) + row * a.stride + head * a.head_dim;
#pragma unroll
  for (int i = 0; i < kAttentionPerLane; ++i) {
    const int d = lane + 32 * i;
    if (d < a.head_dim) store1(to + d, dq[i]);
  }
}

// A warp takes a key row that has a gradient and a KV head: all that its query heads add, in order.
template <class S>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_dkv_kernel(const __grid_constant__ AttentionArgs a) {
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ float keys[kAttentionWarps][kAttentionHead];
  __shared__ float values[kAttentionWarps][kAttentionHead];
  const auto [lane, warp, item, row, kv] = warp_item(a.kv_heads);
  if (row >= a.rows) return;
  const int group = a.heads / a.kv_heads;
  const DeviceSegment s = a.segments[a.segment_of[row]];
  float* const key = keys[warp];
  float* const value = values[warp];
  stage_row(key, static_cast<const S*>(a.k) + row * a.kv_stride + kv * a.head_dim, a.head_dim);
  stage_row(value, static_cast<const S*>(a.v) + row * a.kv_stride + kv * a.head_dim, a.head_dim);
  const std::int64_t end = s.first + s.count;
  float dk[kAttentionPerLane] = {};
  float dv[kAttentionPerLane] = {};
  for (int head = kv * group; head < (kv + 1) * group; ++head) {
    for (std::int64_t base = row; base < end; base += 32) {
      const std::int64_t r = base + lane;
      float p = 0.0F;
      float ds = 0.0F;
      if (r < end) {
        const std::int64_t at = r * a.heads + head;
        const float score =
            dot_with(key, static_cast<const S*>(a.q) + r * a.stride + head * a.head_dim, a.head_dim);
        const float dp = dot_with(value, static_cast<const S*>(a.dout) + at * a.head_dim, a.head_dim);
        p = __expf(score * a.scale - a.lse[at]);
        ds = p * (dp - a.delta[at]) * a.scale;
      }
      for (int j = 0; j < 32 && base + j < end; ++j) {
        const float weight = __shfl_sync(0xFFFFFFFFU, p, j);
        const float slope = __shfl_sync(0xFFFFFFFFU, ds, j);
        const S* const q = static_cast<const S*>(a.q) + (base + j) * a.stride + head * a.head_dim;
        const S* const d = static_cast<const S*>(a.dout) + ((base + j) * a.heads + head) * a.head_dim;
#pragma unroll
        for (int i = 0; i < kAttentionPerLane; ++i) {
          const int e = lane + 32 * i;
          if (e >= a.head_dim) continue;
          dv[i] += weight * load1(d + e);
          dk[i] += slope * load1(q + e);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kAttentionPerLane; ++i) {
    const int e = lane + 32 * i;
    if (e >= a.head_dim) continue;
    const std::int64_t to = row * a.kv_stride + kv * a.head_dim + e;
    store1(static_cast<S*>(a.dk) + to, dk[i]);
    store1(static_cast<S*>(a.dv) + to, dv[i]);
  }
}

}  // namespace prefillshare::cuda::detail
