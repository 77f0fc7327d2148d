// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/append.cuh - RoPE on new tokens' Q and K, and their K and V into pages, on the GPU.
// Layer: attention (host, needs nvcc).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <prefillshare/attention/cuda/kernels/append.cuh>
#include <prefillshare/attention/cuda/problem.cuh>
#include <prefillshare/attention/rope.hpp>

namespace prefillshare::cuda {

/// Angles on the device: a table, or frequencies from which the kernel computes them (pairs * positions need
/// no memory then). Neither: nothing is turned.
struct DeviceRope {
  const float* cos = nullptr;             ///< [positions][head_dim / 2], of RopeTable
  const float* sin = nullptr;             ///< the same
  std::int64_t positions = 0;             ///< of the table
  const float* frequencies = nullptr;     ///< [head_dim / 2], rope_frequency() of each pair
  RopeLayout layout = RopeLayout::kHalf;  ///< as the model has it
};

/// New tokens of a batch of sequences. The table already counts them: the last token of sequence i is at
/// position length - 1. Tokens of a sequence are consecutive rows, sequence i's being rows query_indptr[i]
/// .. query_indptr[i + 1] - 1. Pages must be the sequences' own to write, and are written with K after RoPE.
/// C, the cache's type: T, or Fp8E4M3, into which K after RoPE and V, divided by their scales, are rounded
/// once.
template <class T, class C = T>
struct AppendProblem {
  static_assert(detail::kIsCacheType<T>,
                "prefillshare: AppendProblem T must be __half, __nv_bfloat16, codegemm::Half or BFloat16");
  static_assert(detail::kFits<C, T>, "prefillshare: AppendProblem C must be T or Fp8E4M3");
  KvPages<C> kv;                               ///< one layer's pages, to be written
  PageTableView table;                         ///< the sequences' pages
  const std::int32_t* query_indptr = nullptr;  ///< device, [sequences + 1]; null: one token a sequence
  MatrixView<T> q;                             ///< [T][heads * head_dim], turned in place; null data: no Q
  MatrixView<const T> k;                       ///< [T][kv_heads * head_dim], before RoPE
  MatrixView<const T> v;                       ///< the same
  int heads = 0;                               ///< of Q
  DeviceRope rope;                             ///< how K and Q are turned
  /// Set where a kernel lies between run() and all that the table, and DecodeProblem's prepare(), come from:
  /// places and angles are then found, and the kernel behind may begin, while that one, which may write q, k
  /// and v, still runs.
  bool overlap = false;
};

namespace detail {

[[nodiscard]] inline RopeArgs rope_args(const DeviceRope& rope) {
  RopeArgs out;
  out.cos = rope.cos;
  out.sin = rope.sin;
  out.frequencies = rope.frequencies;
  out.positions = static_cast<int>(rope.positions);
  out.interleaved = rope.layout == RopeLayout::kInterleaved;
  return out;
}

// What the kernels that append take of a problem: the tokens, the pages' table, the angles.
template <class Args, class T, class C>
void take_tokens(Args& args, const AppendProblem<T, C>& p) {
  args.q = reinterpret_cast<std::uint16_t*>(p.q.data);
  args.k = reinterpret_cast<const std::uint16_t*>(p.k.data);
  args.v = reinterpret_cast<const std::uint16_t*>(p.v.data);
  args.q_stride = p.q.stride;
  args.k_stride = p.k.stride;
  args.v_stride = p.v.stride;
  args.indptr = p.table.indptr;
  args.indices = p.table.indices;
  args.last_page_len = p.table.last_page_len;
  args.rope = rope_args(p.rope);
}

}  // namespace detail

/// Everything that run() refuses, with the numbers; looks at no device memory. head_dim: any multiple of 16
/// up to 256.
template <class T, class C>
[[nodiscard]] Status validate(const AppendProblem<T, C>& p, const Device& device) {
  using detail::error;
  constexpr const char* kCall = "cuda append";
  const std::int64_t tokens = p.k.rows;
  if (Status s = detail::check_device(kCall, device); !s.ok()) return s;
  if (tokens < 0 || tokens > kMaxQueryTokens) {
    return error(StatusCode::kInvalidArgument, kCall, ": ", tokens, " tokens, expected 0 to ",
                 kMaxQueryTokens);
  }
  const bool used = tokens > 0;
  if (p.kv.head_dim < 16 || p.kv.head_dim % 16 != 0 || p.kv.head_dim > 256) {
    return error(StatusCode::kUnsupported, kCall, ": head_dim = ", p.kv.head_dim,
                 ", expected a multiple of 16 up to 256");
  }
  if (Status s = detail::check_pages(kCall, p.kv, used); !s.ok()) return s;
  if (Status s = detail::check_table(kCall, p.table, used); !s.ok()) return s;
  if (used && p.query_indptr == nullptr && tokens != p.table.sequences) {
    return error(StatusCode::kShapeMismatch, kCall, ": ", tokens, " tokens for ", p.table.sequences,
                 " sequences without query_indptr, expected one each");
  }
  if (used && p.table.sequences == 0) {
    return error(StatusCode::kShapeMismatch, kCall, ": ", tokens, " tokens for no sequence");
  }
  const std::int64_t width = std::int64_t{p.kv.kv_heads} * p.kv.head_dim;
  if (Status s = detail::check_rows(kCall, "k", p.k, tokens, width, used); !s.ok()) return s;
  if (Status s = detail::check_rows(kCall, "v", p.v, tokens, width, used); !s.ok()) return s;
  if (p.q.data != nullptr) {
    if (p.heads < 1 || p.heads > kMaxHeads) {
      return error(StatusCode::kInvalidArgument, kCall, ": ", p.heads, " heads, expected 1 to ", kMaxHeads);
    }
    const std::int64_t q_width = std::int64_t{p.heads} * p.kv.head_dim;
    if (Status s = detail::check_rows(kCall, "q", p.q, tokens, q_width, used); !s.ok()) return s;
  }
  if ((p.rope.cos == nullptr) != (p.rope.sin == nullptr)) {
    return error(StatusCode::kNullPointer, kCall, ": ", p.rope.cos == nullptr ? "cos" : "sin", " is null");
  }
  if (p.rope.cos != nullptr && (p.rope.positions < 1 || p.rope.positions > kMaxContext)) {
    return error(StatusCode::kInvalidArgument, kCall, ": a table of ", p.rope.positions, " positions");
  }
  return {};
}

/// Puts the work into the stream. Errors as validate(), and kCudaError; then nothing was launched. Positions
/// past a table's end take its last angles, which is wrong but stays in bounds (an assertion in debug).
template <class T, class C>
[[nodiscard]] Status run(const AppendProblem<T, C>& p, const Device& device, cudaStream_t stream) {
  if (Status status = validate(p, device); !status.ok()) return status;
  if (p.k.rows == 0) return {};
  AppendArgs args;
  detail::take_tokens(args, p);
  args.k_pages = p.kv.k;
  args.v_pages = p.kv.v;
  args.k_scale = p.kv.k_scale;
  args.v_scale = p.kv.v_scale;
  args.page_stride = p.kv.page_stride;
  args.token_stride = p.kv.token_stride;
  args.head_stride = p.kv.head_stride;
  args.query_indptr = p.query_indptr;
  args.tokens = static_cast<int>(p.k.rows);
  args.sequences = p.table.sequences;
  args.heads = p.heads;
  args.kv_heads = p.kv.kv_heads;
  args.head_dim = p.kv.head_dim;
  args.page_size = p.kv.page_size;
  args.pages = p.kv.pages;
  args.overlap = p.overlap && device.arch >= 90;
  const std::int64_t heads = (args.q != nullptr ? args.heads : 0) + std::int64_t{2} * args.kv_heads;
  const std::int64_t threads = p.k.rows * heads * (args.head_dim / 16);
  codegemm::cuda::LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((threads + kAppendThreads - 1) / kAppendThreads));
  shape.threads = kAppendThreads;
  shape.overlap = device.arch >= 90;
  return codegemm::cuda::launch(append_kernel<detail::ScalarOf<T>::kType, detail::kIsFp8<C>>, shape, args,
                                stream);
}

}  // namespace prefillshare::cuda
