// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/output.cuh - the last thing that happens to a sum, in every regime.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <codegemm/cuda/block/centroid_table.cuh>

namespace codegemm::cuda {

enum class ScalarType : int { kHalf = 0, kBFloat16 = 1, kFloat = 2 };

/// Where products go. Pointers are to device memory; y, bias and residual are of one type.
struct Output {
  void* y = nullptr;                          // [tokens][y_stride]
  const void* bias = nullptr;                 // [rows], or null
  const void* residual = nullptr;             // [tokens][residual_stride], or null; may be y
  const std::uint16_t* row_scales = nullptr;  // fp16 [rows], or null where the scales are in the sums
  std::int64_t y_stride = 0;
  std::int64_t residual_stride = 0;
  int rows = 0;          // N
  int half_rows = 0;     // N / 2 with SwiGLU, else 0
  float unscale = 1.0F;  // see DevicePackedView
  ScalarType type = ScalarType::kHalf;
};

namespace detail {

__device__ __forceinline__ float load_scalar(const void* from, std::int64_t at, ScalarType type) {
  switch (type) {
    case ScalarType::kHalf: return __half2float(static_cast<const __half*>(from)[at]);
    case ScalarType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
    default: return static_cast<const float*>(from)[at];
  }
}

__device__ __forceinline__ void store_scalar(void* to, std::int64_t at, ScalarType type, float value) {
  switch (type) {
    case ScalarType::kHalf: static_cast<__half*>(to)[at] = __float2half_rn(value); break;
    case ScalarType::kBFloat16: static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(value); break;
    default: static_cast<float*>(to)[at] = value; break;
  }
}

// Two 16-bit numbers, the first one in the low half.
template <PairType Type>
[[nodiscard]] __device__ __forceinline__ unsigned pack_pair(float low, float high) {
  if constexpr (Type == PairType::kHalf) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
}

template <PairType Type>
[[nodiscard]] __device__ __forceinline__ float2 unpack_pair_of(unsigned pair) {
  if constexpr (Type == PairType::kHalf)
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  else
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// Scale and bias of one sum.
[[nodiscard]] __device__ __forceinline__ float finish_row(const Output& o, int row, float sum) {
  sum *= o.unscale;
  if (o.row_scales != nullptr) sum *= __half2float(__ushort_as_half(o.row_scales[row]));
  if (o.bias != nullptr) sum += load_scalar(o.bias, row, o.type);
  return sum;
}

[[nodiscard]] __device__ __forceinline__ float swiglu(float gate, float up) {
  return gate / (1.0F + __expf(-gate)) * up;
}

// Scale, bias and residual of one sum.
[[nodiscard]] __device__ __forceinline__ float finish_sum(const Output& o, std::int64_t token, int row,
                                                          float sum) {
  sum = finish_row(o, row, sum);
  if (o.residual != nullptr) sum += load_scalar(o.residual, token * o.residual_stride + row, o.type);
  return sum;
}

__device__ __forceinline__ void store_output(const Output& o, std::int64_t token, int row, float sum) {
  store_scalar(o.y, token * o.y_stride + row, o.type, finish_sum(o, token, row, sum));
}

// SwiGLU: row `row` of the first half with its partner in the second.
__device__ __forceinline__ void store_gated(const Output& o, std::int64_t token, int row, float gate,
                                            float up) {
  float sum = swiglu(finish_row(o, row, gate), finish_row(o, row + o.half_rows, up));
  if (o.residual != nullptr) sum += load_scalar(o.residual, token * o.residual_stride + row, o.type);
  store_scalar(o.y, token * o.y_stride + row, o.type, sum);
}

__device__ __forceinline__ void load_eight(const float* from, float (&out)[8]) {
  const float4 low = *reinterpret_cast<const float4*>(from);
  const float4 high = *reinterpret_cast<const float4*>(from + 4);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

// What eight rows have in common for all tokens, held in registers by a thread that writes many tokens.
struct EightRows {
  float scale[8];
  float bias[8];
  bool whole = false;  // 16-byte stores fit

  __device__ __forceinline__ void load(const Output& o, int row) {
    const int multiple = o.type == ScalarType::kFloat ? 4 : 8;
    whole =
        row + 8 <= o.rows && o.y_stride % multiple == 0 && reinterpret_cast<std::uintptr_t>(o.y) % 16 == 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool there = row + i < o.rows;
      scale[i] = o.unscale;
      if (o.row_scales != nullptr && there) scale[i] *= __half2float(__ushort_as_half(o.row_scales[row + i]));
      bias[i] = o.bias != nullptr && there ? load_scalar(o.bias, row + i, o.type) : 0.0F;
    }
  }

  // Scale and bias.
  __device__ __forceinline__ void finish(float (&sums)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = sums[i] * scale[i] + bias[i];
  }

  // Residual, and out.
  __device__ __forceinline__ void store(const Output& o, std::int64_t token, int row,
                                        float (&sums)[8]) const {
    if (o.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row + i < o.rows) sums[i] += load_scalar(o.residual, token * o.residual_stride + row + i, o.type);
      }
    }
    const std::int64_t at = token * o.y_stride + row;
    if (!whole) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row + i < o.rows) store_scalar(o.y, at + i, o.type, sums[i]);
      }
    } else if (o.type == ScalarType::kFloat) {
      float4* const to = reinterpret_cast<float4*>(static_cast<float*>(o.y) + at);
      to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
      to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
    } else {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = o.type == ScalarType::kHalf ? pack_pair<PairType::kHalf>(sums[i * 2], sums[i * 2 + 1])
                                               : pack_pair<PairType::kBFloat16>(sums[i * 2], sums[i * 2 + 1]);
      }
      *reinterpret_cast<uint4*>(static_cast<unsigned short*>(o.y) + at) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

}  // namespace detail
}  // namespace codegemm::cuda
