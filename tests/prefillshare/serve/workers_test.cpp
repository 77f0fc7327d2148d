// SPDX-License-Identifier: Apache-2.0
//
// Prefill and decode workers on tiny models: many requests at once get what each would get alone, through one
// pool and through hand-offs between two; what cannot be served says why; every block comes back.
#include <prefillshare/serve/decode_order.hpp>
#include <prefillshare/serve/prefix_groups.hpp>
#include <prefillshare/serve/transport.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <support/catch.hpp>
#include <support/serve_harness.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::test;
using Kind = DecodeEvent::Kind;

const auto kIgnorePages = [](const PagesReady&) { return Status(); };

std::vector<std::int32_t> base_of(const std::vector<std::int32_t>& context) {
  return {context.begin(), context.end() - 1};
}

DecodeRequest request_of(std::uint64_t id, ModuleId module, const std::vector<std::int32_t>& context,
                         std::int64_t max_tokens) {
  DecodeRequest request;
  request.id = id;
  request.module = module;
  request.last_token = context.back();
  request.max_tokens = max_tokens;
  return request;
}

PrefillJob job_of(std::uint64_t id, std::vector<std::int32_t> tokens, KvTime deadline = kKvNever) {
  PrefillJob job;
  job.id = id;
  job.tokens = std::move(tokens);
  job.deadline = deadline;
  return job;
}

// By how much of all logits' spread the largest leads the next.
float lead_of(std::span<const float> logits) {
  const auto best = std::ranges::max_element(logits);
  float next = *std::ranges::min_element(logits);
  const float least = next;
  for (auto i = logits.begin(); i != logits.end(); ++i) {
    if (i != best) next = std::max(next, *i);
  }
  return (*best - next) / (*best - least);
}

}  // namespace

TEST_CASE("many requests on three modules and one pool get what each gets alone") {
  const ModelConfig config = lined_config();
  const auto base = random_model(config, codegemm::test::seed_or(1));
  const auto task = random_model(config, codegemm::test::seed_or(2));
  const auto codes = random_codes(*base, codegemm::test::seed_or(3));
  codegemm::ThreadPool pool(2);
  PrefillSide prefill(base, 200, {48, 3, 64}, pool);
  // [guide: modules]
  DecodeWorker decode(*prefill.cache.allocator, prefill.cache.storage, pool, 64);
  REQUIRE(decode.add_module(factorize(prefill.base, base).value(), 4, 256).value() == 0);
  REQUIRE(decode.add_module(factorize(prefill.base, task).value(), 4, 256).value() == 1);
  REQUIRE(decode.add_module(factorize(prefill.base, codes).value(), 8, 256).value() == 2);
  // [guide: end]

  Rng rng(4);
  std::map<std::uint64_t, std::vector<std::int32_t>> contexts;
  for (std::uint64_t id = 0; id < 18; ++id) {
    // Some share a beginning, one has nothing for the base to do.
    contexts[id] = random_tokens(rng, id == 5 ? 1 : 2 + rng.below(90), config.vocab_size);
    if (id > 9 && contexts[id - 7].size() > 40) {
      std::copy_n(contexts[id - 7].begin(), 40, contexts[id].insert(contexts[id].begin(), 40, 0));
    }
    REQUIRE(prefill.worker.submit(job_of(id, base_of(contexts[id]))).ok());
  }
  Answers answers;
  std::map<std::uint64_t, std::vector<float>> leads;
  const auto greedy = [&leads](std::uint64_t id, std::span<float> logits) {
    leads[id].push_back(lead_of(logits));
    return argmax(logits);
  };
  std::map<std::uint64_t, int> done;
  std::int64_t computed = 0;
  for (KvTime now = 0; now < 400 && (answers.by_id.size() < 18 || decode.active() > 0); ++now) {
    // [guide: serve]
    computed += prefill.worker.step(now, kIgnorePages, [&](PrefillResult&& result) {
      INFO(result.status.message());
      REQUIRE(result.status.ok());
      ++done[result.id];
      const auto& context = contexts[result.id];
      REQUIRE(result.cache.length() == std::ssize(context) - 1);
      REQUIRE(result.computed_tokens + result.reused_tokens == result.cache.length());
      const auto request = request_of(result.id, static_cast<ModuleId>(result.id % 3), context, 20);
      REQUIRE(decode.start(request, result.cache).ok());
    });
    decode.step(now, greedy, [&](const DecodeEvent& event) { answers(event); });
    // [guide: end]
  }
  CHECK(prefill.worker.idle());
  CHECK(computed > 0);
  REQUIRE(answers.by_id.size() == 18);
  int ties = 0;
  for (const auto& [id, answer] : answers.by_id) {
    CAPTURE(id);
    CHECK(done[id] == 1);
    CHECK((answer.ends == 1 && answer.last.kind == Kind::kLength));
    const auto& context = contexts[id];
    const auto want = id % 3 == 0   ? alone(base, base, context, 20, pool)
                      : id % 3 == 1 ? alone(base, task, context, 20, pool)
                                    : alone(base, codes, context, 20, pool);
    // A token of codes alone and one of a batch are multiplied in different ways, each rounded by up to 1e-3
    // of a product: what two tokens lead by less than that makes of them is no fault, and what follows is
    // another text.
    const auto [ours, theirs] = std::ranges::mismatch(answer.tokens, want);
    if (ours == answer.tokens.end()) continue;
    const auto at = static_cast<std::size_t>(ours - answer.tokens.begin());
    CAPTURE(at, answer.tokens, want, leads[id][at]);
    CHECK((id % 3 == 2 && leads[id][at] < 2e-3F));
    ++ties;
  }
  CHECK(ties <= 1);
  CHECK(prefill.in_use() == 0);
  CHECK(prefill.cache.allocator->check_invariants().ok());
}

