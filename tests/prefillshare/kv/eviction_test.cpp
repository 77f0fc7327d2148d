// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/kv/agent_eviction.hpp>
#include <prefillshare/kv/priority_eviction.hpp>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <prefillshare/kv/allocator.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::StatusCode;
using prefillshare::AgentEviction;
using prefillshare::BasicKvAllocator;
using prefillshare::BlockId;
using prefillshare::CacheKey;
using prefillshare::ChainHash;
using prefillshare::kKvNever;
using prefillshare::kNoBlock;
using prefillshare::NoKvStorage;
using prefillshare::PriorityEviction;
using prefillshare::Retention;
using prefillshare::Sequence;
using Tokens = std::vector<std::int32_t>;

namespace {

struct Kept {
  BlockId parent = kNoBlock;
  std::int64_t stamp = 0;
};

/// What each policy is to answer, looked for among all blocks.
template <class Policy>
struct Model {
  std::map<BlockId, Kept> kept;
  std::map<BlockId, Retention> hints;
  std::int64_t now = 0;

  [[nodiscard]] Retention hint(BlockId block) const {
    const auto found = hints.find(block);
    return found == hints.end() ? Retention() : found->second;
  }
  [[nodiscard]] bool pinned(BlockId block) const {
    return std::is_same_v<Policy, AgentEviction> && hint(block).pinned && hint(block).expires > now;
  }
  [[nodiscard]] bool leaf(BlockId block) const {
    for (const auto& [other, entry] : kept) {
      if (entry.parent == block) return false;
    }
    return true;
  }
  /// Smaller goes first.
  [[nodiscard]] std::tuple<std::int64_t, std::int64_t, std::int64_t> rank(BlockId block) const {
    const Retention retention = hint(block);
    const std::int64_t stamp = kept.at(block).stamp;
    if (std::is_same_v<Policy, PriorityEviction>) {
      return {retention.expires <= now ? 0 : retention.priority, stamp, 0};
    }
    const bool known = retention.next_use != kKvNever && retention.next_use >= now;
    return {known ? 1 : 0, known ? -retention.next_use : 0, stamp};
  }
  [[nodiscard]] BlockId victim() const {
    BlockId best = kNoBlock;
    for (const auto& [block, entry] : kept) {
      if (leaf(block) && !pinned(block) && (best == kNoBlock || rank(block) < rank(best))) best = block;
    }
    return best;
  }
  [[nodiscard]] std::int64_t evictable() const {
    std::set<BlockId> stuck;
    for (const auto& [block, entry] : kept) {
      if (!pinned(block)) continue;
      for (BlockId at = block; at != kNoBlock && kept.contains(at); at = kept.at(at).parent) stuck.insert(at);
    }
    return std::ssize(kept) - std::ssize(stuck);
  }
};

/// A fixed forest of 40 blocks: each under one of a smaller number or at a root. Blocks come and go by the
/// allocator's rules.
template <class Policy>
void random_policy(std::uint64_t seed) {
  constexpr BlockId kBlocks = 40;
  codegemm::test::Rng rng(seed);
  CAPTURE(seed);
  std::vector<BlockId> parent(kBlocks);
  for (BlockId b = 0; b < kBlocks; ++b)
    parent[static_cast<std::size_t>(b)] = static_cast<BlockId>(rng.below(b + 1)) - 1;
  Policy policy;
  REQUIRE(policy.resize(kBlocks).ok());
  Model<Policy> model;
  std::int64_t stamp = 0;
  std::set<BlockId> hinted;
  for (int step = 0; step < 6000; ++step) {
    CAPTURE(step);
    const auto block = static_cast<BlockId>(rng.below(kBlocks));
    switch (rng.below(5)) {
      case 0:
      case 1: {  // unused from here up to the first that is kept, if all below is unused: children first
        bool below_unused = true;
        for (BlockId b = 0; b < kBlocks; ++b) {
          if (parent[static_cast<std::size_t>(b)] == block && !model.kept.contains(b)) below_unused = false;
        }
        if (below_unused && !model.kept.contains(block)) {
          policy.insert(block, parent[static_cast<std::size_t>(block)]);
          model.kept[block] = {parent[static_cast<std::size_t>(block)], ++stamp};
        }
        break;
      }
      case 2: {  // used again, with all its ancestors, from the root on
        std::vector<BlockId> path;
        for (BlockId b = block; b != kNoBlock; b = parent[static_cast<std::size_t>(b)]) path.push_back(b);
        for (std::size_t i = path.size(); i-- > 0;) {
          if (model.kept.erase(path[i]) > 0) policy.erase(path[i]);
        }
        break;
      }
      case 3: {
        Retention retention;
        retention.priority = static_cast<int>(rng.below(4)) * 30;
        if (rng.below(2) == 0) retention.expires = model.now + rng.below(6);
        if (rng.below(2) == 0) retention.next_use = model.now + rng.below(6);
        retention.pinned = rng.below(3) == 0;
        policy.retain(block, retention);
        model.hints[block] = retention;
        break;
      }
      case 4:
        if (rng.below(4) == 0) policy.set_time(++model.now);
        if (rng.below(4) == 0) {
          policy.forget(block);
          model.hints.erase(block);
          if (model.kept.contains(block)) {  // only what has left the tree is forgotten: here it comes back
            policy.retain(block, Retention());
          }
        }
        break;
    }
    REQUIRE(policy.size() == std::ssize(model.kept));
    REQUIRE(policy.evictable() == model.evictable());
    REQUIRE(policy.victim() == model.victim());
  }
}

template <class Eviction>
struct Cache {
  explicit Cache(std::int64_t blocks)
      : storage({1, 1, 1, 1}, blocks),
        allocator(*BasicKvAllocator<NoKvStorage, ChainHash, Eviction>::create(storage)) {}
  /// A session of these tokens, a block each.
  std::optional<Sequence> run(const Tokens& tokens) {
    Sequence sequence = *allocator->open({"m", "1", ""}, tokens);
    const Tokens missing(tokens.begin() + sequence.length(), tokens.end());
    if (!allocator->reserve(sequence, std::ssize(missing)).ok()) return std::nullopt;
    REQUIRE(allocator->commit(sequence, missing).ok());
    return sequence;
  }
  std::int64_t cached(const Tokens& tokens) {
    std::array<std::int64_t, 1> found{};
    allocator->lookup({"m", "1", ""}, tokens, found);
    return found[0];
  }
  NoKvStorage storage;
  std::unique_ptr<BasicKvAllocator<NoKvStorage, ChainHash, Eviction>> allocator;
};

}  // namespace

