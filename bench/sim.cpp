// SPDX-License-Identifier: Apache-2.0
//
// bench/sim.cpp - the paper's cluster, simulated: separate caches against shared ones, over the router,
// admission and allocator of this library. The times of steps are a formula's
// (prefillshare/sim/cost_model.hpp), not measured ones; the wall time of the simulator itself is.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <codegemm/base/executor.hpp>
#include <prefillshare/sim/cluster.hpp>

#include "support/cpu_program.hpp"
#include "support/kv_trace.hpp"
#include "support/line_plot.hpp"
#include "support/machine.hpp"
#include "support/report.hpp"

namespace codegemm::bench {
namespace {

using nlohmann::json;
using prefillshare::AgentPattern;
using prefillshare::CacheSharing;
using prefillshare::Cluster;
using prefillshare::ClusterConfig;
using prefillshare::PrefixRouting;
using prefillshare::SimReport;
using prefillshare::StickyRouting;
using prefillshare::Workload;

constexpr double kMemory = 0.9 * 80e9;  // of a card, what an engine takes
constexpr double kActivations = 2e9;    // of that, not for weights or KV
constexpr double kPaperRate = 4.0;      // sessions a second
constexpr std::int64_t kSessions = 400;

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

template <class Policy>
SimReport simulate(const ClusterConfig& config, const Workload& workload, const Policy& policy) {
  auto cluster = Cluster<Policy>::create(config, workload, policy).value();
  SimReport report = cluster->run().value();
  check(cluster->check_idle());
  if (report.sessions_finished + report.sessions_refused != std::ssize(workload.sessions)) {
    throw std::runtime_error("a session did not end");
  }
  return report;
}

/// 8 cards of 80 GB, half of them for prefill. `models` lie on each prefill worker.
ClusterConfig paper_cluster(int models) {
  const prefillshare::RooflineSpec spec = prefillshare::a100_llama_8b();
  ClusterConfig config;
  config.block_tokens = 64;  // fewer events than with 16, the library's own default
  config.kv_bytes_per_token = spec.kv_bytes_per_token;
  config.cost = prefillshare::roofline_cost(spec);
  config.cost.link_seconds = 1e-3;
  config.cost.link_bytes_per_second = 100e9;  // assumed: a third of what NVLink 3 gives one way
  config.prefill_blocks = prefillshare::blocks_beside(kMemory, models * spec.weight_bytes + kActivations,
                                                      spec.kv_bytes_per_token, config.block_tokens);
  config.decode_blocks = prefillshare::blocks_beside(kMemory, spec.weight_bytes + kActivations,
                                                     spec.kv_bytes_per_token, config.block_tokens);
  return config;
}

/// Memory and order as the paper's engine: no reservation, caches that find no room go over PCIe 4 to the
/// host.
ClusterConfig as_the_paper(ClusterConfig config) {
  config.reserve_decode = false;
  config.staging_bytes_per_second = 20e9;
  return config;
}

struct Setting {
  const char* name;
  SimReport (*run)(std::int64_t sessions, const Workload& workload);
};

template <CacheSharing kSharing, int kModels, class Policy, bool kAdmission>
SimReport run_setting(std::int64_t sessions, const Workload& workload) {
  ClusterConfig config = paper_cluster(kModels);
  config.sharing = kSharing;
  config.most_sessions = sessions;
  if (kAdmission) {
    config.session_blocks_share = 0.7;  // of all contexts at their longest: sessions are not placed evenly
  } else {
    config = as_the_paper(config);
  }
  return simulate(config, workload, Policy());
}

const Setting kSettings[] = {
    {"separate, a pair for each model", run_setting<CacheSharing::kPerModule, 1, StickyRouting<>, false>},
    {"separate, pooled, prefix-routed, all weights on each",
     run_setting<CacheSharing::kPooled, 4, PrefixRouting, false>},
    {"separate, pooled, prefix-routed, weights for free",
     run_setting<CacheSharing::kPooled, 1, PrefixRouting, false>},
    {"shared, sticky (the paper)", run_setting<CacheSharing::kShared, 1, StickyRouting<>, false>},
    {"shared, prefix-routed", run_setting<CacheSharing::kShared, 1, PrefixRouting, false>},
    {"shared, prefix-routed, admission", run_setting<CacheSharing::kShared, 1, PrefixRouting, true>},
};

json row_of(const std::string& name, const std::string& workload, const std::string& setting,
            const SimReport& report) {
  return {{"name", name},
          {"workload", workload},
          {"setting", setting},
          {"hit_percent", 100.0 * report.hit_ratio()},
          {"tokens_per_s", report.tokens_per_second},
          {"session_p50_s", report.session_latency.p50},
          {"session_p95_s", report.session_latency.p95},
          {"session_p99_s", report.session_latency.p99},
          {"call_p50_s", report.call_latency.p50},
          {"call_p95_s", report.call_latency.p95},
          {"call_p99_s", report.call_latency.p99},
          {"ttft_p50_s", report.first_token.p50},
          {"ttft_p95_s", report.first_token.p95},
          {"ttft_p99_s", report.first_token.p99},
          {"tpot_mean_s", report.per_token.mean},
          {"prefill_busy", report.prefill_busy},
          {"decode_busy", report.decode_busy},
          {"mean_batch", report.mean_batch},
          {"preempted", report.preempted},
          {"staged", report.staged},
          {"prefill_kv_gb_mean", report.prefill_kv_bytes_mean / 1e9},
          {"decode_kv_gb_mean", report.decode_kv_bytes_mean / 1e9},
          {"transferred_gb", report.transferred_bytes / 1e9},
          {"simulated_s", report.seconds}};
}
void add(json& rows, json row) {
  std::printf("%s\n", row.dump().c_str());
  std::fflush(stdout);
  rows.push_back(std::move(row));
}

/// The paper's two figures: the sessions at once swept, and of each setting its best.
void sweep(json& rows, const AgentPattern& pattern, const std::string& plot) {
  const Workload workload = prefillshare::make_workload(pattern, kSessions, kPaperRate, 1).value();
  add(rows, {{"name", "ideal"},
             {"workload", pattern.name},
             {"prompt_tokens", pattern.prompt_tokens},
             {"turns", std::to_string(pattern.fewest_turns) + " to " + std::to_string(pattern.most_turns)},
             {"calls", std::ssize(workload.calls)},
             {"hit_percent_shared", 100.0 * prefillshare::ideal_hit_ratio(workload, true)},
             {"hit_percent_separate", 100.0 * prefillshare::ideal_hit_ratio(workload, false)}});
  Diagram hits{
      "prefix-cache hits, % of prompt tokens (" + pattern.name + ", 4 sessions/s)", "sessions at once", {}};
  Diagram speed{"generated tokens/s", "sessions at once", {}};
  Diagram latency{"p95 of a session, s, waiting for admission included", "sessions at once", {}};
  latency.logarithmic = true;
  json best = json::array();
  for (const Setting& setting : kSettings) {
    Curve hit_line{setting.name, {}};
    Curve speed_line{setting.name, {}};
    Curve latency_line{setting.name, {}};
    json most;
    for (const std::int64_t sessions : {10, 20, 30, 40, 60, 80, 110, 150, 200, 250}) {
      json row = row_of("sweep", pattern.name, setting.name, setting.run(sessions, workload));
      row["sessions_at_once"] = sessions;
      const auto x = static_cast<double>(sessions);
      hit_line.points.emplace_back(x, row["hit_percent"].get<double>());
      speed_line.points.emplace_back(x, row["tokens_per_s"].get<double>());
      latency_line.points.emplace_back(x, row["session_p95_s"].get<double>());
      if (most.is_null() || row["tokens_per_s"] > most["tokens_per_s"]) most = row;
      add(rows, std::move(row));
    }
    most["name"] = "best";
    best.push_back(std::move(most));
    hits.lines.push_back(std::move(hit_line));
    speed.lines.push_back(std::move(speed_line));
    latency.lines.push_back(std::move(latency_line));
  }
  for (json& row : best) {  // over the first, the paper's baseline: more is better
    row["throughput_ratio"] = row["tokens_per_s"].get<double>() / best[0]["tokens_per_s"].get<double>();
    row["session_p95_ratio"] = best[0]["session_p95_s"].get<double>() / row["session_p95_s"].get<double>();
    add(rows, row);
  }
  if (!plot.empty())
    check(write_text(plot_lines({hits, speed, latency}), plot + "-" + pattern.name + ".svg"));
}

/// Arrivals swept at the best concurrency of each: where latency begins to rise.
void rates(json& rows, const AgentPattern& pattern, const std::string& plot) {
  Diagram latency{
      "p95 of a call, s (" + pattern.name + ", sessions at once as is best for each)", "sessions/s", {}};
  latency.logarithmic = true;
  Diagram speed{"generated tokens/s", "sessions/s", {}};
  const std::pair<std::size_t, std::int64_t> chosen[] = {{0, 40}, {2, 40}, {3, 150}, {5, 250}};
  for (const auto& [which, sessions] : chosen) {
    const Setting& setting = kSettings[which];
    Curve latency_line{setting.name, {}};
    Curve speed_line{setting.name, {}};
    for (const double rate : {0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0}) {
      const Workload workload = prefillshare::make_workload(pattern, kSessions, rate, 2).value();
      json row = row_of("rate", pattern.name, setting.name, setting.run(sessions, workload));
      row["sessions_per_s"] = rate;
      row["sessions_at_once"] = sessions;
      latency_line.points.emplace_back(rate, row["session_p95_s"].get<double>());
      speed_line.points.emplace_back(rate, row["tokens_per_s"].get<double>());
      add(rows, std::move(row));
    }
    latency.lines.push_back(std::move(latency_line));
    speed.lines.push_back(std::move(speed_line));
  }
  if (!plot.empty()) check(write_text(plot_lines({speed, latency}), plot + "-rates.svg"));
}

/// The trace's requests, each a session of one call; every fourth to one of four modules.
Workload trace_workload(const std::string& path, double speed_up) {
  const Trace trace = read_trace(path);
  std::ifstream file(path);
  Workload workload;
  workload.name = "mooncake conversation";
  workload.modules = 4;
  std::size_t at = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream fields(line);
    std::int64_t time = 0;
    prefillshare::CallPlan call;
    if (!(fields >> time >> call.context >> call.output))
      throw std::runtime_error(path + ": a line without lengths");
    call.module = static_cast<std::int32_t>(at % 4);
    call.context = std::max(call.context, 1);
    call.output = std::max(call.output, 1);
    prefillshare::SessionPlan session;
    session.arrival = static_cast<double>(time) / 1000.0 / speed_up;
    session.calls = 1;
    session.first_call = static_cast<std::int64_t>(workload.calls.size());
    session.first_block = static_cast<std::int64_t>(workload.blocks.size());
    const std::vector<std::int32_t>& blocks = trace.requests.at(at++).blocks;
    session.blocks = static_cast<std::int32_t>(blocks.size());
    workload.blocks.insert(workload.blocks.end(), blocks.begin(), blocks.end());
    workload.calls.push_back(call);
    workload.sessions.push_back(session);
  }
  return workload;
}

void replay_trace(json& rows, const std::string& path) {
  // Three requests a second of 12,000 tokens on the mean: more than eight of these cards prefill. 16 + 16.
  const Workload workload = trace_workload(path, 1.0);
  for (const Setting& setting : kSettings) {
    const std::string name = setting.name;
    if (name.find("for free") != std::string::npos) continue;
    const bool pair = name.find("pair") != std::string::npos;
    const bool pooled = name.find("pooled") != std::string::npos;
    ClusterConfig config = paper_cluster(pooled ? 4 : 1);
    config.block_tokens = 512;  // the trace's
    config.prefill_blocks /= 8;
    config.decode_blocks /= 8;
    config.prefill_workers = config.decode_workers = 16;
    config.sharing = pair ? CacheSharing::kPerModule : pooled ? CacheSharing::kPooled : CacheSharing::kShared;
    if (name.find("admission") == std::string::npos) config = as_the_paper(config);
    const SimReport report = name.find("prefix") != std::string::npos
                                 ? simulate(config, workload, PrefixRouting())
                                 : simulate(config, workload, StickyRouting<>());
    json row = row_of("trace", workload.name, setting.name, report);
    row["requests"] = std::ssize(workload.calls);
    row["refused"] = report.sessions_refused;  // longer than a card's memory
    add(rows, std::move(row));
  }
}

/// How long it takes to simulate 1,000 workers and a million requests.
void scale(json& rows, std::int64_t requests) {
  const AgentPattern pattern = prefillshare::react_pattern();
  const std::int64_t sessions = requests / 14;  // of 12 or 16 calls
  const Workload workload = prefillshare::make_workload(pattern, sessions, 200.0, 3).value();
  ClusterConfig config = paper_cluster(1);
  config.prefill_workers = config.decode_workers = 500;
  const auto start = std::chrono::steady_clock::now();
  const SimReport report = simulate(config, workload, PrefixRouting());
  const double seconds = seconds_since(start);
  json row = row_of("scale", pattern.name, "shared, prefix-routed, admission", report);
  row["workers"] = 1000;
  row["requests"] = report.calls_finished;
  row["events"] = report.events;
  row["wall_s"] = seconds;
  row["requests_per_wall_s"] = static_cast<double>(report.calls_finished) / seconds;
  add(rows, std::move(row));
}

int run(int argc, char** argv) {
  std::string json_path;
  std::string plot;
  std::string trace = bench_file("data/mooncake_conversation.tsv");
  std::int64_t requests = 1'000'000;
  CLI::App app("The paper's cluster, simulated");
  app.add_option("--json", json_path, "Write the results to this file");
  app.add_option("--plot", plot, "Draw the sweeps into SVG files whose names begin so");
  app.add_option("--trace", trace, "The trace to replay, in the form that bench/data/README.md tells");
  app.add_option("--requests", requests, "Of the scale run on 1,000 workers; 0 leaves it out");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  SerialExecutor executor;
  Suite suite;
  suite.name = "sim";
  suite.machine = machine_json(executor);
  suite.memory = measure_memory(executor);
  json rows = json::array();
  sweep(rows, prefillshare::react_pattern(), plot);
  sweep(rows, prefillshare::reflexion_pattern(), plot);
  rates(rows, prefillshare::react_pattern(), plot);
  replay_trace(rows, trace);
  if (requests > 0) scale(rows, requests);
  if (!json_path.empty()) {
    json out = frame_json(suite, std::move(rows));
    out["times"] =
        "simulated; steps by formula (prefillshare/sim/cost_model.hpp: a100_llama_8b), not measured";
    check(write_text(out.dump(2) + '\n', json_path));
  }
  return 0;
}

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) {
  return codegemm::bench::run_suite("sim", argc, argv, codegemm::bench::run);
}
