// SPDX-License-Identifier: Apache-2.0
//
// fuzz/tokenizer_fuzz.cpp - hostile texts, vocabularies and chat templates. The first byte says which:
//   t  text through a byte-level vocabulary with all bytes: it must come back, whole and streamed
//   s  the same through a vocabulary of SentencePiece's kind
//   v  a vocabulary: lines of the input are tokens and merges; the rest is encoded with it
//   g  a GGUF file, j  a tokenizer.json: read, and if a tokenizer comes of it, used
//   c  a chat template, rendered under small limits
// Seeds: fuzz/corpus/tokenizer.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/chat_template.hpp>
#include <common/gguf_tokenizer.hpp>
#include <common/tokenizer.hpp>
#include <common/tokenizer_json.hpp>

namespace {

using namespace prefillshare::examples;

void require(bool condition) {
  if (!condition) std::abort();
}

std::string letters(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) utf8_append(out, detail::kByteLetters[static_cast<unsigned char>(c)]);
  return out;
}

void add(TokenizerSpec& spec, std::string token, TokenType type, float score = 0.0F) {
  spec.tokens.push_back(std::move(token));
  spec.token_types.push_back(static_cast<int>(type));
  spec.scores.push_back(score);
}

TokenizerSpec byte_spec(std::string_view pre) {
  TokenizerSpec spec;
  spec.pre = pre;
  for (int byte = 0; byte < 256; ++byte) {
    add(spec, letters(std::string(1, static_cast<char>(byte))), TokenType::kNormal);
  }
  const std::pair<std::string_view, std::string_view> merges[] = {{"a", "a"},   {"aa", "a"}, {" ", "a"},
                                                                  {"aa", "aa"}, {" ", " "},  {"\xC3", "\xA9"},
                                                                  {"a", "b"},   {" a", "b"}};
  for (const auto& [left, right] : merges) {
    add(spec, letters(std::string(left) + std::string(right)), TokenType::kNormal);
    spec.merges.push_back(letters(left) + " " + letters(right));
  }
  add(spec, "<|end|>", TokenType::kControl);
  add(spec, "<|en", TokenType::kControl);
  add(spec, "aba", TokenType::kUserDefined);
  return spec;
}

TokenizerSpec spm_spec() {
  TokenizerSpec spec;
  spec.model = "llama";
  spec.add_space_prefix = true;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    constexpr std::string_view kHex = "0123456789ABCDEF";
    add(spec, std::string("<0x") + kHex[byte / 16] + kHex[byte % 16] + ">", TokenType::kByte);
  }
  float score = 0.0F;
  for (const char* token :
       {"a", "b", "aa", "ab", "aab", "aaaa", "\u2581", "\u2581a", "\u2581\u2581", "\u00E9"}) {
    add(spec, token, TokenType::kNormal, score);
    score -= 1.0F;
  }
  add(spec, "<s>", TokenType::kControl);
  return spec;
}

/// Encodes and decodes; `exact`: every byte must come back.
void use(const Tokenizer& tokenizer, std::string_view text, bool exact) {
  EncodeOptions options;
  for (const bool special : {false, true}) {
    options.parse_special = special;
    const Result<std::vector<std::int32_t>> ids = tokenizer.encode(text, options);
    require(ids.ok());
    const Result<std::string> whole = tokenizer.decode(*ids, true);
    require(whole.ok());
    // A space goes before the text after every special token of a SentencePiece vocabulary.
    require(!exact || (special && tokenizer.strips_first_space()) || *whole == text);
    // No part of a well-formed text ends inside a character.
    const bool well_formed = utf8_valid_prefix(*whole) == whole->size();
    StreamDecoder stream(tokenizer, true);
    std::string streamed;
    for (const std::int32_t id : *ids) {
      const Result<std::string> part = stream.push(id);
      require(part.ok());
      require(!well_formed || utf8_valid_prefix(*part) == part->size());
      streamed += *part;
    }
    require(streamed + stream.finish() == *whole);
  }
}

void use_spec(const Result<TokenizerSpec>& spec, std::string_view text) {
  if (!spec.ok()) {
    require(!spec.status().message().empty());
    return;
  }
  const Result<Tokenizer> tokenizer = Tokenizer::create(*spec);
  if (!tokenizer.ok()) {
    require(!tokenizer.status().message().empty());
    return;
  }
  use(*tokenizer, text, false);
}

