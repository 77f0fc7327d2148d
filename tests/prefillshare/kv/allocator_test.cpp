// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/kv/allocator.hpp>

#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <support/catch.hpp>

using codegemm::Status;
using codegemm::StatusCode;
using prefillshare::BasicKvAllocator;
using prefillshare::BlockId;
using prefillshare::CacheKey;
using prefillshare::HostKvStorage;
using prefillshare::KvAllocator;
using prefillshare::KvStats;
using prefillshare::NoKvStorage;
using prefillshare::Sequence;
using Tokens = std::vector<std::int32_t>;
using Blocks = std::vector<BlockId>;

namespace {

const CacheKey kKey{"base", "1", ""};
constexpr int kBlockTokens = 4;

/// An allocator over a small host storage, and the engine that writes into it.
struct Bench {
  explicit Bench(std::int64_t blocks)
      : storage(*HostKvStorage::create({2, 1, 2, kBlockTokens}, blocks)),
        allocator(*KvAllocator::create(storage)) {}

  /// What an engine does for tokens that are not cached: reserve, write, commit.
  Status prefill(Sequence& sequence, const Tokens& tokens) {
    if (Status status = allocator->reserve(sequence, std::ssize(tokens)); !status.ok()) return status;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      write(sequence, sequence.length() + static_cast<std::int64_t>(i), static_cast<float>(tokens[i]));
    }
    return allocator->commit(sequence, tokens);
  }
  Sequence open(const Tokens& tokens, const CacheKey& key = kKey) {
    auto sequence = allocator->open(key, tokens);
    REQUIRE(sequence.ok());
    const Tokens missing(tokens.begin() + sequence->length(), tokens.end());
    REQUIRE(prefill(*sequence, missing).ok());
    return *std::move(sequence);
  }
  Sequence fork(const Sequence& parent) {
    auto sequence = allocator->fork(parent);
    REQUIRE(sequence.ok());
    return *std::move(sequence);
  }
  void append(Sequence& sequence, float value) {
    REQUIRE(allocator->append_private(sequence, 1).ok());
    write(sequence, sequence.length() - 1, value);
  }
  void write(const Sequence& sequence, std::int64_t position, float value) {
    REQUIRE(allocator->writable(sequence, position));
    const BlockId block = sequence.blocks()[static_cast<std::size_t>(position / kBlockTokens)];
    const int slot = static_cast<int>(position % kBlockTokens);
    for (int layer = 0; layer < 2; ++layer) {
      for (int i = 0; i < 2; ++i) {
        storage.k(layer, block, slot)[i] = value;
        storage.v(layer, block, slot)[i] = -value;
      }
    }
  }
  /// The values of all positions, or {-1} if K, V or a layer disagree.
  std::vector<float> read(const Sequence& sequence) {
    std::vector<float> values;
    for (std::int64_t p = 0; p < sequence.length(); ++p) {
      const BlockId block = sequence.blocks()[static_cast<std::size_t>(p / kBlockTokens)];
      const int slot = static_cast<int>(p % kBlockTokens);
      values.push_back(storage.k(0, block, slot)[0]);
      for (int layer = 0; layer < 2; ++layer) {
        for (int i = 0; i < 2; ++i) {
          if (storage.k(layer, block, slot)[i] != values.back()) return {-1};
          if (storage.v(layer, block, slot)[i] != -values.back()) return {-1};
        }
      }
    }
    return values;
  }
  void check() {
    const Status status = allocator->check_invariants();
    INFO(status.message());
    REQUIRE(status.ok());
  }

  HostKvStorage storage;
  std::unique_ptr<KvAllocator> allocator;
};

Tokens range(std::int32_t first, std::int32_t count) {
  Tokens tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}
std::vector<float> values(std::int32_t first, std::int32_t count) {
  std::vector<float> out(static_cast<std::size_t>(count));
  std::iota(out.begin(), out.end(), static_cast<float>(first));
  return out;
}
Blocks blocks_of(const Sequence& sequence) {
  return Blocks(sequence.blocks().begin(), sequence.blocks().end());
}

}  // namespace

