// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/page_table.hpp - a batch of sequences as paged attention kernels want it.
// Layer: kv (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <codegemm/base/status.hpp>
#include <prefillshare/kv/sequence.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// FlashInfer's page table in CSR form, all int32. The pages of sequence i are
/// indices[indptr[i]] .. indices[indptr[i + 1] - 1]; the last of them holds last_page_len[i] tokens, so
/// length = block_tokens * (pages - 1) + last_page_len, with last_page_len in 1..block_tokens. An empty
/// sequence has no page and last_page_len = block_tokens, which the same sum makes 0.
/// See: https://docs.flashinfer.ai/tutorials/kv_layout.html
struct PageTable {
  std::vector<std::int32_t> indptr;         ///< [sequences + 1]
  std::vector<std::int32_t> indices;        ///< [indptr.back()]
  std::vector<std::int32_t> last_page_len;  ///< [sequences]
};

/// Writes the table of the tokens that are there (length(), not what is reserved) and, where `pending` has an
/// element for each sequence, of as many reserved ones behind them: those that the pass which reads the table
/// writes. `table` keeps its memory from call to call; on failure it is not touched. All sequences are open
/// and of one allocator, whose numbers they hold. kNullPointer, kInvalidArgument (closed; more pending than
/// there are blocks for), kShapeMismatch, kIncompatible (two allocators), kUnsupported (more pages than int32
/// counts), kOutOfMemory.
[[nodiscard]] inline codegemm::Status export_page_table(std::span<const Sequence* const> sequences,
                                                        PageTable& table,
                                                        std::span<const std::int64_t> pending = {}) {
  using codegemm::StatusCode;
  if (!pending.empty() && pending.size() != sequences.size()) {
    return codegemm::error(StatusCode::kShapeMismatch, "export_page_table: ", pending.size(),
                           " numbers of pending tokens for ", sequences.size(), " sequences");
  }
  const auto length_of = [&](std::size_t i) {
    return sequences[i]->length() + (pending.empty() ? 0 : pending[i]);
  };
  constexpr std::int64_t kMostPending = std::int64_t{1} << 40;  // no sum below overflows
  std::int64_t pages = 0;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i] == nullptr) {
      return codegemm::error(StatusCode::kNullPointer, "export_page_table: sequence ", i, " is null");
    }
    if (!sequences[i]->is_open()) {
      return codegemm::error(StatusCode::kInvalidArgument, "export_page_table: sequence ", i, " is closed");
    }
    if (detail::SequenceAccess::owner(*sequences[i]) != detail::SequenceAccess::owner(*sequences[0])) {
      return codegemm::error(StatusCode::kIncompatible, "export_page_table: sequence ", i,
                             " is of another allocator than sequence 0");
    }
    const std::int64_t tokens = sequences[i]->block_tokens();
    const std::int64_t length = length_of(i);
    if ((!pending.empty() && (pending[i] < 0 || pending[i] > kMostPending)) ||
        length > std::ssize(sequences[i]->blocks()) * tokens) {
      return codegemm::error(StatusCode::kInvalidArgument, "export_page_table: sequence ", i, " has ",
                             sequences[i]->length(), " tokens in ", sequences[i]->blocks().size(),
                             " blocks of ", tokens, ", ", pending.empty() ? 0 : pending[i], " are pending");
    }
    pages += (length + tokens - 1) / tokens;
  }
  if (pages > std::numeric_limits<std::int32_t>::max() ||
      sequences.size() >= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    return codegemm::error(StatusCode::kUnsupported, "export_page_table: ", pages, " pages of ",
                           sequences.size(), " sequences do not fit int32");
  }
  const bool allocated = detail::try_allocate([&] {
    table.indptr.reserve(sequences.size() + 1);
    table.indices.reserve(static_cast<std::size_t>(pages));
    table.last_page_len.reserve(sequences.size());
  });
  if (!allocated) {
    return codegemm::error(StatusCode::kOutOfMemory, "export_page_table: no memory for ", pages, " pages");
  }
  table.indptr.assign(1, 0);
  table.indices.clear();
  table.last_page_len.clear();
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const std::int64_t tokens = sequences[i]->block_tokens();
    const std::int64_t length = length_of(i);
    const std::int64_t used = (length + tokens - 1) / tokens;
    const std::span<const BlockId> blocks = sequences[i]->blocks().first(static_cast<std::size_t>(used));
    table.indices.insert(table.indices.end(), blocks.begin(), blocks.end());
    table.indptr.push_back(static_cast<std::int32_t>(table.indices.size()));
    table.last_page_len.push_back(static_cast<std::int32_t>(tokens - (used * tokens - length)));
  }
  return {};
}

}  // namespace prefillshare
