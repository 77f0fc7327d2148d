// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/trainer_test.cpp - fine-tuning on the base's cache: its loss is what serving sees,
// it learns, it resumes to the same bits, and it stops where a loss is not finite.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/train/trainer.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <support/catch.hpp>
#include <support/model_harness.hpp>
#include <support/tiny_model.hpp>
#include <support/tiny_training.hpp>

using namespace prefillshare;
using namespace prefillshare::test;
using codegemm::test::contains;
using codegemm::test::get_file;
using codegemm::test::put_file;
using codegemm::test::TemporaryFolder;

namespace {

/// The target's mean loss as serving has it: the base's cache of n - 1 tokens (or the model's own), then the
/// last prompt token and the target through the decode model.
double served_loss(const LlamaModel<DenseLinear>& base, const LlamaModel<DenseLinear>& decode,
                   const TrainingExample& example, codegemm::Executor& executor) {
  CacheHarness cache(base.config, 4);
  Sequence sequence = cache.allocator->open(CacheKey{"b", "1", ""}, {}).value();
  const std::span<const std::int32_t> prompt(example.prompt);
  if (prompt.size() > 1) run_forward(base, prompt.first(prompt.size() - 1), 0, cache, sequence, executor);
  std::vector<std::int32_t> rest{example.prompt.back()};
  rest.insert(rest.end(), example.target.begin(), example.target.end() - 1);
  const auto rows = static_cast<std::int64_t>(rest.size());
  const std::vector<float> logits = run_forward(decode, rest, rows, cache, sequence, executor);
  double sum = 0.0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* const row = logits.data() + i * base.config.vocab_size;
    double total = 0.0;
    for (std::int64_t v = 0; v < base.config.vocab_size; ++v) total += std::exp(static_cast<double>(row[v]));
    sum += std::log(total) - static_cast<double>(row[example.target[static_cast<std::size_t>(i)]]);
  }
  return sum / static_cast<double>(rows);
}

}  // namespace

TEST_CASE("the loss is the one that serving has, from the base's cache and from the own", "[train]") {
  const auto base = random_model(small_config(), 1001);
  const auto decode = random_model(small_config(), 1002);
  codegemm::ThreadPool pool(2);
  auto model = TrainableModel<float>::full(decode).value();
  const auto examples = some_examples(1003, 9);
  auto trainer = Trainer<DenseLinear>::create(model, base, examples, quick_options(), "x", pool).value();
  double whole = 0.0;
  std::int64_t tokens = 0;
  for (const TrainingExample& example : examples) {
    const double shared = trainer.evaluate({&example, 1}, 1.0).value();
    CHECK(std::abs(shared - served_loss(*base, *decode, example, pool)) <= 1e-4);
    const double own = trainer.evaluate({&example, 1}, 0.0).value();
    CHECK(std::abs(own - served_loss(*decode, *decode, example, pool)) <= 1e-4);
    whole += shared * static_cast<double>(example.target.size());
    tokens += static_cast<std::int64_t>(example.target.size());
  }
  CHECK(std::abs(trainer.evaluate(examples, 1.0).value() - whole / static_cast<double>(tokens)) <= 1e-6);
  // A share between: the first tokens from the base, the rest run by the model.
  CHECK(shared_tokens(9, 0.5) == 4);
  CHECK(shared_tokens(1, 1.0) == 0);
  CHECK(shared_tokens(5, 1.0) == 4);
}

TEST_CASE("fine-tuning on the base's cache learns a rule, and the base stays", "[train]") {
  const auto base = random_model(small_config(), 1011);
  codegemm::ThreadPool pool(2);
  for (const int kind : {0, 1}) {
    CAPTURE(kind);
    auto model = kind == 0 ? TrainableModel<float>::full(base).value()
                           : TrainableModel<float>::low_rank(base, {6, 12.0, 1}).value();
    auto trainer =
        Trainer<DenseLinear>::create(model, base, some_examples(1012, 150), quick_options(), "x", pool)
            .value();
    const auto held_out = some_examples(1013, 40);
    const double before = trainer.evaluate(held_out, 1.0).value();
    std::vector<TrainProgress> told;
    REQUIRE(trainer.run("", 0, [&](const TrainProgress& now) { told.push_back(now); }).ok());
    const double after = trainer.evaluate(held_out, 1.0).value();
    CAPTURE(before, after);
    CHECK(after < 0.6 * before);
    REQUIRE(told.size() == 60);
    CHECK(told.front().step == 1);
    CHECK(told.front().steps == 60);
    CHECK(told.front().rate < told[10].rate);
    CHECK(told.back().rate < 0.01 * told[10].rate);
    CHECK(told.back().tokens_per_second > 0.0);
    CHECK(told.back().seconds_left == 0.0);
    CHECK(told.back().loss < told.front().loss);
    CHECK(trainer.step().status().message() == "Trainer: all 60 steps are done");
    // The merged model, served from the base's cache, is what was trained.
    const auto merged = model.dense(pool).value();
    const double served = served_loss(*base, *merged, held_out[0], pool);
    CHECK(std::abs(served - trainer.evaluate({held_out.data(), 1}, 1.0).value()) <= 1e-3);
  }
}

