// SPDX-License-Identifier: Apache-2.0
//
// common/gguf_tokenizer.hpp - the tokenizer that a GGUF file carries in its metadata.
// Layer: examples (host only).
// The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/gguf.hpp>
#include <common/tokenizer_spec.hpp>

namespace prefillshare::examples {

namespace detail {

inline constexpr std::string_view kGgufTokenizer = "tokenizer.ggml.";

/// A token id, or -1 where the file does not say.
[[nodiscard]] inline Result<std::int32_t> gguf_id(const GgufFile& file, std::string_view name) {
  const std::string key = codegemm::concat(kGgufTokenizer, name);
  if (file.find(key) == nullptr) return -1;
  const Result<std::int64_t> id = file.integer(key);
  if (!id.ok()) return id.status();
  // "None" is written as 2^32 - 1 by some converters.
  if (*id == std::numeric_limits<std::uint32_t>::max()) return -1;
  if (*id < 0 || *id > std::numeric_limits<std::int32_t>::max()) {
    return error(StatusCode::kCorruptData, file.name(), ": metadata '", key, "' is ", *id,
                 ", not a token id");
  }
  return static_cast<std::int32_t>(*id);
}

[[nodiscard]] inline Result<bool> gguf_flag(const GgufFile& file, std::string_view name, bool otherwise) {
  const std::string key = codegemm::concat(kGgufTokenizer, name);
  return file.find(key) == nullptr ? Result<bool>(otherwise) : file.boolean(key);
}

[[nodiscard]] inline Result<std::vector<std::string>> gguf_texts(const GgufFile& file,
                                                                 std::string_view name) {
  const Result<std::vector<std::string_view>> texts = file.strings(codegemm::concat(kGgufTokenizer, name));
  if (!texts.ok()) return texts.status();
  return std::vector<std::string>(texts->begin(), texts->end());
}

}  // namespace detail

/// The metadata as a spec, whose meaning Tokenizer::create() checks. Messages start with the file's name.
/// Flags that the file leaves out have llama.cpp's defaults.
[[nodiscard]] inline Result<TokenizerSpec> spec_from_gguf(const GgufFile& file) {
  TokenizerSpec spec;
  const Result<std::string_view> model = file.string("tokenizer.ggml.model");
  if (!model.ok()) return model.status();
  spec.model = *model;
  const bool llama = spec.model == "llama";

  Result<std::vector<std::string>> tokens = detail::gguf_texts(file, "tokens");
  if (!tokens.ok()) return tokens.status();
  spec.tokens = std::move(tokens).value();
  if (file.find("tokenizer.ggml.token_type") != nullptr) {
    const Result<std::vector<std::int64_t>> types = file.integers("tokenizer.ggml.token_type");
    if (!types.ok()) return types.status();
    spec.token_types.reserve(types->size());
    for (const std::int64_t type : *types) {
      constexpr std::int64_t kMost = std::numeric_limits<int>::max();
      spec.token_types.push_back(static_cast<int>(std::clamp(type, -kMost, kMost)));
    }
  }
  if (llama) {
    Result<std::vector<float>> scores = file.numbers("tokenizer.ggml.scores");
    if (!scores.ok()) return scores.status();
    spec.scores = std::move(scores).value();
  } else {
    Result<std::vector<std::string>> merges = detail::gguf_texts(file, "merges");
    if (!merges.ok()) return merges.status();
    spec.merges = std::move(merges).value();
    if (file.find("tokenizer.ggml.pre") != nullptr) {
      const Result<std::string_view> pre = file.string("tokenizer.ggml.pre");
      if (!pre.ok()) return pre.status();
      spec.pre = *pre;
    }
    spec.ignore_merges = spec.pre == "llama-bpe";
  }

  const std::pair<std::string_view, std::int32_t*> ids[] = {
      {"bos_token_id", &spec.bos_id}, {"eos_token_id", &spec.eos_id}, {"unknown_token_id", &spec.unk_id}};
  for (const auto& [name, place] : ids) {
    const Result<std::int32_t> id = detail::gguf_id(file, name);
    if (!id.ok()) return id.status();
    *place = *id;
  }
  // llama.cpp adds BOS for "llama" and for the llama-bpe pre-tokenizer unless told otherwise.
  const Result<bool> add_bos =
      detail::gguf_flag(file, "add_bos_token", (llama || spec.pre == "llama-bpe") && spec.bos_id >= 0);
  if (!add_bos.ok()) return add_bos.status();
  spec.add_bos = *add_bos;
  const Result<bool> prefix = detail::gguf_flag(file, "add_space_prefix", llama);
  if (!prefix.ok()) return prefix.status();
  spec.add_space_prefix = *prefix;
  if (file.find("tokenizer.chat_template") != nullptr) {
    const Result<std::string_view> text = file.string("tokenizer.chat_template");
    if (!text.ok()) return text.status();
    spec.chat_template = *text;
  }
  if (Status status = detail::validate_spec(spec); !status.ok()) return status.with_prefix(file.name());
  return spec;
}

}  // namespace prefillshare::examples
