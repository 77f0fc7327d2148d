// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/block_cache.hpp - the state of every block: free, cached, in use or waiting for a copy.
// Layer: kv (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/kv/copy_engine.hpp>
#include <prefillshare/kv/events.hpp>
#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/kv/prefix_tree.hpp>
#include <prefillshare/kv/tenant.hpp>
#include <prefillshare/kv/tier_cache.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// What an allocator may have besides its blocks. Both outlive it.
struct KvOptions {
  EventLog* events = nullptr;    ///< told of every block that enters or leaves the cache
  CopyEngine* copies = nullptr;  ///< with tiers below the device, to which blocks go when they are evicted
};

/// Pool, prefix tree, eviction policy, tenants and tiers moved together, so that each block is in exactly one
/// state:
///   free    held by nobody
///   cached  held by the tree alone; the eviction policy keeps it
///   in use  held by one or more sequences, and by the tree too if it is there
///   moving  held by a copy that is under way and by no sequence: evicted, but not free before its copy is
///           done (still in the tree, where it can be found and is then in use again), or the target of a
///           load that nobody waits for any more
/// The lower half of BasicKvAllocator, which knows the sequences. Externally synchronized.
template <BlockHash Hash, EvictionPolicy Eviction>
class BlockCache {
 public:
  /// Where a load from a lower tier stands.
  enum class Arrival : std::uint8_t { kNone, kUnderWay, kArrived, kFailed };

