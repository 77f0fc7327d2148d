// SPDX-License-Identifier: Apache-2.0
//
// common/template_expression.hpp - from tokens to expressions; Jinja's grammar and precedence.
// Layer: examples (host only).
// Depth is counted while the tree is built, so that a template cannot exhaust the stack here or in the
// interpreter.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/template_ast.hpp>
#include <common/template_lexer.hpp>
#include <common/template_value.hpp>

namespace prefillshare::examples::detail {

class ExpressionParser {
 protected:
  explicit ExpressionParser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}
  ~ExpressionParser() = default;

  // How deep the parser itself is.
  class Nested {
   public:
    Nested(int& depth, Place at) : depth_(depth) {
      if (++depth_ > kMaxNesting) {
        --depth_;  // the destructor does not run
        fail(at, StatusCode::kExhausted, "nested more than ", kMaxNesting, " deep");
      }
    }
    ~Nested() { --depth_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    int& depth_;
  };

  [[nodiscard]] const Token& now() const { return tokens_[at_]; }
  [[nodiscard]] const Token& ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  Token take() {
    Token token = std::move(tokens_[at_]);
    if (at_ + 1 < tokens_.size()) {
      ++at_;
    } else {
      tokens_[at_] = token;
    }
    return token;
  }
  [[nodiscard]] static bool is(const Token& token, TokenKind kind, std::string_view text) {
    return token.kind == kind && token.text == text;
  }
  [[nodiscard]] bool name(std::string_view text) const { return is(now(), TokenKind::kName, text); }
  [[nodiscard]] bool op(std::string_view text) const { return is(now(), TokenKind::kOperator, text); }
  bool skip_name(std::string_view text) { return name(text) && (take(), true); }
  bool skip_op(std::string_view text) { return op(text) && (take(), true); }
  [[nodiscard]] static std::string describe(const Token& token) {
    switch (token.kind) {
      case TokenKind::kEnd: return "the end of the template";
      case TokenKind::kBlockEnd: return "'%}'";
      case TokenKind::kOutputEnd: return "'}}'";
      case TokenKind::kBlockBegin: return "'{%'";
      case TokenKind::kOutputBegin: return "'{{'";
      default: return codegemm::quoted(token.text);
    }
  }
  [[noreturn]] void unexpected(std::string_view wanted) const {
    wrong(now().at, "expected ", wanted, ", found ", describe(now()));
  }
  void need_op(std::string_view text) {
    if (!skip_op(text)) unexpected(codegemm::quoted(text));
  }
  std::string need_name() {
    if (now().kind != TokenKind::kName) unexpected("a name");
    return take().text;
  }
  void need(TokenKind kind, std::string_view shown) {
    if (now().kind != kind) unexpected(shown);
    take();
  }

  static ExprPtr make(ExprKind kind, Place at, std::string text = {}) {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->at = at;
    expr->text = std::move(text);
    return expr;
  }
  static void add(Expr& parent, ExprPtr child) {
    if (child != nullptr) deepen(parent, *child);
    parent.children.push_back(std::move(child));
  }
  static void deepen(Expr& parent, const Expr& child) {
    parent.depth = std::max(parent.depth, child.depth + 1);
    if (parent.depth > kMaxExprDepth) {
      fail(parent.at, StatusCode::kExhausted, "expression nested more than ", kMaxExprDepth, " deep");
    }
  }
  template <class... Children>
  static ExprPtr join(ExprKind kind, Place at, std::string text, Children... children) {
    ExprPtr expr = make(kind, at, std::move(text));
    (add(*expr, std::move(children)), ...);
    return expr;
  }

  // "a, b" is a tuple. Without `condition` a following "if" is not part of the expression.
  ExprPtr tuple_or_expression(bool condition) {
    const Place at = now().at;
    ExprPtr first = expression(condition);
    if (!op(",")) return first;
    ExprPtr tuple = join(ExprKind::kTuple, at, {}, std::move(first));
    while (skip_op(",")) {
      if (now().kind == TokenKind::kBlockEnd || now().kind == TokenKind::kOutputEnd || op(")")) break;
      add(*tuple, expression(condition));
    }
    return tuple;
  }

