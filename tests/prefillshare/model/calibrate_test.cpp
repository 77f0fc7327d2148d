// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/model/calibrate_test.cpp - what a calibration run shows each layer, and what it leaves.

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <prefillshare/model/calibrate.hpp>

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
    ModelConfig config = tiny_config();
    config.attention_bias = qwen;
    config.qk_norm = qwen;
    const auto model = random_model(config, 71);
    const Sequences sequences = some_sequences(72);
    codegemm::SerialExecutor serial;
    CalibrationRun run = CalibrationRun::create(model, sequences, 1).value();
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
      REQUIRE(after->head
                  .forward(MatrixView<const float>(normed.data(), count, config.hidden_size),
                           MatrixView<float>(got.data(), count, config.vocab_size), {}, serial)
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
  CHECK(rounding.grams.at("model.layers.0.mlp.down_proj").size() == 40 * 40);
  CHECK(rounding.grams.at("model.layers.0.self_attn.o_proj").size() == 48 * 48);
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
