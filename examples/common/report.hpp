// SPDX-License-Identifier: Apache-2.0
//
// examples/common/report.hpp - what the shared and the separate run of a session cost, as a table and as
// JSON.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/io/atomic_file.hpp>
#include <common/timeline.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/serve/session.hpp>

namespace prefillshare::examples {

[[nodiscard]] inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// One agent's turn in one run.
struct Call {
  int agent = 0;
  int turn = 0;
  double begin = 0.0;  // seconds since the run began
  Generation cost;
};

/// The session run once, in one of the two ways.
struct Run {
  std::string name;
  std::vector<Call> calls;
  double seconds = 0.0;  // of all calls, quantization and loading not included

  [[nodiscard]] std::int64_t prefilled() const {
    std::int64_t sum = 0;
    for (const Call& call : calls) sum += call.cost.prefilled_tokens;
    return sum;
  }
  [[nodiscard]] std::int64_t kv_bytes() const {
    std::int64_t most = 0;
    for (const Call& call : calls) most = std::max(most, call.cost.kv_bytes);
    return most;
  }
};

/// What is shown of one agent.
struct AgentSummary {
  std::string name;
  std::string format;
  double bits_per_weight = 0.0;  // of all linear layers, as their packed memory has it
};

namespace detail {

/// Tokens and seconds of one agent's decoding, over both runs.
[[nodiscard]] inline double decode_rate(const Run& run, int agent) {
  double tokens = 0.0;
  double seconds = 0.0;
  for (const Call& call : run.calls) {
    if (call.agent != agent) continue;
    // A call that ended by a stop token ran one step more than it made tokens.
    tokens += static_cast<double>(call.cost.tokens.size()) + (call.cost.stopped ? 1.0 : 0.0);
    seconds += call.cost.decode_seconds;
  }
  return seconds > 0.0 ? tokens / seconds : 0.0;
}

}  // namespace detail

/// The closing table on stdout.
inline void print_report(const Run& shared, const Run& separate, const std::vector<AgentSummary>& agents) {
  const auto mib = [](std::int64_t bytes) { return static_cast<double>(bytes) / 1048576.0; };
  const auto row = [](const char* what, double a, double b, const char* unit, int digits) {
    std::printf("%-34s %12.*f %12.*f %s  %5.2fx\n", what, digits, a, digits, b, unit, a > 0.0 ? b / a : 0.0);
  };
  std::printf("\n%-34s %12s %12s\n", "", "shared", "separate");
  row("prefill tokens computed", static_cast<double>(shared.prefilled()),
      static_cast<double>(separate.prefilled()), "   ", 0);
  row("KV bytes held at most", mib(shared.kv_bytes()), mib(separate.kv_bytes()), "MiB", 1);
  for (std::size_t i = 0; i < shared.calls.size(); ++i) {
    const Call& call = shared.calls[i];
    const std::string what = codegemm::concat(
        "time to first token, ", agents[static_cast<std::size_t>(call.agent)].name, " ", call.turn + 1);
    row(what.c_str(), call.cost.first_token_seconds * 1e3, separate.calls[i].cost.first_token_seconds * 1e3,
        "ms ", 1);
  }
  row("total time", shared.seconds, separate.seconds, "s  ", 2);

  std::printf("\n%-12s %-10s %15s %18s\n", "agent", "format", "bits per weight", "decode tokens/s");
  for (std::size_t a = 0; a < agents.size(); ++a) {
    std::printf("%-12s %-10s %15.2f %18.1f\n", agents[a].name.c_str(), agents[a].format.c_str(),
                agents[a].bits_per_weight, detail::decode_rate(shared, static_cast<int>(a)));
  }
}

/// The same, and every call's numbers.
[[nodiscard]] inline nlohmann::ordered_json report_json(const Run& shared, const Run& separate,
                                                        const std::vector<AgentSummary>& agents) {
  const auto run_json = [&](const Run& run) {
    nlohmann::ordered_json calls = nlohmann::ordered_json::array();
    for (const Call& call : run.calls) {
      calls.push_back({{"agent", agents[static_cast<std::size_t>(call.agent)].name},
                       {"turn", call.turn + 1},
                       {"begin_s", call.begin},
                       {"prefill_tokens", call.cost.prefilled_tokens},
                       {"reused_tokens", call.cost.reused_tokens},
                       {"prefill_s", call.cost.prefill_seconds},
                       {"first_token_s", call.cost.first_token_seconds},
                       {"decode_s", call.cost.decode_seconds},
                       {"decode_tokens", call.cost.tokens.size()},
                       {"kv_bytes", call.cost.kv_bytes}});
    }
    return nlohmann::ordered_json{{"prefill_tokens", run.prefilled()},
                                  {"kv_bytes", run.kv_bytes()},
                                  {"total_s", run.seconds},
                                  {"calls", calls}};
  };
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (std::size_t a = 0; a < agents.size(); ++a) {
    list.push_back({{"name", agents[a].name},
                    {"format", agents[a].format},
                    {"bits_per_weight", agents[a].bits_per_weight},
                    {"decode_tokens_per_s", detail::decode_rate(shared, static_cast<int>(a))}});
  }
  return {{"shared", run_json(shared)}, {"separate", run_json(separate)}, {"agents", list}};
}

/// One panel for each run: a row for the base, and one for each agent.
[[nodiscard]] inline std::string report_svg(const Run& shared, const Run& separate,
                                            const std::vector<AgentSummary>& agents) {
  std::vector<TimelinePanel> panels;
  for (const Run* run : {&shared, &separate}) {
    const bool has_base = run == &shared;
    TimelinePanel panel;
    panel.title = codegemm::concat(run->name, ": ", detail::fixed(run->seconds, 2), " s, ", run->prefilled(),
                                   " tokens prefilled");
    if (has_base) panel.rows.emplace_back("base (prefill)");
    for (const AgentSummary& agent : agents)
      panel.rows.push_back(codegemm::concat(agent.name, " ", agent.format));
    for (const Call& call : run->calls) {
      const int agent_row = call.agent + (has_base ? 1 : 0);
      const std::string turn =
          codegemm::concat(agents[static_cast<std::size_t>(call.agent)].name, ", turn ", call.turn + 1);
      panel.spans.push_back({has_base ? 0 : agent_row, call.begin, call.begin + call.cost.prefill_seconds,
                             true,
                             codegemm::concat(turn, ": ", call.cost.prefilled_tokens, " tokens prefilled")});
      panel.spans.push_back({agent_row, call.begin + call.cost.prefill_seconds,
                             call.begin + call.cost.prefill_seconds + call.cost.decode_seconds, false,
                             codegemm::concat(turn, ": ", call.cost.tokens.size(), " tokens")});
    }
    panels.push_back(std::move(panel));
  }
  return timeline_svg(panels);
}

/// Both as files. `specialists` joins the JSON where it is not empty. Throws UserError.
inline void write_report(const std::string& json_path, const std::string& svg_path, const Run& shared,
                         const Run& separate, const std::vector<AgentSummary>& agents,
                         const nlohmann::json& specialists) {
  nlohmann::ordered_json report = report_json(shared, separate, agents);
  if (!specialists.empty()) report["specialists"] = specialists;
  check(codegemm::write_file(json_path, report.dump(2) + "\n"));
  check(codegemm::write_file(svg_path, report_svg(shared, separate, agents)));
  std::printf("\nnumbers: %s\ntimeline: %s\n", json_path.c_str(), svg_path.c_str());
}

}  // namespace prefillshare::examples
