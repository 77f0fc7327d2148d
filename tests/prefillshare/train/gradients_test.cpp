// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/gradients_test.cpp - loss and gradients against the reference forward pass and
// finite differences in double, for every kind of parameter and every option of a model.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/train/pass.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/reference.hpp>
#include <support/catch.hpp>
#include <support/tiny_model.hpp>
#include <support/tiny_training.hpp>

using namespace prefillshare;
using namespace prefillshare::test;

namespace {

struct Variant {
  const char* name;
  ModelConfig config;
};

std::vector<Variant> variants() {
  ModelConfig plain = tiny_config();
  plain.rope.scaling = RopeScaling::kLinear;
  plain.rope.factor = 2.0;
  ModelConfig qwen = tiny_config();
  qwen.tied_embeddings = false;
  qwen.attention_bias = true;
  qwen.qk_norm = true;
  qwen.rope.scaling = RopeScaling::kLlama3;
  qwen.rope.factor = 8.0;
  qwen.rope.original_max_position_embeddings = 32;
  ModelConfig gguf = tiny_config();
  gguf.rope.layout = RopeLayout::kInterleaved;
  gguf.kv_heads = 6;
  return {
      {"tied, linear scaling", plain}, {"biases, head norms, untied", qwen}, {"interleaved, no GQA", gguf}};
}

/// Two segments: one behind a prefix of random constants, one without; losses at some rows of both.
template <class T>
struct Problem {
  LossBatch<T> batch;
  std::vector<T> keys, values;

  Problem(const ModelConfig& c, std::uint64_t seed) {
    Rng rng(seed);
    constexpr std::int64_t kPrefix = 5;
    const std::int64_t stride = kPrefix + 2;
    for (std::vector<T>* x : {&keys, &values}) {
      for (const float value : rng.normals(c.layers * stride * c.kv_size()))
        x->push_back(static_cast<T>(value));
    }
    batch.tokens = random_tokens(rng, 11, c.vocab_size);
    batch.segments = {{0, 4, kPrefix, stride, keys.data(), values.data()}, {4, 7, 0, 0, nullptr, nullptr}};
    batch.loss_rows = {0, 2, 3, 6, 10};
    batch.labels = random_tokens(rng, 5, c.vocab_size);
  }
};

template <class T>
double loss_of(TrainPass<T>& pass, TrainableModel<T>& model, const LossBatch<T>& batch, bool backward) {
  std::vector<double> losses;
  const Status status = pass.run(model, batch, backward, T{1}, losses);
  INFO(status.message());
  REQUIRE(status.ok());
  double sum = 0.0;
  for (const double loss : losses) sum += loss;
  return sum;
}

/// Central differences at some elements of every parameter; the number of elements that were checked.
int check_gradients(TrainPass<double>& pass, TrainableModel<double>& model, const LossBatch<double>& batch,
                    std::uint64_t seed) {
  Rng rng(seed);
  model.zero_gradients();
  loss_of(pass, model, batch, true);
  int checked = 0;
  for (Parameter<double>& p : model.parameters()) {
    for (int i = 0; i < 4; ++i) {
      std::int64_t at = rng.below(p.value.size());
      if (p.name == "model.embed_tokens.weight")  // rows of tokens that occur
        at = batch.tokens[static_cast<std::size_t>(rng.below(11))] * std::int64_t{24} + rng.below(24);
      const double kept = p.value[at];
      const double step = 1e-5 * std::max(1.0, std::abs(kept));
      p.value[at] = kept + step;
      const double above = loss_of(pass, model, batch, false);
      p.value[at] = kept - step;
      const double below = loss_of(pass, model, batch, false);
      p.value[at] = kept;
      const double want = (above - below) / (2.0 * step);
      CAPTURE(p.name, at, want, p.gradient[at]);
      CHECK(std::abs(p.gradient[at] - want) <= 1e-7 + 1e-6 * std::abs(want));
      ++checked;
    }
  }
  return checked;
}

float any_scale(Rng& rng, const DenseLinear&) { return rng.uniform(0.1F, 0.3F); }

}  // namespace

