// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/problem.cuh - a product to be made, and the checks that hold in every regime.
// Layer: cuda (host, needs nvcc).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device.cuh>
#include <codegemm/cuda/kernels/normed_row.cuh>
#include <codegemm/cuda/kernels/output.cuh>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/cuda/tuning.hpp>

namespace codegemm::cuda {

inline constexpr std::size_t kWorkspaceAlignment = 256;  ///< bytes, of the workspace's address

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

[[nodiscard]] inline bool aligned(const void* p, std::size_t to) {
  return reinterpret_cast<std::uintptr_t>(p) % to == 0;
}

}  // namespace detail

/// What a product ends with.
enum class Activation {
  kNone,
  kSwiGlu,  ///< y = silu(gate) * up: gate is the first half of the rows of W, up the second
};

/// y[T][N] = x[T][K] W^T (+ bias) (+ residual), or with kSwiGlu y[T][N / 2] = silu(gate + bias) * (up + bias)
/// (+ residual). Every pointer is to device memory of the caller's.
/// X: __half or __nv_bfloat16 (or codegemm::Half, BFloat16); Y: these or float. Sums are fp32 for all of
/// them. On tensor cores weights are multiplied in X's type: with bf16 each is rounded to 8 bits once.
template <class X, class Y>
struct GemmProblem {
  static_assert(
      detail::ScalarOf<X>::kKnown && !std::is_same_v<X, float>,
      "codegemm: GemmProblem X must be __half, __nv_bfloat16, codegemm::Half or codegemm::BFloat16");
  static_assert(
      detail::ScalarOf<Y>::kKnown,
      "codegemm: GemmProblem Y must be float, __half, __nv_bfloat16, codegemm::Half or codegemm::BFloat16");
  DevicePackedView weights;      ///< packed, in device memory
  MatrixView<const X> x;         ///< [T][K], any stride
  MatrixView<Y> y;               ///< [T][N] (kSwiGlu: [T][N / 2]), any stride; must not overlap x
  const Y* bias = nullptr;       ///< [N], or null
  MatrixView<const Y> residual;  ///< as y, to be added, or null data; may be y itself
  Activation activation = Activation::kNone;  ///< what is done to the sums
  NormedRow normed;  ///< one token in place of x, whose data is not read, where normalizes() says yes
  /// The kernel may start while the one before it in the stream still runs, and then reads weights only. Set
  /// to false where that kernel writes the weights.
  bool overlap = true;
  GemmTuning tuning = {};  ///< what is chosen by itself unless set here
};

