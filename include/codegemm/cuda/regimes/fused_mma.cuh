// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/fused_mma.cuh - weights looked up into mma.sync: some tokens, or many where there is
// no wgmma.
// Layer: cuda/regimes (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/config_list.hpp>
#include <codegemm/cuda/problem.cuh>
#include <codegemm/cuda/regimes/fused_mma_kernels.cuh>
#include <codegemm/cuda/regimes/fused_mma_plan.hpp>

namespace codegemm::cuda::detail {

/// The regime over a config_list of fused configurations, see configs.cuh; with or without SwiGLU. Needs no
/// workspace.
template <class Configs, bool SwiGlu = true>
struct FusedMmaRegime {
  template <class Fn>
  [[nodiscard]] static bool match(const DevicePackedView& w, const Device& device, bool gated,
                                  const GemmTuning& tuning, Fn&& fn) {
    return first_match(
        Configs{},
        [&](auto c) {
          using Config = decltype(c);
          const int steps = w.layout.scale_steps;
          return c.kVecLen == w.format.v && c.kCodebooks == w.format.m && c.kSets == w.layout.sets &&
                 c.kCodeBytes == w.layout.code_bytes && c.kScaleSteps != kWgmmaAlone &&
                 (c.kScaleSteps == 0 || c.kScaleSteps == steps) && w.cols > 0 &&
                 w.layout.bytes < (std::size_t{1} << 32) &&
                 plan<Config, 8>(w, device, gated, tuning).splits > 0;
        },
        [&](auto c) {
          if constexpr (c.kScaleSteps != kWgmmaAlone) fn(c);  // no kernel of the others is compiled
        });
  }

  template <class Config, int Tokens>
  [[nodiscard]] static FusedMmaPlan plan(const DevicePackedView& w, const Device& device, bool gated,
                                         const GemmTuning& tuning) {
    using Shape = FusedMmaShape<Config, Tokens>;
    FusedMmaLimits limits;
    limits.multiprocessors = device.multiprocessors;
    limits.shared_bytes = static_cast<std::size_t>(device.shared_bytes);
    limits.clusters = device.clusters;
    limits.table_bytes =
        static_cast<std::size_t>(Shape::table_bytes(w.format.b) + Shape::staged_bytes(w.layout.scale_steps));
    limits.sum_bytes =
        static_cast<std::size_t>(Shape::sum_bytes(Tokens, group_of<Config, Tokens>(w, device)));
    limits.tokens = Tokens;
    limits.halves = gated;
    limits.warps = Shape::kWarps;
    const int lookups = Shape::kSlabSpan * kTileRows * 2 * Config::kCodebooks;
    limits.slab_cycles = (lookups + 2 * Tokens * kTileRows * 4) / 128 + 12;
    // As measured on an H200: with one codebook the look-ups are too few to hide 16 tokens of x.
    if (Tokens == 16 && Config::kCodebooks == 1 && Config::kCodeBytes == 1) limits.window_cycles = 3200;
    return plan_fused_mma(w.layout, limits, tuning);
  }

  // Row tiles between two barriers: the most that leave room for the sums of a block's rows.
  template <class Config, int Tokens>
  [[nodiscard]] static int group_of(const DevicePackedView& w, const Device& device) {
    using Shape = FusedMmaShape<Config, Tokens>;
    const int fixed = Shape::table_bytes(w.format.b) + Shape::staged_bytes(w.layout.scale_steps);
    int group = Shape::kMostGroup;
    while (Shape::kStaged && group > 1 &&
           fixed + Shape::sum_bytes(Tokens, group) + kLeastBlockSums > device.shared_bytes)
      group /= 2;
    return group;
  }

  template <class X, class Y>
  [[nodiscard]] static bool serves(const GemmProblem<X, Y>& p, const Device& device) {
    return (SwiGlu || !gated(p)) && match(p.weights, device, gated(p), p.tuning, [](auto) {});
  }

