// SPDX-License-Identifier: Apache-2.0
//
// common/training_data.hpp - examples to fine-tune on, one JSON object a line.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/io/json_file.hpp>
#include <codegemm/io/mapped_file.hpp>
#include <common/conversation.hpp>
#include <common/tokenizer.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/train/examples.hpp>

namespace prefillshare::examples {

struct TrainingDataOptions {
  std::int64_t max_tokens = 1024;  ///< of prompt and target together
  bool chat = true;                ///< the prompt is a user's message in the model's chat template
  std::int32_t end = -1;           ///< the token that ends a target; negative: the tokenizer's EOS
  std::int64_t limit = 0;          ///< the first so many examples of a file; 0: all
};

/// Reads {"prompt": "...", "target": "..."} line by line; empty lines are skipped, other members ignored. The
/// target's tokens end with the token that ends a turn. Throws UserError with the file and the number of the
/// line: no JSON object, a text that is missing, empty or no text, more tokens than allowed.
[[nodiscard]] inline std::vector<TrainingExample> read_training_data(const std::string& path,
                                                                     const Tokenizer& tokenizer,
                                                                     const TrainingDataOptions& options) {
  const codegemm::MappedFile file = unwrap(codegemm::MappedFile::open(path));
  const std::string_view all = codegemm::text_of(file);
  const std::int32_t end = options.end >= 0 ? options.end : tokenizer.eos();
  std::vector<TrainingExample> out;
  std::int64_t number = 0;
  for (std::size_t at = 0; at < all.size();) {
    if (options.limit > 0 && std::ssize(out) == options.limit) break;
    const std::size_t stop = std::min(all.find('\n', at), all.size());
    const std::string_view line = all.substr(at, stop - at);
    at = stop + 1;
    const std::string where = codegemm::concat(path, ": line ", ++number);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const nlohmann::json json = unwrap(codegemm::parse_json_object(line, where));
    const auto text = [&](const char* name) {
      const auto member = json.find(name);
      if (member == json.end() || !member->is_string())
        throw UserError(codegemm::concat(where, ": has no text '", name, "'"));
      std::string value = member->get<std::string>();
      if (value.empty()) throw UserError(codegemm::concat(where, ": '", name, "' is empty"));
      return value;
    };
    const std::string prompt = text("prompt");
    TrainingExample& example = out.emplace_back();
    example.prompt = options.chat ? Conversation(tokenizer).user(prompt)
                                  : unwrap(tokenizer.encode(prompt, {false, tokenizer.adds_bos()}));
    example.target = unwrap(tokenizer.encode(text("target"), {false, false}));
    if (end >= 0) example.target.push_back(end);
    check(validate(example, options.max_tokens, tokenizer.size()).with_prefix(where));
  }
  if (out.empty()) throw UserError(path + ": holds no example");
  return out;
}

}  // namespace prefillshare::examples
