// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/model/calibrate_test.cpp - what a calibration run shows each layer, and what it leaves.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Dense>

#include <prefillshare/model/calibrate.hpp>

#include <codegemm/base/aligned_buffer.hpp>
#include <support/catch.hpp>
#include <support/model_harness.hpp>
#include <support/tiny_model.hpp>

using namespace prefillshare;
using namespace prefillshare::test;

namespace {

using Sequences = std::vector<std::vector<std::int32_t>>;

Sequences some_sequences(std::uint64_t seed) {
  Rng rng(seed);
  return {random_tokens(rng, 33, 61), random_tokens(rng, 1, 61), random_tokens(rng, 20, 61)};
}

/// Rounds weights to steps of 1/16 and keeps what it was shown.
struct Rounding {
  std::vector<std::string> names;
  std::map<std::string, std::vector<float>> grams;
  std::map<std::string, std::vector<float>> targets;  // the weights it was given
  std::map<std::string, DenseLinear> made;
  std::map<std::string, DenseLinear> there;  // what find() gives

  Result<std::optional<DenseLinear>> find(const std::string& name, const DenseLinear& /*dense*/) {
    const auto at = there.find(name);
    return at == there.end() ? std::optional<DenseLinear>() : std::optional<DenseLinear>(at->second);
  }
  Result<DenseLinear> make(const std::string& name, const DenseLinear& dense, MatrixView<const float> gram) {
    names.push_back(name);
    grams[name].assign(gram.data, gram.data + gram.rows * gram.cols);
    const MatrixView<const float> w = dense.weights();
    targets[name].assign(w.data, w.data + w.rows * w.cols);
    auto values = std::make_shared<std::vector<float>>(w.data, w.data + w.rows * w.cols);
    for (float& value : *values) value = std::round(value * 16.0F) / 16.0F;
    DenseLinear rounded(std::shared_ptr<const std::vector<float>>(values), w.rows, w.cols,
                        std::vector<float>(dense.bias().begin(), dense.bias().end()));
    made.emplace(name, rounded);
    return rounded;
  }
};

/// The model with the layers that a replacer made.
std::shared_ptr<const LlamaModel<DenseLinear>> replaced(const LlamaModel<DenseLinear>& model,
                                                        const std::map<std::string, DenseLinear>& made) {
  auto out = std::make_shared<LlamaModel<DenseLinear>>(model);
  for_each_linear(*out, [&](const std::string& name, DenseLinear& layer) {
    const auto at = made.find(name);
    if (at != made.end()) layer = at->second;
  });
  return out;
}

}  // namespace

TEST_CASE("a calibration run ends where the replaced model's forward pass does", "[calibrate]") {
  for (const bool qwen : {false, true}) {
    CAPTURE(qwen);
    ModelConfig config = tiny_config();
    config.attention_bias = qwen;
    config.qk_norm = qwen;
    const auto model = random_model(config, 71);
    const Sequences sequences = some_sequences(72);
    codegemm::SerialExecutor serial;
    CalibrationRunOptions options;
    options.correct = qwen;
    CalibrationRun run = CalibrationRun::create(model, sequences, 1, options).value();
    Rounding rounding;
    for (int i = 0; i < 2; ++i) {
      const Status status = run.next_block(rounding, serial);
      INFO(status.message());
      REQUIRE(status.ok());
    }
    CHECK(run.blocks_done() == 2);
    CHECK(run.next_block(rounding, serial).code() == StatusCode::kInvalidArgument);
    REQUIRE(rounding.names.size() == 14);
    CHECK(rounding.names.front() == "model.layers.0.self_attn.q_proj");
    CHECK(rounding.names.back() == "model.layers.1.mlp.down_proj");

    // The head on the residual stream gives the logits of the replaced model, sequence by sequence.
    const auto after = replaced(*model, rounding.made);
    const float* hidden = run.hidden().data();
    for (const std::vector<std::int32_t>& tokens : sequences) {
      CacheHarness cache(config, 8);
      Sequence sequence = cache.allocator->open(CacheKey{"c", "1", ""}, {}).value();
      const auto count = static_cast<std::int64_t>(tokens.size());
      const std::vector<float> want = run_forward(*after, tokens, count, cache, sequence, serial);
      std::vector<float> normed(static_cast<std::size_t>(count * config.hidden_size));
      prefillshare::detail::rms_norm(hidden, after->final_norm, config.rms_epsilon, count, normed.data());
      std::vector<float> got(want.size(), NAN);
      codegemm::AlignedBuffer<std::byte> workspace;
      REQUIRE(workspace.reserve(after->head.workspace_bytes(count, 1)));
      REQUIRE(after->head
                  .forward(MatrixView<const float>(normed.data(), count, config.hidden_size),
                           MatrixView<float>(got.data(), count, config.vocab_size), workspace.span(), serial)
                  .ok());
      for (std::size_t i = 0; i < want.size(); ++i) CHECK(std::abs(got[i] - want[i]) <= 1e-4F);
      hidden += count * config.hidden_size;
    }
  }
}

