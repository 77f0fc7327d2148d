// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/macros.hpp - the only macros of the two libraries.
// Layer: base (host + device, no CUDA headers).
#pragma once

#include <cstdio>
#include <cstdlib>

/// Marks a function callable from host and device code; empty under a plain C++ compiler.
#if defined(__CUDACC__)
#define CODEGEMM_HOST_DEVICE __host__ __device__
#else
#define CODEGEMM_HOST_DEVICE
#endif

/// Marks a class whose values are not to be dropped. nvcc's front end takes an assignment for that, so under
/// it the functions that return one are marked alone.
#if defined(__CUDACC__)
#define CODEGEMM_NODISCARD_CLASS
#else
#define CODEGEMM_NODISCARD_CLASS [[nodiscard]]
#endif

/// A broken invariant: a fault of the library, never of its input. On in debug builds and in tests
/// (define CODEGEMM_ENABLE_ASSERTS to have it in an optimized build), gone otherwise.
#if !defined(NDEBUG) || defined(CODEGEMM_ENABLE_ASSERTS)
#if defined(__CUDA_ARCH__)
#define CODEGEMM_ASSERT(condition)                                                                           \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      std::printf("%s:%d: block %d thread %d: broken invariant: %s\n", __FILE__, __LINE__,                   \
                  static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x), #condition);                  \
      __trap();                                                                                              \
    }                                                                                                        \
  } while (false)
#else
#define CODEGEMM_ASSERT(condition)                                                                           \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      std::fprintf(stderr, "%s:%d: broken invariant: %s\n", __FILE__, __LINE__, #condition);                 \
      std::abort();                                                                                          \
    }                                                                                                        \
  } while (false)
#endif
#else
#define CODEGEMM_ASSERT(condition) static_cast<void>(0)
#endif

/// Compiles one function for an instruction set whatever the flags of the program; it may only be called
/// after detect_isa() (codegemm/cpu/isa.hpp) has found it. Such functions hold intrinsics and plain
/// arithmetic only: an inline function of the standard library or a lambda inside could leak its code to
/// other callers. The name of each says the instruction set, so units compiled with different flags agree on
/// every definition.
#if defined(__x86_64__) && defined(__GNUC__)
#define CODEGEMM_HAS_AVX2 1
#define CODEGEMM_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define CODEGEMM_HAS_AVX2 0
#endif

// CODEGEMM_EMULATE_AVX512: a test brings the intrinsics itself and runs these functions on any x86-64.
#if defined(CODEGEMM_EMULATE_AVX512)
#define CODEGEMM_HAS_AVX512 1
#define CODEGEMM_TARGET_AVX512 CODEGEMM_TARGET_AVX2
#define CODEGEMM_TARGET_AVX512_VBMI CODEGEMM_TARGET_AVX2
#elif CODEGEMM_HAS_AVX2
#define CODEGEMM_HAS_AVX512 1
#define CODEGEMM_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define CODEGEMM_TARGET_AVX512_VBMI                                                                          \
  __attribute__((target("avx512vbmi,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#else
#define CODEGEMM_HAS_AVX512 0
#endif

// GCC 12 takes the undefined operand in its own AVX-512 intrinsics for a fault of theirs (its bug 105593):
// code with them stands between these two.
#if defined(__GNUC__) && !defined(__clang__)
#define CODEGEMM_AVX512_CODE_BEGIN                                                                           \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")                 \
      _Pragma("GCC diagnostic ignored \"-Wuninitialized\"")
#define CODEGEMM_AVX512_CODE_END _Pragma("GCC diagnostic pop")
#else
#define CODEGEMM_AVX512_CODE_BEGIN
#define CODEGEMM_AVX512_CODE_END
#endif

/// Functions between the two are compiled for an instruction set, by the features of a target attribute.
#define CODEGEMM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define CODEGEMM_TARGET_BEGIN(features)                                                                      \
  CODEGEMM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define CODEGEMM_TARGET_END CODEGEMM_PRAGMA(clang attribute pop)
#else
#define CODEGEMM_TARGET_BEGIN(features)                                                                      \
  CODEGEMM_PRAGMA(GCC push_options) CODEGEMM_PRAGMA(GCC target(features))
#define CODEGEMM_TARGET_END CODEGEMM_PRAGMA(GCC pop_options)
#endif

/// 64-bit Arm always has NEON: no attribute, no question at run time.
#if defined(__aarch64__) && defined(__ARM_NEON)
#define CODEGEMM_HAS_NEON 1
#else
#define CODEGEMM_HAS_NEON 0
#endif

/// For the small pieces of a kernel: a call in the innermost loop would put its vectors into memory.
#if defined(__GNUC__)
#define CODEGEMM_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define CODEGEMM_ALWAYS_INLINE inline
#endif

/// Before a loop of at most 16 rounds known when compiling: unrolled at -O2 as well, so that an array of
/// vectors in it stays in registers.
#if defined(__clang__)
#define CODEGEMM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define CODEGEMM_UNROLL _Pragma("GCC unroll 16")
#else
#define CODEGEMM_UNROLL
#endif
