// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/fused_mma_plan_test.cpp - how a fused product by mma.sync is cut.
#include <codegemm/cuda/regimes/fused_mma_plan.hpp>

#include <codegemm/cuda/plan_layout.hpp>
#include <support/catch.hpp>

namespace codegemm::test {
namespace {

using cuda::FusedMmaLimits;
using cuda::FusedMmaPlan;
using cuda::kTileRows;
using cuda::PackedLayout;

// m1v4 on an H200.
FusedMmaLimits limits_of(int tokens) {
  FusedMmaLimits out;
  out.multiprocessors = 132;
  out.shared_bytes = 232448;
  out.clusters = {0, 132, 66, 39, 30, 22, 17, 15, 15};
  out.table_bytes = 65536 + 16 * 3 * (1024 + 64);
  out.tokens = tokens;
  out.warps = 16;
  const int group = tokens == 8 ? 4 : 2;
  out.sum_bytes = static_cast<std::size_t>(2 * group * 16 * tokens * kTileRows * 4);
  if (tokens == 16) out.window_cycles = 3200;
  out.slab_cycles = (256 * kTileRows * 2 + 2 * tokens * kTileRows * 4) / 128 + 12;
  return out;
}

// Every slab of K and every row tile belongs to a block, and its shared memory holds what it sums.
void check_plan(const PackedLayout& l, const FusedMmaLimits& limits, const cuda::GemmTuning& tuning) {
  const FusedMmaPlan p = cuda::plan_fused_mma(l, limits, tuning);
  CAPTURE(l.row_tiles, l.granules, limits.tokens, limits.halves, tuning.splits, p.splits, p.blocks);
  CAPTURE(p.tiles_per_block, p.slabs_per_split, p.shared_bytes);
  REQUIRE(p.splits >= 1);
  CHECK((tuning.splits == 0 || p.splits == tuning.splits));
  const std::int64_t slabs = 2 * l.granules;
  CHECK((p.splits - 1) * p.slabs_per_split < slabs);
  CHECK(p.splits * p.slabs_per_split >= slabs);
  const int halves = limits.halves ? 2 : 1;
  CHECK(std::int64_t{p.blocks} * p.tiles_per_block * halves >= l.row_tiles);
  std::size_t bytes = limits.table_bytes + limits.sum_bytes;
  if (p.splits > 1 || p.slabs_per_split > limits.warps || limits.halves)
    bytes += static_cast<std::size_t>(p.tiles_per_block * halves * kTileRows * limits.tokens) * sizeof(float);
  CHECK(p.shared_bytes == bytes);
  CHECK(bytes <= limits.shared_bytes);
}

TEST_CASE("cuda fused mma: every plan covers the product and fits") {
  for (const int tokens : {8, 16}) {
    for (const bool halves : {false, true}) {
      FusedMmaLimits limits = limits_of(tokens);
      limits.halves = halves;
      for (const std::int64_t rows : {32, 96, 1024, 4096, 57344}) {
        for (const std::int64_t cols : {8, 512, 4096, 14336, 40960}) {
          const PackedLayout l = layout_of(rows, cols);
          for (const int splits : {0, 1, 2, 3}) {
            if (splits > 1 && (splits - 1) * ((2 * l.granules + splits - 1) / splits) >= 2 * l.granules)
              continue;
            cuda::GemmTuning tuning;
            tuning.splits = splits;
            check_plan(l, limits, tuning);
          }
        }
      }
    }
  }
}

TEST_CASE("cuda fused mma: a long K is cut where x takes long") {
  const auto splits = [](std::int64_t rows, std::int64_t cols, int tokens) {
    return cuda::plan_fused_mma(layout_of(rows, cols), limits_of(tokens), {}).splits;
  };
  CHECK(splits(8192, 28672, 16) > 1);
  CHECK(splits(8192, 8192, 16) > 1);
  CHECK(splits(8192, 8192, 8) == 1);
  CHECK(splits(4096, 4096, 16) == 1);  // one window as it is: a cluster's sum would only be added
  CHECK(splits(14336, 4096, 16) == 1);
}

TEST_CASE("cuda fused mma: no plan where the tables leave no room") {
  FusedMmaLimits limits = limits_of(16);
  limits.table_bytes = limits.shared_bytes;
  CHECK(cuda::plan_fused_mma(layout_of(1024, 4096), limits, {}).splits == 0);
  cuda::GemmTuning tuning;
  tuning.splits = 7;  // of 16 slabs three each, which six blocks take
  CHECK(cuda::plan_fused_mma(layout_of(1024, 4096), limits_of(16), tuning).splits == 0);
}

}  // namespace
}  // namespace codegemm::test
