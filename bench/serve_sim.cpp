// SPDX-License-Identifier: Apache-2.0
//
// bench/serve_sim.cpp - suite serve-sim: the runs of serve-gpu's results, simulated again with the step times
// that were measured beside them, and how far p50 and p95 are off. Needs no GPU: the same engine, workers,
// allocator and admission run in simulated time.
//
// A plan of runs that have not been made (entries like rows of the results, without what was measured) is
// simulated the same way, with the step times of another file: predictions. So are the rows of
// multi-gpu-serve (a prefill and a decode GPU).
//
// usage: serve-sim [--from bench/results/serve-gpu-CARD.json] [--costs FILE] [--json FILE]

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <codegemm/base/executor.hpp>

#include "support/cost_tables.hpp"
#include "support/cpu_program.hpp"
#include "support/machine.hpp"
#include "support/report.hpp"
#include "support/serve_plan.hpp"

namespace codegemm::bench {
namespace {

using nlohmann::json;

/// What the run of such a row measures, by simulation.
CardOutcome simulate(const json& row, const json& costs) {
  CardShape shape;
  shape.kv = {32, 8, 128, 16};  // Llama-3.1-8B
  shape.vocab_size = 128256;
  shape.max_context = 131072;
  shape.blocks = row.at("kv_budget_bytes").get<std::int64_t>() / shape.kv.bytes_per_block(2);
  return simulate_point(point_of(row), shape, costs);
}

/// What a row of multi-gpu-serve measures: a prefill and a decode GPU are a card whose two sides run beside
/// each other, each as fast as alone; the hand-off, which the prefill hides, takes no time. The prefill GPU's
/// memory is what is counted; all sessions are there at once.
CardOutcome simulate_pair(const json& row, const json& costs) {
  ServePoint point = point_of({{"system", row.at("name")}, {"sessions_per_s", 1e6}});
  point.weights = "m1v4g128";
  point.sessions = row.at("sessions").get<std::int64_t>();
  point.chunk_tokens = 2048;
  CardOptions options = point.options();
  options.beside = true;
  options.largest_first = false;
  options.admission = false;
  CardShape shape;
  shape.kv = {32, 8, 128, 16};
  shape.vocab_size = 128256;
  shape.max_context = 131072;
  shape.most_running = 8;
  shape.blocks = row.at("prefill_blocks").get<std::int64_t>();
  const auto cost = cost_from_rows(costs, "fp16", point.weights);
  if (!cost.ok()) throw std::runtime_error(cost.status().message());
  for (const double size : cost->decode.x) shape.batch_sizes.push_back(static_cast<std::int64_t>(size));
  return simulate_card(shape, *cost, point.workload(), options, &*cost);
}

/// The row beside what was measured.
json compare_pair(const json& row, const CardOutcome& outcome) {
  const prefillshare::Percentiles sessions = prefillshare::percentiles(outcome.sessions);
  json out{{"name", "pair"}, {"system", row.at("name")}, {"sessions", row.at("sessions")}};
  for (const auto& [what, simulated] :
       {std::pair<const char*, double>{"tokens_per_s", outcome.tokens_per_second},
        {"session_p50_s", sessions.p50},
        {"session_p95_s", sessions.p95},
        {"hit_ratio", outcome.hit_ratio()}}) {
    const auto real = row.at(what).get<double>();
    out[what] = {{"simulated", simulated}, {"real", real}, {"off", simulated / real - 1.0}};
  }
  return out;
}

int run(int argc, char** argv) {
  std::string from = bench_file("results/serve-gpu-h200.json");
  std::string costs_path;
  std::string json_path;
  CLI::App app("Runs on one card, simulated with the step times measured beside them");
  app.add_option("--from", from, "Results of serve-gpu or multi-gpu-serve, or a plan of runs");
  app.add_option("--costs", costs_path, "Results with the step times; default: the same");
  app.add_option("--json", json_path, "Write the results to this file");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  const auto read = [](const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    return json::parse(file);
  };
  const json measured = read(from);
  const json timed = costs_path.empty() ? measured : read(costs_path);
  SerialExecutor executor;
  Suite suite;
  suite.name = "serve-sim";
  suite.machine = machine_json(executor);
  suite.memory = measure_memory(executor);
  json out_rows = json::array();
  for (const json& row : measured.at("rows")) {
    if (row.value("part", "") == "serve") {
      out_rows.push_back(compare_pair(row, simulate_pair(row, timed.at("rows"))));
      std::printf("%s\n", out_rows.back().dump().c_str());
      continue;
    }
    if (!row.contains("system")) continue;
    const CardOutcome outcome = simulate(row, timed.at("rows"));
    json out = point_row(point_of(row));
    out["kv_budget_bytes"] = row.at("kv_budget_bytes");
    const bool made = row.contains("session_s");
    const auto beside = [made](double simulated, const json& real) {
      json pair{{"simulated", simulated}};
      if (made) {
        pair["real"] = real;
        pair["off"] = simulated / real.get<double>() - 1.0;
      }
      return pair;
    };
    const auto compare = [&](const char* what, const std::vector<double>& seconds) {
      const prefillshare::Percentiles simulated = prefillshare::percentiles(seconds);
      for (const auto& [share, value] :
           {std::pair<const char*, double>{"p50", simulated.p50}, {"p95", simulated.p95}}) {
        out[what][share] = beside(value, made ? row.at(what).at(share) : json());
      }
    };
    compare("session_s", outcome.sessions);
    compare("call_s", outcome.calls);
    out["tokens_per_s"] = beside(outcome.tokens_per_second, made ? row.at("tokens_per_s") : json());
    out["steady_tokens_per_s"] =
        beside(outcome.steady_tokens_per_second, made ? row.at("steady_tokens_per_s") : json());
    out["hit_ratio"] = beside(outcome.hit_ratio(), made ? row.at("hit_ratio") : json());
    std::printf("%s\n", out.dump().c_str());
    out_rows.push_back(std::move(out));
  }
  if (json_path.empty()) return 0;
  json out = frame_json(suite, std::move(out_rows));
  const std::string& costs = costs_path.empty() ? from : costs_path;
  out["step_times"] = {{"file", costs.substr(costs.find_last_of('/') + 1)},
                       {"machine", timed.at("machine")},
                       {"commit", timed.at("commit")},
                       {"date", timed.at("date")}};
  if (Status s = write_text(out.dump(2) + '\n', json_path); !s.ok()) throw std::runtime_error(s.message());
  return 0;
}

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) {
  return codegemm::bench::run_suite("serve-sim", argc, argv, codegemm::bench::run);
}
