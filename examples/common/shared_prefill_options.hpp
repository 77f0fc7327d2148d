// SPDX-License-Identifier: Apache-2.0
//
// common/shared_prefill_options.hpp - the command-line options of 03_shared_prefill.
// Layer: examples (host only).
#pragma once

#include <cstddef>
#include <string>

#include <CLI/CLI.hpp>

#include <common/agent_options.hpp>
#include <common/sampler.hpp>

namespace prefillshare::examples {

/// What they say. A model as small as the demo's repeats itself without a penalty.
struct SharedPrefillOptions : AgentOptions {
  std::string specialists, json, svg;
  std::size_t specialist_items = 5;
  SamplerOptions sampler{0.0F, 0, 1.0F, 1.1F, 0};
};

/// Those of agents, the sampler's, and where reports go. `options` must outlive the parsing.
inline void add_shared_prefill_options(CLI::App& app, SharedPrefillOptions& options) {
  add_agent_options(app, options);
  app.add_option(
      "--specialists", options.specialists,
      "folder of low-rank deltas, TASK.safetensors, that suite finetune-gpu wrote; none: left out");
  app.add_option("--specialist-items", options.specialist_items, "requests for each of them")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--temperature", options.sampler.temperature, "0: greedy")->check(CLI::Range(0.0, 10.0));
  app.add_option("--repetition-penalty", options.sampler.repetition_penalty, "above 1: less of the same")
      ->check(CLI::Range(1.0, 10.0))
      ->capture_default_str();
  app.add_option("--seed", options.sampler.seed, "of the sampler");
  app.add_option("--json", options.json, "where the numbers go")->default_val("shared_prefill.json");
  app.add_option("--svg", options.svg, "where the timeline goes")->default_val("shared_prefill.svg");
}

}  // namespace prefillshare::examples
