// SPDX-License-Identifier: Apache-2.0
//
// Threads that fill, abort and take the same hand-offs: each has one outcome, and every block comes back.
#include <prefillshare/serve/handoff_table.hpp>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

namespace {

using namespace prefillshare;
using codegemm::test::Rng;

constexpr std::int64_t kLayers = 4;
constexpr int kBlockTokens = 4;
using Allocator = BasicKvAllocator<HostKvStorage, ChainHash, LruEviction, std::mutex>;
using Table = HandoffTable<Allocator, std::mutex>;

float value_of(std::int32_t token, int layer) { return static_cast<float>(token * 8 + layer); }

/// What stands in a block's slots for K, of tokens first, first + 1, ...
void write_page(HostKvStorage& storage, int layer, BlockId block, std::int32_t first, std::int64_t tokens) {
  for (int slot = 0; slot < tokens; ++slot) *storage.k(layer, block, slot) = value_of(first + slot, layer);
}

}  // namespace

TEST_CASE("two writers, a canceller and a taker agree on every hand-off's outcome") {
  KvShape shape;
  shape.layers = static_cast<int>(kLayers);
  shape.kv_heads = 1;
  shape.head_dim = 8;
  shape.block_tokens = kBlockTokens;
  HostKvStorage storage = HostKvStorage::create(shape, 16).value();
  auto allocator = Allocator::create(storage).value();
  Table table(*allocator, kLayers, 4);
  const std::uint64_t seed = codegemm::test::seed_or(5);
  CAPTURE(seed);
  std::atomic<std::int64_t> faults = 0;
  std::atomic<std::int64_t> completed = 0;
  std::atomic<std::int64_t> aborted = 0;
  Rng rng(seed);

  constexpr int kRounds = 400;
  for (int round = 0; round < kRounds; ++round) {
    const std::int64_t length = 1 + rng.below(12);
    const auto first = static_cast<std::int32_t>(100 * (1 + rng.below(4)));
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(length));
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = first + static_cast<std::int32_t>(i);
    const auto grant = table.reserve({"base", "1", ""}, tokens).value();
    std::atomic<int> outcomes = 0;  // how many were told that they decided
    std::atomic<int> ready = 0;
    const auto wait_for_all = [&] {
      ++ready;
      while (ready.load() < 3) std::this_thread::yield();
    };
    const auto write_layers = [&](int from) {
      wait_for_all();
      if (grant.missing_blocks == 0) {  // complete from the start
        if (from == 0) ++outcomes;
        return;
      }
      for (int layer = from; layer < kLayers; layer += 2) {
        const auto blocks = table.begin(grant.id, layer, 0, grant.missing_blocks);
        if (!blocks.ok()) return;
        for (std::size_t i = 0; i < blocks->size(); ++i) {
          const std::int64_t at = grant.cached_tokens + static_cast<std::int64_t>(i) * kBlockTokens;
          write_page(storage, layer, (*blocks)[i], first + static_cast<std::int32_t>(at),
                     std::min<std::int64_t>(kBlockTokens, length - at));
        }
        const auto state = table.finish(grant.id, layer, 0, grant.missing_blocks);
        if (state.ok() && *state == HandoffState::kComplete) ++outcomes;
      }
    };
    const auto spins = rng.below(200);
    std::thread even(write_layers, 0);
    std::thread odd(write_layers, 1);
    std::thread cancel([&] {
      wait_for_all();
      for (std::int64_t i = 0; i < spins; ++i) std::this_thread::yield();
      if (table.abort(grant.id, error(StatusCode::kCancelled, "no longer wanted"))) {
        ++outcomes;
        ++aborted;
      }
    });
    even.join();
    odd.join();
    cancel.join();
    if (outcomes.load() != 1) ++faults;
    auto taken = table.take(grant.id);
    if (taken.ok()) {
      ++completed;
      for (std::int64_t p = 0; p < length; ++p) {
        for (int layer = 0; layer < kLayers; ++layer) {
          const BlockId block = taken->blocks()[static_cast<std::size_t>(p / kBlockTokens)];
          const float got = *storage.k(layer, block, static_cast<int>(p % kBlockTokens));
          if (got != value_of(first + static_cast<std::int32_t>(p), layer)) ++faults;
        }
      }
    } else if (taken.status().code() != StatusCode::kNotFound) {
      ++faults;
    }
    if (rng.below(8) == 0) {  // so that not everything is found in the tree
      taken = error(StatusCode::kCancelled, "given back");
      auto all = allocator->open({"other", "1", ""}, {}).value();
      if (!allocator->reserve(all, 64).ok()) ++faults;
    }
  }
  CHECK(faults.load() == 0);
  CHECK(completed.load() + aborted.load() == kRounds);
  CHECK(completed.load() > 0);
  CHECK(table.size() == 0);
  CHECK(allocator->stats().in_use_blocks == 0);
  CHECK(allocator->check_invariants().ok());
}
