// SPDX-License-Identifier: Apache-2.0
//
// Random calls on a KvAllocator against a model that keeps whole prefixes in a std::map. After each step:
// the allocator's own recount, block for block the same sharing as the model's, the same statistics, and
// every live sequence reads the numbers that were written for its tokens.
#include <prefillshare/kv/allocator.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::Status;
using codegemm::StatusCode;
using prefillshare::BasicKvAllocator;
using prefillshare::BlockId;
using prefillshare::CacheKey;
using prefillshare::ChainHash;
using prefillshare::HostKvStorage;
using prefillshare::KvStats;
using prefillshare::Sequence;
using Tokens = std::vector<std::int32_t>;

namespace {

/// A host storage whose copies fail on demand.
class FlakyStorage {
 public:
  explicit FlakyStorage(HostKvStorage host) : host_(std::move(host)) {}
  [[nodiscard]] const prefillshare::KvShape& shape() const { return host_.shape(); }
  [[nodiscard]] std::int64_t blocks() const { return host_.blocks(); }
  [[nodiscard]] std::int64_t bytes_per_block() const { return host_.bytes_per_block(); }
  Status copy_block(BlockId destination, BlockId source, int tokens) {
    if (fail) return codegemm::error(StatusCode::kIoError, "copy refused");
    return host_.copy_block(destination, source, tokens);
  }
  [[nodiscard]] HostKvStorage& host() { return host_; }
  bool fail = false;

 private:
  HostKvStorage host_;
};

struct OneBucketHash {
  std::uint64_t operator()(std::uint64_t, std::span<const std::int32_t>) const { return 3; }
  std::uint64_t operator()(const CacheKey&) const { return 3; }
};

using Prefix = std::pair<std::size_t, Tokens>;  // producer, tokens up to the end of a full block

struct ModelBlock {
  int users = 0;
  bool cached = false;         // in the model's map
  std::int64_t unused_at = 0;  // when its last user left it
};
using ModelBlockPtr = std::shared_ptr<ModelBlock>;

struct Live {
  Sequence sequence;
  bool is_fork = false;
  std::size_t key = 0;
  prefillshare::TenantId tenant = 0;
  Tokens tokens;               // base: committed
  Tokens pending;              // base: written, not yet committed
  std::vector<float> content;  // what must be read at each position
  std::vector<ModelBlockPtr> blocks;
  std::int64_t reserved = 0;
  std::int64_t base_length = 0;
  [[nodiscard]] std::int64_t length() const { return std::ssize(content); }
};

template <class Hash>
class Trial {
 public:
  using Allocator = BasicKvAllocator<FlakyStorage, Hash>;

  Trial(std::uint64_t seed, std::int64_t blocks, int block_tokens)
      : rng_(seed),
        blocks_(blocks),
        block_tokens_(block_tokens),
        storage_(*HostKvStorage::create({2, 1, 2, block_tokens}, blocks)),
        allocator_(*Allocator::create(storage_)) {
    quotas_ = {blocks, blocks / 2, blocks / 4};
    for (std::size_t t = 1; t < quotas_.size(); ++t) {
      REQUIRE(*allocator_->add_tenant("tenant", {quotas_[t]}) == static_cast<prefillshare::TenantId>(t));
    }
  }

  void run(std::int64_t steps) {
    for (step_ = 0; step_ < steps; ++step_) {
      CAPTURE(step_);
      storage_.fail = rng_.below(4) == 0;
      switch (rng_.below(25)) {
        case 0:
        case 1:
        case 2: open(); break;
        case 3:
        case 4:
        case 5: close(); break;
        case 6: reserve(); break;
        case 7: write(); break;
        case 8:
        case 9: commit(); break;
        case 10:
        case 11:
        case 12: prefill(); break;
        case 13:
        case 20:
        case 21: fork(); break;
        case 14:
        case 15: append(); break;
        case 16: truncate(); break;
        case 17: extend(); break;
        case 18: release_reserved(); break;
        case 19: misuse(); break;
        case 22: fork_all(); break;
        case 23: set_quota(); break;
        case 24: lookup(); break;
      }
      check();
    }
    while (!live_.empty()) {
      close();
      check();
    }
    REQUIRE(allocator_->stats().in_use_blocks == 0);
    // Each kind of event has really happened.
    CHECK(hits_ > 50);
    CHECK(evicted_ > 50);
    CHECK(merged_ > 20);
    CHECK(exhausted_ > 20);
    CHECK(over_quota_ > 20);
    CHECK(admitted_ > 20);
    CHECK(turned_away_ > 5);
    if (block_tokens_ > 1) {  // a block of one token is never partly filled
      CHECK(copied_ > 20);
      CHECK(failed_copies_ > 0);
    }
  }

