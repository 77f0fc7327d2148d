// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/wgmma.cuh - products of a warpgroup of Hopper: 64 weight rows in registers times tokens
// in shared memory.
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

// d (+)= a b: a is 64 x 16 in the registers of 128 threads, as the fragments of four mma.sync one below the
// other; b is 16 x N in shared memory by its descriptor. Asynchronous: neither a nor d is touched before the
// wait.
template <PairType Type>
__device__ __forceinline__ void wgmma_pairs(float (&d)[16], const unsigned (&a)[4], std::uint64_t b,
                                            bool add) {
#define CODEGEMM_WGMMA(type)                                                                                 \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.ne.b32 add, %21, 0;\n\t"                                                                         \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type                                                     \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "                                             \
      "{%16,%17,%18,%19}, %20, add, 1, 1, 0;}"                                                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),      \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (Type == PairType::kHalf)
    CODEGEMM_WGMMA("f16.f16");
  else
    CODEGEMM_WGMMA("bf16.bf16");
#undef CODEGEMM_WGMMA
}

template <PairType Type>
__device__ __forceinline__ void wgmma_pairs(float (&d)[32], const unsigned (&a)[4], std::uint64_t b,
                                            bool add) {
#define CODEGEMM_WGMMA(type)                                                                                 \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.ne.b32 add, %37, 0;\n\t"                                                                         \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type                                                     \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                               \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "                                   \
      "{%32,%33,%34,%35}, %36, add, 1, 1, 0;}"                                                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),      \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),             \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),           \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),           \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (Type == PairType::kHalf)
    CODEGEMM_WGMMA("f16.f16");
  else
    CODEGEMM_WGMMA("bf16.bf16");
#undef CODEGEMM_WGMMA
}

template <PairType Type>
__device__ __forceinline__ void wgmma_pairs(float (&d)[64], const unsigned (&a)[4], std::uint64_t b,
                                            bool add) {
#define CODEGEMM_WGMMA(type)                                                                                 \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.ne.b32 add, %69, 0;\n\t"                                                                         \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type                                                    \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                               \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                                     \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                     \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "                                   \
      "{%64,%65,%66,%67}, %68, add, 1, 1, 0;}"                                                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),      \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),             \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),           \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),           \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),           \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),           \
        "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),           \
        "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),           \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (Type == PairType::kHalf)
    CODEGEMM_WGMMA("f16.f16");
  else
    CODEGEMM_WGMMA("bf16.bf16");
#undef CODEGEMM_WGMMA
}

template <PairType Type>
__device__ __forceinline__ void wgmma_pairs(float (&d)[128], const unsigned (&a)[4], std::uint64_t b,
                                            bool add) {
#define CODEGEMM_WGMMA(type)                                                                                 \
  asm volatile(                                                                                              \
      "{.reg .pred add;\n\t"                                                                                 \
      "setp.ne.b32 add, %133, 0;\n\t"                                                                        \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type                                                    \
      " {"                                                                                                   \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                               \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                                     \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                     \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"                                     \
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                                     \
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"                                     \
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"                         \
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "                   \
      "{%128,%129,%130,%131}, %132, add, 1, 1, 0;}"                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),      \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),             \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),           \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),           \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),           \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),           \
        "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),           \
        "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),           \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),           \
        "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]),           \
        "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]),           \
        "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]),           \
        "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]),           \
        "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]),           \
        "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]),     \
        "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]),    \
        "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),    \
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]),    \
        "+f"(d[127])                                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (Type == PairType::kHalf)
    CODEGEMM_WGMMA("f16.f16");
  else
    CODEGEMM_WGMMA("bf16.bf16");
#undef CODEGEMM_WGMMA
}

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
