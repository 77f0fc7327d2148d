// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/kv/prefix_tree.hpp>

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

using prefillshare::BlockId;
using prefillshare::CacheKey;
using prefillshare::ChainHash;
using prefillshare::kNoBlock;
using prefillshare::PrefixTree;
using prefillshare::TreeNode;
using Tokens = std::vector<std::int32_t>;

namespace {

/// Everything collides with everything.
struct OneBucketHash {
  std::uint64_t operator()(std::uint64_t, std::span<const std::int32_t>) const { return 7; }
  std::uint64_t operator()(const CacheKey&) const { return 7; }
};

template <class Hash>
void check_against_map(std::uint64_t seed) {
  CAPTURE(seed);
  codegemm::test::Rng rng(seed);
  constexpr int kBlocks = 40;
  constexpr int kTokens = 2;
  auto tree = PrefixTree<Hash>::create(kBlocks, kTokens);
  REQUIRE(tree.ok());
  const std::vector<CacheKey> keys = {{"m", "1", ""}, {"m", "2", ""}, {"m", "1", "salt"}, {"n", "1", ""}};
  std::vector<std::int64_t> held_roots(keys.size(), 0);
  std::vector<TreeNode> roots;
  for (const CacheKey& key : keys) {
    const auto root = tree->acquire_root(key);
    REQUIRE(root.ok());
    REQUIRE(root->is_root());
    roots.push_back(*root);
    held_roots[static_cast<std::size_t>(root->root())] = 1;
  }
  std::map<std::pair<std::size_t, Tokens>, BlockId> model;  // whole prefix -> block
  std::set<BlockId> unused;
  for (BlockId block = 0; block < kBlocks; ++block) unused.insert(block);

  for (int step = 0; step < 3000; ++step) {
    // Walk a random path as deep as the model goes, asking the tree on the way.
    const auto key = static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(keys.size())));
    TreeNode parent = roots[key];
    Tokens prefix;
    for (int depth = 0; depth < 6; ++depth) {
      Tokens next(kTokens);
      for (std::int32_t& token : next) token = static_cast<std::int32_t>(rng.below(2));
      prefix.insert(prefix.end(), next.begin(), next.end());
      const auto query = tree->query(parent, next);
      const BlockId found = tree->find(query);
      const auto expected = model.find({key, prefix});
      REQUIRE(found == (expected == model.end() ? kNoBlock : expected->second));
      if (found != kNoBlock) {
        parent = TreeNode::of_block(found);
        continue;
      }
      if (!unused.empty() && rng.below(2) == 0) {
        const BlockId block = *unused.begin();
        unused.erase(unused.begin());
        tree->insert(query, block);
        model[{key, prefix}] = block;
        REQUIRE(tree->contains(block));
        REQUIRE(tree->parent(block) == parent);
      }
      break;
    }
    if (rng.below(3) == 0 && !model.empty()) {
      auto at = model.begin();
      std::advance(at, rng.below(static_cast<std::int64_t>(model.size())));
      if (tree->children(at->second) == 0) {
        tree->erase(at->second);
        REQUIRE_FALSE(tree->contains(at->second));
        unused.insert(at->second);
        model.erase(at);
      }
    }
    const codegemm::Status status = tree->check_invariants(held_roots);
    INFO(status.message());
    REQUIRE(status.ok());
    REQUIRE(tree->size() == static_cast<std::int64_t>(model.size()));
  }
}

}  // namespace

TEST_CASE("PrefixTree agrees with a map of whole prefixes") {
  for (const std::uint64_t seed : {11U, 12U, 13U})
    check_against_map<ChainHash>(codegemm::test::seed_or(seed));
}

TEST_CASE("PrefixTree agrees with the map when every hash collides") {
  for (const std::uint64_t seed : {21U, 22U}) check_against_map<OneBucketHash>(codegemm::test::seed_or(seed));
}

