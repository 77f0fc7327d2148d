// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/fused_wgmma_plan_test.cpp - how a fused product by wgmma is cut.
#include <codegemm/cuda/regimes/fused_wgmma_plan.hpp>

#include <codegemm/cuda/plan_layout.hpp>
#include <support/catch.hpp>

namespace codegemm::test {
namespace {

using cuda::FusedWgmmaLimits;
using cuda::FusedWgmmaPlan;
using cuda::kTileRows;

// Vectors of `codebooks` codebooks with 16 columns a lane on an H200.
FusedWgmmaLimits limits_of(int codebooks) {
  FusedWgmmaLimits out;
  out.cluster_pairs = 66;
  out.shared_bytes = 232448;
  out.table_bytes = static_cast<std::size_t>((codebooks + 1) / 2 * 65536);
  out.code_stage_bytes = 8 * (1088 + 64);
  out.other_bytes = 8 * 1280 + 512;
  out.group_bytes = 4 * 1280 + 64;
  out.lane_span = 16;
  return out;
}

TEST_CASE("cuda fused wgmma: every plan covers the tokens and fits") {
  for (const int kind : {0, 1, 2, 3, 4, 5, 6, 7}) {
    const int codebooks = kind / 2 + 1;
    const bool gated = kind % 2 != 0;
    FusedWgmmaLimits limits = limits_of(codebooks);
    limits.halves = gated;
    if (gated) limits.other_bytes += 2 * 8 * 1280, limits.group_bytes = 0;
    for (const std::int64_t rows : {96, 1024, 4096, 28672}) {
      for (const std::int64_t cols : {512, 4096, 14336}) {
        for (const std::int64_t tokens : {1, 17, 64, 100, 512, 8192}) {
          for (const int token_tile : {0, 32, 64, 128, 256}) {
            cuda::GemmTuning tuning;
            tuning.token_tile = token_tile;
            const FusedWgmmaPlan p =
                cuda::plan_fused_wgmma(layout_of(rows, cols), cols, tokens, limits, tuning);
            CAPTURE(codebooks, gated, rows, cols, tokens, token_tile, p.token_tile, p.x_stages,
                    p.shared_bytes);
            if (p.token_tile == 0) {
              CHECK(token_tile != 0);
              continue;
            }
            CHECK((token_tile == 0 || p.token_tile == token_tile));
            CHECK(std::int64_t{p.token_tile} * p.token_blocks >= tokens);
            CHECK(p.x_stages >= 3);
            CHECK(p.code_stages >= 2);
            CHECK(p.code_stages <= 8);
            CHECK(p.x_stages <= 8);
            CHECK((p.x_stages % 4 == 0 || (gated && p.token_tile == 256)));
            CHECK((p.groups == 2 || (p.groups == 3 && p.token_tile == 128 && !gated)));
            CHECK((p.groups == 2 || p.partial_bytes == 0));
            CHECK(p.row_tiles == (gated ? 8 : p.groups * 8));
            CHECK(p.shared_bytes ==
                  limits.table_bytes + limits.other_bytes + (p.groups == 3 ? limits.group_bytes : 0) +
                      static_cast<std::size_t>(p.code_stages * p.groups) * limits.code_stage_bytes / 2 +
                      static_cast<std::size_t>(p.x_stages) * static_cast<std::size_t>(p.token_tile) * 128);
            CHECK(p.shared_bytes <= limits.shared_bytes);
            CHECK(p.partial_bytes <= std::size_t{32} << 20);
          }
        }
      }
    }
  }
}

TEST_CASE("cuda fused wgmma: three warpgroups, where that gives every cluster one product") {
  const std::int64_t rows = 6144;
  const std::int64_t cols = 4096;
  const FusedWgmmaPlan p =
      cuda::plan_fused_wgmma(layout_of(rows, cols), cols, 512, limits_of(1), cuda::GemmTuning{});
  CHECK(p.groups == 3);
  CHECK(p.token_tile == 128);
  CHECK(p.schedule.clusters == 64);
  CHECK(p.partial_bytes == 0);
  cuda::GemmTuning two;
  two.warpgroups = 2;
  CHECK(cuda::plan_fused_wgmma(layout_of(rows, cols), cols, 512, limits_of(1), two).groups == 2);
}

TEST_CASE("cuda fused wgmma: a third warpgroup waits for its centroids out of memory, too") {
  FusedWgmmaLimits limits = limits_of(1);  // codes of 16 bits
  limits.table_bytes = 0;
  limits.lane_span = 8;
  limits.step_cycles = 300.0;
  for (const int tokens : {32, 64}) {
    const FusedWgmmaPlan p =
        cuda::plan_fused_wgmma(layout_of(57344, 8192), 8192, tokens, limits, cuda::GemmTuning{});
    CHECK(p.groups == 2);
    CHECK(p.token_tile == tokens);
  }
}

}  // namespace
}  // namespace codegemm::test
