// SPDX-License-Identifier: Apache-2.0
//
// codegemm/gemm.cuh - the drop-in call on the GPU: y = x W^T with codebook-quantized weights.
// Layer: gemm (host, needs nvcc).
// See: examples/04_codegemm_cuda.cu
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <codegemm/base/config_list.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/cuda/configs.cuh>
#include <codegemm/cuda/device.cuh>
#include <codegemm/cuda/kernels/gather.cuh>
#include <codegemm/cuda/launch.cuh>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/cuda/plan.hpp>

namespace codegemm::cuda {

inline constexpr std::size_t kWorkspaceAlignment = 256;
/// More tokens than these are for the kernels of the other regimes.
inline constexpr std::int64_t kMaxGatherTokens = 8;

namespace detail {

template <class T>
struct ScalarOf {
  static constexpr bool kKnown = false;
};
template <ScalarType Type>
struct KnownScalar {
  static constexpr bool kKnown = true;
  static constexpr ScalarType kType = Type;
};
template <>
struct ScalarOf<Half> : KnownScalar<ScalarType::kHalf> {};
template <>
struct ScalarOf<__half> : KnownScalar<ScalarType::kHalf> {};
template <>
struct ScalarOf<BFloat16> : KnownScalar<ScalarType::kBFloat16> {};
template <>
struct ScalarOf<__nv_bfloat16> : KnownScalar<ScalarType::kBFloat16> {};
template <>
struct ScalarOf<float> : KnownScalar<ScalarType::kFloat> {};

}  // namespace detail

/// y[T][N] = x[T][K] W^T (+ bias). Every pointer is to device memory of the caller's.
/// X: __half or __nv_bfloat16 (or codegemm::Half, BFloat16); Y: these or float. Sums are fp32 for all of
/// them.
template <class X, class Y>
struct GemmProblem {
  static_assert(
      detail::ScalarOf<X>::kKnown && !std::is_same_v<X, float>,
      "codegemm: GemmProblem X must be __half, __nv_bfloat16, codegemm::Half or codegemm::BFloat16");
  static_assert(
      detail::ScalarOf<Y>::kKnown,
      "codegemm: GemmProblem Y must be float, __half, __nv_bfloat16, codegemm::Half or codegemm::BFloat16");
  DevicePackedView weights;
  MatrixView<const X> x;    // [T][K], any stride
  MatrixView<Y> y;          // [T][N], any stride; must not overlap x
  const Y* bias = nullptr;  // [N], or null
  /// The kernel may start while the one before it in the stream still runs, and then reads weights only. Set
  /// to false where that kernel writes the weights.
  bool overlap = true;
  GatherTuning tuning = {};
};

namespace detail {

// Calls fn(Config{}) for the configuration that serves a packed matrix.
template <class Configs, class Fn>
[[nodiscard]] bool match_gather(const DevicePackedView& w, Fn&& fn) {
  return first_match(
      Configs{},
      [&](auto c) {
        return c.kCodebooks == w.format.m && c.kSets == w.layout.sets &&
               (c.kVecLen == 0 || c.kVecLen == w.format.v) &&
               (c.kCodeBits == 0 || c.kCodeBits == w.format.b) &&
               (c.kScaleSteps < 0 || c.kScaleSteps == w.layout.scale_steps);
      },
      fn);
}

template <class Config, int Tokens>
using BookOf = Psumbook<Config::kVecLen, Config::kCodebooks, Config::kSets, Tokens>;

template <class Config, int Tokens>
[[nodiscard]] GatherPlan plan_of(const DevicePackedView& w, const Device& device,
                                 const GatherTuning& tuning) {
  GatherLimits limits;
  limits.multiprocessors = device.multiprocessors;
  limits.shared_bytes = static_cast<std::size_t>(device.shared_bytes);
  limits.clusters = device.clusters;
  limits.table_bytes = static_cast<std::size_t>(BookOf<Config, Tokens>::bytes(w.format.b));
  limits.tokens = Tokens;
  limits.warps = Config::kThreads / 32;
  return plan_gather(w.layout, limits, tuning);
}

// Tokens of the first pass of a configuration, and the size of its workspace.
template <class Config>
[[nodiscard]] std::size_t workspace_of(const DevicePackedView& w, const Device& device,
                                       const GatherTuning& tuning, std::int64_t tokens) {
  const std::size_t one = plan_of<Config, 1>(w, device, tuning).workspace_bytes(w.layout, 1);
  if constexpr (Config::kMaxTokens >= 2) {
    const std::size_t two = plan_of<Config, 2>(w, device, tuning).workspace_bytes(w.layout, 2);
    return tokens >= 2 ? (two > one ? two : one) : one;
  }
  return one;
}

template <class Config, int Tokens>
[[nodiscard]] Status launch_gather(GatherArgs args, const DevicePackedView& w, const Device& device,
                                   const GatherTuning& tuning, void* workspace, bool overlap,
                                   cudaStream_t stream) {
  const GatherPlan plan = plan_of<Config, Tokens>(w, device, tuning);
  args.granules_per_block = plan.granules_per_block;
  args.tiles_per_block = plan.tiles_per_block;
  args.warps_per_owner = (Config::kThreads / 32 + plan.splits - 1) / plan.splits;
  args.splits_inverse =
      (65536U + static_cast<unsigned>(plan.splits) - 1U) / static_cast<unsigned>(plan.splits);
  args.rounds_ahead = tuning.rounds_ahead;
  args.counters = static_cast<unsigned*>(workspace);
  args.partials = reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + plan.counter_bytes());
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(plan.splits), static_cast<unsigned>(plan.chunks),
                    static_cast<unsigned>(plan.groups));
  shape.threads = Config::kThreads;
  shape.shared_bytes = plan.shared_bytes;
  shape.cluster = plan.cluster ? static_cast<unsigned>(plan.splits) : 0;
  shape.overlap = overlap && device.arch >= 90;
  return plan.cluster ? launch(gather_kernel<Config, Tokens, true>, shape, args, stream)
                      : launch(gather_kernel<Config, Tokens, false>, shape, args, stream);
}

