// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/prefix_tree.hpp - which full block holds the KV of which prefix, of which producer.
// Layer: kv (host only).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// A place in the tree: a block, or the root of a producer.
class TreeNode {
 public:
  TreeNode() = default;  // nowhere
  /// The node of that block.
  [[nodiscard]] static constexpr TreeNode of_block(BlockId block) noexcept { return TreeNode(block); }
  /// The node of root number `root`.
  [[nodiscard]] static constexpr TreeNode of_root(std::int32_t root) noexcept { return TreeNode(-2 - root); }

  /// A block, not a root and not nowhere.
  [[nodiscard]] constexpr bool is_block() const noexcept { return code_ >= 0; }
  [[nodiscard]] constexpr bool is_root() const noexcept { return code_ <= -2; }  ///< a root
  [[nodiscard]] constexpr BlockId block() const noexcept { return code_; }       ///< only where is_block()
  [[nodiscard]] constexpr std::int32_t root() const noexcept { return -2 - code_; }  ///< only where is_root()

  /// The same place.
  friend constexpr bool operator==(TreeNode, TreeNode) = default;

 private:
  explicit constexpr TreeNode(std::int32_t code) noexcept : code_(code) {}
  std::int32_t code_ = -1;  // a block as it is; root r as -2 - r
};

/// Maps (parent, tokens of one full block) to a block. The parent is the node of the tokens before it or
/// the root of a CacheKey, so a path names a producer and a whole prefix. A node is its block: it lies in
/// the block's entry, and no block is in two places. A hit has equal parent and equal tokens, compared one
/// by one; the hash only says where to look. Roots are found by comparing all strings of the key.
/// Holds no reference to a block: the owner (KvAllocator) retains what it inserts. All memory is taken by
/// create() but that of a root, when its key is first seen. Externally synchronized.
template <BlockHash Hash = ChainHash>
class PrefixTree {
 public:
  /// A question to the tree, with its hash. Refers to the caller's tokens.
  struct Query {
    TreeNode parent;                       ///< the node of what comes before
    std::uint64_t hash = 0;                ///< of the prefix up to the last of `tokens`
    std::span<const std::int32_t> tokens;  ///< [block_tokens]
  };

  /// Nodes keep their numbers.
  PrefixTree(PrefixTree&&) noexcept = default;
  /// Nodes keep their numbers.
  PrefixTree& operator=(PrefixTree&&) noexcept = default;