TEST_CASE("PrefixTree never takes a colliding hash for a hit") {
  auto tree = PrefixTree<OneBucketHash>::create(4, 2);
  REQUIRE(tree.ok());
  const TreeNode mine = *tree->acquire_root({"m", "1", "mine"});
  const TreeNode other = *tree->acquire_root({"m", "1", "other"});
  REQUIRE(mine != other);
  tree->insert(tree->query(mine, Tokens{1, 2}), 0);
  CHECK(tree->find(tree->query(mine, Tokens{1, 2})) == 0);
  CHECK(tree->find(tree->query(mine, Tokens{1, 3})) == kNoBlock);
  CHECK(tree->find(tree->query(mine, Tokens{2, 1})) == kNoBlock);
  CHECK(tree->find(tree->query(other, Tokens{1, 2})) == kNoBlock);
  CHECK(tree->find(tree->query(TreeNode::of_block(0), Tokens{1, 2})) == kNoBlock);
  tree->insert(tree->query(other, Tokens{1, 2}), 1);
  tree->insert(tree->query(TreeNode::of_block(0), Tokens{1, 2}), 2);
  CHECK(tree->find(tree->query(mine, Tokens{1, 2})) == 0);
  CHECK(tree->find(tree->query(other, Tokens{1, 2})) == 1);
  CHECK(tree->find(tree->query(TreeNode::of_block(0), Tokens{1, 2})) == 2);
  CHECK(tree->find(tree->query(TreeNode::of_block(1), Tokens{1, 2})) == kNoBlock);
}

TEST_CASE("PrefixTree forgets a producer that nobody holds and that has no blocks") {
  auto tree = PrefixTree<>::create(2, 1);
  REQUIRE(tree.ok());
  const CacheKey key{"m", "1", "salt"};
  const TreeNode root = *tree->acquire_root(key);
  CHECK(*tree->acquire_root(key) == root);
  CHECK(tree->key(root) == key);
  tree->insert(tree->query(root, Tokens{5}), 1);
  tree->release_root(root);
  tree->release_root(root);
  CHECK(tree->roots() == 1);  // its block is still there
  CHECK(*tree->acquire_root(key) == root);
  CHECK(tree->find(tree->query(root, Tokens{5})) == 1);
  tree->release_root(root);
  tree->erase(1);
  CHECK(tree->roots() == 0);
  CHECK(tree->check_invariants({}).ok());
  for (int i = 0; i < 1000; ++i) {
    const TreeNode again = *tree->acquire_root({"m", "1", std::to_string(i)});
    CHECK(again.root() == 0);  // the place is used again
    tree->release_root(again);
  }
}

TEST_CASE("ChainHash is a fixed function that tells neighbours apart") {
  const ChainHash hash;
  // Written down once: the number must not change, or caches of two versions would not meet.
  CHECK(hash(std::uint64_t{0}, Tokens{1, 2, 3, 4}) == 0xEF16B334CCFC4CACULL);
  CHECK(hash(CacheKey{"model", "1", ""}) == 0x7C12B2C57929E6B4ULL);
  CHECK(hash(CacheKey{"ab", "c", ""}) != hash(CacheKey{"a", "bc", ""}));
  CHECK(hash(CacheKey{"a", "", "b"}) != hash(CacheKey{"a", "b", ""}));
  std::set<std::uint64_t> seen;
  for (std::int32_t a = -50; a < 50; ++a) {
    for (std::int32_t b = -50; b < 50; ++b) {
      seen.insert(hash(std::uint64_t{1}, Tokens{a, b}));
      seen.insert(hash(std::uint64_t{1}, Tokens{a, b, 0}));
      seen.insert(hash(std::uint64_t{2}, Tokens{a, b}));
    }
  }
  CHECK(seen.size() == 30000);

  // A long context must spread over the buckets, which take the low bits: 4096 balls in 4096 urns leave
  // about 63% of these hit.
  std::set<std::uint64_t> buckets;
  std::uint64_t h = hash(CacheKey{"m", "", ""});
  for (std::int32_t i = 0; i < 4096; ++i) {
    h = hash(h, Tokens{i, 0, 0, 0});
    buckets.insert(h & 4095U);
  }
  CHECK(buckets.size() > 2400);
}

TEST_CASE("PrefixTree refuses impossible sizes") {
  CHECK_FALSE(PrefixTree<>::create(-1, 16).ok());
  CHECK_FALSE(PrefixTree<>::create(std::int64_t{1} << 31, 16).ok());
  CHECK_FALSE(PrefixTree<>::create(8, 0).ok());
  CHECK(PrefixTree<>::create(0, 16).ok());
}
