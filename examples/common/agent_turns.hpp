// SPDX-License-Identifier: Apache-2.0
//
// common/agent_turns.hpp - the calls of a session of agents, planned: who is asked what, in order.
// Layer: examples (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <codegemm/base/text.hpp>
#include <common/agent_options.hpp>
#include <common/agents.hpp>
#include <common/conversation.hpp>
#include <common/tokenizer.hpp>
#include <common/unwrap.hpp>

namespace prefillshare::examples {

/// One agent's call: what joins the context before it and, once it was run, what was answered.
struct Turn {
  std::size_t agent = 0;
  int turn = 0;
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> chosen;  // every token that was sampled, a stop token included
  std::vector<std::int32_t> answer;  // the same without the stop token
};

/// All calls in order: each agent's first instruction, then each one's second, and so on; the document stands
/// before the first. The prompts do not depend on the answers. Throws UserError for an empty document.
[[nodiscard]] inline std::vector<Turn> plan_turns(const std::vector<Agent>& agents,
                                                  const std::string& document_path,
                                                  const Tokenizer& tokenizer) {
  const std::string document = read_text(document_path);
  if (document.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw UserError(document_path + ": the document is empty");
  }
  std::vector<Turn> turns;
  Conversation conversation(tokenizer);
  for (std::size_t turn = 0; turn < agents.front().instructions.size(); ++turn) {
    for (std::size_t a = 0; a < agents.size(); ++a) {
      const std::string& instruction = agents[a].instructions[turn];
      Turn& next = turns.emplace_back();
      next.agent = a;
      next.turn = static_cast<int>(turn);
      next.prompt = conversation.user(turns.size() == 1 ? codegemm::concat(document, "\n\n", instruction)
                                                        : instruction);
    }
  }
  return turns;
}

/// Tokens that the context has at most in the end. Throws UserError where the model's is shorter.
[[nodiscard]] inline std::int64_t context_of(const std::vector<Turn>& turns, const AgentOptions& options,
                                             std::int64_t context_length) {
  std::int64_t context = static_cast<std::int64_t>(turns.size()) * options.max_tokens;
  for (const Turn& turn : turns) context += static_cast<std::int64_t>(turn.prompt.size());
  if (context <= context_length) return context;
  throw UserError(codegemm::concat(options.document, ": the session needs up to ", context,
                                   " tokens (document, instructions and ", turns.size(), " answers of ",
                                   options.max_tokens, "), the model's context length is ", context_length));
}

}  // namespace prefillshare::examples
