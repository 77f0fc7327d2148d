// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/prefill_batch.cuh - the next tokens of several sequences, from the host into a
// pass.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <prefillshare/kv/page_table.hpp>
#include <prefillshare/model/cuda/forward.cuh>
#include <prefillshare/model/cuda/staged_input.cuh>

namespace prefillshare::cuda {

/// Token ids and page tables of a pass on the device, written by the host for each.
class PrefillBatch {
 public:
  /// Behind so many tokens at least a pass of few splits their keys (suite kv-gpu).
  static constexpr std::int64_t kMinSplitContext = 1024;

  /// For up to so many tokens of so many sequences in so many pages. kInvalidArgument, kOutOfMemory,
  /// kCudaError.
  [[nodiscard]] static Result<PrefillBatch> create(std::int64_t max_tokens, std::int64_t max_sequences,
                                                   std::int64_t max_pages) {
    if (max_tokens < 1 || max_tokens > kMaxQueryTokens || max_sequences < 1 ||
        max_sequences > kMaxSequences || max_pages < 1 || max_pages > (std::int64_t{1} << 30)) {
      return codegemm::error(StatusCode::kInvalidArgument, "PrefillBatch for ", max_tokens, " tokens of ",
                             max_sequences, " sequences in ", max_pages, " pages");
    }
    PrefillBatch out;
    out.max_tokens_ = max_tokens;
    out.max_sequences_ = max_sequences;
    out.max_pages_ = max_pages;
    const auto n = static_cast<std::size_t>(max_sequences);
    out.query_indptr_at_ = out.input_.place<std::int32_t>(n + 1);
    out.indptr_at_ = out.input_.place<std::int32_t>(n + 1);
    out.last_page_len_at_ = out.input_.place<std::int32_t>(n);
    out.tokens_at_ = out.input_.place<std::int32_t>(static_cast<std::size_t>(max_tokens));
    out.indices_at_ = out.input_.place<std::int32_t>(static_cast<std::size_t>(max_pages));
    if (Status s = out.input_.allocate(); !s.ok()) return s;
    return out;
  }

  /// Puts the copy of chunks[i], the next tokens of caches[i], into the stream, with the pages of what is
  /// there and of the chunks, for which blocks are reserved. The batch is valid until the next call.
  /// kInvalidArgument for an id outside of the vocabulary or more than there is room for, and as
  /// export_page_table().
  [[nodiscard]] Result<DeviceBatch> send(std::span<const std::span<const std::int32_t>> chunks,
                                         std::span<const Sequence* const> caches, std::int64_t vocab_size,
                                         cudaStream_t stream) {
    if (chunks.size() != caches.size() || chunks.empty() || std::ssize(chunks) > max_sequences_) {
      return codegemm::error(StatusCode::kInvalidArgument, "PrefillBatch for ", max_sequences_,
                             " sequences: ", chunks.size(), " chunks of ", caches.size(), " sequences");
    }
    query_indptr_.assign(1, 0);
    pending_.clear();
    std::int64_t count = 0;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      for (const std::int32_t id : chunks[i]) {
        if (id < 0 || id >= vocab_size) {
          return codegemm::error(StatusCode::kInvalidArgument, "sequence ", i, ": a token has id ", id,
                                 ", the vocabulary has ", vocab_size);
        }
      }
      if (chunks[i].empty())
        return codegemm::error(StatusCode::kInvalidArgument, "sequence ", i, ": no tokens");
      count += std::ssize(chunks[i]);
      if (count > max_tokens_) {
        return codegemm::error(StatusCode::kInvalidArgument, "PrefillBatch for ", max_tokens_,
                               " tokens: ", count, " in ", i + 1, " sequences");
      }
      query_indptr_.push_back(static_cast<std::int32_t>(count));
      pending_.push_back(std::ssize(chunks[i]));
    }
    if (Status s = export_page_table(caches, table_, pending_); !s.ok()) return s;
    std::int64_t longest = 0;
    for (std::size_t i = 0; i < chunks.size(); ++i) longest = std::max(longest, caches[i]->length());
    if (std::ssize(table_.indices) > max_pages_) {
      return codegemm::error(StatusCode::kInvalidArgument, "PrefillBatch for ", max_pages_,
                             " pages: ", table_.indices.size());
    }
    if (Status s = input_.begin(); !s.ok()) return s;
    using Ints = std::span<const std::int32_t>;
    input_.write(query_indptr_at_, Ints(query_indptr_));
    input_.write(indptr_at_, Ints(table_.indptr));
    input_.write(last_page_len_at_, Ints(table_.last_page_len));
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      input_.write(tokens_at_ + static_cast<std::size_t>(query_indptr_[i]) * sizeof(std::int32_t), chunks[i]);
    }
    input_.write(indices_at_, Ints(table_.indices));
    const std::size_t last = indices_at_ + table_.indices.size() * sizeof(std::int32_t);
    if (Status s = input_.send(query_indptr_at_, last, stream); !s.ok()) return s;
    DeviceBatch out;
    out.tokens = input_.device<std::int32_t>(tokens_at_);
    out.count = count;
    out.query_indptr = input_.device<std::int32_t>(query_indptr_at_);
    out.table = {input_.device<std::int32_t>(indptr_at_), input_.device<std::int32_t>(indices_at_),
                 input_.device<std::int32_t>(last_page_len_at_), static_cast<int>(chunks.size())};
    out.split_keys = longest >= kMinSplitContext;
    return out;
  }

  [[nodiscard]] std::int64_t max_tokens() const noexcept { return max_tokens_; }        ///< of a pass
  [[nodiscard]] std::int64_t max_sequences() const noexcept { return max_sequences_; }  ///< of a pass

 private:
  PrefillBatch() = default;

  std::int64_t max_tokens_ = 0;
  std::int64_t max_sequences_ = 0;
  std::int64_t max_pages_ = 0;
  std::size_t query_indptr_at_ = 0;
  std::size_t indptr_at_ = 0;
  std::size_t last_page_len_at_ = 0;
  std::size_t tokens_at_ = 0;
  std::size_t indices_at_ = 0;
  StagedInput input_;
  std::vector<std::int32_t> query_indptr_;
  std::vector<std::int64_t> pending_;
  PageTable table_;
};

}  // namespace prefillshare::cuda