  template <class X, class Y>
  [[nodiscard]] static Status run(const GemmProblem<X, Y>& p, const Device& device, cudaStream_t stream) {
    Status status;
    static_cast<void>(match(p.weights, device, gated(p), p.tuning, [&](auto c) {
      using Config = decltype(c);
      if (tiled<Config>(p, device)) {
        if constexpr (SwiGlu) {
          if (gated(p)) {
            status = launch_tiles<Config, true>(p, device, stream);
            return;
          }
        }
        status = launch_tiles<Config, false>(p, device, stream);
        return;
      }
      // Large tables leave no room for the sums of 16 tokens.
      const int most = plan<Config, 16>(p.weights, device, gated(p), p.tuning).splits > 0 ? 16 : 8;
      for (std::int64_t token = 0; token < p.x.rows && status.ok();) {
        const auto tokens = static_cast<int>(std::min<std::int64_t>(p.x.rows - token, most));
        status = tokens <= 8 ? launch_pass<Config, 8>(p, token, tokens, device, stream)
                             : launch_pass<Config, 16>(p, token, tokens, device, stream);
        token += tokens;
      }
    }));
    return status;
  }

 private:
  static constexpr int kWgmmaAlone = 1;  // kScaleSteps, see configs.cuh
  static constexpr int kLeastBlockSums = 8192;

  template <class Config, class X, class Y>
  [[nodiscard]] static bool tiled(const GemmProblem<X, Y>& p, const Device& device) {
    const int bits = p.weights.format.b;
    const int steps = p.weights.layout.scale_steps;
    const int bytes = gated(p) ? FusedMmaTileShape<Config, true>::shared_bytes(bits, steps)
                               : FusedMmaTileShape<Config, false>::shared_bytes(bits, steps);
    if (bytes > device.shared_bytes || !aligned(p.x.data, 16) || p.x.stride % 8 != 0) return false;
    // Weights looked up once for 128 tokens, without a split, against passes of 16.
    constexpr double kStepCycles = 700.0;    // of 16 k, as measured
    constexpr double kBlockCycles = 6000.0;  // its beginning and its output
    const auto divide_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    const PackedLayout& l = p.weights.layout;
    const int tiles =
        gated(p) ? FusedMmaTileShape<Config, true>::kRowTiles : FusedMmaTileShape<Config, false>::kRowTiles;
    const std::int64_t blocks = cut_rows(l.first_tile, l.parts, tiles, gated(p)).blocks() *
                                divide_up(p.x.rows, FusedMmaTileShape<Config, false>::kTokens);
    const double cycles = static_cast<double>(divide_up(blocks, device.multiprocessors)) *
                          (gated(p) ? 2 : 1) *
                          (static_cast<double>(divide_up(p.weights.cols, 16)) * kStepCycles + kBlockCycles);
    const FusedMmaPlan pass = plan<Config, 16>(p.weights, device, gated(p), p.tuning);
    return pass.splits == 0 ? p.x.rows > 16
                            : cycles < static_cast<double>(divide_up(p.x.rows, 16)) * pass.cost;
  }

  template <class Config, bool Gated, class X, class Y>
  [[nodiscard]] static Status launch_tiles(const GemmProblem<X, Y>& p, const Device& device,
                                           cudaStream_t stream) {
    using Shape = FusedMmaTileShape<Config, Gated>;
    const DevicePackedView& w = p.weights;
    FusedMmaTileArgs args;
    const auto* const base = reinterpret_cast<const unsigned char*>(w.data);
    args.tiles = base + w.layout.tiles_at;
    args.codebooks = reinterpret_cast<const std::uint16_t*>(base + w.layout.codebooks_at);
    args.x = reinterpret_cast<const std::uint16_t*>(p.x.data);
    args.x_stride = p.x.stride;
    args.tokens = static_cast<int>(p.x.rows);
    args.cols = static_cast<int>(w.cols);
    args.row_tiles = static_cast<int>(w.layout.row_tiles);
    args.tile_bytes = w.layout.tile_bytes;
    args.scale_steps = w.layout.scale_steps;
    args.code_bits = w.format.b;
    args.slabs = static_cast<int>((w.cols + Shape::kSlabSpan - 1) / Shape::kSlabSpan);
    args.rows = cut_rows(w.layout.first_tile, w.layout.parts, Shape::kRowTiles, Gated);
    args.out = output_of(p);
    const std::int64_t token_blocks = (p.x.rows + Shape::kTokens - 1) / Shape::kTokens;
    const std::int64_t blocks = token_blocks * args.rows.blocks();
    if (blocks >= (std::int64_t{1} << 31)) {
      return error(StatusCode::kUnsupported, "cuda gemm: ", blocks, " blocks for ", w.rows, " rows and ",
                   p.x.rows, " tokens");
    }
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(blocks));
    shape.threads = Shape::kThreads;
    shape.shared_bytes = static_cast<std::size_t>(Shape::shared_bytes(w.format.b, w.layout.scale_steps));
    shape.overlap = p.overlap && device.arch >= 90;
    constexpr PairType kPairs =
        ScalarOf<X>::kType == ScalarType::kHalf ? PairType::kHalf : PairType::kBFloat16;
    return FusedMmaKernels<Config, kPairs, Gated>::run_tiles(shape, args, stream);
  }