std::string_view take_line(std::string_view& text) {
  const std::size_t end = text.find('\n');
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  return line;
}

/// A vocabulary out of lines "KIND text": + normal, * control, % user-defined, & byte, # unused, = merge, !
/// removes the last token, b/e/u the id of BOS, EOS and unknown. An empty line ends it.
void fuzz_vocabulary(std::string_view input) {
  const bool spm = input.substr(0, 1) == "S";
  if (!input.empty()) input.remove_prefix(1);
  TokenizerSpec spec = spm ? spm_spec() : byte_spec("smollm");
  while (!input.empty()) {
    const std::string_view line = take_line(input);
    if (line.empty()) break;
    const std::string text(line.substr(1));
    const float score = static_cast<float>(text.size() % 7);
    const auto id = static_cast<std::int32_t>(std::strtol(text.c_str(), nullptr, 10));
    switch (line[0]) {
      case '+': add(spec, text, TokenType::kNormal, score); break;
      case '*': add(spec, text, TokenType::kControl, score); break;
      case '%': add(spec, text, TokenType::kUserDefined, score); break;
      case '&': add(spec, text, TokenType::kByte, score); break;
      case '#': add(spec, text, TokenType::kUnused, score); break;
      case '=': spec.merges.push_back(text); break;
      case '!':
        if (!spec.tokens.empty()) spec.tokens.pop_back();
        break;
      case 't':
        if (!spec.token_types.empty()) spec.token_types.back() = id;
        break;
      case 'b':
        spec.bos_id = id;
        spec.add_bos = true;
        break;
      case 'e': spec.eos_id = id; break;
      case 'u': spec.unk_id = id; break;
      case 'i': spec.ignore_merges = true; break;
      default: spec.pre = text;
    }
  }
  use_spec(std::move(spec), input);
}

void fuzz_template(std::string_view source) {
  TemplateLimits limits;
  limits.max_work = 1 << 18;
  limits.max_output = 1 << 16;
  const Result<ChatTemplate> parsed = ChatTemplate::parse(source, limits);
  if (!parsed.ok()) {
    require(!parsed.status().message().empty());
    return;
  }
  static const TemplateContext context = TemplateContext::parse(R"({
    "messages": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Größe?\n"},
                 {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments":
                  {"a": 1, "b": [2.5, true, "x"]}}}]}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "n": 3, "add_generation_prompt": true, "bos_token": "<s>", "eos_token": "</s>"})");
  const Result<std::string> text = parsed->render(context);
  if (text.ok()) {
    require(text->size() <= limits.max_output);
    const Result<std::string> again = parsed->render(context);
    require(again.ok() && *again == *text);
  } else {
    require(!text.status().message().empty());
  }
}

const Tokenizer& fixed(std::size_t i) {
  static const std::vector<Tokenizer> tokenizers = [] {
    std::vector<Tokenizer> out;
    for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"}) {
      Result<Tokenizer> made = Tokenizer::create(byte_spec(pre));
      require(made.ok());
      out.push_back(std::move(made).value());
    }
    Result<Tokenizer> made = Tokenizer::create(spm_spec());
    require(made.ok());
    out.push_back(std::move(made).value());
    return out;
  }();
  return tokenizers[i];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0]) {
    case 't':
      for (std::size_t i = 0; i < 4; ++i) use(fixed(i), input, true);
      break;
    // U+2581 is a space afterwards: that is how this kind of vocabulary writes one.
    case 's': use(fixed(4), input, input.find(detail::kSpmSpace) == std::string_view::npos); break;
    case 'v': fuzz_vocabulary(input); break;
    case 'g': {
      const Result<GgufFile> file = GgufFile::parse(std::as_bytes(std::span(data + 1, size - 1)), "fuzz");
      if (file.ok()) use_spec(spec_from_gguf(*file), "a b12 <|end|>\xFF");
      break;
    }
    case 'j': {
      std::string_view rest = input;
      const std::string_view config = take_line(rest);
      use_spec(spec_from_tokenizer_json(rest, config), "a b12 <|end|>\xFF");
      break;
    }
    case 'c': fuzz_template(input); break;
    default: break;
  }
  return 0;
}
