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

// Products that codegemm's wgmma() starts: no register of theirs is touched before its wgmma_wait() and
// hold().
template <ScalarType Type>
inline constexpr auto kPairs =
    Type == ScalarType::kHalf ? codegemm::cuda::PairType::kHalf : codegemm::cuda::PairType::kBFloat16;

// d = a b^T, or added to it: a is 64 rows x 16, in shared memory by its descriptor or in registers; b is
// 2 Sums rows x 16.
template <ScalarType Type, class A, int Sums>
__device__ __forceinline__ void wgmma_scores(float (&d)[Sums], const A& a, std::uint64_t b, bool add) {
  codegemm::cuda::detail::wgmma<kPairs<Type>, Sums>(d, a, b, add);
}

// d[At ..] += a b for Columns columns: a is 64 x 16 in registers; b is 16 rows x Columns in shared memory.
template <ScalarType Type, int Columns, int At, int Size>
__device__ __forceinline__ void wgmma_values(float (&d)[Size], const unsigned (&a)[4], std::uint64_t b) {
  codegemm::cuda::detail::wgmma<kPairs<Type>, Columns / 2, true, At>(d, a, b, true);
}

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
