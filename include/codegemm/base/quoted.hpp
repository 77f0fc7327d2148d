// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/quoted.hpp - a name out of an untrusted file, safe to print in a message.
// Layer: base (host only).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace codegemm {

/// 'text' with control bytes as \\xNN and everything after `most` bytes left out, so that a hostile name can
/// neither steer a terminal nor fill a log. A long text is cut between characters, not inside one. Write
/// codegemm::quoted in full: an unqualified call with a std::string finds std::quoted.
[[nodiscard]] inline std::string quoted(std::string_view text, std::size_t most = 96) {
  constexpr char kHex[] = "0123456789abcdef";
  const bool cut = text.size() > most;
  if (cut) {
    std::size_t end = most;
    // 10xxxxxx continues a UTF-8 character, whose first byte is at most three before.
    for (int back = 0; back < 3 && end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U;
         ++back)
      --end;
    text = text.substr(0, end);
  }
  std::string out = "'";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20U || byte == 0x7FU) {
      out += "\\x";
      out += kHex[byte >> 4U];
      out += kHex[byte & 15U];
    } else {
      out += c;
    }
  }
  out += cut ? "...'" : "'";
  return out;
}

}  // namespace codegemm
