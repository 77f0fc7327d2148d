// SPDX-License-Identifier: Apache-2.0
//
// common/chat_template.hpp - renders the chat template of a model: messages in, the model's prompt out.
// Layer: examples (host only).
//
// The template is Jinja text out of the model file. Debian 12 packages no Jinja engine for C++, so the part
// of the language that chat templates of the Llama family use is interpreted here, with Hugging Face's
// settings (trim_blocks and lstrip_blocks on, undefined names print as nothing): text, {{ }}, if, for, set,
// namespace, break, continue, filters, tests, slices, methods of strings and dicts. What is not known is
// refused by name, line and column, never guessed; so are macros, includes and strftime_now. A hostile
// template ends by TemplateLimits.
//   template_value.hpp       values, limits      template_builtins.hpp   string methods, tests, JSON
//   template_lexer.hpp       tokens              template_filters.hpp    filters, dict methods, arithmetic
//   template_ast.hpp         the tree            template_operators.hpp  indexing, slices, binary operators
//   template_expression.hpp  expressions         template_eval.hpp       the interpreter
//   template_parser.hpp      statements
// See: tests/examples/common/chat_template_test.cpp, whose expected texts come from Jinja2.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/status.hpp>
#include <common/template_eval.hpp>
#include <common/template_parser.hpp>
#include <common/template_value.hpp>

namespace prefillshare::examples {

using codegemm::Result;

/// The names that a template sees; the order of keys is kept, because `tojson` and loops show it.
using TemplateContext = nlohmann::ordered_json;

struct ChatMessage {
  std::string role;
  std::string content;
};

/// A parsed template. render() does not change it: threads may share one.
class ChatTemplate {
 public:
  /// kInvalidArgument for a syntax error, kUnsupported for a construct not known here, kExhausted beyond the
  /// limits; each with line and column.
  [[nodiscard]] static Result<ChatTemplate> parse(std::string_view source,
                                                  const TemplateLimits& limits = {}) {
    if (source.size() > limits.max_source) {
      return error(StatusCode::kExhausted, "chat template of ", source.size(), " bytes, at most ",
                   limits.max_source, " are read");
    }
    try {
      return ChatTemplate(detail::Parser::run(source), limits);
    } catch (const detail::TemplateFailure& failure) {
      return failure.status;
    }
  }

  /// The text for `context`, an object. Names that it lacks are undefined, except `tools` and `documents`,
  /// which are none, as Hugging Face passes them.
  [[nodiscard]] Result<std::string> render(TemplateContext context) const {
    if (!context.is_object())
      return error(StatusCode::kInvalidArgument, "chat template: the context is no object");
    for (const char* name : {"tools", "documents"}) {
      if (!context.contains(name)) context[name] = nullptr;
    }
    try {
      return detail::Interpreter(limits_, context).run(block_);
    } catch (const detail::TemplateFailure& failure) {
      return failure.status;
    }
  }

  /// The usual case. `bos` and `eos` are the texts of those tokens.
  [[nodiscard]] Result<std::string> render(const std::vector<ChatMessage>& messages,
                                           bool add_generation_prompt, std::string_view bos = {},
                                           std::string_view eos = {}) const {
    TemplateContext context = {{"messages", TemplateContext::array()},
                               {"add_generation_prompt", add_generation_prompt},
                               {"bos_token", bos},
                               {"eos_token", eos}};
    for (const ChatMessage& message : messages) {
      context["messages"].push_back({{"role", message.role}, {"content", message.content}});
    }
    return render(std::move(context));
  }

 private:
  ChatTemplate(detail::Block block, const TemplateLimits& limits)
      : block_(std::move(block)), limits_(limits) {}

  detail::Block block_;
  TemplateLimits limits_;
};

}  // namespace prefillshare::examples
