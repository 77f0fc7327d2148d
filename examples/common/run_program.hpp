// SPDX-License-Identifier: Apache-2.0
//
// examples/common/run_program.hpp - what a main function ends with: arguments are read, failures told.
#pragma once

#include <cstdio>
#include <exception>

#include <CLI/CLI.hpp>

namespace prefillshare::examples {

/// Reads the arguments, then ends with what run() gives. Arguments that cannot be and exceptions are told on
/// stderr and end with 2. `complete` may throw a CLI::ParseError of its own for what only all arguments
/// together show.
template <class Run, class Complete>
[[nodiscard]] int run_program(const char* name, CLI::App& app, int argc, char** argv, Run&& run,
                              Complete&& complete) {
  try {
    app.parse(argc, argv);
    complete();
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    return run();
  } catch (const std::exception& e) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s: %s\n", name, e.what());
    return 2;
  }
}
template <class Run>
[[nodiscard]] int run_program(const char* name, CLI::App& app, int argc, char** argv, Run&& run) {
  return run_program(name, app, argc, argv, run, [] {});
}

}  // namespace prefillshare::examples
