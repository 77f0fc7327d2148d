// SPDX-License-Identifier: Apache-2.0
//
// common/tokenizer_json.hpp - the tokenizer of a Hugging Face model folder.
// Layer: examples (host only).
// Reads tokenizer.json (BPE models of the byte-level kind), tokenizer_config.json and chat_template.jinja.
// Anything that would change the ids and is not known here is refused by name: a tokenizer that is almost
// right is worse than none.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <common/pretokenizer.hpp>
#include <common/tokenizer_spec.hpp>

namespace prefillshare::examples {

namespace detail {

using Json = nlohmann::json;

/// The member `name` of an object; null where there is none or `object` is none.
[[nodiscard]] inline const Json& member(const Json& object, const char* name) {
  static const Json kNull;
  if (!object.is_object()) return kNull;
  const auto found = object.find(name);
  return found == object.end() ? kNull : *found;
}
[[nodiscard]] inline bool is_text(const Json& value, std::string_view text) {
  return value.is_string() && value.get_ref<const std::string&>() == text;
}
[[nodiscard]] inline bool is_true(const Json& value) { return value.is_boolean() && value.get<bool>(); }
/// A value for a message; invalid UTF-8 in it must not throw.
[[nodiscard]] inline std::string json_text(const Json& value) {
  return codegemm::quoted(value.dump(-1, ' ', false, Json::error_handler_t::replace), 200);
}
/// Nesting is bounded, because writing a value back for a message recurses.
[[nodiscard]] inline Result<Json> parse_json(std::string_view text, std::string_view file) {
  constexpr int kMostNesting = 64;
  bool too_deep = false;
  const auto keep = [&too_deep](int depth, Json::parse_event_t, const Json&) {
    too_deep = too_deep || depth > kMostNesting;
    return !too_deep;
  };
  try {
    Json json = Json::parse(text.begin(), text.end(), keep);
    if (too_deep) return error(StatusCode::kCorruptData, file, ": nested more than ", kMostNesting, " deep");
    return json;
  } catch (const Json::exception& failure) {
    return error(StatusCode::kCorruptData, file, ": ", failure.what());
  }
}

/// Fills a vocabulary whose ids come in any order.
class JsonVocabulary {
 public:
  explicit JsonVocabulary(std::size_t entries) : limit_(entries + kMaxGaps) {}

  [[nodiscard]] Status put(const std::string& text, const Json& id, TokenType type, bool replace) {
    // nlohmann keeps a non-negative integer as unsigned, so a negative one is refused here too.
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= limit_) {
      return error(StatusCode::kCorruptData, "id of token ", codegemm::quoted(text), " is ", json_text(id),
                   ", not one of 0..", limit_ - 1);
    }
    const auto at = static_cast<std::size_t>(id.get<std::uint64_t>());
    if (at >= tokens.size()) {
      tokens.resize(at + 1);
      types.resize(at + 1, static_cast<int>(TokenType::kUnused));
    }
    if (!tokens[at].empty() && !(replace && tokens[at] == text)) {
      return error(StatusCode::kCorruptData, "id ", at, " belongs to ", codegemm::quoted(tokens[at]),
                   " and to ", codegemm::quoted(text));
    }
    tokens[at] = text;
    types[at] = static_cast<int>(type);
    return {};
  }

  std::vector<std::string> tokens;
  std::vector<int> types;