namespace detail {

// Version, layout and pointer of packed weights.
[[nodiscard]] inline Status validate_weights(const DevicePackedView& w, const Device& device) {
  if (w.version != kPackedVersion) {
    return error(StatusCode::kIncompatible, "cuda gemm: weights packed by layout version ", w.version,
                 ", this code reads version ", kPackedVersion);
  }
  if (device.arch < 80) {
    return error(StatusCode::kUnsupported, "cuda gemm: compute capability ", device.arch / 10, ".",
                 device.arch % 10, ", but the kernels need 8.0");
  }
  const auto wrong_layout = [&] {
    return error(StatusCode::kInvalidArgument, "cuda gemm: the view's layout is not that of a packed ",
                 w.rows, " x ", w.cols, " matrix as ", format_name(w.format), " of ", w.layout.parts,
                 " parts");
  };
  if (w.layout.parts < 1 || w.layout.parts > kMaxParts) return wrong_layout();
  std::array<std::int64_t, kMaxParts> part_rows = {};
  for (std::size_t i = 0; i < static_cast<std::size_t>(w.layout.parts); ++i) {
    const std::int64_t first = std::int64_t{w.layout.first_tile[i]} * kTileRows;
    const std::int64_t end = std::int64_t{w.layout.first_tile[i + 1]} * kTileRows;
    part_rows[i] = (i + 1 < static_cast<std::size_t>(w.layout.parts) ? end : w.rows) - first;
  }
  const auto layout = packed_layout(w.format, {part_rows.data(), static_cast<std::size_t>(w.layout.parts)},
                                    w.cols, PackOptions{w.layout.sets});
  if (!layout.ok()) return layout.status();
  if (*layout != w.layout) return wrong_layout();
  if (w.rows == 0) return {};
  if (w.data == nullptr) return error(StatusCode::kNullPointer, "cuda gemm: weights is null");
  if (!aligned(w.data, 256)) {
    return error(StatusCode::kMisaligned, "cuda gemm: weights is not aligned to 256 bytes");
  }
  return {};
}

template <class X, class Y>
[[nodiscard]] bool gated(const GemmProblem<X, Y>& p) {
  return p.activation == Activation::kSwiGlu;
}

// What does not depend on the regime.
template <class X, class Y>
[[nodiscard]] Status validate_problem(const GemmProblem<X, Y>& p, const Device& device) {
  const DevicePackedView& w = p.weights;
  if (Status status = validate_weights(w, device); !status.ok()) return status;
  if (p.x.rows < 0 || p.y.rows < 0) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: x has ", p.x.rows, " rows, y has ", p.y.rows);
  }
  if (p.x.cols != w.cols) {
    return error(StatusCode::kShapeMismatch, "cuda gemm: x has ", p.x.cols,
                 " columns, the weights have K = ", w.cols);
  }
  if (gated(p)) {
    const PackedLayout& l = w.layout;
    if (w.rows % (2 * kTileRows) != 0) {
      return error(StatusCode::kShapeMismatch, "cuda gemm: SwiGLU over N = ", w.rows,
                   ", which is not a multiple of ", 2 * kTileRows);
    }
    if (l.parts > 2 || (l.parts == 2 && std::int64_t{l.first_tile[1]} * 2 != l.row_tiles)) {
      return error(StatusCode::kShapeMismatch, "cuda gemm: SwiGLU wants one part or two of equal size, not ",
                   l.parts, " of which the first has ", std::int64_t{l.first_tile[1]} * kTileRows, " of ",
                   w.rows, " rows");
    }
  }
  if (p.y.cols != (gated(p) ? w.rows / 2 : w.rows)) {
    return error(StatusCode::kShapeMismatch, "cuda gemm: y has ", p.y.cols,
                 " columns, the weights have N = ", w.rows, gated(p) ? ", of which SwiGLU makes half" : "");
  }
  if (p.x.rows != p.y.rows) {
    return error(StatusCode::kShapeMismatch, "cuda gemm: x has ", p.x.rows, " rows (tokens), y has ",
                 p.y.rows);
  }
  if (p.residual.data != nullptr && (p.residual.rows != p.y.rows || p.residual.cols != p.y.cols)) {
    return error(StatusCode::kShapeMismatch, "cuda gemm: residual is ", p.residual.rows, " x ",
                 p.residual.cols, ", y is ", p.y.rows, " x ", p.y.cols);
  }
  const auto check_stride = [](const char* name, std::int64_t stride, std::int64_t cols) -> Status {
    if (stride >= cols) return {};
    return error(StatusCode::kInvalidArgument, "cuda gemm: ", name, " has stride ", stride, ", below its ",
                 cols, " columns");
  };
  if (Status s = check_stride("x", p.x.stride, p.x.cols); !s.ok()) return s;
  if (Status s = check_stride("y", p.y.stride, p.y.cols); !s.ok()) return s;
  if (p.residual.data != nullptr) {
    if (Status s = check_stride("residual", p.residual.stride, p.residual.cols); !s.ok()) return s;
  }
  constexpr std::int64_t kMaxTokens = std::int64_t{1} << 24;  // tokens are counted in 32 bits
  if (p.x.rows > kMaxTokens) {
    return error(StatusCode::kUnsupported, "cuda gemm: ", p.x.rows, " tokens, but at most ", kMaxTokens,
                 " in one call");
  }
  const GemmTuning& t = p.tuning;
  if (t.cluster < 1 || t.cluster > 8 || t.rounds_ahead < 0 || t.rounds_ahead > 15 || t.shared_bytes < 0 ||
      t.splits < 0 || t.splits > 8 || t.token_tile < 0 || t.token_tile > 256) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: tuning with clusters of ", t.cluster, ", ",
                 t.rounds_ahead, " rounds ahead, ", t.shared_bytes, " bytes of shared memory, ", t.splits,
                 " splits, tiles of ", t.token_tile, " tokens");
  }
  if (p.x.rows == 0 || w.rows == 0) return {};
  const auto check_pointer = [](const char* name, const void* at, std::size_t to) -> Status {
    if (aligned(at, to)) return {};
    return error(StatusCode::kMisaligned, "cuda gemm: ", name, " is not aligned to ", to, " bytes");
  };
  if (p.normed.x != nullptr) {
    if (p.normed.weight == nullptr) {
      return error(StatusCode::kNullPointer, "cuda gemm: the weight of a normed row is null");
    }
    if (Status s = check_pointer("a normed row", p.normed.x, 16); !s.ok()) return s;
    if (Status s = check_pointer("the weight of a normed row", p.normed.weight, 16); !s.ok()) return s;
  } else if (p.x.data == nullptr && w.cols > 0) {
    return error(StatusCode::kNullPointer, "cuda gemm: x is null");
  }
  if (p.y.data == nullptr) return error(StatusCode::kNullPointer, "cuda gemm: y is null");
  if (Status s = check_pointer("x", p.x.data, sizeof(X)); !s.ok()) return s;
  if (Status s = check_pointer("y", p.y.data, sizeof(Y)); !s.ok()) return s;
  if (Status s = check_pointer("bias", p.bias, sizeof(Y)); !s.ok()) return s;
  if (Status s = check_pointer("residual", p.residual.data, sizeof(Y)); !s.ok()) return s;
  if (p.normed.x == nullptr && overlap(p.x, p.y)) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: y overlaps x");
  }
  const bool in_place = p.residual.data == p.y.data && (p.residual.stride == p.y.stride || p.y.rows == 1);
  if (!in_place && overlap(p.residual, p.y)) {
    return error(StatusCode::kInvalidArgument, "cuda gemm: y overlaps residual, but is not the same");
  }
  return {};
}

template <class X, class Y>
[[nodiscard]] Output output_of(const GemmProblem<X, Y>& p) {
  const DevicePackedView& w = p.weights;
  Output out;
  out.y = p.y.data;
  out.bias = p.bias;
  out.residual = p.residual.data;
  out.row_scales = w.layout.scale_steps == 5 && w.cols > 0
                       ? reinterpret_cast<const std::uint16_t*>(w.data + w.layout.row_scales_at)
                       : nullptr;
  out.y_stride = p.y.stride;
  out.residual_stride = p.residual.stride;
  out.rows = static_cast<int>(w.rows);
  out.half_rows = p.activation == Activation::kSwiGlu ? static_cast<int>(w.rows / 2) : 0;
  out.unscale = w.unscale;
  out.type = ScalarOf<Y>::kType;
  return out;
}

// The same for the tokens from `token` on.
template <class Y>
[[nodiscard]] Output from_token(Output out, std::int64_t token) {
  const auto advance = [&](const void* data, std::int64_t stride) -> const void* {
    return data == nullptr ? nullptr : static_cast<const Y*>(data) + token * stride;
  };
  out.y = const_cast<void*>(advance(out.y, out.y_stride));
  out.residual = advance(out.residual, out.residual_stride);
  return out;
}

}  // namespace detail
}  // namespace codegemm::cuda
