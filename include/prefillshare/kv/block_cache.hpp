// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/block_cache.hpp - the state of every block: free, cached or in use.
// Layer: kv (host only).
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/kv/prefix_tree.hpp>

namespace prefillshare {

/// Pool, prefix tree and eviction policy moved together, so that each block is in exactly one state:
///   free    held by nobody
///   cached  held by the tree alone; the eviction policy keeps it
///   in use  held by one or more sequences, and by the tree too if it is there
/// The lower half of BasicKvAllocator, which knows the sequences. Externally synchronized.
template <BlockHash Hash, EvictionPolicy Eviction>
class BlockCache {
 public:
  /// kInvalidArgument, kOutOfMemory.
  [[nodiscard]] static codegemm::Result<BlockCache> create(std::int64_t blocks, int block_tokens, Hash hash,
                                                           Eviction eviction) {
    auto pool = BlockPool::create(blocks);
    if (!pool.ok()) return pool.status();
    auto tree = PrefixTree<Hash>::create(blocks, block_tokens, std::move(hash));
    if (!tree.ok()) return tree.status();
    if (codegemm::Status status = eviction.resize(blocks); !status.ok()) return status;
    return BlockCache(*std::move(pool), *std::move(tree), std::move(eviction));
  }

  [[nodiscard]] const BlockPool& pool() const noexcept { return pool_; }
  [[nodiscard]] const PrefixTree<Hash>& tree() const noexcept { return tree_; }
  [[nodiscard]] const Eviction& eviction() const noexcept { return eviction_; }
  [[nodiscard]] std::int64_t shared_blocks() const noexcept { return shared_; }
  [[nodiscard]] std::int64_t evicted_blocks() const noexcept { return evicted_; }
  /// How many blocks take() can give, with make_room() before it.
  [[nodiscard]] std::int64_t available() const noexcept { return pool_.free_blocks() + eviction_.size(); }

  /// Sequences that hold the block.
  [[nodiscard]] int users(BlockId block) const {
    return pool_.ref_count(block) - (tree_.contains(block) ? 1 : 0);
  }
  /// Whether somebody besides one sequence holds the block: another sequence, or the tree.
  [[nodiscard]] bool shared(BlockId block) const { return pool_.ref_count(block) > 1; }

  /// One more sequence uses a block that is cached or in use.
  void hold(BlockId block) {
    const int before = users(block);
    if (before == 0) eviction_.erase(block);
    if (before == 1) ++shared_;
    pool_.retain(block);
  }

  /// One sequence less; the block is then in use still, cached, or free.
  void drop(BlockId block) {
    const int before = users(block);
    CODEGEMM_ASSERT(before > 0);
    if (before == 2) --shared_;
    if (before == 1 && tree_.contains(block)) eviction_.insert(block);
    pool_.release(block);
  }

  /// Evicts until `blocks` are free. The caller has seen that so many are available().
  void make_room(std::int64_t blocks) {
    CODEGEMM_ASSERT(blocks <= available());
    while (pool_.free_blocks() < blocks) {
      const BlockId victim = eviction_.victim();
      CODEGEMM_ASSERT(pool_.ref_count(victim) == 1);
      eviction_.erase(victim);
      tree_.erase(victim);
      pool_.release(victim);
      ++evicted_;
    }
  }

  /// A free block, now in use by one sequence. After make_room().
  [[nodiscard]] BlockId take() { return *pool_.allocate(); }

  /// Puts a block that one sequence has filled into the tree and returns it; or, if the tree has its equal,
  /// frees it and returns the equal, which the sequence uses from now on.
  [[nodiscard]] BlockId publish(TreeNode parent, std::span<const std::int32_t> tokens, BlockId block) {
    const auto query = tree_.query(parent, tokens);
    const BlockId equal = tree_.find(query);
    if (equal == kNoBlock) {
      tree_.insert(query, block);
      pool_.retain(block);
      return block;
    }
    hold(equal);
    drop(block);
    return equal;
  }

  [[nodiscard]] codegemm::Result<TreeNode> acquire_root(const CacheKey& key) {
    return tree_.acquire_root(key);
  }
  void release_root(TreeNode root) { tree_.release_root(root); }

 private:
  BlockCache(BlockPool pool, PrefixTree<Hash> tree, Eviction eviction)
      : pool_(std::move(pool)), tree_(std::move(tree)), eviction_(std::move(eviction)) {}

  BlockPool pool_;
  PrefixTree<Hash> tree_;
  Eviction eviction_;
  std::int64_t shared_ = 0;   // used by two sequences or more
  std::int64_t evicted_ = 0;  // since the beginning
};

}  // namespace prefillshare
