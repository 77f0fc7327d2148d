// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/block_heap.hpp - block numbers by a key, the smallest first, each found at once.
// Layer: kv (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/kv/block_pool.hpp>

namespace prefillshare::detail {

/// A binary heap that knows where each block lies in it, so that any block can leave: O(log n) for push and
/// erase, O(1) for top and contains. Keys need operator<. Allocates in resize() alone, which may throw.
template <class Key>
class BlockHeap {
 public:
  void resize(std::size_t blocks) {
    place_.assign(blocks, kNowhere);
    heap_.clear();
    heap_.reserve(blocks);
  }

  void push(BlockId block, const Key& key) {
    CODEGEMM_ASSERT(!contains(block));
    heap_.push_back({key, block});  // within what resize() has reserved
    up(heap_.size() - 1);
  }

  void erase(BlockId block) {
    CODEGEMM_ASSERT(contains(block));
    const auto at = static_cast<std::size_t>(place_[static_cast<std::size_t>(block)]);
    place_[static_cast<std::size_t>(block)] = kNowhere;
    const Entry last = heap_.back();
    heap_.pop_back();
    if (last.block == block) return;
    heap_[at] = last;
    up(down(at));
  }

  [[nodiscard]] BlockId top() const { return heap_.empty() ? kNoBlock : heap_.front().block; }
  [[nodiscard]] const Key& top_key() const { return heap_.front().key; }
  [[nodiscard]] bool contains(BlockId block) const {
    return place_[static_cast<std::size_t>(block)] != kNowhere;
  }
  [[nodiscard]] std::int64_t size() const noexcept { return static_cast<std::int64_t>(heap_.size()); }

 private:
  static constexpr std::int32_t kNowhere = -1;
  struct Entry {
    Key key;
    BlockId block;
  };

  void put(std::size_t at, const Entry& entry) {
    heap_[at] = entry;
    place_[static_cast<std::size_t>(entry.block)] = static_cast<std::int32_t>(at);
  }
  std::size_t up(std::size_t at) {
    const Entry entry = heap_[at];
    while (at > 0) {
      const std::size_t parent = (at - 1) / 2;
      if (!(entry.key < heap_[parent].key)) break;
      put(at, heap_[parent]);
      at = parent;
    }
    put(at, entry);
    return at;
  }
  std::size_t down(std::size_t at) {
    const Entry entry = heap_[at];
    for (;;) {
      std::size_t child = 2 * at + 1;
      if (child >= heap_.size()) break;
      if (child + 1 < heap_.size() && heap_[child + 1].key < heap_[child].key) ++child;
      if (!(heap_[child].key < entry.key)) break;
      put(at, heap_[child]);
      at = child;
    }
    put(at, entry);
    return at;
  }

  std::vector<Entry> heap_;
  std::vector<std::int32_t> place_;  // [blocks] where in heap_, or kNowhere
};

}  // namespace prefillshare::detail