TEST_CASE("a session opened again shares the full blocks of the first") {
  Bench bench(8);
  Sequence first = bench.open(range(100, 10));  // blocks 0, 1 full; 2 holds two tokens
  CHECK(blocks_of(first) == Blocks{0, 1, 2});
  CHECK(bench.allocator->tree().size() == 2);
  bench.check();

  auto second = bench.allocator->open(kKey, range(100, 10));
  REQUIRE(second.ok());
  CHECK(second->length() == 8);
  CHECK(blocks_of(*second) == Blocks{0, 1});
  CHECK(bench.allocator->pool().ref_count(0) == 3);  // two sequences and the tree
  CHECK(bench.allocator->pool().ref_count(2) == 1);
  bench.check();

  const KvStats stats = bench.allocator->stats();
  CHECK(stats.hit_tokens == 8);
  CHECK(stats.miss_tokens == 10 + 2);
  CHECK(stats.in_use_blocks == 3);
  CHECK(stats.shared_blocks == 2);
  CHECK(stats.private_blocks == 1);
  CHECK(stats.free_blocks == 5);
  CHECK(stats.sequences == 2);
  CHECK(stats.bytes_shared == 2 * bench.storage.bytes_per_block());
  CHECK(stats.bytes_private == bench.storage.bytes_per_block());
}

TEST_CASE("a prompt that is cached to its last token gives a sequence that is ready to use") {
  Bench bench(8);
  { Sequence first = bench.open(range(0, 8)); }
  auto again = bench.allocator->open(kKey, range(0, 8));
  REQUIRE(again.ok());
  CHECK(again->length() == 8);
  CHECK(again->reserved() == 0);
  CHECK(bench.read(*again) == values(0, 8));
  CHECK(bench.allocator->reserve(*again, 0).ok());
  CHECK(bench.allocator->commit(*again, {}).ok());
  Sequence fork = bench.fork(*again);
  bench.append(fork, 99.0F);
  CHECK(fork.length() == 9);
  CHECK(blocks_of(fork) == Blocks{0, 1, 2});
  REQUIRE(bench.prefill(*again, range(8, 1)).ok());
  CHECK(blocks_of(*again) == Blocks{0, 1, 3});
  bench.check();
}

TEST_CASE("the base grows turn after turn while decode modules come and go") {
  Bench bench(16);
  Sequence base = bench.open(range(0, 6));
  for (std::int32_t turn = 0; turn < 4; ++turn) {
    const std::int32_t length = 6 + 3 * turn;
    Sequence fork = bench.fork(base);
    CHECK(fork.base_length() == length);
    for (std::int32_t i = 0; i < 3; ++i) bench.append(fork, static_cast<float>(-10 * turn - i - 1));
    bench.check();
    CHECK(bench.read(base) == values(0, length));
    fork.reset();
    REQUIRE(bench.prefill(base, range(length, 3)).ok());  // the base makes KV of its own for them
    CHECK(bench.read(base) == values(0, length + 3));
    bench.check();
  }
  const KvStats stats = bench.allocator->stats();
  CHECK(stats.in_use_blocks == 5);  // 18 tokens
  CHECK(stats.tree_blocks == 4);
  CHECK(stats.free_blocks == 11);
}

