// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/trainer_gpu_test.cu - runs of the trainer on the GPU against the CPU's, step by
// step, their bits, and answers of what they train.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/train/cuda/generator.cuh>
#include <prefillshare/train/cuda/trainer.cuh>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <prefillshare/train/trainer.hpp>
#include <support/catch.hpp>

#include "gpu_training.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::TemporaryFolder;
using cuda::Activations;
using cuda::DeviceGenerator;
using cuda::DeviceTrainable;
using cuda::DeviceTrainer;
using cuda::DeviceTrainPass;

}  // namespace

TEST_CASE("fine-tuning in fp32 on the GPU takes the CPU's steps", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  const auto base = random_model(small_config(), 1011);
  const auto held_out = some_examples(1013, 40);
  codegemm::ThreadPool pool(2);
  for (const Kind kind : {Kind::kFull, Kind::kLowRank, Kind::kCodebooks}) {
    for (const double sharing : {0.0, 0.5, 1.0}) {
      TrainOptions options = quick_options();
      options.steps = 5;
      options.sharing = sharing;
      options.clip = 1.0;
      options.adam.epsilon = 1e-4;  // or gradients of nearly 0 decide the direction of a step
      const auto examples = some_examples(1012, 19);
      auto here = trainable<float>(base, kind);
      auto there = trainable<float>(base, kind);
      auto cpu = Trainer<DenseLinear>::create(here, base, examples, options, "x", pool).value();
      auto gpu = DeviceTrainer<float>::create(there, on_device<float>(*base, device, stream.get), examples,
                                              options, "x", device, stream.get);
      require_ok(gpu.status());
      CAPTURE(static_cast<int>(kind), sharing);
      for (const double judged : {0.0, 0.3, 1.0}) {
        CHECK(std::abs(gpu->evaluate(held_out, judged).value() - cpu.evaluate(held_out, judged).value()) <=
              1e-4);
      }
      for (int step = 0; step < 5; ++step) {
        const TrainProgress want = cpu.step().value();
        const auto got = gpu->step();
        require_ok(got.status());
        CAPTURE(step, want.loss, got->loss);
        CHECK(std::abs(got->loss - want.loss) <= 1e-3);
        CHECK(got->rate == want.rate);
      }
      require_ok(gpu->download());
      double off = 0.0;
      double size = 0.0;
      const std::vector<float> a = values_of(here);
      const std::vector<float> b = values_of(there);
      for (std::size_t i = 0; i < a.size(); ++i) {
        off += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
        size += std::pow(static_cast<double>(a[i]), 2);
      }
      CAPTURE(off, size);
      CHECK(std::sqrt(off) <= 1e-3 * std::sqrt(size));
      std::printf("fp32, kind %d, sharing %.1f: parameters off by %.2g\n", static_cast<int>(kind), sharing,
                  std::sqrt(off / size));
    }
  }
}

TEST_CASE("fine-tuning in bf16 on the GPU learns a rule from the base's cache", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  const auto base = random_model(small_config(), 1011);
  const auto held_out = some_examples(1013, 40);
  for (const Kind kind : {Kind::kFull, Kind::kLowRank}) {
    CAPTURE(static_cast<int>(kind));
    auto model = kind == Kind::kFull ? TrainableModel<float>::full(base).value()
                                     : TrainableModel<float>::low_rank(base, {6, 12.0, 1}).value();
    using S = __nv_bfloat16;
    auto trainer =
        DeviceTrainer<S>::create(model, on_device<S>(*base, device, stream.get), some_examples(1012, 150),
                                 quick_options(), "x", device, stream.get);
    require_ok(trainer.status());
    const double before = trainer->evaluate(held_out, 1.0).value();
    std::vector<TrainProgress> told;
    require_ok(trainer->run("", 0, [&](const TrainProgress& now) { told.push_back(now); }));
    const double after = trainer->evaluate(held_out, 1.0).value();
    CAPTURE(before, after);
    CHECK(after < 0.6 * before);
    REQUIRE(told.size() == 60);
    CHECK(told.back().loss < told.front().loss);
    CHECK(told.back().tokens_per_second > 0.0);
    CHECK(trainer->step().status().message() == "Trainer: all 60 steps are done");
    // What is downloaded is what was trained: judged by the CPU's pass in fp32.
    require_ok(trainer->download());
    codegemm::ThreadPool pool(2);
    auto cpu = Trainer<DenseLinear>::create(model, base, some_examples(1012, 150), quick_options(), "x", pool)
                   .value();
    CHECK(std::abs(cpu.evaluate(held_out, 1.0).value() - after) <= 0.03);
  }
}

