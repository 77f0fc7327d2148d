// SPDX-License-Identifier: Apache-2.0
//
// The paper's loop on small models: shared prefill, selective decode, hand-back, against the double
// reference.

#include <cstdint>
#include <vector>

#include <prefillshare/serve/session.hpp>
#include <support/catch.hpp>
#include <support/model_harness.hpp>
#include <support/tiny_model.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::test;

constexpr double kTolerance = 2e-5;  // as in forward_test.cpp

using DenseSession = SessionHarness<DenseLinear, DenseLinear>;

}  // namespace

TEST_CASE("a decode module reads the base's cache: equations 5 and 6 in double") {
  const ModelConfig config = tiny_config();
  const auto base = random_model(config, codegemm::test::seed_or(1));
  const auto task = random_model(config, codegemm::test::seed_or(2));
  codegemm::SerialExecutor serial;
  for (const std::int64_t length : {1, 2, 16, 17, 18, 45}) {
    CAPTURE(length);
    Rng rng(static_cast<std::uint64_t>(length));
    const std::vector<std::int32_t> prompt = random_tokens(rng, length, config.vocab_size);
    DenseSession harness(base, task, 16, 128, 12, serial);
    harness.session.append(prompt);

    // The base covers all but the last token; that one, and every answer token, is the task's.
    std::vector<ReferenceCache> cache;
    static_cast<void>(reference_forward(*base, std::span(prompt).first(prompt.size() - 1), cache));
    std::int32_t token = prompt.back();
    std::int64_t steps = 0;
    const Result<Generation> made = harness.session.decode(
        harness.decode, harness.decode_workspace, DecodeLimits{12, {}},
        [&](std::span<float> logits) {
          const auto want = reference_forward(*task, std::span(&token, 1), cache);
          CHECK(worst_relative(logits, want) < kTolerance);
          ++steps;
          return token = argmax(logits);
        },
        [](std::int32_t) { return true; });
    REQUIRE(made.ok());
    CHECK(steps == 12);
    CHECK(made->tokens.size() == 12);
    CHECK(made->prefilled_tokens == length - 1);
  }
}

TEST_CASE("with a decode module that is the base, shared prefill is the ordinary model") {
  const ModelConfig config = tiny_config();
  const auto model = random_model(config, codegemm::test::seed_or(3));
  codegemm::ThreadPool pool(2);
  for (const std::int64_t length : {1, 7, 32, 33, 100}) {
    CAPTURE(length);
    Rng rng(static_cast<std::uint64_t>(length) + 77);
    const std::vector<std::int32_t> prompt = random_tokens(rng, length, config.vocab_size);
    DenseSession harness(model, model, 16, 256, 24, pool);
    harness.session.append(prompt);
    const Result<Generation> made = harness.greedy(64);
    REQUIRE(made.ok());
    CHECK(made->tokens == generate_unshared(*model, prompt, 64, pool));
  }
}

TEST_CASE("turn after turn the base prefills just what is new, and answers change nothing but by append") {
  const ModelConfig config = tiny_config();
  const auto base = random_model(config, codegemm::test::seed_or(4));
  const auto task = random_model(config, codegemm::test::seed_or(5));
  codegemm::SerialExecutor serial;
  DenseSession harness(base, task, 32, 256, 24, serial);
  Rng rng(6);
  std::vector<std::int32_t> all;
  std::int64_t covered = 0;
  for (const std::int64_t added : {40, 1, 9, 16, 3}) {
    const std::vector<std::int32_t> prompt = random_tokens(rng, added, config.vocab_size);
    all.insert(all.end(), prompt.begin(), prompt.end());
    harness.session.append(prompt);
    const Result<Generation> made = harness.greedy(5);
    REQUIRE(made.ok());
    CHECK(made->prefilled_tokens == static_cast<std::int64_t>(all.size()) - 1 - covered);
    CHECK(made->reused_tokens == covered);
    covered = static_cast<std::int64_t>(all.size()) - 1;
    CHECK(harness.session.cached_tokens() == covered);

    // The same context in a session of its own, from nothing, gives the same answer.
    DenseSession fresh(base, task, 256, 256, 24, serial);
    fresh.session.append(all);
    const Result<Generation> again = fresh.greedy(5);
    REQUIRE(again.ok());
    CHECK(again->tokens == made->tokens);

    all.insert(all.end(), made->tokens.begin(), made->tokens.end());
    harness.session.append(made->tokens);
    // The call's private tail is gone: what is in use is the base cache alone.
    CHECK(harness.cache.allocator->stats().in_use_blocks == (covered + 15) / 16);
    CHECK(harness.cache.allocator->check_invariants().ok());
  }
}