[[nodiscard]] inline bool aligned(const void* p, std::size_t to) {
  return reinterpret_cast<std::uintptr_t>(p) % to == 0;
}

}  // namespace detail

/// Whether run() takes this problem: kNullPointer, kMisaligned, kShapeMismatch, kInvalidArgument,
/// kIncompatible (a view packed by another version), kUnsupported (more than 8 tokens, no configuration in
/// Configs, a GPU before compute capability 8.0), each with the numbers. Looks at no device memory.
template <class Configs = GatherConfigs, class X, class Y>
[[nodiscard]] Status validate(const GemmProblem<X, Y>& p, const Device& device) {
  const DevicePackedView& w = p.weights;
  if (w.version != kPackedVersion) {
    return error(StatusCode::kIncompatible, "cuda gemm: weights packed by layout version ", w.version,
                 ", this code reads version ", kPackedVersion);
  }
  if (p.x.rows < 0 || p.y.rows < 0) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: x has ", p.x.rows, " rows, y has ", p.y.rows);
  }
  if (p.x.cols != w.cols) {
    return error(StatusCode::kShapeMismatch, "cuda gemm: x has ", p.x.cols,
                 " columns, the weights have K = ", w.cols);
  }
  if (p.y.cols != w.rows) {
    return error(StatusCode::kShapeMismatch, "cuda gemm: y has ", p.y.cols,
                 " columns, the weights have N = ", w.rows);
  }
  if (p.x.rows != p.y.rows) {
    return error(StatusCode::kShapeMismatch, "cuda gemm: x has ", p.x.rows, " rows (tokens), y has ",
                 p.y.rows);
  }
  if (p.x.stride < p.x.cols) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: x has stride ", p.x.stride, ", below its ",
                 p.x.cols, " columns");
  }
  if (p.y.stride < p.y.cols) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: y has stride ", p.y.stride, ", below its ",
                 p.y.cols, " columns");
  }
  if (p.x.rows > kMaxGatherTokens) {
    return error(StatusCode::kUnsupported, "cuda gemm: ", p.x.rows,
                 " tokens, but there are kernels for up to ", kMaxGatherTokens);
  }
  if (p.tuning.cluster < 1 || p.tuning.cluster > 8 || p.tuning.rounds_ahead < 0 ||
      p.tuning.rounds_ahead > 15 || p.tuning.shared_bytes < 0) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: tuning with clusters of ", p.tuning.cluster, ", ",
                 p.tuning.rounds_ahead, " rounds ahead, ", p.tuning.shared_bytes, " bytes of shared memory");
  }
  if (device.arch < 80) {
    return error(StatusCode::kUnsupported, "cuda gemm: compute capability ", device.arch / 10, ".",
                 device.arch % 10, ", but the kernels need 8.0");
  }
  if (p.x.rows == 0 || w.rows == 0) return {};
  const auto layout = packed_layout(w.format, w.rows, w.cols, PackOptions{w.layout.sets});
  if (!layout.ok()) return layout.status();
  if (layout->scale_steps != w.layout.scale_steps || layout->bytes != w.layout.bytes) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: the view's layout is not that of a packed ",
                 w.rows, " x ", w.cols, " matrix as ", format_name(w.format));
  }
  if (w.data == nullptr) return error(StatusCode::kNullPointer, "cuda gemm: weights is null");
  if (p.x.data == nullptr && w.cols > 0) return error(StatusCode::kNullPointer, "cuda gemm: x is null");
  if (p.y.data == nullptr) return error(StatusCode::kNullPointer, "cuda gemm: y is null");
  if (!detail::aligned(w.data, 256)) {
    return error(StatusCode::kMisaligned, "cuda gemm: weights is not aligned to 256 bytes");
  }
  if (!detail::aligned(p.x.data, sizeof(X)))
    return error(StatusCode::kMisaligned, "cuda gemm: x is misaligned");
  if (!detail::aligned(p.y.data, sizeof(Y)))
    return error(StatusCode::kMisaligned, "cuda gemm: y is misaligned");
  if (!detail::aligned(p.bias, sizeof(Y)))
    return error(StatusCode::kMisaligned, "cuda gemm: bias is misaligned");
  std::size_t table = 0;
  const bool found = detail::match_gather<Configs>(w, [&](auto c) {
    using Config = decltype(c);
    table =
        static_cast<std::size_t>(detail::BookOf<Config, 1>::bytes(w.format.b)) + kTileRows * sizeof(float);
  });
  if (!found) {
    return error(StatusCode::kUnsupported, "cuda gemm: no configuration for ", format_name(w.format),
                 " with ", w.layout.sets, " columns a lane");
  }
  if (table > static_cast<std::size_t>(device.shared_bytes)) {
    return error(StatusCode::kUnsupported, "cuda gemm: ", format_name(w.format), " needs ", table,
                 " bytes of shared memory a block, the device has ", device.shared_bytes);
  }
  return {};
}

