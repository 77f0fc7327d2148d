// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/regimes/fused_wgmma.cuh - weights looked up into wgmma: many tokens on compute capability
// 9.0.
// Layer: cuda/regimes (host, needs nvcc).
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda.h>

#include <codegemm/base/config_list.hpp>
#include <codegemm/cuda/problem.cuh>
#include <codegemm/cuda/regimes/fused_wgmma_kernels.cuh>
#include <codegemm/cuda/regimes/fused_wgmma_plan.hpp>
#include <codegemm/cuda/tensor_map.cuh>

namespace codegemm::cuda::detail {

/// The regime over a config_list of fused configurations, see configs.cuh; with or without SwiGLU.
template <class Configs, bool SwiGlu = true>
struct FusedWgmmaRegime {
  template <class Fn>
  [[nodiscard]] static bool match(const DevicePackedView& w, Fn&& fn) {
    return first_match(
        Configs{},
        [&](auto c) {
          return c.kVecLen == w.format.v && c.kCodebooks == w.format.m && c.kSets == w.layout.sets &&
                 c.kCodeBytes == w.layout.code_bytes &&
                 (c.kScaleSteps == 0 || c.kScaleSteps == w.layout.scale_steps);
        },
        fn);
  }

  template <class Config>
  [[nodiscard]] static FusedWgmmaPlan plan(const DevicePackedView& w, std::int64_t tokens,
                                           const Device& device, bool gated, const GemmTuning& tuning) {
    using Shape = FusedWgmmaShape<Config, 256>;  // what is asked for here does not depend on the tile
    FusedWgmmaLimits limits;
    limits.cluster_pairs = device.clusters[2];
    limits.shared_bytes = static_cast<std::size_t>(device.shared_bytes);
    limits.table_bytes = static_cast<std::size_t>(Shape::table_bytes(w.format.b));
    limits.code_stage_bytes = static_cast<std::size_t>(Shape::code_stage_bytes(w.layout.scale_steps));
    limits.other_bytes = (gated ? Shape::kGatedScratchBytes : Shape::kScratchBytes) + Shape::kBarrierBytes;
    limits.halves = gated;
    if (!gated) limits.group_bytes = Shape::kScratchBytes / 2 + 64;
    limits.lane_span = Shape::kLaneSpan;
    limits.lookup_cycles = (Config::kVecLen < 8 ? 70.0 : 42.0) * (Config::kCodebooks - 1);
    limits.step_cycles = Config::kCodeBytes == 1 ? 0.0 : 300.0;
    return plan_fused_wgmma(w.layout, w.cols, tokens, limits, tuning);
  }

  /// Whether a problem is served: 9.0 alone, and x as the copy engine wants it.
  template <class X, class Y>
  [[nodiscard]] static bool serves(const GemmProblem<X, Y>& p, const Device& device) {
    if (!SwiGlu && gated(p)) return false;
    if (device.arch != 90 || !device.wgmma) return false;
    if (p.weights.cols == 0 || !aligned(p.x.data, 16) || p.x.stride % 8 != 0) return false;
    bool fits = false;
    return match(p.weights,
                 [&](auto c) {
                   fits = plan<decltype(c)>(p.weights, p.x.rows, device, gated(p), p.tuning).token_tile > 0;
                 }) &&
           fits;
  }

  template <class X, class Y>
  [[nodiscard]] static std::size_t workspace_bytes(const GemmProblem<X, Y>& p, const Device& device) {
    std::size_t bytes = 0;
    static_cast<void>(match(p.weights, [&](auto c) {
      bytes = plan<decltype(c)>(p.weights, p.x.rows, device, gated(p), p.tuning).partial_bytes;
    }));
    return bytes == 0 ? 0 : kCounterBytes + bytes;
  }

  template <class X, class Y>
  [[nodiscard]] static Status run(const GemmProblem<X, Y>& p, const Device& device, void* workspace,
                                  cudaStream_t stream) {
    Status status;
    static_cast<void>(match(p.weights, [&](auto c) {
      using Config = decltype(c);
      const FusedWgmmaPlan plan =
          FusedWgmmaRegime::plan<Config>(p.weights, p.x.rows, device, gated(p), p.tuning);
      status = launch_tile<Config>(p, plan, workspace, stream);
    }));
    return status;
  }

 private:
  template <class X>
  [[nodiscard]] static Status describe(MatrixView<const X> x, int token_tile, CUtensorMap& map) {
    const auto encode = tensor_map_encoder();
    if (encode == nullptr) {
      return error(StatusCode::kCudaError, "cuda gemm: the driver has no cuTensorMapEncodeTiled");
    }
    const auto type = ScalarOf<X>::kType == ScalarType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(x.cols), static_cast<cuuint64_t>(x.rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(x.stride) * sizeof(X)};
    const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(token_tile / 2)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult code = encode(&map, type, 2, const_cast<X*>(x.data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) {
      return Status(StatusCode::kCudaError,
                    concat("cuTensorMapEncodeTiled: error ", static_cast<int>(code), " for x of ", x.rows,
                           " x ", x.cols, " with stride ", x.stride),
                    static_cast<int>(code));
    }
    return {};
  }

  template <class Config, class X, class Y>
  [[nodiscard]] static Status launch_tile(const GemmProblem<X, Y>& p, const FusedWgmmaPlan& plan,
                                          void* workspace, cudaStream_t stream) {
    const DevicePackedView& w = p.weights;
    FusedWgmmaArgs args;
    if (Status status = describe(p.x, plan.token_tile, args.x); !status.ok()) return status;
    const auto* const base = reinterpret_cast<const unsigned char*>(w.data);
    args.tiles = base + w.layout.tiles_at;
    args.codebooks = reinterpret_cast<const std::uint16_t*>(base + w.layout.codebooks_at);
    if (plan.partial_bytes > 0) {
      args.handed_over = static_cast<unsigned*>(workspace);
      args.partials = reinterpret_cast<float4*>(static_cast<std::byte*>(workspace) + kCounterBytes);
    }
    args.tokens = static_cast<int>(p.x.rows);
    args.row_tiles = static_cast<int>(w.layout.row_tiles);
    args.tile_bytes = w.layout.tile_bytes;
    args.scale_steps = w.layout.scale_steps;
    args.code_bits = w.format.b;
    args.schedule = plan.schedule;
    args.rows = cut_rows(w.layout.first_tile, w.layout.parts, plan.row_tiles, gated(p));
    args.token_blocks = plan.token_blocks;
    args.x_stages = plan.x_stages;
    args.code_stages = plan.code_stages;
    args.out = output_of(p);
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(2 * plan.schedule.clusters));
    shape.threads =
        plan.groups == 3 ? FusedWgmmaShape<Config, 128, 3>::kThreads : FusedWgmmaShape<Config, 128>::kThreads;
    shape.shared_bytes = plan.shared_bytes;
    shape.cluster = 2;
    shape.overlap = p.overlap;
    constexpr PairType kPairs =
        ScalarOf<X>::kType == ScalarType::kHalf ? PairType::kHalf : PairType::kBFloat16;
    if constexpr (SwiGlu) {
      if (gated(p)) {
        return FusedWgmmaKernels<Config, kPairs, true>::run(plan.token_tile, plan.groups, shape, args,
                                                            stream);
      }
    }
    return FusedWgmmaKernels<Config, kPairs, false>::run(plan.token_tile, plan.groups, shape, args, stream);
  }
};

}  // namespace codegemm::cuda::detail