  ExprPtr expression(bool condition = true) {
    const Nested nested(nesting_, now().at);
    ExprPtr left = binary(0);
    while (condition && name("if")) {
      const Place at = take().at;
      ExprPtr test = binary(0);
      ExprPtr otherwise = skip_name("else") ? expression() : nullptr;
      left = join(ExprKind::kCondition, at, {}, std::move(test), std::move(left), std::move(otherwise));
    }
    return left;
  }

  // Levels from loose to tight: or, and, not, comparison, + -, ~, * / // %.
  ExprPtr binary(int level) {
    const Place at = now().at;
    if (level == 2) {
      if (!name("not")) return binary(3);
      const Nested nested(nesting_, at);
      take();
      return join(ExprKind::kNot, at, {}, binary(2));
    }
    if (level == 3) return comparison();
    if (level == 7) return unary(true);
    ExprPtr left = binary(level + 1);
    while (true) {
      const Place here = now().at;
      if (level == 0 && skip_name("or")) {
        left = join(ExprKind::kOr, here, {}, std::move(left), binary(1));
      } else if (level == 1 && skip_name("and")) {
        left = join(ExprKind::kAnd, here, {}, std::move(left), binary(2));
      } else if (level == 5 && op("~")) {
        left = join(ExprKind::kConcat, here, {}, std::move(left));
        while (skip_op("~")) add(*left, binary(6));
      } else if ((level == 4 && (op("+") || op("-"))) ||
                 (level == 6 && (op("*") || op("/") || op("//") || op("%")))) {
        std::string text = take().text;
        left = join(ExprKind::kBinary, here, std::move(text), std::move(left), binary(level + 1));
      } else {
        if (level == 6 && op("**")) unsupported(here, "the operator **");
        return left;
      }
    }
  }

  ExprPtr comparison() {
    const Place at = now().at;
    ExprPtr first = binary(4);
    ExprPtr chain;
    while (true) {
      std::string text;
      for (const std::string_view candidate : {"==", "!=", "<", "<=", ">", ">="}) {
        if (op(candidate)) text = candidate;
      }
      if (name("in")) text = "in";
      if (name("not") && is(ahead(), TokenKind::kName, "in")) {
        text = "not in";
        take();
      }
      if (text.empty()) return chain == nullptr ? std::move(first) : std::move(chain);
      take();
      if (chain == nullptr) chain = join(ExprKind::kCompare, at, {}, std::move(first));
      chain->names.push_back(std::move(text));
      add(*chain, binary(4));
    }
  }

  ExprPtr unary(bool filters) {
    const Nested nested(nesting_, now().at);
    const Place at = now().at;
    ExprPtr out;
    if (skip_op("-")) {
      out = join(ExprKind::kNegative, at, {}, unary(false));
    } else if (skip_op("+")) {
      out = join(ExprKind::kPositive, at, {}, unary(false));
    } else {
      out = primary();
    }
    out = postfix(std::move(out));
    while (filters) {
      const Place here = now().at;
      if (skip_op("|")) {
        out = join(ExprKind::kFilter, here, dotted_name(), std::move(out));
        if (op("(")) arguments(*out);
      } else if (skip_name("is")) {
        out = test(here, std::move(out));
      } else if (op("(")) {
        out = call(std::move(out));
      } else {
        break;
      }
    }
    return out;
  }

  std::string dotted_name() {
    std::string out = need_name();
    if (op(".")) unsupported(now().at, "a filter or test with a dot in its name");
    return out;
  }

  ExprPtr test(Place at, ExprPtr subject) {
    const bool negated = skip_name("not");
    ExprPtr out = join(ExprKind::kTest, at, dotted_name(), std::move(subject));
    if (op("(")) {
      arguments(*out);
    } else if (const TokenKind kind = now().kind;
               (kind == TokenKind::kName && !name("else") && !name("or") && !name("and")) ||
               kind == TokenKind::kString || kind == TokenKind::kInteger || kind == TokenKind::kFloat ||
               op("[") || op("{")) {
      if (name("is")) wrong(now().at, "tests cannot be chained with 'is'");
      // "x is string if c": Jinja, too, takes the word after a test for its argument, except these three; but
      // it cannot be a name here, as an expression with a condition may follow.
      if (!name("if") && !name("in") && !name("not")) add(*out, postfix(primary()));
    }
    return negated ? join(ExprKind::kNot, at, {}, std::move(out)) : std::move(out);
  }