TEST_CASE("each layer is shown the inputs that it has behind the layers replaced before it", "[calibrate]") {
  const ModelConfig config = tiny_config();
  const auto model = random_model(config, 73);
  const Sequences sequences = some_sequences(74);
  codegemm::SerialExecutor serial;
  CalibrationRun run = CalibrationRun::create(model, sequences, 1).value();
  Rounding rounding;
  REQUIRE(run.next_block(rounding, serial).ok());
  const std::vector<float> between(run.hidden().begin(), run.hidden().end());
  REQUIRE(run.next_block(rounding, serial).ok());

  // The first layer's inputs are the normed embeddings; the second block's the normed residual stream.
  const auto gram_of = [&](const std::vector<float>& hidden, const std::vector<float>& norm) {
    const auto tokens = static_cast<std::int64_t>(hidden.size()) / config.hidden_size;
    std::vector<float> normed(hidden.size());
    prefillshare::detail::rms_norm(hidden.data(), norm, config.rms_epsilon, tokens, normed.data());
    using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const Eigen::MatrixXd x =
        Eigen::Map<const Matrix>(normed.data(), tokens, config.hidden_size).cast<double>();
    return Eigen::MatrixXd(x.transpose() * x / static_cast<double>(tokens));
  };
  std::vector<float> embedded;
  for (const std::vector<std::int32_t>& tokens : sequences) {
    for (const std::int32_t token : tokens) {
      const float* row = model->embedding->data() + token * config.hidden_size;
      embedded.insert(embedded.end(), row, row + config.hidden_size);
    }
  }
  const auto check = [&](const std::string& name, const Eigen::MatrixXd& want) {
    CAPTURE(name);
    const std::vector<float>& got = rounding.grams.at(name);
    REQUIRE(got.size() == static_cast<std::size_t>(want.size()));
    for (std::int64_t i = 0; i < want.size(); ++i)
      CHECK(std::abs(static_cast<double>(got[static_cast<std::size_t>(i)]) - want.data()[i]) <= 1e-4);
  };
  for (const char* part : {"q_proj", "k_proj", "v_proj"}) {
    check(std::string("model.layers.0.self_attn.") + part, gram_of(embedded, model->layers[0].input_norm));
    check(std::string("model.layers.1.self_attn.") + part, gram_of(between, model->layers[1].input_norm));
  }
  CHECK(rounding.grams.at("model.layers.0.mlp.gate_proj") == rounding.grams.at("model.layers.0.mlp.up_proj"));
  CHECK(rounding.grams.at("model.layers.0.mlp.down_proj").size() == std::size_t{40} * 40);
  CHECK(rounding.grams.at("model.layers.0.self_attn.o_proj").size() == std::size_t{48} * 48);
}

TEST_CASE("a run that finds its first layers done goes on to the same bits, with any workers",
          "[calibrate]") {
  const auto model = random_model(tiny_config(), 75);
  codegemm::SerialExecutor serial;
  CalibrationRun whole = CalibrationRun::create(model, some_sequences(76), 1).value();
  Rounding all;
  REQUIRE(whole.next_block(all, serial).ok());
  REQUIRE(whole.next_block(all, serial).ok());
  for (const std::size_t kept :
       {std::size_t{0}, std::size_t{1}, std::size_t{5}, std::size_t{9}, std::size_t{14}}) {
    CAPTURE(kept);
    codegemm::ThreadPool pool(3);
    CalibrationRun run = CalibrationRun::create(model, some_sequences(76), 3).value();
    Rounding rest;
    for (std::size_t i = 0; i < kept; ++i) rest.there.emplace(all.names[i], all.made.at(all.names[i]));
    REQUIRE(run.next_block(rest, pool).ok());
    REQUIRE(run.next_block(rest, pool).ok());
    CHECK(rest.names.size() == 14 - kept);
    for (const auto& [name, gram] : rest.grams) CHECK(gram == all.grams.at(name));
    CHECK(std::equal(run.hidden().begin(), run.hidden().end(), whole.hidden().begin()));
  }
}

TEST_CASE("sequences that the model cannot run are refused", "[calibrate]") {
  const auto model = random_model(tiny_config(), 77);
  const auto refusal = [&](const Sequences& sequences) {
    return CalibrationRun::create(model, sequences, 1).status().message();
  };
  CHECK(refusal({}) == "CalibrationRun: no sequences");
  CHECK(refusal({{1, 2}, {}}) == "CalibrationRun: a sequence of 0 tokens, must be in 1..256");
  CHECK(refusal({std::vector<std::int32_t>(257, 1)}) ==
        "CalibrationRun: a sequence of 257 tokens, must be in 1..256");
  CHECK(refusal({{1, 61}}) == "CalibrationRun: token 61, the vocabulary has 61");
}