TEST_CASE("the training pass has the reference's losses", "[train]") {
  for (const bool qwen : {false, true}) {
    ModelConfig config = tiny_config();
    config.attention_bias = config.qk_norm = qwen;
    config.tied_embeddings = !qwen;
    const auto model = random_model(config, 901);
    const auto base = random_model(config, 902);
    Rng rng(903);
    const std::vector<std::int32_t> prompt = random_tokens(rng, 9, config.vocab_size);
    const std::vector<std::int32_t> target = random_tokens(rng, 70, config.vocab_size);

    std::vector<ReferenceCache> caches;
    REQUIRE(reference_forward(*base, prompt, caches).size() == 9);
    std::vector<double> keys;
    std::vector<double> values;
    for (const ReferenceCache& cache : caches) {
      for (const auto& row : cache.k) keys.insert(keys.end(), row.begin(), row.end());
      for (const auto& row : cache.v) values.insert(values.end(), row.begin(), row.end());
    }
    const auto logits = reference_forward(*model, target, caches);

    LossBatch<double> batch;
    batch.tokens = target;
    batch.segments = {{0, 70, 9, 9, keys.data(), values.data()}};
    for (std::int64_t i = 0; i < 70; ++i) batch.loss_rows.push_back(i);
    batch.labels = random_tokens(rng, 70, config.vocab_size);
    codegemm::SerialExecutor serial;
    auto pass = TrainPass<double>::create(config, 70, 128, serial).value();
    auto trained = TrainableModel<double>::full(model).value();
    std::vector<double> losses;
    REQUIRE(pass.run(trained, batch, false, 1.0, losses).ok());
    for (std::size_t i = 0; i < losses.size(); ++i) {
      double sum = 0.0;
      for (const double x : logits[i]) sum += std::exp(x);
      const double want = std::log(sum) - logits[i][static_cast<std::size_t>(batch.labels[i])];
      CAPTURE(qwen, i);
      CHECK(std::abs(losses[i] - want) <= 1e-5);  // RoPE tables and epsilon are fp32
    }
  }
}

TEST_CASE("gradients of all weights are those of finite differences", "[train]") {
  codegemm::SerialExecutor serial;
  for (const Variant& variant : variants()) {
    CAPTURE(variant.name);
    const Problem<double> problem(variant.config, 911);
    auto pass = TrainPass<double>::create(variant.config, 16, 64, serial).value();
    auto model = TrainableModel<double>::full(random_model(variant.config, 912)).value();
    const int tensors = 2 * (9 + (variant.config.attention_bias ? 3 : 0) + (variant.config.qk_norm ? 2 : 0)) +
                        2 + (variant.config.tied_embeddings ? 0 : 1);
    CHECK(check_gradients(pass, model, problem.batch, 913) == 4 * tensors);
  }
}

namespace {

/// Counts what is stored, and leaves it.
struct CountStored {
  std::int64_t* values = nullptr;
  std::int64_t* probabilities_seen = nullptr;

  void operator()(const double* /*x*/, std::int64_t size) const { *values += size; }
  void probabilities(const double* /*x*/, std::int64_t size) const { *probabilities_seen += size; }
};

}  // namespace

TEST_CASE("all that a pass stores goes through Store, which the exact pass does without", "[train]") {
  codegemm::SerialExecutor serial;
  const ModelConfig c = tiny_config();
  const Problem<double> problem(c, 951);
  const auto base = random_model(c, 952);
  const auto gradients = [&](auto pass) {
    auto model = TrainableModel<double>::low_rank(base, LowRankOptions{2, 4.0, 1}).value();
    std::vector<double> losses;
    REQUIRE(pass.run(model, problem.batch, true, 1.0, losses).ok());
    for (const Parameter<double>& p : model.parameters())
      losses.insert(losses.end(), p.gradient.span().begin(), p.gradient.span().end());
    return losses;
  };
  std::int64_t values = 0;
  std::int64_t probabilities = 0;
  const auto counted =
      gradients(TrainPass<double, CountStored>::create(c, 16, 64, serial, {&values, &probabilities}).value());
  CHECK(counted == gradients(TrainPass<double>::create(c, 16, 64, serial).value()));
  // Each forward pass of a block (the last one's is run once, others' twice): norms, Q and K before and after
  // RoPE, V, attention, its projection, gate, up, their product and down. Each backward pass: the residual
  // stream's gradient twice, those of both norms, of attention, gate, up and their product, and of Q, K and V
  // before and after RoPE. Composed weights before each pass. In the head the norm, logits, and its gradient.
  const std::int64_t rows = 11;
  const std::int64_t losses = 5;
  const std::int64_t h = c.hidden_size;
  const std::int64_t forward = rows * (4 * h + 3 * c.q_size() + 3 * c.kv_size() + 3 * c.intermediate_size);
  const std::int64_t backward = rows * (4 * h + 3 * c.q_size() + 4 * c.kv_size() + 3 * c.intermediate_size);
  const std::int64_t weights = 2 * h * c.q_size() + 2 * h * c.kv_size() + 3 * h * c.intermediate_size;
  CHECK(values == (2 * c.layers - 1) * forward + c.layers * backward + 2 * c.layers * weights +
                      losses * (2 * h + c.vocab_size));
  CHECK(probabilities > 0);
}

