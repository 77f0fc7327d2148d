// SPDX-License-Identifier: Apache-2.0
//
// examples/common/conversation.hpp - a chat that only ever grows: each message as the tokens that it adds.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/chat_template.hpp>
#include <common/tokenizer.hpp>
#include <common/unwrap.hpp>

namespace prefillshare::examples {

/// Renders the model's chat template so that what was said stays said: a shared cache must never have to
/// change its past. A template that rewrites earlier messages still only adds here.
class Conversation {
 public:
  explicit Conversation(const Tokenizer& tokenizer)
      : tokenizer_(&tokenizer),
        template_(unwrap(ChatTemplate::parse(
            tokenizer.chat_template().empty() ? std::string(kPlainTemplate) : tokenizer.chat_template()))) {}

  /// Tokens of a message of the user, up to where the assistant's answer begins. For every message but the
  /// first, the end of the answer before it comes first. What the user says is text whatever it contains: a
  /// "<|im_end|>" in a document ends nothing.
  [[nodiscard]] std::vector<std::int32_t> user(const std::string& text) {
    messages_.push_back({"user", std::string(kQuestion)});
    std::string added = render();
    const bool first = messages_.size() == 1;
    if (!first) {
      const std::size_t at = added.rfind(kAnswer);
      if (at == std::string::npos)
        throw UserError("the chat template does not repeat the assistant's message");
      added.erase(0, at + kAnswer.size());
    }
    const std::size_t question = added.rfind(kQuestion);
    if (question == std::string::npos) throw UserError("the chat template does not show the user's message");
    messages_.push_back({"assistant", std::string(kAnswer)});

    // A template that writes the BOS token itself must not get a second one.
    const std::string_view bos = tokenizer_->token_text(tokenizer_->bos());
    const bool add_bos = first && tokenizer_->adds_bos() && (bos.empty() || !added.starts_with(bos));
    std::vector<std::int32_t> tokens = unwrap(tokenizer_->encode(added.substr(0, question), {true, add_bos}));
    for (const auto& [part, special] :
         {std::pair<std::string_view, bool>(text, false),
          {std::string_view(added).substr(question + kQuestion.size()), true}}) {
      const std::vector<std::int32_t> more = unwrap(tokenizer_->encode(part, {special, false}));
      tokens.insert(tokens.end(), more.begin(), more.end());
    }
    return tokens;
  }

 private:
  static constexpr std::string_view kAnswer = "@@the-answer-stands-here@@";
  static constexpr std::string_view kQuestion = "@@the-question-stands-here@@";
  // For models that come without a template.
  static constexpr std::string_view kPlainTemplate =
      "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
      "{% if add_generation_prompt %}### assistant:\n{% endif %}";

  [[nodiscard]] std::string render() const {
    return unwrap(template_.render(messages_, true, tokenizer_->token_text(tokenizer_->bos()),
                                   tokenizer_->token_text(tokenizer_->eos())));
  }

  const Tokenizer* tokenizer_;
  ChatTemplate template_;
  std::vector<ChatMessage> messages_;  // what was said stands there as kQuestion and kAnswer
};

}  // namespace prefillshare::examples