TEST_CASE("pages are announced once each, before the job ends, and a second pool decodes from the copies") {
  const ModelConfig config = lined_config();
  const auto base = random_model(config, codegemm::test::seed_or(11));
  const auto task = random_model(config, codegemm::test::seed_or(12));
  codegemm::SerialExecutor serial;
  for (const std::int64_t chunk : {7, 16, 40, 256}) {
    CAPTURE(chunk);
    PrefillSide prefill(base, 64, {chunk, 2, 64}, serial);
    CacheHarness far(config, 48);
    HandoffTable<> table(*far.allocator, config.layers, 8);
    LocalTransport transport(table, far.storage);
    DecodeWorker decode(*far.allocator, far.storage, serial, 8);
    REQUIRE(decode.add_module(factorize(prefill.base, task).value(), 8, 256).ok());
    Rng rng(13);
    std::vector<std::int32_t> context = random_tokens(rng, 50, config.vocab_size);
    Sequence session;
    KvTime now = 0;
    // Four turns of a growing context; the far pool has the whole blocks of the turns before.
    for (std::uint64_t turn = 0; turn < 4; ++turn) {
      CAPTURE(turn);
      const std::vector<std::int32_t> tokens = base_of(context);
      const HandoffGrant grant = table.reserve(kBaseKey, tokens).value();
      CHECK((turn == 0) == (grant.cached_tokens == 0));
      PrefillJob job = job_of(turn, tokens);
      job.cache = std::move(session);
      job.pages_from = grant.cached_tokens;
      const Status submitted = prefill.worker.submit(std::move(job));
      REQUIRE(submitted.ok());
      std::set<std::pair<int, std::int64_t>> seen;
      std::optional<Sequence> cache;
      std::int64_t steps = 0;
      while (!cache) {
        prefill.worker.step(
            now++,
            [&](const PagesReady& pages) {
              REQUIRE_FALSE(cache);
              for (std::int64_t i = 0; i < std::ssize(pages.blocks); ++i) {
                REQUIRE(seen.insert({pages.layer, pages.first_block + i}).second);
              }
              // [guide: announce]
              return transport.send(prefill.cache.storage,
                                    {grant.id, pages.layer, pages.first_block - grant.cached_tokens / 16,
                                     pages.blocks, pages.last_tokens});
              // [guide: end]
            },
            [&](PrefillResult&& result) {
              INFO(result.status.message());
              REQUIRE(result.status.ok());
              cache = std::move(result.cache);
            });
        ++steps;
      }
      if (turn == 0) CHECK(steps >= (std::ssize(tokens) + chunk - 1) / chunk);
      CHECK(std::ssize(seen) == grant.missing_blocks * config.layers);
      session = std::move(*cache);
      const Sequence received = table.take(grant.id).value();
      REQUIRE(received.length() == std::ssize(tokens));
      REQUIRE(decode.start(request_of(turn, 0, context, 9), received).ok());
      Answers answers;
      while (decode.active() > 0) decode.step(now++, greedy, [&](const DecodeEvent& e) { answers(e); });
      CHECK(answers.by_id[turn].tokens == alone(base, task, context, 9, serial));
      context.insert(context.end(), answers.by_id[turn].tokens.begin(), answers.by_id[turn].tokens.end());
      const auto more = random_tokens(rng, 1 + rng.below(30), config.vocab_size);
      context.insert(context.end(), more.begin(), more.end());
    }
    CHECK(table.size() == 0);
    CHECK(far.allocator->stats().in_use_blocks == 0);
    session.reset();
    CHECK(prefill.in_use() == 0);
  }
}

