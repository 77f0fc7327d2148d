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
#include <prefillshare/attention/cuda/kernels/decode_shared.cuh>
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
/// and sums are fp32; weights are rounded to fp16 with fp16 queries, to bf16 only where keys are shared and a
/// K/V head has more than 256 query rows in all, but not on Hopper, pages of whole 16 tokens and heads of 64
/// or 128. T: __half, __nv_bfloat16 (or codegemm::Half, BFloat16); Y: these or float; C, the cache's type: T,
/// or Fp8E4M3 with a scale for K and one for V.
template <class T, class Y = T, class C = T>
struct DecodeProblem {
  static_assert(detail::kIsCacheType<T>,
                "prefillshare: DecodeProblem T must be __half, __nv_bfloat16, codegemm::Half or BFloat16");
  static_assert(
      detail::ScalarOf<Y>::kKnown,
      "prefillshare: DecodeProblem Y must be float, __half, __nv_bfloat16, codegemm::Half or BFloat16");
  static_assert(detail::kFits<C, T>, "prefillshare: DecodeProblem C must be T or Fp8E4M3");
  KvPages<const C> kv;      ///< one layer's pages
  PageTableView table;      ///< the sequences' pages
  SharedPrefixes prefixes;  ///< what sequences share
  MatrixView<const T> q;    ///< [sequences][heads * head_dim], after RoPE
  MatrixView<Y> out;        ///< the same shape; must not overlap q or the pages
  int heads = 0;            ///< a multiple of kv.kv_heads
  float scale = 0.0F;       ///< of the scores; 0 means 1 / sqrt(head_dim)
  /// Set where a kernel lies between prepare(), or whatever wrote the table, and run(): the first keys are
  /// then read while that kernel still runs. It may be the one that writes q, and K and V of each sequence's
  /// last token; all tokens before are older than it. It lets this one start when all before it have ended.
  bool overlap = false;
  DecodeTuning tuning = {};  ///< what is chosen by itself unless set here
};

