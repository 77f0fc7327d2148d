// SPDX-License-Identifier: Apache-2.0
//
// bench/support/peer_process.hpp - peers that run as a Python script in a process of their own.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <codegemm/base/text.hpp>

namespace codegemm::bench {

/// The `count` numbers that a script of bench/ prints, under the Python of CODEGEMM_PEER_PYTHON with
/// `variables` (shell assignments) set; none where that Python lacks what the script needs, or it fails.
[[nodiscard]] inline std::vector<double> run_peer(const std::string& variables, const std::string& script,
                                                  const std::string& arguments, std::size_t count) {
  const char* const python = std::getenv("CODEGEMM_PEER_PYTHON");
  const char* const folder = std::getenv("CODEGEMM_PEER_SCRIPTS");
  if (python == nullptr || folder == nullptr) return {};
  const std::string command =
      concat(variables, " '", python, "' '", folder, "/", script, "' ", arguments, " 2>/dev/null");
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return {};
  std::vector<double> out(count);
  bool read = true;
  for (double& value : out) read = read && std::fscanf(pipe, "%lf", &value) == 1;
  return pclose(pipe) == 0 && read ? out : std::vector<double>();
}

}  // namespace codegemm::bench
