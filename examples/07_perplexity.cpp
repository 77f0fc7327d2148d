// SPDX-License-Identifier: Apache-2.0
//
// examples/07_perplexity.cpp - how well a model predicts a text, dense or as 06_quantize.cpp wrote it.
//
//   perplexity MODEL TEXT [--tokenizer GGUF_OR_FOLDER]
//
// The text is cut into windows of --length tokens, and the tokens of each window's second half are predicted
// from all before them in the window, as llama.cpp's perplexity tool does it.
// test: {model} {source}/examples/data/river_report.txt --length 128 --windows 2

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <Eigen/Core>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/atomic_file.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/progress.hpp>
#include <common/text_tokens.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/model/forward.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

struct Options {
  std::string model, text, tokenizer, json;
  std::int64_t length = 512;
  std::int64_t windows = 40;
  int threads = 0;
};

struct Sums {
  double loss = 0.0;     // of all predicted tokens, in nats
  double squares = 0.0;  // of each one's
  std::int64_t tokens = 0;
};

/// -log p of `token`, where row holds the logits of all tokens.
double negative_log(const float* row, std::int64_t vocabulary, std::int32_t token) {
  const Eigen::Map<const Eigen::ArrayXf> logits(row, vocabulary);
  const float top = logits.maxCoeff();
  const double sum = static_cast<double>((logits - top).exp().sum());
  return std::log(sum) + static_cast<double>(top - row[token]);
}

Sums score(const Options& options, const LlamaModel<DenseLinear>& model,
           const std::vector<std::vector<std::int32_t>>& windows, Executor& executor) {
  const ModelConfig& c = model.config;
  const auto length = static_cast<std::int64_t>(windows.front().size());
  const KvShape shape = kv_shape(c);
  const std::int64_t block_count = (length + shape.block_tokens - 1) / shape.block_tokens;
  HostKvStorage storage = unwrap(HostKvStorage::create(shape, block_count));
  std::vector<BlockId> blocks;
  for (std::int64_t i = 0; i < block_count; ++i) blocks.push_back(static_cast<BlockId>(i));
  ForwardWorkspace workspace = unwrap(ForwardWorkspace::create(model, length, length, executor.workers()));
  const std::int64_t rows = length - length / 2;  // the last of them predicts what the window does not hold
  std::vector<float> logits(static_cast<std::size_t>(rows * c.vocab_size));
  Sums sums;
  ProgressLine progress("perplexity of " + options.model);
  for (std::size_t w = 0; w < windows.size(); ++w) {
    const KvTarget target{&storage, blocks, 0};
    check(forward(model, windows[w], target, MatrixView<float>(logits.data(), rows, c.vocab_size), workspace,
                  executor));
    for (std::int64_t i = 0; i + 1 < rows; ++i) {
      const std::int32_t next = windows[w][static_cast<std::size_t>(length - rows + i + 1)];
      const double loss = negative_log(logits.data() + i * c.vocab_size, c.vocab_size, next);
      sums.loss += loss;
      sums.squares += loss * loss;
      ++sums.tokens;
    }
    progress.update(static_cast<std::int64_t>(w) + 1, static_cast<std::int64_t>(windows.size()),
                    codegemm::concat(std::exp(sums.loss / static_cast<double>(sums.tokens))));
  }
  return sums;
}

int run(const Options& options) {
  codegemm::ThreadPool pool(options.threads);
  const std::string& tokenizer_path = options.tokenizer.empty() ? options.model : options.tokenizer;
  const Tokenizer tokenizer = unwrap(load_tokenizer(tokenizer_path));
  const std::vector<std::int32_t> ids = tokens_of_file(options.text, tokenizer);
  const auto windows = spread_sequences(ids, options.windows, options.length, tokenizer);
  if (windows.empty()) {
    throw UserError(codegemm::concat(options.text, ": has ", ids.size(), " tokens, fewer than one window of ",
                                     options.length));
  }
  const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
  const LoadedModel loaded = unwrap(load_model(*source));
  const Sums sums = score(options, *loaded.model, windows, pool);
  const auto count = static_cast<double>(sums.tokens);
  const double mean = sums.loss / count;
  const double deviation = std::sqrt(std::max(0.0, sums.squares / count - mean * mean) / count);
  std::printf("%s: perplexity %.4f +- %.4f on %lld tokens of %s\n", options.model.c_str(), std::exp(mean),
              std::exp(mean) * deviation, static_cast<long long>(sums.tokens), options.text.c_str());
  if (!options.json.empty()) {
    const nlohmann::json out = {{"model", options.model},
                                {"text", options.text},
                                {"length", options.length},
                                {"windows", windows.size()},
                                {"tokens", sums.tokens},
                                {"perplexity", std::exp(mean)},
                                {"error", std::exp(mean) * deviation}};
    check(codegemm::write_file(options.json, out.dump(2) + "\n"));
  }
  return std::isfinite(mean) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"Perplexity of a dense or quantized Llama-family model on a text."};
  app.add_option("model", options.model, "GGUF file or folder (dense, CodeGEMM or AQLM)")->required();
  app.add_option("text", options.text, "text file")->required();
  app.add_option("--tokenizer", options.tokenizer, "where the model's tokenizer is, if not in the model");
  app.add_option("--length", options.length, "tokens in a window")
      ->check(CLI::Range(4, 1 << 17))
      ->capture_default_str();
  app.add_option("--windows", options.windows, "at most so many, evenly spread over the text")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
  app.add_option("--json", options.json, "also write the numbers there");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    return run(options);
  } catch (const std::exception& e) {
    std::fflush(stdout);
    std::fprintf(stderr, "perplexity: %s\n", e.what());
    return 2;
  }
}
