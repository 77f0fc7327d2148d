// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/packed_matrix_test.cpp - the GPU layout, byte by byte, without a GPU.
#include <codegemm/cuda/packed_matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include <codegemm/cuda/regimes/gather_plan.hpp>
#include <support/catch.hpp>
#include <support/quantized.hpp>
#include <support/random.hpp>

namespace codegemm::test {
namespace {

// The power of two that brings the largest value to 32 .. 64.
float factor_to_fill(std::span<const Half> values) {
  float most = 0.0F;
  for (const Half value : values) most = std::max(most, std::abs(value.to_float()));
  float factor = 1.0F;
  while (most * factor >= 64.0F) factor *= 0.5F;
  while (most * factor < 32.0F) factor *= 2.0F;
  return factor;
}

TEST_CASE("cuda pack: every code and scale lies where the layout says, the rest is zero") {
  Rng rng(seed_or(1));
  for (const Format format : {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 1, 8, 32},
                              Format{2, 3, 5, 8}, Format{16, 4, 4, -1}, Format{4, 1, 6, 4},
                              Format{8, 1, 8, 24}, Format{8, 1, 16, -1}, Format{4, 2, 10, 64}}) {
    for (const std::int64_t rows : {1, 16, 37}) {
      const std::int64_t cols = 624;
      for (const int sets : {0, format.m}) {
        CAPTURE(format_name(format), rows, sets);
        const QuantizedMatrix w = random_matrix(format, rows, cols, rng);
        const auto packed = cuda::pack(w.view(), {sets});
        REQUIRE(packed.ok());
        const cuda::PackedLayout& l = packed->layout();
        std::vector<std::byte> rest(packed->bytes().begin(), packed->bytes().end());
        REQUIRE(rest.size() == l.bytes);
        const float codebook_factor = factor_to_fill(w.codebooks());
        const float scale_factor = factor_to_fill(w.scales());
        REQUIRE(packed->view(nullptr).unscale * codebook_factor * scale_factor == 1.0F);
        const int per_lane = l.sets / format.m;
        const auto tile_at = [&](std::int64_t granule, std::int64_t n) {
          return l.tiles_at + static_cast<std::size_t>((granule * l.row_tiles + n / 16) * l.tile_bytes);
        };
        for (std::int64_t n = 0; n < rows; ++n) {
          for (std::int64_t j = 0; j < cols / format.v; ++j) {
            const std::int64_t granule = j / (std::int64_t{32} * per_lane);
            const int lane = static_cast<int>(j / per_lane % 32);
            const int slot = cuda::row_slot(lane, static_cast<int>(n % 16));
            for (int c = 0; c < format.m; ++c) {
              for (int byte = 0; byte < l.code_bytes; ++byte) {
                const int p = (static_cast<int>(j) % per_lane * format.m + c) * l.code_bytes + byte;
                const int offset = cuda::stream_offset(l.row_bytes(), slot, p);
                const cuda::StreamPlace place = cuda::stream_place(l.row_bytes(), offset);
                REQUIRE((place.slot == slot && place.byte == p));
                const int at = cuda::tile_offset(lane, offset);
                std::byte& code = rest[tile_at(granule, n) + static_cast<std::size_t>(at)];
                REQUIRE(code == static_cast<std::byte>(w.view().code(c, n, j) >> (8 * byte)));
                code = std::byte{0};
              }
            }
            if (l.scale_steps == 5) continue;
            // The lane that ends with this row in its group of 2^scale_steps lanes holds the scale.
            const auto count = static_cast<std::size_t>(16 >> l.scale_steps);
            for (int other = lane >> l.scale_steps << l.scale_steps;
                 other < ((lane >> l.scale_steps) + 1) << l.scale_steps; ++other) {
              const auto s = static_cast<std::size_t>(cuda::row_slot(other, static_cast<int>(n % 16)));
              if (s >= count) continue;
              Half scale;
              const std::size_t at = tile_at(granule, n) + static_cast<std::size_t>(l.scales_at()) +
                                     (static_cast<std::size_t>(other) * count + s) * 2;
              std::memcpy(&scale, packed->bytes().data() + at, 2);
              REQUIRE(scale.to_float() == w.view().scale(n, j * format.v) * scale_factor);
              std::memset(&rest[at], 0, 2);
            }
          }
          if (l.scale_steps == 5) std::memset(&rest[l.row_scales_at + static_cast<std::size_t>(n) * 2], 0, 2);
        }
        bool same = true;
        for (std::size_t i = 0; i < w.codebooks().size(); ++i) {
          Half value;
          std::memcpy(&value, &rest[i * 2], 2);
          same = same && value.to_float() == w.codebooks()[i].to_float() * codebook_factor;
          std::memset(&rest[i * 2], 0, 2);
        }
        REQUIRE(same);
        REQUIRE(std::all_of(rest.begin(), rest.end(), [](std::byte byte) { return byte == std::byte{0}; }));
      }
    }
  }
}

TEST_CASE("cuda plan: covers every granule and tile once, within the card") {
  Rng rng(seed_or(2));
  for (int round = 0; round < 3000; ++round) {
    const Format format{2 << rng.below(4), static_cast<int>(1 + rng.below(4)), 8, -1};
    const std::int64_t rows = 1 + rng.below(round % 2 == 0 ? 300 : 200000);
    const std::int64_t cols = format.v * (1 + rng.below(round % 3 == 0 ? 40 : 8000));
    const auto layout = cuda::packed_layout(format, rows, cols);
    REQUIRE(layout.ok());
    cuda::GatherLimits limits;
    limits.multiprocessors = static_cast<int>(1 + rng.below(140));
    limits.shared_bytes = 232448;
    if (round % 4 != 0) limits.clusters = {0, 132, 66, 40, 30, 22, 16, 16, 15};
    const bool half = round % 7 < 3;  // a HalfPsumbook
    limits.tokens = half && round % 4 == 1 ? 2 : 1;
    const auto tokens = static_cast<std::size_t>(limits.tokens);
    if (half) {
      limits.staged_bytes = tokens * cuda::kHalfStagedBytes;
      if (round % 2 == 0) limits.shared_bytes = 115712;  // two blocks a multiprocessor
    }
    limits.table_bytes =
        half ? tokens * cuda::kHalfTableBytes : static_cast<std::size_t>(layout->sets) * 32768;
    limits.warps = round % 5 == 0 ? 16 : round % 5 == 1 ? 20 : 32;
    const cuda::GemmTuning tuning{static_cast<int>(1 + rng.below(8)), 1, 0};
    const cuda::GatherPlan p = cuda::plan_gather(*layout, limits, tuning);
    CAPTURE(round, rows, cols, p.splits, p.groups, p.chunks, p.granules_per_block, p.tiles_per_block);
    REQUIRE(p.splits >= 1);
    REQUIRE(p.splits <= tuning.cluster);
    REQUIRE(p.cluster == (p.splits > 1));
    const std::int64_t blocks = static_cast<std::int64_t>(p.splits) * p.groups;
    REQUIRE(blocks * p.granules_per_block >= layout->granules);
    REQUIRE((blocks - 1) * p.granules_per_block < layout->granules);  // no block without work
    REQUIRE(static_cast<std::int64_t>(p.chunks) * p.tiles_per_block >= layout->row_tiles);
    REQUIRE(static_cast<std::int64_t>(p.chunks - 1) * p.tiles_per_block < layout->row_tiles);
    REQUIRE(p.shared_bytes <= limits.shared_bytes);
    REQUIRE((p.workspace_bytes(*layout, limits.tokens) > 0) == (p.groups > 1));
    if (half) {  // tables, activations, and the sums: own and pushed ones
      const int owned = p.cluster ? p.ranks * ((limits.warps + p.ranks - 1) / p.ranks) : 0;
      const int pushed = owned * ((p.tiles_per_block + limits.warps - 1) / limits.warps);
      REQUIRE(p.tables <= std::min(2, p.granules_per_block));
      REQUIRE(p.sums_at == static_cast<std::size_t>(p.tables) * limits.table_bytes +
                               static_cast<std::size_t>(p.granules_per_block) * limits.staged_bytes +
                               cuda::kSquaresBytes + cuda::kRowBarrierBytes);
      const std::size_t sums = static_cast<std::size_t>(p.tiles_per_block + pushed) * 64 * tokens;
      REQUIRE(cuda::kWindowStart + p.sums_at + sums + (p.cluster ? 8 : 0) <= p.shared_bytes);
    }
  }
}

}  // namespace
}  // namespace codegemm::test
