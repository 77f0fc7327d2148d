// SPDX-License-Identifier: Apache-2.0
//
// common/mpi_program.hpp - run_program() for a job of processes.
// Layer: examples (host only).
#pragma once

#include <mpi.h>

#include <cstdio>
#include <exception>

#include <CLI/CLI.hpp>

#include <prefillshare/serve/mpi_channel.hpp>

namespace prefillshare::examples {

/// run() between MPI_Init and MPI_Finalize. Where it throws the whole job ends: others would wait for what
/// does not come.
template <class Run>
[[nodiscard]] int run_mpi_program(const char* name, CLI::App& app, int argc, char** argv, Run&& run) {
  MPI_Init(&argc, &argv);
  int code = 2;
  try {
    app.parse(argc, argv);
    code = run();
  } catch (const CLI::ParseError& e) {
    code = app.exit(e) == 0 ? 0 : 2;
  } catch (const std::exception& e) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s: %s\n", name, e.what());
    MPI_Abort(MPI_COMM_WORLD, 2);
  }
  MPI_Finalize();
  return code;
}

}  // namespace prefillshare::examples