 private:
  // --- the model's blocks ---

  [[nodiscard]] std::int64_t model_blocks_alive() const {
    std::set<const ModelBlock*> alive;
    for (const auto& entry : cached_) alive.insert(entry.second.get());
    for (const Live& live : live_) {
      for (const ModelBlockPtr& block : live.blocks) alive.insert(block.get());
    }
    return std::ssize(alive);
  }
  [[nodiscard]] std::int64_t evictable() const {
    return std::count_if(cached_.begin(), cached_.end(),
                         [](const auto& entry) { return entry.second->users == 0; });
  }
  /// False, changing nothing, if so many cannot be had.
  bool make_room(std::int64_t count) {
    std::int64_t free = blocks_ - model_blocks_alive();
    if (count > free + evictable()) return false;
    for (; free < count; ++free) {
      auto oldest = cached_.end();
      for (auto at = cached_.begin(); at != cached_.end(); ++at) {
        if (at->second->users != 0) continue;
        if (oldest == cached_.end() || at->second->unused_at < oldest->second->unused_at) oldest = at;
      }
      bool is_leaf = true;
      for (const auto& [prefix, block] : cached_) {
        const bool longer =
            prefix.first == oldest->first.first && prefix.second.size() > oldest->first.second.size();
        is_leaf = is_leaf && !(longer && std::equal(oldest->first.second.begin(), oldest->first.second.end(),
                                                    prefix.second.begin()));
      }
      REQUIRE(is_leaf);
      cached_.erase(oldest);
      ++evicted_;
    }
    return true;
  }
  [[nodiscard]] std::map<const ModelBlock*, int> holds(prefillshare::TenantId tenant) const {
    std::map<const ModelBlock*, int> counts;
    for (const Live& live : live_) {
      if (live.tenant != tenant) continue;
      for (const ModelBlockPtr& block : live.blocks) ++counts[block.get()];
    }
    return counts;
  }
  [[nodiscard]] std::int64_t quota_room(prefillshare::TenantId tenant) const {
    return quotas_[static_cast<std::size_t>(tenant)] - std::ssize(holds(tenant));
  }
  ModelBlockPtr fresh() { return std::make_shared<ModelBlock>(ModelBlock{1, false, 0}); }
  void drop(const ModelBlockPtr& block) {
    if (--block->users == 0) block->unused_at = ++clock_;
  }
  static ModelBlockPtr hold(const ModelBlockPtr& block) {
    ++block->users;
    return block;
  }
  [[nodiscard]] std::int64_t blocks_for(std::int64_t tokens) const {
    return (tokens + block_tokens_ - 1) / block_tokens_;
  }
  void shrink(Live& live, std::int64_t length) {
    while (std::ssize(live.blocks) > blocks_for(length)) {
      drop(live.blocks.back());
      live.blocks.pop_back();
    }
    live.content.resize(static_cast<std::size_t>(length));
    live.reserved = 0;
    live.pending.clear();
  }

  // --- contents ---

