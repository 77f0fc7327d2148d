// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/shared.hpp - one new token of each of several sequences over their KV blocks; blocks
// that all of them share are read once.
// Layer: attention (host only).
// See: Hydragen (arXiv 2402.05099) section 3 for the split; paged.hpp for one sequence.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <span>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/attention/cpu_kernels.hpp>
#include <prefillshare/attention/cpu_problem.hpp>
#include <prefillshare/attention/paged.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/storage.hpp>

namespace prefillshare {

/// One sequence of a decode step, of any decode module: its blocks, and how many keys its new token sees.
struct DecodeSequence {
  std::span<const BlockId> blocks;  ///< at least to position length - 1
  std::int64_t length = 0;          ///< keys, that of the new token included
};

/// Attention of one query token of each sequence over the KV of one layer.
struct SharedDecodeArgs {
  KvLayerView<const float> kv;                ///< storage.layer(i)
  std::span<const DecodeSequence> sequences;  ///< whose queries are the rows of q
  std::int64_t shared_tokens = 0;       ///< the first keys, in the same blocks in all sequences; 0: none are
  codegemm::MatrixView<const float> q;  ///< [sequences][heads * head_dim], after RoPE
  codegemm::MatrixView<float> out;      ///< the same shape; may not overlap q or the KV
  int heads = 0;                        ///< a multiple of kv.kv_heads
  float scale = 0.0F;                   ///< of the scores; 0 means 1 / sqrt(head_dim)
  std::span<std::byte> workspace;       ///< decode_workspace_bytes(), 64-byte aligned, need not be cleared
  const KvPages* pages = nullptr;       ///< where set, K and V come from here, as in PagedAttentionArgs
};

namespace detail {

/// How the keys are cut: `shared_parts` ranges for all sequences, then `tail_parts` at most for each.
struct SharedDecodePlan {
  std::int64_t shared_size = 0;  // keys of a part
  std::int64_t shared_parts = 0;
  std::int64_t tail_parts = 0;
  std::int64_t rows = 0;          // sequences x heads of a K/V head
  std::int64_t part_stride = 0;   // floats from a part of a row to the next
  std::int64_t scratch = 0;       // floats of a worker
  std::int64_t partial_size = 0;  // floats of a part of a row
};

[[nodiscard]] inline KvLayerView<const float> kv_of(const SharedDecodeArgs& args) {
  return args.pages != nullptr ? sizes_of(*args.pages) : args.kv;
}

[[nodiscard]] inline SharedDecodePlan plan_of(const SharedDecodeArgs& args) {
  const auto kv = kv_of(args);
  SharedDecodePlan plan;
  std::int64_t longest = 0;
  for (const DecodeSequence& s : args.sequences) longest = std::max(longest, s.length - args.shared_tokens);
  const auto parts = [](std::int64_t keys) { return keys == 0 ? 0 : (keys - 1) / split_keys(keys) + 1; };
  plan.shared_size = split_keys(args.shared_tokens);
  plan.shared_parts = parts(args.shared_tokens);
  // A shorter tail has no more parts than (keys - 1) / kMinSplitKeys + 1, and never more than kMaxSplits.
  plan.tail_parts = longest == 0 ? 0 : std::min(kMaxSplits, (longest - 1) / kMinSplitKeys + 1);
  plan.rows = static_cast<std::int64_t>(args.sequences.size()) * (args.heads / kv.kv_heads);
  plan.partial_size = partial_floats(kv.head_dim);
  plan.part_stride = plan.rows * kv.kv_heads * plan.partial_size;
  plan.scratch = key_scratch_floats(args.pages, kv.head_dim);
  return plan;
}

}  // namespace detail

/// Bytes of workspace for valid arguments on an executor of `workers` workers. 0 for no sequences.
[[nodiscard]] inline std::size_t decode_workspace_bytes(const SharedDecodeArgs& args, int workers) {
  if (args.sequences.empty()) return 0;
  const detail::SharedDecodePlan plan = detail::plan_of(args);
  const std::int64_t floats =
      workers * plan.scratch + (plan.shared_parts + plan.tail_parts) * plan.part_stride;
  const auto bytes = static_cast<std::size_t>(floats) * sizeof(float);
  return (bytes + kAttentionAlignment - 1) / kAttentionAlignment * kAttentionAlignment;
}

/// Everything that shared_decode() refuses; the text has the numbers.
[[nodiscard]] inline codegemm::Status validate(const SharedDecodeArgs& args, int workers) {
  using codegemm::error;
  using codegemm::StatusCode;
  const auto kv = detail::kv_of(args);
  const auto count = static_cast<std::int64_t>(args.sequences.size());
  if (kv.kv_heads < 1 || kv.block_tokens < 1 || args.heads < 1 || args.heads % kv.kv_heads != 0) {
    return error(StatusCode::kInvalidArgument, "shared_decode: ", args.heads, " heads over ", kv.kv_heads,
                 " K/V heads in blocks of ", kv.block_tokens,
                 " tokens; heads must be a multiple of K/V heads, and all of them at least 1");
  }
  if (kv.head_dim < 8 || kv.head_dim % 8 != 0 || kv.head_dim > detail::kMaxHeadDim) {
    return error(StatusCode::kUnsupported, "shared_decode: head_dim = ", kv.head_dim,
                 ", expected a multiple of 8 from 8 to ", detail::kMaxHeadDim);
  }
  const std::int64_t columns = std::int64_t{args.heads} * kv.head_dim;
  if (args.q.rows != count || args.out.rows != count || args.q.cols != columns || args.out.cols != columns ||
      args.q.stride < columns || args.out.stride < columns) {
    return error(StatusCode::kShapeMismatch, "shared_decode: q is ", args.q.rows, " x ", args.q.cols,
                 " with stride ", args.q.stride, ", out ", args.out.rows, " x ", args.out.cols,
                 " with stride ", args.out.stride, ", expected ", count, " x ", columns);
  }
  if (!std::isfinite(args.scale)) {
    return error(StatusCode::kInvalidArgument, "shared_decode: scale = ", args.scale);
  }
  if (count == 0) return {};
  if (args.q.data == nullptr || args.out.data == nullptr || kv.data == nullptr) {
    return error(StatusCode::kNullPointer, "shared_decode: ",
                 args.q.data == nullptr     ? "q"
                 : args.out.data == nullptr ? "out"
                                            : "kv",
                 " is null");
  }
  if (overlap(args.q, args.out)) {
    return error(StatusCode::kInvalidArgument, "shared_decode: out overlaps q");
  }
  const auto blocks_of = [&](std::int64_t tokens) {
    return static_cast<std::size_t>(tokens / kv.block_tokens + (tokens % kv.block_tokens != 0 ? 1 : 0));
  };
  for (std::int64_t i = 0; i < count; ++i) {
    const DecodeSequence& s = args.sequences[static_cast<std::size_t>(i)];
    if (args.shared_tokens < 0 || s.length < args.shared_tokens || s.blocks.size() < blocks_of(s.length)) {
      return error(StatusCode::kInvalidArgument, "shared_decode: sequence ", i, " has ", s.length,
                   " keys in ", s.blocks.size(), " blocks of ", kv.block_tokens, ", ", args.shared_tokens,
                   " are shared");
    }
    for (std::size_t b = 0; b < blocks_of(s.length); ++b) {
      if (s.blocks[b] < 0 || s.blocks[b] >= kv.blocks) {
        return error(StatusCode::kInvalidArgument, "shared_decode: blocks[", b, "] of sequence ", i, " = ",
                     s.blocks[b], " of ", kv.blocks);
      }
      if (b < blocks_of(args.shared_tokens) && s.blocks[b] != args.sequences[0].blocks[b]) {
        return error(StatusCode::kInvalidArgument, "shared_decode: blocks[", b, "] of sequence ", i, " = ",
                     s.blocks[b], " is not that of sequence 0, ", args.sequences[0].blocks[b], ", though ",
                     args.shared_tokens, " tokens are shared");
      }
    }
  }
  const std::size_t needed = decode_workspace_bytes(args, workers);
  if (args.workspace.size() < needed) {
    return error(StatusCode::kWorkspaceTooSmall, "shared_decode: workspace of ", args.workspace.size(),
                 " bytes, expected ", needed);
  }
  if (args.workspace.data() == nullptr ||
      reinterpret_cast<std::uintptr_t>(args.workspace.data()) % kAttentionAlignment != 0) {
    return error(StatusCode::kMisaligned, "shared_decode: the workspace is not aligned to ",
                 kAttentionAlignment, " bytes");
  }
  return {};
}

namespace detail {

/// A step being worked on: its parts of rows lie as [part][K/V head][sequence][head of the group].
struct SharedDecodeRun {
  const SharedDecodeArgs& args;
  const AttentionKernels& kernels;
  SharedDecodePlan plan;
  AttentionProblem problem;
  float* memory;
  float* partials;