TEST_CASE("training on the base's cache keeps what naive sharing of a fine-tuned model loses", "[train]") {
  // The prompt's first tokens decide the target, so it can only come out of the cache.
  const auto base = random_model(small_config(), 1014);
  const auto make = [](std::uint64_t seed, int count) {
    Rng rng(seed);
    std::vector<TrainingExample> out;
    for (int i = 0; i < count; ++i) {
      const auto kind = static_cast<std::int32_t>(rng.below(12));
      out.push_back({std::vector<std::int32_t>(static_cast<std::size_t>(3 + rng.below(4)), 20 + kind),
                     {(5 * kind + 1) % 12, 60}});
      out.back().prompt.push_back(59);
    }
    return out;
  };
  const auto examples = make(1015, 200);
  const auto held_out = make(1016, 40);
  codegemm::ThreadPool pool(2);
  TrainOptions options = quick_options();
  options.steps = 100;
  const auto losses = [&](double sharing) {
    auto model = TrainableModel<float>::full(base).value();
    options.sharing = sharing;
    auto trainer = Trainer<DenseLinear>::create(model, base, examples, options, "x", pool).value();
    const double before = trainer.evaluate(held_out, 1.0).value();
    REQUIRE(trainer.run("", 0).ok());
    return std::vector<double>{before, trainer.evaluate(held_out, 0.0).value(),
                               trainer.evaluate(held_out, 1.0).value()};
  };
  const std::vector<double> full = losses(0.0);
  const std::vector<double> shared = losses(1.0);
  CAPTURE(full[0], full[1], full[2], shared[0], shared[2]);
  CHECK(full[1] < 0.2 * full[0]);
  CHECK(shared[2] < 0.2 * shared[0]);
  CHECK(full[2] > 3.0 * shared[2]);  // the fully fine-tuned model on the base's cache
}

TEST_CASE("a run that was killed goes on to the same bits, with any workers", "[train]") {
  const auto base = random_model(small_config(), 1021);
  const auto examples = some_examples(1022, 13);
  TrainOptions options = quick_options();
  options.steps = 7;
  options.clip = 0.5;
  codegemm::ThreadPool one(1);
  codegemm::ThreadPool three(3);
  const TemporaryFolder folder;
  auto whole = TrainableModel<float>::full(base).value();
  auto trainer = Trainer<DenseLinear>::create(whole, base, examples, options, "x", one).value();
  const Status status = trainer.run(folder / "whole", 0);
  CAPTURE(status.message());
  REQUIRE(status.ok());
  const std::vector<float> want = values_of(whole);

  auto first = TrainableModel<float>::full(base).value();
  {
    auto half = Trainer<DenseLinear>::create(first, base, examples, options, "x", three).value();
    for (int i = 0; i < 4; ++i) REQUIRE(half.step().ok());
    REQUIRE(half.save(folder / "state").ok());
    REQUIRE(half.step().ok());  // lost
  }
  auto second = TrainableModel<float>::full(base).value();
  auto rest = Trainer<DenseLinear>::create(second, base, examples, options, "x", three).value();
  REQUIRE(rest.load(folder / "state").ok());
  CHECK(rest.steps_done() == 4);
  REQUIRE(rest.run(folder / "state", 2).ok());
  CHECK(same_bits(values_of(second), want));
  CHECK(get_file(folder / "state") == get_file(folder / "whole"));

  options.seed = 2;
  auto other = Trainer<DenseLinear>::create(second, base, examples, options, "x", one).value();
  const Status refused = other.load(folder / "state");
  CHECK(refused.code() == StatusCode::kIncompatible);
  CHECK(contains(refused.message(), "belongs to another run ('x, examples 13"));
  auto small = TrainableModel<float>::low_rank(base, {}).value();
  options.seed = 1;
  auto narrow = Trainer<DenseLinear>::create(small, base, examples, options, "x", one).value();
  CHECK(contains(narrow.load(folder / "state").message(), "is missing or of another shape"));
  put_file(folder / "broken", get_file(folder / "state").substr(0, 1000));
  CHECK(rest.load(folder / "broken").code() == StatusCode::kCorruptData);
  CHECK(same_bits(values_of(second), want));
}