  ExprPtr primary() {
    const Place at = now().at;
    switch (now().kind) {
      case TokenKind::kName: {
        std::string text = take().text;
        if (text == "true" || text == "True" || text == "false" || text == "False") {
          return constant(at, text == "true" || text == "True");
        }
        if (text == "none" || text == "None") return constant(at, None{});
        return make(ExprKind::kName, at, std::move(text));
      }
      case TokenKind::kString: {
        std::string text = take().text;
        while (now().kind == TokenKind::kString) text += take().text;
        return constant(at, Value::text(std::move(text)));
      }
      case TokenKind::kInteger: return constant(at, take().integer);
      case TokenKind::kFloat: return constant(at, take().real);
      default: break;
    }
    if (skip_op("(")) {
      if (skip_op(")")) return make(ExprKind::kTuple, at);
      ExprPtr inner = tuple_or_expression(true);
      need_op(")");
      return inner;
    }
    if (skip_op("[")) {
      ExprPtr list = make(ExprKind::kList, at);
      while (!skip_op("]")) {
        add(*list, expression());
        if (!op("]")) need_op(",");
      }
      return list;
    }
    if (skip_op("{")) {
      ExprPtr dict = make(ExprKind::kDict, at);
      while (!skip_op("}")) {
        add(*dict, expression());
        need_op(":");
        add(*dict, expression());
        if (!op("}")) need_op(",");
      }
      return dict;
    }
    unexpected("an expression");
  }

  static ExprPtr constant(Place at, Value value) {
    ExprPtr expr = make(ExprKind::kConstant, at);
    expr->value = std::move(value);
    return expr;
  }

  ExprPtr postfix(ExprPtr out) {
    while (true) {
      const Place at = now().at;
      if (skip_op(".")) {
        if (now().kind == TokenKind::kInteger) {
          out = join(ExprKind::kItem, at, {}, std::move(out), constant(at, take().integer));
        } else {
          out = join(ExprKind::kAttribute, at, need_name(), std::move(out));
        }
      } else if (skip_op("[")) {
        out = subscript(at, std::move(out));
      } else if (op("(")) {
        out = call(std::move(out));
      } else {
        return out;
      }
    }
  }

  ExprPtr subscript(Place at, ExprPtr object) {
    ExprPtr parts[3];
    std::size_t count = 0;
    for (; count < 3; ++count) {
      if (!op(":") && !op("]")) parts[count] = expression();
      if (!op(":") || count == 2) break;
      take();
    }
    if (op(",")) unsupported(now().at, "a subscript with a comma");
    if (count == 0 && parts[0] == nullptr) unexpected("an expression");
    need_op("]");
    if (count == 0) return join(ExprKind::kItem, at, {}, std::move(object), std::move(parts[0]));
    return join(ExprKind::kSlice, at, {}, std::move(object), std::move(parts[0]), std::move(parts[1]),
                std::move(parts[2]));
  }

  ExprPtr call(ExprPtr callee) {
    ExprPtr out = join(ExprKind::kCall, now().at, {}, std::move(callee));
    arguments(*out);
    return out;
  }

  void arguments(Expr& owner) {
    need_op("(");
    while (!skip_op(")")) {
      if (op("*") || op("**")) unsupported(now().at, "an argument list unpacked with ", now().text);
      if (now().kind == TokenKind::kName && is(ahead(), TokenKind::kOperator, "=")) {
        std::string key = take().text;
        take();
        ExprPtr value = expression();
        deepen(owner, *value);
        owner.keyword.emplace_back(std::move(key), std::move(value));
      } else {
        if (!owner.keyword.empty()) wrong(now().at, "an argument without a name after one with a name");
        add(owner, expression());
      }
      if (!op(")")) need_op(",");
    }
  }

  int nesting_ = 0;

 private:
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
};

}  // namespace prefillshare::examples::detail
