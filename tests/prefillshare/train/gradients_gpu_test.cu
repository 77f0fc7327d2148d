// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/gradients_gpu_test.cu - training on the GPU against the CPU's: losses and
// gradients of every parameter in double, runs of the trainer step by step, their bits, and distillation.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/train/cuda/calibrate.cuh>
#include <prefillshare/train/cuda/distiller.cuh>
#include <prefillshare/train/cuda/generator.cuh>
#include <prefillshare/train/cuda/trainer.cuh>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <prefillshare/train/trainer.hpp>
#include <support/catch.hpp>
#include <support/tiny_training.hpp>

#include "../gpu_model.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using codegemm::test::TemporaryFolder;
using cuda::Activations;
using cuda::Device;
using cuda::DeviceDistiller;
using cuda::DeviceFrozenWeights;
using cuda::DeviceGenerator;
using cuda::DeviceLossBatch;
using cuda::DeviceTrainable;
using cuda::DeviceTrainer;
using cuda::DeviceTrainPass;

template <class S>
constexpr bool kExact = std::is_same_v<S, float>;

struct Variant {
  const char* name;
  ModelConfig config;
  std::vector<std::pair<std::int64_t, std::int64_t>> segments;  // rows, prefix
};

ModelConfig config_of(std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim) {
  ModelConfig c = tiny_config();
  c.vocab_size = 203;
  c.hidden_size = hidden;
  c.intermediate_size = 136;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.rope.head_dim = static_cast<int>(head_dim);
  return c;
}

std::vector<Variant> variants() {
  ModelConfig plain = tiny_config();
  plain.rope.scaling = RopeScaling::kLinear;
  plain.rope.factor = 2.0;
  ModelConfig qwen = config_of(48, 6, 2, 24);
  qwen.tied_embeddings = false;
  qwen.attention_bias = qwen.qk_norm = true;
  ModelConfig gguf = config_of(32, 4, 4, 16);
  gguf.rope.layout = RopeLayout::kInterleaved;
  ModelConfig smol = config_of(72, 6, 2, 64);  // on tensor cores in bf16
  ModelConfig wide = config_of(1096, 4, 2, 128);
  wide.tied_embeddings = false;
  wide.qk_norm = true;
  return {{"tied, linear scaling", plain, {{4, 5}, {7, 0}}},
          {"biases, head norms, untied", qwen, {{40, 33}, {7, 0}, {1, 12}}},
          {"interleaved, no GQA", gguf, {{9, 3}, {70, 0}}},
          {"head size 64", smol, {{150, 70}, {41, 0}, {1, 130}, {23, 1}}},
          {"head size 128, wide, head norms", wide, {{37, 90}, {70, 0}}}};
}

/// The same rows for both: constants as prefixes, losses at some rows.
struct Problem {
  LossBatch<double> batch;
  std::vector<std::vector<double>> keys, values;  // of each segment, [layers][prefix][kv]
  std::int64_t prefix_rows = 0;

  Problem(const Variant& v, std::uint64_t seed) {
    const ModelConfig& c = v.config;
    Rng rng(seed);
    std::int64_t rows = 0;
    keys.resize(v.segments.size());
    values.resize(v.segments.size());
    for (std::size_t i = 0; i < v.segments.size(); ++i) {
      const auto [count, prefix] = v.segments[i];
      for (auto* x : {&keys[i], &values[i]}) {
        for (const float value : rng.normals(c.layers * prefix * c.kv_size()))
          x->push_back(static_cast<double>(__bfloat162float(__float2bfloat16(value))));
      }
      batch.segments.push_back({rows, count, prefix, prefix, keys[i].data(), values[i].data()});
      rows += count;
      prefix_rows += prefix;
    }
    batch.tokens = random_tokens(rng, rows, c.vocab_size);
    batch.tokens[static_cast<std::size_t>(rows) - 1] = batch.tokens[0];  // one that occurs twice
    for (std::int64_t row = 0; row < rows; row += 1 + rng.below(3)) batch.loss_rows.push_back(row);
    batch.labels = random_tokens(rng, std::ssize(batch.loss_rows), c.vocab_size);
  }

