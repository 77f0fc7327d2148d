// SPDX-License-Identifier: Apache-2.0
//
// common/template_lexer.hpp - a chat template as a list of tokens, with white space cut as Jinja cuts it.
// Layer: examples (host only).
// The rules are those of Jinja 3.1 with trim_blocks and lstrip_blocks on: the newline after a block tag goes,
// and so do the blanks before a block tag that is the first thing on its line; "-" strips all white space on
// its side, "+" keeps it.
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <common/template_value.hpp>
#include <common/utf8.hpp>

namespace prefillshare::examples::detail {

/// str.isspace() of Python, which is what strip() and Jinja's \s go by.
[[nodiscard]] constexpr bool is_space(char32_t c) noexcept {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}
/// Bytes of white space at the start of `text`.
[[nodiscard]] constexpr std::size_t leading_space(std::string_view text) noexcept {
  std::size_t at = 0;
  while (at < text.size()) {
    const CodePoint point = utf8_decode(text.substr(at));
    if (point.length == 0 || !is_space(point.value)) break;
    at += point.length;
  }
  return at;
}
/// The start of the last character of `text`, which must not be empty; a byte that belongs to none is one.
[[nodiscard]] constexpr std::size_t last_character(std::string_view text) noexcept {
  for (std::size_t back = 1; back <= 4 && back <= text.size(); ++back) {
    if (utf8_decode(text.substr(text.size() - back)).length == back) return text.size() - back;
  }
  return text.size() - 1;
}
/// `text` without the white space at its end.
[[nodiscard]] constexpr std::string_view strip_right(std::string_view text) noexcept {
  while (!text.empty()) {
    const std::size_t at = last_character(text);
    const CodePoint point = utf8_decode(text.substr(at));
    if (point.length == 0 || !is_space(point.value)) break;
    text = text.substr(0, at);
  }
  return text;
}

enum class TokenKind {
  kText,
  kOutputBegin,
  kOutputEnd,
  kBlockBegin,
  kBlockEnd,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd
};

struct Token {
  TokenKind kind = TokenKind::kEnd;
  std::string text;  // a name, an operator, a string without quotes and escapes, or text between tags
  std::int64_t integer = 0;
  double real = 0.0;
  Place at;
};

class Lexer {
 public:
  /// Throws TemplateFailure.
  [[nodiscard]] static std::vector<Token> run(std::string_view source) {
    Lexer lexer(normalize_newlines(source));
    lexer.text_and_tags();
    return std::move(lexer.tokens_);
  }

 private:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  // Every kind of newline becomes "\n"; the one at the very end goes (keep_trailing_newline is off).
  static std::string normalize_newlines(std::string_view source) {
    std::string out;
    out.reserve(source.size());
    for (std::size_t i = 0; i < source.size(); ++i) {
      const bool pair = source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n';
      out.push_back(source[i] == '\r' ? '\n' : source[i]);
      if (pair) ++i;
    }
    if (!out.empty() && out.back() == '\n') out.pop_back();
    return out;
  }

  [[nodiscard]] std::string_view rest() const { return std::string_view(source_).substr(at_); }
  [[nodiscard]] bool looking_at(std::string_view text) const { return rest().substr(0, text.size()) == text; }
  void advance(std::size_t bytes) {
    for (const char c : rest().substr(0, bytes)) {
      ++place_.column;
      if (c == '\n') place_ = {place_.line + 1, 1};
    }
    at_ += bytes;
  }
  void push(TokenKind kind, std::string text, Place at) {
    tokens_.push_back({kind, std::move(text), 0, 0.0, at});
  }