TEST_CASE("N decode modules over one context hold the shared blocks once") {
  Bench bench(32);
  Sequence base = bench.open(range(0, 18));  // 4 full blocks and 2 tokens
  std::vector<Sequence> forks;
  forks.reserve(4);
  for (int i = 0; i < 4; ++i) forks.push_back(bench.fork(base));
  CHECK(bench.allocator->stats().in_use_blocks == 5);  // a fork alone costs nothing
  for (std::size_t i = 0; i < forks.size(); ++i) {
    for (int t = 0; t < 5; ++t)
      bench.append(forks[i], static_cast<float>(1000 * (i + 1)) + static_cast<float>(t));
  }
  bench.check();
  // Each: a copy of the block with the last 2 tokens, and one block more.
  CHECK(bench.allocator->stats().in_use_blocks == 5 + 4 * 2);
  CHECK(bench.allocator->stats().copied_blocks == 4);
  CHECK(bench.allocator->stats().shared_blocks == 4);
  for (std::size_t i = 0; i < forks.size(); ++i) {
    std::vector<float> expected = values(0, 18);
    const std::vector<float> own = values(1000 * static_cast<std::int32_t>(i + 1), 5);
    expected.insert(expected.end(), own.begin(), own.end());
    CHECK(bench.read(forks[i]) == expected);
  }
  CHECK(bench.read(base) == values(0, 18));
}

TEST_CASE("whoever appends to a shared partly filled block gets a copy") {
  Bench bench(8);
  Sequence base = bench.open(range(0, 6));  // blocks 0, 1; two tokens in 1
  Sequence fork = bench.fork(base);
  CHECK(blocks_of(fork) == Blocks{0, 1});
  CHECK(bench.allocator->pool().ref_count(1) == 2);
  CHECK_FALSE(bench.allocator->writable(base, 6));
  CHECK_FALSE(bench.allocator->writable(fork, 6));

  SECTION("the fork first") {
    bench.append(fork, 50.0F);
    CHECK(blocks_of(fork) == Blocks{0, 2});
    CHECK(bench.allocator->pool().ref_count(1) == 1);
    REQUIRE(bench.prefill(base, range(6, 1)).ok());  // alone in block 1 now: no copy
    CHECK(blocks_of(base) == Blocks{0, 1});
    CHECK(bench.allocator->stats().copied_blocks == 1);
  }
  SECTION("the base first") {
    REQUIRE(bench.prefill(base, range(6, 1)).ok());
    CHECK(blocks_of(base) == Blocks{0, 2});
    CHECK(blocks_of(fork) == Blocks{0, 1});
    bench.append(fork, 50.0F);
    CHECK(blocks_of(fork) == Blocks{0, 1});
    CHECK(bench.allocator->stats().copied_blocks == 1);
  }
  SECTION("the base gone") {
    base.reset();
    bench.append(fork, 50.0F);
    CHECK(blocks_of(fork) == Blocks{0, 1});
    CHECK(bench.allocator->stats().copied_blocks == 0);
    base = bench.open(range(0, 7));
  }
  CHECK(bench.read(base) == values(0, 7));
  std::vector<float> expected = values(0, 6);
  expected.push_back(50.0F);
  CHECK(bench.read(fork) == expected);
  bench.check();
}

TEST_CASE("a fork of a base that has filled its reservation half way keeps clear of the other half") {
  Bench bench(8);
  Sequence base = bench.open(range(0, 5));
  REQUIRE(bench.allocator->reserve(base, 2).ok());
  bench.write(base, 5, 5.0F);        // written, not committed
  Sequence fork = bench.fork(base);  // so the fork takes its copy at once
  CHECK(blocks_of(base) == Blocks{0, 1});
  CHECK(blocks_of(fork) == Blocks{0, 2});
  bench.append(fork, 77.0F);
  bench.write(base, 6, 6.0F);
  REQUIRE(bench.allocator->commit(base, range(5, 2)).ok());
  CHECK(bench.read(base) == values(0, 7));
  std::vector<float> expected = values(0, 5);
  expected.push_back(77.0F);
  CHECK(bench.read(fork) == expected);
  bench.check();
}

TEST_CASE("forks of forks, outliving what they came from") {
  Bench bench(8);
  Sequence base = bench.open(range(0, 5));
  Sequence parent = bench.fork(base);
  base.reset();
  bench.append(parent, 60.0F);
  Sequence child = bench.fork(parent);
  CHECK(child.base_length() == 5);
  CHECK(child.is_fork());
  bench.append(parent, 61.0F);
  bench.append(child, 62.0F);
  bench.append(child, 63.0F);
  parent.reset();
  bench.append(child, 64.0F);
  std::vector<float> expected = values(0, 5);
  expected.insert(expected.end(), {60.0F, 62.0F, 63.0F, 64.0F});
  CHECK(bench.read(child) == expected);
  bench.check();
  child.reset();
  bench.check();
  CHECK(bench.allocator->stats().in_use_blocks == 0);
  CHECK(bench.allocator->stats().cached_blocks == 1);
}

