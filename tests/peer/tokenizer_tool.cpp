// SPDX-License-Identifier: Apache-2.0
//
// tests/peer/tokenizer_tool.cpp - prints token ids and rendered chats, for comparison with other programs.
//   tokenizer_tool MODEL LINES [--plain]   one JSON array a line; a line ends at "\n" and nowhere else
//   tokenizer_tool MODEL --chat FILE       the model's chat template rendered on FILE: {"messages": [...],
//                                         "add_generation_prompt": true}; printed as one JSON string
// MODEL is a GGUF file or a Hugging Face folder. --plain: special tokens in the text are text.

#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include <common/chat_template.hpp>
#include <common/gguf_tokenizer.hpp>
#include <common/tokenizer.hpp>
#include <common/tokenizer_json.hpp>

namespace {

using namespace prefillshare::examples;

template <class T>
T need(Result<T> result) {
  if (!result.ok()) throw std::runtime_error(result.status().message());
  return std::move(result).value();
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

Tokenizer open_model(const std::string& path) {
  if (std::filesystem::is_directory(path)) return need(Tokenizer::create(need(spec_from_folder(path))));
  const GgufFile file = need(GgufFile::open(path));
  return need(Tokenizer::create(need(spec_from_gguf(file))));
}

void print_ids(const Tokenizer& tokenizer, std::string_view text, bool parse_special) {
  EncodeOptions options;
  options.parse_special = parse_special;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    std::cout << nlohmann::json(need(tokenizer.encode(text.substr(0, end), options))).dump() << '\n';
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  }
}

void print_chat(const Tokenizer& tokenizer, const std::string& input) {
  const ChatTemplate chat = need(ChatTemplate::parse(tokenizer.chat_template()));
  TemplateContext context = TemplateContext::parse(input);
  context["bos_token"] = tokenizer.token_text(tokenizer.bos());
  context["eos_token"] = tokenizer.token_text(tokenizer.eos());
  std::cout << nlohmann::json(need(chat.render(context))).dump() << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  const std::span<char*> args(argv, static_cast<std::size_t>(argc));
  try {
    if (args.size() == 4 && std::string_view(args[2]) == "--chat") {
      print_chat(open_model(args[1]), read_file(args[3]));
    } else if (args.size() == 3 || (args.size() == 4 && std::string_view(args[3]) == "--plain")) {
      print_ids(open_model(args[1]), read_file(args[2]), args.size() == 3);
    } else {
      std::cerr << "usage: tokenizer_tool MODEL LINES [--plain] | MODEL --chat FILE\n";
      return 2;
    }
  } catch (const std::exception& failure) {
    std::cerr << "tokenizer_tool: " << failure.what() << '\n';
    return 2;
  }
  return 0;
}
