// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/kv/block_pool.hpp>

#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::StatusCode;
using prefillshare::BlockId;
using prefillshare::BlockPool;

TEST_CASE("BlockPool hands out 0, 1, 2, ... and then the block released last") {
  auto pool = BlockPool::create(4);
  REQUIRE(pool.ok());
  CHECK(pool->blocks() == 4);
  CHECK(pool->free_blocks() == 4);
  for (BlockId expected = 0; expected < 4; ++expected) {
    const auto block = pool->allocate();
    REQUIRE(block.ok());
    CHECK(*block == expected);
    CHECK(pool->ref_count(*block) == 1);
  }
  const auto none = pool->allocate();
  REQUIRE_FALSE(none.ok());
  CHECK(none.status().code() == StatusCode::kExhausted);
  CHECK(none.status().message() == "BlockPool: all 4 blocks are held");

  pool->release(1);
  pool->release(3);
  CHECK(pool->free_blocks() == 2);
  CHECK(*pool->allocate() == 3);
  CHECK(*pool->allocate() == 1);
  CHECK(pool->free_blocks() == 0);
  CHECK(pool->check_invariants().ok());
}

TEST_CASE("BlockPool frees a block with its last holder") {
  auto pool = BlockPool::create(1);
  REQUIRE(pool.ok());
  const BlockId block = *pool->allocate();
  pool->retain(block);
  pool->retain(block);
  CHECK(pool->ref_count(block) == 3);
  pool->release(block);
  pool->release(block);
  CHECK(pool->free_blocks() == 0);
  CHECK(pool->ref_count(block) == 1);
  pool->release(block);
  CHECK(pool->free_blocks() == 1);
  CHECK(pool->ref_count(block) == 0);
  CHECK(pool->check_invariants().ok());
}

TEST_CASE("BlockPool of no blocks and of impossible counts") {
  auto empty = BlockPool::create(0);
  REQUIRE(empty.ok());
  CHECK(empty->allocate().status().code() == StatusCode::kExhausted);
  CHECK(empty->check_invariants().ok());
  CHECK_FALSE(empty->contains(0));
  CHECK(BlockPool::create(-1).status().code() == StatusCode::kInvalidArgument);
  CHECK(BlockPool::create(std::numeric_limits<std::int64_t>::max()).status().code() ==
        StatusCode::kInvalidArgument);
  CHECK(BlockPool::create(std::int64_t{1} << 31).status().code() == StatusCode::kInvalidArgument);
}

TEST_CASE("BlockPool agrees with a stack and a map of counts") {
  for (const std::uint64_t written : {1U, 2U, 3U}) {
    const std::uint64_t seed = codegemm::test::seed_or(written);
    CAPTURE(seed);
    codegemm::test::Rng rng(seed);
    const std::int64_t blocks = 1 + rng.below(40);
    auto pool = BlockPool::create(blocks);
    REQUIRE(pool.ok());
    std::deque<BlockId> free;  // the front is next
    for (BlockId block = 0; block < blocks; ++block) free.push_back(block);
    std::map<BlockId, int> held;
    for (int step = 0; step < 5000; ++step) {
      const std::int64_t choice = rng.below(3);
      if (choice == 0 || held.empty()) {
        const auto block = pool->allocate();
        REQUIRE(block.ok() == !free.empty());
        if (!block.ok()) continue;
        REQUIRE(*block == free.front());
        free.pop_front();
        held[*block] = 1;
      } else {
        auto at = held.begin();
        std::advance(at, rng.below(static_cast<std::int64_t>(held.size())));
        if (choice == 1) {
          pool->retain(at->first);
          ++at->second;
        } else {
          pool->release(at->first);
          if (--at->second == 0) {
            free.push_front(at->first);
            held.erase(at);
          }
        }
      }
      REQUIRE(pool->check_invariants().ok());
      REQUIRE(pool->free_blocks() == static_cast<std::int64_t>(free.size()));
      for (BlockId block = 0; block < blocks; ++block) {
        REQUIRE(pool->ref_count(block) == (held.contains(block) ? held[block] : 0));
      }
    }
  }
}