namespace detail {

// Half as many bytes of fp8 are a tile, so that more tiles are under way.
template <class T, class C, int HeadDim>
using TailShape = AttendShape<ScalarOf<T>::kType, HeadDim, 1, 4, 1, kIsFp8<C> ? 5 : 3, kIsFp8<C>>;
template <class T, class C, int HeadDim>
using FewRowsShape = AttendShape<ScalarOf<T>::kType, HeadDim, 2, 2, 1, kIsFp8<C> ? 5 : 3, kIsFp8<C>>;
template <class T, class C, int HeadDim>
using SomeRowsShape =
    AttendShape<ScalarOf<T>::kType, HeadDim, 4, 1, 1, kIsFp8<C> ? 5 : 3, kIsFp8<C>, !kIsFp8<C>>;
template <class T, class C, int HeadDim>
using ManyRowsShape =
    AttendShape<ScalarOf<T>::kType, HeadDim, 4, 1, 2, kIsFp8<C> ? 3 : 2, kIsFp8<C>, !kIsFp8<C>>;

// Up to so many query rows of a K/V head decode_shared_kernel has one block a multiprocessor.
inline constexpr std::int64_t kOneBlockRows = 64;

// Where things lie in the workspace, in bytes from its start.
struct DecodeLayout {
  int lanes = 1;
  int superblocks = 0;
  std::int64_t tail_parts = 0;
  std::int64_t shared_parts = 0;
  int tail_part_rows = 0;
  int shared_part_rows = kManyRows;
  bool wgmma = false;  // decode_shared_kernel
  std::size_t arrivals = 0;
  std::size_t starts = 0;
  std::size_t tail_families = 0;
  std::size_t shared_families = 0;
  std::size_t tail_top = 0;
  std::size_t tail_out = 0;
  std::size_t shared_top = 0;
  std::size_t shared_out = 0;
  std::size_t bytes = 0;
};

// causal: the problem's sequences are tokens, see DecodeSort.
template <class T, class Y, class C>
[[nodiscard]] bool shares(const DecodeProblem<T, Y, C>& p, bool causal) {
  return p.prefixes.groups > 0 && p.tuning.shared != SharedPath::kNever && (causal || p.table.sequences > 1);
}

// Two blocks a multiprocessor where the shared memory allows.
template <class T, class C>
[[nodiscard]] int decode_blocks(int head_dim, const Device& device) {
  int bytes = 0;
  static_cast<void>(codegemm::first_match(
      HeadSizes{}, [&](auto c) { return c.kHeadDim == head_dim; },
      [&](auto c) {
        using Tail = TailShape<T, C, c.kHeadDim>;
        bytes = Tail::kSharedBytes + kBoxBarrierBytes<Tail>;
      }));
  bytes += 1024;  // the system's
  return device.multiprocessors * std::clamp((device.shared_bytes + 1024) / bytes, 1, 2);
}

// decode_shared_kernel takes it.
template <class T, class Y, class C>
[[nodiscard]] bool takes_wgmma(const DecodeProblem<T, Y, C>& p, const Device& device, bool causal) {
  return !causal && !kIsFp8<C> && shares(p, causal) && device.arch == 90 && device.wgmma && has_boxes(p.kv);
}

// No group can have more query rows of a K/V head than the kernel of few takes.
template <class T, class Y, class C>
[[nodiscard]] bool has_few_rows(const DecodeProblem<T, Y, C>& p) {
  return std::int64_t{p.table.sequences} * (p.heads / p.kv.kv_heads) <= kMostFewRows;
}

// As many K/V heads side by side as leave no more than one block in 32 without work.
[[nodiscard]] inline int decode_lanes(int kv_heads, int blocks) {
  int best = 1;
  for (int lanes = 2; lanes <= std::min(kv_heads, 16); ++lanes) {
    if (kv_heads % lanes == 0 && blocks % lanes * 32 <= blocks) best = lanes;
  }
  return best;
}

template <class T, class Y, class C>
[[nodiscard]] DecodeLayout decode_layout(const DecodeProblem<T, Y, C>& p, const Device& device,
                                         bool causal = false) {
  DecodeLayout out;
  const int group = p.heads / p.kv.kv_heads;
  const std::int64_t sequences = p.table.sequences;
  out.wgmma = takes_wgmma(p, device, causal);
  // One block a multiprocessor leaves room for the next call's, which brings its keys; two multiply more.
  const int blocks = !out.wgmma                           ? decode_blocks<T, C>(p.kv.head_dim, device)
                     : sequences * group <= kOneBlockRows ? device.multiprocessors
                                                          : 2 * device.multiprocessors;
  out.lanes = p.tuning.lanes > 0 ? p.tuning.lanes : decode_lanes(p.kv.kv_heads, blocks);
  out.superblocks = std::max(blocks / out.lanes, 2);  // one of each kind
  out.tail_part_rows = std::min(group, kTailRows);
  const std::int64_t row_tiles = (group + kTailRows - 1) / kTailRows;
  const std::int64_t all_blocks = std::int64_t{out.superblocks} * out.lanes;
  const std::int64_t tail_items = causal ? 0 : sequences * p.kv.kv_heads * row_tiles;
  if (!causal) out.tail_parts = all_blocks + tail_items;
  if (shares(p, causal)) {
    // Each group may have a tile that is partly filled.
    const std::int64_t tiles = sequences * group / rows_of(WorkKind::kSomeRows) +
                               std::min<std::int64_t>(p.prefixes.groups, sequences);
    out.shared_parts = all_blocks + tiles * p.kv.kv_heads;
    if (out.wgmma) out.shared_part_rows = rows_of(WorkKind::kSomeRows);
  }
  std::size_t at = 0;
  const auto place = [&](std::size_t& where, std::int64_t count, std::size_t size) {
    where = at;
    at += (static_cast<std::size_t>(count) * size + kWorkspaceAlignment - 1) / kWorkspaceAlignment *
          kWorkspaceAlignment;
  };
  const std::int64_t groups = shares(p, causal) ? p.prefixes.groups : 0;
  const auto row = static_cast<std::size_t>(p.kv.head_dim) * sizeof(float);
  place(out.arrivals, tail_items, sizeof(unsigned));
  place(out.starts, out.superblocks, sizeof(BlockStart));
  place(out.tail_families, sequences, sizeof(KeyFamily));
  place(out.shared_families, groups, sizeof(KeyFamily));
  place(out.tail_top, out.tail_parts * out.tail_part_rows, sizeof(float2));
  place(out.tail_out, out.tail_parts * out.tail_part_rows, row);
  place(out.shared_top, out.shared_parts * out.shared_part_rows, sizeof(float2));
  place(out.shared_out, out.shared_parts * out.shared_part_rows, row);
  out.bytes = at;
  return out;
}

// What prepare() launches, after its checks.
template <class T, class Y, class C>
[[nodiscard]] Status launch_prepare(const DecodeProblem<T, Y, C>& p, const DecodeLayout& at,
                                    const Device& device, void* workspace, cudaStream_t stream, bool causal) {
  auto* const base = static_cast<std::byte*>(workspace);
  DecodePrepareArgs args;
  args.causal = causal;
  args.indptr = p.table.indptr;
  args.last_page_len = p.table.last_page_len;
  args.starts = reinterpret_cast<BlockStart*>(base + at.starts);
  args.tails = reinterpret_cast<KeyFamily*>(base + at.tail_families);
  args.shared = reinterpret_cast<KeyFamily*>(base + at.shared_families);
  args.arrivals = reinterpret_cast<unsigned*>(base + at.arrivals);
  args.sequences = p.table.sequences;
  if (shares(p, causal)) {
    args.group_indptr = p.prefixes.group_indptr;
    args.shared_pages = p.prefixes.shared_pages;
    args.groups = p.prefixes.groups;
  }
  args.page_size = p.kv.page_size;
  args.kv_heads = p.kv.kv_heads;
  args.group = p.heads / p.kv.kv_heads;
  args.lanes = at.lanes;
  args.superblocks = at.superblocks;
  args.few = at.wgmma || (!causal && has_few_rows(p));
  args.min_tiles = p.tuning.min_tiles;
  args.many_rows_cost = p.tuning.many_rows_cost;
  args.tail_item_cost = p.tuning.tail_item_cost;
  const bool always = causal || p.tuning.shared == SharedPath::kAlways;
  args.min_shared_sequences = always ? 1 : p.tuning.min_shared_sequences;
  args.min_shared_tokens = always ? 1 : p.tuning.min_shared_tokens;
  codegemm::cuda::LaunchShape shape;
  shape.grid = dim3(1);
  shape.threads = kPrepareThreads;
  shape.overlap = device.arch >= 90;
  return codegemm::cuda::launch(decode_prepare_kernel<0>, shape, args, stream);
}

// What the kernels of run() read, but for their boxes and arrivals.
template <class T, class Y, class C>
[[nodiscard]] DecodeArgs decode_args(const DecodeProblem<T, Y, C>& p, const DecodeLayout& at,
                                     const Device& device, void* workspace) {
  auto* const base = static_cast<std::byte*>(workspace);
  DecodeArgs args;
  args.kv = source_of(p.kv);
  args.q = reinterpret_cast<const std::uint16_t*>(p.q.data);
  args.q_stride = p.q.stride;
  args.indices = p.table.indices;
  args.out = p.out.data;
  args.out_stride = p.out.stride;
  args.out_type = ScalarOf<Y>::kType;
  args.sequences = p.table.sequences;
  args.kv_heads = p.kv.kv_heads;
  args.group = p.heads / p.kv.kv_heads;
  args.scale_log2 = scale_log2_of(p.scale, p.kv);
  args.lanes = at.lanes;
  args.overlap = p.overlap && device.arch >= 90;
  args.starts = reinterpret_cast<const BlockStart*>(base + at.starts);
  args.families[0] = reinterpret_cast<const KeyFamily*>(base + at.tail_families);
  args.families[1] = reinterpret_cast<const KeyFamily*>(base + at.shared_families);
  args.partials[0] = {reinterpret_cast<float*>(base + at.tail_out),
                      reinterpret_cast<float2*>(base + at.tail_top), at.tail_part_rows};
  args.partials[1] = {reinterpret_cast<float*>(base + at.shared_out),
                      reinterpret_cast<float2*>(base + at.shared_top), at.shared_part_rows};
  return args;
}

// Puts the parts of `args` together. What else it is told is in `merge`.
template <int HeadDim>
[[nodiscard]] Status launch_merge(DecodeMergeArgs merge, const DecodeArgs& args, const Device& device,
                                  cudaStream_t stream) {
  merge.tails = args.families[0];
  merge.shared = args.families[1];
  merge.tail_partials = args.partials[0];
  merge.shared_partials = args.partials[1];
  merge.out = args.out;
  merge.out_stride = args.out_stride;
  merge.out_type = args.out_type;
  merge.sequences = args.sequences;
  merge.kv_heads = args.kv_heads;
  merge.group = args.group;
  merge.lanes = args.lanes;
  // The fewer rows, the more parts each has, and the more warps to share them.
  const std::int64_t rows = std::int64_t{args.sequences} * args.kv_heads * args.group;
  const std::int64_t block_rows = rows <= std::int64_t{2} * device.multiprocessors   ? 1
                                  : rows < std::int64_t{16} * device.multiprocessors ? 2
                                                                                     : 4;
  codegemm::cuda::LaunchShape shape;
  shape.overlap = device.arch >= 90;
  shape.grid = dim3(static_cast<unsigned>((rows + block_rows - 1) / block_rows));
  shape.threads = kMergeThreads;
  const auto kernel = block_rows == 1   ? decode_merge_kernel<HeadDim, 4>
                      : block_rows == 2 ? decode_merge_kernel<HeadDim, 2>
                                        : decode_merge_kernel<HeadDim, 1>;
  return codegemm::cuda::launch(kernel, shape, merge, stream);
}

// What run() launches, after its checks.
template <DecodeSort Sort, class T, class Y, class C>
[[nodiscard]] Status launch_decode(const DecodeProblem<T, Y, C>& p, const DecodeLayout& at,
                                   const Device& device, void* workspace, cudaStream_t stream) {
  DecodeArgs args = decode_args(p, at, device, workspace);
  // One block adds up quickly what some ten others have of an item; more parts are left to a kernel's many
  // blocks.
  constexpr std::int64_t kMostParts = 10;
  const std::int64_t items = std::int64_t{p.table.sequences} * p.kv.kv_heads;
  const bool in_last_block =
      Sort == DecodeSort::kAlone && items * kMostParts >= std::int64_t{at.superblocks} * at.lanes;
  if (in_last_block) {
    args.arrivals = reinterpret_cast<unsigned*>(static_cast<std::byte*>(workspace) + at.arrivals);
  }
  DecodeMergeArgs merge;
  merge.shared_only = in_last_block;
  merge.few = Sort == DecodeSort::kSharedFew;

  Status status;
  codegemm::cuda::LaunchShape shape;
  shape.overlap = device.arch >= 90;
  shape.grid = dim3(static_cast<unsigned>(at.superblocks * at.lanes));
  static_cast<void>(codegemm::first_match(
      HeadSizes{}, [&](auto c) { return c.kHeadDim == p.kv.head_dim; },
      [&](auto c) {
        using Tail = TailShape<T, C, c.kHeadDim>;
        using Few = FewRowsShape<T, C, c.kHeadDim>;
        using Some = SomeRowsShape<T, C, c.kHeadDim>;
        using Many = ManyRowsShape<T, C, c.kHeadDim>;
        shape.threads = Tail::kThreads;
        shape.shared_bytes =
            Sort == DecodeSort::kAlone
                ? Tail::kSharedBytes
                : std::max({Tail::kSharedBytes, Few::kSharedBytes, Some::kSharedBytes, Many::kSharedBytes});
        auto attend = decode_kernel<Tail, Few, Some, Many, Sort, false>;
        if constexpr (Sort == DecodeSort::kAlone && kHasBoxes<Tail>) {
          if (device.arch >= 90 && describe_pages(p.kv, args.maps)) {
            attend = decode_kernel<Tail, Few, Some, Many, Sort, true>;
            shape.shared_bytes += kBoxBarrierBytes<Tail>;
          }
        }
        status = codegemm::cuda::launch(attend, shape, args, stream);
        if (!status.ok() || (Sort == DecodeSort::kAlone && merge.shared_only)) return;
        status = launch_merge<c.kHeadDim>(merge, args, device, stream);
      }));
  return status;
}

// The same with decode_shared_kernel.
template <class T, class Y, class C>
[[nodiscard]] Status launch_decode_shared(const DecodeProblem<T, Y, C>& p, const DecodeLayout& at,
                                          const Device& device, void* workspace, cudaStream_t stream) {
  DecodeArgs args = decode_args(p, at, device, workspace);
  if (!describe_pages(p.kv, args.maps)) {
    return error(StatusCode::kUnsupported, "cuda decode: the copy engine takes no pages of strides ",
                 p.kv.page_stride, ", ", p.kv.token_stride, " and ", p.kv.head_stride);
  }
  DecodeMergeArgs merge;
  merge.few = true;
  merge.parts_only = true;
  Status status;
  static_cast<void>(codegemm::first_match(
      HeadSizes{}, [&](auto c) { return c.kHeadDim == p.kv.head_dim; },
      [&](auto c) {
        if constexpr (!kIsFp8<C> && c.kHeadDim % kBoxColumns == 0) {
          using Shape = SharedDecodeShape<ScalarOf<T>::kType, c.kHeadDim>;
          codegemm::cuda::LaunchShape shape;
          shape.overlap = true;
          shape.grid = dim3(static_cast<unsigned>(at.superblocks * at.lanes));
          shape.threads = Shape::kThreads;
          shape.shared_bytes = Shape::kSharedBytes;
          static_cast<void>(status =
                                codegemm::cuda::launch(decode_shared_kernel<Shape>, shape, args, stream));
          if (!status.ok()) return;
          status = launch_merge<c.kHeadDim>(merge, args, device, stream);
        }
      }));
  return status;
}

}  // namespace detail

