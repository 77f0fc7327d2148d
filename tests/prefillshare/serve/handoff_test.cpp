// SPDX-License-Identifier: Apache-2.0
//
// The hand-off's states: nothing is complete before its last page, whatever the order; an abort at any point
// returns every block, once no write is under way; what was decided first stays.
#include <prefillshare/serve/handoff_table.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

namespace {

using namespace prefillshare;
using codegemm::test::Rng;

constexpr int kBlockTokens = 4;
constexpr std::int64_t kLayers = 3;
using Allocator = BasicKvAllocator<NoKvStorage>;
using Table = HandoffTable<Allocator>;
const CacheKey kKey{"base", "1", ""};

KvShape shape() {
  KvShape out;
  out.layers = static_cast<int>(kLayers);
  out.kv_heads = 1;
  out.head_dim = 8;
  out.block_tokens = kBlockTokens;
  return out;
}

struct Pool {
  explicit Pool(std::int64_t blocks)
      : storage(shape(), blocks), allocator(Allocator::create(storage).value()) {}
  NoKvStorage storage;
  std::unique_ptr<Allocator> allocator;

  [[nodiscard]] std::int64_t in_use() const { return allocator->stats().in_use_blocks; }
};

std::vector<std::int32_t> tokens_of(std::int64_t count, std::int32_t first = 0) {
  std::vector<std::int32_t> out(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = first + static_cast<std::int32_t>(i);
  return out;
}

Status reason() { return error(StatusCode::kIoError, "the sender died"); }

}  // namespace

TEST_CASE("a hand-off is complete with its last page and not before, in any order") {
  for (const std::int64_t length : {1, 3, 4, 5, 8, 11}) {
    for (const std::uint64_t seed : {1U, 2U, 3U}) {
      CAPTURE(length, seed);
      Pool pool(8);
      const std::vector<std::int32_t> tokens = tokens_of(length);
      auto handoff = Handoff<Allocator>::reserve(*pool.allocator, kKey, tokens, kLayers).value();
      const std::int64_t blocks = (length + kBlockTokens - 1) / kBlockTokens;
      CHECK(handoff.state() == HandoffState::kReserved);
      CHECK(pool.in_use() == blocks);
      REQUIRE(std::ssize(handoff.blocks()) == blocks);
      CHECK(handoff.tokens_in(blocks - 1) == length - (blocks - 1) * kBlockTokens);

      std::vector<std::pair<std::int64_t, std::int64_t>> order;
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        for (std::int64_t block = 0; block < blocks; ++block) order.emplace_back(layer, block);
      }
      Rng rng(seed);
      for (std::size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(i)))]);
      }
      for (std::size_t i = 0; i < order.size(); ++i) {
        CHECK(handoff.take().status().code() == StatusCode::kExhausted);
        REQUIRE(handoff.begin(order[i].first, order[i].second, 1).ok());
        CHECK(handoff.state() == HandoffState::kFilling);
        CHECK(handoff.take().status().code() == StatusCode::kExhausted);
        CHECK(handoff.begin(order[i].first, order[i].second, 1).code() == StatusCode::kInvalidArgument);
        const auto state = handoff.finish(order[i].first, order[i].second, 1);
        REQUIRE(state.ok());
        CHECK((*state == HandoffState::kComplete) == (i + 1 == order.size()));
      }
      CHECK_FALSE(handoff.abort(reason()));  // decided: complete
      CHECK(handoff.arrive(0, 0, 1).status().code() == StatusCode::kInvalidArgument);
      CHECK(handoff.blocks().empty());
      Sequence sequence = handoff.take().value();
      CHECK(sequence.length() == length);
      CHECK(sequence.reserved() == 0);
      CHECK(handoff.take().status().code() == StatusCode::kInvalidArgument);
      CHECK_FALSE(handoff.holds_blocks());
      sequence.reset();
      CHECK(pool.in_use() == 0);

      // A second one of the same context needs no whole block: it is there.
      auto again = Handoff<Allocator>::reserve(*pool.allocator, kKey, tokens, kLayers).value();
      CHECK(again.cached_tokens() == length / kBlockTokens * kBlockTokens);
      CHECK(again.pages().blocks() == (length % kBlockTokens == 0 ? 0 : 1));
      CHECK((again.state() == HandoffState::kComplete) == (length % kBlockTokens == 0));
    }
  }
}

