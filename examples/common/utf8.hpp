// SPDX-License-Identifier: Apache-2.0
//
// common/utf8.hpp - where one character ends and the next begins, for bytes that may be anything.
// Layer: examples (host only).
// The table of well-formed sequences is number 3-7 of the Unicode Standard: no overlong forms, no surrogates,
// nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace prefillshare::examples {

/// One well-formed character at the start of a text; length 0 where there is none.
struct CodePoint {
  char32_t value = 0;
  std::size_t length = 0;
};

namespace detail {

/// How many bytes the sequence that `lead` opens has; 0 for a byte that opens none.
[[nodiscard]] constexpr std::size_t utf8_expected(unsigned char lead) noexcept {
  if (lead < 0x80) return 1;
  if (lead < 0xC2) return 0;
  if (lead < 0xE0) return 2;
  if (lead < 0xF0) return 3;
  return lead < 0xF5 ? 4 : 0;
}

/// Whether `byte` may be the second of a sequence that `lead` opens.
[[nodiscard]] constexpr bool utf8_second_fits(unsigned char lead, unsigned char byte) noexcept {
  switch (lead) {
    case 0xE0: return byte >= 0xA0 && byte <= 0xBF;
    case 0xED: return byte >= 0x80 && byte <= 0x9F;
    case 0xF0: return byte >= 0x90 && byte <= 0xBF;
    case 0xF4: return byte >= 0x80 && byte <= 0x8F;
    default: return byte >= 0x80 && byte <= 0xBF;
  }
}

}  // namespace detail

/// The character at the start of `text`; length 0 for an empty text, an invalid byte or a cut sequence.
[[nodiscard]] constexpr CodePoint utf8_decode(std::string_view text) noexcept {
  if (text.empty()) return {};
  const auto lead = static_cast<unsigned char>(text[0]);
  const std::size_t length = detail::utf8_expected(lead);
  if (length == 0 || length > text.size()) return {};
  if (length == 1) return {lead, 1};
  char32_t value = lead & (0xFFU >> (length + 1));
  for (std::size_t i = 1; i < length; ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (i == 1 ? !detail::utf8_second_fits(lead, byte) : (byte & 0xC0U) != 0x80U) return {};
    value = (value << 6) | (byte & 0x3FU);
  }
  return {value, length};
}

/// Appends `value`; a surrogate or a number above U+10FFFF becomes U+FFFD.
inline void utf8_append(std::string& out, char32_t value) {
  if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) value = 0xFFFD;
  const auto put = [&out](char32_t byte) {
    out.push_back(static_cast<char>(static_cast<unsigned char>(byte)));
  };
  if (value < 0x80) {
    put(value);
  } else if (value < 0x800) {
    put(0xC0 | (value >> 6));
    put(0x80 | (value & 0x3F));
  } else if (value < 0x10000) {
    put(0xE0 | (value >> 12));
    put(0x80 | ((value >> 6) & 0x3F));
    put(0x80 | (value & 0x3F));
  } else {
    put(0xF0 | (value >> 18));
    put(0x80 | ((value >> 12) & 0x3F));
    put(0x80 | ((value >> 6) & 0x3F));
    put(0x80 | (value & 0x3F));
  }
}

/// Bytes at the end of `text` that open a character whose rest has not come yet (0..3).
[[nodiscard]] constexpr std::size_t utf8_incomplete_tail(std::string_view text) noexcept {
  for (std::size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const auto lead = static_cast<unsigned char>(text[text.size() - back]);
    if ((lead & 0xC0U) == 0x80U) continue;  // a continuation byte: look further back for the lead
    if (detail::utf8_expected(lead) <= back) return 0;
    if (back > 1 &&
        !detail::utf8_second_fits(lead, static_cast<unsigned char>(text[text.size() - back + 1]))) {
      return 0;
    }
    return back;
  }
  return 0;
}

/// Length of the longest start of `text` that is well-formed.
[[nodiscard]] constexpr std::size_t utf8_valid_prefix(std::string_view text) noexcept {
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t length = utf8_decode(text.substr(at)).length;
    if (length == 0) break;
    at += length;
  }
  return at;
}

/// Length of one step through a text: the character's, or 1 for a byte that belongs to none.
[[nodiscard]] constexpr std::size_t utf8_step(std::string_view text) noexcept {
  const std::size_t length = utf8_decode(text).length;
  return length == 0 ? 1 : length;
}

}  // namespace prefillshare::examples
