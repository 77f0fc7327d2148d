// SPDX-License-Identifier: Apache-2.0
//
// codegemm/gemm.cuh - the drop-in call on the GPU: y = x W^T with codebook-quantized weights.
// Layer: gemm (host, needs nvcc).
// See: examples/04_codegemm_gpu.cu
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>
#include <codegemm/cuda/configs.cuh>
#include <codegemm/cuda/crossovers.hpp>
#include <codegemm/cuda/device.cuh>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/cuda/problem.cuh>
#include <codegemm/cuda/regimes/fused_mma.cuh>
#include <codegemm/cuda/regimes/fused_wgmma.cuh>
#include <codegemm/cuda/regimes/gather.cuh>

namespace codegemm::cuda {
namespace detail {

template <class Configs>
[[nodiscard]] constexpr bool has_swiglu() {
  if constexpr (requires { Configs::kSwiGlu; })
    return Configs::kSwiGlu;
  else
    return true;
}
template <class Configs>
using FusedMmaOf = FusedMmaRegime<typename Configs::Fused, has_swiglu<Configs>()>;
template <class Configs>
using FusedWgmmaOf = FusedWgmmaRegime<typename Configs::Fused, has_swiglu<Configs>()>;

// See regime_of(). normed: with a NormedRow, which only gathering takes.
template <class Configs, class X, class Y>
[[nodiscard]] Regime regime_with(const GemmProblem<X, Y>& p, const Device& device, bool normed) {
  using Gather = GatherRegime<typename Configs::Gather>;
  using FusedMma = FusedMmaOf<Configs>;
  using FusedWgmma = FusedWgmmaOf<Configs>;
  const DevicePackedView& w = p.weights;
  const auto may = [&](Regime regime) {
    return p.tuning.regime == Regime::kAuto || p.tuning.regime == regime;
  };
  const bool gather = may(Regime::kGather) && Gather::serves(p, device);
  const bool mma = may(Regime::kFusedMma) && FusedMma::serves(p, device);
  const bool wgmma = may(Regime::kFusedWgmma) && FusedWgmma::serves(p, device);
  // With at most a row tile for each multiprocessor, building Psumbooks is most of the work.
  const bool few_rows = w.layout.row_tiles <= device.multiprocessors &&
                        !(gather && p.x.rows == 1 && Gather::suits_few_rows(w, device, normed));
  const LastTokens last =
      last_tokens(w.format, w.rows, w.cols, {device.arch, device.multiprocessors, device.memory_bits});
  // Tokens gathered one by one are slower than mma.sync.
  const bool one_by_one =
      p.x.rows > 1 && !(gather && Gather::takes_two(w, device, detail::gated(p), p.tuning));
  if (gather && !((few_rows || one_by_one) && mma) && p.x.rows <= last.gather) return Regime::kGather;
  if (wgmma && (!mma || p.x.rows > last.mma)) return Regime::kFusedWgmma;
  if (mma) return Regime::kFusedMma;
  return gather ? Regime::kGather : Regime::kAuto;
}

}  // namespace detail

/// The regime that run() takes for a problem: the one asked for in its tuning, or the fastest that serves
/// it. kAuto: none does.
template <class Configs = DefaultConfigs, class X, class Y>
[[nodiscard]] Regime regime_of(const GemmProblem<X, Y>& p, const Device& device) {
  return detail::regime_with<Configs>(p, device, p.normed.x != nullptr);
}

/// Whether run() can take a NormedRow in place of x: one token, gathered from a Psumbook of fp16. Looks at no
/// pointer.
template <class Configs = DefaultConfigs, class X, class Y>
[[nodiscard]] bool normalizes(const GemmProblem<X, Y>& p, const Device& device) {
  return p.x.rows == 1 && p.weights.rows > 0 &&
         detail::regime_with<Configs>(p, device, true) == Regime::kGather &&
         detail::GatherRegime<typename Configs::Gather>::normalizes(p.weights, device);
}

/// Whether run() takes this problem: kNullPointer, kMisaligned, kShapeMismatch, kInvalidArgument,
/// kIncompatible (a view packed by another version), kUnsupported (no configuration in Configs, a GPU before
/// compute capability 8.0), each with the numbers. Looks at no device memory.
template <class Configs = DefaultConfigs, class X, class Y>
[[nodiscard]] Status validate(const GemmProblem<X, Y>& p, const Device& device) {
  if (Status status = detail::validate_problem(p, device); !status.ok()) return status;
  if (!detail::has_swiglu<Configs>() && detail::gated(p)) {
    return error(StatusCode::kUnsupported,
                 "cuda gemm: SwiGLU, but the kernels were compiled with kSwiGlu = false");
  }
  if (p.x.rows == 0 || p.weights.rows == 0) return {};
  if (regime_of<Configs>(p, device) == Regime::kAuto) {
    const DevicePackedView& w = p.weights;
    return error(StatusCode::kUnsupported, "cuda gemm: no configuration for ", format_name(w.format), ", ",
                 w.rows, " x ", w.cols, ", with ", w.layout.sets, " columns a lane on a GPU with ",
                 device.shared_bytes, " bytes of shared memory a block");
  }
  if (p.normed.x != nullptr && !normalizes<Configs>(p, device)) {
    return error(StatusCode::kUnsupported, "cuda gemm: a normed row for ", p.x.rows, " tokens of ",
                 format_name(p.weights.format), ", ", p.weights.rows, " x ", p.weights.cols,
                 ": only one token's kernel with a Psumbook of fp16 normalizes");
  }
  return {};
}

/// Bytes of workspace for a problem that validate() takes; often 0. The workspace is aligned to 256 bytes,
/// zeroed once by the caller, and left zeroed where it has to be by each call. Two streams need two.
template <class Configs = DefaultConfigs, class X, class Y>
[[nodiscard]] std::size_t workspace_bytes(const GemmProblem<X, Y>& p, const Device& device) {
  if (p.x.rows == 0 || p.weights.rows == 0) return 0;
  switch (regime_of<Configs>(p, device)) {
    case Regime::kGather: return detail::GatherRegime<typename Configs::Gather>::workspace_bytes(p, device);
    case Regime::kFusedWgmma: return detail::FusedWgmmaOf<Configs>::workspace_bytes(p, device);
    default: return 0;
  }
}

/// Puts the product into the stream. Same bits on every run on the same card. Errors as validate(), and
/// kWorkspaceTooSmall, kMisaligned, kCudaError; then nothing was launched (kCudaError: perhaps part of the
/// tokens).
template <class Configs = DefaultConfigs, class X, class Y>
[[nodiscard]] Status run(const GemmProblem<X, Y>& p, const Device& device, void* workspace, std::size_t size,
                         cudaStream_t stream) {
  if (Status status = validate<Configs>(p, device); !status.ok()) return status;
  if (p.x.rows == 0 || p.weights.rows == 0) return {};
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
  switch (regime_of<Configs>(p, device)) {
    case Regime::kFusedMma: return detail::FusedMmaOf<Configs>::run(p, device, stream);
    case Regime::kFusedWgmma: return detail::FusedWgmmaOf<Configs>::run(p, device, workspace, stream);
    default: return detail::GatherRegime<typename Configs::Gather>::run(p, device, workspace, stream);
  }
}

}  // namespace codegemm::cuda
