// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/kernels/composed.cuh - weights that are made of parameters: low-rank deltas, and
// the codebooks and scales of fixed codes. Forward: the dense weights. Backward: from their gradient to the
// parameters'. One launch serves all layers of a model.
// Layer: train/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <prefillshare/train/cuda/kernels/row_norm.cuh>

namespace prefillshare::cuda::detail {

inline constexpr int kComposeThreads = 256;
inline constexpr int kComposeRows = 8;  // of a block: a warp each where rows are summed

// A layer W + scale * B A.
struct LowRankTask {
  const float* weight = nullptr;  // [rows][cols]
  const float* a = nullptr;       // [rank][cols]
  const float* b = nullptr;       // [rows][rank]
  void* out = nullptr;            // [rows][cols] in S
  const float* dw = nullptr;      // [rows][cols]
  float* da = nullptr;            // [rank][cols], added to
  float* db = nullptr;            // [rows][rank], added to
  float scale = 0.0F;
  std::int32_t rows = 0;
  std::int32_t cols = 0;
  std::int32_t rank = 0;
};

// A layer of codes: W[n,k] = s[n, k/g] * sum_c C_c[code_c[n, k/v]][k % v].
struct CodesTask {
  const std::uint16_t* codes = nullptr;  // [rows][m][cols / v]
  const float* books = nullptr;          // [m][centroids][v]
  const float* scales = nullptr;         // [rows][groups]
  void* out = nullptr;                   // [rows][cols] in S
  const float* dw = nullptr;             // [rows][cols]
  float* dscales = nullptr;              // [rows][groups], added to
  std::int32_t rows = 0;
  std::int32_t cols = 0;
  std::int32_t m = 0;
  std::int32_t centroids = 0;
  std::int32_t v = 0;
  std::int32_t group = 0;   // columns of a scale
  std::int32_t groups = 0;  // scales of a row
};

// Places [begin, end) of the vectors that some codes of one centroid stand for.
struct CentroidPart {
  std::int32_t task = 0;
  std::int32_t begin = 0;  // into places
  std::int32_t end = 0;
};
// A centroid's gradient is the sum of the parts [begin, end).
struct CentroidSum {
  float* to = nullptr;  // [v], added to
  std::int32_t begin = 0;
  std::int32_t end = 0;
  std::int32_t v = 0;
};

template <class Task>
struct ComposeArgs {
  const Task* tasks = nullptr;
  const std::int32_t* blocks = nullptr;  // [gridDim.x][2]: task, first row or column
};

// kComposeRows rows a block.
template <class S>
__global__ void __launch_bounds__(kComposeThreads)
    low_rank_kernel(const __grid_constant__ ComposeArgs<LowRankTask> args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const LowRankTask t = args.tasks[args.blocks[2 * blockIdx.x]];
  const int first = args.blocks[2 * blockIdx.x + 1];
  for (int k = 2 * static_cast<int>(threadIdx.x); k < t.cols; k += 2 * kComposeThreads) {
    float2 sums[kComposeRows];
#pragma unroll
    for (int i = 0; i < kComposeRows; ++i) sums[i] = make_float2(0.0F, 0.0F);
    for (int r = 0; r < t.rank; ++r) {
      const float2 a = load2(t.a + static_cast<std::int64_t>(r) * t.cols + k);
#pragma unroll
      for (int i = 0; i < kComposeRows; ++i) {
        if (first + i >= t.rows) continue;
        const float b = t.b[static_cast<std::int64_t>(first + i) * t.rank + r];
        sums[i].x += b * a.x;
        sums[i].y += b * a.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kComposeRows; ++i) {
      if (first + i >= t.rows) continue;
      const std::int64_t at = static_cast<std::int64_t>(first + i) * t.cols + k;
      const float2 w = load2(t.weight + at);
      store2(static_cast<S*>(t.out) + at, make_float2(sums[i].x * t.scale + w.x, sums[i].y * t.scale + w.y));
    }
  }
}

inline constexpr int kRankAtOnce = 8;

// db: a warp takes a row.
template <int>
__global__ void __launch_bounds__(kComposeThreads)
    low_rank_db_kernel(const __grid_constant__ ComposeArgs<LowRankTask> args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const LowRankTask t = args.tasks[args.blocks[2 * blockIdx.x]];
  const int row = args.blocks[2 * blockIdx.x + 1] + static_cast<int>(threadIdx.x) / 32;
  if (row >= t.rows) return;
  const float* const dw = t.dw + static_cast<std::int64_t>(row) * t.cols;
  for (int first = 0; first < t.rank; first += kRankAtOnce) {
    float sums[kRankAtOnce] = {};
    for (int k = static_cast<int>(threadIdx.x) % 32; k < t.cols; k += 32) {
      const float d = dw[k];
#pragma unroll
      for (int i = 0; i < kRankAtOnce; ++i) {
        if (first + i < t.rank) sums[i] += d * t.a[static_cast<std::int64_t>(first + i) * t.cols + k];
      }
    }
#pragma unroll
    for (int i = 0; i < kRankAtOnce; ++i) {
      const float sum = warp_sum(sums[i]);
      if (threadIdx.x % 32 == 0 && first + i < t.rank)
        t.db[static_cast<std::int64_t>(row) * t.rank + first + i] += sum * t.scale;
    }
  }
}

// da: a thread takes a column; blocks name the first of their kComposeThreads.
template <int>
__global__ void __launch_bounds__(kComposeThreads)
    low_rank_da_kernel(const __grid_constant__ ComposeArgs<LowRankTask> args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const LowRankTask t = args.tasks[args.blocks[2 * blockIdx.x]];
  const int k = args.blocks[2 * blockIdx.x + 1] + static_cast<int>(threadIdx.x);
  if (k >= t.cols) return;
  for (int first = 0; first < t.rank; first += kRankAtOnce) {
    float sums[kRankAtOnce] = {};
#pragma unroll 4
    for (int n = 0; n < t.rows; ++n) {
      const float d = t.dw[static_cast<std::int64_t>(n) * t.cols + k];
#pragma unroll
      for (int i = 0; i < kRankAtOnce; ++i) {
        if (first + i < t.rank) sums[i] += d * t.b[static_cast<std::int64_t>(n) * t.rank + first + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kRankAtOnce; ++i) {
      if (first + i < t.rank) t.da[static_cast<std::int64_t>(first + i) * t.cols + k] += sums[i] * t.scale;
    }
  }
}

inline constexpr int kVectorMost = 16;  // elements of a vector

// Vector j of a row without its scale.
__device__ __forceinline__ void unscaled_vector(const CodesTask& t, int row, int j,
                                                float (&out)[kVectorMost]) {
  const int vectors = t.cols / t.v;
  const std::uint16_t* const codes = t.codes + static_cast<std::int64_t>(row) * t.m * vectors + j;
#pragma unroll
  for (int e = 0; e < kVectorMost; ++e) out[e] = 0.0F;
  for (int c = 0; c < t.m; ++c) {
    const float* const centroid =
        t.books +
        (static_cast<std::int64_t>(c) * t.centroids + codes[static_cast<std::int64_t>(c) * vectors]) * t.v;
#pragma unroll
    for (int e = 0; e < kVectorMost; e += 2) {
      if (e >= t.v) break;
      const float2 pair = load2(centroid + e);
      out[e] += pair.x;
      out[e + 1] += pair.y;
    }
  }
}

// kComposeRows rows a block.
template <class S>
__global__ void __launch_bounds__(kComposeThreads)
    codes_kernel(const __grid_constant__ ComposeArgs<CodesTask> args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const CodesTask t = args.tasks[args.blocks[2 * blockIdx.x]];
  const int first = args.blocks[2 * blockIdx.x + 1];
  const int vectors = t.cols / t.v;
  const int items = min(kComposeRows, t.rows - first) * vectors;
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kComposeThreads) {
    const int row = first + i / vectors;
    const int j = i % vectors;
    float w[kVectorMost];
    unscaled_vector(t, row, j, w);
    const float scale = t.scales[static_cast<std::int64_t>(row) * t.groups + j * t.v / t.group];
    S* const to = static_cast<S*>(t.out) + static_cast<std::int64_t>(row) * t.cols + j * t.v;
#pragma unroll
    for (int e = 0; e < kVectorMost; e += 2) {
      if (e < t.v) store2(to + e, make_float2(w[e] * scale, w[e + 1] * scale));
    }
  }
}

// The gradients of scales: a warp takes a row.
template <int>
__global__ void __launch_bounds__(kComposeThreads)
    codes_dscales_kernel(const __grid_constant__ ComposeArgs<CodesTask> args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const CodesTask t = args.tasks[args.blocks[2 * blockIdx.x]];
  const int row = args.blocks[2 * blockIdx.x + 1] + static_cast<int>(threadIdx.x) / 32;
  if (row >= t.rows) return;
  const float* const dw = t.dw + static_cast<std::int64_t>(row) * t.cols;
  for (int g = 0; g < t.groups; ++g) {
    const int end = min(t.cols, (g + 1) * t.group) / t.v;
    float sum = 0.0F;
    for (int j = g * t.group / t.v + static_cast<int>(threadIdx.x) % 32; j < end; j += 32) {
      float w[kVectorMost];
      unscaled_vector(t, row, j, w);
#pragma unroll
      for (int e = 0; e < kVectorMost; e += 2) {
        if (e >= t.v) break;
        const float2 d = load2(dw + j * t.v + e);
        sum += d.x * w[e] + d.y * w[e + 1];
      }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) t.dscales[static_cast<std::int64_t>(row) * t.groups + g] += sum;
  }
}

inline constexpr int kCentroidThreads = 128;

struct CentroidPartsArgs {
  const CodesTask* tasks = nullptr;
  const CentroidPart* parts = nullptr;   // [gridDim.x]
  const std::int32_t* places = nullptr;  // first elements of vectors, in [rows][cols] of their layers
  float* sums = nullptr;                 // [gridDim.x][kVectorMost]
};

// A block adds the vectors of a part: s * dW where the codes say one centroid, always in the same order.
template <int>
__global__ void __launch_bounds__(kCentroidThreads)
    centroid_parts_kernel(const __grid_constant__ CentroidPartsArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ float shared[kCentroidThreads / 32][kVectorMost];
  const CentroidPart part = args.parts[blockIdx.x];
  const CodesTask t = args.tasks[part.task];
  float sums[kVectorMost] = {};
  for (int i = part.begin + static_cast<int>(threadIdx.x); i < part.end; i += kCentroidThreads) {
    const int place = args.places[i];
    const int row = place / t.cols;
    const int k = place - row * t.cols;
    const float scale = t.scales[static_cast<std::int64_t>(row) * t.groups + k / t.group];
#pragma unroll
    for (int e = 0; e < kVectorMost; e += 2) {
      if (e >= t.v) break;
      const float2 d = load2(t.dw + place + e);
      sums[e] += d.x * scale;
      sums[e + 1] += d.y * scale;
    }
  }
#pragma unroll
  for (int e = 0; e < kVectorMost; ++e) {
    const float sum = warp_sum(sums[e]);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][e] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kVectorMost) return;
  float sum = 0.0F;
#pragma unroll
  for (int w = 0; w < kCentroidThreads / 32; ++w) sum += shared[w][threadIdx.x];
  args.sums[static_cast<std::int64_t>(blockIdx.x) * kVectorMost + threadIdx.x] = sum;
}

struct CentroidSumsArgs {
  const CentroidSum* centroids = nullptr;  // [count]
  const float* sums = nullptr;             // as CentroidPartsArgs
  std::int64_t count = 0;
};

// kVectorMost threads a centroid.
template <int>
__global__ void __launch_bounds__(kComposeThreads)
    centroid_sums_kernel(const __grid_constant__ CentroidSumsArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kComposeThreads + threadIdx.x;
  if (number / kVectorMost >= args.count) return;
  const CentroidSum c = args.centroids[number / kVectorMost];
  const int e = static_cast<int>(number % kVectorMost);
  if (e >= c.v) return;
  float sum = 0.0F;
  for (int part = c.begin; part < c.end; ++part)
    sum += args.sums[static_cast<std::int64_t>(part) * kVectorMost + e];
  c.to[e] += sum;
}

}  // namespace prefillshare::cuda::detail