namespace {

/// The largest logit each time, by plain double loops: the base's cache, then the module.
std::vector<std::int32_t> reference_answer(const LlamaModel<DenseLinear>& base,
                                           const LlamaModel<DenseLinear>& module,
                                           const std::vector<std::int32_t>& prompt, double sharing,
                                           std::int64_t most, std::int32_t stop) {
  std::vector<ReferenceCache> caches;
  const auto shared = static_cast<std::size_t>(shared_tokens(std::ssize(prompt), sharing));
  static_cast<void>(reference_forward(base, std::span(prompt).first(shared), caches));
  std::vector<double> logits = reference_forward(module, std::span(prompt).subspan(shared), caches).back();
  std::vector<std::int32_t> out;
  while (true) {
    const auto token =
        static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    if (token == stop) return out;
    out.push_back(token);
    if (std::ssize(out) == most) return out;
    logits = reference_forward(module, std::span(&out.back(), 1), caches).back();
  }
}

}  // namespace

TEST_CASE("answers generated on the GPU are the reference's", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  const ModelConfig wide_head = config_of(72, 6, 2, 64);
  for (const ModelConfig& config : {small_config(), wide_head}) {
    CAPTURE(config.head_dim);
    const auto base = random_model(config, 1051);
    const auto module = random_model(config, 1052);
    Rng rng(1053);
    std::vector<std::vector<std::int32_t>> prompts;
    for (int i = 0; i < 41; ++i)
      prompts.push_back(random_tokens(rng, 1 + rng.below(i < 3 ? 80 : 20), config.vocab_size));
    constexpr std::int64_t kMost = 9;
    const std::int32_t stop[] = {7};
    // Prompts at a time: fewer than there are, so that batches follow one another.
    const auto answers = [&]<class S>(S, double sharing) {
      const auto on_base = on_device<S>(*base, device, stream.get);
      const auto on_module = on_device<S>(*module, device, stream.get);
      auto generator = DeviceGenerator<S>::create(config, config, 17, 100, device, stream.get);
      require_ok(generator.status());
      auto out = generator->generate(on_base->view(), on_module->view(), prompts, sharing, kMost, stop);
      require_ok(out.status());
      const auto again =
          generator->generate(on_base->view(), on_module->view(), prompts, sharing, kMost, stop);
      CHECK(*out == *again);
      return *std::move(out);
    };
    for (const double sharing : {0.0, 0.5, 1.0}) {
      CAPTURE(sharing);
      const auto exact = answers(float{}, sharing);
      const auto low = answers(__nv_bfloat16{}, sharing);
      int same = 0;
      int near = 0;
      for (std::size_t i = 0; i < prompts.size(); ++i) {
        const auto want = reference_answer(*base, *module, prompts[i], sharing, kMost, 7);
        same += exact[i] == want ? 1 : 0;
        const bool alike = low[i].empty() == want.empty() && (want.empty() || low[i][0] == want[0]);
        near += alike ? 1 : 0;
      }
      std::printf("answers, head size %lld, sharing %.1f: fp32 %d of %zu, first tokens of bf16 %d\n",
                  static_cast<long long>(config.head_dim), sharing, same, prompts.size(), near);
      CHECK(same >= 40);  // two logits may be nearly equal
      CHECK(near >= 35);
    }
    auto generator = DeviceGenerator<float>::create(config, config, 4, 20, device, stream.get).value();
    const auto weights = on_device<float>(*base, device, stream.get);
    const auto refusal = [&](const std::vector<std::int32_t>& prompt) {
      return generator.generate(weights->view(), weights->view(), std::span(&prompt, 1), 1.0, 9, stop)
          .status()
          .message();
    };
    CHECK(refusal({}) == "prompt 0: a prompt of 0 tokens and an answer of up to 9, at most 20 together");
    CHECK(refusal({1, 2, 60000}) ==
          codegemm::concat("prompts from 0: token 60000, the vocabulary has ", config.vocab_size));
  }
}