/// Everything that prepare() and run() refuse but the workspace, with the numbers; looks at no device memory.
template <class T, class Y, class C>
[[nodiscard]] Status validate(const DecodeProblem<T, Y, C>& p, const Device& device) {
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
  if (Status s = detail::check_apart(kCall, "q", p.q, p.out); !s.ok()) return s;
  if (p.prefixes.groups < 0 || p.prefixes.groups > kMaxSequences) {
    return error(StatusCode::kInvalidArgument, kCall, ": ", p.prefixes.groups, " groups of sequences");
  }
  if (p.prefixes.groups > 0 && (p.prefixes.group_indptr == nullptr || p.prefixes.shared_pages == nullptr)) {
    return error(StatusCode::kNullPointer, kCall, ": ",
                 p.prefixes.group_indptr == nullptr ? "group_indptr" : "shared_pages", " is null");
  }
  const DecodeTuning& t = p.tuning;
  if (t.min_tiles < 1 || t.min_tiles > 1024 || t.min_shared_sequences < 1 || t.min_shared_tokens < 1 ||
      t.many_rows_cost < 100 || t.many_rows_cost > 1000 || t.tail_item_cost < 0 || t.tail_item_cost > 1000) {
    return error(StatusCode::kInvalidArgument, kCall, ": tuning with ", t.min_tiles,
                 " tiles a block, sharing from ", t.min_shared_sequences, " sequences and ",
                 t.min_shared_tokens, " tokens on, tiles at ", t.many_rows_cost, " percent, tails at ",
                 t.tail_item_cost);
  }
  if (t.lanes < 0 || (t.lanes > 0 && p.kv.kv_heads % t.lanes != 0)) {
    return error(StatusCode::kInvalidArgument, kCall, ": tuning with ", t.lanes, " lanes for ", p.kv.kv_heads,
                 " K/V heads");
  }
  return {};
}

