// SPDX-License-Identifier: Apache-2.0
//
// examples/common/model_tokenizer.hpp - the tokenizer of a model, wherever the model keeps it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include <common/gguf.hpp>
#include <common/gguf_tokenizer.hpp>
#include <common/tokenizer.hpp>
#include <common/tokenizer_json.hpp>

namespace prefillshare::examples {

/// `path` is a GGUF file or a Hugging Face folder with tokenizer.json. Errors name the file and the field.
[[nodiscard]] inline Result<Tokenizer> load_tokenizer(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    Result<TokenizerSpec> spec = spec_from_folder(path);
    if (!spec.ok()) return spec.status();
    Result<Tokenizer> tokenizer = Tokenizer::create(std::move(spec).value());
    if (!tokenizer.ok()) return tokenizer.status().with_prefix(path);
    return tokenizer;
  }
  Result<GgufFile> file = GgufFile::open(path);
  if (!file.ok()) return file.status();
  Result<TokenizerSpec> spec = spec_from_gguf(*file);
  if (!spec.ok()) return spec.status();
  Result<Tokenizer> tokenizer = Tokenizer::create(std::move(spec).value());
  if (!tokenizer.ok()) return tokenizer.status().with_prefix(path);
  return tokenizer;
}

/// The tokens that end an answer: the model's EOS, and the end-of-turn tokens of the known chat formats.
[[nodiscard]] inline std::vector<std::int32_t> stop_tokens(const Tokenizer& tokenizer) {
  std::vector<std::int32_t> stop;
  if (tokenizer.eos() >= 0) stop.push_back(tokenizer.eos());
  for (const char* text : {"<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"}) {
    const std::int32_t id = tokenizer.find(text);
    if (id >= 0 && tokenizer.is_control(id)) stop.push_back(id);
  }
  return stop;
}

}  // namespace prefillshare::examples