  template <class S>
  [[nodiscard]] DeviceLossBatch<S> on_device(const ModelConfig& c,
                                             codegemm::cuda::DeviceArray<S>& memory) const {
    DeviceLossBatch<S> out;
    out.tokens = batch.tokens;
    out.labels = batch.labels;
    for (const std::int64_t row : batch.loss_rows) out.loss_rows.push_back(static_cast<std::int32_t>(row));
    const std::int64_t width = c.kv_size();
    std::vector<S> cache(static_cast<std::size_t>(c.layers * prefix_rows * 2 * width));
    std::int64_t first = 0;
    for (std::size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment<double>& s = batch.segments[i];
      out.segments.push_back({s.count, s.prefix});
      for (std::int64_t layer = 0; layer < c.layers; ++layer) {
        for (std::int64_t t = 0; t < s.prefix; ++t) {
          S* const to = cache.data() + (layer * prefix_rows + first + t) * 2 * width;
          for (std::int64_t d = 0; d < width; ++d) {
            const auto from = static_cast<std::size_t>((layer * s.prefix + t) * width + d);
            to[d] = static_cast<S>(static_cast<float>(keys[i][from]));
            to[width + d] = static_cast<S>(static_cast<float>(values[i][from]));
          }
        }
      }
      first += s.prefix;
    }
    memory = codegemm::cuda::DeviceArray<S>::copy_of(cache).value();
    out.prefixes = {memory.data(), prefix_rows};
    return out;
  }
};

enum class Kind { kFull, kLowRank, kCodebooks };

template <class T>
TrainableModel<T> trainable(const std::shared_ptr<const LlamaModel<DenseLinear>>& model, Kind kind) {
  if (kind == Kind::kFull) return TrainableModel<T>::full(model).value();
  if (kind == Kind::kCodebooks)
    return TrainableModel<T>::codebooks(model, random_matrices(*model, 77)).value();
  auto out = TrainableModel<T>::low_rank(model, LowRankOptions{11, 5.5, 3}).value();
  Rng rng(78);
  for (Parameter<T>& p : out.parameters()) {
    for (T& x : p.value.span()) x += static_cast<T>(0.1F * rng.normal());
  }
  return out;
}

/// ||got - want|| / ||want||; NaN counts as infinite.
template <class T>
double relative(const Tensor<T>& got, const Tensor<double>& want) {
  double off = 0.0;
  double size = 1e-30;
  for (std::int64_t i = 0; i < want.size(); ++i) {
    const double d = static_cast<double>(got[i]) - want[i];
    off += d * d;
    size += want[i] * want[i];
  }
  const double out = std::sqrt(off / size);
  return out == out ? out : HUGE_VAL;
}

template <class S>
struct DeviceRun {
  std::vector<float> losses;
  TrainableModel<float> model;
};

template <class S>
DeviceRun<S> run_on_device(const Variant& v, const Problem& problem, TrainableModel<float> model,
                           Activations activations, const Device& device, cudaStream_t stream) {
  auto pass = DeviceTrainPass<S>::create(v.config, std::ssize(problem.batch.tokens), 256, activations, device,
                                         stream);
  require_ok(pass.status());
  auto weights = DeviceTrainable<S>::create(model, device, stream);
  require_ok(weights.status());
  codegemm::cuda::DeviceArray<S> memory;
  const DeviceLossBatch<S> batch = problem.on_device<S>(v.config, memory);
  codegemm::test::DeviceBuffer<float> losses(batch.labels.size());
  losses.poison();
  for (Parameter<float>& p : model.parameters())
    std::fill(p.gradient.span().begin(), p.gradient.span().end(), std::numeric_limits<float>::quiet_NaN());
  weights->zero_gradients(pass->train_stream());
  require_ok(pass->run(*weights, batch, 0.5F, losses.data()));
  require_ok(pass->run(*weights, batch, 0.5F, losses.data()));  // gradients add up
  weights->collect(pass->train_stream());
  require_ok(weights->download_gradients(model, pass->train_stream()));
  CHECK(losses.guards_intact());
  return {losses.download(), std::move(model)};
}