TEST_CASE(
    "a prefill worker: back-pressure, limits, cancel, deadline, a sink that fails; all blocks come back") {
  const ModelConfig config = lined_config();
  const auto base = random_model(config, 21);
  codegemm::SerialExecutor serial;
  PrefillSide side(base, 8, {16, 2, 3}, serial);
  Rng rng(22);
  const auto tokens = [&](std::int64_t count) { return random_tokens(rng, count, config.vocab_size); };
  std::map<std::uint64_t, PrefillResult> results;
  const auto keep = [&](PrefillResult&& result) {
    REQUIRE_FALSE(results.contains(result.id));
    results[result.id] = std::move(result);
  };
  const auto code_of = [&](std::uint64_t id) { return results.at(id).status.code(); };

  CHECK(side.worker.submit(job_of(0, tokens(257))).code() ==
        StatusCode::kInvalidArgument);  // the context's limit
  CHECK(side.worker.submit(job_of(0, tokens(129))).code() == StatusCode::kInvalidArgument);  // the pool's
  CHECK(side.worker.submit(job_of(0, {1, 61})).code() == StatusCode::kInvalidArgument);
  REQUIRE(side.worker.submit(job_of(1, tokens(100))).ok());  // 7 of 8 blocks
  REQUIRE(side.worker.submit(job_of(2, tokens(30))).ok());
  REQUIRE(side.worker.submit(job_of(3, tokens(5))).ok());
  PrefillJob fourth = job_of(4, tokens(5));
  const Status refused = side.worker.submit(std::move(fourth));
  CHECK(refused.code() == StatusCode::kExhausted);
  const std::size_t left = fourth.tokens.size();  // NOLINT(bugprone-use-after-move): still the caller's
  CHECK(left == 5);

  CHECK(side.worker.step(0, kIgnorePages, keep) == 16);
  CHECK((side.worker.running() == 1 &&
         side.worker.waiting() == 2));  // 30 tokens wait for blocks, 5 behind them
  CHECK(side.worker.cancel(1));
  CHECK_FALSE(side.worker.cancel(1));
  CHECK_FALSE(side.worker.cancel(99));
  side.worker.step(1, kIgnorePages, keep);
  CHECK(code_of(1) == StatusCode::kCancelled);
  CHECK(results[1].cache.length() == 16);  // what was done stays usable
  results[1].cache.reset();
  for (KvTime now = 2; !side.worker.idle() && now < 20; ++now) side.worker.step(now, kIgnorePages, keep);
  CHECK((code_of(2) == StatusCode::kOk && code_of(3) == StatusCode::kOk));
  CHECK(side.in_use() == 3);

  // The caller holds what is done: the next waits until it lets go, and says so by computing nothing.
  REQUIRE(side.worker.submit(job_of(5, tokens(128))).ok());
  CHECK(side.worker.step(30, kIgnorePages, keep) == 0);
  CHECK((side.worker.waiting() == 1 && side.in_use() == 3));
  results[2].cache.reset();
  results[3].cache.reset();
  CHECK(side.worker.step(31, kIgnorePages, keep) == 16);
  REQUIRE(side.worker.submit(job_of(6, tokens(3), 40)).ok());
  for (KvTime now = 32; !side.worker.idle() && now < 60; ++now) side.worker.step(now, kIgnorePages, keep);
  CHECK(code_of(5) == StatusCode::kOk);
  results[5].cache.reset();
  CHECK(results.contains(6));

  REQUIRE(side.worker.submit(job_of(7, tokens(40), 70)).ok());
  REQUIRE(side.worker.submit(job_of(8, tokens(20))).ok());
  const auto failing = [&](const PagesReady& pages) {
    return pages.job == 8 ? error(StatusCode::kIoError, "the wire is cut") : Status();
  };
  side.worker.step(60, failing, keep);
  side.worker.step(61, failing, keep);
  CHECK(code_of(8) == StatusCode::kIoError);
  CHECK_FALSE(results.contains(7));
  side.worker.step(70, failing, keep);
  CHECK(code_of(7) == StatusCode::kCancelled);
  CHECK(results[7].status.message().find("deadline") != std::string::npos);
  CHECK(side.worker.idle());
  results.clear();
  CHECK(side.in_use() == 0);
  CHECK(side.cache.allocator->check_invariants().ok());
  CHECK(PrefillWorker<DenseLinear>::create(side.base, *side.cache.allocator, side.cache.storage,
                                           ForwardWorkspace::create(*base, 1, 8, 1).value(), serial,
                                           {0, 1, 1})
            .status()
            .code() == StatusCode::kInvalidArgument);
}

