// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/kernels/rows.cuh - rows of codes decoded, the sums over each centroid's uses, and
// the fit of scales.
// Layer: quantize/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace codegemm::cuda::detail {

inline constexpr int kRowThreads = 256;

// A layer while it is quantized, as AdditiveState.
struct LayerArgs {
  const float* weights = nullptr;        // [rows][cols]
  const std::uint16_t* codes = nullptr;  // [rows][m][cols / v]
  const float* scales = nullptr;         // [rows][groups]
  std::int32_t rows = 0;
  std::int32_t cols = 0;
  std::int32_t m = 0;
  std::int32_t v = 0;
  std::int32_t centroids = 0;
  std::int32_t group = 0;   // columns of a scale
  std::int32_t groups = 0;  // scales of a row
};

enum class DecodeKind : std::int32_t { kUnscaled, kScaled, kResidual };

struct DecodeArgs {
  LayerArgs layer;
  const float* books = nullptr;  // [m][centroids][v]
  float* out = nullptr;          // [rows][cols]
  DecodeKind kind = DecodeKind::kUnscaled;
};

// A thread takes a vector. The order of sums is that of decode_row() and apply_scales().
template <int>
__global__ void __launch_bounds__(kRowThreads) decode_rows_kernel(const __grid_constant__ DecodeArgs a) {
  const LayerArgs& l = a.layer;
  const int vectors = l.cols / l.v;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const std::int64_t row = number / vectors;
  if (row >= l.rows) return;
  const int j = static_cast<int>(number - row * vectors);
  const std::uint16_t* const codes = l.codes + row * l.m * vectors + j;
  const float scale = a.kind == DecodeKind::kUnscaled ? 1.0F : l.scales[row * l.groups + j * l.v / l.group];
  for (int d = 0; d < l.v; ++d) {
    float sum = 0.0F;
    for (int c = 0; c < l.m; ++c) {
      const std::int64_t code = codes[static_cast<std::int64_t>(c) * vectors];
      sum += a.books[(static_cast<std::int64_t>(c) * l.centroids + code) * l.v + d];
    }
    const std::int64_t at = row * l.cols + j * l.v + d;
    const float value = __fmul_rn(sum, scale);
    a.out[at] = a.kind == DecodeKind::kResidual ? l.weights[at] - value : value;
  }
}

struct ProductArgs {
  const float* a = nullptr;  // [rows][cols]
  const float* b = nullptr;  // the same
  double* sums = nullptr;    // [rows]
  std::int32_t cols = 0;
};

// The sum over the threads of a block, in thread 0, in an order that never changes.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double parts[kRowThreads / 32];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_down_sync(0xFFFFFFFFU, x, lane);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    x = 0.0;
    for (int w = 0; w < kRowThreads / 32; ++w) x += parts[w];
  }
  return x;
}

