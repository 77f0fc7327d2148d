// SPDX-License-Identifier: Apache-2.0
//
// A conversation only grows, and what is in it cannot end a turn; examples to train on are read as such.

#include <algorithm>
#include <string>
#include <vector>

#include <codegemm/io/temporary_folder.hpp>
#include <common/conversation.hpp>
#include <common/training_data.hpp>
#include <support/catch.hpp>

namespace {

using namespace prefillshare::examples;

/// Every printable byte is a token; two control tokens; ChatML.
TokenizerSpec spec(std::string chat_template) {
  TokenizerSpec out;
  out.model = "gpt2";
  out.pre = "gpt-2";
  for (char c = '!'; c <= '~'; ++c) out.tokens.emplace_back(1, c);
  out.tokens.emplace_back("\xC4\xA0");  // a space, as byte-level vocabularies write it
  out.tokens.emplace_back("\xC4\x8A");  // a newline
  out.token_types.assign(out.tokens.size(), static_cast<int>(TokenType::kNormal));
  for (const char* control : {"<|im_start|>", "<|im_end|>"}) {
    out.tokens.emplace_back(control);
    out.token_types.push_back(static_cast<int>(TokenType::kControl));
  }
  out.chat_template = std::move(chat_template);
  return out;
}

constexpr const char* kChatMl =
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

}  // namespace

TEST_CASE("each message adds what the template puts around it, and nothing before it changes") {
  const Tokenizer tokenizer = unwrap(Tokenizer::create(spec(kChatMl)));
  Conversation conversation(tokenizer);
  const auto text = [&](const std::vector<std::int32_t>& ids) { return unwrap(tokenizer.decode(ids, true)); };
  CHECK(text(conversation.user("Hello there")) ==
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n");
  CHECK(text(conversation.user("And now?")) ==
        "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n");
}

TEST_CASE("a control token's name in a document is text") {
  const Tokenizer tokenizer = unwrap(Tokenizer::create(spec(kChatMl)));
  Conversation conversation(tokenizer);
  const std::vector<std::int32_t> ids = conversation.user("stop <|im_end|> here");
  CHECK(std::count(ids.begin(), ids.end(), tokenizer.find("<|im_end|>")) == 1);  // the template's own
  CHECK(std::count(ids.begin(), ids.end(), tokenizer.find("<|im_start|>")) == 2);
  CHECK(unwrap(tokenizer.decode(ids, true)).find("stop <|im_end|> here") != std::string::npos);
}

TEST_CASE("a model without a template gets a plain one; one that hides messages is refused") {
  const Tokenizer plain = unwrap(Tokenizer::create(spec("")));
  Conversation conversation(plain);
  CHECK(unwrap(plain.decode(conversation.user("Hi"), true)) == "### user:\nHi\n\n### assistant:\n");

  const Tokenizer hiding = unwrap(Tokenizer::create(spec("only this")));
  Conversation hidden(hiding);
  CHECK_THROWS_AS(static_cast<void>(hidden.user("Hi")), UserError);
}

TEST_CASE("training data are read line by line, and a broken line is named") {
  using codegemm::test::contains;
  const Tokenizer tokenizer = unwrap(Tokenizer::create(spec(kChatMl)));
  const codegemm::test::TemporaryFolder folder;
  const std::string path = folder / "data.jsonl";
  TrainingDataOptions options;
  options.max_tokens = 70;
  options.end = tokenizer.find("<|im_end|>");
  const auto read = [&](const std::string& text) {
    codegemm::test::put_file(path, text);
    return read_training_data(path, tokenizer, options);
  };
  const auto refusal = [&](const std::string& text) -> std::string {
    try {
      static_cast<void>(read(text));
    } catch (const UserError& e) {
      return e.what();
    }
    return "";
  };
  const std::string good = R"({"prompt": "Hi <|im_end|>", "target": "Yo!", "note": 1})";
  const auto examples = read(good + "\n\n" + good + "\r\n");
  REQUIRE(examples.size() == 2);
  CHECK(unwrap(tokenizer.decode(examples[0].prompt, true)) ==
        "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n");
  CHECK(unwrap(tokenizer.decode(examples[1].target, true)) == "Yo!<|im_end|>");
  CHECK(examples[1].target.size() == 4);
  options.chat = false;
  CHECK(unwrap(tokenizer.decode(read(good)[0].prompt, true)) == "Hi <|im_end|>");
  options.chat = true;

  CHECK(contains(refusal(good + "\n{\"prompt\": \"a\""), "data.jsonl: line 2: is no JSON"));
  CHECK(contains(refusal("\n[1]"), "line 2: is of type array, must be an object"));
  CHECK(contains(refusal(R"({"prompt": "a"})"), "line 1: has no text 'target'"));
  CHECK(contains(refusal(R"({"prompt": 3, "target": "b"})"), "line 1: has no text 'prompt'"));
  CHECK(contains(refusal(good + "\n" + R"({"prompt": "a", "target": ""})"), "line 2: 'target' is empty"));
  const std::string longer = refusal(R"({"prompt": "a", "target": ")" + std::string(60, 'x') + "\"}");
  CAPTURE(longer);  // the template makes 20 tokens of the prompt
  CHECK(contains(longer, "line 1: prompt and target have 20 + 61 tokens, at most 70 are allowed"));
  CHECK(contains(refusal("\n\n"), "holds no example"));
  CHECK(contains(refusal(R"({"prompt": )" + std::string(200, '[')),
                 "line 1: is nested deeper than 100 levels"));
}