  /// What the base writes for the last of these tokens: a function of the producer and the whole prefix.
  [[nodiscard]] static float base_value(std::size_t key, std::span<const std::int32_t> tokens) {
    std::uint64_t h = 0x9E3779B97F4A7C15ULL * (key + 1);
    for (const std::int32_t token : tokens)
      h = (h ^ static_cast<std::uint32_t>(token + 1)) * 0xD6E8FEB86659FD93ULL;
    return static_cast<float>((h >> 40) & 0xFFFFFU);  // exact in fp32
  }
  void write_value(const Sequence& sequence, std::int64_t position, float value) {
    if (!allocator_->writable(sequence, position)) FAIL("position " << position << " may not be written");
    const BlockId block = sequence.blocks()[static_cast<std::size_t>(position / block_tokens_)];
    const int slot = static_cast<int>(position % block_tokens_);
    for (int layer = 0; layer < 2; ++layer) {
      for (int i = 0; i < 2; ++i) {
        storage_.host().k(layer, block, slot)[i] = value + 0.25F * static_cast<float>(layer);
        storage_.host().v(layer, block, slot)[i] = -value - 0.25F * static_cast<float>(i);
      }
    }
  }
  [[nodiscard]] bool holds_value(const Sequence& sequence, std::int64_t position, float value) {
    const BlockId block = sequence.blocks()[static_cast<std::size_t>(position / block_tokens_)];
    const int slot = static_cast<int>(position % block_tokens_);
    for (int layer = 0; layer < 2; ++layer) {
      for (int i = 0; i < 2; ++i) {
        if (storage_.host().k(layer, block, slot)[i] != value + 0.25F * static_cast<float>(layer))
          return false;
        if (storage_.host().v(layer, block, slot)[i] != -value - 0.25F * static_cast<float>(i)) return false;
      }
    }
    return true;
  }

  // --- the calls ---

  Live* pick() {
    return live_.empty() ? nullptr : &live_[static_cast<std::size_t>(rng_.below(std::ssize(live_)))];
  }
  Live* pick(bool is_fork) {
    for (int attempt = 0; attempt < 8; ++attempt) {
      Live* live = pick();
      if (live != nullptr && live->is_fork == is_fork) return live;
    }
    return nullptr;
  }
  /// Few words, and often the start of what some context already has, so that prefixes meet.
  Tokens some_tokens(std::int64_t count) {
    Tokens tokens(static_cast<std::size_t>(count));
    for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(rng_.below(10) == 0 ? 1 : 0);
    return tokens;
  }

  [[nodiscard]] bool is_listed(const Live& live) const {
    return std::any_of(live_.begin(), live_.end(), [&](const Live& other) { return &other == &live; });
  }

  /// The model of open() and extend(): how many of `tokens` are found, taking them.
  std::int64_t take_cached(Live& live, const Tokens& tokens) {
    Tokens all = live.tokens;
    all.insert(all.end(), tokens.begin(), tokens.end());
    const std::int64_t before = live.length();
    for (std::int64_t index = before / block_tokens_; (index + 1) * block_tokens_ <= std::ssize(all);
         ++index) {
      const Tokens prefix(all.begin(), all.begin() + (index + 1) * block_tokens_);
      const auto found = cached_.find({live.key, prefix});
      if (found == cached_.end()) break;
      auto held = holds(live.tenant);  // a sequence that is being opened is not yet among the live ones
      if (!is_listed(live)) {
        for (const ModelBlockPtr& block : live.blocks) ++held[block.get()];
      }
      if (std::ssize(held) >= quotas_[static_cast<std::size_t>(live.tenant)] &&
          !held.contains(found->second.get())) {
        break;
      }
      hold(found->second);
      if (index < std::ssize(live.blocks)) {
        drop(live.blocks.back());
        live.blocks.back() = found->second;
      } else {
        live.blocks.push_back(found->second);
      }
      while (live.length() < std::ssize(prefix)) {
        live.tokens.push_back(prefix[live.content.size()]);
        live.content.push_back(base_value(live.key, live.tokens));
      }
    }
    const std::int64_t found = live.length() - before;
    hits_ += found;
    misses_ += std::ssize(tokens) - found;
    return found;
  }

  void open() {
    if (live_.size() >= 12) return close();
    Live live;
    live.key = static_cast<std::size_t>(rng_.below(3));
    const Tokens tokens = some_tokens(rng_.below(4 * block_tokens_ + 2));
    live.tenant = static_cast<prefillshare::TenantId>(rng_.below(3));
    auto opened = allocator_->open(keys_[live.key], tokens, live.tenant);
    REQUIRE(opened.ok());
    live.sequence = *std::move(opened);
    take_cached(live, tokens);
    live_.push_back(std::move(live));
  }

