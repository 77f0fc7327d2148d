// SPDX-License-Identifier: Apache-2.0
//
// bench/serve_sim.cpp - suite serve-sim: the runs of serve-gpu's results, simulated again with the step times
// that were measured beside them, and how far p50 and p95 are off. Needs no GPU: the same engine, workers,
// allocator and admission run in simulated time.
//
// usage: serve-sim [--from bench/results/serve-gpu-CARD.json] [--json FILE]

#if !defined(NDEBUG) && !defined(__clang_analyzer__)
#error "Benchmarks must be built in Release mode: cmake --preset bench"
#endif

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <codegemm/base/executor.hpp>

#include "support/cost_tables.hpp"
#include "support/machine.hpp"
#include "support/report.hpp"
#include "support/sim_card.hpp"

#if !defined(CODEGEMM_BENCH_FOLDER)
#define CODEGEMM_BENCH_FOLDER "bench"  // from the repository's root
#endif

namespace codegemm::bench {
namespace {

using nlohmann::json;

CardSharing sharing_of(const std::string& system) {
  for (const CardSharing one : {CardSharing::kSeparate, CardSharing::kPooled, CardSharing::kShared}) {
    if (system == name_of(one)) return one;
  }
  throw std::runtime_error("unknown system " + system);
}

/// What the run of such a row would have measured.
CardOutcome simulate(const json& row, const json& rows) {
  prefillshare::AgentPattern pattern;
  pattern.name = row.at("name").get<std::string>();
  pattern.prompt_tokens = row.at("prompt_tokens").get<std::int32_t>();
  pattern.fewest_turns = pattern.most_turns = row.at("turns").get<std::int32_t>();
  for (std::size_t i = 0; i < row.at("answer_tokens").size(); ++i) {
    pattern.agents.push_back(
        {row["answer_tokens"][i].get<std::int32_t>(), row.at("observation_tokens")[i].get<std::int32_t>()});
  }
  const auto workload = prefillshare::make_workload(pattern, row.at("sessions").get<std::int64_t>(),
                                                    row.at("sessions_per_s").get<double>(), 1);
  if (!workload.ok()) throw std::runtime_error(workload.status().message());
  const std::string weights = row.at("config").get<std::string>();
  const auto cost = cost_from_rows(rows, "fp16", weights);
  if (!cost.ok()) throw std::runtime_error(cost.status().message());
  CardShape shape;
  shape.kv = {32, 8, 128, 16};  // Llama-3.1-8B
  shape.vocab_size = 128256;
  shape.max_context = 131072;
  shape.blocks = row.at("kv_budget_bytes").get<std::int64_t>() / shape.kv.bytes_per_block(2);
  for (const double size : cost->decode.x) shape.batch_sizes.push_back(static_cast<std::int64_t>(size));
  CardOptions options;
  options.sharing = sharing_of(row.at("system").get<std::string>());
  options.agents = row.at("agents").get<int>();
  options.chunk_tokens = row.at("chunk_tokens").get<std::int64_t>();
  options.admission = row.at("admission").get<bool>();
  return simulate_card(shape, *cost, *workload, options);
}

int run(int argc, char** argv) {
  std::string from = std::string(CODEGEMM_BENCH_FOLDER) + "/results/serve-gpu-h200.json";
  std::string json_path;
  CLI::App app("Runs on one card, simulated with the step times measured beside them");
  app.add_option("--from", from, "Results of serve-gpu");
  app.add_option("--json", json_path, "Write the results to this file");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  std::ifstream file(from);
  if (!file) throw std::runtime_error(from + ": cannot be read");
  const json measured = json::parse(file);
  const json& rows = measured.at("rows");
  SerialExecutor executor;
  Suite suite;
  suite.name = "serve-sim";
  suite.machine = machine_json(executor);
  suite.memory = measure_memory(executor);
  json out_rows = json::array();
  for (const json& row : rows) {
    if (!row.contains("system")) continue;
    const CardOutcome outcome = simulate(row, rows);
    json out;
    for (const char* const field : {"name", "system", "config", "admission", "sessions_per_s", "sessions"}) {
      out[field] = row.at(field);
    }
    const auto compare = [&](const char* what, const prefillshare::Percentiles& simulated) {
      for (const auto& [share, value] :
           {std::pair<const char*, double>{"p50", simulated.p50}, {"p95", simulated.p95}}) {
        const double real = row.at(what).at(share).get<double>();
        out[what][share] = {{"real", real}, {"simulated", value}, {"off", value / real - 1.0}};
      }
    };
    compare("session_s", prefillshare::percentiles(outcome.sessions));
    compare("call_s", prefillshare::percentiles(outcome.calls));
    const double real = row.at("tokens_per_s").get<double>();
    out["tokens_per_s"] = {{"real", real},
                           {"simulated", outcome.tokens_per_second},
                           {"off", outcome.tokens_per_second / real - 1.0}};
    std::printf("%s\n", out.dump().c_str());
    out_rows.push_back(std::move(out));
  }
  if (json_path.empty()) return 0;
  json out = frame_json(suite, std::move(out_rows));
  out["real"] = {{"file", from.substr(from.find_last_of('/') + 1)},
                 {"machine", measured.at("machine")},
                 {"commit", measured.at("commit")},
                 {"date", measured.at("date")}};
  if (Status s = write_text(out.dump(2) + '\n', json_path); !s.ok()) throw std::runtime_error(s.message());
  return 0;
}

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) {
  try {
    return codegemm::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "serve-sim: %s\n", error.what());
    return 1;
  }
}