 private:
  // Ids that no token has: a few in real files; a bound, so that one number cannot ask for all memory.
  static constexpr std::size_t kMaxGaps = 65536;
  std::size_t limit_;
};

/// The name that PreTokenizer knows a `pre_tokenizer` section by.
[[nodiscard]] inline Result<std::string> pre_tokenizer_name(const Json& section) {
  const auto byte_level = [](const Json& stage, bool regex) {
    return is_text(member(stage, "type"), "ByteLevel") && !is_true(member(stage, "add_prefix_space")) &&
           (member(stage, "use_regex").is_null() || is_true(member(stage, "use_regex"))) == regex;
  };
  if (byte_level(section, true)) return std::string("gpt-2");
  const Json& stages = member(section, "pretokenizers");
  if (is_text(member(section, "type"), "Sequence") && stages.is_array() && stages.size() == 2) {
    const Json& first = stages[0];
    if (is_text(member(first, "type"), "Digits") && is_true(member(first, "individual_digits")) &&
        byte_level(stages[1], true)) {
      return std::string("smollm");
    }
    if (is_text(member(first, "type"), "Split") && is_text(member(first, "behavior"), "Isolated") &&
        !is_true(member(first, "invert")) && byte_level(stages[1], false)) {
      const Json& regex = member(member(first, "pattern"), "Regex");
      if (is_text(regex, kLlama3Regex)) return std::string("llama-bpe");
      if (is_text(regex, kQwen2Regex)) return std::string("qwen2");
    }
  }
  return error(StatusCode::kUnsupported, "pre_tokenizer is ", json_text(section),
               "; known are those of gpt-2, smollm, llama-bpe and qwen2");
}

[[nodiscard]] inline Status read_bpe_model(const Json& model, TokenizerSpec& spec,
                                           JsonVocabulary& vocabulary) {
  if (!is_text(member(model, "type"), "BPE")) {
    return error(StatusCode::kUnsupported, "model.type is ", json_text(member(model, "type")),
                 ", only \"BPE\" is read");
  }
  if (is_true(member(model, "byte_fallback"))) {
    return error(StatusCode::kUnsupported,
                 "model.byte_fallback: SentencePiece models are read from GGUF files only");
  }
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json& value = member(model, name);
    if (!value.is_null() && !is_text(value, "")) {
      return error(StatusCode::kUnsupported, "model.", name, " is ", json_text(value), ", only none is read");
    }
  }
  const Json& vocab = member(model, "vocab");
  if (!vocab.is_object()) return error(StatusCode::kCorruptData, "model.vocab is not an object");
  for (const auto& [token, id] : vocab.items()) {
    Status status = vocabulary.put(token, id, TokenType::kNormal, false);
    if (!status.ok()) return status.with_prefix("model.vocab");
  }
  const Json& merges = member(model, "merges");
  if (!merges.is_array()) return error(StatusCode::kCorruptData, "model.merges is not an array");
  spec.merges.reserve(merges.size());
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const Json& merge = merges[i];
    if (merge.is_string()) {
      spec.merges.push_back(merge.get<std::string>());
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      spec.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
    } else {
      return error(StatusCode::kCorruptData, "model.merges[", i, "] is ", json_text(merge),
                   ", neither a string nor a pair of strings");
    }
  }
  spec.ignore_merges = is_true(member(model, "ignore_merges"));
  return {};
}

[[nodiscard]] inline Status read_added_tokens(const Json& added, JsonVocabulary& vocabulary) {
  if (added.is_null()) return {};
  if (!added.is_array()) return error(StatusCode::kCorruptData, "added_tokens is not an array");
  for (std::size_t i = 0; i < added.size(); ++i) {
    const Json& content = member(added[i], "content");
    if (!content.is_string())
      return error(StatusCode::kCorruptData, "added_tokens[", i, "].content is not a string");
    for (const char* flag : {"lstrip", "rstrip", "single_word"}) {
      if (is_true(member(added[i], flag))) {
        return error(StatusCode::kUnsupported, "added_tokens[", i, "] ", json_text(content), " has ", flag,
                     ", which is not supported");
      }
    }
    const TokenType type =
        is_true(member(added[i], "special")) ? TokenType::kControl : TokenType::kUserDefined;
    Status status = vocabulary.put(content.get<std::string>(), member(added[i], "id"), type, true);
    if (!status.ok()) return status.with_prefix(codegemm::concat("added_tokens[", i, "]"));
  }
  return {};
}

/// tokenizer_config.json writes a special token as a string or as an object with the string in `content`.
[[nodiscard]] inline std::int32_t config_token(const Json& config, const char* name,
                                               const std::vector<std::string>& tokens) {
  const Json& entry = member(config, name);
  const Json& text = entry.is_object() ? member(entry, "content") : entry;
  if (!text.is_string()) return -1;
  const auto found = std::find(tokens.begin(), tokens.end(), text.get_ref<const std::string&>());
  return found == tokens.end() ? -1 : static_cast<std::int32_t>(found - tokens.begin());
}

/// Whether a post-processor of type TemplateProcessing (alone or in a Sequence) opens with the BOS token.
[[nodiscard]] inline bool template_adds(const Json& processor, const std::string& bos) {
  const Json& list = member(processor, "processors");
  if (is_text(member(processor, "type"), "Sequence") && list.is_array()) {
    return std::any_of(list.begin(), list.end(), [&](const Json& one) {
      return !is_text(member(one, "type"), "Sequence") && template_adds(one, bos);
    });
  }
  const Json& single = member(processor, "single");
  return is_text(member(processor, "type"), "TemplateProcessing") && single.is_array() && !single.empty() &&
         is_text(member(member(single[0], "SpecialToken"), "id"), bos);
}

[[nodiscard]] inline Status read_chat_template(const Json& entry, std::string& out) {
  if (entry.is_string()) out = entry.get<std::string>();
  if (!entry.is_array()) return {};
  for (const Json& one : entry) {
    if (is_text(member(one, "name"), "default") && member(one, "template").is_string()) {
      out = member(one, "template").get<std::string>();
      return {};
    }
  }
  return error(StatusCode::kUnsupported, "chat_template is a list of ", entry.size(),
               " without one named \"default\"");
}

}  // namespace detail