TEST_CASE("corrected weights are the least-squares ones for the dense model's outputs", "[calibrate]") {
  const ModelConfig config = tiny_config();
  const auto model = random_model(config, 78);
  const Sequences sequences = some_sequences(79);
  codegemm::SerialExecutor serial;
  const auto run_with = [&](bool correct, Rounding& rounding) {
    CalibrationRunOptions options;
    options.correct = correct;
    options.correction_damping = 0.2;
    CalibrationRun run = CalibrationRun::create(model, sequences, 1, options).value();
    REQUIRE(run.next_block(rounding, serial).ok());
    std::vector<float> hidden(run.hidden().begin(), run.hidden().end());
    REQUIRE(run.next_block(rounding, serial).ok());
    return hidden;
  };
  const auto weights_of = [&](const DenseLinear& layer) {
    const MatrixView<const float> w = layer.weights();
    return std::vector<float>(w.data, w.data + w.rows * w.cols);
  };
  Rounding plain;
  run_with(false, plain);
  for_each_linear(*model, [&](const std::string& name, const DenseLinear& layer) {
    if (name != "lm_head") CHECK(plain.targets.at(name) == weights_of(layer));
  });

  Rounding corrected;
  const std::vector<float> now = run_with(true, corrected);
  // Nothing is replaced before the first layer: there is nothing to correct.
  const std::vector<float> first = weights_of(model->layers[0].q);
  const std::vector<float>& same = corrected.targets.at("model.layers.0.self_attn.q_proj");
  for (std::size_t i = 0; i < first.size(); ++i) CHECK(std::abs(same[i] - first[i]) <= 1e-4F);

  // The second block's q: its inputs behind the replaced first block, and behind the dense one.
  CalibrationRun dense = CalibrationRun::create(model, sequences, 1).value();
  Rounding keep;
  for_each_linear(*model, [&](const std::string& name, const DenseLinear& layer) {
    if (name != "lm_head") keep.there.emplace(name, layer);
  });
  REQUIRE(dense.next_block(keep, serial).ok());
  const auto inputs = [&](std::span<const float> hidden) {
    const auto tokens = static_cast<std::int64_t>(hidden.size()) / config.hidden_size;
    std::vector<float> normed(hidden.size());
    prefillshare::detail::rms_norm(hidden.data(), model->layers[1].input_norm, config.rms_epsilon, tokens,
                                   normed.data());
    using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    return Eigen::MatrixXd(
        Eigen::Map<const Matrix>(normed.data(), tokens, config.hidden_size).cast<double>());
  };
  const Eigen::MatrixXd x = inputs(now);
  const Eigen::MatrixXd y = inputs(dense.hidden());
  const std::int64_t k = config.hidden_size;
  Eigen::MatrixXd h = x.transpose() * x;
  Eigen::MatrixXd c = y.transpose() * x;
  const double damping = 0.2 * h.trace() / static_cast<double>(k);
  h.diagonal().array() += damping;
  c.diagonal().array() += damping;
  const DenseLinear& q = model->layers[1].q;
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Eigen::MatrixXd w = Eigen::Map<const Matrix>(q.weights().data, q.rows(), k).cast<double>();
  const Eigen::MatrixXd want = h.ldlt().solve((w * c).transpose()).transpose();
  const std::vector<float>& got = corrected.targets.at("model.layers.1.self_attn.q_proj");
  CHECK((want - w).norm() > 0.01 * w.norm());  // else there is nothing to see
  double worst = 0.0;
  for (std::int64_t n = 0; n < q.rows(); ++n) {
    for (std::int64_t i = 0; i < k; ++i)
      worst = std::max(worst,
                       std::abs(static_cast<double>(got[static_cast<std::size_t>(n * k + i)]) - want(n, i)));
  }
  CHECK(worst <= 1e-3);
}

TEST_CASE("weights that cannot be corrected are refused", "[calibrate]") {
  codegemm::SerialExecutor serial;
  std::vector<float> m(16, 1.0F);
  const MatrixView<const float> square(m.data(), 4, 4);
  const auto refusal = [&](MatrixView<const float> h, MatrixView<const float> c, double damping) {
    return codegemm::corrected_weights(square, h, c, damping, serial).status().message();
  };
  CHECK(refusal({m.data(), 3, 4}, square, 0.1) ==
        "corrected_weights: H is 3 x 4, C is 4 x 4, the weights have 4 columns");
  CHECK(refusal(square, square, 0.0) == "corrected_weights: damping is 0, must be positive");
  CHECK(refusal(square, square, HUGE_VAL) == "corrected_weights: damping is inf, must be positive");
  CHECK(refusal({nullptr, 4, 4}, square, 0.1) == "corrected_weights: weights, H or C is null");
  const std::vector<float> zero(16, 0.0F);
  CHECK(refusal({zero.data(), 4, 4}, square, 0.1) ==
        "corrected_weights: H of 4 x 4 and damping 0.1 is not positive definite");
}