/// Bytes of workspace for a problem that validate() takes; often 0. The workspace is aligned to 256 bytes,
/// zeroed once by the caller, and left zeroed where it has to be by each call. Two streams need two.
template <class Configs = GatherConfigs, class X, class Y>
[[nodiscard]] std::size_t workspace_bytes(const GemmProblem<X, Y>& p, const Device& device) {
  std::size_t bytes = 0;
  if (p.x.rows == 0 || p.weights.rows == 0) return 0;
  static_cast<void>(detail::match_gather<Configs>(p.weights, [&](auto c) {
    bytes = detail::workspace_of<decltype(c)>(p.weights, device, p.tuning, p.x.rows);
  }));
  return bytes;
}

/// Puts the product into the stream. Same bits on every run on the same card. Errors as validate(), and
/// kWorkspaceTooSmall, kMisaligned, kCudaError; then nothing was launched (kCudaError: perhaps part of the
/// tokens).
template <class Configs = GatherConfigs, class X, class Y>
[[nodiscard]] Status run(const GemmProblem<X, Y>& p, const Device& device, void* workspace, std::size_t size,
                         cudaStream_t stream) {
  if (Status status = validate<Configs>(p, device); !status.ok()) return status;
  const DevicePackedView& w = p.weights;
  if (p.x.rows == 0 || w.rows == 0) return {};
  const std::size_t needed = workspace_bytes<Configs>(p, device);
  if (size < needed) {
    return error(StatusCode::kWorkspaceTooSmall, "cuda gemm: workspace of ", size, " bytes, needs ", needed);
  }
  if (needed > 0 && workspace == nullptr)
    return error(StatusCode::kNullPointer, "cuda gemm: workspace is null");
  if (needed > 0 && !detail::aligned(workspace, kWorkspaceAlignment)) {
    return error(StatusCode::kMisaligned, "cuda gemm: workspace is not aligned to ", kWorkspaceAlignment,
                 " bytes");
  }
  GatherArgs args;
  const auto* const base = reinterpret_cast<const unsigned char*>(w.data);
  args.tiles = base + w.layout.tiles_at;
  args.codebooks = reinterpret_cast<const std::uint16_t*>(base + w.layout.codebooks_at);
  args.row_scales = w.layout.scale_steps == 5 && w.cols > 0
                        ? reinterpret_cast<const std::uint16_t*>(base + w.layout.row_scales_at)
                        : nullptr;
  args.bias = p.bias;
  args.x_stride = p.x.stride;
  args.y_stride = p.y.stride;
  args.rows = static_cast<int>(w.rows);
  args.cols = static_cast<int>(w.cols);
  args.row_tiles = static_cast<int>(w.layout.row_tiles);
  args.granules = static_cast<int>(w.layout.granules);
  args.tile_bytes = w.layout.tile_bytes;
  args.scale_steps = w.layout.scale_steps;
  args.v = w.format.v;
  args.code_bits = w.format.b;
  args.x_type = detail::ScalarOf<X>::kType;
  args.y_type = detail::ScalarOf<Y>::kType;
  Status status;
  static_cast<void>(detail::match_gather<Configs>(w, [&](auto c) {
    using Config = decltype(c);
    std::int64_t token = 0;
    while (token < p.x.rows && status.ok()) {
      args.x = reinterpret_cast<const std::uint16_t*>(p.x.row(token));
      args.y = p.y.row(token);
      if constexpr (Config::kMaxTokens >= 2) {
        if (p.x.rows - token >= 2) {
          static_cast<void>(status = detail::launch_gather<Config, 2>(args, w, device, p.tuning, workspace,
                                                                      p.overlap, stream));
          token += 2;
          continue;
        }
      }
      static_cast<void>(
          status = detail::launch_gather<Config, 1>(args, w, device, p.tuning, workspace, p.overlap, stream));
      ++token;
    }
  }));
  return status;
}

}  // namespace codegemm::cuda
