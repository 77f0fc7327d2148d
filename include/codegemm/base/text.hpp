// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/text.hpp - builds the text of a message out of words and numbers.
// Layer: base (host only).
#pragma once

#include <charconv>
#include <concepts>
#include <cstdio>
#include <string>
#include <string_view>

namespace codegemm {

namespace detail {

inline void append_text(std::string& out, std::string_view text) { out.append(text); }

// A template, so that a string literal does not decay to bool.
template <std::integral T>
void append_text(std::string& out, T value) {
  if constexpr (std::same_as<T, bool>) {
    out.append(value ? "true" : "false");
  } else if constexpr (std::same_as<T, char>) {
    out.push_back(value);
  } else {
    char buffer[24];
    const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value).ptr;
    out.append(buffer, end);
  }
}

template <std::floating_point T>
void append_text(std::string& out, T value) {
  char buffer[40];
  const int n = std::snprintf(buffer, sizeof(buffer), "%.6g", static_cast<double>(value));
  out.append(buffer, static_cast<std::size_t>(n));
}

}  // namespace detail

/// Joins words, characters and numbers: concat("K = ", k, " is not a multiple of v = ", v).
/// Integers are written in full, floating-point numbers with six digits.
template <class... Parts>
[[nodiscard]] std::string concat(const Parts&... parts) {
  std::string out;
  (detail::append_text(out, parts), ...);
  return out;
}

}  // namespace codegemm
