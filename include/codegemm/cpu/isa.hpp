// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/isa.hpp - which instruction set the CPU kernels may use, found out when the program runs.
// Layer: cpu (host only).
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include <codegemm/base/macros.hpp>

#if CODEGEMM_HAS_AVX2
#include <cpuid.h>
#endif

namespace codegemm {

/// What a kernel is written in. kAvx2: AVX2 with FMA and F16C. kAvx512: the above with AVX-512 F, BW, VL and
/// DQ; kAvx512Vbmi: and VBMI, whose byte permutes look up 128 entries at once, and VNNI, which adds products
/// of 16 bits (Ice Lake and Zen 4 brought both). kNeon: 64-bit Arm.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vbmi = 3, kNeon = 4 };

/// As it is printed: "avx2".
[[nodiscard]] constexpr const char* isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Vbmi: return "avx512-vbmi";
    case Isa::kNeon: return "neon";
    case Isa::kPortable: break;
  }
  return "portable";
}

/// Whether kernels for AVX2 run where `isa` does.
[[nodiscard]] constexpr bool has_avx2(Isa isa) noexcept {
  return isa == Isa::kAvx2 || isa == Isa::kAvx512 || isa == Isa::kAvx512Vbmi;
}

/// Whether kernels for AVX-512 run where `isa` does.
[[nodiscard]] constexpr bool has_avx512(Isa isa) noexcept {
  return isa == Isa::kAvx512 || isa == Isa::kAvx512Vbmi;
}

namespace detail {

#if CODEGEMM_HAS_AVX2
// Clang 14's __builtin_cpu_supports() does not know it.
[[nodiscard]] inline bool has_f16c() noexcept {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

[[nodiscard]] inline Isa ask_processor() noexcept {
#if CODEGEMM_HAS_NEON
  return Isa::kNeon;
#elif CODEGEMM_HAS_AVX2
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return Isa::kPortable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return Isa::kAvx2;
  const bool vbmi = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  return vbmi ? Isa::kAvx512Vbmi : Isa::kAvx512;
#else
  return Isa::kPortable;
#endif
}

/// Whether looking bytes up in two registers takes as long as twice in one: three operations on Intel's
/// cores, one on AMD's.
[[nodiscard]] inline bool two_register_lookups_are_slow() noexcept {
#if CODEGEMM_HAS_AVX2
  static const bool intel = __builtin_cpu_is("intel") != 0;
  return intel;
#else
  return false;
#endif
}

/// Bytes of a core's first-level data cache; 32 KiB where the system does not tell.
[[nodiscard]] inline std::int64_t first_level_bytes() noexcept {
  constexpr std::int64_t kLeast = 32 * 1024;
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const std::int64_t bytes = std::max<std::int64_t>(kLeast, ::sysconf(_SC_LEVEL1_DCACHE_SIZE));
  return bytes;
#else
  return kLeast;
#endif
}

}  // namespace detail

/// The best of this machine; asked of the processor once.
[[nodiscard]] inline Isa detect_isa() noexcept {
  static const Isa best = detail::ask_processor();
  return best;
}

/// Whether this machine runs kernels written in `isa`.
[[nodiscard]] inline bool isa_available(Isa isa) noexcept {
  const Isa best = detect_isa();
  if (isa == Isa::kNeon || best == Isa::kNeon) return isa == best || isa == Isa::kPortable;
  return static_cast<int>(isa) <= static_cast<int>(best);
}

}  // namespace codegemm
