// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/psumbook_task.hpp - the operands of a multiplication through Psumbooks, one task of it and
// a worker's scratch.
// Layer: cpu (host only).
#pragma once

#include <cstdint>

#include <codegemm/base/matrix_view.hpp>
#include <codegemm/cpu/lookup_args.hpp>
#include <codegemm/cpu/plan.hpp>
#include <codegemm/pack.hpp>

namespace codegemm::detail {

/// The operands of one multiplication and its workspace, which begins with the workers' scratch.
struct GemmArgs {
  const PackedView& w;
  MatrixView<const float> x;  // [T][K]
  MatrixView<float> y;        // [T][N]
  float* workspace;
};

/// One task's rows [first_block, first_block + blocks) and tiles [first_tile, last_tile).
struct PsumbookTask {
  std::int64_t first_block;
  std::int64_t blocks;
  std::int64_t first_tile;
  std::int64_t last_tile;
  std::int64_t first_token;
  std::int64_t tokens;  // <= lanes, of lookups <= 8
  int lanes;
};

/// A worker's scratch.
struct PsumbookScratch {
  float* tables;
  std::uint8_t* encoded;
  Flush* flushes;
  float* x_tile;
  float* part;
  float* sums;

  PsumbookScratch(const PsumbookPlan& plan, float* memory)
      : tables(memory),
        encoded(reinterpret_cast<std::uint8_t*>(memory + plan.table_floats)),
        flushes(reinterpret_cast<Flush*>(memory + plan.table_floats + plan.encoded_floats)),
        x_tile(memory + plan.table_floats + plan.encoded_floats + plan.flush_floats),
        part(x_tile + plan.x_floats),
        sums(part + (plan.lookup ? 0 : plan.sum_floats)) {}
};

}  // namespace codegemm::detail