  /// kInvalidArgument, kOutOfMemory.
  [[nodiscard]] static codegemm::Result<PrefixTree> create(std::int64_t blocks, int block_tokens,
                                                           Hash hash = {}) {
    if (blocks < 0 || blocks >= std::numeric_limits<BlockId>::max() || block_tokens < 1) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "PrefixTree: ", blocks, " blocks of ",
                             block_tokens, " tokens");
    }
    std::optional<PrefixTree> tree;
    const auto count = static_cast<std::size_t>(blocks);
    const bool allocated = detail::try_allocate([&] {
      tree.emplace(PrefixTree(std::move(hash), block_tokens));
      tree->nodes_.resize(count);
      tree->tokens_.resize(count * static_cast<std::size_t>(block_tokens));
      tree->buckets_.assign(std::bit_ceil(std::max<std::size_t>(count, 1)), kNoBlock);
    });
    if (!allocated) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "PrefixTree: no memory for ", blocks,
                             " blocks of ", block_tokens, " tokens");
    }
    return *std::move(tree);
  }

  /// The root of a producer, held once more; give it back with release_root(). A root lives as long as it
  /// is held or has children. kOutOfMemory.
  [[nodiscard]] codegemm::Result<TreeNode> acquire_root(const CacheKey& key) {
    auto found = root_of_key_.find(key);
    if (found == root_of_key_.end()) {
      const bool allocated = detail::try_allocate([&] {
        if (idle_roots_.empty()) {
          if (roots_.size() == roots_.capacity()) {
            const std::size_t grown = std::max<std::size_t>(8, 2 * roots_.size());
            idle_roots_.reserve(grown);  // room for all, so that retiring a root never allocates
            roots_.reserve(grown);
          }
          roots_.emplace_back();
          idle_roots_.push_back(static_cast<std::int32_t>(roots_.size() - 1));
        }
        found = root_of_key_.emplace(key, idle_roots_.back()).first;
      });
      if (!allocated) {
        return codegemm::error(codegemm::StatusCode::kOutOfMemory, "PrefixTree: no memory for producer ",
                               key.model_id);
      }
      idle_roots_.pop_back();
      roots_[static_cast<std::size_t>(found->second)] = Root{hash_(key), 0, next_serial_++, &found->first};
    }
    ++roots_[static_cast<std::size_t>(found->second)].holders;
    return TreeNode::of_root(found->second);
  }

  /// Holds a root once more.
  void retain_root(TreeNode root) { ++root_at(root).holders; }

  /// Holds it once less; it goes with its last child if nobody holds it.
  void release_root(TreeNode root) {
    Root& entry = root_at(root);
    CODEGEMM_ASSERT(entry.holders > 0);
    if (--entry.holders > 0) return;
    root_of_key_.erase(root_of_key_.find(*entry.key));
    entry = Root{};
    idle_roots_.push_back(root.root());
  }

  /// The root of a producer that is held or has blocks; else nowhere. Holds nothing.
  [[nodiscard]] TreeNode find_root(const CacheKey& key) const {
    const auto found = root_of_key_.find(key);
    return found == root_of_key_.end() ? TreeNode() : TreeNode::of_root(found->second);
  }

  /// Asks for `tokens`, one full block, after `parent`. `tokens` must outlive the query.
  [[nodiscard]] Query query(TreeNode parent, std::span<const std::int32_t> tokens) const {
    CODEGEMM_ASSERT(std::ssize(tokens) == block_tokens_);
    return {parent, hash_(hash_of(parent), tokens), tokens};
  }

  /// The block of these tokens after this parent; kNoBlock if there is none.
  [[nodiscard]] BlockId find(const Query& query) const {
    for (BlockId block = buckets_[bucket_of(query.hash)]; block != kNoBlock; block = at(block).next) {
      const Node& node = at(block);
      if (node.hash == query.hash && node.parent == query.parent &&
          std::equal(query.tokens.begin(), query.tokens.end(), tokens(block).begin())) {
        return block;
      }
    }
    return kNoBlock;
  }

  /// Follows `tokens` down from `parent` by full blocks, as far as the tree has them: visit(block) for each,
  /// until it returns false. Returns the blocks visited with true. Hashes run some blocks ahead of the
  /// comparison, so that the memory of the next blocks is on its way while this one is compared.
  template <class Visit>
  std::int64_t walk(TreeNode parent, std::span<const std::int32_t> tokens, Visit&& visit) const {
    constexpr std::size_t kAhead = 16;  // blocks hashed in advance; a power of two
    constexpr std::size_t kNear = 8;    // of these, blocks whose bucket has come by now
    const auto size = static_cast<std::size_t>(block_tokens_);
    const std::size_t count = tokens.size() / size;
    std::uint64_t hashes[kAhead] = {};
    std::uint64_t last = hash_of(parent);
    std::size_t hashed = 0;
    for (std::size_t i = 0; i < count; ++i) {
      for (; hashed < count && hashed < i + kAhead; ++hashed) {
        last = hash_(last, tokens.subspan(hashed * size, size));
        hashes[hashed % kAhead] = last;
        fetch(&buckets_[bucket_of(last)]);
      }
      if (i + kNear < hashed) {
        const BlockId next = buckets_[bucket_of(hashes[(i + kNear) % kAhead])];
        if (next != kNoBlock) {
          fetch(&at(next));
          fetch(&tokens_[static_cast<std::size_t>(next) * size]);
        }
      }
      const BlockId found = find({parent, hashes[i % kAhead], tokens.subspan(i * size, size)});
      if (found == kNoBlock || !visit(found)) return static_cast<std::int64_t>(i);
      parent = TreeNode::of_block(found);
    }
    return static_cast<std::int64_t>(count);
  }

  /// Puts a block, whose KV is that of the query's tokens after its parent, into the tree, under a new serial
  /// number or the one it had before. Neither the block nor an equal of it may be there yet.
  void insert(const Query& query, BlockId block, std::uint64_t serial = 0) {
    CODEGEMM_ASSERT(!contains(block) && find(query) == kNoBlock);
    Node& node = at(block);
    BlockId& bucket = buckets_[bucket_of(query.hash)];
    node = Node{query.hash, serial != 0 ? serial : next_serial_++, query.parent, bucket, 0};
    bucket = block;
    std::copy(query.tokens.begin(), query.tokens.end(),
              tokens_.begin() + block * std::ptrdiff_t{block_tokens_});
    if (query.parent.is_block()) {
      CODEGEMM_ASSERT(contains(query.parent.block()));
      ++at(query.parent.block()).children;
    } else {
      ++root_at(query.parent).holders;
    }
    ++size_;
  }

  /// Takes a leaf out.
  void erase(BlockId block) {
    CODEGEMM_ASSERT(contains(block) && at(block).children == 0);
    const Node node = at(block);
    BlockId* link = &buckets_[bucket_of(node.hash)];
    while (*link != block) link = &at(*link).next;
    *link = node.next;
    at(block) = Node{};
    --size_;
    if (node.parent.is_block()) {
      --at(node.parent.block()).children;
    } else {
      release_root(node.parent);
    }
  }

  /// In the tree.
  [[nodiscard]] bool contains(BlockId block) const { return at(block).parent != TreeNode(); }
  /// The node before it. The block is in the tree.
  [[nodiscard]] TreeNode parent(BlockId block) const { return at(block).parent; }
  /// Blocks that come directly after it.
  [[nodiscard]] int children(BlockId block) const { return at(block).children; }
  /// The number that stands for the whole prefix up to this block's end, the same in every process.
  [[nodiscard]] std::uint64_t hash(BlockId block) const { return at(block).hash; }
  /// The number of `tokens` after the prefix of number `parent`.
  [[nodiscard]] std::uint64_t hash_after(std::uint64_t parent, std::span<const std::int32_t> tokens) const {
    return hash_(parent, tokens);
  }
  /// The number of the prefix that ends with this node.
  [[nodiscard]] std::uint64_t hash_of(TreeNode node) const {
    return node.is_block() ? at(node.block()).hash : root_at(node).hash;
  }
  /// Names this prefix, of this producer, exactly: no two prefixes ever have the same number. It outlives the
  /// block if whoever keeps a copy of it inserts it again under its number.
  [[nodiscard]] std::uint64_t serial_of(TreeNode node) const {
    return node.is_block() ? at(node.block()).serial : root_at(node).serial;
  }
  /// [block_tokens], of a block in the tree.
  [[nodiscard]] std::span<const std::int32_t> tokens(BlockId block) const {
    return std::span(tokens_).subspan(
        static_cast<std::size_t>(block) * static_cast<std::size_t>(block_tokens_),
        static_cast<std::size_t>(block_tokens_));
  }
  /// The producer of that root.
  [[nodiscard]] const CacheKey& key(TreeNode root) const { return *root_at(root).key; }
  /// Blocks in the tree.
  [[nodiscard]] std::int64_t size() const noexcept { return size_; }
  /// Producers that are held or have blocks.
  [[nodiscard]] std::int64_t roots() const noexcept { return static_cast<std::int64_t>(root_of_key_.size()); }

  /// Every node found by its own key, every parent there, every child counted. `held_roots[r]` is how often
  /// the caller holds root r (it may be shorter than the number of roots ever made). O(blocks).
  [[nodiscard]] codegemm::Status check_invariants(std::span<const std::int64_t> held_roots) const {
    std::vector<std::int64_t> root_holders(roots_.size(), 0);
    for (std::size_t r = 0; r < std::min(held_roots.size(), roots_.size()); ++r)
      root_holders[r] = held_roots[r];
    std::vector<std::int32_t> children(nodes_.size(), 0);
    std::int64_t counted = 0;
    for (BlockId block = 0; block < static_cast<BlockId>(nodes_.size()); ++block) {
      if (!contains(block)) continue;
      ++counted;
      const TreeNode parent = at(block).parent;
      if (parent.is_block()) {
        if (!contains(parent.block())) return broken("has a parent outside the tree", block);
        ++children[static_cast<std::size_t>(parent.block())];
      } else {
        if (static_cast<std::size_t>(parent.root()) >= roots_.size()) return broken("has no root", block);
        ++root_holders[static_cast<std::size_t>(parent.root())];
      }
      const Query own = query(parent, tokens(block));
      if (own.hash != at(block).hash || find(own) != block) return broken("is not found by its key", block);
    }
    if (counted != size_) return broken("count is wrong", static_cast<BlockId>(counted));
    for (BlockId block = 0; block < static_cast<BlockId>(nodes_.size()); ++block) {
      if (at(block).children != children[static_cast<std::size_t>(block)]) {
        return broken("has a wrong number of children", block);
      }
    }
    std::int64_t live = 0;
    for (std::size_t r = 0; r < roots_.size(); ++r) {
      live += roots_[r].holders > 0 ? 1 : 0;
      if (roots_[r].holders != root_holders[r])
        return broken("root is held wrongly", static_cast<BlockId>(r));
    }
    if (live != roots()) return broken("roots that live are not the roots that are named", 0);
    return {};
  }

 private:
  struct Node {
    std::uint64_t hash = 0;
    std::uint64_t serial = 0;
    TreeNode parent;          // nowhere: this block is not in the tree
    BlockId next = kNoBlock;  // in the same bucket
    std::int32_t children = 0;
  };
  struct Root {
    std::uint64_t hash = 0;
    std::int64_t holders = 0;  // sequences, child blocks and copies of these below the device
    std::uint64_t serial = 0;
    const CacheKey* key = nullptr;  // in root_of_key_, whose nodes do not move
  };
  struct KeyHash {
    Hash hash;
    [[nodiscard]] std::size_t operator()(const CacheKey& key) const {
      return static_cast<std::size_t>(hash(key));
    }
  };

  PrefixTree(Hash hash, int block_tokens)
      : hash_(hash), block_tokens_(block_tokens), root_of_key_(1, KeyHash{std::move(hash)}) {}

  [[nodiscard]] static codegemm::Status broken(const char* what, BlockId block) {
    return codegemm::error(codegemm::StatusCode::kCorruptData, "PrefixTree: ", block, " ", what);
  }

  [[nodiscard]] std::size_t bucket_of(std::uint64_t hash) const noexcept {
    return static_cast<std::size_t>(hash) & (buckets_.size() - 1);
  }
  static void fetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    static_cast<void>(address);