  void extend() {
    Live* live = pick(false);
    if (live == nullptr) return;
    const Tokens tokens = some_tokens(rng_.below(3 * block_tokens_));
    auto found = allocator_->extend(live->sequence, tokens);
    if (live->reserved > 0) {
      REQUIRE(found.status().code() == StatusCode::kInvalidArgument);
      return;
    }
    REQUIRE(found.ok());
    REQUIRE(*found == take_cached(*live, tokens));
  }

  /// The model of reserve(); the code that the real one must return.
  StatusCode model_reserve(Live& live, std::int64_t extra) {
    if (extra <= live.reserved) return StatusCode::kOk;
    const std::int64_t needed = blocks_for(live.length() + extra);
    const bool partial = live.length() % block_tokens_ != 0;
    const bool copies =
        live.reserved == 0 && partial && (live.blocks.back()->users > 1 || live.blocks.back()->cached);
    const std::int64_t fresh_blocks = needed - std::ssize(live.blocks) + (copies ? 1 : 0);
    if (fresh_blocks > blocks_ - model_blocks_alive() + evictable()) {
      ++exhausted_;
      return StatusCode::kExhausted;
    }
    if (fresh_blocks > 0 && fresh_blocks > quota_room(live.tenant)) {
      ++over_quota_;
      return StatusCode::kExhausted;
    }
    REQUIRE(make_room(fresh_blocks));
    if (copies) {
      if (storage_.fail) {
        ++failed_copies_;
        return StatusCode::kIoError;
      }
      ++copied_;
      drop(live.blocks.back());
      live.blocks.back() = fresh();
    }
    while (std::ssize(live.blocks) < needed) live.blocks.push_back(fresh());
    live.reserved = extra;
    return StatusCode::kOk;
  }

  void reserve() {
    Live* live = pick();
    if (live == nullptr) return;
    const std::int64_t extra =
        rng_.below(8) == 0 ? rng_.below(2 * blocks_ * block_tokens_) : rng_.below(2 * block_tokens_);
    const StatusCode expected = model_reserve(*live, extra);
    REQUIRE(allocator_->reserve(live->sequence, extra).code() == expected);
  }

  void release_reserved() {
    Live* live = pick();
    if (live == nullptr) return;
    REQUIRE(allocator_->release_reserved(live->sequence).ok());
    shrink(*live, live->length());
  }

  void write() {
    Live* live = pick(false);
    if (live != nullptr) write(*live, rng_.below(live->reserved + 1));
  }
  /// Until so many tokens are written and not committed.
  void write(Live& live, std::int64_t count) {
    while (std::ssize(live.pending) < count) {
      live.pending.push_back(some_tokens(1)[0]);
      Tokens all = live.tokens;
      all.insert(all.end(), live.pending.begin(), live.pending.end());
      write_value(live.sequence, std::ssize(all) - 1, base_value(live.key, all));
    }
  }

  /// What an engine mostly does: reserve, write and commit a chunk in one go.
  void prefill() {
    Live* live = pick(false);
    if (live == nullptr) return;
    const std::int64_t extra = rng_.below(2 * block_tokens_) + 1;
    const StatusCode expected = model_reserve(*live, extra);
    REQUIRE(allocator_->reserve(live->sequence, extra).code() == expected);
    if (expected != StatusCode::kOk) return;
    write(*live, extra);
    commit(*live, extra);
  }

  void commit() {
    Live* live = pick(false);
    if (live != nullptr) commit(*live, rng_.below(std::ssize(live->pending) + 1));
  }
  void commit(Live& live, std::int64_t count) {
    const Tokens tokens(live.pending.begin(), live.pending.begin() + count);
    REQUIRE(allocator_->commit(live.sequence, tokens).ok());
    live.pending.erase(live.pending.begin(), live.pending.begin() + count);
    live.reserved -= count;
    for (const std::int32_t token : tokens) {
      live.tokens.push_back(token);
      live.content.push_back(base_value(live.key, live.tokens));
      if (live.length() % block_tokens_ != 0) continue;
      ModelBlockPtr& own = live.blocks[static_cast<std::size_t>(live.length() / block_tokens_ - 1)];
      const auto [at, is_new] = cached_.try_emplace(Prefix{live.key, live.tokens}, own);
      if (is_new) {
        own->cached = true;
      } else {
        ++merged_;
        hold(at->second);
        drop(own);
        own = at->second;
      }
    }
  }

