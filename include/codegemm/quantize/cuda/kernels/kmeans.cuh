// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/kernels/kmeans.cuh - k-means: nearest centroids, sums of their vectors, rows coded
// without H and the scales that fit their codes. With the host's operations in the host's order, but for sums
// in double.
// Layer: quantize/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <codegemm/quantize/cuda/kernels/rows.cuh>

namespace codegemm::cuda::detail {

inline constexpr int kNearestThreads = 256;
inline constexpr int kNearestFloats = 8192;  // of a codebook in shared memory at once

// A codebook as SearchBook.
struct BookArgs {
  const float* values = nullptr;      // [centroids][v]
  const float* half_norms = nullptr;  // [centroids]; null: they are computed here
  std::int32_t centroids = 0;
};

// The nearest centroid to each thread's x, the lowest of equals. All threads of the block come here.
template <int kVecLen>
__device__ __forceinline__ int nearest_centroid(const BookArgs& book, const float (&x)[kVecLen],
                                                float* shared) {
  constexpr int kAtOnce = kNearestFloats / kVecLen;
  float* const norms = shared + kNearestFloats;
  float best = INFINITY;
  int index = 0;
  for (int first = 0; first < book.centroids; first += kAtOnce) {
    const int count = min(kAtOnce, book.centroids - first);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count * kVecLen; i += kNearestThreads)
      shared[i] = book.values[static_cast<std::int64_t>(first) * kVecLen + i];
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kNearestThreads) {
      float norm = 0.0F;
      if (book.half_norms != nullptr) {
        norm = book.half_norms[first + i];
      } else {
        const float* const centroid = book.values + static_cast<std::int64_t>(first + i) * kVecLen;
#pragma unroll
        for (int d = 0; d < kVecLen; ++d) norm += 0.5F * centroid[d] * centroid[d];
      }
      norms[i] = norm;
    }
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      float score = norms[i];
#pragma unroll
      for (int d = 0; d < kVecLen; ++d) score = __fmaf_rn(-x[d], shared[i * kVecLen + d], score);
      if (score < best) {
        best = score;
        index = first + i;
      }
    }
  }
  return index;
}

// Of nearest_centroid().
template <int kVecLen>
inline constexpr int kNearestShared = kNearestFloats + kNearestFloats / kVecLen;

struct AssignArgs {
  BookArgs book;
  const float* x = nullptr;        // [count][v]
  std::uint16_t* codes = nullptr;  // [count]
  std::int64_t count = 0;
};

template <int kVecLen>
__global__ void __launch_bounds__(kNearestThreads) assign_kernel(const __grid_constant__ AssignArgs a) {
  __shared__ __align__(16) float shared[kNearestShared<kVecLen>];
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kNearestThreads + threadIdx.x;
  float x[kVecLen];
#pragma unroll
  for (int d = 0; d < kVecLen; ++d) x[d] = n < a.count ? a.x[n * kVecLen + d] : 0.0F;
  const int code = nearest_centroid<kVecLen>(a.book, x, shared);
  if (n < a.count) a.codes[n] = static_cast<std::uint16_t>(code);
}

struct SubtractArgs {
  const float* values = nullptr;         // [centroids][v]
  const std::uint16_t* codes = nullptr;  // [count / v]
  float* x = nullptr;                    // [count]
  std::int64_t count = 0;
  std::int32_t v = 0;
  float sign = 1.0F;
};

template <int>
__global__ void __launch_bounds__(kRowThreads) subtract_kernel(const __grid_constant__ SubtractArgs a) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= a.count) return;
  a.x[i] -= a.sign * a.values[static_cast<std::int64_t>(a.codes[i / a.v]) * a.v + i % a.v];
}

inline constexpr int kMeansThreads = 128;

struct MeansArgs {
  const float* x = nullptr;              // [count][v]
  const float* weights = nullptr;        // [count]
  const std::uint16_t* codes = nullptr;  // [count]
  double* sums = nullptr;                // [gridDim.x][v + 1]: weighted sums, then the weight
  std::int64_t count = 0;
};

// A block reads all codes and adds the vectors of one centroid, always in the same order.
template <int kVecLen>
__global__ void __launch_bounds__(kMeansThreads) means_kernel(const __grid_constant__ MeansArgs a) {
  __shared__ double parts[kMeansThreads / 32][kVecLen + 1];
  const int thread = static_cast<int>(threadIdx.x);
  double sums[kVecLen + 1] = {};
  for (std::int64_t n = thread; n < a.count; n += kMeansThreads) {
    if (a.codes[n] != blockIdx.x) continue;
    const auto weight = static_cast<double>(a.weights[n]);
#pragma unroll
    for (int d = 0; d < kVecLen; ++d) sums[d] += weight * static_cast<double>(a.x[n * kVecLen + d]);
    sums[kVecLen] += weight;
  }
#pragma unroll
  for (int d = 0; d <= kVecLen; ++d) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) sums[d] += __shfl_down_sync(0xFFFFFFFFU, sums[d], lane);
    if (thread % 32 == 0) parts[thread / 32][d] = sums[d];
  }
  __syncthreads();
  if (thread > kVecLen) return;
  double sum = 0.0;
  for (int w = 0; w < kMeansThreads / 32; ++w) sum += parts[w][thread];
  a.sums[static_cast<std::int64_t>(blockIdx.x) * (kVecLen + 1) + thread] = sum;
}

