// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/decode.cuh - one new token a sequence over its pages, on the GPU; pages that several
// sequences share are read once for all of them.
// Layer: attention (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <prefillshare/attention/cuda/kernels/decode.cuh>
#include <prefillshare/attention/cuda/kernels/decode_merge.cuh>
#include <prefillshare/attention/cuda/kernels/decode_prepare.cuh>
#include <prefillshare/attention/cuda/problem.cuh>
#include <prefillshare/attention/cuda/tuning.hpp>

namespace prefillshare::cuda {

/// Consecutive sequences, of one or of several decode modules, that begin with the same pages: those of group
/// g are group_indptr[g] .. group_indptr[g + 1] - 1, and their first shared_pages[g] pages are one another's.
/// Read when prepare() runs on the device. A sequence in no group shares nothing.
struct SharedPrefixes {
  const std::int32_t* group_indptr = nullptr;  ///< device, [groups + 1]
  const std::int32_t* shared_pages = nullptr;  ///< device, [groups]
  int groups = 0;                              ///< groups of sequences
};

/// out[i][h] = softmax(scale * q[i][h] . K) V over all keys of sequence i, zeros if there are none. Scores
/// and sums are fp32; weights are rounded to bf16 only where more than 64 query rows share keys, to fp16 with
/// fp16 caches. T: __half, __nv_bfloat16 (or codegemm::Half, BFloat16); Y: these or float.
template <class T, class Y = T>
struct DecodeProblem {
  static_assert(detail::kIsCacheType<T>,
                "prefillshare: DecodeProblem T must be __half, __nv_bfloat16, codegemm::Half or BFloat16");
  static_assert(
      detail::ScalarOf<Y>::kKnown,
      "prefillshare: DecodeProblem Y must be float, __half, __nv_bfloat16, codegemm::Half or BFloat16");
  KvPages<const T> kv;      ///< one layer's pages
  PageTableView table;      ///< the sequences' pages
  SharedPrefixes prefixes;  ///< what sequences share
  MatrixView<const T> q;    ///< [sequences][heads * head_dim], after RoPE
  MatrixView<Y> out;        ///< the same shape; must not overlap q or the pages
  int heads = 0;            ///< a multiple of kv.kv_heads
  float scale = 0.0F;       ///< of the scores; 0 means 1 / sqrt(head_dim)
  /// Set where a kernel lies between prepare(), or whatever wrote the table, and run(): the first keys' way
  /// through the caches then begins while that kernel still runs. It may be the one that writes K and V.
  bool overlap = false;
  DecodeTuning tuning = {};  ///< what is chosen by itself unless set here
};

namespace detail {

template <class T, int HeadDim>
using TailShape = AttendShape<ScalarOf<T>::kType, HeadDim, 1, 4, 1, 3>;
template <class T, int HeadDim>
using FewRowsShape = AttendShape<ScalarOf<T>::kType, HeadDim, 2, 2, 1, 3>;
template <class T, int HeadDim>
using SomeRowsShape = AttendShape<ScalarOf<T>::kType, HeadDim, 4, 1, 1, 3>;
template <class T, int HeadDim>
using ManyRowsShape = AttendShape<ScalarOf<T>::kType, HeadDim, 4, 1, 2, 2>;

// Where things lie in the workspace, in bytes from its start.
struct DecodeLayout {
  int lanes = 1;
  int superblocks = 0;
  std::int64_t tail_parts = 0;
  std::int64_t shared_parts = 0;
  int tail_part_rows = 0;
  std::size_t quotas = 0;
  std::size_t starts = 0;
  std::size_t tail_families = 0;
  std::size_t shared_families = 0;
  std::size_t tail_top = 0;
  std::size_t tail_out = 0;
  std::size_t shared_top = 0;
  std::size_t shared_out = 0;
  std::size_t bytes = 0;
};

template <class T, class Y>
[[nodiscard]] bool shares(const DecodeProblem<T, Y>& p) {
  return p.prefixes.groups > 0 && p.tuning.shared != SharedPath::kNever;
}

// Two blocks a multiprocessor where the shared memory allows.
template <class T>
[[nodiscard]] int decode_blocks(int head_dim, const Device& device) {
  const int stage = kTileKeys * (head_dim * 2 + 16) * 2;
  const int bytes = 3 * stage + 1024;  // a kilobyte is the system's
  return device.multiprocessors * std::clamp((device.shared_bytes + 1024) / bytes, 1, 2);
}

// As many K/V heads side by side as leave no more than one block in 32 without work.
[[nodiscard]] inline int decode_lanes(int kv_heads, int blocks) {
  int best = 1;
  for (int lanes = 2; lanes <= std::min(kv_heads, 16); ++lanes) {
    if (kv_heads % lanes == 0 && blocks % lanes * 32 <= blocks) best = lanes;
  }
  return best;
}

template <class T, class Y>
[[nodiscard]] DecodeLayout decode_layout(const DecodeProblem<T, Y>& p, const Device& device) {
  DecodeLayout out;
  const int group = p.heads / p.kv.kv_heads;
  const std::int64_t sequences = p.table.sequences;
  const int blocks = decode_blocks<T>(p.kv.head_dim, device);
  out.lanes = p.tuning.lanes > 0 ? p.tuning.lanes : decode_lanes(p.kv.kv_heads, blocks);
  out.superblocks = std::max(blocks / out.lanes, 2);  // one of each kind
  out.tail_part_rows = std::min(group, kTailRows);
  const std::int64_t row_tiles = (group + kTailRows - 1) / kTailRows;
  const std::int64_t all_blocks = std::int64_t{out.superblocks} * out.lanes;
  out.tail_parts = all_blocks + sequences * p.kv.kv_heads * row_tiles;
  if (shares(p)) {
    // Each group may have a tile that is partly filled.
    const std::int64_t tiles =
        sequences * group / kManyRows + std::min<std::int64_t>(p.prefixes.groups, sequences);
    out.shared_parts = all_blocks + tiles * p.kv.kv_heads;
  }
  std::size_t at = 0;
  const auto place = [&](std::size_t& where, std::int64_t count, std::size_t size) {
    where = at;
    at += (static_cast<std::size_t>(count) * size + kWorkspaceAlignment - 1) / kWorkspaceAlignment *
          kWorkspaceAlignment;
  };
  const std::int64_t groups = shares(p) ? p.prefixes.groups : 0;
  const auto row = static_cast<std::size_t>(p.kv.head_dim) * sizeof(float);
  place(out.quotas, 2, sizeof(int));
  place(out.starts, out.superblocks, sizeof(BlockStart));
  place(out.tail_families, sequences, sizeof(KeyFamily));
  place(out.shared_families, groups, sizeof(KeyFamily));
  place(out.tail_top, out.tail_parts * out.tail_part_rows, sizeof(float2));
  place(out.tail_out, out.tail_parts * out.tail_part_rows, row);
  place(out.shared_top, out.shared_parts * kManyRows, sizeof(float2));
  place(out.shared_out, out.shared_parts * kManyRows, row);
  out.bytes = at;
  return out;
}

[[nodiscard]] inline DecodeWork tail_work(std::byte* base, const DecodeLayout& at) {
  return {reinterpret_cast<int*>(base + at.quotas), reinterpret_cast<KeyFamily*>(base + at.tail_families)};
}
[[nodiscard]] inline DecodeWork shared_work(std::byte* base, const DecodeLayout& at) {
  return {reinterpret_cast<int*>(base + at.quotas) + 1,
          reinterpret_cast<KeyFamily*>(base + at.shared_families)};
}

}  // namespace detail

/// Everything that prepare() and run() refuse but the workspace, with the numbers; looks at no device memory.
template <class T, class Y>
[[nodiscard]] Status validate(const DecodeProblem<T, Y>& p, const Device& device) {
  using detail::error;
  constexpr const char* kCall = "cuda decode";
  if (Status s = detail::check_device(kCall, device); !s.ok()) return s;
  const bool used = p.table.sequences > 0;
  if (Status s = detail::check_head_dim(kCall, p.kv.head_dim); !s.ok()) return s;
  if (Status s = detail::check_pages(kCall, p.kv, used); !s.ok()) return s;
  if (Status s = detail::check_table(kCall, p.table, used); !s.ok()) return s;
  if (Status s = detail::check_heads(kCall, p.heads, p.kv.kv_heads); !s.ok()) return s;
  if (Status s = detail::check_scale(kCall, p.scale); !s.ok()) return s;
  const std::int64_t width = std::int64_t{p.heads} * p.kv.head_dim;
  const std::int64_t rows = p.table.sequences;
  if (Status s = detail::check_rows(kCall, "q", p.q, rows, width, used); !s.ok()) return s;
  if (Status s = detail::check_rows(kCall, "out", p.out, rows, width, used); !s.ok()) return s;
  if (p.prefixes.groups < 0 || p.prefixes.groups > kMaxSequences) {
    return error(StatusCode::kInvalidArgument, kCall, ": ", p.prefixes.groups, " groups of sequences");
  }
  if (p.prefixes.groups > 0 && (p.prefixes.group_indptr == nullptr || p.prefixes.shared_pages == nullptr)) {
    return error(StatusCode::kNullPointer, kCall, ": ",
                 p.prefixes.group_indptr == nullptr ? "group_indptr" : "shared_pages", " is null");
  }
  const DecodeTuning& t = p.tuning;
  if (t.min_tiles < 1 || t.min_tiles > 1024 || t.min_shared_sequences < 1 || t.min_shared_tokens < 1 ||
      t.many_rows_cost < 100 || t.many_rows_cost > 1000) {
    return error(StatusCode::kInvalidArgument, kCall, ": tuning with ", t.min_tiles,
                 " tiles a block, sharing from ", t.min_shared_sequences, " sequences and ",
                 t.min_shared_tokens, " tokens on, tiles at ", t.many_rows_cost, " percent");
  }
  if (t.lanes < 0 || (t.lanes > 0 && p.kv.kv_heads % t.lanes != 0)) {
    return error(StatusCode::kInvalidArgument, kCall, ": tuning with ", t.lanes, " lanes for ", p.kv.kv_heads,
                 " K/V heads");
  }
  return {};
}

/// Bytes of workspace for a problem that validate() takes, aligned to 256. Depends on the numbers of
/// sequences and groups, heads and head_dim, not on lengths; need not be cleared. Two streams need two.
template <class T, class Y>
[[nodiscard]] std::size_t workspace_bytes(const DecodeProblem<T, Y>& p, const Device& device) {
  return p.table.sequences == 0 ? 0 : detail::decode_layout(p, device).bytes;
}

/// Reads the lengths, decides for each group whether it pays to read its prefix once, and deals the keys out
/// evenly to the blocks of run(). Once for all layers of a step, into the workspace that run() then gets. May
/// be captured together with run(): a replay reads table and prefixes anew. Errors as validate(), and
/// kWorkspaceTooSmall, kNullPointer, kMisaligned, kCudaError; then nothing was launched.
template <class T, class Y>
[[nodiscard]] Status prepare(const DecodeProblem<T, Y>& p, const Device& device, void* workspace,
                             std::size_t size, cudaStream_t stream) {
  if (Status status = validate(p, device); !status.ok()) return status;
  if (p.table.sequences == 0) return {};
  const detail::DecodeLayout at = detail::decode_layout(p, device);
  if (Status s = detail::check_workspace("cuda decode", workspace, size, at.bytes); !s.ok()) return s;
  auto* const base = static_cast<std::byte*>(workspace);
  DecodePrepareArgs args;
  args.indptr = p.table.indptr;
  args.last_page_len = p.table.last_page_len;
  args.starts = reinterpret_cast<BlockStart*>(base + at.starts);
  args.tails = detail::tail_work(base, at);
  args.shared = detail::shared_work(base, at);
  args.sequences = p.table.sequences;
  if (detail::shares(p)) {
    args.group_indptr = p.prefixes.group_indptr;
    args.shared_pages = p.prefixes.shared_pages;
    args.groups = p.prefixes.groups;
  }
  args.page_size = p.kv.page_size;
  args.kv_heads = p.kv.kv_heads;
  args.group = p.heads / p.kv.kv_heads;
  args.lanes = at.lanes;
  args.superblocks = at.superblocks;
  args.min_tiles = p.tuning.min_tiles;
  args.many_rows_cost = p.tuning.many_rows_cost;
  const bool always = p.tuning.shared == SharedPath::kAlways;
  args.min_shared_sequences = always ? 1 : p.tuning.min_shared_sequences;
  args.min_shared_tokens = always ? 1 : p.tuning.min_shared_tokens;
  codegemm::cuda::LaunchShape shape;
  shape.grid = dim3(1);
  shape.threads = kPrepareThreads;
  shape.overlap = device.arch >= 90;
  return codegemm::cuda::launch(decode_prepare_kernel<0>, shape, args, stream);
}

/// Puts the attention of one layer into the stream, after prepare() with the same table, prefixes, tuning and
/// sizes. Same bits on every run on the same card. Errors as prepare(); kCudaError: perhaps part was
/// launched.
template <class T, class Y>
[[nodiscard]] Status run(const DecodeProblem<T, Y>& p, const Device& device, void* workspace,
                         std::size_t size, cudaStream_t stream) {
  if (Status status = validate(p, device); !status.ok()) return status;
  if (p.table.sequences == 0) return {};
  const detail::DecodeLayout at = detail::decode_layout(p, device);
  if (Status s = detail::check_workspace("cuda decode", workspace, size, at.bytes); !s.ok()) return s;
  auto* const base = static_cast<std::byte*>(workspace);
  DecodeArgs args;
  args.kv = detail::source_of(p.kv);
  args.q = reinterpret_cast<const std::uint16_t*>(p.q.data);
  args.q_stride = p.q.stride;
  args.indices = p.table.indices;
  args.out = p.out.data;
  args.out_stride = p.out.stride;
  args.out_type = detail::ScalarOf<Y>::kType;
  args.kv_heads = p.kv.kv_heads;
  args.group = p.heads / p.kv.kv_heads;
  args.scale_log2 = detail::scale_log2_of(p.scale, p.kv.head_dim);
  args.lanes = at.lanes;
  args.overlap = p.overlap && device.arch >= 90;
  args.starts = reinterpret_cast<const BlockStart*>(base + at.starts);
  DecodeMergeArgs merge;
  merge.tails = detail::tail_work(base, at);
  merge.shared = detail::shared_work(base, at);
  merge.tail_partials = {reinterpret_cast<float*>(base + at.tail_out),
                         reinterpret_cast<float2*>(base + at.tail_top), at.tail_part_rows};
  merge.shared_partials = {reinterpret_cast<float*>(base + at.shared_out),
                           reinterpret_cast<float2*>(base + at.shared_top), kManyRows};
  merge.out = args.out;
  merge.out_stride = args.out_stride;
  merge.out_type = args.out_type;
  merge.sequences = p.table.sequences;
  merge.kv_heads = args.kv_heads;
  merge.group = args.group;
  merge.lanes = at.lanes;
  args.families[0] = merge.tails.families;
  args.families[1] = merge.shared.families;
  args.partials[0] = merge.tail_partials;
  args.partials[1] = merge.shared_partials;

  Status status;
  codegemm::cuda::LaunchShape shape;
  shape.overlap = device.arch >= 90;
  shape.grid = dim3(static_cast<unsigned>(at.superblocks * at.lanes));
  static_cast<void>(codegemm::first_match(
      HeadSizes{}, [&](auto c) { return c.kHeadDim == p.kv.head_dim; },
      [&](auto c) {
        using Tail = detail::TailShape<T, c.kHeadDim>;
        using Few = detail::FewRowsShape<T, c.kHeadDim>;
        using Some = detail::SomeRowsShape<T, c.kHeadDim>;
        using Many = detail::ManyRowsShape<T, c.kHeadDim>;
        shape.threads = Tail::kThreads;
        shape.shared_bytes = Tail::kSharedBytes;
        const auto attend = detail::shares(p) ? decode_kernel<Tail, Few, Some, Many, true>
                                              : decode_kernel<Tail, Few, Some, Many, false>;
        static_cast<void>(status = codegemm::cuda::launch(attend, shape, args, stream));
        if (!status.ok()) return;
        // Few rows: each has many parts, and the warps to share them.
        const std::int64_t rows = std::int64_t{p.table.sequences} * p.heads;
        const bool few = rows < std::int64_t{16} * device.multiprocessors;
        const std::int64_t block_rows = few ? 1 : kMergeThreads / 32;
        shape.grid = dim3(static_cast<unsigned>((rows + block_rows - 1) / block_rows));
        shape.threads = kMergeThreads;
        shape.shared_bytes = 0;
        const auto kernel = few ? decode_merge_kernel<c.kHeadDim, 4> : decode_merge_kernel<c.kHeadDim, 1>;
        static_cast<void>(status = codegemm::cuda::launch(kernel, shape, merge, stream));
      }));
  return status;
}

}  // namespace prefillshare::cuda