TEST_CASE("an abort at any point returns every block, and not while a page is being written") {
  const std::vector<std::int32_t> tokens = tokens_of(10);
  for (std::int64_t done = 0; done < 3 * kLayers; ++done) {
    for (const bool under_way : {false, true}) {
      CAPTURE(done, under_way);
      Pool pool(8);
      auto handoff = Handoff<Allocator>::reserve(*pool.allocator, kKey, tokens, kLayers).value();
      for (std::int64_t page = 0; page < done; ++page) {
        REQUIRE(handoff.arrive(page / 3, page % 3, 1).ok());
      }
      if (under_way) REQUIRE(handoff.begin(done / 3, done % 3, 1).ok());
      CHECK(handoff.abort(reason()));
      CHECK_FALSE(handoff.abort(reason()));
      CHECK(handoff.state() == HandoffState::kAborted);
      CHECK(pool.in_use() == (under_way ? 3 : 0));
      CHECK(handoff.blocks().size() == (under_way ? 3U : 0U));
      const Status late = handoff.begin(2, 2, 1);
      CHECK(late.code() == StatusCode::kCancelled);
      CHECK(late.message().find("the sender died") != std::string::npos);
      CHECK(handoff.take().status().code() == StatusCode::kCancelled);
      if (under_way) {
        CHECK(handoff.finish(done / 3, done % 3, 1).status().code() == StatusCode::kCancelled);
      }
      CHECK(pool.in_use() == 0);
      CHECK_FALSE(handoff.holds_blocks());
      CHECK(pool.allocator->stats().tree_blocks == 0);  // no garbage is ever found by another
      CHECK(pool.allocator->check_invariants().ok());
    }
  }
}

TEST_CASE("hand-offs refuse pages that are not theirs, and say back-pressure when the pool is full") {
  Pool pool(4);
  Table table(*pool.allocator, kLayers, 2);
  const auto first = table.reserve(kKey, tokens_of(8), {1, 50}).value();
  CHECK(first.missing_blocks == 2);
  for (const auto [layer, block, count] : {std::array<std::int64_t, 3>{-1, 0, 1},
                                           {kLayers, 0, 1},
                                           {0, -1, 1},
                                           {0, 2, 1},
                                           {0, 1, 2},
                                           {0, 0, -1},
                                           {0, 0, 0},
                                           {0, 0, INT64_MAX},
                                           {0, INT64_MAX, INT64_MAX},
                                           {INT64_MAX, 1, 1}}) {
    CAPTURE(layer, block, count);
    CHECK(table.begin(first.id, layer, block, count).status().code() == StatusCode::kInvalidArgument);
    CHECK(table.finish(first.id, layer, block, count).status().code() == StatusCode::kInvalidArgument);
  }
  CHECK(table.begin(first.id + 1, 0, 0, 1).status().code() == StatusCode::kNotFound);
  CHECK(table.state(first.id).value() == HandoffState::kReserved);
  CHECK(table.reserve(kKey, tokens_of(12, 100)).status().code() ==
        StatusCode::kExhausted);  // 4 blocks, 2 held
  CHECK(pool.in_use() == 2);
  const auto second = table.reserve(kKey, tokens_of(7, 100), {2, 60}).value();
  CHECK(table.tokens_in(second.id, 1).value() == 3);
  CHECK(table.reserve(kKey, tokens_of(1, 200)).status().code() == StatusCode::kExhausted);  // two at once
  CHECK(table.take(first.id).status().code() == StatusCode::kExhausted);

  CHECK(table.abort_from(1, reason()) == 1);
  CHECK(table.size() == 1);
  CHECK(table.finish(first.id, 0, 0, 1).status().code() == StatusCode::kNotFound);
  CHECK(table.expire(59) == 0);
  REQUIRE(table.begin(second.id, 0, 0, 2).ok());
  CHECK(table.expire(60) == 1);
  CHECK(table.size() == 1);  // two pages of it are being written
  CHECK(pool.in_use() == 2);
  CHECK(table.fail(second.id, 0, 0, 2).code() == StatusCode::kCancelled);
  CHECK(table.size() == 0);
  CHECK(pool.in_use() == 0);
  CHECK_FALSE(table.reserve(kKey, {}, {}, 7).ok());  // no such tenant
  CHECK(HandoffPages::create(INT64_MAX, 2).status().code() == StatusCode::kInvalidArgument);
  CHECK(HandoffPages::create(0, 1).status().code() == StatusCode::kInvalidArgument);
}

