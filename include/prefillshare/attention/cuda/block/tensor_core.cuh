// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/tensor_core.cuh - the PTX instructions that attention is made of.
// Layer: attention/cuda/block (device).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <codegemm/cuda/kernels/output.cuh>

namespace prefillshare::cuda {

using codegemm::cuda::ScalarType;

namespace detail {

// d[16][8] += a[16][16] b[16][8], operands fp16 or bf16, sums fp32. Lane l holds rows l / 4 and l / 4 + 8 of
// a and d, and columns 2 (l % 4) and the next of d.
template <ScalarType Type>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (Type == ScalarType::kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(unsigned (&out)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&out)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}

template <int Words>
__device__ __forceinline__ void load_words(unsigned (&out)[Words], unsigned shared) {
  static_assert(Words == 2 || Words == 4, "prefillshare: load_words reads 8 or 16 bytes");
  if constexpr (Words == 2) {
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(shared) : "memory");
  } else {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared)
                 : "memory");
  }
}

__device__ __forceinline__ void store_shared16(unsigned shared, const uint4& words) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Copies 16 bytes into shared memory while the thread goes on, or writes 16 zeros there.
__device__ __forceinline__ void copy_or_zero(unsigned shared, const void* from, bool copy) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
               "r"(copy ? 16 : 0)
               : "memory");
}
// The same for 4 bytes.
__device__ __forceinline__ void copy_4_or_zero(unsigned shared, const void* from, bool copy) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(copy ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_16(unsigned shared, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the youngest `Groups` groups of this thread's copies have arrived.
template <int Groups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

template <ScalarType Type>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (Type == ScalarType::kHalf) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
}
template <ScalarType Type>
__device__ __forceinline__ float2 unpack(unsigned pair) {
  if constexpr (Type == ScalarType::kHalf) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

// Two e4m3 numbers, the first in the lower byte. Exact.
template <ScalarType Type>
__device__ __forceinline__ unsigned widen_fp8(unsigned pair) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  if constexpr (Type == ScalarType::kHalf) {
    return static_cast<unsigned>(raw.x) | static_cast<unsigned>(raw.y) << 16;
  } else {
    const float2 wide = __half22float2(__half2(raw));
    return pack<Type>(wide.x, wide.y);
  }
}

// Lanes 4 i to 4 i + 3 have four words each: word j of the l-th of them becomes word l of the j-th.
__device__ __forceinline__ void transpose_words(unsigned (&words)[4]) {
  // Lanes that differ in `bit`: the one without it gives `second` for the other's `first`.
  const auto swap = [](unsigned& first, unsigned& second, int bit) {
    const bool has = (static_cast<int>(threadIdx.x) & bit) != 0;
    const unsigned got = __shfl_xor_sync(0xFFFFFFFFU, has ? first : second, bit);
    (has ? first : second) = got;
  };
  swap(words[0], words[1], 1);
  swap(words[2], words[3], 1);
  swap(words[0], words[2], 2);
  swap(words[1], words[3], 2);
}

// Two neighbours of an output row; the first is at an even element.
__device__ __forceinline__ void store_pair(void* to, std::int64_t at, ScalarType type, float low,
                                           float high) {
  if (type == ScalarType::kFloat) {
    *reinterpret_cast<float2*>(static_cast<float*>(to) + at) = make_float2(low, high);
  } else {
    *reinterpret_cast<unsigned*>(static_cast<unsigned short*>(to) + at) =
        type == ScalarType::kHalf ? pack<ScalarType::kHalf>(low, high)
                                  : pack<ScalarType::kBFloat16>(low, high);
  }
}

}  // namespace detail
}  // namespace prefillshare::cuda
