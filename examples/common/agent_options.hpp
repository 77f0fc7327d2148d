// SPDX-License-Identifier: Apache-2.0
//
// common/agent_options.hpp - the command-line options that programs have in common in which agents read one
// document.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <string>

#include <CLI/CLI.hpp>

namespace prefillshare::examples {

/// What they say; a program sets its own defaults before add_agent_options().
struct AgentOptions {
  std::string model, document, agents, cache;
  std::int64_t max_tokens = 96;  // of an answer
  int threads = 0;               // 0: one for each processor
};

/// --model, --document, --agents, --cache, --max-tokens, --threads. `options` must outlive the parsing.
inline void add_agent_options(CLI::App& app, AgentOptions& options) {
  app.add_option("--model", options.model, "GGUF file or Hugging Face folder of a Llama-family model")
      ->required();
  app.add_option("--document", options.document, "text that all agents read")->required();
  app.add_option("--agents", options.agents, "JSON: who takes part and what each is told")->required();
  app.add_option("--cache", options.cache, "folder for quantized weights")->required();
  app.add_option("--max-tokens", options.max_tokens, "longest answer")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "of each process; 0: one for each processor")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

}  // namespace prefillshare::examples