/// Stores what the GPU stores in bf16 as bf16 holds it; probabilities where the GPU gives them to its tensor
/// cores.
struct StoreAsBf16 {
  bool tensor_cores = false;

  template <class T>
  void operator()(T* x, std::int64_t size) const {
    for (std::int64_t i = 0; i < size; ++i)
      x[i] = static_cast<T>(__bfloat162float(__float2bfloat16(static_cast<float>(x[i]))));
  }
  template <class T>
  void probabilities(T* x, std::int64_t size) const {
    if (tensor_cores) (*this)(x, size);
  }
};

/// How far off results may be: the most for a loss, and relative for each gradient.
struct Bounds {
  double losses = 0.0;
  std::vector<double> gradients;
};

/// fp32 by a constant. bf16 by what its 8 bits cost in this problem: the CPU's pass in double that rounds at
/// the points where the GPU does. Other sums round other values the other way, so twice that, and one
/// rounding more for what hardly any reaches.
template <class S>
Bounds bounds_of(const Variant& v, const Problem& problem, TrainableModel<double> model,
                 const TrainableModel<double>& exact, const std::vector<double>& want,
                 codegemm::Executor& executor) {
  Bounds out;
  out.losses = 1e-5 * *std::max_element(want.begin(), want.end());
  out.gradients.assign(exact.parameters().size(), 2e-5);
  if constexpr (!kExact<S>) {
    const StoreAsBf16 store{cuda::detail::attends_on_tensor_cores<S>(v.config.head_dim)};
    auto pass = TrainPass<double, StoreAsBf16>::create(v.config, std::ssize(problem.batch.tokens), 256,
                                                       executor, store)
                    .value();
    std::vector<double> losses;
    require_ok(pass.run(model, problem.batch, true, 1.0, losses));
    for (std::size_t i = 0; i < want.size(); ++i)
      out.losses = std::max(out.losses, 2.0 * std::abs(losses[i] - want[i]));
    for (std::size_t i = 0; i < out.gradients.size(); ++i) {
      const double off = relative(model.parameters()[i].gradient, exact.parameters()[i].gradient);
      out.gradients[i] = 2.0 * off + 0x1p-9;
    }
  }
  return out;
}

template <class S>
void check_against_double(const Device& device, cudaStream_t stream) {
  codegemm::ThreadPool pool(4);
  for (const Variant& v : variants()) {
    for (const Kind kind : {Kind::kFull, Kind::kLowRank, Kind::kCodebooks}) {
      const Problem problem(v, 71);
      const auto model = rounded_model<__nv_bfloat16>(v.config, 72);
      auto exact = trainable<double>(model, kind);
      auto pass = TrainPass<double>::create(v.config, std::ssize(problem.batch.tokens), 256, pool).value();
      std::vector<double> want;
      require_ok(pass.run(exact, problem.batch, true, 1.0, want));
      const DeviceRun<S> got =
          run_on_device<S>(v, problem, trainable<float>(model, kind), Activations::kKept, device, stream);
      const Bounds bounds = bounds_of<S>(v, problem, trainable<double>(model, kind), exact, want, pool);
      double loss_error = 0.0;
      for (std::size_t i = 0; i < want.size(); ++i) {
        const double off = std::abs(static_cast<double>(got.losses[i]) - want[i]);
        loss_error = off <= loss_error ? loss_error : (off == off ? off : HUGE_VAL);
      }
      double worst = 0.0;
      double share = 0.0;  // of the bound
      std::string worst_name;
      for (std::size_t i = 0; i < exact.parameters().size(); ++i) {
        const std::string& name = exact.parameters()[i].name;
        const double bound = bounds.gradients[i];
        const double off = relative(got.model.parameters()[i].gradient, exact.parameters()[i].gradient);
        share = std::max(share, off / bound);
        if (off >= worst) {
          worst = off;
          worst_name = name;
        }
        CAPTURE(v.name, static_cast<int>(kind), name);
        CHECK(off <= bound);
      }
      std::printf(
          "%s, %s, kind %d: losses off by %.2g of %.2g, gradients by at most %.2g (%s), %.2f of a bound\n",
          kExact<S> ? "fp32" : "bf16", v.name, static_cast<int>(kind), loss_error, bounds.losses, worst,
          worst_name.c_str(), share);
      std::fflush(stdout);
      CAPTURE(v.name, static_cast<int>(kind));
      CHECK(loss_error <= bounds.losses);
    }
  }
}

}  // namespace

