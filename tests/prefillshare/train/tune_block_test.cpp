// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/tune_block_test.cpp - a quantized block tuned as a whole comes nearer to the dense
// one, on data that it did not see, and never gets worse.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/train/tune_block.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <codegemm/reference.hpp>
#include <prefillshare/model/calibrate.hpp>
#include <support/catch.hpp>
#include <support/tiny_model.hpp>

using namespace prefillshare;
using namespace prefillshare::test;

namespace {

ModelConfig one_block() {
  ModelConfig c = tiny_config();
  c.layers = 1;
  c.qk_norm = true;
  c.attention_bias = true;
  return c;
}

/// The block's seven layers replaced by a QuantizedBlock.
LlamaLayer<DenseLinear> with(const LlamaLayer<DenseLinear>& dense, const QuantizedBlock& block) {
  LlamaLayer<DenseLinear> out = dense;
  out.input_norm = block.input_norm;
  out.post_attention_norm = block.post_attention_norm;
  out.q_norm = block.q_norm;
  out.k_norm = block.k_norm;
  std::size_t i = 0;
  for (DenseLinear* layer : {&out.q, &out.k, &out.v, &out.o, &out.gate, &out.up, &out.down}) {
    const codegemm::QuantizedMatrix& matrix = block.linears[i++];
    auto values =
        std::make_shared<std::vector<float>>(static_cast<std::size_t>(matrix.rows() * matrix.cols()));
    codegemm::reference_dequantize(matrix.view(),
                                   MatrixView<float>(values->data(), matrix.rows(), matrix.cols()));
    *layer = DenseLinear(std::move(values), matrix.rows(), matrix.cols(),
                         std::vector<float>(layer->bias().begin(), layer->bias().end()));
  }
  return out;
}

/// Gives every layer as it is.
struct Keep {
  Result<std::optional<DenseLinear>> find(const std::string&, const DenseLinear& dense) {
    return std::optional<DenseLinear>(dense);
  }
  Result<DenseLinear> make(const std::string&, const DenseLinear& dense, MatrixView<const float>) {
    return dense;
  }
};

/// The inference engine's output of a block on sequences of tokens.
std::vector<float> outputs(const LlamaModel<DenseLinear>& model, const LlamaLayer<DenseLinear>& layer,
                           const std::vector<std::vector<std::int32_t>>& sequences) {
  auto changed = std::make_shared<LlamaModel<DenseLinear>>(model);
  changed->layers = {layer};
  codegemm::SerialExecutor serial;
  CalibrationRunOptions options;
  options.correct = false;
  CalibrationRun run = CalibrationRun::create(changed, sequences, 1, options).value();
  Keep keep;
  REQUIRE(run.next_block(keep, serial).ok());
  return {run.hidden().begin(), run.hidden().end()};
}

struct Problem {
  std::shared_ptr<const LlamaModel<DenseLinear>> model = random_model(one_block(), 1101);
  std::vector<std::vector<std::int32_t>> sequences;
  std::vector<std::int64_t> lengths;
  std::vector<float> inputs;
  std::vector<float> targets;
  QuantizedBlock block;

  Problem() {
    Rng rng(1102);
    for (int i = 0; i < 24; ++i) {
      sequences.push_back(random_tokens(rng, 20 + rng.below(20), 61));
      lengths.push_back(static_cast<std::int64_t>(sequences.back().size()));
      for (const std::int32_t token : sequences.back()) {
        const float* const row = model->embedding->data() + std::ptrdiff_t{24} * token;
        inputs.insert(inputs.end(), row, row + 24);
      }
    }
    const LlamaLayer<DenseLinear>& layer = model->layers[0];
    targets = outputs(*model, layer, sequences);
    codegemm::SerialExecutor serial;
    for (const DenseLinear* linear :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      const codegemm::Format format =
          block.linears.size() % 2 == 0 ? codegemm::Format{4, 1, 4, 8} : codegemm::Format{8, 2, 4, -1};
      block.linears.push_back(codegemm::quantize_kmeans(linear->weights(), format, {}, serial).value());
    }
    block.input_norm = layer.input_norm;
    block.post_attention_norm = layer.post_attention_norm;
    block.q_norm = layer.q_norm;
    block.k_norm = layer.k_norm;
  }

  [[nodiscard]] BlockStream stream() const { return {lengths, inputs.data(), targets.data()}; }

  /// Mean relative error of the last `held_out` sequences.
  [[nodiscard]] double error_of(const QuantizedBlock& tuned, std::size_t held_out) const {
    const std::vector<float> got = outputs(*model, with(model->layers[0], tuned), sequences);
    std::int64_t first = 0;
    for (std::size_t i = 0; i + held_out < lengths.size(); ++i) first += lengths[i];
    double sum = 0.0;
    const auto tokens = static_cast<std::int64_t>(got.size()) / 24;
    for (std::int64_t t = first; t < tokens; ++t) {
      double off = 0.0;
      double size = 0.0;
      for (std::size_t d = static_cast<std::size_t>(t) * 24; d < static_cast<std::size_t>(t + 1) * 24; ++d) {
        off += std::pow(static_cast<double>(got[d]) - static_cast<double>(targets[d]), 2);
        size += std::pow(static_cast<double>(targets[d]), 2);
      }
      sum += off / size;
    }
    return sum / static_cast<double>(tokens - first);
  }
};

bool same(const QuantizedBlock& a, const QuantizedBlock& b) {
  bool equal = a.input_norm == b.input_norm && a.post_attention_norm == b.post_attention_norm &&
               a.q_norm == b.q_norm && a.k_norm == b.k_norm && a.linears.size() == b.linears.size();
  for (std::size_t i = 0; equal && i < a.linears.size(); ++i) {
    const codegemm::QuantizedMatrix& x = a.linears[i];
    const codegemm::QuantizedMatrix& y = b.linears[i];
    equal = std::equal(x.codebooks().begin(), x.codebooks().end(), y.codebooks().begin()) &&
            std::equal(x.scales().begin(), x.scales().end(), y.scales().begin()) &&
            std::equal(x.codes().begin(), x.codes().end(), y.codes().begin());
  }
  return equal;
}

BlockTuneOptions quick_options() {
  BlockTuneOptions options;
  options.steps = 40;
  options.rate = 2e-2;
  options.tokens = 128;
  options.held_out = 4;
  return options;
}

}  // namespace

