// SPDX-License-Identifier: Apache-2.0
//
// common/template_parser.hpp - from tokens to the statements that the interpreter walks.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/template_ast.hpp>
#include <common/template_expression.hpp>
#include <common/template_lexer.hpp>
#include <common/template_value.hpp>

namespace prefillshare::examples::detail {

class Parser : private ExpressionParser {
 public:
  /// Throws TemplateFailure.
  [[nodiscard]] static Block run(std::string_view source) {
    Parser parser(Lexer::run(source));
    return parser.block({});
  }

 private:
  using ExpressionParser::ExpressionParser;

  // Statements, until a block tag whose name is in `ends`; that name is left to be taken.
  Block block(std::initializer_list<std::string_view> ends) {
    const Nested nested(nesting_, now().at);
    Block out;
    while (true) {
      const Place at = now().at;
      switch (now().kind) {
        case TokenKind::kText: {
          auto stmt = statement_of(StmtKind::kText, at);
          stmt->text = take().text;
          out.push_back(std::move(stmt));
          break;
        }
        case TokenKind::kOutputBegin: {
          take();
          auto stmt = statement_of(StmtKind::kOutput, at);
          stmt->exprs.push_back(tuple_or_expression(true));
          need(TokenKind::kOutputEnd, "'}}'");
          out.push_back(std::move(stmt));
          break;
        }
        case TokenKind::kBlockBegin:
          take();
          if (now().kind == TokenKind::kName && std::find(ends.begin(), ends.end(), now().text) != ends.end())
            return out;
          out.push_back(statement());
          need(TokenKind::kBlockEnd, "'%}'");
          break;
        default:
          if (now().kind != TokenKind::kEnd || ends.size() > 0) {
            unexpected(ends.size() > 0 ? codegemm::concat("{% ", *ends.begin(), " %}") : std::string("text"));
          }
          return out;
      }
    }
  }

  static std::unique_ptr<Stmt> statement_of(StmtKind kind, Place at) {
    auto stmt = std::make_unique<Stmt>();
    stmt->kind = kind;
    stmt->at = at;
    return stmt;
  }

  std::unique_ptr<Stmt> statement() {
    const Place at = now().at;
    const std::string tag = need_name();
    if (tag == "if") return if_statement(at);
    if (tag == "for") return for_statement(at);
    if (tag == "set") return set_statement(at);
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) wrong(at, tag, " outside of a loop");
      return statement_of(tag == "break" ? StmtKind::kBreak : StmtKind::kContinue, at);
    }
    if (tag == "generation") {  // Hugging Face's mark for what the model writes; the text is the same
      auto stmt = statement_of(StmtKind::kGeneration, at);
      need(TokenKind::kBlockEnd, "'%}'");
      stmt->blocks.push_back(block({"endgeneration"}));
      take();
      return stmt;
    }
    if (tag.substr(0, 3) == "end" || tag == "else" || tag == "elif")
      wrong(at, "{% ", tag, " %}, but nothing is open");
    unsupported(at, "the statement {% ", tag.substr(0, 40), " %}");
  }

  std::unique_ptr<Stmt> if_statement(Place at) {
    auto stmt = statement_of(StmtKind::kIf, at);
    while (true) {
      stmt->exprs.push_back(tuple_or_expression(false));
      need(TokenKind::kBlockEnd, "'%}'");
      stmt->blocks.push_back(block({"endif", "elif", "else"}));
      const std::string end = take().text;
      if (end == "elif") continue;
      if (end == "else") {
        need(TokenKind::kBlockEnd, "'%}'");
        stmt->blocks.push_back(block({"endif"}));
        take();
      }
      return stmt;
    }
  }

  std::unique_ptr<Stmt> for_statement(Place at) {
    auto stmt = statement_of(StmtKind::kFor, at);
    const bool brackets = skip_op("(");
    do {
      stmt->targets.push_back(target());
    } while (skip_op(","));
    if (brackets) need_op(")");
    if (!skip_name("in")) unexpected("'in'");
    stmt->exprs.push_back(tuple_or_expression(false));
    stmt->exprs.push_back(skip_name("if") ? expression() : nullptr);
    if (name("recursive")) unsupported(now().at, "a recursive loop");
    need(TokenKind::kBlockEnd, "'%}'");
    ++loops_;
    stmt->blocks.push_back(block({"endfor", "else"}));
    --loops_;
    if (take().text == "else") {
      need(TokenKind::kBlockEnd, "'%}'");
      stmt->blocks.push_back(block({"endfor"}));
      take();
    }
    return stmt;
  }

  std::unique_ptr<Stmt> set_statement(Place at) {
    auto stmt = statement_of(StmtKind::kSet, at);
    stmt->targets.push_back(target());
    if (skip_op(".")) {
      stmt->text = std::exchange(stmt->targets[0], need_name());
    } else {
      while (skip_op(",")) stmt->targets.push_back(target());
    }
    if (skip_op("=")) {
      stmt->exprs.push_back(tuple_or_expression(true));
      return stmt;
    }
    if (op("|")) unsupported(now().at, "{% set %} with a filter");
    if (stmt->targets.size() > 1) unexpected("'='");
    stmt->kind = StmtKind::kSetBlock;
    need(TokenKind::kBlockEnd, "'%}'");
    const int loops = std::exchange(loops_, 0);
    stmt->blocks.push_back(block({"endset"}));
    loops_ = loops;
    take();
    return stmt;
  }

  std::string target() {
    const Place at = now().at;
    std::string out = need_name();
    for (const std::string_view word : {"true", "false", "none", "True", "False", "None", "loop"}) {
      if (out == word) wrong(at, "cannot assign to '", out, "'");
    }
    return out;
  }
  int loops_ = 0;
};

}  // namespace prefillshare::examples::detail