struct EncodeArgs {
  LayerArgs layer;                    // weights, shape, scales
  const float* books = nullptr;       // [m][centroids][v]
  const float* half_norms = nullptr;  // [m][centroids]
  std::uint16_t* codes = nullptr;     // [rows][m][cols / v]
  std::int32_t rounds = 0;
  bool fresh = false;  // else the codes are there already
};

// encode() of the weights over their scales; a thread takes a vector.
template <int kVecLen>
__global__ void __launch_bounds__(kNearestThreads) encode_kernel(const __grid_constant__ EncodeArgs a) {
  __shared__ __align__(16) float shared[kNearestShared<kVecLen>];
  const LayerArgs& l = a.layer;
  const int vectors = l.cols / kVecLen;
  const std::int64_t all = static_cast<std::int64_t>(l.rows) * vectors;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kNearestThreads + threadIdx.x;
  const bool mine = number < all;
  const std::int64_t row = mine ? number / vectors : 0;
  const int j = mine ? static_cast<int>(number - row * vectors) : 0;
  const float scale = mine ? l.scales[row * l.groups + j * kVecLen / l.group] : 0.0F;
  std::uint16_t* const codes = a.codes + row * l.m * vectors + j;
  float left[kVecLen];
#pragma unroll
  for (int d = 0; d < kVecLen; ++d)
    left[d] = scale != 0.0F ? __fdiv_rn(l.weights[row * l.cols + j * kVecLen + d], scale) : 0.0F;
  const auto book_of = [&](int c) {
    BookArgs book;
    book.values = a.books + static_cast<std::int64_t>(c) * l.centroids * kVecLen;
    book.half_norms = a.half_norms + static_cast<std::int64_t>(c) * l.centroids;
    book.centroids = l.centroids;
    return book;
  };
  const auto subtract = [&](const BookArgs& book, int code, float sign) {
#pragma unroll
    for (int d = 0; d < kVecLen; ++d)
      left[d] -= sign * book.values[static_cast<std::int64_t>(code) * kVecLen + d];
  };
  for (int c = 0; c < l.m; ++c) {
    const BookArgs book = book_of(c);
    int code = a.fresh || !mine ? 0 : codes[static_cast<std::int64_t>(c) * vectors];
    if (a.fresh) {
      code = nearest_centroid<kVecLen>(book, left, shared);
      if (mine) codes[static_cast<std::int64_t>(c) * vectors] = static_cast<std::uint16_t>(code);
    }
    subtract(book, code, 1.0F);
  }
  for (int round = 0; round < a.rounds; ++round) {
    for (int c = 0; c < l.m; ++c) {
      const BookArgs book = book_of(c);
      subtract(book, mine ? codes[static_cast<std::int64_t>(c) * vectors] : 0, -1.0F);
      const int code = nearest_centroid<kVecLen>(book, left, shared);
      if (mine) codes[static_cast<std::int64_t>(c) * vectors] = static_cast<std::uint16_t>(code);
      subtract(book, code, 1.0F);
    }
  }
}

struct RefitArgs {
  LayerArgs layer;               // weights, codes, shape
  const float* books = nullptr;  // [m][centroids][v]
  float* scales = nullptr;       // [rows][groups]
};

// The scale that fits a group's codes best, as fp16 holds it; a warp takes a group.
template <int>
__global__ void __launch_bounds__(kRowThreads) refit_kernel(const __grid_constant__ RefitArgs a) {
  const LayerArgs& l = a.layer;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  const std::int64_t row = number / l.groups;
  if (row >= l.rows) return;
  const int first = static_cast<int>(number - row * l.groups) * l.group;
  const int last = min(l.cols, first + l.group);
  const int vectors = l.cols / l.v;
  double dot = 0.0;
  double norm = 0.0;
  for (int k = first + static_cast<int>(threadIdx.x) % 32; k < last; k += 32) {
    const std::uint16_t* const codes = l.codes + row * l.m * vectors + k / l.v;
    float q = 0.0F;
    for (int c = 0; c < l.m; ++c) {
      const std::int64_t code = codes[static_cast<std::int64_t>(c) * vectors];
      q += a.books[(static_cast<std::int64_t>(c) * l.centroids + code) * l.v + k % l.v];
    }
    dot += static_cast<double>(l.weights[row * l.cols + k]) * static_cast<double>(q);
    norm += static_cast<double>(q) * static_cast<double>(q);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    dot += __shfl_xor_sync(0xFFFFFFFFU, dot, step);
    norm += __shfl_xor_sync(0xFFFFFFFFU, norm, step);
  }
  if (threadIdx.x % 32 != 0) return;
  const double fitted = norm > 0.0 ? dot / norm : 0.0;
  a.scales[number] = __half2float(__float2half_rn(static_cast<float>(fitted)));
}

}  // namespace codegemm::cuda::detail
