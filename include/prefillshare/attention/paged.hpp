// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/paged.hpp - causal attention over a sequence's KV blocks, for prefill and decode.
// Layer: attention (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <span>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/attention/cpu_kernels.hpp>
#include <prefillshare/attention/cpu_problem.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/pages.hpp>
#include <prefillshare/kv/storage.hpp>

namespace prefillshare {

/// The numbers that decide how much workspace a call needs. A workspace for larger `tokens` and `context`
/// serves all smaller ones, so one that fits the longest chunk and context serves a whole session.
struct PagedAttentionShape {
  std::int64_t tokens = 0;         ///< query tokens of a call
  std::int64_t context = 0;        ///< keys that the last of them sees: first_position + tokens
  int heads = 0;                   ///< of Q
  int kv_heads = 0;                ///< heads of K and of V
  int head_dim = 0;                ///< elements of a head
  const KvPages* pages = nullptr;  ///< where set, what PagedAttentionArgs::pages will be
};

/// Causal attention of `q` over the KV of one layer. The query at position p sees positions 0 .. p, whose
/// KV must be written, that of the queries' own tokens included (append_kv). Slots past them are not read.
struct PagedAttentionArgs {
  KvLayerView<const float> kv;          ///< storage.layer(i)
  std::span<const BlockId> blocks;      ///< of the sequence; at least to position first_position + T - 1
  std::int64_t first_position = 0;      ///< of q's row 0
  codegemm::MatrixView<const float> q;  ///< [T][heads * head_dim], after RoPE
  codegemm::MatrixView<float> out;      ///< the same shape; may not overlap q or the KV
  int heads = 0;                        ///< a multiple of kv.kv_heads
  float scale = 0.0F;                   ///< of the scores; 0 means 1 / sqrt(head_dim)
  std::span<std::byte> workspace;       ///< workspace_bytes(), 64-byte aligned, need not be cleared
  /// Where set, K and V come from here and not from `kv`: pages in host memory of any type and order, fp8
  /// with its scales. Outlives the call.
  const KvPages* pages = nullptr;
};

inline constexpr std::size_t kAttentionAlignment = 64;  ///< bytes, of the workspace's address

/// The shape of that call.
[[nodiscard]] inline PagedAttentionShape shape_of(const PagedAttentionArgs& args) {
  const auto kv = args.pages != nullptr ? detail::sizes_of(*args.pages) : args.kv;
  return {args.q.rows, args.first_position + args.q.rows, args.heads, kv.kv_heads, kv.head_dim, args.pages};
}

/// Bytes of workspace for a valid shape on an executor of `workers` workers. 0 for no tokens.
[[nodiscard]] inline std::size_t workspace_bytes(const PagedAttentionShape& shape, int workers) {
  if (shape.tokens <= 0) return 0;
  const std::int64_t group = shape.heads / shape.kv_heads;
  std::int64_t floats = 0;
  if (group <= detail::kFewRows) {  // calls with few rows may split the keys
    const std::int64_t rows =
        shape.tokens <= detail::kFewRows / group ? shape.tokens * group : detail::kFewRows / group * group;
    const std::int64_t splits =
        std::min((shape.context + detail::kMinSplitKeys - 1) / detail::kMinSplitKeys, detail::kMaxSplits);
    const std::int64_t scratch = detail::key_scratch_floats(shape.pages, shape.head_dim);
    floats = workers * scratch + splits * shape.kv_heads * rows * detail::partial_floats(shape.head_dim);
  }
  if (shape.tokens > detail::kFewRows / group) {  // and those with more split the rows
    floats = std::max(floats, workers * (detail::TileScratch::floats(shape.head_dim) +
                                         detail::converted_floats(shape.pages, shape.head_dim)));
  }
  const auto bytes = static_cast<std::size_t>(floats) * sizeof(float);
  return (bytes + kAttentionAlignment - 1) / kAttentionAlignment * kAttentionAlignment;
}

/// Everything that paged_attention() refuses; the text has the numbers.
[[nodiscard]] inline codegemm::Status validate(const PagedAttentionArgs& args, int workers) {
  using codegemm::error;
  using codegemm::StatusCode;
  const auto kv = args.pages != nullptr ? detail::sizes_of(*args.pages) : args.kv;
  if (args.q.rows < 0 || args.q.rows != args.out.rows || args.q.cols != args.out.cols) {
    return error(StatusCode::kShapeMismatch, "paged_attention: q is ", args.q.rows, " x ", args.q.cols,
                 ", out is ", args.out.rows, " x ", args.out.cols);
  }
  if (kv.kv_heads < 1 || kv.block_tokens < 1 || args.heads < 1 || args.heads % kv.kv_heads != 0) {
    return error(StatusCode::kInvalidArgument, "paged_attention: ", args.heads, " heads over ", kv.kv_heads,
                 " K/V heads in blocks of ", kv.block_tokens,
                 " tokens; heads must be a multiple of K/V heads, and all of them at least 1");
  }
  if (kv.head_dim < 8 || kv.head_dim % 8 != 0 || kv.head_dim > detail::kMaxHeadDim) {
    return error(StatusCode::kUnsupported, "paged_attention: head_dim = ", kv.head_dim,
                 ", expected a multiple of 8 from 8 to ", detail::kMaxHeadDim);
  }
  if (args.q.cols != std::int64_t{args.heads} * kv.head_dim) {
    return error(StatusCode::kShapeMismatch, "paged_attention: q has ", args.q.cols, " columns, expected ",
                 args.heads, " heads x ", kv.head_dim);
  }
  if (args.q.stride < args.q.cols || args.out.stride < args.out.cols) {
    return error(StatusCode::kShapeMismatch, "paged_attention: ", args.q.cols, " columns with strides ",
                 args.q.stride, " of q and ", args.out.stride, " of out");
  }
  if (!std::isfinite(args.scale)) {
    return error(StatusCode::kInvalidArgument, "paged_attention: scale = ", args.scale);
  }
  const auto covered = static_cast<std::int64_t>(args.blocks.size()) * kv.block_tokens;
  if (args.first_position < 0 || args.first_position > covered - args.q.rows) {
    return error(StatusCode::kInvalidArgument, "paged_attention: ", args.q.rows, " tokens at position ",
                 args.first_position, ", but ", args.blocks.size(), " blocks of ", kv.block_tokens, " hold ",
                 covered);
  }
  if (args.q.rows == 0) return {};
  if (args.q.data == nullptr || args.out.data == nullptr || kv.data == nullptr) {
    return error(StatusCode::kNullPointer, "paged_attention: ",
                 args.q.data == nullptr     ? "q"
                 : args.out.data == nullptr ? "out"
                                            : "kv",
                 " is null");
  }
  if (overlap(args.q, args.out)) {
    return error(StatusCode::kInvalidArgument, "paged_attention: out overlaps q");
  }
  const std::int64_t used = (args.first_position + args.q.rows + kv.block_tokens - 1) / kv.block_tokens;
  for (std::int64_t i = 0; i < used; ++i) {
    const BlockId block = args.blocks[static_cast<std::size_t>(i)];
    if (block < 0 || block >= kv.blocks) {
      return error(StatusCode::kInvalidArgument, "paged_attention: blocks[", i, "] = ", block, " of ",
                   kv.blocks);
    }
  }
  const std::size_t needed = workspace_bytes(shape_of(args), workers);
  if (args.workspace.size() < needed) {
    return error(StatusCode::kWorkspaceTooSmall, "paged_attention: workspace of ", args.workspace.size(),
                 " bytes, expected ", needed);
  }
  if (args.workspace.data() == nullptr ||
      reinterpret_cast<std::uintptr_t>(args.workspace.data()) % kAttentionAlignment != 0) {
    return error(StatusCode::kMisaligned, "paged_attention: the workspace is not aligned to ",
                 kAttentionAlignment, " bytes");
  }
  return {};
}

namespace detail {

/// paged_attention() with chosen kernels; the tests run all that the machine has.
[[nodiscard]] inline codegemm::Status paged_attention(const PagedAttentionArgs& args,
                                                      codegemm::Executor& executor,
                                                      const AttentionKernels& kernels) {
  const int workers = executor.workers();
  if (codegemm::Status status = validate(args, workers); !status.ok()) return status;
  if (args.q.rows == 0) return {};
  const auto kv = args.pages != nullptr ? sizes_of(*args.pages) : args.kv;
  const int head_dim = kv.head_dim;
  const int kv_heads = kv.kv_heads;
  const float scale =
      args.scale != 0.0F ? args.scale : static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  AttentionProblem problem;
  problem.kv = kv;
  problem.pages = args.pages;
  problem.blocks = args.blocks.data();
  problem.first_position = args.first_position;
  problem.tokens = args.q.rows;
  problem.q = args.q.data;
  problem.q_stride = args.q.stride;
  problem.out = args.out.data;
  problem.out_stride = args.out.stride;
  problem.group = args.heads / kv_heads;
  problem.scale = static_cast<float>(static_cast<double>(scale) * std::numbers::log2e);
  const std::int64_t rows = problem.rows();
  auto* memory = reinterpret_cast<float*>(args.workspace.data());

  if (rows > kFewRows) {
    const std::int64_t size = tile_rows(rows, kv_heads);
    const std::int64_t tiles = (rows + size - 1) / size;
    codegemm::parallel_for(executor, tiles * kv_heads, [&](std::int64_t task, int worker) {
      const std::int64_t tile = tiles - 1 - task / kv_heads;  // the last see most keys: these first
      const auto kv_head = static_cast<int>(task % kv_heads);
      const std::int64_t first = tile * size;
      kernels.attend_rows(
          problem, kv_head, first, std::min(size, rows - first),
          memory + worker * (TileScratch::floats(head_dim) + converted_floats(args.pages, head_dim)));
    });
    return {};
  }
  const std::int64_t keys = args.first_position + args.q.rows;
  const std::int64_t size = split_keys(keys);
  const std::int64_t splits = (keys + size - 1) / size;
  const std::int64_t scratch = key_scratch_floats(args.pages, head_dim);
  const std::int64_t row_stride = partial_floats(head_dim);
  const std::int64_t split_stride = kv_heads * rows * row_stride;
  float* partials = memory + workers * scratch;  // [splits][kv_heads][rows][row_stride]
  codegemm::parallel_for(executor, splits * kv_heads, [&](std::int64_t task, int worker) {
    const std::int64_t split = task / kv_heads;
    const auto kv_head = static_cast<int>(task % kv_heads);
    kernels.attend_keys(problem, kv_head, split * size, std::min(keys, (split + 1) * size),
                        memory + worker * scratch,
                        partials + split * split_stride + kv_head * rows * row_stride);
  });
  for (int kv_head = 0; kv_head < kv_heads; ++kv_head) {
    for (std::int64_t row = 0; row < rows; ++row) {
      kernels.merge_splits(partials + (kv_head * rows + row) * row_stride, splits, split_stride, head_dim,
                           problem.out_row(kv_head, row));
    }
  }
  return {};
}

}  // namespace detail

/// out[t][h] = softmax(scale * q[t][h] . K[0 .. p]) V[0 .. p] with p = first_position + t, heads in groups of
/// heads / kv_heads on one K/V head. K and V become fp32 as they are read; fp32 throughout, online softmax.
/// Deterministic, and independent of the number of workers. With more than 16 rows (tokens x group) a token's
/// result is also bit for bit the same however a prefill is cut into such chunks. Allocates nothing. No
/// tokens is success. Errors: see validate().
[[nodiscard]] inline codegemm::Status paged_attention(const PagedAttentionArgs& args,
                                                      codegemm::Executor& executor) {
  return detail::paged_attention(args, executor, detail::attention_kernels());
}

/// Writes K and V, [T][kv_heads * head_dim] each and K after RoPE, into the slots of positions first_position
/// and after. Those slots must be the sequence's to write (KvAllocator::reserve or append_private).
/// kShapeMismatch, kNullPointer, kInvalidArgument (positions or block numbers out of range).
[[nodiscard]] inline codegemm::Status append_kv(const KvLayerView<float>& kv, std::span<const BlockId> blocks,
                                                std::int64_t first_position,
                                                codegemm::MatrixView<const float> k,
                                                codegemm::MatrixView<const float> v) {
  using codegemm::error;
  using codegemm::StatusCode;
  if (k.rows < 0 || k.rows != v.rows || k.cols != v.cols || k.cols != kv.slot_stride() || k.stride < k.cols ||
      v.stride < v.cols || kv.block_tokens < 1) {
    return error(StatusCode::kShapeMismatch, "append_kv: k is ", k.rows, " x ", k.cols, ", v is ", v.rows,
                 " x ", v.cols, ", expected rows of ", kv.kv_heads, " heads x ", kv.head_dim);
  }
  const auto covered = static_cast<std::int64_t>(blocks.size()) * kv.block_tokens;
  if (first_position < 0 || first_position > covered - k.rows) {
    return error(StatusCode::kInvalidArgument, "append_kv: ", k.rows, " tokens at position ", first_position,
                 ", but ", blocks.size(), " blocks of ", kv.block_tokens, " hold ", covered);
  }
  if (k.rows == 0) return {};
  if (k.data == nullptr || v.data == nullptr || kv.data == nullptr) {
    return error(StatusCode::kNullPointer, "append_kv: ",
                 k.data == nullptr   ? "k"
                 : v.data == nullptr ? "v"
                                     : "kv",
                 " is null");
  }
  for (std::int64_t i = first_position / kv.block_tokens;
       i <= (first_position + k.rows - 1) / kv.block_tokens; ++i) {
    const BlockId block = blocks[static_cast<std::size_t>(i)];
    if (block < 0 || block >= kv.blocks) {
      return error(StatusCode::kInvalidArgument, "append_kv: blocks[", i, "] = ", block, " of ", kv.blocks);
    }
  }
  const std::size_t bytes = static_cast<std::size_t>(k.cols) * sizeof(float);
  for (std::int64_t t = 0; t < k.rows; ++t) {
    const std::int64_t position = first_position + t;
    const BlockId block = blocks[static_cast<std::size_t>(position / kv.block_tokens)];
    const int slot = static_cast<int>(position % kv.block_tokens);
    std::memcpy(kv.k(block, slot), k.row(t), bytes);
    std::memcpy(kv.v(block, slot), v.row(t), bytes);
  }
  return {};
}

}  // namespace prefillshare
