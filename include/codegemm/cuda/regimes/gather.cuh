// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/gather.cuh - few tokens: gathering from Psumbooks.
// Layer: cuda/regimes (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <codegemm/base/config_list.hpp>
#include <codegemm/cuda/problem.cuh>
#include <codegemm/cuda/regimes/gather_kernels.cuh>
#include <codegemm/cuda/regimes/gather_plan.hpp>

namespace codegemm::cuda::detail {

/// The regime over a config_list of gather configurations, see configs.cuh.
template <class Configs>
struct GatherRegime {
  // Calls fn(Config{}) for the configuration that serves a packed matrix on a device.
  template <class Fn>
  [[nodiscard]] static bool match(const DevicePackedView& w, const Device& device, Fn&& fn) {
    return first_match(
        Configs{},
        [&](auto c) {
          using Config = decltype(c);
          const auto shared = static_cast<std::size_t>(BookOf<Config, 1>::bytes(w.format.b)) +
                              (kHalfPsumbook<Config> ? kWindowStart + kHalfStagedBytes + 64 : 64);
          return w.layout.code_bytes == 1 && c.kCodebooks == w.format.m && c.kSets == w.layout.sets &&
                 (c.kVecLen == 0 || c.kVecLen == w.format.v) &&
                 (c.kCodeBits == 0 || c.kCodeBits == w.format.b) &&
                 (c.kScaleSteps < 0 || c.kScaleSteps == w.layout.scale_steps) &&
                 shared <= static_cast<std::size_t>(device.shared_bytes);
        },
        fn);
  }

  template <class Config, int Tokens>
  [[nodiscard]] static GatherPlan plan(const DevicePackedView& w, const Device& device, bool gated,
                                       const GemmTuning& tuning) {
    GatherLimits limits;
    limits.halves = gated;
    limits.multiprocessors = device.multiprocessors;
    limits.shared_bytes = static_cast<std::size_t>(device.shared_bytes);
    limits.clusters = device.clusters;
    using Book = BookOf<Config, Tokens>;
    limits.table_bytes = static_cast<std::size_t>(Book::bytes(w.format.b));
    limits.staged_bytes = static_cast<std::size_t>(Book::kStagedBytes);
    limits.tokens = Tokens;
    limits.warps = Config::kThreads / 32;
    return plan_gather(w.layout, limits, tuning);
  }

  /// Whether a problem is served. SwiGLU needs clusters.
  template <class X, class Y>
  [[nodiscard]] static bool serves(const GemmProblem<X, Y>& p, const Device& device) {
    bool fits = false;
    return granule_bytes(p.weights) < (std::int64_t{1} << 32) &&
           match(p.weights, device,
                 [&](auto c) {
                   fits = plan<decltype(c), 1>(p.weights, device, gated(p), p.tuning).splits > 0;
                 }) &&
           fits;
  }

  /// Whether this is faster for one token than mma.sync although there is at most a row tile for each
  /// multiprocessor: where each block builds one Psumbook of fp16, and of two codebooks, or the kernel
  /// normalizes the row as well. As measured on an H200 at 1024x4096.
  [[nodiscard]] static bool suits_few_rows(const DevicePackedView& w, const Device& device, bool normed) {
    bool suits = false;
    static_cast<void>(match(w, device, [&](auto c) {
      using Config = decltype(c);
      suits = kHalfPsumbook<Config> && (normed || Config::kCodebooks > 1) &&
              plan<Config, 1>(w, device, false, {}).granules_per_block == 1;
    }));
    return suits;
  }

  /// Whether one pass over the weights takes two tokens.
  [[nodiscard]] static bool takes_two(const DevicePackedView& w, const Device& device, bool gated,
                                      const GemmTuning& tuning) {
    bool two = false;
    static_cast<void>(match(w, device, [&](auto c) {
      using Config = decltype(c);
      if constexpr (Config::kPassTokens >= 2) two = plan<Config, 2>(w, device, gated, tuning).splits > 0;
    }));
    return two;
  }

  /// Whether the kernel for such weights can normalize a row: with a Psumbook of fp16.
  [[nodiscard]] static bool normalizes(const DevicePackedView& w, const Device& device) {
    bool half = false;
    return w.cols % 4 == 0 && match(w, device, [&](auto c) { half = kHalfPsumbook<decltype(c)>; }) && half;
  }

  template <class X, class Y>
  [[nodiscard]] static std::size_t workspace_bytes(const GemmProblem<X, Y>& p, const Device& device) {
    const DevicePackedView& w = p.weights;
    std::size_t bytes = 0;
    static_cast<void>(match(w, device, [&](auto c) {
      using Config = decltype(c);
      bytes = plan<Config, 1>(w, device, gated(p), p.tuning).workspace_bytes(w.layout, 1);
      if constexpr (Config::kPassTokens >= 2) {
        const GatherPlan two = plan<Config, 2>(w, device, gated(p), p.tuning);
        if (p.x.rows >= 2 && two.splits > 0) bytes = std::max(bytes, two.workspace_bytes(w.layout, 2));
      }
    }));
    return bytes;
  }

