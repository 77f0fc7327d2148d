// SPDX-License-Identifier: Apache-2.0
//
// bench/support/run_suite.hpp - the main function of a suite.
#pragma once

#include <cstdio>
#include <exception>

namespace codegemm::bench {

/// What program(argc, argv) throws is told, and ends with 1.
template <class Program>
int run_suite(const char* name, int argc, char** argv, Program&& program) {
  try {
    return program(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s: %s\n", name, e.what());
    return 1;
  }
}

}  // namespace codegemm::bench