  void text_and_tags() {
    bool line_starting = true;  // what was read last ended with a newline
    while (at_ < source_.size()) {
      std::size_t open = source_.find('{', at_);
      while (open != std::string::npos && (open + 1 == source_.size() || !is_tag(source_[open + 1]))) {
        open = source_.find('{', open + 1);
      }
      if (open == std::string::npos) {
        push(TokenKind::kText, std::string(rest()), place_);
        advance(source_.size() - at_);
        break;
      }
      const char tag = source_[open + 1];
      const char sign = open + 2 < source_.size() && (source_[open + 2] == '-' || source_[open + 2] == '+')
                            ? source_[open + 2]
                            : ' ';
      std::string_view text = rest().substr(0, open - at_);
      if (sign == '-') {
        text = strip_right(text);
      } else if (sign == ' ' && tag != '{') {
        const std::size_t line = text.rfind('\n') + 1;  // npos + 1 is 0
        if ((line > 0 || line_starting) && leading_space(text.substr(line)) == text.size() - line) {
          text = text.substr(0, line);
        }
      }
      if (!text.empty()) push(TokenKind::kText, std::string(text), place_);
      advance(open - at_);
      const Place start = place_;
      advance(sign == ' ' ? 2 : 3);
      if (tag == '#') {
        comment(start);
      } else {
        push(tag == '{' ? TokenKind::kOutputBegin : TokenKind::kBlockBegin, {}, start);
        inside(tag == '{', start);
      }
      line_starting = source_[at_ - 1] == '\n';
    }
    push(TokenKind::kEnd, {}, place_);
  }

  static bool is_tag(char c) { return c == '{' || c == '%' || c == '#'; }

  // `tag` is the two closing characters. True: it was here, with its sign, and the white space after it is
  // cut.
  bool close(std::string_view tag, bool output) {
    const bool minus = looking_at("-") && rest().substr(1, 2) == tag;
    const bool plus = !output && looking_at("+") && rest().substr(1, 2) == tag;
    if (!minus && !plus && !looking_at(tag)) return false;
    advance(minus || plus ? 3 : 2);
    if (minus) {
      advance(leading_space(rest()));
    } else if (!plus && !output && looking_at("\n")) {
      advance(1);
    }
    return true;
  }

  void comment(Place start) {
    const std::size_t end = source_.find("#}", at_);
    if (end == std::string::npos) wrong(start, "comment without an end");
    const bool sign = end > at_ && (source_[end - 1] == '-' || source_[end - 1] == '+');
    advance(end - at_ - (sign ? 1 : 0));
    close("#}", false);
  }

  void inside(bool output, Place start) {
    std::string brackets;  // the closing ones still to come
    while (true) {
      advance(leading_space(rest()));
      if (at_ == source_.size()) wrong(start, output ? "{{ without }}" : "{% without %}");
      const Place here = place_;
      if (brackets.empty() && close(output ? "}}" : "%}", output)) {
        push(output ? TokenKind::kOutputEnd : TokenKind::kBlockEnd, {}, here);
        return;
      }
      const char c = source_[at_];
      if (is_letter(c)) {
        std::size_t length = 1;
        while (at_ + length < source_.size() &&
               (is_letter(source_[at_ + length]) || is_digit(source_[at_ + length])))
          ++length;
        push(TokenKind::kName, std::string(rest().substr(0, length)), here);
        advance(length);
      } else if (is_digit(c)) {
        number(here);
      } else if (c == '\'' || c == '"') {
        string(here);
      } else {
        operation(here, brackets);
      }
    }
  }

  static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
  static bool is_digit(char c) { return c >= '0' && c <= '9'; }

  void operation(Place here, std::string& brackets) {
    static constexpr std::string_view kOperators[] = {"//", "**", "==", "!=", ">=", "<=", "+", "-", "*",
                                                      "/",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                                      ">",  "<",  "=",  ".",  ":",  "|",  ","};
    for (const std::string_view op : kOperators) {
      if (!looking_at(op)) continue;
      if (op == "(" || op == "[" || op == "{") {
        if (brackets.size() >= kMaxNesting)
          fail(here, StatusCode::kExhausted, "brackets nested more than ", kMaxNesting, " deep");
        brackets.push_back(op == "(" ? ')' : op == "[" ? ']' : '}');
      } else if (op == ")" || op == "]" || op == "}") {
        if (brackets.empty() || brackets.back() != op[0]) wrong(here, "unexpected '", op, "'");
        brackets.pop_back();
      }
      push(TokenKind::kOperator, std::string(op), here);
      advance(op.size());
      return;
    }
    wrong(here, "unexpected character ", codegemm::quoted(rest().substr(0, utf8_step(rest()))));
  }

