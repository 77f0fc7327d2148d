// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/workload.hpp - who asks for what, and when: agents that take turns on one context.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/kv/tenant.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/serve/hash_ring.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// The same numbers everywhere, from a seed (splitmix64).
class SimRandom {
 public:
  /// The same seed, the same numbers.
  explicit SimRandom(std::uint64_t seed) : state_(seed) {}

  /// All 64 bits.
  [[nodiscard]] std::uint64_t next() noexcept {
    const std::uint64_t z = detail::scramble(state_);
    state_ += 0x9E3779B97F4A7C15ULL;
    return z;
  }
  /// In [0, 1).
  [[nodiscard]] double uniform() noexcept { return static_cast<double>(next() >> 11) * 0x1p-53; }
  /// In [low, high].
  [[nodiscard]] std::int64_t between(std::int64_t low, std::int64_t high) noexcept {
    return low + static_cast<std::int64_t>(uniform() * static_cast<double>(high - low + 1));
  }
  /// Exponentially distributed.
  [[nodiscard]] double exponential(double mean) noexcept { return -mean * std::log1p(-uniform()); }

 private:
  std::uint64_t state_;
};

/// One decode call.
struct CallPlan {
  std::int32_t module = 0;   ///< the decode module, that is the agent
  std::int32_t context = 0;  ///< tokens of the prompt: all of the session so far
  std::int32_t output = 0;   ///< tokens to generate, at least 1
  float think_seconds = 0;   ///< from the end of the call before to this call
};

/// One session: calls one after the other, each on a context that begins with the one before.
struct SessionPlan {
  double arrival = 0.0;              ///< seconds
  TenantId tenant = kDefaultTenant;  ///< whose it is
  std::int32_t calls = 0;            ///< calls one after the other
  std::int64_t first_call = 0;       ///< in Workload::calls
  std::int32_t shared_tokens = 0;    ///< at the start, the same in all sessions of this prompt
  std::int32_t prompt = 0;           ///< which one that is
  std::int64_t first_block = -1;     ///< in Workload::blocks, of a trace; -1: the session's own text
  std::int32_t blocks = 0;           ///< of them, from first_block on
};

/// In the order of arrival.
struct Workload {
  std::string name;                   ///< for reports
  std::int32_t modules = 1;           ///< decode modules that are called
  std::vector<SessionPlan> sessions;  ///< in the order of arrival
  std::vector<CallPlan> calls;        ///< session after session
  std::vector<std::int32_t> blocks;   ///< of traces: equal numbers in equal places, equal text

  /// The calls of one of the sessions.
  [[nodiscard]] std::span<const CallPlan> calls_of(const SessionPlan& session) const {
    return std::span(calls).subspan(static_cast<std::size_t>(session.first_call),
                                    static_cast<std::size_t>(session.calls));
  }
  /// The names of the first out.size() blocks of a session's text: what equal texts have in common.
  void name_blocks(std::int64_t session, int block_tokens, std::span<std::int32_t> out) const {
    const SessionPlan& plan = sessions[static_cast<std::size_t>(session)];
    const auto own = static_cast<std::int32_t>(session);
    std::size_t known = 0;
    if (plan.first_block >= 0) {
      known = std::min(out.size(), static_cast<std::size_t>(plan.blocks));
      std::copy_n(blocks.begin() + plan.first_block, known, out.begin());
    } else {
      known = std::min(out.size(), static_cast<std::size_t>(plan.shared_tokens / block_tokens));
      std::fill_n(out.begin(), known, -2 - plan.prompt);
    }
    // The parent names what came before, so one number serves for all blocks of a session. Numbers of a trace
    // and of sessions never meet: a trace's blocks end where its sessions' own begin.
    std::fill(out.begin() + static_cast<std::ptrdiff_t>(known), out.end(),
              plan.first_block >= 0 ? -2 - own : own);
  }
};

/// kInvalidArgument for what no cluster could run.
[[nodiscard]] inline Status validate(const Workload& workload) {
  double last = 0.0;
  for (std::size_t s = 0; s < workload.sessions.size(); ++s) {
    const SessionPlan& plan = workload.sessions[s];
    const auto calls = static_cast<std::int64_t>(workload.calls.size());
    const auto blocks = static_cast<std::int64_t>(workload.blocks.size());
    if (!(plan.arrival >= last) || plan.calls < 1 || plan.first_call < 0 ||
        plan.first_call > calls - plan.calls || plan.shared_tokens < 0 || plan.prompt < 0 ||
        plan.blocks < 0 || plan.first_block > blocks - plan.blocks) {
      return error(StatusCode::kInvalidArgument, "workload ", workload.name, ": session ", s,
                   " has no calls, calls or blocks that are not there, or comes before the one before it");
    }
    last = plan.arrival;
    std::int64_t context = 0;
    for (const CallPlan& call : workload.calls_of(plan)) {
      if (call.module < 0 || call.module >= workload.modules || call.context <= context || call.output < 1 ||
          !(call.think_seconds >= 0)) {
        return error(StatusCode::kInvalidArgument, "workload ", workload.name, ": session ", s,
                     " has a call of module ", call.module, " with ", call.context, " tokens after ", context,
                     " and ", call.output, " to generate");
      }
      context = call.context;
    }
  }
  return {};
}

