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

// One codebook of a layer: where its vectors are listed, and its centroids' gradients.
struct BookTask {
  float* to = nullptr;        // [centroids][v], added to
  std::int32_t task = 0;      // the layer
  std::int32_t book = 0;      // of the layer
  std::int32_t first = 0;     // place of its vectors in the lists
  std::int32_t count = 0;     // vectors
  std::int32_t centroid = 0;  // its first, of all centroids
  std::int32_t parts = 0;     // of each centroid
  std::int32_t part = 0;      // its first, of all parts
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

struct ListArgs {
  const CodesTask* tasks = nullptr;
  const BookTask* books = nullptr;  // [gridDim.y]
  std::uint16_t* codes = nullptr;   // by vector, books one after the other
  std::int32_t* places = nullptr;   // the same: the vector's first element, in [rows][cols] of its layer
  const std::uint16_t* sorted = nullptr;  // codes, ascending within a book
  std::int32_t* begins = nullptr;         // [centroids of all books + 1 for each book]
};

// The vectors of all books in the order of rows; a grid of (blocks, books).
template <int>
__global__ void __launch_bounds__(kComposeThreads) list_codes_kernel(const __grid_constant__ ListArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const BookTask b = args.books[blockIdx.y];
  const CodesTask t = args.tasks[b.task];
  const int vectors = t.cols / t.v;
  for (int i = static_cast<int>(blockIdx.x) * kComposeThreads + static_cast<int>(threadIdx.x); i < b.count;
       i += static_cast<int>(gridDim.x) * kComposeThreads) {
    const int row = i / vectors;
    const int j = i - row * vectors;
    args.codes[b.first + i] = t.codes[(static_cast<std::int64_t>(row) * t.m + b.book) * vectors + j];
    args.places[b.first + i] = row * t.cols + j * t.v;
  }
}

// Where each centroid's vectors begin among the sorted ones; a grid of (blocks, books).
template <int>
__global__ void __launch_bounds__(kComposeThreads)
    list_centroids_kernel(const __grid_constant__ ListArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const BookTask b = args.books[blockIdx.y];
  const int code = static_cast<int>(blockIdx.x) * kComposeThreads + static_cast<int>(threadIdx.x);
  if (code > args.tasks[b.task].centroids) return;
  const std::uint16_t* const codes = args.sorted + b.first;
  int low = 0;
  int high = b.count;
  while (low < high) {  // the first that is not below
    const int middle = low + (high - low) / 2;
    if (codes[middle] < code) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  args.begins[b.centroid + static_cast<int>(blockIdx.y) + code] = b.first + low;
}

inline constexpr int kCentroidThreads = 128;

struct CentroidPartsArgs {
  const CodesTask* tasks = nullptr;
  const BookTask* books = nullptr;
  const std::int32_t* blocks = nullptr;  // [gridDim.x][2]: book, part of the book
  const std::int32_t* places = nullptr;  // sorted by code within a book
  const std::int32_t* begins = nullptr;  // as ListArgs
  float* sums = nullptr;                 // [gridDim.x][kVectorMost]
};

// A block adds the vectors of a part: s * dW where the codes say one centroid, always in the same order.
template <int>
__global__ void __launch_bounds__(kCentroidThreads)
    centroid_parts_kernel(const __grid_constant__ CentroidPartsArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  __shared__ float shared[kCentroidThreads / 32][kVectorMost];
  const int number = args.blocks[2 * blockIdx.x];
  const BookTask b = args.books[number];
  const int part = args.blocks[2 * blockIdx.x + 1] - b.part;
  const CodesTask t = args.tasks[b.task];
  const std::int32_t* const begins = args.begins + b.centroid + number + part / b.parts;
  const std::int64_t first = begins[0];
  const std::int64_t uses = begins[1] - first;
  const auto begin = static_cast<int>(first + uses * (part % b.parts) / b.parts);
  const auto end = static_cast<int>(first + uses * (part % b.parts + 1) / b.parts);
  float sums[kVectorMost] = {};
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kCentroidThreads) {
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
  const CodesTask* tasks = nullptr;
  const BookTask* books = nullptr;  // [gridDim.y]
  const float* sums = nullptr;      // as CentroidPartsArgs
};

// kVectorMost threads a centroid; a grid of (blocks, books).
template <int>
__global__ void __launch_bounds__(kComposeThreads)
    centroid_sums_kernel(const __grid_constant__ CentroidSumsArgs args) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const BookTask b = args.books[blockIdx.y];
  const CodesTask t = args.tasks[b.task];
  const int number = static_cast<int>(blockIdx.x) * kComposeThreads + static_cast<int>(threadIdx.x);
  const int centroid = number / kVectorMost;
  const int e = number % kVectorMost;
  if (centroid >= t.centroids || e >= t.v) return;
  float sum = 0.0F;
  for (int part = 0; part < b.parts; ++part)
    sum += args.sums[(static_cast<std::int64_t>(b.part) + centroid * b.parts + part) * kVectorMost + e];
  b.to[centroid * t.v + e] += sum;
}

}  // namespace prefillshare::cuda::detail