  void number(Place here) {
    std::string digits;
    std::size_t length = 0;
    const auto take_digits = [&] {
      while (length < rest().size() && (is_digit(rest()[length]) || rest()[length] == '_')) {
        if (rest()[length] != '_') digits.push_back(rest()[length]);
        ++length;
      }
    };
    take_digits();
    const auto digit_at = [&](std::size_t i) { return i < rest().size() && is_digit(rest()[i]); };
    bool real = false;
    // After a dot ("a.1.2") a number is an index.
    const bool index = at_ > 0 && source_[at_ - 1] == '.';
    if (!index && length < rest().size() && rest()[length] == '.' && digit_at(length + 1)) {
      real = true;
      digits.push_back('.');
      ++length;
      take_digits();
    }
    if (!index && length < rest().size() && (rest()[length] == 'e' || rest()[length] == 'E')) {
      const bool sign =
          length + 1 < rest().size() && (rest()[length + 1] == '-' || rest()[length + 1] == '+');
      if (digit_at(length + (sign ? 2 : 1))) {
        real = true;
        digits.push_back('e');
        if (sign && rest()[length + 1] == '-') digits.push_back('-');
        length += sign ? 2 : 1;
        take_digits();
      }
    }
    if (length < rest().size() && is_letter(rest()[length])) {
      unsupported(here, "number ", codegemm::quoted(rest().substr(0, length + 1)));
    }
    Token token{real ? TokenKind::kFloat : TokenKind::kInteger, digits, 0, 0.0, here};
    if (!real && digits.size() > 1 && digits[0] == '0' &&
        digits.find_first_not_of('0') != std::string::npos) {
      wrong(here, "integer ", codegemm::quoted(digits), " starts with 0");
    }
    const char* end = digits.data() + digits.size();
    const std::from_chars_result read = real ? std::from_chars(digits.data(), end, token.real)
                                             : std::from_chars(digits.data(), end, token.integer);
    if (read.ec != std::errc() || read.ptr != end)
      wrong(here, "number ", codegemm::quoted(digits), " is out of range");
    tokens_.push_back(std::move(token));
    advance(length);
  }

  void string(Place here) {
    const char quote = source_[at_];
    std::string out;
    std::size_t i = at_ + 1;
    while (i < source_.size() && source_[i] != quote) {
      if (source_[i] != '\\') {
        out.push_back(source_[i++]);
      } else if (i + 1 < source_.size()) {
        i = escape(here, i + 1, out);
      } else {
        break;
      }
    }
    if (i >= source_.size()) wrong(here, "string without an end");
    push(TokenKind::kString, std::move(out), here);
    advance(i + 1 - at_);
  }

  // Python's escapes. `i` is the place after the backslash; gives the place after the escape.
  std::size_t escape(Place here, std::size_t i, std::string& out) {
    static constexpr std::string_view kFrom = "\\'\"abfnrtv", kTo = "\\'\"\a\b\f\n\r\t\v";
    const char c = source_[i];
    if (c == '\n') return i + 1;
    if (const std::size_t known = kFrom.find(c); known != std::string_view::npos) {
      out.push_back(kTo[known]);
      return i + 1;
    }
    if (c == 'N') unsupported(here, "the escape \\N");
    std::uint32_t value = 0;
    if (c >= '0' && c <= '7') {
      std::size_t end = i;
      while (end < i + 3 && end < source_.size() && source_[end] >= '0' && source_[end] <= '7') {
        value = value * 8 + static_cast<std::uint32_t>(source_[end++] - '0');
      }
      utf8_append(out, value);
      return end;
    }
    const std::size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) {  // not an escape: both characters stay
      out.push_back('\\');
      return i;
    }
    const char* from = source_.data() + i + 1;
    const bool fits = i + digits < source_.size();
    const auto read =
        fits ? std::from_chars(from, from + digits, value, 16) : std::from_chars_result{from, std::errc()};
    if (!fits || read.ptr != from + digits || value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) {
      wrong(here, "bad escape ", codegemm::quoted(std::string_view(source_).substr(i - 1, digits + 2)));
    }
    utf8_append(out, value);
    return i + 1 + digits;
  }

  std::string source_;
  std::size_t at_ = 0;
  Place place_;
  std::vector<Token> tokens_;
};

}  // namespace prefillshare::examples::detail