/// Bytes of workspace for a problem that validate() takes, aligned to 256. Depends on the numbers of
/// sequences and groups, heads and head_dim, not on lengths; need not be cleared. Two streams need two.
template <class T, class Y, class C>
[[nodiscard]] std::size_t workspace_bytes(const DecodeProblem<T, Y, C>& p, const Device& device) {
  return p.table.sequences == 0 ? 0 : detail::decode_layout(p, device).bytes;
}

/// Reads the lengths, decides for each group whether it pays to read its prefix once, and deals the keys out
/// evenly to the blocks of run(). Once for all layers of a step, into the workspace that run() then gets. May
/// be captured together with run(): a replay reads table and prefixes anew. Errors as validate(), and
/// kWorkspaceTooSmall, kNullPointer, kMisaligned, kCudaError; then nothing was launched.
template <class T, class Y, class C>
[[nodiscard]] Status prepare(const DecodeProblem<T, Y, C>& p, const Device& device, void* workspace,
                             std::size_t size, cudaStream_t stream) {
  if (Status status = validate(p, device); !status.ok()) return status;
  if (p.table.sequences == 0) return {};
  const detail::DecodeLayout at = detail::decode_layout(p, device);
  if (Status s = detail::check_workspace("cuda decode", workspace, size, at.bytes); !s.ok()) return s;
  return detail::launch_prepare(p, at, device, workspace, stream, false);
}