  /// Keys [first, end) of the blocks of `sequence` for the queries of `count` sequences from it on, into a
  /// part. 16 rows at a time: more of them read the keys again, from the cache.
  void attend(std::int64_t sequence, std::int64_t count, int kv_head, std::int64_t first, std::int64_t end,
              std::int64_t part, float* scratch) const {
    const std::int64_t group = problem.group;
    const auto heads = static_cast<int>(std::min(group, kFewRows));
    const std::int64_t step = kFewRows / heads;
    for (std::int64_t s = sequence; s < sequence + count; s += step) {
      for (std::int64_t h = 0; h < group; h += heads) {
        AttentionProblem some = problem;
        some.blocks = args.sequences[static_cast<std::size_t>(sequence)].blocks.data();
        some.first_position = end;  // every query is behind these keys
        some.tokens = std::min(step, sequence + count - s);
        some.group = static_cast<int>(std::min<std::int64_t>(heads, group - h));
        // The kernels find head kv_head * some.group of a query.
        some.q = args.q.data + s * args.q.stride + (kv_head * (group - some.group) + h) * problem.kv.head_dim;
        kernels.attend_keys(
            some, kv_head, first, end, scratch,
            partials + part * plan.part_stride + (kv_head * plan.rows + s * group + h) * plan.partial_size);
      }
    }
  }
  void merge(std::int64_t sequence, std::int64_t parts) const {
    const std::int64_t head_dim = problem.kv.head_dim;
    for (std::int64_t head = 0; head < args.heads; ++head) {
      float* const to = args.out.data + sequence * args.out.stride + head * head_dim;
      if (parts == 0) {
        std::fill_n(to, head_dim, 0.0F);
        continue;
      }
      const std::int64_t row =
          head / problem.group * plan.rows + sequence * problem.group + head % problem.group;
      kernels.merge_splits(partials + row * plan.partial_size, parts, plan.part_stride, head_dim, to);
    }
  }
};

/// shared_decode() with chosen kernels; the tests run all that the machine has.
[[nodiscard]] inline codegemm::Status shared_decode(const SharedDecodeArgs& args,
                                                    codegemm::Executor& executor,
                                                    const AttentionKernels& kernels) {
  const int workers = executor.workers();
  if (codegemm::Status status = validate(args, workers); !status.ok()) return status;
  const auto count = static_cast<std::int64_t>(args.sequences.size());
  if (count == 0) return {};
  const auto kv = kv_of(args);
  const int kv_heads = kv.kv_heads;
  const double scale = args.scale != 0.0F ? static_cast<double>(args.scale)
                                          : 1.0 / std::sqrt(static_cast<double>(kv.head_dim));
  AttentionProblem problem;
  problem.kv = kv;
  problem.pages = args.pages;
  problem.q_stride = args.q.stride;
  problem.group = args.heads / kv_heads;
  problem.scale = static_cast<float>(scale * std::numbers::log2e);
  const SharedDecodePlan plan = plan_of(args);
  auto* const memory = reinterpret_cast<float*>(args.workspace.data());
  const SharedDecodeRun run{args, kernels, plan, problem, memory, memory + workers * plan.scratch};

  // The shared parts first, since they take longer.
  const std::int64_t shared_tasks = plan.shared_parts * kv_heads;
  const std::int64_t tail_tasks = count * plan.tail_parts * kv_heads;
  codegemm::parallel_for(executor, shared_tasks + tail_tasks, [&](std::int64_t task, int worker) {
    float* const scratch = memory + worker * plan.scratch;
    const auto kv_head = static_cast<int>(task % kv_heads);
    if (task < shared_tasks) {
      const std::int64_t part = task / kv_heads;
      const std::int64_t first = part * plan.shared_size;
      run.attend(0, count, kv_head, first, std::min(args.shared_tokens, first + plan.shared_size), part,
                 scratch);
      return;
    }
    const std::int64_t sequence = (task - shared_tasks) / kv_heads / plan.tail_parts;
    const std::int64_t part = (task - shared_tasks) / kv_heads % plan.tail_parts;
    const std::int64_t length = args.sequences[static_cast<std::size_t>(sequence)].length;
    const std::int64_t size = split_keys(length - args.shared_tokens);
    const std::int64_t first = args.shared_tokens + part * size;
    if (first >= length) return;
    run.attend(sequence, 1, kv_head, first, std::min(length, first + size), plan.shared_parts + part,
               scratch);
  });
  codegemm::parallel_for(executor, count, [&](std::int64_t sequence, int) {
    const std::int64_t keys = args.sequences[static_cast<std::size_t>(sequence)].length - args.shared_tokens;
    const std::int64_t size = split_keys(keys);
    run.merge(sequence, plan.shared_parts + (keys + size - 1) / size);
  });
  return {};
}

}  // namespace detail

/// out[i][h] = softmax(scale * q[i][h] . K) V over the keys of sequence i, zeros if it has none. The shared
/// keys are read once for all sequences, the others once for each, and both are merged by their maxima and
/// sums. fp32 throughout. Deterministic, and independent of the number of workers. Allocates nothing.
/// Errors: see validate().
[[nodiscard]] inline codegemm::Status shared_decode(const SharedDecodeArgs& args,
                                                    codegemm::Executor& executor) {
  return detail::shared_decode(args, executor, detail::attention_kernels());
}

}  // namespace prefillshare