TEST_CASE("a run on the GPU that was killed goes on to the same bits", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  using S = __nv_bfloat16;
  const auto base = random_model(small_config(), 1021);
  const auto frozen = on_device<S>(*base, device, stream.get);
  const auto examples = some_examples(1022, 13);
  TrainOptions options = quick_options();
  options.steps = 7;
  options.clip = 0.5;
  const TemporaryFolder folder;
  const auto make = [&](TrainableModel<float>& model) {
    auto made = DeviceTrainer<S>::create(model, frozen, examples, options, "x", device, stream.get);
    require_ok(made.status());
    return std::move(made).value();
  };
  for (const Kind kind : {Kind::kFull, Kind::kLowRank, Kind::kCodebooks}) {
    CAPTURE(static_cast<int>(kind));
    auto whole = trainable<float>(base, kind);
    auto trainer = make(whole);
    require_ok(trainer.run(folder / "whole", 0));
    const std::vector<float> want = values_of(whole);

    auto first = trainable<float>(base, kind);
    {
      auto half = make(first);
      for (int i = 0; i < 4; ++i) require_ok(half.step().status());
      require_ok(half.save(folder / "state"));
      require_ok(half.step().status());  // lost
    }
    auto second = trainable<float>(base, kind);
    auto rest = make(second);
    require_ok(rest.load(folder / "state"));
    CHECK(rest.steps_done() == 4);
    require_ok(rest.run(folder / "state", 2));
    CHECK(same_bits(values_of(second), want));
    CHECK(codegemm::test::get_file(folder / "state") == codegemm::test::get_file(folder / "whole"));
    options.seed = 2;
    auto other = make(second);
    CHECK(other.load(folder / "state").code() == StatusCode::kIncompatible);
    options.seed = 1;
  }
}

TEST_CASE("a run on the GPU without graphs takes the same steps, beside others too", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  using S = __nv_bfloat16;
  const auto base = random_model(small_config(), 1071);
  const auto examples = some_examples(1072, 13);
  const auto held_out = some_examples(1073, 5);
  TrainOptions options = quick_options();
  options.steps = 6;
  options.sharing = 0.5;
  struct Run {
    Status status;
    std::vector<float> values;
    std::vector<double> losses;
    double judged = 0.0;
  };
  const auto frozen = on_device<S>(*base, device, stream.get);
  // In several threads: no assertions in it.
  const auto train = [&](TrainableModel<float>& model, bool graphs, cudaStream_t in, Run& out) {
    auto trainer = DeviceTrainer<S>::create(model, frozen, examples, options, "x", device, in);
    out.status = trainer.status();
    if (!out.status.ok()) return;
    trainer->use_graphs(graphs);
    for (int step = 0; step < options.steps; ++step) {
      const auto progress = trainer->step();
      out.status = progress.status();
      if (!out.status.ok()) return;
      out.losses.push_back(progress->loss);
    }
    const auto judged = trainer->evaluate(held_out, 1.0);
    if (judged.ok()) out.judged = *judged;
    out.status = judged.ok() ? trainer->download() : judged.status();
    if (out.status.ok()) out.values = values_of(model);
  };
  for (const Kind kind : {Kind::kFull, Kind::kLowRank, Kind::kCodebooks}) {
    CAPTURE(static_cast<int>(kind));
    auto models =
        std::array{trainable<float>(base, kind), trainable<float>(base, kind), trainable<float>(base, kind)};
    Run want;
    train(models[0], true, stream.get, want);
    require_ok(want.status);
    CHECK(want.losses.front() != want.losses.back());
    // Two at once, each in a stream and a thread of its own, as the fine-tuning suite runs them.
    const Stream other;
    Run first;
    Run second;
    std::thread beside([&] { train(models[1], false, other.get, second); });
    train(models[2], false, stream.get, first);
    beside.join();
    for (const Run* got : {&first, &second}) {
      require_ok(got->status);
      CHECK(same_bits(got->values, want.values));
      CHECK(got->losses == want.losses);
      CHECK(got->judged == want.judged);
    }
  }
}

