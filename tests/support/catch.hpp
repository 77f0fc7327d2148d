// SPDX-License-Identifier: Apache-2.0
//
// tests/support/catch.hpp - Catch2, version 3 where there is one, else Debian 12's version 2.
// The one place that knows the difference; every test includes this and nothing else of Catch2.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)

#include <catch2/catch_all.hpp>

// nvcc's front end (13.0.88) never ends on a file where a namespace has a declaration behind TEST_CASE's
// pragmas and functions before.
#ifdef __CUDACC__
#undef CATCH_INTERNAL_START_WARNINGS_SUPPRESSION
#undef CATCH_INTERNAL_STOP_WARNINGS_SUPPRESSION
#undef CATCH_INTERNAL_SUPPRESS_UNUSED_VARIABLE_WARNINGS
#define CATCH_INTERNAL_START_WARNINGS_SUPPRESSION
#define CATCH_INTERNAL_STOP_WARNINGS_SUPPRESSION
#define CATCH_INTERNAL_SUPPRESS_UNUSED_VARIABLE_WARNINGS
#endif

#define TEST_SKIP(reason) SKIP(reason)

#else

#include <catch2/catch.hpp>

#include <cstdlib>
#include <iostream>

namespace codegemm::test {
// Version 2 has no SKIP. CTest runs each test case in a process of its own and reads exit code 4 as
// "Skipped", which is also what version 3 returns.
[[noreturn]] inline void skip(const char* reason) {
  std::cout << "SKIPPED: " << reason << '\n' << std::flush;
  std::_Exit(4);
}
}  // namespace codegemm::test

#define TEST_SKIP(reason) ::codegemm::test::skip(reason)

#endif