// The dot product of each row; a block takes a row.
template <int>
__global__ void __launch_bounds__(kRowThreads) row_products_kernel(const __grid_constant__ ProductArgs args) {
  const std::int64_t row = blockIdx.x;
  double sum = 0.0;
  for (int k = static_cast<int>(threadIdx.x); k < args.cols; k += kRowThreads) {
    sum +=
        static_cast<double>(args.a[row * args.cols + k]) * static_cast<double>(args.b[row * args.cols + k]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) args.sums[row] = sum;
}

struct KeysArgs {
  LayerArgs layer;
  std::uint16_t* keys = nullptr;   // [m][rows * cols / v]: the codes
  std::int32_t* places = nullptr;  // the same: the number of the vector, row by row
};

template <int>
__global__ void __launch_bounds__(kRowThreads) list_keys_kernel(const __grid_constant__ KeysArgs a) {
  const LayerArgs& l = a.layer;
  const int vectors = l.cols / l.v;
  const std::int64_t all = static_cast<std::int64_t>(l.rows) * vectors;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (number >= all) return;
  const std::int64_t row = number / vectors;
  const std::int64_t j = number - row * vectors;
  for (int c = 0; c < l.m; ++c) {
    a.keys[c * all + number] = l.codes[(row * l.m + c) * vectors + j];
    a.places[c * all + number] = static_cast<std::int32_t>(number);
  }
}

struct BeginsArgs {
  const std::uint16_t* keys = nullptr;  // [m][count], ascending within each
  std::int32_t* begins = nullptr;       // [m][centroids + 1]
  std::int64_t count = 0;
  std::int32_t centroids = 0;
};

// Where each centroid's uses begin: thread by thread of a grid of (centroids + 1, m).
template <int>
__global__ void __launch_bounds__(kRowThreads) list_begins_kernel(const __grid_constant__ BeginsArgs a) {
  const std::int64_t code = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (code > a.centroids) return;
  const std::uint16_t* const keys = a.keys + blockIdx.y * a.count;
  std::int64_t low = 0;
  std::int64_t high = a.count;
  while (low < high) {  // the first that is not below
    const std::int64_t middle = (low + high) / 2;
    if (keys[middle] < code) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  a.begins[blockIdx.y * (static_cast<std::int64_t>(a.centroids) + 1) + code] = static_cast<std::int32_t>(low);
}

// What is summed over a centroid's uses: its vector's part of scale * a row ([v]), or scale^2 times its
// vector's block of H ([v][v]).
struct UsesArgs {
  LayerArgs layer;
  const std::int32_t* places = nullptr;  // [m][uses], sorted by code
  const std::int32_t* begins = nullptr;  // [m][centroids + 1]
  const float* values = nullptr;         // [rows][cols], or H: [cols][cols]
  double* parts = nullptr;               // [m * centroids][parts][width]
  std::int32_t of_centroid = 0;          // parts
  std::int32_t width = 0;                // v, or v * v
};

inline constexpr int kUsesThreads = 128;

// A warp takes a part of a centroid's uses. Groups of lanes go through them side by side, an entry or some a
// lane. kBlocks: of H.
template <bool kBlocks>
__global__ void __launch_bounds__(kUsesThreads) sum_uses_kernel(const __grid_constant__ UsesArgs a) {
  const LayerArgs& l = a.layer;
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * (kUsesThreads / 32) + threadIdx.x / 32;
  const std::int64_t centroid = number / a.of_centroid;
  const int part = static_cast<int>(number - centroid * a.of_centroid);
  if (centroid >= static_cast<std::int64_t>(l.m) * l.centroids) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int vectors = l.cols / l.v;
  const std::int64_t all = static_cast<std::int64_t>(l.rows) * vectors;
  const std::int64_t c = centroid / l.centroids;
  const std::int32_t* const begins = a.begins + c * (static_cast<std::int64_t>(l.centroids) + 1);
  const std::int64_t code = centroid - c * l.centroids;
  const std::int64_t begin = begins[code];
  const std::int64_t uses = begins[code + 1] - begin;
  const std::int64_t first = begin + uses * part / a.of_centroid;
  const std::int64_t last = begin + uses * (part + 1) / a.of_centroid;
  const int lanes = a.width < 32 ? a.width : 32;  // powers of two, both
  const int of_lane = a.width / lanes;
  const int side = 32 / lanes;
  constexpr int kMostOfLane = 8;
  double sums[kMostOfLane] = {};
  for (std::int64_t i = first + lane / lanes; i < last; i += side) {
    const std::int32_t place = a.places[c * all + i];
    const std::int64_t row = place / vectors;
    const int j = place - static_cast<int>(row) * vectors;
    const float scale = l.scales[row * l.groups + j * l.v / l.group];
#pragma unroll
    for (int e = 0; e < kMostOfLane; ++e) {
      if (e >= of_lane) break;
      const int entry = lane % lanes + e * lanes;
      if constexpr (kBlocks) {
        const std::int64_t at =
            (static_cast<std::int64_t>(j) * l.v + entry / l.v) * l.cols + j * l.v + entry % l.v;
        sums[e] += static_cast<double>(scale * scale * a.values[at]);
      } else {
        sums[e] += static_cast<double>(scale * a.values[row * l.cols + j * l.v + entry]);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kMostOfLane; ++e) {
    if (e >= of_lane) break;
    for (int step = 16; step >= lanes; step /= 2) sums[e] += __shfl_down_sync(0xFFFFFFFFU, sums[e], step);
    if (lane < lanes) a.parts[(centroid * a.of_centroid + part) * a.width + lane + e * lanes] = sums[e];
  }
}

struct AddUsesArgs {
  const double* parts = nullptr;  // [count / width][of_centroid][width]
  float* out = nullptr;           // [count]
  std::int64_t count = 0;
  std::int32_t of_centroid = 0;
  std::int32_t width = 0;
};

template <int>
__global__ void __launch_bounds__(kRowThreads) add_uses_kernel(const __grid_constant__ AddUsesArgs a) {
  const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (number >= a.count) return;
  const std::int64_t centroid = number / a.width;
  const std::int64_t entry = number - centroid * a.width;
  double sum = 0.0;
  for (int part = 0; part < a.of_centroid; ++part)
    sum += a.parts[(centroid * a.of_centroid + part) * a.width + entry];
  a.out[number] = static_cast<float>(sum);
}

struct ScaleArgs {
  const float* unscaled = nullptr;   // [rows][cols]
  float* left = nullptr;             // [rows][cols], W - W^: what the new scale leaves
  const float* gradient = nullptr;   // [rows][width], left times H's columns
  const float* curvature = nullptr;  // [rows][width], unscaled times H's block
  float* scales = nullptr;           // [rows][groups]
  std::int32_t rows = 0;
  std::int32_t cols = 0;
  std::int32_t at = 0;     // first column of the group
  std::int32_t width = 0;  // columns of the group
  std::int32_t group = 0;  // its number
  std::int32_t groups = 0;
};

// One group's scale of each row, as fit_scales(); a warp takes a row.
template <int>
__global__ void __launch_bounds__(kRowThreads) fit_scale_kernel(const __grid_constant__ ScaleArgs a) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (row >= a.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float* const u = a.unscaled + row * a.cols + a.at;
  double up = 0.0;
  double down = 0.0;
  for (int k = lane; k < a.width; k += 32) {
    up += static_cast<double>(a.gradient[row * a.width + k]) * static_cast<double>(u[k]);
    down += static_cast<double>(a.curvature[row * a.width + k]) * static_cast<double>(u[k]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    up += __shfl_xor_sync(0xFFFFFFFFU, up, step);
    down += __shfl_xor_sync(0xFFFFFFFFU, down, step);
  }
  if (!(down > 0.0)) return;
  float* const scale = a.scales + row * a.groups + a.group;
  const float old = *scale;
  const float fitted = __half2float(__float2half_rn(old + static_cast<float>(up / down)));
  if (!isfinite(fitted)) return;
  __syncwarp();  // all have read it
  if (lane == 0) *scale = fitted;
  const float change = fitted - old;
  float* const left = a.left + row * a.cols + a.at;
  for (int k = lane; k < a.width; k += 32) left[k] -= change * u[k];
}

}  // namespace codegemm::cuda::detail