TEST_CASE("gradients in fp32 on the GPU are those of the CPU in double", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  check_against_double<float>(device, stream.get);
}

TEST_CASE("gradients in bf16 on the GPU are near those of the CPU in double", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  check_against_double<__nv_bfloat16>(device, stream.get);
}

TEST_CASE("gradients on the GPU are the same bits again, and where activations are recomputed",
          "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  for (const Variant& v : variants()) {
    for (const Kind kind : {Kind::kFull, Kind::kLowRank, Kind::kCodebooks}) {
      CAPTURE(v.name, static_cast<int>(kind));
      using S = __nv_bfloat16;
      const Problem problem(v, 81);
      const auto model = random_model(v.config, 82);
      const auto run = [&](Activations activations) {
        return run_on_device<S>(v, problem, trainable<float>(model, kind), activations, device, stream.get);
      };
      const DeviceRun<S> first = run(Activations::kKept);
      for (const Activations activations : {Activations::kKept, Activations::kRecomputed}) {
        const DeviceRun<S> again = run(activations);
        CHECK(std::memcmp(first.losses.data(), again.losses.data(), first.losses.size() * sizeof(float)) ==
              0);
        int different = 0;
        for (std::size_t i = 0; i < first.model.parameters().size(); ++i) {
          const auto& a = first.model.parameters()[i].gradient;
          const auto& b = again.model.parameters()[i].gradient;
          different += std::memcmp(a.data(), b.data(), a.span().size_bytes()) == 0 ? 0 : 1;
        }
        CHECK(different == 0);
      }
    }
  }
}

