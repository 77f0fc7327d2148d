// SPDX-License-Identifier: Apache-2.0
//
// codegemm/gemm.hpp - the drop-in call on the CPU: y = x W^T with codebook-quantized weights.
// Layer: gemm (host only).
// See: examples/01_codegemm_cpu.cpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/base/config_list.hpp>
#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/cpu/byte_product.hpp>
#include <codegemm/cpu/configs.hpp>
#include <codegemm/cpu/few_tokens.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/cpu/kernels.hpp>
#include <codegemm/cpu/many_tokens.hpp>
#include <codegemm/cpu/plan.hpp>
#include <codegemm/pack.hpp>

namespace codegemm {

/// Whether gemm() takes these operands: x is [T][K], y is [T][N] for W of N x K. kNullPointer,
/// kShapeMismatch or kInvalidArgument (negative size, stride below the columns, y where x is), with the
/// numbers.
[[nodiscard]] inline Status validate(const PackedMatrix& w, MatrixView<const float> x, MatrixView<float> y) {
  if (x.rows < 0 || y.rows < 0) {
    return error(StatusCode::kInvalidArgument, "gemm: x has ", x.rows, " rows, y has ", y.rows);
  }
  if (x.cols != w.cols()) {
    return error(StatusCode::kShapeMismatch, "gemm: x has ", x.cols,
                 " columns, the weights have K = ", w.cols());
  }
  if (y.cols != w.rows()) {
    return error(StatusCode::kShapeMismatch, "gemm: y has ", y.cols,
                 " columns, the weights have N = ", w.rows());
  }
  if (x.rows != y.rows) {
    return error(StatusCode::kShapeMismatch, "gemm: x has ", x.rows, " rows (tokens), y has ", y.rows);
  }
  if (x.stride < x.cols) {
    return error(StatusCode::kInvalidArgument, "gemm: x has stride ", x.stride, ", below its ", x.cols,
                 " columns");
  }
  if (y.stride < y.cols) {
    return error(StatusCode::kInvalidArgument, "gemm: y has stride ", y.stride, ", below its ", y.cols,
                 " columns");
  }
  if (x.data == nullptr && x.rows > 0 && x.cols > 0)
    return error(StatusCode::kNullPointer, "gemm: x is null");
  if (y.data == nullptr && y.rows > 0 && y.cols > 0)
    return error(StatusCode::kNullPointer, "gemm: y is null");
  if (overlap(x, y)) return error(StatusCode::kInvalidArgument, "gemm: y overlaps x");
  return {};
}

namespace detail {

/// gemm() with the instruction set and the way chosen by the caller: for tests and benchmarks.
template <class Configs = CpuConfigs>
[[nodiscard]] Status gemm_with(const PackedMatrix& w, MatrixView<const float> x, MatrixView<float> y,
                               std::span<std::byte> workspace, Executor& executor, Isa isa, Regime asked) {
  ask_for(&w.view(), sizeof(PackedView));  // all of it at once, where it is in no cache
  if (Status status = codegemm::validate(w, x, y); !status.ok()) return status;
  if (x.rows == 0 || w.rows() == 0) return {};
  if (w.cols() == 0) {
    for (std::int64_t t = 0; t < y.rows; ++t) std::fill_n(y.row(t), y.cols, 0.0F);
    return {};
  }
  const Regime regime = choose_regime(w.view(), x.rows, isa, asked);
  const bool few = regime == Regime::kLookup || regime == Regime::kPsumbook;
  const PsumbookPlan plan =
      few ? make_psumbook_plan(w.view(), x.rows, regime == Regime::kLookup) : PsumbookPlan{};
  const std::int64_t floats = few ? plan.floats(executor.workers())
                                  : exact_workspace_floats(w.view(), x.rows, executor.workers(), isa, regime);
  const auto needed = static_cast<std::size_t>(floats) * sizeof(float);
  if (workspace.size() < needed) {
    return error(StatusCode::kWorkspaceTooSmall, "gemm: workspace has ", workspace.size(), " bytes, ", x.rows,
                 " tokens on ", executor.workers(), " workers need ", needed);
  }
  if (workspace.data() == nullptr) return error(StatusCode::kNullPointer, "gemm: workspace is null");
  const std::size_t off = reinterpret_cast<std::uintptr_t>(workspace.data()) % kBufferAlignment;
  if (off != 0) {
    return error(StatusCode::kMisaligned, "gemm: workspace is ", off, " bytes beyond a multiple of ",
                 kBufferAlignment);
  }
  if (!isa_available(isa)) {
    return error(StatusCode::kUnsupported, "gemm: this processor runs ", isa_name(detect_isa()), ", not ",
                 isa_name(isa));
  }

  const GemmArgs args{w.view(), x, y, reinterpret_cast<float*>(workspace.data())};
  const Format f = w.format();
  CpuKernels kernels{};
  const bool found = first_match(
      Configs{}, [&](auto config) { return config.kVecLen == f.v && config.kCodeBits == f.b; },
      [&](auto config) { kernels = cpu_kernels_of<decltype(config)>(isa); });
  if (!found) {
    return error(StatusCode::kUnsupported, "gemm: no kernel for v = ", f.v, ", b = ", f.b, " in the list of ",
                 Configs::kSize, " configurations");
  }
  if (regime == Regime::kDense) {
    run_dense(kernels, args, executor);
#if CODEGEMM_HAS_AMX
  } else if (regime == Regime::kBytes) {
    run_bytes(kernels, args, executor, kAmxKernels);
#endif
  } else if (regime == Regime::kInteger) {
    run_integer(kernels, args, executor);
  } else {
    run_psumbook(kernels, args, plan, executor);
  }
  return {};
}

#if defined(CODEGEMM_PRECOMPILED)
// All kernels take a compiler many seconds: a program of many files may compile them in one (it includes this
// file without the macro and instantiates this function), and define the macro for the others.
extern template Status gemm_with<CpuConfigs>(const PackedMatrix&, MatrixView<const float>, MatrixView<float>,
                                             std::span<std::byte>, Executor&, Isa, Regime);
#endif

}  // namespace detail

/// Bytes that gemm() needs for any number of tokens up to `tokens` on an executor of `workers` workers.
[[nodiscard]] inline std::size_t workspace_bytes(const PackedMatrix& w, std::int64_t tokens, int workers) {
  return static_cast<std::size_t>(detail::workspace_floats(w.view(), tokens, workers, detect_isa())) *
         sizeof(float);
}

/// y[T][N] = x[T][K] W^T. y is overwritten and must not overlap x. The result is the same, bit by bit,
/// whatever the number of workers, but not on another instruction set. Sums in fp32; for few tokens the
/// products of x with centroids may first be rounded to 16 bits of what is added to them
/// (codegemm/cpu/lookup_args.hpp), for many x and the centroids themselves, chunk by chunk
/// (codegemm/cpu/integer_tile.hpp, byte_tile.hpp): an error of y that stays below 1e-3 of its norm, typically
/// 5e-4 and 2e-4. Where x is not finite neither is y. Allocates nothing: the workspace is the caller's, of
/// workspace_bytes() bytes, 64-byte aligned (AlignedBuffer), its content of no meaning before and after. T =
/// 0 and N = 0 are success. Errors: those of validate(), kWorkspaceTooSmall, kNullPointer or kMisaligned
/// (workspace), kUnsupported if `Configs` has no row for the format; y is then untouched.
template <class Configs = CpuConfigs>
[[nodiscard]] Status gemm(const PackedMatrix& w, MatrixView<const float> x, MatrixView<float> y,
                          std::span<std::byte> workspace, Executor& executor) {
  return detail::gemm_with<Configs>(w, x, y, workspace, executor, detect_isa(), detail::Regime::kAutomatic);
}

}  // namespace codegemm