  /// kInvalidArgument, kOutOfMemory.
  [[nodiscard]] static codegemm::Result<BlockCache> create(std::int64_t blocks, int block_tokens, Hash hash,
                                                           Eviction eviction, const KvOptions& options) {
    auto pool = BlockPool::create(blocks);
    if (!pool.ok()) return pool.status();
    auto tree = PrefixTree<Hash>::create(blocks, block_tokens, std::move(hash));
    if (!tree.ok()) return tree.status();
    if (codegemm::Status status = eviction.resize(blocks); !status.ok()) return status;
    auto ledger = TenantLedger::create(blocks);
    if (!ledger.ok()) return ledger.status();
    BlockCache cache(*std::move(pool), *std::move(tree), std::move(eviction), *std::move(ledger));
    cache.events_ = options.events;
    if (options.copies == nullptr) return cache;
    auto tiers = TierCache::create(*options.copies, blocks, block_tokens, options.events);
    if (!tiers.ok()) return tiers.status();
    cache.tiers_.emplace(*std::move(tiers));
    if (!detail::try_allocate([&] { cache.copies_.resize(static_cast<std::size_t>(blocks)); })) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "BlockCache: no memory for ", blocks,
                             " blocks");
    }
    return cache;
  }

  [[nodiscard]] const BlockPool& pool() const noexcept { return pool_; }         ///< all blocks
  [[nodiscard]] const PrefixTree<Hash>& tree() const noexcept { return tree_; }  ///< which prefixes are there
  [[nodiscard]] const Eviction& eviction() const noexcept { return eviction_; }  ///< which block goes next
  [[nodiscard]] Eviction& eviction() noexcept { return eviction_; }              ///< to give hints to
  [[nodiscard]] const TenantLedger& ledger() const noexcept { return ledger_; }  ///< who holds what
  [[nodiscard]] TenantLedger& ledger() noexcept { return ledger_; }              ///< to count holds
  /// Null without tiers.
  [[nodiscard]] const TierCache* tiers() const noexcept { return tiers_ ? &*tiers_ : nullptr; }
  /// Held by two sequences or more.
  [[nodiscard]] std::int64_t shared_blocks() const noexcept { return shared_; }
  [[nodiscard]] std::int64_t evicted_blocks() const noexcept { return evicted_; }  ///< since the beginning
  /// Used by no sequence, with a copy under way.
  [[nodiscard]] std::int64_t moving_blocks() const noexcept { return leaving_ + orphans_; }
  /// Of these, those that are still in the tree.
  [[nodiscard]] std::int64_t leaving_blocks() const noexcept { return leaving_; }
  /// Blocks that are free, or can be when all copies are done.
  [[nodiscard]] std::int64_t available() const noexcept {
    return pool_.free_blocks() + eviction_.evictable() + leaving_;
  }

  /// Sequences that hold the block.
  [[nodiscard]] int users(BlockId block) const {
    return pool_.ref_count(block) - (tree_.contains(block) ? 1 : 0) - (copy_holds(block) ? 1 : 0);
  }
  /// Whether somebody besides one sequence holds the block: another sequence, or the tree.
  [[nodiscard]] bool shared(BlockId block) const { return pool_.ref_count(block) > 1; }
  /// Whether a copy holds a reference of its own.
  [[nodiscard]] bool copy_holds(BlockId block) const {
    return tiers_ && (copy(block).out || copy(block).orphan);
  }
  [[nodiscard]] bool leaving(BlockId block) const { return tiers_ && copy(block).leaving; }  ///< see above
  [[nodiscard]] bool orphan(BlockId block) const { return tiers_ && copy(block).orphan; }    ///< see above

  /// One more sequence uses a block that is cached, leaving or in use.
  void hold(BlockId block, TenantId tenant) {
    const int before = users(block);
    if (before == 0) {
      if (leaving(block)) {
        copy(block).leaving = false;
        --leaving_;
      } else {
        eviction_.erase(block);
      }
    }
    if (before == 1) ++shared_;
    pool_.retain(block);
    ledger_.hold(tenant, block);
  }

  /// One sequence less; the block is then in use still, cached, or free.
  void drop(BlockId block, TenantId tenant) {
    const int before = users(block);
    CODEGEMM_ASSERT(before > 0);
    if (before == 2) --shared_;
    ledger_.drop(tenant, block);
    if (before == 1 && tree_.contains(block)) eviction_.insert(block, parent_block(block));
    pool_.release(block);
  }

  /// Evicts until `blocks` are free; false if that waits for copies, which are then under way. The caller has
  /// seen that so many are available().
  [[nodiscard]] bool make_room(std::int64_t blocks) {
    CODEGEMM_ASSERT(blocks <= available());
    while (pool_.free_blocks() + leaving_ < blocks) evict(eviction_.victim());
    return pool_.free_blocks() >= blocks;
  }

  /// A free block, now in use by one sequence. After make_room().
  [[nodiscard]] BlockId take(TenantId tenant) {
    const BlockId block = *pool_.allocate();
    ledger_.hold(tenant, block);
    return block;
  }

  /// Puts a block that one sequence has filled into the tree and returns it; or, if the tree has its equal,
  /// frees it and returns the equal, which the sequence uses from now on.
  [[nodiscard]] BlockId publish(TreeNode parent, std::span<const std::int32_t> tokens, BlockId block,
                                TenantId tenant) {
    return enter(parent, tokens, block, tenant, 0);
  }

  /// The root of a producer, held once more; see PrefixTree.
  [[nodiscard]] codegemm::Result<TreeNode> acquire_root(const CacheKey& key) {
    return tree_.acquire_root(key);
  }
  void release_root(TreeNode root) { tree_.release_root(root); }  ///< gives it back

  // --- Tiers. Only where tiers() is not null. ---

  /// Begins to copy a block of the tree down, unless it has a copy or one is under way. False if refused.
  bool copy_out(BlockId block) {
    if (copy(block).out || tiers_->has_copy(block)) return true;
    const TreeNode parent = tree_.parent(block);
    const codegemm::Status status =
        tiers_->start_out(block, tree_.hash(block), tree_.hash_of(parent), tree_.serial_of(parent),
                          tree_.serial_of(TreeNode::of_block(block)), parent.is_root() ? parent : TreeNode(),
                          tree_.tokens(block));
    if (status.ok()) {
      if (parent.is_root()) tree_.retain_root(parent);
      copy(block).out = true;
      pool_.retain(block);
    }
    release_roots();  // of what made room for it
    refused_ += status.ok() ? 0 : 1;
    return status.ok();
  }

  /// Begins to copy an entry into a block that its sequence holds. The tiers' failure.
  [[nodiscard]] codegemm::Status copy_in(std::int32_t entry, BlockId block) {
    codegemm::Status status = tiers_->start_in(entry, block);
    if (!status.ok()) return status;
    copy(block).arrival = Arrival::kUnderWay;
    copy(block).serial = tiers_->serial(entry);
    return status;
  }
  /// An entry of the tiers was used now.
  void touch(std::int32_t entry) { tiers_->touch(entry); }
  /// Of the load into that block.
  [[nodiscard]] Arrival arrival(BlockId block) const { return tiers_ ? copy(block).arrival : Arrival::kNone; }

  /// publish() for a block that has arrived.
  [[nodiscard]] BlockId arrive(TreeNode parent, std::span<const std::int32_t> tokens, BlockId block,
                               TenantId tenant) {
    CODEGEMM_ASSERT(arrival(block) == Arrival::kArrived);
    const std::uint64_t serial = copy(block).serial;
    copy(block) = Copy{};
    return enter(parent, tokens, block, tenant, serial);
  }
  /// Its sequence does not want the block any more, arrived or not.
  void abandon(BlockId block, TenantId tenant) {
    if (arrival(block) != Arrival::kUnderWay) {
      copy(block) = Copy{};
      drop(block, tenant);
      return;
    }
    ledger_.drop(tenant, block);  // the copy has the pool's hold now
    copy(block).orphan = true;
    ++orphans_;
  }

  /// Takes note of the copies that have ended.
  void poll() {
    for (;;) {
      const TierCache::Finished done = tiers_->finish_one();
      if (done.kind == TierCache::CopyKind::kNone) break;
      if (done.kind == TierCache::CopyKind::kOut) {
        copy(done.block).out = false;
        pool_.release(done.block);
        if (leaving(done.block) && tree_.children(done.block) == 0) discard_leaving(done.block);
      } else if (done.kind == TierCache::CopyKind::kIn && orphan(done.block)) {
        copy(done.block) = Copy{};
        --orphans_;
        pool_.release(done.block);
      } else if (done.kind == TierCache::CopyKind::kIn) {
        copy(done.block).arrival = done.ok ? Arrival::kArrived : Arrival::kFailed;
      }
    }
    tiers_->balance();
    release_roots();
  }
  [[nodiscard]] std::int64_t refused_copies() const noexcept { return refused_; }  ///< evicted with no copy

 private:
  struct Copy {
    bool out = false;      // being copied down, which holds the block
    bool leaving = false;  // evicted; free when its copy is done and nothing lies below it
    bool orphan = false;   // being loaded for nobody; the copy holds the block
    Arrival arrival = Arrival::kNone;
    std::uint64_t serial = 0;  // of what arrives
  };

  BlockCache(BlockPool pool, PrefixTree<Hash> tree, Eviction eviction, TenantLedger ledger)
      : pool_(std::move(pool)),
        tree_(std::move(tree)),
        eviction_(std::move(eviction)),
        ledger_(std::move(ledger)) {}

  [[nodiscard]] Copy& copy(BlockId block) { return copies_[static_cast<std::size_t>(block)]; }
  [[nodiscard]] const Copy& copy(BlockId block) const { return copies_[static_cast<std::size_t>(block)]; }
  [[nodiscard]] BlockId parent_block(BlockId block) const {
    const TreeNode parent = tree_.parent(block);
    return parent.is_block() ? parent.block() : kNoBlock;
  }

  BlockId enter(TreeNode parent, std::span<const std::int32_t> tokens, BlockId block, TenantId tenant,
                std::uint64_t serial) {
    const auto query = tree_.query(parent, tokens);
    const BlockId equal = tree_.find(query);
    if (equal != kNoBlock) {
      hold(equal, tenant);
      drop(block, tenant);
      return equal;
    }
    const std::int32_t entry =
        tiers_ ? tiers_->find(query.hash, tree_.serial_of(parent), tokens) : TierCache::kNoEntry;
    if (entry != TierCache::kNoEntry) serial = tiers_->serial(entry);  // what lies below stays reachable
    tree_.insert(query, block, serial);
    if (entry != TierCache::kNoEntry) tiers_->link(entry, block);
    pool_.retain(block);
    tell(KvEvent::Kind::kStored, block);
    return block;
  }

  void evict(BlockId victim) {
    CODEGEMM_ASSERT(users(victim) == 0);
    eviction_.erase(victim);
    if (tiers_) {
      const bool waits = copy_out(victim) && copy(victim).out;
      if (waits || tree_.children(victim) > 0) {
        copy(victim).leaving = true;
        ++leaving_;
        return;
      }
    }
    discard(victim);
  }
  /// A leaf that nobody uses leaves the tree and is free.
  void discard(BlockId block) {
    tell(KvEvent::Kind::kRemoved, block);
    if (tiers_) tiers_->unlink(block);
    if constexpr (HintedEviction<Eviction>) eviction_.forget(block);
    ledger_.evicted(block);
    tree_.erase(block);
    pool_.release(block);
    ++evicted_;
  }
  /// The same for a block that was leaving, and for those above that only waited for it.
  void discard_leaving(BlockId block) {
    for (;;) {
      const BlockId parent = parent_block(block);
      copy(block).leaving = false;
      --leaving_;
      discard(block);
      if (parent == kNoBlock || !copy(parent).leaving || copy(parent).out || tree_.children(parent) > 0)
        return;
      block = parent;
    }
  }
  void release_roots() {
    for (const TreeNode root : tiers_->released_roots()) tree_.release_root(root);
    tiers_->released_roots().clear();
  }
  void tell(KvEvent::Kind kind, BlockId block) {
    if (events_ != nullptr) events_->push(kind, 0, tree_.hash_of(tree_.parent(block)), tree_.hash(block));
  }

  BlockPool pool_;
  PrefixTree<Hash> tree_;
  Eviction eviction_;
  TenantLedger ledger_;
  std::optional<TierCache> tiers_;
  EventLog* events_ = nullptr;
  std::vector<Copy> copies_;  // [blocks], with tiers only
  std::int64_t shared_ = 0;   // used by two sequences or more
  std::int64_t evicted_ = 0;  // since the beginning
  std::int64_t leaving_ = 0;
  std::int64_t orphans_ = 0;
  std::int64_t refused_ = 0;  // copies down that could not begin: the block was dropped
};

}  // namespace prefillshare