TEST_CASE("two sequences that commit the same tokens end up with one block") {
  Bench bench(8);
  Sequence first = bench.open({});
  Sequence second = bench.open({});
  REQUIRE(bench.prefill(first, range(0, 6)).ok());   // blocks 0, 1
  REQUIRE(bench.prefill(second, range(0, 6)).ok());  // took 2, 3; 2 is the equal of 0
  CHECK(blocks_of(first) == Blocks{0, 1});
  CHECK(blocks_of(second) == Blocks{0, 3});
  CHECK(bench.allocator->pool().ref_count(2) == 0);
  CHECK(bench.allocator->stats().merged_blocks == 1);
  bench.check();
  REQUIRE(bench.prefill(second, range(6, 2)).ok());
  REQUIRE(bench.prefill(first, range(6, 2)).ok());
  CHECK(blocks_of(second) == Blocks{0, 3});
  CHECK(blocks_of(first) == Blocks{0, 3});
  CHECK(bench.allocator->stats().merged_blocks == 2);
  CHECK(bench.read(first) == values(0, 8));
  CHECK(bench.read(second) == values(0, 8));
  bench.check();
}

TEST_CASE("extend takes what another session has prefilled meanwhile") {
  Bench bench(8);
  Sequence first = bench.open(range(0, 5));         // blocks 0, 1
  Sequence second = bench.open(range(0, 5));        // blocks 0, 2
  REQUIRE(bench.prefill(first, range(5, 9)).ok());  // 0, 1, 3, 4: 14 tokens
  CHECK(blocks_of(first) == Blocks{0, 1, 3, 4});
  auto found = bench.allocator->extend(second, range(5, 9));
  REQUIRE(found.ok());
  CHECK(*found == 7);  // tokens 5..11: the block begun is changed for the full one, block 3 follows
  CHECK(blocks_of(second) == Blocks{0, 1, 3});
  CHECK(bench.allocator->pool().ref_count(2) == 0);
  CHECK(bench.read(second) == values(0, 12));
  bench.check();
  CHECK(*bench.allocator->extend(second, range(500, 4)) == 0);
  REQUIRE(bench.allocator->reserve(second, 1).ok());
  CHECK(bench.allocator->extend(second, range(12, 4)).status().code() == StatusCode::kInvalidArgument);
  bench.check();
}

TEST_CASE("producers, versions and tenants never meet") {
  Bench bench(16);
  Sequence sequence = bench.open(range(0, 8));
  for (const CacheKey& other : {CacheKey{"base", "2", ""}, CacheKey{"base2", "1", ""},
                                CacheKey{"base", "1", "t"}, CacheKey{"bas", "e1", ""}}) {
    auto opened = bench.allocator->open(other, range(0, 8));
    REQUIRE(opened.ok());
    CHECK(opened->length() == 0);
  }
  CHECK(bench.allocator->open({"", "1", ""}, {}).status().code() == StatusCode::kInvalidArgument);
  CHECK(bench.open(range(0, 8)).length() == 8);
  bench.check();
}