TEST_CASE("policies with hints name the victim that a search among all blocks finds") {
  for (const std::uint64_t written : {1U, 2U, 3U, 4U}) {
    random_policy<PriorityEviction>(codegemm::test::seed_or(written));
    random_policy<AgentEviction>(codegemm::test::seed_or(written));
  }
}

TEST_CASE("a low priority goes before a block unused for longer, until the high one expires") {
  Cache<PriorityEviction> cache(4);
  const Retention important{.priority = 80, .expires = 100};
  REQUIRE(cache.allocator->retain(*cache.run({1, 2}), 0, 2, important).ok());
  REQUIRE(cache.run({3, 4}));
  REQUIRE(cache.run({5, 6}));
  CHECK(cache.cached({1, 2}) == 2);
  CHECK(cache.cached({3, 4}) == 0);
  cache.allocator->set_time(100);
  REQUIRE(cache.run({7, 8}));
  CHECK(cache.cached({1, 2}) == 0);
  CHECK(cache.cached({5, 6}) == 2);
  CHECK(cache.allocator->check_invariants().ok());
  const Sequence sequence = *cache.run({7, 8});
  CHECK(cache.allocator->retain(sequence, 0, 3, {}).code() == StatusCode::kInvalidArgument);
  CHECK(cache.allocator->retain(sequence, 0, 1, {.priority = 101}).code() == StatusCode::kInvalidArgument);
}

TEST_CASE("the agent that is called last goes first, and pinned contexts wait for their expiry") {
  Cache<AgentEviction> cache(6);
  REQUIRE(cache.allocator->retain(*cache.run({1, 2}), 0, 2, {.next_use = 9}).ok());
  REQUIRE(cache.allocator->retain(*cache.run({3, 4}), 0, 2, {.next_use = 5}).ok());
  REQUIRE(cache.allocator->retain(*cache.run({5, 6}), 0, 2, {.next_use = 7}).ok());
  REQUIRE(cache.allocator->retain(*cache.run({7, 8}), 0, 2, {.expires = 20, .pinned = true}).ok());
  CHECK(cache.cached({1, 2}) == 0);
  CHECK(cache.cached({3, 4}) == 2);
  cache.allocator->set_time(6);  // 3, 4 were not called at 5
  REQUIRE(cache.allocator->retain(*cache.run({9, 10}), 0, 2, {.expires = 20, .pinned = true}).ok());
  CHECK(cache.cached({3, 4}) == 0);
  CHECK(cache.cached({5, 6}) == 2);
  REQUIRE(cache.run({11, 12}));
  CHECK(cache.cached({7, 8}) == 2);
  CHECK_FALSE(cache.run({13, 14, 15}));  // four of six blocks are pinned
  CHECK(cache.allocator->check_invariants().ok());
  cache.allocator->set_time(20);
  CHECK(cache.run({13, 14, 15}));
  CHECK(cache.allocator->check_invariants().ok());
}

