// SPDX-License-Identifier: Apache-2.0
//
// bench/model_cpu.cpp - a whole model on the CPU: seconds of a prefill and of decode steps with every linear
// layer through codegemm::gemm(), against llama.cpp on the GGUF file itself. Peers that are not installed are
// left out (scripts/bench --with-peers installs them).

#if !defined(NDEBUG) && !defined(__clang_analyzer__)
#error "Benchmarks must be built in Release mode: cmake --preset bench"
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/format.hpp>
#include <common/model_loader.hpp>
#include <common/progress.hpp>
#include <common/quantized_model.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/model/forward.hpp>

#include "support/machine.hpp"
#include "support/peer_process.hpp"
#include "support/report.hpp"

namespace prefillshare::examples {
namespace {

using codegemm::bench::median;
using codegemm::bench::seconds_since;

struct Options {
  std::string model, cache, json;
  std::vector<std::string> formats = {"m2v2b4g64", "m2v4b4g64", "m1v4g64"};
  std::int64_t prefill = 512;
  std::int64_t decode = 128;
  std::int64_t rounds = 5;
  int threads = 0;
};

/// Medians over the rounds: one prefill of an empty cache, one decode step behind it.
struct Times {
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
};

/// The same tokens for everybody, without a tokenizer: only their number matters for the time.
std::vector<std::int32_t> some_tokens(std::int64_t count, std::int64_t vocabulary) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<std::int32_t>((i * 7919 + 1000) % vocabulary));
  }
  return tokens;
}

template <LinearLayer Linear>
Times time_model(const LlamaModel<Linear>& model, const Options& options, Executor& executor) {
  const ModelConfig& c = model.config;
  const std::int64_t context = options.prefill + options.decode;
  const KvShape shape = kv_shape(c);
  const std::int64_t block_count = (context + shape.block_tokens - 1) / shape.block_tokens;
  HostKvStorage storage = unwrap(HostKvStorage::create(shape, block_count));
  std::vector<BlockId> blocks;
  for (std::int64_t i = 0; i < block_count; ++i) blocks.push_back(static_cast<BlockId>(i));
  ForwardWorkspace workspace =
      unwrap(ForwardWorkspace::create(model, options.prefill, context, executor.workers()));
  const std::vector<std::int32_t> tokens = some_tokens(context, c.vocab_size);
  std::vector<float> logits(static_cast<std::size_t>(c.vocab_size));
  const MatrixView<float> last(logits.data(), 1, c.vocab_size);
  const std::span<const std::int32_t> all(tokens);
  std::vector<double> prefills;
  std::vector<double> steps;
  for (std::int64_t round = 0; round <= options.rounds; ++round) {  // the first is not counted
    auto start = std::chrono::steady_clock::now();
    check(forward(model, all.first(static_cast<std::size_t>(options.prefill)), {&storage, blocks, 0}, last,
                  workspace, executor));
    if (round > 0) prefills.push_back(seconds_since(start));
    start = std::chrono::steady_clock::now();
    for (std::int64_t i = options.prefill; i < context; ++i) {
      check(forward(model, all.subspan(static_cast<std::size_t>(i), 1), {&storage, blocks, i}, last,
                    workspace, executor));
    }
    if (round > 0) steps.push_back(seconds_since(start) / static_cast<double>(options.decode));
    if (!std::isfinite(logits[0])) throw UserError("the model's logits are not finite");
  }
  return {median(prefills), median(steps)};
}

/// llama.cpp by llama_peer.py; zeros where it is not installed.
Times time_llama(const Options& options, int threads) {
  const std::vector<double> out =
      codegemm::bench::run_peer("", "llama_peer.py",
                                codegemm::concat("'", options.model, "' ", threads, ' ', options.prefill, ' ',
                                                 options.decode, ' ', options.rounds),
                                2);
  return out.empty() ? Times{} : Times{out[0], out[1]};
}

class Suite {
 public:
  Suite(const Options& options, Executor& executor) : options_(options) {
    suite_.name = "model-cpu";
    suite_.machine = codegemm::bench::machine_json(executor);
    std::fprintf(stderr, "measuring memory on %d thread(s) ...\n", executor.workers());
    suite_.memory = codegemm::bench::measure_memory(executor);
  }

