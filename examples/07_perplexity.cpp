// SPDX-License-Identifier: Apache-2.0
//
// examples/07_perplexity.cpp - how well a model predicts a text, dense or as 06_quantize.cpp wrote it.
//
//   perplexity MODEL TEXT [--tokenizer GGUF_OR_FOLDER]
//
// The text is cut into windows of --length tokens, and the tokens of each window's second half are predicted
// from all before them in the window, as llama.cpp's perplexity tool does it.
// test: {model} {source}/examples/data/river_report.txt --length 128 --windows 2

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/io/atomic_file.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/perplexity.hpp>
#include <common/progress.hpp>
#include <common/run_program.hpp>
#include <common/text_tokens.hpp>
#include <common/unwrap.hpp>

namespace {

using namespace prefillshare;
using namespace prefillshare::examples;

struct Options {
  std::string model, text, tokenizer, json;
  std::int64_t length = 512;
  std::int64_t windows = 40;
  int threads = 0;
};

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
  ProgressLine progress("perplexity of " + options.model);
  const PerplexitySums sums =
      score_windows(*loaded.model, windows, pool, [&](std::int64_t done, const PerplexitySums& now) {
        progress.update(done, static_cast<std::int64_t>(windows.size()), codegemm::concat(now.perplexity()));
      });
  std::printf("%s: perplexity %.4f +- %.4f on %lld tokens of %s\n", options.model.c_str(), sums.perplexity(),
              sums.error(), static_cast<long long>(sums.tokens), options.text.c_str());
  if (!options.json.empty()) {
    const nlohmann::json out = {{"model", options.model},   {"text", options.text},
                                {"length", options.length}, {"windows", windows.size()},
                                {"tokens", sums.tokens},    {"perplexity", sums.perplexity()},
                                {"error", sums.error()}};
    check(codegemm::write_file(options.json, out.dump(2) + "\n"));
  }
  return std::isfinite(sums.perplexity()) ? 0 : 1;
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
  return run_program("perplexity", app, argc, argv, [&] { return run(options); });
}