/// A spec from the texts of tokenizer.json, of tokenizer_config.json (may be empty: then there are no BOS,
/// EOS and template) and of chat_template.jinja (may be empty; wins over the config's). A normalizer of type
/// NFC is accepted and left out: texts are taken to be in NFC already.
[[nodiscard]] inline Result<TokenizerSpec> spec_from_tokenizer_json(std::string_view tokenizer,
                                                                    std::string_view config,
                                                                    std::string_view chat_template = {}) {
  using detail::is_text;
  using detail::member;
  const Result<detail::Json> root = detail::parse_json(tokenizer, "tokenizer.json");
  if (!root.ok()) return root.status();
  TokenizerSpec spec;
  const detail::Json& normalizer = member(*root, "normalizer");
  if (!normalizer.is_null() && !is_text(member(normalizer, "type"), "NFC")) {
    return error(StatusCode::kUnsupported, "tokenizer.json: normalizer is ", detail::json_text(normalizer),
                 ", only NFC or none is read");
  }
  const detail::Json& model = member(*root, "model");
  const detail::Json& added = member(*root, "added_tokens");
  detail::JsonVocabulary vocabulary(member(model, "vocab").size() + added.size());
  Status status = detail::read_bpe_model(model, spec, vocabulary);
  if (status.ok()) status = detail::read_added_tokens(added, vocabulary);
  if (!status.ok()) return status.with_prefix("tokenizer.json");
  Result<std::string> pre = detail::pre_tokenizer_name(member(*root, "pre_tokenizer"));
  if (!pre.ok()) return pre.status().with_prefix("tokenizer.json");
  spec.pre = *std::move(pre);
  spec.tokens = std::move(vocabulary.tokens);
  spec.token_types = std::move(vocabulary.types);

  if (!config.empty()) {
    const Result<detail::Json> settings = detail::parse_json(config, "tokenizer_config.json");
    if (!settings.ok()) return settings.status();
    spec.bos_id = detail::config_token(*settings, "bos_token", spec.tokens);
    spec.eos_id = detail::config_token(*settings, "eos_token", spec.tokens);
    spec.unk_id = detail::config_token(*settings, "unk_token", spec.tokens);
    const detail::Json& add_bos = member(*settings, "add_bos_token");
    if (spec.bos_id >= 0) {
      const std::string& bos = spec.tokens[static_cast<std::size_t>(spec.bos_id)];
      spec.add_bos = add_bos.is_boolean() ? add_bos.get<bool>()
                                          : detail::template_adds(member(*root, "post_processor"), bos);
    }
    status = detail::read_chat_template(member(*settings, "chat_template"), spec.chat_template);
    if (!status.ok()) return status.with_prefix("tokenizer_config.json");
  }
  if (!chat_template.empty()) spec.chat_template = chat_template;
  status = detail::validate_spec(spec);
  if (!status.ok()) return status.with_prefix("tokenizer.json");
  return spec;
}

/// A spec from a model folder: tokenizer.json, and tokenizer_config.json and chat_template.jinja where they
/// are.
[[nodiscard]] inline Result<TokenizerSpec> spec_from_folder(const std::string& folder) {
  constexpr std::uintmax_t kMaxFile = std::uintmax_t{128} << 20;
  std::string texts[3];
  const char* names[3] = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"};
  for (std::size_t i = 0; i < 3; ++i) {
    const std::filesystem::path path = std::filesystem::path(folder) / names[i];
    std::error_code failure;
    const std::uintmax_t bytes = std::filesystem::file_size(path, failure);
    if (failure == std::errc::no_such_file_or_directory && i > 0) continue;
    if (failure) {
      const bool missing = failure == std::errc::no_such_file_or_directory;
      return Status(missing ? StatusCode::kNotFound : StatusCode::kIoError,
                    codegemm::concat(path.string(), ": ", failure.message()), failure.value());
    }
    if (bytes > kMaxFile) {
      return error(StatusCode::kUnsupported, path.string(), " has ", bytes, " bytes, at most ", kMaxFile,
                   " are read");
    }
    std::ifstream file(path, std::ios::binary);
    texts[i].assign(std::istreambuf_iterator<char>(file), {});
    if (file.bad() || texts[i].size() != bytes) {
      return error(StatusCode::kIoError, path.string(), ": read ", texts[i].size(), " of ", bytes, " bytes");
    }
  }
  Result<TokenizerSpec> spec = spec_from_tokenizer_json(texts[0], texts[1], texts[2]);
  return spec.ok() ? std::move(spec) : Result<TokenizerSpec>(spec.status().with_prefix(folder));
}

}  // namespace prefillshare::examples