TEST_CASE("a decode worker: what it refuses, how answers end, and that every block comes back") {
  const ModelConfig config = lined_config();
  const auto model = random_model(config, 31);
  codegemm::SerialExecutor serial;
  PrefillSide side(model, 10, {64, 2, 8}, serial);
  DecodeWorker decode(*side.cache.allocator, side.cache.storage, serial, 3);
  REQUIRE(decode.add_module(factorize(side.base, model).value(), 2, 128).ok());
  Rng rng(32);
  const auto context = random_tokens(rng, 40, config.vocab_size);
  std::optional<Sequence> base;
  REQUIRE(side.worker.submit(job_of(1, base_of(context))).ok());
  side.worker.step(0, kIgnorePages, [&](PrefillResult&& result) { base = std::move(result.cache); });
  REQUIRE(base);

  const auto code = [&](const DecodeRequest& request) { return decode.start(request, *base).code(); };
  CHECK(code(request_of(1, 1, context, 4)) == StatusCode::kNotFound);
  CHECK(code(request_of(1, -1, context, 4)) == StatusCode::kNotFound);
  CHECK(code(request_of(1, 0, context, 0)) == StatusCode::kInvalidArgument);
  CHECK(code(request_of(1, 0, context, 90)) == StatusCode::kInvalidArgument);  // 39 + 90 > 128
  // 39 + 121 tokens fill the pool's ten blocks, and a copy of the base's last one is to be had too.
  DecodeWorker wide(*side.cache.allocator, side.cache.storage, serial, 3);
  REQUIRE(wide.add_module(factorize(side.base, model).value(), 2, 256).ok());
  CHECK(wide.start(request_of(1, 0, context, 121), *base).code() == StatusCode::kInvalidArgument);
  CHECK(wide.start(request_of(1, 0, context, 105), *base).ok());
  CHECK(wide.cancel(1));
  wide.step(0, greedy, [](const DecodeEvent& event) { CHECK(event.kind == Kind::kFailed); });
  CHECK(code(request_of(1, 0, context, INT64_MAX)) == StatusCode::kInvalidArgument);
  DecodeRequest bad = request_of(1, 0, context, 4);
  bad.last_token = 61;
  CHECK(code(bad) == StatusCode::kInvalidArgument);
  ModelConfig other = config;
  other.layers = 3;
  const auto misfit = factorize(other, random_model(other, 1)).value();  // fits another base
  CHECK(decode.add_module(misfit, 2, 128).status().code() == StatusCode::kIncompatible);
  CHECK(decode.active() == 0);
  CHECK(side.in_use() == 3);

  const auto full = alone(model, model, context, 60, serial);
  REQUIRE(code(request_of(1, 0, context, 60)) == StatusCode::kOk);  // 5 blocks of its own: 2 are left
  CHECK(code(request_of(1, 0, context, 5)) == StatusCode::kInvalidArgument);  // its id
  CHECK(code(request_of(2, 0, context, 60)) == StatusCode::kExhausted);
  DecodeRequest stopping = request_of(3, 0, context, 9);
  stopping.stop_tokens = {full[4]};
  const auto stop_at = std::find(full.begin(), full.end(), full[4]) - full.begin();
  REQUIRE(code(stopping) == StatusCode::kOk);
  CHECK(code(request_of(4, 0, context, 60)) == StatusCode::kExhausted);
  Answers answers;
  const auto step = [&](KvTime now) { decode.step(now, greedy, [&](const DecodeEvent& e) { answers(e); }); };
  for (KvTime now = 1; now < 8; ++now) step(now);
  CHECK(answers.by_id[3].last.kind == Kind::kStopped);
  CHECK(answers.by_id[3].tokens == std::vector<std::int32_t>(full.begin(), full.begin() + stop_at));
  DecodeRequest late = request_of(5, 0, context, 9);
  late.deadline = 10;
  REQUIRE(code(late) == StatusCode::kOk);
  for (KvTime now = 8; now < 12; ++now) step(now);
  CHECK(answers.by_id[5].last.status.code() == StatusCode::kCancelled);
  CHECK(answers.by_id[5].last.status.message().find("deadline") != std::string::npos);
  CHECK(answers.by_id[5].tokens == std::vector<std::int32_t>(full.begin(), full.begin() + 2));
  base.reset();  // the fork holds what it needs
  CHECK(decode.cancel(1));
  CHECK_FALSE(decode.cancel(1));
  step(12);
  CHECK(answers.by_id[1].last.status.code() == StatusCode::kCancelled);
  CHECK(answers.by_id[1].tokens == std::vector<std::int32_t>(full.begin(), full.begin() + 11));
  for (const auto& [id, answer] : answers.by_id) CHECK(answer.ends == 1);
  CHECK(decode.active() == 0);
  CHECK(side.in_use() == 0);
  CHECK(side.cache.allocator->check_invariants().ok());
}

