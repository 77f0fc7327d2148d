// SPDX-License-Identifier: Apache-2.0
//
// examples/common/agents.hpp - who takes part in a session: names, formats and what each is told to do.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/status.hpp>
#include <codegemm/format.hpp>
#include <common/unwrap.hpp>

namespace prefillshare::examples {

/// One task-specific model of the session.
struct Agent {
  std::string name;
  codegemm::Format format;                // of its decode module's weights
  std::vector<std::string> instructions;  // one for each turn
};

/// All of a text file. Throws UserError with the path and the system's reason.
[[nodiscard]] inline std::string read_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw UserError(codegemm::concat(path, ": cannot be read: ", std::strerror(errno)));
  std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (in.bad()) throw UserError(codegemm::concat(path, ": reading failed: ", std::strerror(errno)));
  return text;
}

/// {"agents": [{"name": "planner", "format": "m2v4g64", "instruction": ["turn 1", "turn 2"]}, ...]}
/// Every agent has as many turns as the first. Throws UserError naming the file, the agent and the field.
[[nodiscard]] inline std::vector<Agent> read_agents(const std::string& path) {
  using nlohmann::json;
  const json root = json::parse(read_text(path), nullptr, false);
  if (root.is_discarded()) throw UserError(path + ": is not JSON");
  const auto fail = [&](const std::string& what) { throw UserError(path + ": " + what); };
  if (!root.is_object() || !root.contains("agents") || !root["agents"].is_array() || root["agents"].empty()) {
    fail("needs a list 'agents' with at least one entry");
  }
  std::vector<Agent> agents;
  for (const json& entry : root["agents"]) {
    const std::string where = codegemm::concat("agents[", agents.size(), "]");
    const auto text = [&](const json& value, const std::string& field) {
      if (!value.is_string() || value.get_ref<const std::string&>().empty())
        fail(codegemm::concat(where, ".", field, ": needs a text"));
      return value.get<std::string>();
    };
    if (!entry.is_object()) fail(where + ": needs an object");
    Agent agent;
    agent.name = text(entry.value("name", json()), "name");
    codegemm::Result<codegemm::Format> format =
        codegemm::parse_format(text(entry.value("format", json()), "format"));
    if (!format.ok()) fail(where + ".format: " + format.status().message());
    agent.format = *format;
    const json instructions = entry.value("instruction", json());
    if (!instructions.is_array() || instructions.empty()) fail(where + ".instruction: needs a list of texts");
    for (const json& line : instructions) agent.instructions.push_back(text(line, "instruction"));
    if (!agents.empty() && agents.front().instructions.size() != agent.instructions.size()) {
      fail(codegemm::concat(where, ".instruction: has ", agent.instructions.size(), " turns, agents[0] has ",
                            agents.front().instructions.size()));
    }
    agents.push_back(std::move(agent));
  }
  return agents;
}

}  // namespace prefillshare::examples