  template <class Config, int Tokens, class X, class Y>
  [[nodiscard]] static Status launch_pass(const GemmProblem<X, Y>& p, std::int64_t token, int tokens,
                                          const Device& device, cudaStream_t stream) {
    const DevicePackedView& w = p.weights;
    const FusedMmaPlan plan = FusedMmaRegime::plan<Config, Tokens>(w, device, gated(p), p.tuning);
    if (plan.splits == 0) {
      return error(StatusCode::kUnsupported, "cuda gemm: no grid for ", w.rows, " x ", w.cols, ", ", tokens,
                   " tokens, with ", p.tuning.splits, " splits");
    }
    FusedMmaArgs args;
    const auto* const base = reinterpret_cast<const unsigned char*>(w.data);
    args.tiles = base + w.layout.tiles_at;
    args.codebooks = reinterpret_cast<const std::uint16_t*>(base + w.layout.codebooks_at);
    args.x = reinterpret_cast<const std::uint16_t*>(p.x.row(token));
    args.x_stride = p.x.stride;
    args.tokens = tokens;
    args.cols = static_cast<int>(w.cols);
    args.row_tiles = static_cast<int>(w.layout.row_tiles);
    args.slabs = static_cast<int>(2 * w.layout.granules);
    args.tile_bytes = w.layout.tile_bytes;
    args.scale_steps = w.layout.scale_steps;
    args.code_bits = w.format.b;
    args.rows = cut_rows(w.layout.first_tile, w.layout.parts, plan.tiles_per_block, gated(p));
    args.slabs_per_split = plan.slabs_per_split;
    args.group = group_of<Config, Tokens>(w, device);
    args.tiles_ahead = plan.tiles_per_block > 2 ? p.tuning.rounds_ahead : 0;  // few come at once anyway
    args.x_aligned = aligned(args.x, 16) && p.x.stride % 8 == 0;
    args.codebook_bytes = static_cast<unsigned>(w.layout.row_scales_at - w.layout.codebooks_at);
    args.out = from_token<Y>(output_of(p), token);
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(plan.splits), static_cast<unsigned>(plan.blocks));
    shape.threads = kFusedMmaThreads;
    using Shape = FusedMmaShape<Config, Tokens>;
    shape.shared_bytes = plan.shared_bytes - static_cast<std::size_t>(Shape::sum_bytes(Tokens, args.group) -
                                                                      Shape::sum_bytes(tokens, args.group));
    shape.prefer_cache = Config::kCodeBytes == 2;
    shape.cluster = plan.splits > 1 ? static_cast<unsigned>(plan.splits) : 0;
    shape.overlap = p.overlap && device.arch >= 90;
    constexpr PairType kPairs =
        ScalarOf<X>::kType == ScalarType::kHalf ? PairType::kHalf : PairType::kBFloat16;
    if constexpr (SwiGlu) {
      if (gated(p)) return FusedMmaKernels<Config, kPairs, true>::run(Tokens, shape, args, stream);
    }
    return FusedMmaKernels<Config, kPairs, false>::run(Tokens, shape, args, stream);
  }
};

}  // namespace codegemm::cuda::detail