TEST_CASE("a loss that is not finite stops the run at the last good step", "[train]") {
  const PoisonedRun given;
  codegemm::ThreadPool pool(2);
  const TemporaryFolder folder;
  auto model = TrainableModel<float>::full(given.poisoned).value();
  auto trainer =
      Trainer<DenseLinear>::create(model, given.base, given.examples, given.options, "x", pool).value();
  std::vector<float> last = values_of(model);
  std::int64_t good = 0;
  const Status status = trainer.run(folder / "state", 0, [&](const TrainProgress& now) {
    last = values_of(model);
    good = now.step;
  });
  CAPTURE(status.message());
  CHECK(status.code() == StatusCode::kInvalidArgument);
  CHECK(contains(status.message(), PoisonedRun::words(good)));
  CHECK(same_bits(values_of(model), last));
  REQUIRE(trainer.load(folder / "state").ok());
  CHECK(trainer.steps_done() == good);
}

TEST_CASE("what cannot be trained on is refused", "[train]") {
  const auto base = random_model(small_config(), 1041);
  codegemm::SerialExecutor serial;
  auto model = TrainableModel<float>::full(base).value();
  const auto refusal = [&](const std::vector<TrainingExample>& examples, const TrainOptions& options,
                           const std::shared_ptr<const LlamaModel<DenseLinear>>& on) {
    return Trainer<DenseLinear>::create(model, on, examples, options, "x", serial).status().message();
  };
  const TrainOptions good = quick_options();
  CHECK(refusal({{{1}, {2}}, {{1}, {}}}, good, base) == "example 1: the target is empty");
  CHECK(refusal({{{}, {2}}}, good, base) == "example 0: the prompt is empty");
  CHECK(refusal({{{1, 2, 3, 4, 5, 6, 7}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}}}, good, base) ==
        "example 0: prompt and target have 7 + 10 tokens, at most 16 are allowed");
  CHECK(refusal({{{1}, {61}}}, good, base) == "example 0: token 61, the vocabulary has 61");
  CHECK(refusal({}, good, base) == "Trainer: no examples");
  ModelConfig other = small_config();
  other.layers = 3;
  CHECK(contains(refusal({{{1}, {2}}}, good, random_model(other, 1042)),
                 "does not fit the base's cache: layers: base 3, decode 2"));
  TrainOptions bad = good;
  bad.sharing = 1.5;
  CHECK(refusal({{{1}, {2}}}, bad, base) == "TrainOptions::sharing is 1.5, must be in 0..1");
  bad = good;
  bad.batch = 0;
  CHECK(refusal({{{1}, {2}}}, bad, base) == "TrainOptions::batch is 0, must be 1 or more");
}

TEST_CASE("AdamW is the published update, and rates and packs are as said", "[train]") {
  ParameterList<float> list;
  Parameter<float>& p = prefillshare::detail::add_parameter(list, "w", {3}, true);
  const double start[] = {1.0, -2.0, 0.5};
  std::copy_n(start, 3, p.value.data());
  AdamWOptions options;
  AdamW<float> optimizer(list, options);
  codegemm::SerialExecutor serial;
  double x[] = {1.0, -2.0, 0.5};
  double m[3] = {};
  double v[3] = {};
  for (int step = 1; step <= 5; ++step) {
    for (int i = 0; i < 3; ++i) {
      const double g = 0.1 * (i + 1) * (step % 2 == 0 ? -1.0 : 2.0);
      p.gradient[i] = static_cast<float>(g);
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.999 * v[i] + 0.001 * g * g;
      const double mean = m[i] / (1.0 - std::pow(0.9, step));
      const double square = v[i] / (1.0 - std::pow(0.999, step));
      x[i] -= 0.01 * (mean / (std::sqrt(square) + 1e-8) + 0.1 * x[i]);
    }
    optimizer.update(list, 0.01, {}, serial);
  }
  for (int i = 0; i < 3; ++i) CHECK(std::abs(static_cast<double>(p.value[i]) - x[i]) <= 1e-5);

  CHECK(rate_share(RateSchedule::kConstant, 0, 100, 0.1) == 0.1);
  CHECK(rate_share(RateSchedule::kConstant, 99, 100, 0.1) == 1.0);
  CHECK(rate_share(RateSchedule::kCosine, 10, 100, 0.1) == 1.0);
  CHECK(std::abs(rate_share(RateSchedule::kCosine, 55, 100, 0.1) - 0.5) <= 1e-12);
  CHECK(rate_share(RateSchedule::kCosine, 0, 1, 0.0) == 1.0);

  const std::int64_t rows[] = {3, 9, 5, 4, 12, 1};
  const auto packs = pack_by_length(rows, 10);
  REQUIRE(packs.size() == 4);
  CHECK(packs[0] == std::vector<std::size_t>{4});
  CHECK(packs[1] == std::vector<std::size_t>{1, 5});
  CHECK(packs[2] == std::vector<std::size_t>{2, 3});
  CHECK(packs[3] == std::vector<std::size_t>{0});
}
