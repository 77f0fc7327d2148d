// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/kernels/scalars.cuh - eight numbers at a time, computed with in fp32.
// Layer: model/cuda/kernels (device).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace prefillshare::cuda::detail {

__device__ __forceinline__ void load8(const float* from, float (&out)[8]) {
  const float4 low = *reinterpret_cast<const float4*>(from);
  const float4 high = *reinterpret_cast<const float4*>(from + 4);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}
__device__ __forceinline__ void store8(float* to, const float (&x)[8]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ float2 unpack2(__half2 pair) { return __half22float2(pair); }
__device__ __forceinline__ float2 unpack2(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ void pack2(float2 x, __half2& out) { out = __float22half2_rn(x); }
__device__ __forceinline__ void pack2(float2 x, __nv_bfloat162& out) { out = __float22bfloat162_rn(x); }

template <class T>
struct PairOf;
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

// T: __half or __nv_bfloat16, at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void load8(const T* from, float (&out)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2(*reinterpret_cast<const typename PairOf<T>::Type*>(&word[i]));
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}
template <class T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pack2(make_float2(x[2 * i], x[2 * i + 1]), *reinterpret_cast<typename PairOf<T>::Type*>(&word[i]));
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

}  // namespace prefillshare::cuda::detail