TEST_CASE("a second session on the same document finds its prefill in the tree") {
  const ModelConfig config = tiny_config();
  const auto base = random_model(config, codegemm::test::seed_or(7));
  const auto task = random_model(config, codegemm::test::seed_or(8));
  codegemm::SerialExecutor serial;
  DenseSession first(base, task, 64, 256, 24, serial);
  Rng rng(9);
  std::vector<std::int32_t> prompt = random_tokens(rng, 70, config.vocab_size);
  first.session.append(prompt);
  REQUIRE(first.greedy(3).ok());

  prompt.back() = (prompt.back() + 1) % 61;  // same document, other question
  // [guide: session]
  SharedSession<DenseLinear> second(first.base, first.resources());
  second.append(prompt);
  const Result<Generation> made = second.decode(
      first.decode, first.decode_workspace, DecodeLimits{4, {}},
      [](std::span<float> logits) { return argmax(logits); }, [](std::int32_t) { return true; });
  REQUIRE(made.ok());
  CHECK(made->reused_tokens == 64);
  CHECK(made->prefilled_tokens == 5);
  // [guide: end]

  DenseSession fresh(base, task, 64, 256, 24, serial);
  fresh.session.append(prompt);
  CHECK(fresh.greedy(4)->tokens == made->tokens);

  // Another tenant's session, on the same tokens, finds nothing.
  const PrefillModule<DenseLinear> other(base, CacheKey{"base", "1", "tenant"});
  SharedSession<DenseLinear> third(other, first.resources());
  third.append(prompt);
  CHECK(third.prefill().value() == 69);
}

TEST_CASE("a call ends by its limits, a stop token, the caller, or the last block, and gives its tail back") {
  const ModelConfig config = tiny_config();
  const auto model = random_model(config, codegemm::test::seed_or(10));
  codegemm::SerialExecutor serial;
  DenseSession harness(model, model, 32, 256, 4, serial);  // 64 tokens
  Rng rng(11);
  const std::vector<std::int32_t> prompt = random_tokens(rng, 33, config.vocab_size);
  harness.session.append(prompt);
  const auto decode = [&](const DecodeLimits& limits, auto&& on_token) {
    return harness.session.decode(
        harness.decode, harness.decode_workspace, limits,
        [](std::span<float> logits) { return argmax(logits); }, on_token);
  };
  const auto always = [](std::int32_t) { return true; };
  const std::vector<std::int32_t> full = decode({8, {}}, always)->tokens;
  REQUIRE(full.size() == 8);

  const Result<Generation> none = decode({0, {}}, always);
  CHECK((none.ok() && none->tokens.empty() && !none->stopped));

  const std::int32_t stop[] = {full[3]};
  const auto first = static_cast<std::size_t>(std::find(full.begin(), full.end(), stop[0]) - full.begin());
  const Result<Generation> stopped = decode({8, stop}, always);
  CHECK(stopped->stopped);
  CHECK(stopped->tokens ==
        std::vector<std::int32_t>(full.begin(), full.begin() + static_cast<std::ptrdiff_t>(first)));

  const Result<Generation> cancelled = decode({8, {}}, [](std::int32_t) { return false; });
  CHECK((cancelled->stopped && cancelled->tokens.size() == 1));

  const Result<Generation> exhausted = decode({200, {}}, always);
  CHECK(exhausted.status().code() == StatusCode::kExhausted);
  CHECK(harness.cache.allocator->stats().in_use_blocks == 2);
  CHECK(decode({8, {}}, always)->tokens == full);

  SharedSession<DenseLinear> empty(harness.base, harness.resources());
  CHECK(empty.prefill().status().code() == StatusCode::kInvalidArgument);
}
