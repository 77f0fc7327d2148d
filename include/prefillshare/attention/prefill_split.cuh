// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/prefill_split.cuh - causal attention of few new tokens over long contexts, the keys
// split over all multiprocessors, on the GPU.
// Layer: attention (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <prefillshare/attention/decode.cuh>
#include <prefillshare/attention/prefill.cuh>

namespace prefillshare::cuda {

namespace detail {

// To the kernels of decode, tokens of a sequence are sequences that share all their pages.
template <class T, class Y, class C>
[[nodiscard]] DecodeProblem<T, Y, C> as_decode(const PrefillProblem<T, Y, C>& p) {
  DecodeProblem<T, Y, C> out;
  out.kv = p.kv;
  out.table = p.table;
  out.table.sequences = static_cast<int>(p.q.rows);
  out.prefixes = {p.query_indptr, p.query_indptr, p.table.sequences};
  out.q = p.q;
  out.out = p.out;
  out.heads = p.heads;
  out.scale = p.scale;
  return out;
}

template <class T, class Y, class C>
[[nodiscard]] Status validate_split(const PrefillProblem<T, Y, C>& p, const Device& device) {
  if (Status s = validate(p, device); !s.ok()) return s;
  if (p.q.rows <= kMaxSequences) return {};
  return error(StatusCode::kUnsupported, "cuda prefill: ", p.q.rows, " tokens with keys split, expected ",
               kMaxSequences, " at most");
}

}  // namespace detail

/// The query rows are so few that run() would leave half of the multiprocessors without work: over contexts
/// of some thousand tokens run_split() is faster then (suite kv-gpu). Looks at no lengths. For a problem that
/// validate() takes.
template <class T, class Y, class C>
[[nodiscard]] bool splits_keys(const PrefillProblem<T, Y, C>& p, const Device& device) {
  return p.q.rows > 0 && detail::row_tiles(p) * p.kv.kv_heads * 2 <= device.multiprocessors;
}

/// Bytes of workspace of prepare_split() and run_split(), aligned to 256. Depends on the numbers of sequences
/// and tokens, heads and head_dim, not on lengths; need not be cleared.
template <class T, class Y, class C>
[[nodiscard]] std::size_t split_workspace_bytes(const PrefillProblem<T, Y, C>& p, const Device& device) {
  return p.q.rows == 0 ? 0 : detail::decode_layout(detail::as_decode(p), device, true).bytes;
}

/// Reads the lengths and deals the keys out evenly. Once for all layers of a step, into the workspace that
/// run_split() then gets; may be captured together with it. Errors as validate() of run(), and
/// kWorkspaceTooSmall, kNullPointer, kMisaligned, kCudaError; then nothing was launched.
template <class T, class Y, class C>
[[nodiscard]] Status prepare_split(const PrefillProblem<T, Y, C>& p, const Device& device, void* workspace,
                                   std::size_t size, cudaStream_t stream) {
  if (Status s = detail::validate_split(p, device); !s.ok()) return s;
  if (p.q.rows == 0) return {};
  const auto problem = detail::as_decode(p);
  const detail::DecodeLayout at = detail::decode_layout(problem, device, true);
  if (Status s = detail::check_workspace("cuda prefill", workspace, size, at.bytes); !s.ok()) return s;
  return detail::launch_prepare(problem, at, device, workspace, stream, true);
}

/// What run() computes, on any number of multiprocessors, after prepare_split() with the same table,
/// query_indptr and sizes: by wgmma on Hopper where a sequence has more than 32 query rows a K/V head and the
/// cache is not fp8, else by mma.sync. The weights are rounded to fp16 with fp16 queries, to bf16 only where
/// a sequence has more than 64 query rows a K/V head. Same bits on every run on the same card. Errors as
/// prepare_split(); kCudaError: perhaps part was launched.
template <class T, class Y, class C>
[[nodiscard]] Status run_split(const PrefillProblem<T, Y, C>& p, const Device& device, void* workspace,
                               std::size_t size, cudaStream_t stream) {
  if (Status s = detail::validate_split(p, device); !s.ok()) return s;
  if (p.q.rows == 0) return {};
  const auto problem = detail::as_decode(p);
  const detail::DecodeLayout at = detail::decode_layout(problem, device, true);
  if (Status s = detail::check_workspace("cuda prefill", workspace, size, at.bytes); !s.ok()) return s;
  return detail::launch_decode<DecodeSort::kCausal>(problem, at, device, workspace, stream);
}

}  // namespace prefillshare::cuda