namespace {

/// The model with no weights in its blocks' linear layers but in that one.
std::shared_ptr<const LlamaModel<DenseLinear>> without_weights(const LlamaModel<DenseLinear>& model,
                                                               const std::string& but = {}) {
  const auto out = std::make_shared<LlamaModel<DenseLinear>>(model);
  for_each_linear(*out, [&](const std::string& name, DenseLinear& layer) {
    if (name == "lm_head" || name == but) return;
    layer = DenseLinear::without_weights(layer.rows(), layer.cols(),
                                         std::vector<float>(layer.bias().begin(), layer.bias().end()));
  });
  return out;
}

template <class S>
std::shared_ptr<const DeviceFrozenWeights<S>> on_device(const LlamaModel<DenseLinear>& base,
                                                        const Device& device, cudaStream_t stream) {
  auto made = DeviceFrozenWeights<S>::create(base, device, stream);
  require_ok(made.status());
  return std::make_shared<const DeviceFrozenWeights<S>>(std::move(made).value());
}

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
    static_cast<void>(out.status = trainer.status());
    if (!out.status.ok()) return;
    trainer->use_graphs(graphs);
    for (int step = 0; step < options.steps; ++step) {
      const auto progress = trainer->step();
      static_cast<void>(out.status = progress.status());
      if (!out.status.ok()) return;
      out.losses.push_back(progress->loss);
    }
    const auto judged = trainer->evaluate(held_out, 1.0);
    if (judged.ok()) out.judged = *judged;
    static_cast<void>(out.status = judged.ok() ? trainer->download() : judged.status());
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
  const auto base = random_model(small_config(), 1031);
  auto examples = some_examples(1032, 24);
  for (TrainingExample& example : examples) {
    for (std::int32_t& token : example.prompt) token = token == 59 ? 3 : token;
  }
  examples[17].prompt.back() = 59;  // no other has it
  TrainOptions options = quick_options();
  options.steps = 3;  // each example once
  options.adam.weight_decay = 0.0;
  const TemporaryFolder folder;
  auto poisoned = std::make_shared<LlamaModel<DenseLinear>>(*base);
  poisoned->config.tied_embeddings = false;
  poisoned->embedding = [&] {
    auto table = std::make_shared<std::vector<float>>(*base->embedding);
    (*table)[59 * 24 + 1] = std::numeric_limits<float>::infinity();
    return table;
  }();
  auto model = TrainableModel<float>::full(poisoned).value();
  auto trainer = DeviceTrainer<S>::create(model, on_device<S>(*base, device, stream.get), examples, options,
                                          "x", device, stream.get);
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
  CHECK(codegemm::test::contains(status.message(), codegemm::concat("in step ", good + 1,
                                                                    ", example 17, target token 0; the "
                                                                    "parameters are those after ",
                                                                    good, " steps")));
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

TEST_CASE("gradients against a teacher are those of all labels by their chances", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  codegemm::ThreadPool pool(4);
  for (const auto& [which, share] : {std::pair(0, 0.0), std::pair(1, 0.0), std::pair(1, 0.25)}) {
    const Variant v = variants()[static_cast<std::size_t>(which)];
    const ModelConfig& c = v.config;
    Problem problem(v, 91);
    problem.batch.loss_rows = {2, 9};
    problem.batch.labels.resize(2);
    const auto model = rounded_model<__nv_bfloat16>(c, 92);
    Rng rng(93);
    const std::vector<float> hidden = rng.normals(2 * c.hidden_size);
    std::vector<float> head = rng.normals(c.vocab_size * c.hidden_size);
    for (float& x : head) x *= 2.0F / std::sqrt(static_cast<float>(c.hidden_size));

    // Of -sum p log q the gradient is the sum over labels of p times that of -log q; a share is the text's.
    auto exact = trainable<double>(model, Kind::kCodebooks);
    auto pass = TrainPass<double>::create(c, std::ssize(problem.batch.tokens), 256, pool).value();
    double want_loss[2] = {};
    for (std::size_t row = 0; row < 2; ++row) {
      std::vector<double> p(static_cast<std::size_t>(c.vocab_size));
      double total = 0.0;
      for (std::size_t i = 0; i < p.size(); ++i) {
        double logit = 0.0;
        for (std::int64_t k = 0; k < c.hidden_size; ++k) {
          logit += static_cast<double>(
                       hidden[row * static_cast<std::size_t>(c.hidden_size) + static_cast<std::size_t>(k)]) *
                   static_cast<double>(
                       head[i * static_cast<std::size_t>(c.hidden_size) + static_cast<std::size_t>(k)]);
        }
        total += p[i] = std::exp(logit);
      }
      LossBatch<double> one = problem.batch;
      one.loss_rows = {problem.batch.loss_rows[row]};
      for (std::size_t i = 0; i < p.size(); ++i) {
        const double of_teacher = (1.0 - share) * p[i] / total;
        const double of_text = static_cast<std::int32_t>(i) == problem.batch.labels[row] ? share : 0.0;
        one.labels = {static_cast<std::int32_t>(i)};
        std::vector<double> loss;
        require_ok(pass.run(exact, one, true, of_teacher + of_text, loss));
        want_loss[row] += of_teacher * (std::log(p[i] / total) + loss[0]) + of_text * loss[0];
      }
    }

    auto got = trainable<float>(model, Kind::kCodebooks);
    const std::int64_t rows = std::ssize(problem.batch.tokens);
    auto on_gpu = DeviceTrainPass<float>::create(c, rows, 256, Activations::kKept, device, stream.get);
    require_ok(on_gpu.status());
    auto weights = DeviceTrainable<float>::create(got, device, stream.get);
    require_ok(weights.status());
    codegemm::cuda::DeviceArray<float> memory;
    DeviceLossBatch<float> batch = problem.on_device<float>(c, memory);
    const auto teacher = codegemm::cuda::DeviceArray<float>::copy_of(hidden).value();
    const auto teacher_head = codegemm::cuda::DeviceArray<float>::copy_of(head).value();
    batch.teacher = teacher.data();
    codegemm::test::DeviceBuffer<float> losses(2);
    losses.poison();
    CHECK(on_gpu->run(*weights, batch, 1.0F, losses.data()).code() == StatusCode::kNullPointer);
    batch.teacher_head = teacher_head.data();
    batch.label_share = 1.5;
    CHECK(on_gpu->run(*weights, batch, 1.0F, losses.data()).code() == StatusCode::kInvalidArgument);
    batch.label_share = share;
    for (int time = 0; time < 3; ++time) {  // the last one is a graph
      weights->zero_gradients(on_gpu->train_stream());
      require_ok(on_gpu->run(*weights, batch, 1.0F, losses.data()));
    }
    weights->collect(on_gpu->train_stream());
    require_ok(weights->download_gradients(got, on_gpu->train_stream()));
    CHECK(losses.guards_intact());
    const std::vector<float> got_loss = losses.download();
    double worst = 0.0;
    for (std::size_t i = 0; i < exact.parameters().size(); ++i)
      worst = std::max(worst, relative(got.parameters()[i].gradient, exact.parameters()[i].gradient));
    std::printf(
        "teacher, %s, labels' share %g: losses %.6f and %.6f, should be %.6f and %.6f; gradients off by "
        "%.2g\n",
        v.name, share, static_cast<double>(got_loss[0]), static_cast<double>(got_loss[1]), want_loss[0],
        want_loss[1], worst);
    for (std::size_t row = 0; row < 2; ++row)
      CHECK(std::abs(static_cast<double>(got_loss[row]) - want_loss[row]) <= 1e-5 * (1.0 + want_loss[row]));
    CHECK(worst <= 5e-5);
  }
}

namespace {

// A dense model on the device, and texts on which models with codes learn what it says.
struct Distilling {
  using S = __nv_bfloat16;
  Device device = gpu_or_skip();
  Stream stream;
  std::shared_ptr<const LlamaModel<DenseLinear>> dense;
  std::shared_ptr<const DeviceFrozenWeights<S>> teacher;
  std::vector<std::vector<std::int32_t>> sequences;
  TrainOptions options;

