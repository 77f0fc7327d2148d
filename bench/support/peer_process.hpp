// SPDX-License-Identifier: Apache-2.0
//
// bench/support/peer_process.hpp - peers that run as a Python script in a process of their own.
#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/text.hpp>

namespace codegemm::bench {

/// The shell's command for a script of bench/ under the Python of CODEGEMM_PEER_PYTHON with `variables`
/// (shell assignments) set; empty where there is no such Python.
[[nodiscard]] inline std::string peer_command(const std::string& variables, const std::string& script,
                                              const std::string& arguments) {
  const char* const python = std::getenv("CODEGEMM_PEER_PYTHON");
  const char* const folder = std::getenv("CODEGEMM_PEER_SCRIPTS");
  if (python == nullptr || folder == nullptr) return {};
  return concat(variables, " '", python, "' '", folder, "/", script, "' ", arguments, " 2>/dev/null");
}

/// The `count` numbers that a script prints; none where its Python lacks what it needs, or it fails.
[[nodiscard]] inline std::vector<double> run_peer(const std::string& variables, const std::string& script,
                                                  const std::string& arguments, std::size_t count) {
  const std::string command = peer_command(variables, script, arguments);
  if (command.empty()) return {};
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return {};
  std::vector<double> out(count);
  bool read = true;
  for (double& value : out) read = read && std::fscanf(pipe, "%lf", &value) == 1;
  return pclose(pipe) == 0 && read ? out : std::vector<double>();
}

/// A script that measures when it is asked to: it prints a number when it is ready, and then reads one number
/// after the other and answers each with as many as its measurement has. It ends with its input.
class PeerServer {
 public:
  PeerServer(const std::string& variables, const std::string& script, const std::string& arguments) {
    const std::string command = peer_command(variables, script, arguments);
    int to[2];
    int from[2];
    // No other peer's process is to keep an end of these pipes.
    if (command.empty() || pipe2(to, O_CLOEXEC) != 0) return;
    if (pipe2(from, O_CLOEXEC) != 0) {
      close(to[0]);
      close(to[1]);
      return;
    }
    std::signal(SIGPIPE, SIG_IGN);  // one that has ended does not end this program
    process_ = fork();
    if (process_ == 0) {
      dup2(to[0], STDIN_FILENO);
      dup2(from[1], STDOUT_FILENO);
      execl("/bin/sh", "sh", "-c", command.c_str(), static_cast<char*>(nullptr));
      _exit(127);
    }
    close(to[0]);
    close(from[1]);
    to_ = fdopen(to[1], "w");
    from_ = fdopen(from[0], "r");
  }
  PeerServer(const PeerServer&) = delete;
  PeerServer& operator=(const PeerServer&) = delete;
  ~PeerServer() {
    if (to_ != nullptr) std::fclose(to_);
    if (from_ != nullptr) std::fclose(from_);
    if (process_ > 0) waitpid(process_, nullptr, 0);
  }

  /// Whether the script is there and has what it needs: waits for it the first time.
  [[nodiscard]] bool ready() {
    double number = 0.0;
    if (!std::exchange(waited_, true)) {
      ready_ = process_ > 0 && from_ != nullptr && std::fscanf(from_, "%lf", &number) == 1;
    }
    return ready_;
  }

  /// Its `count` numbers to `question`; fewer if it has ended.
  [[nodiscard]] std::vector<double> ask(long long question, std::size_t count) {
    std::vector<double> out;
    if (!ready() || std::fprintf(to_, "%lld\n", question) < 0 || std::fflush(to_) != 0) return out;
    for (double number = 0.0; out.size() < count && std::fscanf(from_, "%lf", &number) == 1;) {
      out.push_back(number);
    }
    ready_ = out.size() == count;
    return out;
  }

 private:
  pid_t process_ = -1;
  FILE* to_ = nullptr;
  FILE* from_ = nullptr;
  bool waited_ = false;
  bool ready_ = false;
};

}  // namespace codegemm::bench