TEST_CASE("gradients of low-rank deltas are those of finite differences, and the deltas merge", "[train]") {
  codegemm::SerialExecutor serial;
  const ModelConfig config = variants()[1].config;
  const Problem<double> problem(config, 921);
  auto pass = TrainPass<double>::create(config, 16, 64, serial).value();
  const auto base = random_model(config, 922);
  LowRankOptions options;
  options.rank = 3;
  auto model = TrainableModel<double>::low_rank(base, options).value();
  auto full = TrainableModel<double>::full(base).value();
  CHECK(loss_of(pass, model, problem.batch, false) == loss_of(pass, full, problem.batch, false));
  Rng rng(923);
  for (Parameter<double>& p : model.parameters()) {
    for (double& x : p.value.span()) x += 0.1 * static_cast<double>(rng.normal());
  }
  CHECK(check_gradients(pass, model, problem.batch, 924) == 4 * 2 * 14);

  const auto merged = model.dense(serial).value();
  auto again = TrainableModel<double>::full(merged).value();
  const double want = loss_of(pass, model, problem.batch, false);
  CHECK(std::abs(loss_of(pass, again, problem.batch, false) - want) <= 1e-5 * want);
  options.rank = 25;
  CHECK(TrainableModel<double>::low_rank(base, options).status().message() ==
        "TrainableModel: rank 25, must be in 1..24");
}

TEST_CASE("gradients of codebooks, scales and norms are those of finite differences", "[train]") {
  codegemm::SerialExecutor serial;
  for (const std::size_t which : {std::size_t{0}, std::size_t{1}}) {
    const ModelConfig config = variants()[which].config;
    const Problem<double> problem(config, 931);
    auto pass = TrainPass<double>::create(config, 16, 64, serial).value();
    const auto base = random_model(config, 932);
    auto matrices = random_matrices(*base, 933, any_scale);
    auto model = TrainableModel<double>::codebooks(base, matrices).value();
    const int norms = 2 * (config.qk_norm ? 4 : 2) + 1;
    CHECK(check_gradients(pass, model, problem.batch, 934) ==
          4 * (2 * static_cast<int>(matrices.size()) + norms));

    // What it multiplies by is the reference's weights, and untouched matrices come back bit for bit.
    auto fresh = TrainableModel<double>::codebooks(base, matrices).value();
    const auto dense = fresh.dense(serial).value();
    for_each_linear(*dense, [&](const std::string& name, const DenseLinear& layer) {
      if (matrices.count(name) == 0) return;
      CAPTURE(name);
      double worst = 0.0;
      for (std::int64_t n = 0; n < layer.rows(); ++n) {
        for (std::int64_t k = 0; k < layer.cols(); ++k) {
          const double want = codegemm::reference_weight(matrices.at(name).view(), n, k);
          worst = std::max(worst, std::abs(static_cast<double>(layer.weights().row(n)[k]) - want));
        }
      }
      CHECK(worst <= 1e-6);
    });
    const auto back = fresh.matrices();
    REQUIRE(back.size() == matrices.size());
    for (const auto& [name, matrix] : back) {
      const codegemm::QuantizedMatrix& want = matrices.at(name);
      CHECK(std::equal(matrix.codes().begin(), matrix.codes().end(), want.codes().begin()));
      CHECK(std::equal(matrix.codebooks().begin(), matrix.codebooks().end(), want.codebooks().begin()));
      CHECK(std::equal(matrix.scales().begin(), matrix.scales().end(), want.scales().begin()));
    }
    matrices.emplace("model.layers.7.mlp.up_proj", matrices.begin()->second);
    CHECK(TrainableModel<double>::codebooks(base, matrices).status().code() == StatusCode::kNotFound);
  }
}