// Against a model of what must be: every page's state, every hand-off's outcome, every block.
TEST_CASE("random operations on a table of hand-offs keep every invariant") {
  struct Model {
    std::int64_t blocks = 0;
    std::int64_t tokens = 0;
    std::int32_t source = 0;
    KvTime deadline = 0;
    bool aborted = false;
    std::set<std::pair<std::int64_t, std::int64_t>> writing, arrived;
    [[nodiscard]] bool complete() const { return std::ssize(arrived) == kLayers * blocks; }
  };
  for (const std::uint64_t written : {11U, 12U, 13U, 14U}) {
    const std::uint64_t seed = codegemm::test::seed_or(written);
    CAPTURE(seed);
    Rng rng(seed);
    Pool pool(24);
    Table table(*pool.allocator, kLayers, 6);
    std::map<HandoffId, Model> models;
    std::vector<Sequence> taken;
    HandoffId last = 0;
    KvTime now = 0;
    std::int64_t completed = 0;
    std::int64_t aborted = 0;

    const auto pick = [&]() -> std::optional<HandoffId> {
      if (models.empty()) return std::nullopt;
      return std::next(models.begin(), rng.below(std::ssize(models)))->first;
    };
    const auto drop_if_over = [&](HandoffId id) {
      if (models[id].aborted && models[id].writing.empty()) models.erase(id);
    };
    const auto expect_abort = [&](auto&& predicate) {
      std::int64_t count = 0;
      for (auto at = models.begin(); at != models.end();) {
        Model& model = at->second;
        if (predicate(at->first, model) && !model.aborted && !model.complete()) {
          model.aborted = true;
          ++count;
        }
        at = model.aborted && model.writing.empty() ? models.erase(at) : std::next(at);
      }
      aborted += count;
      return count;
    };

    for (int step = 0; step < 6000; ++step) {
      CAPTURE(step);
      ++now;
      switch (rng.below(12)) {
        case 0:
        case 1: {
          const std::int64_t length = rng.below(14);
          const auto first = static_cast<std::int32_t>(rng.below(6) * 1000);
          const HandoffTerms terms{static_cast<std::int32_t>(rng.below(3)), now + 20 + rng.below(2000)};
          const auto made = table.reserve(kKey, tokens_of(length, first), terms);
          if (std::ssize(models) == 6) REQUIRE_FALSE(made.ok());
          if (!made.ok()) {
            REQUIRE(made.status().code() == StatusCode::kExhausted);
            break;
          }
          REQUIRE(made->id > last);
          last = made->id;
          models[last] = {made->missing_blocks, length, terms.source, terms.deadline, false, {}, {}};
          break;
        }
        case 2: {
          const auto id = pick();
          if (!id || rng.below(16) != 0) break;
          const bool open = !models[*id].aborted && !models[*id].complete();
          REQUIRE(table.abort(*id, reason()) == open);
          expect_abort([&](HandoffId one, const Model&) { return one == *id; });
          break;
        }
        case 3: {
          if (rng.below(64) != 0) break;
          const auto source = static_cast<std::int32_t>(rng.below(3));
          const auto count = table.abort_from(source, reason());
          REQUIRE(count == expect_abort([&](HandoffId, const Model& m) { return m.source == source; }));
          break;
        }
        case 4: {
          const auto count = table.expire(now);
          REQUIRE(count == expect_abort([&](HandoffId, const Model& m) { return m.deadline <= now; }));
          break;
        }
        case 5: {
          const auto id = pick();
          if (!id) break;
          auto sequence = table.take(*id);
          const Model model = models[*id];
          REQUIRE(sequence.ok() == (model.complete() && !model.aborted));
          if (!sequence.ok()) {
            REQUIRE(sequence.status().code() ==
                    (model.aborted ? StatusCode::kCancelled : StatusCode::kExhausted));
            break;
          }
          ++completed;
          REQUIRE(sequence->length() == model.tokens);
          if (rng.below(2) == 0) taken.push_back(*std::move(sequence));
          models.erase(*id);
          break;
        }
        case 6:
          if (!taken.empty()) taken.erase(taken.begin() + rng.below(std::ssize(taken)));
          break;
        default: {  // pages: begin, finish or fail
          const auto id = pick();
          if (!id) break;
          Model& model = models[*id];
          const bool begins = rng.below(2) == 0;
          const bool whole = rng.below(2) == 0;
          std::int64_t layer = rng.below(kLayers);
          std::int64_t block = whole ? 0 : rng.below(model.blocks + 1);
          std::int64_t count = whole ? model.blocks : rng.below(3);
          if (!begins && !model.writing.empty() && rng.below(4) != 0) {  // one that can be ended
            std::tie(layer, block) = *std::next(model.writing.begin(), rng.below(std::ssize(model.writing)));
            count = 1;
          }
          const auto all_in = [&](const auto& set) {
            for (std::int64_t i = block; i < block + count; ++i) {
              if (!set.contains({layer, i})) return false;
            }
            return true;
          };
          const bool there = count > 0 && block + count <= model.blocks;
          const auto each = [&](auto&& body) {
            for (std::int64_t i = block; i < block + count; ++i) body(std::pair(layer, i));
          };
          if (begins) {
            bool missing = true;
            each([&](auto page) {
              missing &= !model.writing.contains(page) && !model.arrived.contains(page);
            });
            const auto begun = table.begin(*id, layer, block, count);
            REQUIRE(begun.ok() == (there && missing && !model.aborted));
            if (begun.ok()) {
              REQUIRE(std::ssize(*begun) == count);
              each([&](auto page) { model.writing.insert(page); });
            }
          } else {
            const bool good = there && all_in(model.writing);
            const bool arrives = rng.below(8) != 0;
            Status status;
            if (arrives) {
              const auto state = table.finish(*id, layer, block, count);
              status = state.status();
              if (good && !model.aborted) {
                each([&](auto page) { model.arrived.insert(page); });
                REQUIRE(state.ok());
                REQUIRE((*state == HandoffState::kComplete) == model.complete());
              }
            } else {
              status = table.fail(*id, layer, block, count);
            }
            REQUIRE(status.ok() == (good && !model.aborted));
            if (good) each([&](auto page) { model.writing.erase(page); });
            if (model.aborted && good) REQUIRE(status.code() == StatusCode::kCancelled);
            drop_if_over(*id);
          }
        }
      }
      REQUIRE(table.size() == std::ssize(models));
      const Status invariants = table.check_invariants();
      INFO(invariants.message());
      REQUIRE(invariants.ok());
      REQUIRE(pool.allocator->check_invariants().ok());
      REQUIRE(pool.allocator->stats().sequences == std::ssize(models) + std::ssize(taken));
    }
    CHECK(completed > 20);
    CHECK(aborted > 20);
    for (auto& [id, model] : models) {
      for (const auto& [layer, block] : model.writing)
        static_cast<void>(table.fail(id, layer, block, 1).ok());
      if (table.abort(id, reason())) continue;
      const auto state = table.state(id);
      if (state.ok()) CHECK(table.take(id).ok());
    }
    taken.clear();
    CHECK(table.size() == 0);
    CHECK(pool.in_use() == 0);
  }
}