TEST_CASE("a salted tenant's look-up does the same work whatever others have cached") {
  struct CountingHash {
    std::int64_t* calls = nullptr;
    std::uint64_t operator()(std::uint64_t parent, std::span<const std::int32_t> tokens) const {
      ++*calls;
      return ChainHash()(parent, tokens);
    }
    std::uint64_t operator()(const CacheKey& key) const { return ChainHash()(key); }
  };
  Tokens prompt(500);
  std::iota(prompt.begin(), prompt.end(), 0);
  std::vector<std::int64_t> work;
  for (const bool cached_by_other : {false, true}) {
    std::int64_t calls = 0;
    NoKvStorage storage({1, 1, 1, 4}, 200);
    auto allocator = *BasicKvAllocator<NoKvStorage, CountingHash>::create(storage, CountingHash{&calls});
    Sequence other = *allocator->open({"m", "1", "other"}, {});
    if (cached_by_other) {
      REQUIRE(allocator->reserve(other, 500).ok());
      REQUIRE(allocator->commit(other, prompt).ok());
    }
    calls = 0;
    const Sequence mine = *allocator->open({"m", "1", "mine"}, prompt);
    CHECK(mine.length() == 0);
    CHECK(mine.blocks().empty());
    work.push_back(calls);
  }
  CHECK(work[0] == work[1]);
}

TEST_CASE("a tenant at its quota is refused, and room is made when it gives back") {
  NoKvStorage storage({1, 1, 1, 4}, 16);
  auto allocator = *BasicKvAllocator<NoKvStorage>::create(storage);
  const auto small = *allocator->add_tenant("small", {3});
  Sequence base = *allocator->open({"m", "1", ""}, {}, small);
  REQUIRE(allocator->reserve(base, 8).ok());
  REQUIRE(allocator->commit(base, Tokens(8, 1)).ok());
  std::vector<Sequence> forks(4);
  const auto status = allocator->fork_all(base, forks, 1);
  CHECK(status.code() == StatusCode::kExhausted);
  CHECK(status.message() ==
        "KvAllocator::reserve: 1 blocks more than the 3 in use exceed the quota of tenant 1 (small), 3");
  CHECK_FALSE(forks[0].is_open());
  CHECK(allocator->tenant_stats(small)->in_use_blocks == 2);
  CHECK(allocator->tenant_stats(small)->refusals == 1);
  REQUIRE(allocator->set_quota(small, {6}).ok());
  REQUIRE(allocator->fork_all(base, forks, 1).ok());
  const auto stats = *allocator->tenant_stats(small);
  CHECK(stats.in_use_blocks == 2 + 4);  // L_shared + N * L_unique
  CHECK(stats.shared_blocks == 2);
  CHECK(stats.private_blocks == 4);
  CHECK(stats.sequences == 5);
  CHECK(allocator->open({"m", "1", ""}, {}, 7).status().code() == StatusCode::kInvalidArgument);
  CHECK(allocator->set_quota(small, {-1}).code() == StatusCode::kInvalidArgument);
  CHECK(allocator->tenant_stats(small)->max_blocks == 6);
  CHECK(allocator->add_tenant("x", {-1}).status().code() == StatusCode::kInvalidArgument);
  // A look-up takes no more than the quota allows, and what it took is right.
  const auto tiny = *allocator->add_tenant("tiny", {1});
  CHECK(allocator->open({"m", "1", ""}, Tokens(8, 1), tiny)->length() == 4);
}

TEST_CASE("a reader of events that falls behind learns how many it lost") {
  prefillshare::EventLog log;
  CHECK(log.resize(0).code() == StatusCode::kInvalidArgument);
  REQUIRE(log.resize(4).ok());
  for (std::uint64_t i = 0; i < 7; ++i) log.push(prefillshare::KvEvent::Kind::kStored, 0, i, 10 + i);
  std::array<prefillshare::KvEvent, 3> out;
  auto batch = log.read(1, out);
  CHECK(batch.lost == 2);
  CHECK(batch.count == 3);
  CHECK(out[0].number == 3);
  CHECK(out[2].hash == 15);
  batch = log.read(batch.next, out);
  CHECK(batch.lost == 0);
  CHECK(batch.count == 1);
  CHECK(out[0].number == 6);
  CHECK(log.read(batch.next, out).count == 0);
  CHECK(log.next_number() == 7);
}