  /// The model of fork(): the new one is the last of live_, its sequence not yet there.
  StatusCode model_fork(std::size_t from) {
    const Live& parent = live_[from];
    const bool copies = parent.reserved > 0 && parent.length() % block_tokens_ != 0;
    if (copies) {
      const bool any_left = blocks_ - model_blocks_alive() + evictable() > 0;
      if (!any_left || quota_room(parent.tenant) < 1) {
        ++(any_left ? over_quota_ : exhausted_);
        return StatusCode::kExhausted;
      }
      REQUIRE(make_room(1));
      if (storage_.fail) {
        ++failed_copies_;
        return StatusCode::kIoError;
      }
      ++copied_;
    }
    Live live;
    live.is_fork = true;
    live.tenant = parent.tenant;
    live.content = parent.content;
    live.base_length = parent.is_fork ? parent.base_length : parent.length();
    for (std::int64_t i = 0; i < blocks_for(parent.length()); ++i) {
      live.blocks.push_back(hold(parent.blocks[static_cast<std::size_t>(i)]));
    }
    if (copies) {
      drop(live.blocks.back());
      live.blocks.back() = fresh();
    }
    live_.push_back(std::move(live));
    return StatusCode::kOk;
  }

  void fork() {
    const Live* const parent = pick();
    if (parent == nullptr || live_.size() >= 12) return;
    const auto from = static_cast<std::size_t>(parent - live_.data());
    auto forked = allocator_->fork(live_[from].sequence);
    REQUIRE(forked.status().code() == model_fork(from));
    if (forked.ok()) live_.back().sequence = *std::move(forked);
  }

  /// Several together, or none.
  void fork_all() {
    const Live* const parent = pick();
    const auto count = static_cast<std::size_t>(1 + rng_.below(3));
    const std::int64_t extra = rng_.below(2 * block_tokens_);
    if (parent == nullptr || live_.size() + count > 12) return;
    const auto from = static_cast<std::size_t>(parent - live_.data());
    std::vector<Sequence> forks(count);
    const Status status = allocator_->fork_all(live_[from].sequence, forks, extra);
    const std::size_t before = live_.size();
    StatusCode expected = StatusCode::kOk;
    for (std::size_t i = 0; i < count && expected == StatusCode::kOk; ++i) {
      expected = model_fork(from);
      if (expected == StatusCode::kOk) expected = model_reserve(live_.back(), extra);
    }
    REQUIRE(status.code() == expected);
    if (expected == StatusCode::kOk) {
      for (std::size_t i = 0; i < count; ++i) live_[before + i].sequence = std::move(forks[i]);
      ++admitted_;
      return;
    }
    for (const Sequence& one : forks) REQUIRE_FALSE(one.is_open());
    for (std::size_t i = before; i < live_.size(); ++i) shrink(live_[i], 0);
    live_.resize(before);
    ++turned_away_;
  }

  /// Below what is held, too: then nothing more is given.
  void set_quota() {
    const auto tenant = static_cast<std::size_t>(1 + rng_.below(2));
    quotas_[tenant] = blocks_ / 8 + rng_.below(blocks_);
    REQUIRE(allocator_->set_quota(static_cast<prefillshare::TenantId>(tenant), {quotas_[tenant]}).ok());
  }

  void lookup() {
    const auto key = static_cast<std::size_t>(rng_.below(3));
    const Tokens tokens = some_tokens(rng_.below(4 * block_tokens_ + 2));
    std::int64_t expected = 0;
    while (expected + block_tokens_ <= std::ssize(tokens) &&
           cached_.contains({key, Tokens(tokens.begin(), tokens.begin() + expected + block_tokens_)})) {
      expected += block_tokens_;
    }
    std::int64_t found = -1;
    allocator_->lookup(keys_[key], tokens, {&found, 1});
    REQUIRE(found == expected);
  }

  void append() {
    Live* live = pick(true);
    if (live == nullptr) return;
    const std::int64_t count = rng_.below(block_tokens_ + 2);
    const StatusCode expected = model_reserve(*live, count);
    REQUIRE(allocator_->append_private(live->sequence, count).code() == expected);
    if (expected != StatusCode::kOk) return;
    live->reserved -= count;
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(++private_values_);
      write_value(live->sequence, live->length(), value);
      live->content.push_back(value);
    }
  }

