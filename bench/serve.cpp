// SPDX-License-Identifier: Apache-2.0
//
// bench/serve.cpp - four agents on one machine, on a real model and real text: one prefill for all of them
// against one prefill for each, with the same memory for KV. Everything is executed; nothing is simulated.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <codegemm/base/thread_pool.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/quantized_model.hpp>
#include <common/text_tokens.hpp>

#include "support/cpu_program.hpp"
#include "support/machine.hpp"
#include "support/report.hpp"
#include "support/serve_plot.hpp"
#include "support/serve_system.hpp"

namespace codegemm::bench {
namespace {

using nlohmann::json;
using prefillshare::examples::unwrap;

struct Options {
  std::string model, text, json_path, plot, cache, format;
  std::int64_t blocks = 0;
  std::int64_t chunk = 128;
  int threads = 0;
  bool quick = false;
};

constexpr int kAgents = 4;

/// Lengths of a call, fixed as the paper has them fixed, and scaled to a model and a machine this small:
/// reading is most of an agent's work. ReAct: a thought and an observation join the context before each call.
/// Reflexion: several trials, each with a longer reflection.
const Pattern kReact{"react", 160, 2, 56, 8};
const Pattern kReflexion{"reflexion", 96, 3, 40, 10};

double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  const auto at = static_cast<std::size_t>(std::ceil(share * static_cast<double>(values.size())));
  return values[std::min(values.size() - 1, at > 0 ? at - 1 : 0)];
}
json percentiles(const std::vector<double>& values) {
  return {
      {"p50", percentile(values, 0.5)}, {"p95", percentile(values, 0.95)}, {"p99", percentile(values, 0.99)}};
}

/// The tokens that join each session's context: stretches of the text, each session beginning elsewhere.
std::vector<std::vector<std::int32_t>> session_texts(const std::vector<std::int32_t>& ids,
                                                     const Pattern& pattern, std::int64_t sessions) {
  const auto count = static_cast<std::size_t>(pattern.document + pattern.turns * kAgents * pattern.input);
  std::vector<std::vector<std::int32_t>> out;
  for (std::int64_t i = 0; i < sessions; ++i) {
    std::vector<std::int32_t>& text = out.emplace_back();
    const std::size_t first =
        static_cast<std::size_t>(i) * ids.size() / static_cast<std::size_t>(sessions) + 1;
    for (std::size_t t = 0; t < count; ++t) text.push_back(ids[(first + t) % ids.size()]);
  }
  return out;
}

template <prefillshare::LinearLayer Decode>
struct Bench {
  const Options& options;
  std::shared_ptr<const LlamaModel<DenseLinear>> base;
  std::shared_ptr<const LlamaModel<Decode>> decode;
  std::string format;
  const std::vector<std::int32_t>& ids;
  Executor& executor;
  json& rows;
  std::vector<Panel>& panels;