TEST_CASE("fp32 gradients are near the double ones, and the same bits for any workers", "[train]") {
  const ModelConfig config = variants()[1].config;
  const auto base = random_model(config, 941);
  const auto matrices = random_matrices(*base, 942, any_scale);
  const Problem<double> problem(config, 943);
  const Problem<float> problem32(config, 943);
  for (const int kind : {0, 1, 2}) {
    CAPTURE(kind);
    const auto made = [&]<class T>(T) {
      if (kind == 0) return TrainableModel<T>::full(base).value();
      if (kind == 1) return TrainableModel<T>::low_rank(base, LowRankOptions{4, 8.0, 3}).value();
      return TrainableModel<T>::codebooks(base, matrices).value();
    };
    codegemm::SerialExecutor serial;
    codegemm::ThreadPool pool(3);
    auto pass64 = TrainPass<double>::create(config, 16, 64, serial).value();
    auto pass1 = TrainPass<float>::create(config, 16, 64, serial).value();
    auto pass3 = TrainPass<float>::create(config, 11, 64, pool).value();
    auto model64 = made(double{});
    auto model1 = made(float{});
    auto model3 = made(float{});
    const double want = loss_of(pass64, model64, problem.batch, true);
    CHECK(std::abs(loss_of(pass1, model1, problem32.batch, true) - want) <= 1e-4 * want);
    loss_of(pass3, model3, problem32.batch, true);
    for (std::size_t i = 0; i < model1.parameters().size(); ++i) {
      const Parameter<float>& one = model1.parameters()[i];
      const Parameter<float>& three = model3.parameters()[i];
      const Parameter<double>& exact = model64.parameters()[i];
      CAPTURE(one.name);
      CHECK(std::memcmp(one.gradient.data(), three.gradient.data(), one.gradient.span().size_bytes()) == 0);
      double off = 0.0;
      double size = 0.0;
      for (std::int64_t e = 0; e < one.gradient.size(); ++e) {
        off += std::pow(static_cast<double>(one.gradient[e]) - exact.gradient[e], 2);
        size += std::pow(exact.gradient[e], 2);
      }
      CHECK(std::sqrt(off) <= 1e-4 * std::sqrt(size) + 1e-9);
    }
  }
}

TEST_CASE("batches that break their rules are refused", "[train]") {
  const ModelConfig config = tiny_config();
  codegemm::SerialExecutor serial;
  auto pass = TrainPass<float>::create(config, 8, 16, serial).value();
  auto model = TrainableModel<float>::full(random_model(config, 951)).value();
  const auto refusal = [&](const LossBatch<float>& batch) {
    std::vector<double> losses;
    return pass.run(model, batch, true, 1.0F, losses).message();
  };
  LossBatch<float> good;
  good.tokens = {1, 2, 3};
  good.segments = {{0, 3, 0, 0, nullptr, nullptr}};
  good.loss_rows = {1, 2};
  good.labels = {4, 5};
  CHECK(refusal(good).empty());
  LossBatch<float> bad = good;
  bad.tokens = {1, 2, 61};
  CHECK(refusal(bad) == "LossBatch: token 61, the vocabulary has 61");
  bad = good;
  bad.labels = {4};
  CHECK(refusal(bad) == "LossBatch: 1 labels for 2 rows");
  bad = good;
  bad.loss_rows = {2, 1};
  CHECK(refusal(bad) == "LossBatch: loss row 1 behind 2, rows 3");
  bad = good;
  bad.loss_rows = {1, 3};
  CHECK(refusal(bad) == "LossBatch: loss row 3 behind 1, rows 3");
  bad = good;
  bad.segments[0].count = 2;
  CHECK(refusal(bad) == "LossBatch: segments cover 2 of 3 rows");
  bad = good;
  bad.segments[0].prefix = bad.segments[0].prefix_stride = 1;
  CHECK(refusal(bad) == "LossBatch: a prefix without keys or values");
  bad.segments[0].prefix = bad.segments[0].prefix_stride = 14;
  CHECK(refusal(bad) ==
        "LossBatch: a segment of 3 rows at row 0 behind 14 of 14 tokens; rows 3, context at most 16");
  bad = good;
  bad.tokens.resize(9, 1);
  CHECK(refusal(bad) == "LossBatch: 9 rows, the pass is for 8");
}