  template <class X, class Y>
  [[nodiscard]] static Status run(const GemmProblem<X, Y>& p, const Device& device, void* workspace,
                                  cudaStream_t stream) {
    const DevicePackedView& w = p.weights;
    GatherArgs args;
    const auto* const base = reinterpret_cast<const unsigned char*>(w.data);
    args.tiles = base + w.layout.tiles_at;
    args.codebooks = reinterpret_cast<const std::uint16_t*>(base + w.layout.codebooks_at);
    args.x_stride = p.x.stride;
    args.normed = p.normed;
    args.cols = static_cast<int>(w.cols);
    args.row_tiles = static_cast<int>(w.layout.row_tiles);
    args.granules = static_cast<int>(w.layout.granules);
    args.tile_bytes = w.layout.tile_bytes;
    args.granule_bytes = static_cast<unsigned>(granule_bytes(w));
    args.scale_steps = w.layout.scale_steps;
    args.v = w.format.v;
    args.code_bits = w.format.b;
    args.x_type = ScalarOf<X>::kType;
    const Output out = output_of(p);
    Status status;
    static_cast<void>(match(w, device, [&](auto c) {
      using Config = decltype(c);
      std::int64_t token = 0;
      while (token < p.x.rows && status.ok()) {
        args.x = reinterpret_cast<const std::uint16_t*>(p.x.row(token));
        args.out = from_token<Y>(out, token);
        if constexpr (Config::kPassTokens >= 2) {
          if (p.x.rows - token >= 2 && plan<Config, 2>(w, device, gated(p), p.tuning).splits > 0) {
            status = launch_pass<Config, 2>(args, p, device, workspace, stream);
            token += 2;
            continue;
          }
        }
        if constexpr (kHalfPsumbook<Config>) {
          if (narrow<Config>(p, device)) {
            status = launch_pass<Narrow<Config>, 1>(args, p, device, workspace, stream);
            ++token;
            continue;
          }
        }
        status = launch_pass<Config, 1>(args, p, device, workspace, stream);
        ++token;
      }
    }));
    return status;
  }

 private:
  [[nodiscard]] static std::int64_t granule_bytes(const DevicePackedView& w) {
    return static_cast<std::int64_t>(w.layout.row_tiles) * w.layout.tile_bytes;
  }

  // Whether a smaller block is faster, as measured on an H200: where it has little to do in all, so that its
  // start counts, or where some warps of the larger one would have two tiles and most of them one.
  template <class Config, class Problem>
  [[nodiscard]] static bool narrow(const Problem& p, const Device& device) {
    constexpr int kMostTiles = 128;  // of all granules
    const GatherPlan plan = GatherRegime::plan<Narrow<Config>, 1>(p.weights, device, gated(p), p.tuning);
    const int tiles = plan.tiles_per_block;
    const bool uneven = tiles > Config::kThreads / 32 && tiles <= 2 * (Narrow<Config>::kThreads / 32);
    return plan.cluster && plan.groups == 1 && (tiles * plan.granules_per_block <= kMostTiles || uneven);
  }

  template <class Config, int Tokens, class Problem>
  [[nodiscard]] static Status launch_pass(GatherArgs args, const Problem& p, const Device& device,
                                          void* workspace, cudaStream_t stream) {
    const GatherPlan plan = GatherRegime::plan<Config, Tokens>(p.weights, device, gated(p), p.tuning);
    const PackedLayout& layout = p.weights.layout;
    args.granules_per_block = plan.granules_per_block;
    args.rows = cut_rows(layout.first_tile, layout.parts, plan.tiles_per_block, gated(p));
    args.splits = plan.splits;
    args.tables = plan.tables;
    args.sums_at = static_cast<int>(plan.sums_at);
    args.ranks_inverse =
        (65536U + static_cast<unsigned>(plan.ranks) - 1U) / static_cast<unsigned>(plan.ranks);
    constexpr int kWarps = Config::kThreads / 32;
    args.most = (plan.tiles_per_block + kWarps - 1) / kWarps;
    args.most_inverse = (65536U + static_cast<unsigned>(args.most) - 1U) / static_cast<unsigned>(args.most);
    args.slots = (kWarps + plan.ranks - 1) / plan.ranks * args.most;
    args.pushed_at = args.sums_at + Tokens * plan.tiles_per_block * kTileRows * 4;
    args.barrier_at = args.pushed_at + plan.ranks * Tokens * args.slots * kTileRows * 4;
    if constexpr (kHalfPsumbook<Config>) {
      const auto floats = static_cast<std::size_t>(args.cols + plan.granules_per_block * kHalfActivations);
      args.copies_row = device.arch >= 90 && args.normed.x != nullptr &&
                        floats * sizeof(float) <= static_cast<std::size_t>(plan.tables) * kHalfTableBytes;
    }
    // In many rounds the loads of the next tiles keep the memory busy, and asking ahead gets in their way.
    args.rounds_ahead = args.most >= 4 ? 0 : p.tuning.rounds_ahead;
    args.counters = static_cast<unsigned*>(workspace);
    args.partials = reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + kCounterBytes);
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(plan.ranks), static_cast<unsigned>(plan.chunks),
                      static_cast<unsigned>(plan.groups));
    shape.threads = Config::kThreads;
    shape.shared_bytes = plan.shared_bytes;
    shape.cluster = plan.cluster ? static_cast<unsigned>(plan.ranks) : 0;
    shape.overlap = p.overlap && device.arch >= 90;
    return GatherKernels<Config, Tokens>::run(plan.cluster, shape, args, stream);
  }
};

}  // namespace codegemm::cuda::detail