TEST_CASE("a loss that is not finite stops a run on the GPU at the last good step", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  using S = __nv_bfloat16;
  const PoisonedRun given;
  const TemporaryFolder folder;
  auto model = TrainableModel<float>::full(given.poisoned).value();
  auto trainer = DeviceTrainer<S>::create(model, on_device<S>(*given.base, device, stream.get),
                                          given.examples, given.options, "x", device, stream.get);
  require_ok(trainer.status());
  std::vector<float> last = values_of(model);
  std::int64_t good = 0;
  const Status status = trainer->run(folder / "state", 0, [&](const TrainProgress& now) {
    require_ok(trainer->download());
    last = values_of(model);
    good = now.step;
  });
  CAPTURE(status.message());
  CHECK(status.code() == StatusCode::kInvalidArgument);
  CHECK(codegemm::test::contains(status.message(), PoisonedRun::words(good)));
  require_ok(trainer->download());
  CHECK(same_bits(values_of(model), last));
  require_ok(trainer->load(folder / "state"));
  CHECK(trainer->steps_done() == good);
}

TEST_CASE("what cannot be trained on is refused on the GPU as on the CPU", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  const auto base = random_model(small_config(), 1041);
  const auto frozen = on_device<float>(*base, device, stream.get);
  auto model = TrainableModel<float>::full(base).value();
  const auto refusal = [&](const std::vector<TrainingExample>& examples, const TrainOptions& options) {
    return DeviceTrainer<float>::create(model, frozen, examples, options, "x", device, stream.get)
        .status()
        .message();
  };
  const TrainOptions good = quick_options();
  CHECK(refusal({{{1}, {2}}, {{1}, {}}}, good) == "example 1: the target is empty");
  CHECK(refusal({{{1}, {61}}}, good) == "example 0: token 61, the vocabulary has 61");
  CHECK(refusal({}, good) == "Trainer: no examples");
  CHECK(refusal({{{1, 2, 3, 4, 5, 6, 7}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}}}, good) ==
        "example 0: prompt and target have 7 + 10 tokens, at most 16 are allowed");
  ModelConfig deep = base->config;
  deep.layers = 3;
  const auto unlike =
      DeviceTrainer<float>::create(model, on_device<float>(*random_model(deep, 1042), device, stream.get),
                                   {{{1}, {2}}}, good, "x", device, stream.get);
  CHECK(codegemm::test::contains(unlike.status().message(),
                                 "does not fit the base's cache: layers: base 3, decode 2"));
  TrainOptions bad = good;
  bad.sharing = 1.5;
  CHECK(refusal({{{1}, {2}}}, bad) == "TrainOptions::sharing is 1.5, must be in 0..1");
  auto odd = std::make_shared<LlamaModel<DenseLinear>>(*base);
  odd->layers[0].down = DenseLinear(odd->layers[0].down.shared_weights(), 24, 40, std::vector<float>(24));
  const auto biased = DeviceFrozenWeights<float>::create(*odd, device, stream.get);
  CHECK(biased.status().message().substr(0, 36) == "model.layers.0.mlp.down_proj has a b");

  DeviceLossBatch<float> batch;
  batch.tokens = {1, 2, 3};
  batch.segments = {{3, 0}};
  batch.loss_rows = {1, 2};
  batch.labels = {4, 5};
  auto pass =
      DeviceTrainPass<float>::create(base->config, 8, 16, Activations::kKept, device, stream.get).value();
  auto weights = DeviceTrainable<float>::create(model, device, stream.get).value();
  codegemm::test::DeviceBuffer<float> losses(2);
  const auto refused = [&](const DeviceLossBatch<float>& b) {
    return pass.evaluate(weights.view(), b, losses.data()).message();
  };
  CHECK(refused(batch).empty());
  DeviceLossBatch<float> wrong = batch;
  wrong.segments = {{2, 0}};
  CHECK(refused(wrong) == "LossBatch: segments cover 2 of 3 rows");
  wrong = batch;
  wrong.tokens[2] = 61;
  CHECK(refused(wrong) == "LossBatch: token 61, the vocabulary has 61");
  wrong = batch;
  wrong.segments = {{3, 4}};
  CHECK(refused(wrong) ==
        "LossBatch: a segment of 3 rows at row 0 behind 4 of 0 tokens; rows 3, context at most 16");
  wrong = batch;
  wrong.loss_rows = {2, 1};
  CHECK(refused(wrong) == "LossBatch: loss row 1 behind 2, rows 3");
  REQUIRE_CUDA(cudaStreamSynchronize(stream.get));
}

}  // namespace prefillshare::test
