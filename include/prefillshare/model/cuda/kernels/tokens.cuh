// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/kernels/tokens.cuh - both ends of a pass: token ids to rows, logits to token ids;
// and what ends a product whose kernel cannot: bias and SwiGLU.
// Layer: model/cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <prefillshare/model/cuda/kernels/scalars.cuh>

namespace prefillshare::cuda {

/// Everything that embed_kernel reads, by value. Pointers are to device memory.
struct EmbedArgs {
  const std::int32_t* tokens = nullptr;  // [tokens]
  const void* table = nullptr;           // [vocab][width]
  float* out = nullptr;                  // [tokens][width]
  int width = 0;                         // a multiple of 8
  int vocab = 0;
};

inline constexpr int kEmbedThreads = 128;

/// A block takes a token. An id outside of the vocabulary takes its first row (an assertion in debug).
template <class T>
__global__ void __launch_bounds__(kEmbedThreads) embed_kernel(const __grid_constant__ EmbedArgs a) {
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  std::int64_t token = a.tokens[blockIdx.x];
  CODEGEMM_ASSERT(token >= 0 && token < a.vocab);
  if (token < 0 || token >= a.vocab) token = 0;
  const T* const from = static_cast<const T*>(a.table) + token * a.width;
  float* const to = a.out + static_cast<std::int64_t>(blockIdx.x) * a.width;
  for (int at = static_cast<int>(threadIdx.x) * 8; at < a.width; at += kEmbedThreads * 8) {
    float values[8];
    detail::load8(from + at, values);
    detail::store8(to + at, values);
  }
}

inline constexpr int kColumnThreads = 256;

namespace detail {

// The eight columns of a row that this thread takes, where kColumnThreads of them are a block.
struct EightColumns {
  std::int64_t row;
  int at;  // the first

  __device__ __forceinline__ explicit EightColumns(int width) {
    const int parts = width / 8;
    const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
    row = number / parts;
    at = static_cast<int>(number - row * parts) * 8;
  }
};

}  // namespace detail

/// Everything that swiglu_kernel reads, by value.
struct SwiGluArgs {
  const void* both = nullptr;  // [rows][2 * width]: gate, up
  void* out = nullptr;         // [rows][out_stride]
  std::int64_t rows = 0;
  std::int64_t out_stride = 0;  // a multiple of 8
  int width = 0;                // a multiple of 8
};

/// out = silu(gate) * up.
template <class T>
__global__ void __launch_bounds__(kColumnThreads) swiglu_kernel(const __grid_constant__ SwiGluArgs a) {
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const detail::EightColumns mine(a.width);
  if (mine.row >= a.rows) return;
  const T* const from = static_cast<const T*>(a.both) + mine.row * 2 * a.width + mine.at;
  float gate[8];
  float up[8];
  detail::load8(from, gate);
  detail::load8(from + a.width, up);
#pragma unroll
  for (int j = 0; j < 8; ++j) gate[j] = gate[j] / (1.0F + __expf(-gate[j])) * up[j];
  detail::store8(static_cast<T*>(a.out) + mine.row * a.out_stride + mine.at, gate);
}

/// Everything that add_bias_kernel reads, by value.
struct AddBiasArgs {
  void* y = nullptr;           // [rows][stride]
  const void* bias = nullptr;  // [width]
  std::int64_t rows = 0;
  std::int64_t stride = 0;  // a multiple of 8
  int width = 0;            // a multiple of 8
};

/// y += bias.
template <class T>
__global__ void __launch_bounds__(kColumnThreads) add_bias_kernel(const __grid_constant__ AddBiasArgs a) {
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const detail::EightColumns mine(a.width);
  if (mine.row >= a.rows) return;
  T* const y = static_cast<T*>(a.y) + mine.row * a.stride + mine.at;
  float sum[8];
  float bias[8];
  detail::load8(y, sum);
  detail::load8(static_cast<const T*>(a.bias) + mine.at, bias);
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] += bias[j];
  detail::store8(y, sum);
}