  void truncate() {
    Live* live = pick();
    if (live == nullptr) return;
    const std::int64_t least = live->is_fork ? live->base_length : 0;
    const std::int64_t length = std::max(least, live->length() - rng_.below(2 * block_tokens_ + 1));
    REQUIRE(allocator_->truncate(live->sequence, length).ok());
    shrink(*live, length);
    if (!live->is_fork) live->tokens.resize(static_cast<std::size_t>(length));
  }

  void close() {
    if (live_.empty()) return;
    const std::int64_t index = rng_.below(std::ssize(live_));
    std::swap(live_[static_cast<std::size_t>(index)], live_.back());
    shrink(live_.back(), 0);
    live_.pop_back();
  }

  void misuse() {
    Live* live = pick();
    if (live == nullptr) return;
    Sequence& sequence = live->sequence;
    const auto refused = [](const Status& status) { return status.code() == StatusCode::kInvalidArgument; };
    REQUIRE(refused(allocator_->reserve(sequence, -1)));
    if (live->is_fork) {
      REQUIRE(refused(allocator_->commit(sequence, {})));
      REQUIRE(refused(allocator_->extend(sequence, {}).status()));
      REQUIRE(refused(allocator_->truncate(sequence, live->base_length - 1)));
      REQUIRE(refused(allocator_->truncate(sequence, live->length() + 1)));
      REQUIRE(refused(allocator_->append_private(sequence, -1)));
    } else {
      REQUIRE(refused(allocator_->append_private(sequence, 0)));
      REQUIRE(refused(allocator_->truncate(sequence, live->length() + 1)));
      REQUIRE(refused(allocator_->truncate(sequence, -1)));
      REQUIRE(refused(allocator_->commit(sequence, Tokens(static_cast<std::size_t>(live->reserved + 1)))));
    }
  }

  // --- the comparison ---

  void check() {
    const Status status = allocator_->check_invariants();
    INFO(status.message());
    REQUIRE(status.ok());

    std::map<BlockId, const ModelBlock*> seen;  // the same blocks shared in the same places
    std::map<const ModelBlock*, BlockId> ids;
    for (const Live& live : live_) {
      REQUIRE(live.sequence.is_fork() == live.is_fork);
      REQUIRE(live.sequence.length() == live.length());
      REQUIRE(live.sequence.reserved() == live.reserved);
      REQUIRE(live.sequence.base_length() == (live.is_fork ? live.base_length : live.length()));
      REQUIRE(live.sequence.blocks().size() == live.blocks.size());
      bool blocks_agree = true;
      for (std::size_t i = 0; i < live.blocks.size(); ++i) {
        const BlockId id = live.sequence.blocks()[i];
        const ModelBlock* block = live.blocks[i].get();
        blocks_agree = blocks_agree && seen.try_emplace(id, block).first->second == block &&
                       ids.try_emplace(block, id).first->second == id &&
                       allocator_->pool().ref_count(id) == block->users + (block->cached ? 1 : 0) &&
                       allocator_->tree().contains(id) == block->cached;
      }
      REQUIRE(blocks_agree);
      bool content_holds = true;
      for (std::int64_t p = 0; p < live.length(); ++p) {
        content_holds =
            content_holds && holds_value(live.sequence, p, live.content[static_cast<std::size_t>(p)]);
      }
      REQUIRE(content_holds);
    }
    for (prefillshare::TenantId tenant = 0; tenant < 3; ++tenant) {
      const auto counts = holds(tenant);
      const auto stats = allocator_->tenant_stats(tenant);
      REQUIRE(stats.ok());
      REQUIRE(stats->in_use_blocks == std::ssize(counts));
      REQUIRE(stats->shared_blocks == std::count_if(counts.begin(), counts.end(),
                                                    [](const auto& entry) { return entry.second > 1; }));
    }
    const KvStats stats = allocator_->stats();
    REQUIRE(stats.total_blocks == blocks_);
    REQUIRE(stats.free_blocks == blocks_ - model_blocks_alive());
    REQUIRE(stats.cached_blocks == evictable());
    REQUIRE(stats.free_blocks + stats.cached_blocks + stats.in_use_blocks == blocks_);
    REQUIRE(stats.in_use_blocks == stats.shared_blocks + stats.private_blocks);
    REQUIRE(stats.tree_blocks == std::ssize(cached_));
    REQUIRE(stats.sequences == std::ssize(live_));
    REQUIRE(stats.hit_tokens == hits_);
    REQUIRE(stats.miss_tokens == misses_);
    REQUIRE(stats.evicted_blocks == evicted_);
    REQUIRE(stats.merged_blocks == merged_);
    REQUIRE(stats.copied_blocks == copied_);
  }