TEST_CASE("sequences that begin with the same blocks are put beside each other") {
  CacheHarness cache(tiny_config(), 64, 4);
  Rng rng(17);
  const auto prompt = random_tokens(rng, 23, 61);
  const auto other = random_tokens(rng, 9, 61);
  const auto open = [&](std::vector<std::int32_t> tokens, std::int64_t own) {
    const auto more = random_tokens(rng, own, 61);
    tokens.insert(tokens.end(), more.begin(), more.end());
    Sequence out = cache.allocator->open(CacheKey{"base", "1", ""}, tokens).value();
    const auto rest = std::span<const std::int32_t>(tokens).subspan(static_cast<std::size_t>(out.length()));
    REQUIRE(cache.allocator->reserve(out, std::ssize(rest)).ok());
    REQUIRE(cache.allocator->commit(out, rest).ok());
    return out;
  };
  const Sequence a = open(prompt, 0);
  const Sequence b = open(other, 3);
  const Sequence c = open(prompt, 30);
  Sequence d = cache.allocator->fork(c).value();  // all of c's whole blocks, and an answer of its own
  REQUIRE(cache.allocator->append_private(d, 5).ok());
  const Sequence e = open({}, 8);
  const std::vector<const Sequence*> batch{&a, &b, &c, &e, &d};
  PrefixGroups groups;
  // 20 of the prompt's 23 tokens lie in whole blocks of four.
  REQUIRE(groups.find(batch, 4, 20));
  std::vector<std::size_t> at(batch.size());
  for (std::size_t i = 0; i < batch.size(); ++i) at[groups.order()[i]] = i;
  CHECK((at[2] == at[0] + 1 && at[4] == at[0] + 2));  // in the batch's order
  REQUIRE((groups.pages().size() == 3 && groups.indptr().size() == 4 && groups.indptr().back() == 5));
  for (std::size_t g = 0; g < 3; ++g) {
    const bool prompts = groups.indptr()[g] == static_cast<std::int32_t>(at[0]);
    CHECK(groups.indptr()[g + 1] - groups.indptr()[g] == (prompts ? 3 : 1));
    CHECK(groups.pages()[g] == (prompts ? 5 : 0));
  }
  CHECK_FALSE(groups.find(batch, 4, 21));
  CHECK((groups.pages().empty() && groups.indptr().size() == 1));
  CHECK(std::is_sorted(groups.order().begin(), groups.order().end()));
  // Of the two that share more.
  const std::vector<const Sequence*> two{&d, &b, &c};
  REQUIRE(groups.find(two, 4, 21));
  CHECK(*std::max_element(groups.pages().begin(), groups.pages().end()) == 13);  // 52 of c's 53 tokens
  const std::vector<const Sequence*> same{&c, &c};
  REQUIRE(groups.find(same, 4, 1));
  CHECK(groups.pages()[0] == 13);
  CHECK_FALSE(groups.find({}, 4, 1));
}