TEST_CASE("the least recently used leaf goes first, and nothing in use ever") {
  Bench bench(6);
  { Sequence a = bench.open(range(0, 8)); }    // blocks 0, 1 cached
  { Sequence b = bench.open(range(100, 8)); }  // blocks 2, 3 cached
  { Sequence a = bench.open(range(0, 8)); }    // a is the younger now
  CHECK(bench.allocator->stats().cached_blocks == 4);
  CHECK(bench.allocator->eviction().victim() == 3);  // b's leaf
  Sequence c = bench.open(range(200, 12));           // two free, one evicted
  CHECK(bench.allocator->stats().evicted_blocks == 1);
  CHECK(blocks_of(c) == Blocks{3, 4, 5});
  bench.check();
  {
    auto b = bench.allocator->open(kKey, range(100, 8));
    REQUIRE(b.ok());
    CHECK(b->length() == 4);
  }
  CHECK(bench.allocator->eviction().victim() == 1);  // b was touched, a's leaf is next
  Sequence d = bench.open(range(300, 12));
  CHECK(bench.allocator->stats().cached_blocks == 0);
  CHECK(bench.allocator->stats().evicted_blocks == 4);
  bench.check();

  // All in use: back-pressure, and nothing changes.
  auto e = bench.allocator->open(kKey, range(400, 4));
  REQUIRE(e.ok());
  const Status status = bench.allocator->reserve(*e, 1);
  CHECK(status.code() == StatusCode::kExhausted);
  CHECK(status.message() ==
        "KvAllocator::reserve: 1 tokens after 0 need more than the 0 free and 0 cached blocks of 6");
  CHECK(bench.read(c) == values(200, 12));
  CHECK(bench.read(d) == values(300, 12));
  bench.check();
  c.reset();
  CHECK(bench.allocator->reserve(*e, 1).ok());
  bench.check();
}

TEST_CASE("a reservation that cannot be met evicts nothing") {
  Bench bench(4);
  { Sequence a = bench.open(range(0, 8)); }
  Sequence b = bench.open({});
  CHECK(bench.allocator->reserve(b, 17).code() == StatusCode::kExhausted);
  CHECK(bench.allocator->reserve(b, std::numeric_limits<std::int64_t>::max()).code() ==
        StatusCode::kExhausted);
  CHECK(bench.allocator->stats().cached_blocks == 2);
  CHECK(bench.allocator->stats().evicted_blocks == 0);
  CHECK(b.blocks().empty());
  CHECK(bench.allocator->reserve(b, 16).ok());
  CHECK(bench.allocator->stats().evicted_blocks == 2);
  bench.check();
}

TEST_CASE("a reservation once made keeps its promise") {
  Bench bench(6);
  Sequence base = bench.open(range(0, 6));
  Sequence fork = bench.fork(base);
  REQUIRE(bench.allocator->reserve(fork, 7).ok());  // copies now: blocks for 13 tokens
  CHECK(blocks_of(fork) == Blocks{0, 2, 3, 4});
  CHECK(fork.reserved() == 7);
  REQUIRE(bench.allocator->reserve(fork, 3).ok());  // asks for no more than it has
  CHECK(fork.reserved() == 7);
  Sequence greedy = bench.open({});
  REQUIRE(bench.allocator->reserve(greedy, 4).ok());
  CHECK(bench.allocator->reserve(greedy, 5).code() == StatusCode::kExhausted);
  for (int i = 0; i < 7; ++i) bench.append(fork, static_cast<float>(70 + i));
  CHECK(bench.allocator->append_private(fork, 4).code() == StatusCode::kExhausted);
  CHECK(fork.length() == 13);
  CHECK(fork.reserved() == 0);
  bench.check();
  // A fork of a fork with nothing reserved shares; with something reserved it needs a block, and there is
  // none.
  REQUIRE(bench.allocator->append_private(fork, 1).ok());
  CHECK(bench.allocator->fork(fork).ok());
  REQUIRE(bench.allocator->reserve(fork, 2).ok());
  CHECK(bench.allocator->fork(fork).status().code() == StatusCode::kExhausted);
  REQUIRE(bench.allocator->release_reserved(fork).ok());
  CHECK(bench.allocator->fork(fork).ok());
  bench.check();
}