  const std::vector<CacheKey> keys_ = {{"m", "1", ""}, {"m", "1", "tenant"}, {"m", "2", ""}};
  codegemm::test::Rng rng_;
  std::int64_t blocks_;
  std::int64_t block_tokens_;
  FlakyStorage storage_;
  std::unique_ptr<Allocator> allocator_;
  std::vector<Live> live_;
  std::map<Prefix, ModelBlockPtr> cached_;
  std::int64_t clock_ = 0;
  std::int64_t private_values_ = 0;
  std::int64_t hits_ = 0, misses_ = 0, evicted_ = 0, merged_ = 0, copied_ = 0, exhausted_ = 0,
               failed_copies_ = 0, over_quota_ = 0, admitted_ = 0, turned_away_ = 0;
  std::vector<std::int64_t> quotas_;  // by tenant
  std::int64_t step_ = 0;
};

/// PREFILLSHARE_KV_STEPS: how many steps each test case takes, all its trials together.
std::int64_t steps_or(std::int64_t written) {
  const char* text = std::getenv("PREFILLSHARE_KV_STEPS");
  return text != nullptr ? std::strtoll(text, nullptr, 10) : written;
}

}  // namespace

TEST_CASE("random calls on KvAllocator agree with a model") {
  struct Size {
    std::uint64_t seed;
    std::int64_t blocks;
    int block_tokens;
  };
  for (const Size size :
       {Size{1, 24, 4}, Size{2, 12, 2}, Size{3, 40, 3}, Size{4, 24, 1}, Size{5, 30, 5}, Size{6, 16, 4}}) {
    const std::uint64_t seed = codegemm::test::seed_or(size.seed);
    CAPTURE(seed, size.blocks, size.block_tokens);
    Trial<ChainHash> trial(seed, size.blocks, size.block_tokens);
    trial.run(steps_or(48000) / 6);
  }
}

TEST_CASE("random calls on KvAllocator agree with the model when every hash collides") {
  for (const std::uint64_t written : {101U, 102U}) {
    const std::uint64_t seed = codegemm::test::seed_or(written);
    CAPTURE(seed);
    Trial<OneBucketHash> trial(seed, 24, 3);
    trial.run(steps_or(12000) / 2);
  }
}

TEST_CASE("the same calls give the same blocks") {
  const auto history = [](std::uint64_t seed) {
    prefillshare::NoKvStorage storage({1, 1, 8, 2}, 20);
    auto allocator = BasicKvAllocator<prefillshare::NoKvStorage>::create(storage);
    REQUIRE(allocator.ok());
    codegemm::test::Rng rng(seed);
    std::vector<Sequence> open;
    std::vector<BlockId> blocks;
    for (int step = 0; step < 500; ++step) {
      const Tokens tokens = {static_cast<std::int32_t>(rng.below(3)), static_cast<std::int32_t>(rng.below(2)),
                             0, 1};
      auto sequence = (*allocator)->open({"m", "1", ""}, tokens);
      REQUIRE(sequence.ok());
      const Tokens missing(tokens.begin() + sequence->length(), tokens.end());
      if ((*allocator)->reserve(*sequence, std::ssize(missing)).ok()) {
        REQUIRE((*allocator)->commit(*sequence, missing).ok());
        open.push_back(*std::move(sequence));
        blocks.insert(blocks.end(), open.back().blocks().begin(), open.back().blocks().end());
      }
      if (open.size() > 3) open.erase(open.begin() + rng.below(std::ssize(open)));
    }
    return blocks;
  };
  CHECK(history(7) == history(7));
}
