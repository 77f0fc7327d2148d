// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/amx.hpp - whether the processor and the system let this process use AMX's tiles of bytes.
// Layer: cpu (host only).
#pragma once

#include <codegemm/base/macros.hpp>

#if defined(__x86_64__) && defined(__linux__) && CODEGEMM_HAS_AVX512 && !defined(CODEGEMM_EMULATE_AVX512)
#define CODEGEMM_HAS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CODEGEMM_TARGET_AMX                                                                                  \
  __attribute__((                                                                                            \
      target("amx-tile,amx-int8,avx512vbmi,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#else
#define CODEGEMM_HAS_AMX 0
#endif

namespace codegemm::detail {

/// Linux gives a process the tiles' 8 KiB of state when it first asks for them, and no more after that.
[[nodiscard]] inline bool ask_for_amx() noexcept {
#if CODEGEMM_HAS_AMX
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kTiles = 1U << 24;
  constexpr unsigned kBytes = 1U << 25;
  if ((d & kTiles) == 0 || (d & kBytes) == 0) return false;
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

/// Whether AMX can be used; asked once.
[[nodiscard]] inline bool amx_available() noexcept {
  static const bool granted = ask_for_amx();
  return granted;
}

}  // namespace codegemm::detail
