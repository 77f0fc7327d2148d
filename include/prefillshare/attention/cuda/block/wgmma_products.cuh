// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cuda/block/wgmma_products.cuh - the two products of attention on a warpgroup of
// Hopper: scores from queries and keys in shared memory, and values weighted by registers.
// Layer: attention/cuda/block (device).
// See: PTX ISA, "Asynchronous warpgroup level matrix instructions", for descriptors and fragments.
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/wgmma.cuh>
#include <prefillshare/attention/cuda/block/tensor_core.cuh>

#if CODEGEMM_HAS_WGMMA
namespace prefillshare::cuda::detail {

// Both are asynchronous: no register of theirs is touched before codegemm's wgmma_wait() and hold().
#define PREFILLSHARE_SUMS_16(d, at)                                                                          \
  "+f"(d[(at)]), "+f"(d[(at) + 1]), "+f"(d[(at) + 2]), "+f"(d[(at) + 3]), "+f"(d[(at) + 4]),                 \
      "+f"(d[(at) + 5]), "+f"(d[(at) + 6]), "+f"(d[(at) + 7]), "+f"(d[(at) + 8]), "+f"(d[(at) + 9]),         \
      "+f"(d[(at) + 10]), "+f"(d[(at) + 11]), "+f"(d[(at) + 12]), "+f"(d[(at) + 13]), "+f"(d[(at) + 14]),    \
      "+f"(d[(at) + 15])
#define PREFILLSHARE_SUMS_32(d, at) PREFILLSHARE_SUMS_16(d, at), PREFILLSHARE_SUMS_16(d, (at) + 16)
#define PREFILLSHARE_SUMS_64(d, at) PREFILLSHARE_SUMS_32(d, at), PREFILLSHARE_SUMS_32(d, (at) + 32)

// d (+)= a b^T: a is 64 rows x 16, b is 128 rows x 16, both in shared memory by their descriptors.
template <ScalarType Type>
__device__ __forceinline__ void wgmma_scores(float (&d)[64], std::uint64_t a, std::uint64_t b, bool add) {
#define PREFILLSHARE_WGMMA(type)                                                                             \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.ne.b32 add, %66, 0;\n\t"                                                                         \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type                                                    \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                               \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                                     \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                     \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "                                   \
      "%64, %65, add, 1, 1, 0, 0;}"                                                                          \
      : PREFILLSHARE_SUMS_64(d, 0)                                                                           \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (Type == ScalarType::kHalf)
    PREFILLSHARE_WGMMA("f16.f16");
  else
    PREFILLSHARE_WGMMA("bf16.bf16");
#undef PREFILLSHARE_WGMMA
}

// The same for 64 rows of b.
template <ScalarType Type>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], std::uint64_t a, std::uint64_t b, bool add) {
#define PREFILLSHARE_WGMMA(type)                                                                             \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.ne.b32 add, %34, 0;\n\t"                                                                         \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type                                                     \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                               \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "                                   \
      "%32, %33, add, 1, 1, 0, 0;}"                                                                          \
      : PREFILLSHARE_SUMS_32(d, 0)                                                                           \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (Type == ScalarType::kHalf)
    PREFILLSHARE_WGMMA("f16.f16");
  else
    PREFILLSHARE_WGMMA("bf16.bf16");
#undef PREFILLSHARE_WGMMA
}
// The same with a in registers, as in wgmma_values().
template <ScalarType Type>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], const unsigned (&a)[4], std::uint64_t b,
                                             bool add) {
  constexpr auto kType =
      Type == ScalarType::kHalf ? codegemm::cuda::PairType::kHalf : codegemm::cuda::PairType::kBFloat16;
  codegemm::cuda::detail::wgmma_pairs<kType>(d, a, b, add);
}

// d[At ..] += a b for Columns columns: a is 64 x 16 in the registers of 128 threads, as the fragments of four
// mma.sync one below the other; b is 16 rows x Columns in shared memory.
template <ScalarType Type, int Columns, int At, int Size>
__device__ __forceinline__ void wgmma_values(float (&d)[Size], const unsigned (&a)[4], std::uint64_t b) {
  static_assert(Columns == 32 || Columns == 64 || Columns == 128);
  static_assert(At + Columns / 2 <= Size);
#define PREFILLSHARE_WGMMA(type)                                                                             \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.eq.b32 add, 0, 0;\n\t"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type                                                    \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                               \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                                     \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                     \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "                                   \
      "{%64,%65,%66,%67}, %68, add, 1, 1, 1;}"                                                               \
      : PREFILLSHARE_SUMS_64(d, At)                                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (Columns == 128) {
    if constexpr (Type == ScalarType::kHalf)
      PREFILLSHARE_WGMMA("f16.f16");
    else
      PREFILLSHARE_WGMMA("bf16.bf16");
  }
#undef PREFILLSHARE_WGMMA
#define PREFILLSHARE_WGMMA(type)                                                                             \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.eq.b32 add, 0, 0;\n\t"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type                                                     \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                               \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "                                   \
      "{%32,%33,%34,%35}, %36, add, 1, 1, 1;}"                                                               \
      : PREFILLSHARE_SUMS_32(d, At)                                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (Columns == 64) {
    if constexpr (Type == ScalarType::kHalf)
      PREFILLSHARE_WGMMA("f16.f16");
    else
      PREFILLSHARE_WGMMA("bf16.bf16");
  }
#undef PREFILLSHARE_WGMMA
#define PREFILLSHARE_WGMMA(type)                                                                             \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.eq.b32 add, 0, 0;\n\t"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type                                                     \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "                                             \
      "{%16,%17,%18,%19}, %20, add, 1, 1, 1;}"                                                               \
      : PREFILLSHARE_SUMS_16(d, At)                                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (Columns == 32) {
    if constexpr (Type == ScalarType::kHalf)
      PREFILLSHARE_WGMMA("f16.f16");
    else
      PREFILLSHARE_WGMMA("bf16.bf16");
  }
#undef PREFILLSHARE_WGMMA
}
#undef PREFILLSHARE_SUMS_64
#undef PREFILLSHARE_SUMS_32
#undef PREFILLSHARE_SUMS_16

// Keeps the compiler from reading sums before the wait that stands before this.
template <int Size>
__device__ __forceinline__ void hold(float (&d)[Size]) {
#pragma unroll
  for (int i = 0; i < Size; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of keys x 64 values of 16 bits, 128 bytes a key in the 128-byte swizzle, as the B operand
// whose columns are the values: eight keys lie in 1024 bytes, the next 64 values `next` bytes on. 16 keys
// on: + 128.
[[nodiscard]] __device__ __forceinline__ std::uint64_t describe_values(unsigned shared, unsigned next) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightKeys = std::uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightKeys | std::uint64_t{next >> 4} << 16 | ((shared & 0x3FFFFU) >> 4);
}

// Registers of a warpgroup, from what the kernel was launched with: all four warps call it.
template <int Registers>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// What was written to shared memory before, by this thread or by others it has waited for, is seen by
// products that start after.
__device__ __forceinline__ void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers of Threads threads: wait() also arrives.
template <int Threads>
__device__ __forceinline__ void wait_for_turn(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(Threads) : "memory");
}
template <int Threads>
__device__ __forceinline__ void give_turn(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(Threads) : "memory");
}

}  // namespace prefillshare::cuda::detail
#endif
