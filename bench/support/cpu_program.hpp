// SPDX-License-Identifier: Apache-2.0
//
// bench/support/cpu_program.hpp - what the suites without a GPU begin with.
#pragma once

#if !defined(NDEBUG) && !defined(__clang_analyzer__)
#error "Benchmarks must be built in Release mode: cmake --preset bench"
#endif

#include <string>

#include "run_suite.hpp"

#if !defined(CODEGEMM_BENCH_FOLDER)
#define CODEGEMM_BENCH_FOLDER "bench"  // from the repository's root
#endif

namespace codegemm::bench {

/// A file that the suites come with, by its path from bench/.
[[nodiscard]] inline std::string bench_file(const char* path) {
  return std::string(CODEGEMM_BENCH_FOLDER) + '/' + path;
}

}  // namespace codegemm::bench
