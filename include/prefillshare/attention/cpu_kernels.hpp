// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cpu_kernels.hpp - the attention kernels for each instruction set, chosen when
// first used.
// Layer: attention (host only).
#pragma once

#include <cstddef>
#include <cstdint>

#include <codegemm/base/macros.hpp>
#include <prefillshare/attention/cpu_problem.hpp>

namespace prefillshare::detail {

/// What a masked or padded key points to.
alignas(64) inline constexpr float kZeros[kMaxHeadDim] = {};

/// 4 lanes: SSE2, NEON, or whatever the compiler makes of it.
namespace portable {
inline constexpr std::int64_t kLanes = 4;
inline constexpr std::int64_t kVectors = 2;
#include <prefillshare/attention/cpu_kernels.inl>
}  // namespace portable

#if defined(__x86_64__)

CODEGEMM_TARGET_BEGIN("avx2,fma")
namespace avx2 {
inline constexpr std::int64_t kLanes = 8;
inline constexpr std::int64_t kVectors = 2;
#include <prefillshare/attention/cpu_kernels.inl>  // NOLINT(readability-duplicate-include)
}  // namespace avx2
CODEGEMM_TARGET_END

CODEGEMM_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
inline constexpr std::int64_t kLanes = 16;
inline constexpr std::int64_t kVectors = 4;
#include <prefillshare/attention/cpu_kernels.inl>  // NOLINT(readability-duplicate-include)
}  // namespace avx512
CODEGEMM_TARGET_END

/// With AVX-512 where the vectors are full.
inline void attend_rows_avx512(const AttentionProblem& problem, int kv_head, std::int64_t first_row,
                               std::int64_t count, float* memory) {
  if (problem.kv.head_dim % avx512::kLanes == 0) {
    avx512::attend_rows(problem, kv_head, first_row, count, memory);
  } else {
    avx2::attend_rows(problem, kv_head, first_row, count, memory);
  }
}

#endif  // __x86_64__

struct AttentionKernels {
  const char* name;
  void (*attend_rows)(const AttentionProblem& problem, int kv_head, std::int64_t first_row,
                      std::int64_t count, float* memory);
  void (*attend_keys)(const AttentionProblem& problem, int kv_head, std::int64_t first_key,
                      std::int64_t end_key, float* memory, float* partial);
  void (*merge_splits)(const float* partial, std::int64_t splits, std::int64_t split_stride,
                       std::int64_t head_dim, float* out);
};

inline constexpr AttentionKernels kPortableKernels = {"portable", portable::attend_rows,
                                                      portable::attend_keys, portable::merge_splits};
#if defined(__x86_64__)
inline constexpr AttentionKernels kAvx2Kernels = {"avx2", avx2::attend_rows, avx2::attend_keys,
                                                  avx2::merge_splits};
/// Few rows wait for memory: those kernels are AVX2's.
inline constexpr AttentionKernels kAvx512Kernels = {"avx512", attend_rows_avx512, avx2::attend_keys,
                                                    avx2::merge_splits};
#endif

/// The best this machine runs.
[[nodiscard]] inline const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("avx512dq");
  if (has_avx512) return kAvx512Kernels;
  if (has_avx2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace prefillshare::detail