/// How rows of logits become tokens; device arrays of one element a row.
struct DeviceSampling {
  const float* temperatures = nullptr;   ///< 0: the largest logit; null: all 0
  const std::uint64_t* seeds = nullptr;  ///< read where the temperature is not 0
  const std::uint64_t* steps = nullptr;  ///< a number that no other draw with this seed has; null: 0
  std::uint64_t* best = nullptr;         ///< scratch, 0 before and after
  unsigned* arrived = nullptr;           ///< the same
  std::int32_t* copy = nullptr;          ///< page-locked host memory that gets the tokens too, or null
};

/// Everything that sample_kernel reads, by value.
struct SampleArgs {
  const float* logits = nullptr;  // [rows][stride]
  std::int64_t stride = 0;
  int vocab = 0;
  DeviceSampling how;
  std::int32_t* tokens = nullptr;  // [rows], what is chosen
};

inline constexpr int kSampleThreads = 256;
/// Blocks that share a row: some two a multiprocessor where rows are few.
[[nodiscard]] constexpr int sample_slices(std::int64_t rows) {
  return rows <= 2 ? 128 : rows <= 16 ? 256 / static_cast<int>(rows) : 16;
}

namespace detail {

// Ordered as floats are, NaN lowest; equal values: the lower id wins.
__device__ __forceinline__ std::uint64_t sample_key(float value, int id) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = value != value ? 0U : (bits & 0x80000000U) != 0U ? ~bits : bits | 0x80000000U;
  return static_cast<std::uint64_t>(ordered) << 32 | (0xFFFFFFFFU - static_cast<unsigned>(id));
}

// Standard Gumbel noise out of a counter: -log(-log(u)), u in (0, 1).
__device__ __forceinline__ float gumbel(std::uint64_t seed, std::uint64_t step, int id) {
  std::uint64_t z =
      seed + step * 0x9E3779B97F4A7C15ULL + static_cast<std::uint64_t>(id) * 0xD1B54A32D192ED03ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  z ^= z >> 31;
  const float u = (static_cast<float>(z >> 41) + 0.5F) * 0x1p-23F;
  return -logf(-logf(u));
}

}  // namespace detail

/// Slice blockIdx.x of row blockIdx.y. With a temperature the largest of logit / temperature + Gumbel noise
/// is chosen, which is a draw from the softmax (the Gumbel-max trick). The last slice writes the token.
template <int>  // a template: one definition, however many files include this
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(const __grid_constant__ SampleArgs a) {
  codegemm::cuda::detail::wait_for_previous_kernel();
  codegemm::cuda::detail::allow_next_kernel();
  const int row = static_cast<int>(blockIdx.y);
  const float* const logits = a.logits + row * a.stride;
  const float temperature = a.how.temperatures == nullptr ? 0.0F : a.how.temperatures[row];
  const std::uint64_t seed = temperature > 0.0F ? a.how.seeds[row] : 0;
  const std::uint64_t step = a.how.steps == nullptr ? 0 : a.how.steps[row];
  std::uint64_t best = 0;
  for (int id = static_cast<int>(blockIdx.x * kSampleThreads + threadIdx.x); id < a.vocab;
       id += static_cast<int>(gridDim.x) * kSampleThreads) {
    float value = logits[id];
    if (temperature > 0.0F) value = value / temperature + detail::gumbel(seed, step, id);
    const std::uint64_t key = detail::sample_key(value, id);
    best = key > best ? key : best;
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    const std::uint64_t other = __shfl_xor_sync(0xFFFFFFFFU, best, lane);
    best = other > best ? other : best;
  }
  __shared__ std::uint64_t of_warps[kSampleThreads / 32];
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (const std::uint64_t other : of_warps) best = other > best ? other : best;
  // The order in which maxima arrive does not matter.
  atomicMax(reinterpret_cast<unsigned long long*>(a.how.best + row), best);
  __threadfence();
  if (atomicAdd(a.how.arrived + row, 1U) + 1U < gridDim.x) return;
  __threadfence();
  const std::uint64_t chosen = atomicExch(reinterpret_cast<unsigned long long*>(a.how.best + row), 0ULL);
  a.how.arrived[row] = 0;
  const auto token = static_cast<std::int32_t>(0xFFFFFFFFU - static_cast<unsigned>(chosen & 0xFFFFFFFFU));
  a.tokens[row] = token;
  if (a.how.copy != nullptr) a.how.copy[row] = token;
}

}  // namespace prefillshare::cuda
