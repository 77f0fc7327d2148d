// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/prefix_groups.hpp - which sequences of a decode batch begin with the same blocks, so
// that attention reads those once.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include <prefillshare/kv/sequence.hpp>

namespace prefillshare {

/// Orders a batch so that sequences with a common beginning lie beside each other, and tells how long that
/// is. Sequences of one group begin with the same block; what all of them have in common counts. Keeps its
/// memory.
class PrefixGroups {
 public:
  /// Whether there are sequences that share at least `from_tokens` tokens in whole blocks of `block_tokens`,
  /// a sequence's last token excepted. If not, the order is that of the batch, and there are no groups.
  bool find(std::span<const Sequence* const> batch, int block_tokens, std::int64_t from_tokens) {
    order_.resize(batch.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    indptr_.assign(1, 0);
    pages_.clear();
    const auto first = [&](std::size_t i) {
      const std::span<const BlockId> blocks = batch[i]->blocks();
      return blocks.empty() ? kNoBlock : blocks[0];
    };
    std::stable_sort(order_.begin(), order_.end(),
                     [&](std::size_t a, std::size_t b) { return first(a) < first(b); });
    bool found = false;
    for (std::size_t begin = 0; begin < order_.size();) {
      std::size_t end = begin + 1;
      std::int64_t common = whole_blocks(*batch[order_[begin]], block_tokens);
      for (; end < order_.size() && first(order_[begin]) != kNoBlock &&
             first(order_[end]) == first(order_[begin]);
           ++end) {
        const Sequence& other = *batch[order_[end]];
        common = std::min(common, whole_blocks(other, block_tokens));
        const auto head = batch[order_[begin]]->blocks().first(static_cast<std::size_t>(common));
        common = std::mismatch(head.begin(), head.end(), other.blocks().begin()).first - head.begin();
      }
      const bool shares = end - begin > 1 && common * block_tokens >= from_tokens;
      indptr_.push_back(static_cast<std::int32_t>(end));
      pages_.push_back(shares ? static_cast<std::int32_t>(common) : 0);
      found = found || shares;
      begin = end;
    }
    if (found) return true;
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    indptr_.assign(1, 0);
    pages_.clear();
    return false;
  }

  /// [sequences]: which of the batch comes where.
  [[nodiscard]] std::span<const std::size_t> order() const noexcept { return order_; }
  /// [groups + 1]: where each group begins in that order.
  [[nodiscard]] std::span<const std::int32_t> indptr() const noexcept { return indptr_; }
  /// [groups]: the blocks that all of the group begin with; 0 where that is too little.
  [[nodiscard]] std::span<const std::int32_t> pages() const noexcept { return pages_; }

 private:
  /// Those before the one that the last token lies in.
  [[nodiscard]] static std::int64_t whole_blocks(const Sequence& sequence, int block_tokens) {
    return std::max<std::int64_t>(sequence.length() - 1, 0) / block_tokens;
  }

  std::vector<std::size_t> order_;
  std::vector<std::int32_t> indptr_;
  std::vector<std::int32_t> pages_;
};

}  // namespace prefillshare
