// SPDX-License-Identifier: Apache-2.0
//
// common/tokenizer_spec.hpp - everything a tokenizer is made from, whichever file it came in.
// Layer: examples (host only).
// See: common/gguf_tokenizer.hpp and tokenizer_json.hpp, which fill it; tokenizer.hpp, which uses it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>

namespace prefillshare::examples {

using codegemm::error;
using codegemm::Result;
using codegemm::Status;
using codegemm::StatusCode;

/// A token's kind, with GGUF's numbers (`tokenizer.ggml.token_type`).
enum class TokenType : int {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,      ///< matched in text only when the caller parses special tokens
  kUserDefined = 4,  ///< always matched in text, before anything else
  kUnused = 5,
  kByte = 6,  ///< "<0x0A>": one byte, in vocabularies of the "llama" kind
};

/// Plain data, not yet believed: Tokenizer::create() checks every number and id.
struct TokenizerSpec {
  std::string model = "gpt2";       ///< "gpt2": byte-level BPE; "llama": SentencePiece BPE with scores
  std::string pre = "default";      ///< name of the pre-tokenizer, "gpt2" only
  std::vector<std::string> tokens;  ///< [vocabulary]; "gpt2": in the byte-to-letter alphabet of GPT-2
  std::vector<int> token_types;     ///< [vocabulary] of TokenType, or empty: all normal
  std::vector<float> scores;        ///< [vocabulary], "llama" only
  std::vector<std::string> merges;  ///< "left right", best first, "gpt2" only
  std::int32_t bos_id = -1;         ///< -1: none
  std::int32_t eos_id = -1;
  std::int32_t unk_id = -1;
  bool add_bos = false;           ///< encode() opens with bos_id unless told otherwise
  bool add_space_prefix = false;  ///< "llama" only: a text is encoded as if it began with a space
  bool ignore_merges = false;     ///< a piece that is a token as a whole is taken so, whatever the merges say
  std::string chat_template;      ///< Jinja text; empty: none
};

/// Limits on a vocabulary from outside; far above every published one.
inline constexpr std::size_t kMaxVocabulary = std::size_t{1} << 22;
inline constexpr std::size_t kMaxTokenBytes = 4096;
inline constexpr std::size_t kMaxSpecialBytes = 512;

namespace detail {

using TokenIndex = std::unordered_map<std::string_view, std::int32_t>;

[[nodiscard]] inline Status check_id(std::string_view field, std::int32_t id, std::size_t vocabulary) {
  if (id >= -1 && (id < 0 || static_cast<std::size_t>(id) < vocabulary)) return {};
  return error(StatusCode::kCorruptData, field, " is ", id, ", but the vocabulary has ", vocabulary,
               " tokens");
}

/// Counts, types, ids and lengths; the parts that need the tokens' meaning are checked where they are used.
[[nodiscard]] inline Status validate_spec(const TokenizerSpec& spec) {
  const std::size_t count = spec.tokens.size();
  if (spec.model != "gpt2" && spec.model != "llama") {
    return error(StatusCode::kUnsupported, "tokenizer model is ", codegemm::quoted(spec.model),
                 "; known are 'gpt2' and 'llama'");
  }
  if (count == 0) return error(StatusCode::kCorruptData, "tokens: the vocabulary is empty");
  if (count > kMaxVocabulary) {
    return error(StatusCode::kUnsupported, "tokens: ", count, " of them, at most ", kMaxVocabulary,
                 " are read");
  }
  if (!spec.token_types.empty() && spec.token_types.size() != count) {
    return error(StatusCode::kCorruptData, "token_types has ", spec.token_types.size(), " entries for ",
                 count, " tokens");
  }
  if (spec.model == "llama" && spec.scores.size() != count) {
    return error(StatusCode::kCorruptData, "scores has ", spec.scores.size(), " entries for ", count,
                 " tokens");
  }
  for (std::size_t i = 0; i < count; ++i) {
    const int type = spec.token_types.empty() ? 1 : spec.token_types[i];
    if (type < 1 || type > 6) {
      return error(StatusCode::kCorruptData, "token_types[", i, "] is ", type, ", not one of 1..6");
    }
    const std::size_t bytes = spec.tokens[i].size();
    const bool special =
        type == static_cast<int>(TokenType::kControl) || type == static_cast<int>(TokenType::kUserDefined);
    if (bytes == 0 && type != static_cast<int>(TokenType::kUnused)) {
      return error(StatusCode::kCorruptData, "tokens[", i, "] is empty");
    }
    if (bytes > (special ? kMaxSpecialBytes : kMaxTokenBytes)) {
      return error(StatusCode::kCorruptData, "tokens[", i, "] has ", bytes, " bytes, at most ",
                   special ? kMaxSpecialBytes : kMaxTokenBytes, " are allowed for its type ", type);
    }
  }
  if (Status status = check_id("bos id", spec.bos_id, count); !status.ok()) return status;
  if (Status status = check_id("eos id", spec.eos_id, count); !status.ok()) return status;
  if (Status status = check_id("unk id", spec.unk_id, count); !status.ok()) return status;
  if (spec.add_bos && spec.bos_id < 0) {
    return error(StatusCode::kCorruptData, "add_bos is set, but there is no bos id");
  }
  return {};
}

/// Token text to id. The keys point into `tokens`, which must outlive the index and not be resized.
[[nodiscard]] inline Result<TokenIndex> index_tokens(const std::vector<std::string>& tokens) {
  TokenIndex index;
  index.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i].empty()) continue;
    const auto [entry, fresh] = index.emplace(tokens[i], static_cast<std::int32_t>(i));
    if (!fresh) {
      return error(StatusCode::kCorruptData, "tokens[", i, "] ", codegemm::quoted(tokens[i]),
                   " is the same as tokens[", entry->second, "]");
    }
  }
  return index;
}

}  // namespace detail

}  // namespace prefillshare::examples
