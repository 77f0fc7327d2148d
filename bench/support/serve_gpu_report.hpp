// SPDX-License-Identifier: Apache-2.0
//
// bench/support/serve_gpu_report.hpp - the rows of suite serve-gpu: what a run came to, ratios, plots.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <prefillshare/sim/metrics.hpp>

#include "card_engine.hpp"
#include "line_plot.hpp"
#include "report.hpp"

namespace codegemm::bench {

[[nodiscard]] inline nlohmann::json spread_json(const std::vector<double>& values) {
  const prefillshare::Percentiles p = prefillshare::percentiles(values);
  return {{"p50", p.p50}, {"p95", p.p95}, {"p99", p.p99}, {"mean", p.mean}};
}

[[nodiscard]] inline nlohmann::json outcome_json(const CardOutcome& outcome) {
  return {{"tokens_per_s", outcome.tokens_per_second},
          {"steady_tokens_per_s", outcome.steady_tokens_per_second},
          {"session_s", spread_json(outcome.sessions)},
          {"call_s", spread_json(outcome.calls)},
          {"first_token_s", spread_json(outcome.first_token)},
          {"time_per_token_s", spread_json(outcome.per_token)},
          {"hit_ratio", outcome.hit_ratio()},
          {"prefilled_tokens", outcome.computed_tokens},
          {"output_tokens", outcome.output_tokens},
          {"kv_bytes_in_use", outcome.kv_bytes_in_use},
          {"kv_bytes_held", outcome.kv_bytes_held},
          {"sessions_at_once", outcome.most_sessions},
          {"refused_starts", outcome.refused_starts},
          {"steps", outcome.steps},
          {"seconds", outcome.seconds},
          {"given_up", outcome.given_up}};
}

/// A system as it is printed.
[[nodiscard]] inline std::string system_label(const nlohmann::json& row) {
  return row["system"].get<std::string>() + ", " + row["config"].get<std::string>() +
         (row["decode_multiprocessors"].get<int>() > 0 ? "" : ", one stream") +
         (row["largest_first"].get<bool>() ? "" : ", all modules at once") +
         (row["prefill_first"].get<bool>() ? "" : ", chunk and step in turn") +
         (row["admission"].get<bool>() ? "" : ", no admission");
}

[[nodiscard]] inline double ratio_of(const nlohmann::json& a, const nlohmann::json& b) {
  return a.get<double>() / std::max(b.get<double>(), 1e-12);
}

/// Every system over the shared ones of the same conditions, and at the best of its runs of that pattern.
[[nodiscard]] inline nlohmann::json compare_systems(const nlohmann::json& rows) {
  nlohmann::json ratios = nlohmann::json::array();
  std::map<std::string, double> best;  // pattern and system: tokens/s
  const auto is_point = [](const nlohmann::json& row) { return row.contains("system"); };
  const auto name = [](const nlohmann::json& row) {
    return row["name"].get<std::string>() + '/' + system_label(row);
  };
  for (const nlohmann::json& row : rows) {
    if (!is_point(row)) continue;
    double& most = best[name(row)];
    most = std::max(most, row["tokens_per_s"].get<double>());
  }
  for (const nlohmann::json& shared : rows) {
    if (!is_point(shared) || shared["system"] != "shared" || !shared["admission"].get<bool>()) continue;
    for (const nlohmann::json& other : rows) {
      if (!is_point(other) || other["system"] == "shared") continue;
      const auto same = [&](const char* field) { return other[field] == shared[field]; };
      if (!same("name") || !same("sessions_per_s") || !same("sessions") || !same("seed") ||
          !same("largest_first") || !same("prefill_first") ||
          (other["decode_multiprocessors"].get<int>() > 0) !=
              (shared["decode_multiprocessors"].get<int>() > 0)) {
        continue;
      }
      ratios.push_back(
          {{"name", shared["name"].get<std::string>() + "_ratio"},
           {"config", shared["config"]},
           {"against", system_label(other)},
           {"sessions_per_s", shared["sessions_per_s"]},
           {"seed", shared["seed"]},
           {"throughput_ratio", ratio_of(shared["tokens_per_s"], other["tokens_per_s"])},
           {"steady_throughput_ratio", ratio_of(shared["steady_tokens_per_s"], other["steady_tokens_per_s"])},
           {"best_throughput_ratio", best[name(shared)] / best[name(other)]},
           {"p95_ratio", ratio_of(other["session_s"]["p95"], shared["session_s"]["p95"])},
           {"call_p95_ratio", ratio_of(other["call_s"]["p95"], shared["call_s"]["p95"])},
           {"first_token_p95_ratio",
            ratio_of(other["first_token_s"]["p95"], shared["first_token_s"]["p95"])}});
    }
  }
  return ratios;
}

/// Throughput and latency by rate, of a pattern's runs of so many sessions: no diagram where there are none.
[[nodiscard]] inline std::vector<Diagram> serve_diagrams(const nlohmann::json& rows,
                                                         const std::string& pattern, std::int64_t sessions) {
  using Points = std::vector<std::pair<double, double>>;
  std::map<std::string, Points> speed, latency, simulated;
  for (const nlohmann::json& row : rows) {
    if (!row.contains("system") || row["name"] != pattern || row["seed"] != 1 ||
        row["sessions"] != sessions || !row["admission"].get<bool>()) {
      continue;
    }
    const double rate = row["sessions_per_s"].get<double>();
    speed[system_label(row)].emplace_back(rate, row["tokens_per_s"].get<double>());
    latency[system_label(row)].emplace_back(rate, row["session_s"]["p95"].get<double>());
    simulated[system_label(row)].emplace_back(rate, row["simulated"]["session_s"]["p95"].get<double>());
  }
  if (speed.empty()) return {};
  const auto diagram = [](const std::string& title, std::map<std::string, Points>& lines) {
    Diagram out{title, "sessions/s that arrive", {}};
    for (auto& [name, points] : lines) {
      std::sort(points.begin(), points.end());
      out.lines.push_back({name, points});
    }
    return out;
  };
  Diagram late = diagram("p95 of a session from its arrival, s", latency);
  Diagram later = diagram("the same, simulated with the measured step times", simulated);
  late.logarithmic = later.logarithmic = true;
  return {diagram(pattern + ": generated tokens/s", speed), late, later};
}

/// PREFIX-PATTERN.svg of each pattern.
[[nodiscard]] inline Status plot_serve_rows(const nlohmann::json& rows, const std::string& prefix,
                                            std::int64_t sessions) {
  for (const char* const pattern : {"react", "reflexion"}) {
    const std::vector<Diagram> diagrams = serve_diagrams(rows, pattern, sessions);
    if (diagrams.empty()) continue;
    if (Status s = write_text(plot_lines(diagrams), prefix + "-" + pattern + ".svg"); !s.ok()) return s;
  }
  return {};
}

}  // namespace codegemm::bench
