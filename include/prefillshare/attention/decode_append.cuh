// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/decode_append.cuh - the newest token of few sequences in one kernel, on the GPU:
// what append.cuh and decode.cuh do one after the other.
// Layer: attention (host, needs nvcc).
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include <prefillshare/attention/append.cuh>
#include <prefillshare/attention/cuda/kernels/decode_append.cuh>
#include <prefillshare/attention/decode.cuh>

namespace prefillshare::cuda {

/// One token a sequence: its K and V to the pages as AppendProblem says, and attention of its Q over all keys
/// as DecodeProblem says. Q keeps its numbers from before RoPE. Needs no workspace and no prepare().
template <class T, class Y = T, class C = T>
struct DecodeAppendProblem {
  AppendProblem<T, C> append;  ///< with Q, without query_indptr; `overlap` as there
  MatrixView<Y> out;           ///< [sequences][heads * head_dim]; must not overlap q, k, v or the pages
  float scale = 0.0F;          ///< of the scores; 0 means 1 / sqrt(head_dim)
};

/// Up to so many keys a sequence run() is faster than append and decode one after the other, measured on an
/// H200 with 8 K/V heads.
inline constexpr int kFewKeys = 1536;

/// Whether there is a kernel for such a problem, and work for it in one go: clusters (compute capability
/// 9.0), a cache of 16 bits, at most 16 query heads a K/V head, no more clusters than run at once.
template <class T, class Y, class C>
[[nodiscard]] bool serves(const DecodeAppendProblem<T, Y, C>& p, const Device& device) {
  const AppendProblem<T, C>& a = p.append;
  const int clusters = device.clusters[static_cast<std::size_t>(kDecodeRanks)];
  return std::is_same_v<T, C> && device.arch >= 90 && a.query_indptr == nullptr && a.q.data != nullptr &&
         a.kv.kv_heads > 0 && a.heads % a.kv.kv_heads == 0 && a.heads / a.kv.kv_heads <= kTailRows &&
         detail::check_head_dim("cuda decode with append", a.kv.head_dim).ok() &&
         std::int64_t{a.table.sequences} * a.kv.kv_heads <= clusters;
}

/// Everything that run() refuses, with the numbers; looks at no device memory.
template <class T, class Y, class C>
[[nodiscard]] Status validate(const DecodeAppendProblem<T, Y, C>& p, const Device& device) {
  constexpr const char* kCall = "cuda decode with append";
  const AppendProblem<T, C>& a = p.append;
  if (Status s = validate(a, device); !s.ok()) return s;
  if (a.k.rows == 0) return {};
  if (!serves(p, device)) {
    return detail::error(StatusCode::kUnsupported, kCall, ": ", a.table.sequences, " sequences of ", a.heads,
                         " heads over ", a.kv.kv_heads, " K/V heads of ", a.kv.head_dim,
                         " on compute capability ", device.arch / 10, ".", device.arch % 10,
                         ", see serves()");
  }
  if (Status s = detail::check_scale(kCall, p.scale); !s.ok()) return s;
  const std::int64_t width = std::int64_t{a.heads} * a.kv.head_dim;
  if (Status s = detail::check_rows(kCall, "out", p.out, a.table.sequences, width, true); !s.ok()) return s;
  if (Status s = detail::check_apart(kCall, "q", a.q, p.out); !s.ok()) return s;
  if (Status s = detail::check_apart(kCall, "k", a.k, p.out); !s.ok()) return s;
  return detail::check_apart(kCall, "v", a.v, p.out);
}

/// Puts the work into the stream. Errors as validate(), and kCudaError; then nothing was launched. Same bits
/// on every run.
template <class T, class Y, class C>
[[nodiscard]] Status run(const DecodeAppendProblem<T, Y, C>& p, const Device& device, cudaStream_t stream) {
  if (Status status = validate(p, device); !status.ok()) return status;
  const AppendProblem<T, C>& a = p.append;
  if (a.k.rows == 0) return {};
  Status status;
  if constexpr (std::is_same_v<T, C>) {
    DecodeAppendArgs args;
    args.kv = detail::source_of(a.kv);
    args.k_pages = reinterpret_cast<std::uint16_t*>(a.kv.k);
    args.v_pages = reinterpret_cast<std::uint16_t*>(a.kv.v);
    detail::take_tokens(args, a);
    args.out = p.out.data;
    args.out_stride = p.out.stride;
    args.out_type = detail::ScalarOf<Y>::kType;
    args.group = a.heads / a.kv.kv_heads;
    args.scale_log2 = detail::scale_log2_of(p.scale, a.kv);
    args.overlap = a.overlap;
    codegemm::cuda::LaunchShape shape;
    shape.grid =
        dim3(kDecodeRanks, static_cast<unsigned>(a.kv.kv_heads), static_cast<unsigned>(a.table.sequences));
    shape.cluster = kDecodeRanks;
    shape.overlap = true;
    static_cast<void>(codegemm::first_match(
        HeadSizes{}, [&](auto c) { return c.kHeadDim == a.kv.head_dim; },
        [&](auto c) {
          using Shape = DecodeAppendShape<detail::ScalarOf<T>::kType, c.kHeadDim>;
          shape.threads = Shape::kThreads;
          shape.shared_bytes = static_cast<std::size_t>(Shape::bytes(args.group));
          static_cast<void>(status =
                                codegemm::cuda::launch(decode_append_kernel<Shape>, shape, args, stream));
        }));
  }
  return status;
}

}  // namespace prefillshare::cuda