/// What one agent adds to the context each time it is called.
struct AgentStep {
  std::int32_t output = 0;       ///< tokens that it generates
  std::int32_t observation = 0;  ///< tokens that come after them: a tool's answer, an instruction
};

/// Sessions of one kind. All agents are called in turn, each turn.
struct AgentPattern {
  std::string name;                ///< for reports
  std::vector<AgentStep> agents;   ///< called in turn
  std::int32_t prompt_tokens = 0;  ///< the first call's context
  std::int32_t shared_tokens = 0;  ///< of these, the same in all sessions
  std::int32_t fewest_turns = 1;   ///< each agent is called once a turn
  std::int32_t most_turns = 1;     ///< drawn evenly between the two
  double think_seconds = 0.0;      ///< before each call but the first
};

/// Reasoning and tools: short answers, long observations. The paper gives no lengths; these are chosen so
/// that the tokens found in a cache without limits are near the hit ratios it reports (89% shared, 60%
/// separate).
[[nodiscard]] inline AgentPattern react_pattern() {
  return {"react", std::vector<AgentStep>(4, AgentStep{100, 500}), 4096, 0, 3, 4, 0.0};
}
/// Act, judge, reflect, plan again: longer answers, more turns, less from tools.
[[nodiscard]] inline AgentPattern reflexion_pattern() {
  return {"reflexion", {{200, 500}, {60, 100}, {250, 150}, {150, 300}}, 4096, 0, 4, 5, 0.0};
}

/// Poisson arrivals, `rate` sessions a second. kInvalidArgument, kOutOfMemory.
[[nodiscard]] inline Result<Workload> make_workload(const AgentPattern& pattern, std::int64_t sessions,
                                                    double rate, std::uint64_t seed) {
  if (pattern.agents.empty() || pattern.fewest_turns < 1 || pattern.most_turns < pattern.fewest_turns ||
      pattern.prompt_tokens < 1 || sessions < 0 || sessions > (std::int64_t{1} << 30) || !(rate > 0.0)) {
    return error(StatusCode::kInvalidArgument, "workload ", pattern.name, ": ", sessions, " sessions, ",
                 pattern.agents.size(), " agents, ", pattern.fewest_turns, " to ", pattern.most_turns,
                 " turns, a prompt of ", pattern.prompt_tokens, " tokens");
  }
  Workload out;
  out.name = pattern.name;
  out.modules = static_cast<std::int32_t>(pattern.agents.size());
  SimRandom random(seed);
  double now = 0.0;
  const bool allocated = detail::try_allocate([&] {
    for (std::int64_t s = 0; s < sessions; ++s) {
      SessionPlan plan;
      now += random.exponential(1.0 / rate);
      plan.arrival = now;
      plan.first_call = static_cast<std::int64_t>(out.calls.size());
      plan.shared_tokens = pattern.shared_tokens;
      const std::int64_t turns = random.between(pattern.fewest_turns, pattern.most_turns);
      std::int32_t context = pattern.prompt_tokens;
      for (std::int64_t turn = 0; turn < turns; ++turn) {
        for (std::int32_t agent = 0; agent < out.modules; ++agent) {
          const AgentStep& step = pattern.agents[static_cast<std::size_t>(agent)];
          const bool first = turn == 0 && agent == 0;
          out.calls.push_back(
              {agent, context, step.output, first ? 0.0F : static_cast<float>(pattern.think_seconds)});
          context += step.output + step.observation;
        }
      }
      plan.calls = static_cast<std::int32_t>(static_cast<std::int64_t>(out.calls.size()) - plan.first_call);
      out.sessions.push_back(plan);
    }
  });
  if (!allocated) return error(StatusCode::kOutOfMemory, "workload ", pattern.name, ": no memory");
  if (Status s = validate(out); !s.ok()) return s;
  return out;
}

/// The share of prompt tokens that caches without limits would hold: one for all modules, or one for each.
[[nodiscard]] inline double ideal_hit_ratio(const Workload& workload, bool shared) {
  double all = 0.0;
  double missed = 0.0;
  std::vector<std::int64_t> seen(static_cast<std::size_t>(workload.modules));
  for (const SessionPlan& plan : workload.sessions) {
    std::fill(seen.begin(), seen.end(), 0);
    for (const CallPlan& call : workload.calls_of(plan)) {
      std::int64_t& last = seen[shared ? 0 : static_cast<std::size_t>(call.module)];
      all += call.context;
      missed += static_cast<double>(call.context - last);
      last = call.context;
    }
  }
  return all > 0.0 ? 1.0 - missed / all : 0.0;
}

}  // namespace prefillshare