  Distilling(std::uint64_t seed, std::int64_t steps, double rate)
      : dense(random_model(small_config(), seed)), teacher(on_device<S>(*dense, device, stream.get)) {
    Rng rng(seed + 1);
    for (int i = 0; i < 12; ++i) sequences.push_back(random_tokens(rng, 2 + rng.below(30), 60));
    options.steps = steps;
    options.batch = 6;
    options.pass_tokens = 64;
    options.rate = rate;
    options.adam.weight_decay = 0.0;
  }
  // The run that trains a student.
  [[nodiscard]] auto distill(TrainableModel<float>& student, const cuda::CodeMoveOptions& moves = {},
                             double label_share = 0.0) const {
    return DeviceDistiller<S>::create(student, teacher, sequences, options, device, stream.get,
                                      Activations::kKept, moves, label_share);
  }
};

}  // namespace

TEST_CASE("distillation on the GPU brings a quantized model nearer to the dense one", "[train][gpu]") {
  Distilling d(1021, 80, 0.02);

  auto same = trainable<float>(d.dense, Kind::kFull);
  auto idle = d.distill(same);
  require_ok(idle.status());
  CHECK(std::abs(idle->divergence(d.sequences).value()) <= 1e-6);

  // The same model read a block at a time: but for one layer without codes, weights are not there else.
  const auto hollow = without_weights(*d.dense, "model.layers.1.mlp.gate_proj");
  CHECK(DeviceFrozenWeights<Distilling::S>::create(*hollow, d.device, d.stream.get).status().code() ==
        StatusCode::kNullPointer);
  auto read =
      DeviceFrozenWeights<Distilling::S>::create(*hollow, d.device, d.stream.get, [&](std::int64_t i) {
        return Result<LlamaLayer<DenseLinear>>(d.dense->layers[static_cast<std::size_t>(i)]);
      });
  require_ok(read.status());
  const auto teacher_by_blocks = std::make_shared<const DeviceFrozenWeights<Distilling::S>>(*std::move(read));

  std::vector<float> first;
  for (int time = 0; time < 3; ++time) {
    auto student = trainable<float>(d.dense, Kind::kCodebooks);
    if (time == 2) student = TrainableModel<float>::codebooks(hollow, student.matrices()).value();
    if (time == 2) d.teacher = teacher_by_blocks;
    auto distiller = d.distill(student);
    require_ok(distiller.status());
    const double before = distiller->divergence(d.sequences).value();
    double last = 0.0;
    require_ok(distiller->run([&](const TrainProgress& now) { last = now.loss; }));
    const double after = distiller->divergence(d.sequences).value();
    std::printf("divergence %.4f, after %d steps %.4f, last step's %.4f\n", before,
                static_cast<int>(d.options.steps), after, last);
    CHECK(before > 0.0);
    CHECK(after < 0.6 * before);
    CHECK(std::abs(last - after) <= 0.5 * after);
    CHECK(distiller->step().status().code() == StatusCode::kInvalidArgument);
    if (time == 0) first = values_of(student);
    CHECK(same_bits(first, values_of(student)));
  }
  auto student = trainable<float>(d.dense, Kind::kCodebooks);
  CHECK(d.distill(student, {}, -0.1).status().code() == StatusCode::kInvalidArgument);
  d.sequences.push_back({1});
  const Status wrong = d.distill(student).status();
  CHECK(wrong.code() == StatusCode::kInvalidArgument);
  CHECK(wrong.message().find("sequence 12") != std::string::npos);
}

TEST_CASE("codes that moved in the last of a few steps are the student's", "[train][gpu]") {
  using S = __nv_bfloat16;
  const Device device = gpu_or_skip();
  const Stream stream;
  const auto dense = random_model(small_config(), 1051);
  const auto teacher = on_device<S>(*dense, device, stream.get);
  Rng rng(1052);
  const std::vector<std::vector<std::int32_t>> sequences = {random_tokens(rng, 20, 60),
                                                            random_tokens(rng, 12, 60)};
  TrainOptions options;
  options.steps = 3;
  options.batch = 2;
  options.rate = 0.01;
  options.schedule = RateSchedule::kConstant;
  options.adam.weight_decay = 0.0;
  cuda::CodeMoveOptions moves;
  moves.rate = 0.3;
  moves.every = 1;
  moves.until = 1.0;
  auto student = trainable<float>(dense, Kind::kCodebooks);
  auto distiller = DeviceDistiller<S>::create(student, teacher, sequences, options, device, stream.get,
                                              Activations::kKept, moves);
  require_ok(distiller.status());
  std::int64_t before = 0;
  while (!distiller->done()) {
    before = distiller->codes_moved();
    require_ok(distiller->step().status());
  }
  CHECK(distiller->codes_moved() > before);
  require_ok(distiller->download());
  auto again = DeviceDistiller<S>::create(student, teacher, sequences, options, device, stream.get);
  require_ok(again.status());
  CHECK(std::abs(again->divergence(sequences).value() - distiller->divergence(sequences).value()) <= 1e-7);
}

TEST_CASE("codes that follow the gradient bring a quantized model nearer than codebooks alone",
          "[train][gpu]") {
  Distilling d(1041, 100, 0.01);
  double still = 0.0;
  std::vector<float> first;
  for (const double rate : {0.0, 0.02, 0.02}) {
    CAPTURE(rate);
    auto student = trainable<float>(d.dense, Kind::kCodebooks);
    const auto before = student.matrices();
    cuda::CodeMoveOptions moves;
    moves.rate = rate;
    moves.every = 3;
    auto distiller = d.distill(student, moves);
    require_ok(distiller.status());
    require_ok(distiller->run());
    const double after = distiller->divergence(d.sequences).value();
    std::printf("codes' rate %g: divergence %.4f, %lld moved\n", rate, after,
                static_cast<long long>(distiller->codes_moved()));
    std::int64_t different = 0;
    for (const auto& [name, matrix] : student.matrices()) {
      const auto old = before.at(name).codes();
      for (std::size_t i = 0; i < old.size(); ++i) different += matrix.codes()[i] == old[i] ? 0 : 1;
    }
    CHECK((different > 0) == (rate > 0.0));
    CHECK(distiller->codes_moved() >= different);
    if (rate == 0.0) still = after;
    if (rate > 0.0) CHECK(after < 0.8 * still);
    // What the host was given is what the device has: codes, codebooks and the lists made of them.
    auto again = d.distill(student);
    require_ok(again.status());
    CHECK(std::abs(again->divergence(d.sequences).value() - after) <= 1e-7);
    if (rate > 0.0 && first.empty()) {
      first = values_of(student);
    } else if (rate > 0.0) {
      CHECK(same_bits(first, values_of(student)));
    }
  }
  auto student = trainable<float>(d.dense, Kind::kCodebooks);
  cuda::CodeMoveOptions wrong;
  wrong.every = 0;
  CHECK(d.distill(student, wrong).status().code() == StatusCode::kInvalidArgument);
  CHECK(student.set_codes("model.layers.0.mlp.up", {}).code() == StatusCode::kNotFound);
  CHECK(student.set_codes("model.layers.0.mlp.up_proj", {}).code() == StatusCode::kInvalidArgument);
}

namespace {

/// Keeps what it is given and makes other weights of it.
struct Recorder {
  std::vector<std::string> names;
  std::vector<std::vector<float>> grams, weights;

