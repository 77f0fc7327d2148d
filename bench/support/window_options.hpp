// SPDX-License-Identifier: Apache-2.0
//
// bench/support/window_options.hpp - the options of suites that measure perplexity on stretches of a text.
#pragma once

#include <cstdint>

#include <CLI/CLI.hpp>

namespace codegemm::bench {

/// --windows, --window-length (tokens). Both numbers must outlive the parsing; what they are is the default.
inline void add_window_options(CLI::App& app, std::int64_t& windows, std::int64_t& window_length) {
  app.add_option("--windows", windows, "stretches of the text measured on")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--window-length", window_length, "tokens in each")
      ->check(CLI::Range(4, 1 << 17))
      ->capture_default_str();
}

}  // namespace codegemm::bench