#endif
  }
  [[nodiscard]] Node& at(BlockId block) {
    CODEGEMM_ASSERT(block >= 0 && static_cast<std::size_t>(block) < nodes_.size());
    return nodes_[static_cast<std::size_t>(block)];
  }
  [[nodiscard]] const Node& at(BlockId block) const {
    CODEGEMM_ASSERT(block >= 0 && static_cast<std::size_t>(block) < nodes_.size());
    return nodes_[static_cast<std::size_t>(block)];
  }
  [[nodiscard]] Root& root_at(TreeNode root) {
    CODEGEMM_ASSERT(root.is_root() && static_cast<std::size_t>(root.root()) < roots_.size());
    return roots_[static_cast<std::size_t>(root.root())];
  }
  [[nodiscard]] const Root& root_at(TreeNode root) const {
    CODEGEMM_ASSERT(root.is_root() && static_cast<std::size_t>(root.root()) < roots_.size());
    return roots_[static_cast<std::size_t>(root.root())];
  }

  Hash hash_;
  int block_tokens_ = 0;
  std::int64_t size_ = 0;
  std::uint64_t next_serial_ = 1;
  std::vector<Node> nodes_;           // [blocks]
  std::vector<std::int32_t> tokens_;  // [blocks][block_tokens]
  std::vector<BlockId> buckets_;      // a power of two, at least one for each block
  std::vector<Root> roots_;
  std::vector<std::int32_t> idle_roots_;
  std::unordered_map<CacheKey, std::int32_t, KeyHash> root_of_key_;
};

}  // namespace prefillshare
