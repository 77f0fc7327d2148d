// SPDX-License-Identifier: Apache-2.0
//
// A conversation only grows, and what is in it cannot end a turn.

#include <algorithm>
#include <string>
#include <vector>

#include <common/conversation.hpp>
#include <support/catch.hpp>

namespace {

using namespace prefillshare::examples;

/// Every printable byte is a token; two control tokens; ChatML.
TokenizerSpec spec(std::string chat_template) {
  TokenizerSpec out;
  out.model = "gpt2";
  out.pre = "gpt-2";
  for (char c = '!'; c <= '~'; ++c) out.tokens.emplace_back(1, c);
  out.tokens.push_back("\xC4\xA0");  // a space, as byte-level vocabularies write it
  out.tokens.push_back("\xC4\x8A");  // a newline
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
