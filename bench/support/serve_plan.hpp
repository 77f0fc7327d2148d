// SPDX-License-Identifier: Apache-2.0
//
// bench/support/serve_plan.hpp - the runs of suite serve-gpu, named by their conditions, so that serve-sim
// can simulate each of them before or after it was made.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <prefillshare/sim/workload.hpp>

#include "card_engine.hpp"
#include "cost_tables.hpp"
#include "sim_card.hpp"

namespace codegemm::bench {

/// The simulator's ReAct pattern (sim/workload.hpp) with answers of 16 tokens instead of 100 and two turns
/// instead of three or four, so that a session ends within seconds.
[[nodiscard]] inline prefillshare::AgentPattern short_react() {
  return {"react", std::vector<prefillshare::AgentStep>(4, {16, 500}), 4096, 0, 2, 2, 0.0};
}
/// The same of Reflexion: answers a sixth as long.
[[nodiscard]] inline prefillshare::AgentPattern short_reflexion() {
  return {"reflexion", {{33, 500}, {10, 100}, {42, 150}, {25, 300}}, 4096, 0, 2, 2, 0.0};
}

/// One run.
struct ServePoint {
  CardSharing sharing = CardSharing::kShared;
  std::string weights = "fp16";  // of the decode modules
  CardParts parts;               // decode steps beside a prefill, each on its part; 0: one stream
  std::string pattern = "react";
  double rate = 1.0;  // sessions that arrive in a second
  std::int64_t sessions = 24;
  std::uint64_t seed = 1;
  bool admission = true;
  bool largest_first = true;  // decode steps of one module, that with the most answers
  bool prefill_first = true;  // no decode step while a chunk can be computed
  std::int64_t chunk_tokens = 4096;

  [[nodiscard]] prefillshare::AgentPattern agents() const {
    if (pattern == "react") return short_react();
    if (pattern == "reflexion") return short_reflexion();
    throw std::runtime_error("unknown pattern " + pattern);
  }
  [[nodiscard]] prefillshare::Workload workload() const {
    auto made = prefillshare::make_workload(agents(), sessions, rate, seed);
    if (!made.ok()) throw std::runtime_error(made.status().message());
    return std::move(made).value();
  }
  [[nodiscard]] CardOptions options() const {
    CardOptions out;
    out.sharing = sharing;
    out.agents = static_cast<int>(agents().agents.size());
    out.chunk_tokens = chunk_tokens;
    out.beside = parts.decode > 0;
    out.largest_first = largest_first;
    out.prefill_first = prefill_first;
    out.admission = admission;
    return out;
  }
  /// Whether the runs are of one system, which need not be built anew for the second.
  [[nodiscard]] bool same_system(const ServePoint& other) const {
    return sharing == other.sharing && weights == other.weights && parts.decode == other.parts.decode;
  }
};

/// The conditions as a row has them.
[[nodiscard]] inline nlohmann::json point_row(const ServePoint& point) {
  const prefillshare::AgentPattern pattern = point.agents();
  nlohmann::json row{{"name", pattern.name},
                     {"system", name_of(point.sharing)},
                     {"config", point.weights},
                     {"admission", point.admission},
                     {"largest_first", point.largest_first},
                     {"prefill_first", point.prefill_first},
                     {"sessions_per_s", point.rate},
                     {"sessions", point.sessions},
                     {"seed", point.seed},
                     {"agents", pattern.agents.size()},
                     {"prompt_tokens", pattern.prompt_tokens},
                     {"turns", pattern.fewest_turns},
                     {"answer_tokens", nlohmann::json::array()},
                     {"observation_tokens", nlohmann::json::array()},
                     {"chunk_tokens", point.chunk_tokens},
                     {"prefill_multiprocessors", point.parts.prefill},
                     {"decode_multiprocessors", point.parts.decode}};
  for (const prefillshare::AgentStep& step : pattern.agents) {
    row["answer_tokens"].push_back(step.output);
    row["observation_tokens"].push_back(step.observation);
  }
  return row;
}
/// The run that such a row, or an entry of a plan, tells of; what it leaves out is as in ServePoint.
[[nodiscard]] inline ServePoint point_of(const nlohmann::json& row) {
  ServePoint out;
  const std::string system = row.at("system").get<std::string>();
  const auto all = {CardSharing::kSeparate, CardSharing::kPooled, CardSharing::kShared};
  const auto* const found =
      std::find_if(all.begin(), all.end(), [&](CardSharing one) { return system == name_of(one); });
  if (found == all.end()) throw std::runtime_error("unknown system " + system);
  out.sharing = *found;
  out.weights = row.value("config", out.weights);
  out.parts.prefill = row.value("prefill_multiprocessors", 0);
  out.parts.decode = row.value("decode_multiprocessors", 0);
  out.pattern = row.value("name", out.pattern);
  out.rate = row.at("sessions_per_s").get<double>();
  out.sessions = row.value("sessions", out.sessions);
  out.seed = row.value("seed", out.seed);
  out.admission = row.value("admission", out.admission);
  out.largest_first = row.value("largest_first", out.largest_first);
  out.prefill_first = row.value("prefill_first", out.prefill_first);
  out.chunk_tokens = row.value("chunk_tokens", out.chunk_tokens);
  return out;
}

/// The run in simulated time with the step costs of `rows`. shape: but for the batch sizes, which are those
/// that were timed.
[[nodiscard]] inline CardOutcome simulate_point(const ServePoint& point, CardShape shape,
                                                const nlohmann::json& rows) {
  const auto take = [](auto made) {
    if (!made.ok()) throw std::runtime_error(made.status().message());
    return std::move(made).value();
  };
  const prefillshare::CostModel cost = take(cost_from_rows(rows, "fp16", point.weights));
  shape.batch_sizes.clear();
  for (const double size : cost.decode.x) shape.batch_sizes.push_back(static_cast<std::int64_t>(size));
  if (point.parts.decode == 0) return simulate_card(shape, cost, point.workload(), point.options());
  const prefillshare::CostModel part = take(cost_from_rows(rows, "fp16", point.weights, point.parts));
  return simulate_card(shape, cost, point.workload(), point.options(), &part);
}

}  // namespace codegemm::bench