  Result<std::optional<DenseLinear>> find(const std::string&, const DenseLinear&) {
    return std::optional<DenseLinear>();
  }
  Result<DenseLinear> make(const std::string& name, const DenseLinear& dense, MatrixView<const float> gram) {
    const auto size = static_cast<std::size_t>(dense.rows() * dense.cols());
    names.push_back(name);
    grams.emplace_back(gram.data, gram.data + gram.rows * gram.cols);
    weights.emplace_back(dense.weights().data, dense.weights().data + size);
    auto other = std::make_shared<std::vector<float>>(weights.back());
    for (std::size_t i = 0; i < size; ++i)
      (*other)[i] = 0.9F * (*other)[i] + 0.02F * std::sin(static_cast<float>(i));
    return DenseLinear(std::move(other), dense.rows(), dense.cols(),
                       std::vector<float>(dense.bias().begin(), dense.bias().end()));
  }
};

double relative(const std::vector<float>& got, const std::vector<float>& want) {
  double off = 0.0;
  double size = 1e-30;
  for (std::size_t i = 0; i < want.size(); ++i) {
    off += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  const double out = std::sqrt(off / size);
  return out == out ? out : HUGE_VAL;
}

}  // namespace

TEST_CASE("calibration on the GPU gives layers the inputs and weights of the host's", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  codegemm::ThreadPool pool(2);
  for (const std::size_t which : {0, 1, 3}) {
    const Variant v = variants()[which];
    const auto model = random_model(v.config, 1031);
    // The GPU's run has no weights but those of the block that it reads.
    const auto hollow = without_weights(*model);
    const auto read = [&](std::int64_t index) -> Result<LlamaLayer<DenseLinear>> {
      return model->layers.at(static_cast<std::size_t>(index));
    };
    Rng rng(1032);
    std::vector<std::vector<std::int32_t>> sequences;
    for (const std::int64_t length : {50, 7, 1, 61, 33})
      sequences.push_back(random_tokens(rng, length, v.config.vocab_size));
    for (const bool correct : {false, true}) {
      CAPTURE(v.name, correct);
      CalibrationRunOptions options;
      options.correct = correct;
      Recorder want;
      Recorder got;
      auto host = CalibrationRun::create(model, sequences, pool.workers(), options).value();
      auto gpu = cuda::DeviceCalibrationRun::create(hollow, sequences, options, 64, device, stream.get, read);
      require_ok(gpu.status());
      for (std::int64_t i = 0; i < v.config.layers; ++i) {
        require_ok(host.next_block(want, pool));
        require_ok(gpu->next_block(got));
      }
      CHECK(gpu->blocks_done() == v.config.layers);
      CHECK(gpu->next_block(got).code() == StatusCode::kInvalidArgument);
      REQUIRE(got.names == want.names);
      double grams = 0.0;
      double weights = 0.0;
      for (std::size_t i = 0; i < want.names.size(); ++i) {
        grams = std::max(grams, relative(got.grams[i], want.grams[i]));
        weights = std::max(weights, relative(got.weights[i], want.weights[i]));
      }
      std::printf("calibration, %s, corrected %d: H off by %.2g, weights by %.2g\n", v.name,
                  static_cast<int>(correct), grams, weights);
      CHECK(grams <= 1e-4);
      CHECK(weights <= 1e-3);
    }
  }
}

}  // namespace prefillshare::test