TEST_CASE("the module with the most answers is next, and none waits for ever") {
  using Counts = std::vector<std::int64_t>;
  LargestBatchFirst order(0.5, 0.0);
  CHECK(order.next(Counts{}) == 0);
  CHECK(order.next(Counts{0, 0, 0}) == 3);
  CHECK(order.next(Counts{2, 5, 5}) == 1);
  CHECK(order.next(Counts{2, 5, 5}) == 2);  // it has waited
  CHECK(order.next(Counts{2, 5, 5}) == 1);
  std::vector<int> turns(3);
  for (int i = 0; i < 100; ++i) ++turns.at(order.next(Counts{1, 8, 3}));
  CHECK((turns[1] > turns[2] && turns[2] > turns[0] && turns[0] > 2));
  LargestBatchFirst never(0.0);
  for (int i = 0; i < 100; ++i) CHECK(never.next(Counts{1, 2}) == 1);
  // What has nothing to do does not wait.
  LargestBatchFirst idle(1.0, 0.0);
  for (int i = 0; i < 50; ++i) CHECK(idle.next(Counts{0, 1}) == 1);
  CHECK(idle.next(Counts{1, 3}) == 1);
  // Who has begun goes on until another has more than two more, or has waited for long.
  LargestBatchFirst held(0.1, 2.0);
  CHECK(held.next(Counts{3, 4, 0}) == 1);
  CHECK(held.next(Counts{5, 4, 0}) == 1);
  CHECK(held.next(Counts{6, 4, 0}) == 0);
  int kept = 0;
  while (held.next(Counts{4, 4, 0}) == 0) ++kept;
  CHECK((kept >= 18 && kept <= 21));
  // Its turn is over when it has nothing left.
  CHECK(held.next(Counts{1, 0, 0}) == 0);
}
