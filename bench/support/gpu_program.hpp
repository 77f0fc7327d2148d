// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_program.hpp - the command line of the suites on a GPU.
// scripts/gpu-check builds them by nvcc alone, where CLI11 may be missing.
#pragma once

#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "run_suite.hpp"

namespace codegemm::bench {

// An option of the command line, with a value or without.
class Option {
 public:
  static Option flag(std::function<void()> found) {
    return Option([found = std::move(found)](const char*) { found(); }, false);
  }
  static Option flag(bool& to, bool value = true) {
    return flag([&to, value] { to = value; });
  }
  static Option value(std::function<void(const char*)> found) { return Option(std::move(found), true); }
  static Option value(std::string& to) {
    return value([&to](const char* text) { to = text; });
  }
  static Option value(int& to) {
    return value([&to](const char* text) { to = std::atoi(text); });
  }

 private:
  friend void parse(int, char**, const std::map<std::string, Option>&);
  Option(std::function<void(const char*)> found, bool takes_value)
      : found_(std::move(found)), takes_value_(takes_value) {}

  std::function<void(const char*)> found_;
  bool takes_value_;
};

inline void parse(int argc, char** argv, const std::map<std::string, Option>& options) {
  for (int i = 1; i < argc; ++i) {
    const auto option = options.find(argv[i]);
    if (option == options.end()) throw std::runtime_error(std::string("unknown argument ") + argv[i]);
    const bool takes_value = option->second.takes_value_;
    if (takes_value && i + 1 >= argc) throw std::runtime_error(std::string(argv[i]) + " wants a value");
    option->second.found_(takes_value ? argv[++i] : nullptr);
  }
}

}  // namespace codegemm::bench