  /// bytes: of the linear layers, all of which a step reads.
  void add(const std::string& config, double bits, std::int64_t bytes, const Times& ours, const Times& peer) {
    add_row("prefill", config, bits, bytes, options_.prefill, ours.prefill_seconds,
            static_cast<double>(options_.prefill), peer.prefill_seconds);
    add_row("decode", config, bits, bytes, 1, ours.decode_seconds, 1.0, peer.decode_seconds);
  }

  void write(const std::string& path) const {
    check(codegemm::bench::write_text(codegemm::bench::frame_json(suite_, rows_).dump(2) + '\n', path));
  }

 private:
  void add_row(const char* name, const std::string& config, double bits, std::int64_t bytes,
               std::int64_t tokens, double seconds, double tokens_each, double peer) {
    const double rate = tokens_each / seconds;
    const double gb_per_s = static_cast<double>(bytes) / seconds * 1e-9;
    nlohmann::json row = {{"name", name},
                          {"config", config},
                          {"tokens", tokens},
                          {"bits_per_weight", bits},
                          {"median_us", seconds * 1e6},
                          {"tokens_per_s", rate},
                          {"gb_per_s", gb_per_s},
                          {"share_of_read", gb_per_s / suite_.memory.read_gb_per_s},
                          {"peers", nlohmann::json::array()}};
    std::printf("%-8s %-10s %5.2f bits  %9.1f tokens/s", name, config.c_str(), bits, rate);
    if (peer > 0.0) {
      row["peers"].push_back({{"name", "llama.cpp"}, {"median_us", peer * 1e6}, {"ratio", peer / seconds}});
      std::printf("   llama.cpp %9.1f tokens/s, ratio %.2f", tokens_each / peer, peer / seconds);
    }
    std::printf("\n");
    std::fflush(stdout);
    rows_.push_back(std::move(row));
  }

  const Options& options_;
  codegemm::bench::Suite suite_;
  nlohmann::json rows_ = nlohmann::json::array();
};

int run(const Options& options) {
  codegemm::ThreadPool pool(options.threads);
  const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
  const LoadedModel loaded = unwrap(load_model(*source));
  Suite suite(options, pool);
  const Times peer = time_llama(options, pool.workers());
  for (const std::string& name : options.formats) {
    const codegemm::Format format = unwrap(codegemm::parse_format(name));
    ProgressLine progress("quantizing as " + name);
    const auto model =
        unwrap(quantized_model(loaded, format, options.cache, pool,
                               [&](std::int64_t done, std::int64_t total) { progress.update(done, total); }));
    const std::int64_t bytes = linear_bytes(*model);
    const double bits = 8.0 * static_cast<double>(bytes) / static_cast<double>(linear_weights(*model));
    suite.add(name, bits, bytes, time_model(*model, options, pool), peer);
  }
  if (!options.json.empty()) suite.write(options.json);
  return 0;
}

}  // namespace
}  // namespace prefillshare::examples

int main(int argc, char** argv) {
  prefillshare::examples::Options options;
  CLI::App app{"Prefill and decode of a whole model on the CPU, linear layers by codegemm::gemm()"};
  app.add_option("--model", options.model, "GGUF file of a Llama-family model")->required();
  app.add_option("--cache", options.cache, "folder that keeps the quantized weights")->required();
  app.add_option("--format", options.formats, "formats of the linear layers")->capture_default_str();
  app.add_option("--prefill", options.prefill, "tokens of the prefill")->check(CLI::Range(1, 1 << 16));
  app.add_option("--decode", options.decode, "decode steps behind it")->check(CLI::Range(1, 1 << 16));
  app.add_option("--rounds", options.rounds, "times that both are done")->check(CLI::Range(1, 1000));
  app.add_option("--threads", options.threads, "0: one for each processor")->check(CLI::Range(0, 1024));
  app.add_option("--json", options.json, "write the results to this file");
  CLI11_PARSE(app, argc, argv);
  try {
    return prefillshare::examples::run(options);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "model-cpu: %s\n", e.what());
    return 2;
  }
}
