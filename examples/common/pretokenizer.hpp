// SPDX-License-Identifier: Apache-2.0
//
// common/pretokenizer.hpp - cuts a text into the pieces inside which byte-pair merges may happen.
// Layer: examples (host only); needs PCRE2 (8 bit).
// The regular expressions are the models' own, as their tokenizer.json files have them:
//   gpt-2      openai/gpt-2, encoder.py, and the ByteLevel pre-tokenizer of Hugging Face tokenizers
//   smollm     HuggingFaceTB/SmolLM2: every digit alone, then GPT-2's expression on what lies between
//   llama-bpe  meta-llama/Meta-Llama-3;   qwen2  Qwen/Qwen2
// What is a letter or a number is up to the Unicode version of PCRE2 (14 in Debian 12's 10.42): ids of
// characters newer than that may differ from those of a peer with newer tables.
#pragma once

#ifndef PCRE2_CODE_UNIT_WIDTH
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>
#include <common/tokenizer_spec.hpp>

namespace prefillshare::examples {

namespace detail {

inline constexpr std::string_view kDigitRegex = "\\p{N}";
inline constexpr std::string_view kGpt2Regex =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
inline constexpr std::string_view kLlama3Regex =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
inline constexpr std::string_view kQwen2Regex =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// `regex` with \s and \S written out. The models were trained with the white space of Unicode; PCRE2's own
/// \s differs from it (it has U+180E, which Unicode took out in 6.3).
[[nodiscard]] inline std::string spell_out_space(std::string_view regex) {
  constexpr std::string_view kSpace =
      "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";
  std::string out;
  bool in_brackets = false;
  for (std::size_t i = 0; i < regex.size(); ++i) {
    const char next = regex[i] == '\\' && i + 1 < regex.size() ? regex[i + 1] : ' ';
    if (next == 's' || next == 'S') {
      out += codegemm::concat(in_brackets ? "" : next == 's' ? "[" : "[^", kSpace, in_brackets ? "" : "]");
      ++i;
      continue;
    }
    if (regex[i] == '[' || regex[i] == ']') in_brackets = regex[i] == '[';
    out.push_back(regex[i]);
  }
  return out;
}

struct FreeCode {
  void operator()(pcre2_code* code) const noexcept { pcre2_code_free(code); }
};
struct FreeMatch {
  void operator()(pcre2_match_data* match) const noexcept { pcre2_match_data_free(match); }
};

[[nodiscard]] inline std::string pcre2_text(int code) {
  PCRE2_UCHAR buffer[160] = {};
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  std::string out;
  for (const PCRE2_UCHAR* c = buffer; *c != 0; ++c) out.push_back(static_cast<char>(*c));
  return out;
}

/// One compiled expression; matching does not change it, so threads may share it.
class Regex {
 public:
  [[nodiscard]] static Result<Regex> compile(std::string_view pattern) {
    int code = 0;
    PCRE2_SIZE offset = 0;
    Regex regex;
    regex.code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                    PCRE2_UTF | PCRE2_UCP, &code, &offset, nullptr));
    if (regex.code_ == nullptr) {
      return error(StatusCode::kInvalidArgument, "regular expression refused at offset ", offset, ": ",
                   pcre2_text(code));
    }
    // Where there is no JIT, pcre2_match() interprets: slower, the same matches.
    pcre2_jit_compile(regex.code_.get(), PCRE2_JIT_COMPLETE);
    return regex;
  }

  /// Calls `take(piece)` for every match and for every stretch between matches, in order; together they are
  /// `text` again. `text` must be well-formed UTF-8: it is not checked again.
  template <class Take>
  [[nodiscard]] Status split(std::string_view text, Take&& take) const {
    std::unique_ptr<pcre2_match_data, FreeMatch> match(pcre2_match_data_create(1, nullptr));
    if (match == nullptr)
      return error(StatusCode::kOutOfMemory, "no memory for a match of a regular expression");
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    std::size_t at = 0;
    while (at < text.size()) {
      const int found =
          pcre2_match(code_.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK, match.get(), nullptr);
      if (found == PCRE2_ERROR_NOMATCH) break;
      if (found < 0) {
        return error(StatusCode::kUnsupported, "pre-tokenizer failed at byte ", at, " of a stretch of ",
                     text.size(), ": ", pcre2_text(found));
      }
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match.get());
      if (span[1] <= span[0] || span[0] < at) break;  // none of the expressions here matches nothing
      if (span[0] > at) take(text.substr(at, span[0] - at));
      take(text.substr(span[0], span[1] - span[0]));
      at = span[1];
    }
    if (at < text.size()) take(text.substr(at));
    return {};
  }

 private:
  Regex() = default;
  std::unique_ptr<pcre2_code, FreeCode> code_;
};

}  // namespace detail

/// The stages that a named pre-tokenizer applies, each to the pieces of the one before. A stage sees its
/// piece only: a look-ahead does not reach over the cut.
class PreTokenizer {
 public:
  static constexpr std::string_view kNames = "default, gpt-2, llama-bpe, qwen2, smollm";

  /// `name` as GGUF's `tokenizer.ggml.pre` has it; "default" is GPT-2's.
  [[nodiscard]] static Result<PreTokenizer> create(std::string_view name) {
    PreTokenizer out;
    std::vector<std::string_view> patterns;
    if (name == "default" || name == "gpt-2") {
      patterns = {detail::kGpt2Regex};
    } else if (name == "smollm") {
      patterns = {detail::kDigitRegex, detail::kGpt2Regex};
    } else if (name == "llama-bpe") {
      patterns = {detail::kLlama3Regex};
    } else if (name == "qwen2") {
      patterns = {detail::kQwen2Regex};
    } else {
      return error(StatusCode::kUnsupported, "pre-tokenizer ", codegemm::quoted(name),
                   " is not known; known are ", kNames);
    }
    for (const std::string_view pattern : patterns) {
      Result<detail::Regex> regex = detail::Regex::compile(detail::spell_out_space(pattern));
      if (!regex.ok()) return regex.status().with_prefix(codegemm::quoted(name));
      out.stages_.push_back(std::move(regex).value());
    }
    return out;
  }

  /// Calls `take(piece)` for the pieces of `text` in order. `text` must be well-formed UTF-8.
  template <class Take>
  [[nodiscard]] Status split(std::string_view text, Take&& take) const {
    std::vector<std::string_view> pieces{text}, next;
    for (std::size_t stage = 0; stage + 1 < stages_.size(); ++stage) {
      next.clear();
      for (const std::string_view piece : pieces) {
        Status status = stages_[stage].split(piece, [&next](std::string_view part) { next.push_back(part); });
        if (!status.ok()) return status;
      }
      pieces.swap(next);
    }
    for (const std::string_view piece : pieces) {
      if (Status status = stages_.back().split(piece, take); !status.ok()) return status;
    }
    return {};
  }

 private:
  PreTokenizer() = default;
  std::vector<detail::Regex> stages_;
};

}  // namespace prefillshare::examples
