// SPDX-License-Identifier: Apache-2.0
//
// bench/model_cpu.cpp - a whole model on the CPU: seconds of a prefill and of decode steps with every linear
// layer through codegemm::gemm(), against llama.cpp on the GGUF file itself, all formats and llama.cpp in
// turns. Peers that are not installed are left out (scripts/bench --with-peers installs them).

#if !defined(NDEBUG) && !defined(__clang_analyzer__)
#error "Benchmarks must be built in Release mode: cmake --preset bench"
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <thread>
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
#include "support/pinning.hpp"
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

/// One prefill of an empty cache, one decode step behind it: of each round.
struct Times {
  std::vector<double> prefills;
  std::vector<double> steps;
};

/// The same tokens for everybody, without a tokenizer: only their number matters for the time.
std::vector<std::int32_t> some_tokens(std::int64_t count, std::int64_t vocabulary) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<std::int32_t>((i * 7919 + 1000) % vocabulary));
  }
  return tokens;
}

/// A model with its cache and memory, a prefill and decode steps a round.
class ModelRounds {
 public:
  ModelRounds(const QuantizedModel& model, const Options& options, Executor& executor)
      : model_(model),
        prefill_(options.prefill),
        executor_(executor),
        tokens_(some_tokens(options.prefill + options.decode, model.config.vocab_size)),
        logits_(static_cast<std::size_t>(model.config.vocab_size)),
        blocks_(some_blocks(context(), kv_shape(model.config).block_tokens)),
        storage_(unwrap(HostKvStorage::create(kv_shape(model.config), std::ssize(blocks_)))),
        workspace_(unwrap(ForwardWorkspace::create(model, options.prefill, context(), executor.workers()))) {}

  void run(bool counted) {
    const MatrixView<float> last(logits_.data(), 1, model_.config.vocab_size);
    const std::span<const std::int32_t> all(tokens_);
    auto start = std::chrono::steady_clock::now();
    check(forward(model_, all.first(static_cast<std::size_t>(prefill_)), {&storage_, blocks_, 0}, last,
                  workspace_, executor_));
    const double prefill = seconds_since(start);
    start = std::chrono::steady_clock::now();
    for (std::int64_t i = prefill_; i < context(); ++i) {
      check(forward(model_, all.subspan(static_cast<std::size_t>(i), 1), {&storage_, blocks_, i}, last,
                    workspace_, executor_));
    }
    const double step = seconds_since(start) / static_cast<double>(context() - prefill_);
    if (!std::isfinite(logits_[0])) throw UserError("the model's logits are not finite");
    if (!counted) return;
    times_.prefills.push_back(prefill);
    times_.steps.push_back(step);
  }

  [[nodiscard]] const Times& times() const { return times_; }

 private:
  [[nodiscard]] std::int64_t context() const { return std::ssize(tokens_); }
  [[nodiscard]] static std::vector<BlockId> some_blocks(std::int64_t tokens, std::int64_t block_tokens) {
    std::vector<BlockId> blocks;
    for (std::int64_t i = 0; i * block_tokens < tokens; ++i) blocks.push_back(static_cast<BlockId>(i));
    return blocks;
  }

  const QuantizedModel& model_;
  std::int64_t prefill_;
  Executor& executor_;
  std::vector<std::int32_t> tokens_;
  std::vector<float> logits_;
  std::vector<BlockId> blocks_;
  HostKvStorage storage_;
  ForwardWorkspace workspace_;
  Times times_;
};

/// llama.cpp by llama_peer.py.
class LlamaRounds {
 public:
  LlamaRounds(const Options& options, int threads)
      : server_(
            "", "llama_peer.py",
            codegemm::concat("'", options.model, "' ", threads, ' ', options.prefill, ' ', options.decode)) {}
  [[nodiscard]] bool installed() { return server_.ready(); }

  void run(bool counted) {
    const std::vector<double> out = server_.ask(1, 2);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // its threads go on polling for a while
    if (out.size() != 2) throw UserError("llama.cpp's process has ended");
    if (!counted) return;
    times_.prefills.push_back(out[0]);
    times_.steps.push_back(out[1]);
  }

  [[nodiscard]] const Times& times() const { return times_; }

 private:
  codegemm::bench::PeerServer server_;
  Times times_;
};

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
    add_row("prefill", config, bits, bytes, options_.prefill, median(ours.prefills),
            static_cast<double>(options_.prefill), median(peer.prefills));
    add_row("decode", config, bits, bytes, 1, median(ours.steps), 1.0, median(peer.steps));
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
  const cpu_set_t allowed = codegemm::bench::allowed_processors();
  codegemm::ThreadPool pool(options.threads);
  LlamaRounds llama(options, pool.workers());
  codegemm::bench::pin_workers(pool, allowed);
  const std::unique_ptr<TensorSource> source = unwrap(open_model(options.model));
  const LoadedModel loaded = unwrap(load_model(*source));
  const bool with_llama = llama.installed();  // loaded, too
  Suite suite(options, pool);
  std::vector<std::shared_ptr<const QuantizedModel>> models;
  std::list<ModelRounds> ours;
  for (const std::string& name : options.formats) {
    const codegemm::Format format = unwrap(codegemm::parse_format(name));
    ProgressLine progress("quantizing as " + name);
    models.push_back(unwrap(
        quantized_model(loaded, format, options.cache, pool,
                        [&](std::int64_t done, std::int64_t total) { progress.update(done, total); })));
    ours.emplace_back(*models.back(), options, pool);
  }
  for (std::int64_t round = 0; round <= options.rounds; ++round) {  // the first is not counted
    if (with_llama) llama.run(round > 0);
    for (ModelRounds& model : ours) model.run(round > 0);
  }
  auto rounds = ours.begin();
  for (std::size_t i = 0; i < models.size(); ++i, ++rounds) {
    const std::int64_t bytes = linear_bytes(*models[i]);
    const double bits = 8.0 * static_cast<double>(bytes) / static_cast<double>(linear_weights(*models[i]));
    suite.add(options.formats[i], bits, bytes, rounds->times(), llama.times());
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