TEST_CASE("truncate rolls a decode-private tail back") {
  Bench bench(8);
  Sequence base = bench.open(range(0, 6));
  Sequence fork = bench.fork(base);
  for (int i = 0; i < 7; ++i) bench.append(fork, static_cast<float>(80 + i));  // 13 tokens, 4 blocks
  REQUIRE(bench.allocator->reserve(fork, 5).ok());
  CHECK(fork.blocks().size() == 5);
  REQUIRE(bench.allocator->truncate(fork, 9).ok());
  CHECK(fork.length() == 9);
  CHECK(fork.reserved() == 0);
  CHECK(fork.blocks().size() == 3);
  bench.check();
  bench.append(fork, 90.0F);
  std::vector<float> expected = values(0, 6);
  expected.insert(expected.end(), {80.0F, 81.0F, 82.0F, 90.0F});
  CHECK(bench.read(fork) == expected);
  CHECK(bench.allocator->truncate(fork, 5).message() ==
        "KvAllocator::truncate: to 5 tokens, expected 6 to 10");
  CHECK(bench.allocator->truncate(fork, 11).code() == StatusCode::kInvalidArgument);
  CHECK(bench.allocator->truncate(base, -1).code() == StatusCode::kInvalidArgument);
  CHECK(bench.allocator->truncate(base, base.length() + 1).code() == StatusCode::kInvalidArgument);
  REQUIRE(bench.allocator->truncate(fork, 6).ok());
  CHECK(bench.read(fork) == values(0, 6));
  bench.check();
}

TEST_CASE("what a decode module makes never enters the tree") {
  Bench bench(8);
  Sequence base = bench.open(range(0, 4));
  Sequence fork = bench.fork(base);
  for (std::int32_t i = 4; i < 12; ++i) bench.append(fork, static_cast<float>(i));
  CHECK(bench.allocator->tree().size() == 1);
  CHECK(bench.allocator->commit(fork, range(4, 4)).code() == StatusCode::kInvalidArgument);
  CHECK(bench.allocator->extend(fork, range(4, 4)).status().code() == StatusCode::kInvalidArgument);
  auto other = bench.allocator->open(kKey, range(0, 12));
  REQUIRE(other.ok());
  CHECK(other->length() == 4);
  CHECK(bench.allocator->append_private(base, 1).code() == StatusCode::kInvalidArgument);
  bench.check();
}

TEST_CASE("wrong calls are refused and change nothing") {
  Bench bench(4);
  Bench elsewhere(4);
  Sequence base = bench.open(range(0, 3));
  Sequence fork = bench.fork(base);
  Sequence closed;
  CHECK(bench.allocator->reserve(closed, 1).code() == StatusCode::kInvalidArgument);
  CHECK(bench.allocator->commit(closed, {}).code() == StatusCode::kInvalidArgument);
  CHECK(bench.allocator->fork(closed).status().code() == StatusCode::kInvalidArgument);
  CHECK(elsewhere.allocator->reserve(base, 1).code() == StatusCode::kInvalidArgument);
  CHECK(elsewhere.allocator->fork(base).status().code() == StatusCode::kInvalidArgument);
  CHECK_FALSE(elsewhere.allocator->writable(base, 0));
  CHECK(bench.allocator->reserve(base, -1).code() == StatusCode::kInvalidArgument);
  CHECK(bench.allocator->append_private(fork, -1).code() == StatusCode::kInvalidArgument);
  CHECK(bench.allocator->commit(base, range(3, 1)).message() ==
        "KvAllocator::commit: 1 tokens, but 0 are reserved");
  CHECK(base.length() == 3);
  CHECK(fork.length() == 3);
  bench.check();

  Sequence moved = std::move(base);
  CHECK_FALSE(base.is_open());  // NOLINT(bugprone-use-after-move)
  CHECK(base.length() == 0);
  CHECK(base.blocks().empty());
  CHECK(moved.length() == 3);
  moved = std::move(fork);
  CHECK(moved.is_fork());
  bench.check();
  CHECK(bench.allocator->stats().sequences == 1);
}