  /// All three systems at each number of sessions; the answers of all must be the same.
  void sweep(const Pattern& pattern, const std::vector<std::int64_t>& concurrencies) {
    const std::int64_t block_tokens = prefillshare::kv_shape(base->config).block_tokens;
    // The context, a copy of its last block, and the answer.
    const std::int64_t session_blocks = pattern.context(kAgents) / block_tokens + 3;
    // By default what the shared system needs for the most sessions at once; no pool is too small for one.
    const std::int64_t blocks = options.blocks > 0
                                    ? options.blocks
                                    : std::max<std::int64_t>(concurrencies.back(), kAgents) * session_blocks;
    Panel throughput{pattern.name + ", " + format + ": answers", "token/s", {}};
    Panel latency{pattern.name + ", " + format + ": p95 of a call", "s", {}};
    std::map<std::pair<Sharing, std::int64_t>, std::pair<double, double>> measured;  // tokens/s, p95
    std::map<std::int64_t, std::vector<std::vector<std::int32_t>>> contexts;
    for (const Sharing sharing : {Sharing::kShared, Sharing::kPooled, Sharing::kSeparate}) {
      Curve tokens{name_of(sharing), {}};
      Curve p95{name_of(sharing), {}};
      for (const std::int64_t concurrency : concurrencies) {
        ServeSystem<Decode> system(
            base, decode,
            {sharing, kAgents, blocks, options.chunk, pattern.context(kAgents) + 16, concurrency}, executor);
        const auto texts = session_texts(ids, pattern, concurrency);
        const Outcome outcome = system.run(pattern, texts);
        report(pattern, sharing, concurrency, blocks, outcome);
        std::vector<double> ends;
        for (const CallTimes& call : outcome.calls) ends.push_back(call.end);
        const double rate = static_cast<double>(outcome.output_tokens) / outcome.seconds;
        measured[{sharing, concurrency}] = {rate, percentile(ends, 0.95)};
        tokens.points.emplace_back(concurrency, rate);
        p95.points.emplace_back(concurrency, percentile(ends, 0.95));
        if (sharing == Sharing::kShared) contexts[concurrency] = outcome.contexts;
        count_differences(contexts[concurrency], outcome.contexts);
      }
      throughput.curves.push_back(std::move(tokens));
      latency.curves.push_back(std::move(p95));
    }
    panels.push_back(std::move(throughput));
    panels.push_back(std::move(latency));
    for (const Sharing sharing : {Sharing::kPooled, Sharing::kSeparate}) {
      for (const std::int64_t concurrency : concurrencies) {
        const auto [rate, p95] = measured[{sharing, concurrency}];
        const auto [shared_rate, shared_p95] = measured[{Sharing::kShared, concurrency}];
        row({{"name", pattern.name + "_ratio"},
             {"config", format},
             {"against", name_of(sharing)},
             {"sessions", concurrency},
             {"throughput_ratio", shared_rate / rate},
             {"p95_ratio", p95 / shared_p95}});
      }
    }
  }

