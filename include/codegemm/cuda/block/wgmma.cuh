// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/wgmma.cuh - products of a warpgroup of Hopper: 64 rows, in registers or shared memory,
// times columns in shared memory.
// Layer: cuda/block (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/centroid_table.cuh>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CODEGEMM_HAS_WGMMA 1
#else
#define CODEGEMM_HAS_WGMMA 0
#endif

#if CODEGEMM_HAS_WGMMA
namespace codegemm::cuda::detail {

// The sums of wgmma as operands, and their numbers.
#define CODEGEMM_SUMS_8(d, at)                                                                               \
  "+f"(d[(at)]), "+f"(d[(at) + 1]), "+f"(d[(at) + 2]), "+f"(d[(at) + 3]), "+f"(d[(at) + 4]),                 \
      "+f"(d[(at) + 5]), "+f"(d[(at) + 6]), "+f"(d[(at) + 7])
#define CODEGEMM_SUMS_16(d, at) CODEGEMM_SUMS_8(d, at), CODEGEMM_SUMS_8(d, (at) + 8)
#define CODEGEMM_SUMS_32(d, at) CODEGEMM_SUMS_16(d, at), CODEGEMM_SUMS_16(d, (at) + 16)
#define CODEGEMM_SUMS_64(d, at) CODEGEMM_SUMS_32(d, at), CODEGEMM_SUMS_32(d, (at) + 32)
#define CODEGEMM_SUMS_128(d, at) CODEGEMM_SUMS_64(d, at), CODEGEMM_SUMS_64(d, (at) + 64)
#define CODEGEMM_NUMBERS_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define CODEGEMM_NUMBERS_32                                                                                  \
  CODEGEMM_NUMBERS_16                                                                                        \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define CODEGEMM_NUMBERS_64                                                                                  \
  CODEGEMM_NUMBERS_32                                                                                        \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"                                         \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define CODEGEMM_NUMBERS_128                                                                                 \
  CODEGEMM_NUMBERS_64                                                                                        \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"                                         \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"                                         \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"                             \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// One instruction with `sums` sums a thread, from `at` on; texts of the operands behind them.
#define CODEGEMM_WGMMA(columns, sums, type, a_text, b_text, add_text, tail, ...)                             \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.ne.b32 add, " add_text                                                                           \
      ", 0;\n\t"                                                                                             \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type " {" CODEGEMM_NUMBERS_##sums              \
      "}, " a_text ", " b_text ", add, 1, 1, " tail ";}"                                                     \
      : CODEGEMM_SUMS_##sums(d, At)                                                                          \
      : __VA_ARGS__, "l"(b), "r"(static_cast<int>(add)), "n"(BInRows ? 1 : 0))
// Of both types.
#define CODEGEMM_WGMMAS(columns, sums, a_text, b_text, add_text, tail, ...)                                  \
  if constexpr (Type == PairType::kHalf) {                                                                   \
    CODEGEMM_WGMMA(columns, sums, "f16.f16", a_text, b_text, add_text, tail, __VA_ARGS__);                   \
  } else {                                                                                                   \
    CODEGEMM_WGMMA(columns, sums, "bf16.bf16", a_text, b_text, add_text, tail, __VA_ARGS__);                 \
  }

// d[At .. At + Sums) (+)= a b: a is 64 x 16 in the registers of 128 threads, as the fragments of four
// mma.sync one below the other; b is 16 x 2 Sums in shared memory by its descriptor, a row of numbers for
// each of its columns, or, BInRows, for each of its rows. Asynchronous: neither a nor d is touched before the
// wait.
template <PairType Type, int Sums, bool BInRows = false, int At = 0, int Size>
__device__ __forceinline__ void wgmma(float (&d)[Size], const unsigned (&a)[4], std::uint64_t b, bool add) {
  static_assert(Sums == 16 || Sums == 32 || Sums == 64 || Sums == 128);
  static_assert(At + Sums <= Size);
#define CODEGEMM_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
  if constexpr (Sums == 16) {
    CODEGEMM_WGMMAS(32, 16, "{%16,%17,%18,%19}", "%20", "%21", "%22", CODEGEMM_A)
  }
  if constexpr (Sums == 32) {
    CODEGEMM_WGMMAS(64, 32, "{%32,%33,%34,%35}", "%36", "%37", "%38", CODEGEMM_A)
  }
  if constexpr (Sums == 64) {
    CODEGEMM_WGMMAS(128, 64, "{%64,%65,%66,%67}", "%68", "%69", "%70", CODEGEMM_A)
  }
  if constexpr (Sums == 128) {
    CODEGEMM_WGMMAS(256, 128, "{%128,%129,%130,%131}", "%132", "%133", "%134", CODEGEMM_A)
  }
#undef CODEGEMM_A
}

// The same with a in shared memory by its descriptor, a row of numbers for each of its rows.
template <PairType Type, int Sums, int Size>
__device__ __forceinline__ void wgmma(float (&d)[Size], std::uint64_t a, std::uint64_t b, bool add) {
  static_assert(Sums == 32 || Sums == 64);
  static_assert(Sums <= Size);
  constexpr int At = 0;
  constexpr bool BInRows = false;
  if constexpr (Sums == 32) {
    CODEGEMM_WGMMAS(64, 32, "%32", "%33", "%34", "0, %35", "l"(a))
  }
  if constexpr (Sums == 64) {
    CODEGEMM_WGMMAS(128, 64, "%64", "%65", "%66", "0, %67", "l"(a))
  }
}
#undef CODEGEMM_WGMMAS
#undef CODEGEMM_WGMMA
#undef CODEGEMM_NUMBERS_128
#undef CODEGEMM_NUMBERS_64
#undef CODEGEMM_NUMBERS_32
#undef CODEGEMM_NUMBERS_16
#undef CODEGEMM_SUMS_128
#undef CODEGEMM_SUMS_64
#undef CODEGEMM_SUMS_32
#undef CODEGEMM_SUMS_16
#undef CODEGEMM_SUMS_8

// Registers written before are seen by the products after.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Weights are in their registers here, and are not made between the products: ptxas would then run these one
// after the other (C7513). Branches between the wait for earlier products and the next ones do that too.
__device__ __forceinline__ void keep_before(unsigned (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
// Waits until at most Pending groups are not done.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Descriptor of tokens x 64 values of 16 bits, 128 bytes a token, in the 128-byte swizzle that the copy
// engine writes; at a multiple of 1024 bytes. 16 values on: + 2.
[[nodiscard]] __device__ __forceinline__ std::uint64_t describe_tokens(unsigned shared) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightTokens = std::uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightTokens | std::uint64_t{1} << 16 | ((shared & 0x3FFFFU) >> 4);
}

}  // namespace codegemm::cuda::detail
#endif