/// Puts the attention of one layer into the stream, after prepare() with the same table, prefixes, tuning and
/// sizes. Same bits on every run on the same card. Errors as prepare(); kCudaError: perhaps part was
/// launched; kUnsupported where the copy engine does not take the strides of shared pages (2^40 bytes and
/// more).
template <class T, class Y, class C>
[[nodiscard]] Status run(const DecodeProblem<T, Y, C>& p, const Device& device, void* workspace,
                         std::size_t size, cudaStream_t stream) {
  if (Status status = validate(p, device); !status.ok()) return status;
  if (p.table.sequences == 0) return {};
  const detail::DecodeLayout at = detail::decode_layout(p, device);
  if (Status s = detail::check_workspace("cuda decode", workspace, size, at.bytes); !s.ok()) return s;
  const auto launch = at.wgmma                    ? detail::launch_decode_shared<T, Y, C>
                      : !detail::shares(p, false) ? detail::launch_decode<DecodeSort::kAlone, T, Y, C>
                      : detail::has_few_rows(p)   ? detail::launch_decode<DecodeSort::kSharedFew, T, Y, C>
                                                  : detail::launch_decode<DecodeSort::kShared, T, Y, C>;
  return launch(p, at, device, workspace, stream);
}

}  // namespace prefillshare::cuda