  void report(const Pattern& pattern, Sharing sharing, std::int64_t concurrency, std::int64_t blocks,
              const Outcome& outcome) {
    std::vector<double> ends;
    std::vector<double> firsts;
    std::vector<double> per_token;
    for (const CallTimes& call : outcome.calls) {
      ends.push_back(call.end);
      firsts.push_back(call.first_token);
      per_token.push_back((call.end - call.first_token) / static_cast<double>(pattern.output - 1));
    }
    const std::int64_t wanted = outcome.reused_tokens + outcome.computed_tokens;
    row({{"name", pattern.name},
         {"config", format},
         {"system", name_of(sharing)},
         {"sessions", concurrency},
         {"agents", kAgents},
         {"document_tokens", pattern.document},
         {"turns", pattern.turns},
         {"input_tokens", pattern.input},
         {"output_tokens", pattern.output},
         {"context_tokens", pattern.context(kAgents)},
         {"seconds", outcome.seconds},
         {"tokens_per_s", static_cast<double>(outcome.output_tokens) / outcome.seconds},
         {"call_s", percentiles(ends)},
         {"session_s", percentiles(outcome.sessions)},
         {"first_token_s", percentiles(firsts)},
         {"time_per_token_s", percentiles(per_token)},
         {"prefilled_tokens", outcome.computed_tokens},
         {"hit_ratio",
          wanted > 0 ? static_cast<double>(outcome.reused_tokens) / static_cast<double>(wanted) : 0.0},
         {"kv_bytes", outcome.kv_bytes},
         {"kv_budget_bytes", blocks * prefillshare::kv_shape(base->config).bytes_per_block()}});
  }
  void row(json one) {
    std::printf("%s\n", one.dump().c_str());
    std::fflush(stdout);
    rows.push_back(std::move(one));
  }
  /// All systems run the same weights, so they answer alike, but for the rounding of other batches.
  static void count_differences(const std::vector<std::vector<std::int32_t>>& want,
                                const std::vector<std::vector<std::int32_t>>& got) {
    for (std::size_t i = 0; i < want.size(); ++i) {
      if (want[i].size() != got[i].size()) throw std::runtime_error("a session has another length");
      if (want[i] == got[i]) continue;
      const auto at = std::mismatch(want[i].begin(), want[i].end(), got[i].begin()).first - want[i].begin();
      std::fprintf(stderr, "serve: session %zu differs from the shared system's from token %td on\n", i, at);
    }
  }
};

int run(int argc, char** argv) {
  Options options;
  options.text = bench_file("../examples/data/river_report.txt");
  if (const char* path = std::getenv("PREFILLSHARE_TEST_MODEL"); path != nullptr) options.model = path;
  CLI::App app("Four agents on one machine: one prefill for all, or one for each");
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder (PREFILLSHARE_TEST_MODEL)");
  app.add_option("--text", options.text, "What the agents read")->capture_default_str();
  app.add_option("--json", options.json_path, "Write the results to this file");
  app.add_option("--plot", options.plot, "Draw throughput and latency into this SVG file");
  app.add_option("--format", options.format,
                 "Also with decode modules in this format (m1v4g64), at most sessions");
  app.add_option("--cache", options.cache, "Folder for quantized weights (default: beside the model)");
  app.add_option("--blocks", options.blocks, "Blocks of KV memory in all (0: what sharing needs)");
  app.add_option("--chunk", options.chunk, "Tokens of a prefill step")->capture_default_str();
  app.add_option("--threads", options.threads, "0: one for each processor");
  app.add_flag("--quick", options.quick, "One short pattern: to see that it runs");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  if (options.model.empty()) throw std::runtime_error("needs --model FILE (scripts/fetch-model tells one)");
  if (options.cache.empty()) options.cache = std::filesystem::path(options.model).parent_path().string();
  ThreadPool pool(options.threads);
  Suite suite;
  suite.name = "serve";
  suite.machine = machine_json(pool);
  suite.memory = measure_memory(pool);
  const auto source = unwrap(prefillshare::examples::open_model(options.model));
  const prefillshare::examples::LoadedModel loaded = unwrap(prefillshare::examples::load_model(*source, {}));
  const auto tokenizer = unwrap(prefillshare::examples::load_tokenizer(options.model));
  const std::vector<std::int32_t> ids = prefillshare::examples::tokens_of_file(options.text, tokenizer);
  if (ids.size() < 64) throw std::runtime_error(options.text + ": too short a text");

  json rows = json::array();
  std::vector<Panel> panels;
  Bench<DenseLinear> dense{options, loaded.model, loaded.model, "dense", ids, pool, rows, panels};
  if (options.quick) {
    dense.sweep({"react", 32, 1, 12, 3}, {1, 2});
  } else {
    dense.sweep(kReact, {1, 2, 4});
    dense.sweep(kReflexion, {1, 2, 4});
  }
  if (!options.format.empty()) {
    const auto quantized = unwrap(prefillshare::examples::quantized_model(
        loaded, unwrap(parse_format(options.format)), options.cache, pool));
    Bench<prefillshare::CodeGemmLinear> coded{options, loaded.model, quantized, options.format,
                                              ids,     pool,         rows,      panels};
    if (options.quick) {
      coded.sweep({"react", 32, 1, 12, 3}, {2});
    } else {
      coded.sweep(kReact, {4});
    }
  }
  if (!options.json_path.empty()) {
    if (Status s = write_text(frame_json(suite, rows).dump(2) + '\n', options.json_path); !s.ok()) {
      throw std::runtime_error(s.message());
    }
  }
  if (!options.plot.empty()) {
    if (Status s = write_text(panels_svg(panels), options.plot); !s.ok())
      throw std::runtime_error(s.message());
  }
  return 0;
}

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) {
  return codegemm::bench::run_suite("serve", argc, argv, codegemm::bench::run);
}