namespace {

struct FailingStorage : NoKvStorage {
  using NoKvStorage::NoKvStorage;
  Status copy_block(BlockId destination, BlockId source, int tokens) {
    if (fail) return codegemm::error(StatusCode::kCudaError, "copy refused");
    last_tokens = tokens;
    return NoKvStorage::copy_block(destination, source, tokens);
  }
  bool fail = false;
  int last_tokens = -1;
};

struct OneBucketHash {
  std::uint64_t operator()(std::uint64_t, std::span<const std::int32_t>) const { return 0; }
  std::uint64_t operator()(const CacheKey&) const { return 0; }
};

}  // namespace

TEST_CASE("a copy that fails leaves everything as it was") {
  FailingStorage storage({1, 1, 8, 4}, 4);
  auto made = BasicKvAllocator<FailingStorage>::create(storage);
  REQUIRE(made.ok());
  auto& allocator = **made;
  auto base = allocator.open(kKey, {});
  REQUIRE(allocator.reserve(*base, 6).ok());
  REQUIRE(allocator.commit(*base, range(0, 6)).ok());
  auto fork = allocator.fork(*base);
  REQUIRE(fork.ok());
  storage.fail = true;
  CHECK(allocator.append_private(*fork, 1).code() == StatusCode::kCudaError);
  CHECK(allocator.reserve(*base, 1).code() == StatusCode::kCudaError);
  CHECK(blocks_of(*base) == Blocks{0, 1});
  CHECK(blocks_of(*fork) == Blocks{0, 1});
  CHECK(allocator.stats().free_blocks == 2);
  CHECK(allocator.stats().copied_blocks == 0);
  REQUIRE(allocator.check_invariants().ok());
  storage.fail = false;
  REQUIRE(allocator.append_private(*fork, 1).ok());
  CHECK(storage.last_tokens == 2);  // only the used slots
  REQUIRE(allocator.reserve(*base, 1).ok());
  storage.fail = true;
  CHECK(allocator.fork(*base).status().code() == StatusCode::kCudaError);
  CHECK(allocator.stats().sequences == 2);
  REQUIRE(allocator.check_invariants().ok());
}

TEST_CASE("with a hash that always collides no context gets another's block") {
  NoKvStorage storage({1, 1, 8, 2}, 64);
  auto made = BasicKvAllocator<NoKvStorage, OneBucketHash>::create(storage);
  REQUIRE(made.ok());
  auto& allocator = **made;
  std::vector<Sequence> open;
  for (std::int32_t i = 0; i < 10; ++i) {
    const CacheKey key{"base", "1", i % 2 == 0 ? "even" : "odd"};
    const Tokens tokens = {i / 2, 1, 2, 3};
    auto sequence = allocator.open(key, tokens);
    REQUIRE(sequence.ok());
    REQUIRE(sequence->length() == 0);
    REQUIRE(allocator.reserve(*sequence, 4).ok());
    REQUIRE(allocator.commit(*sequence, tokens).ok());
    open.push_back(*std::move(sequence));
    REQUIRE(allocator.check_invariants().ok());
  }
  CHECK(allocator.stats().merged_blocks == 0);
  CHECK(allocator.stats().shared_blocks == 0);
  auto again = allocator.open({"base", "1", "odd"}, Tokens{3, 1, 2, 3});
  REQUIRE(again.ok());
  CHECK(blocks_of(*again) == blocks_of(open[7]));
}

TEST_CASE("an allocator is refused for an impossible shape") {
  NoKvStorage storage({1, 1, 8, 0}, 4);
  CHECK(BasicKvAllocator<NoKvStorage>::create(storage).status().code() == StatusCode::kInvalidArgument);
  NoKvStorage negative({1, 1, 8, 16}, -4);
  CHECK(BasicKvAllocator<NoKvStorage>::create(negative).status().code() == StatusCode::kInvalidArgument);
  NoKvStorage empty({1, 1, 8, 16}, 0);
  auto none = BasicKvAllocator<NoKvStorage>::create(empty);
  REQUIRE(none.ok());
  auto sequence = (*none)->open(kKey, range(0, 5));
  REQUIRE(sequence.ok());
  CHECK((*none)->reserve(*sequence, 1).code() == StatusCode::kExhausted);
}
