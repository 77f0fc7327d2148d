// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/leaf_order.hpp - kept blocks by a key, leaves only: what eviction policies share.
// Layer: kv (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/kv/block_heap.hpp>
#include <prefillshare/kv/block_pool.hpp>

namespace prefillshare::detail {

/// The blocks that an eviction policy keeps. A block can go when no kept block lies below it and it is not
/// stuck: pinned, or above a pinned block. Of those first() has the smallest key. Every call is O(log n), but
/// that pinning walks up to the root where it changes what can go.
template <class Key>
class LeafOrder {
 public:
  /// May throw: the policies call it within try_allocate().
  void resize(std::size_t blocks) {
    nodes_.assign(blocks, Node{});
    leaves_.resize(blocks);
    size_ = 0;
    stuck_ = 0;
  }

  void insert(BlockId block, BlockId parent, const Key& key, bool pinned) {
    Node& node = at(block);
    CODEGEMM_ASSERT(!node.kept);
    node.parent = parent;
    node.key = key;
    node.kept = true;
    node.pinned = pinned;
    ++size_;
    if (parent != kNoBlock) ++at(parent).kept_children;
    if (parent != kNoBlock && leaves_.contains(parent)) leaves_.erase(parent);
    if (stuck(node)) became_stuck(block);
    settle(block);
  }

  void erase(BlockId block) {
    Node& node = at(block);
    CODEGEMM_ASSERT(node.kept);
    const bool was_stuck = stuck(node);
    if (leaves_.contains(block)) leaves_.erase(block);
    node.kept = false;
    node.pinned = false;
    --size_;
    if (was_stuck) no_longer_stuck(block);
    if (node.parent == kNoBlock) return;
    --at(node.parent).kept_children;
    settle(node.parent);
  }

  /// Of a kept block.
  void set(BlockId block, const Key& key, bool pinned) {
    Node& node = at(block);
    CODEGEMM_ASSERT(node.kept);
    const bool was_stuck = stuck(node);
    node.pinned = pinned;
    node.key = key;
    if (leaves_.contains(block)) leaves_.erase(block);
    if (stuck(node) && !was_stuck) became_stuck(block);
    if (!stuck(node) && was_stuck) no_longer_stuck(block);
    settle(block);
  }

  [[nodiscard]] BlockId first() const { return leaves_.top(); }
  [[nodiscard]] bool contains(BlockId block) const { return at(block).kept; }
  [[nodiscard]] const Key& key(BlockId block) const { return at(block).key; }
  [[nodiscard]] std::int64_t size() const noexcept { return size_; }
  [[nodiscard]] std::int64_t evictable() const noexcept { return size_ - stuck_; }

 private:
  struct Node {
    Key key{};
    BlockId parent = kNoBlock;       // of a kept block
    std::int32_t kept_children = 0;  // counted whether this block is kept or not
    std::int32_t stuck_children = 0;
    bool kept = false;
    bool pinned = false;
  };

  [[nodiscard]] static bool stuck(const Node& node) {
    return node.kept && (node.pinned || node.stuck_children > 0);
  }
  void became_stuck(BlockId block) {
    for (;;) {
      ++stuck_;
      block = at(block).parent;
      if (block == kNoBlock) return;
      Node& parent = at(block);
      const bool was = stuck(parent);
      ++parent.stuck_children;
      if (was || !parent.kept) return;
    }
  }
  void no_longer_stuck(BlockId block) {
    for (;;) {
      --stuck_;
      block = at(block).parent;
      if (block == kNoBlock) return;
      Node& parent = at(block);
      --parent.stuck_children;
      if (!parent.kept || stuck(parent)) return;
    }
  }
  /// Into the heap if it can go now and is not there.
  void settle(BlockId block) {
    const Node& node = at(block);
    if (node.kept && !node.pinned && node.kept_children == 0 && !leaves_.contains(block)) {
      leaves_.push(block, node.key);
    }
  }

  [[nodiscard]] Node& at(BlockId block) { return nodes_[static_cast<std::size_t>(block)]; }
  [[nodiscard]] const Node& at(BlockId block) const { return nodes_[static_cast<std::size_t>(block)]; }

  std::vector<Node> nodes_;
  BlockHeap<Key> leaves_;
  std::int64_t size_ = 0;
  std::int64_t stuck_ = 0;
};

}  // namespace prefillshare::detail