TEST_CASE("a tuned block is nearer to the dense one on sequences that it did not learn from", "[train]") {
  const Problem problem;
  const ModelConfig& config = problem.model->config;
  codegemm::SerialExecutor serial;
  BlockTuneReport report;
  const auto tuned = tune_block(config, problem.block, problem.model->layers[0], problem.stream(),
                                quick_options(), serial, &report);
  CAPTURE(tuned.status().message(), report.before, report.after);
  REQUIRE(tuned.ok());
  CHECK(report.kept);
  CHECK(report.after < 0.7 * report.before);
  // What it reports is what inference gives, rounding to fp16 included.
  CHECK(std::abs(problem.error_of(problem.block, 4) - report.before) <= 1e-4 * report.before);
  CHECK(std::abs(problem.error_of(*tuned, 4) - report.after) <= 1e-4 * report.after);
  for (std::size_t i = 0; i < kBlockLinears; ++i) {
    CHECK(std::equal(tuned->linears[i].codes().begin(), tuned->linears[i].codes().end(),
                     problem.block.linears[i].codes().begin()));
  }
  for (const float x : tuned->input_norm) CHECK(codegemm::Half::from_float(x).to_float() == x);

  codegemm::ThreadPool pool(3);
  const auto again =
      tune_block(config, problem.block, problem.model->layers[0], problem.stream(), quick_options(), pool);
  CHECK(same(*again, *tuned));
  BlockTuneOptions other = quick_options();
  other.seed = 2;
  CHECK(!same(*tune_block(config, problem.block, problem.model->layers[0], problem.stream(), other, serial),
              *tuned));
}

TEST_CASE("a block that tuning would make worse comes back as it was", "[train]") {
  Problem problem;
  const ModelConfig& config = problem.model->config;
  codegemm::SerialExecutor serial;
  BlockTuneReport report;
  // Nothing to gain: the targets are what the block gives already.
  problem.targets = outputs(*problem.model, with(problem.model->layers[0], problem.block), problem.sequences);
  const auto kept = tune_block(config, problem.block, problem.model->layers[0], problem.stream(),
                               quick_options(), serial, &report);
  REQUIRE(kept.ok());
  CHECK(!report.kept);
  CHECK(report.after == report.before);
  CHECK(same(*kept, problem.block));
  // A rate that is far too high.
  const Problem fresh;
  BlockTuneOptions wild = quick_options();
  wild.rate = 30.0;
  const auto back =
      tune_block(config, fresh.block, fresh.model->layers[0], fresh.stream(), wild, serial, &report);
  REQUIRE(back.ok());
  CHECK(!report.kept);
  CHECK(same(*back, fresh.block));
  wild.steps = 0;
  CHECK(same(*tune_block(config, fresh.block, fresh.model->layers[0], fresh.stream(), wild, serial),
             fresh.block));
}

TEST_CASE("blocks and options that do not fit are refused", "[train]") {
  const Problem problem;
  const ModelConfig& config = problem.model->config;
  codegemm::SerialExecutor serial;
  const auto refusal = [&](const QuantizedBlock& block, const BlockStream& stream,
                           const BlockTuneOptions& options) {
    return tune_block(config, block, problem.model->layers[0], stream, options, serial).status().message();
  };
  BlockTuneOptions bad = quick_options();
  bad.rate = 0.0;
  CHECK(refusal(problem.block, problem.stream(), bad) ==
        "tune_block: steps = 40, rate = 0, tokens = 128, held_out = 4");
  QuantizedBlock block = problem.block;
  std::swap(block.linears[0], block.linears[6]);
  CHECK(refusal(block, problem.stream(), quick_options()) ==
        "tune_block: linear layer 0 is 24 x 40, the config needs 48 x 24");
  block = problem.block;
  block.k_norm.clear();
  CHECK(refusal(block, problem.stream(), quick_options()) ==
        "tune_block: norms of 24, 24, 8 and 0 values, the config needs 24 and 8");
  block.linears.pop_back();
  CHECK(refusal(block, problem.stream(), quick_options()) == "tune_block: 6 linear layers, not 7");
  const std::vector<std::int64_t> lengths = {3, 0};
  CHECK(refusal(problem.block, {lengths, problem.inputs.data(), problem.targets.data()}, quick_options()) ==
        "tune_block: a sequence of 0 tokens");
  CHECK(refusal(problem.block, {problem.lengths, nullptr, nullptr}, quick_options()) ==
        "tune_block: inputs or targets are null");
}
