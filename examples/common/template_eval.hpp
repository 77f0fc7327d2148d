// SPDX-License-Identifier: Apache-2.0
//
// common/template_eval.hpp - walks the tree of a chat template and writes the text.
// Layer: examples (host only).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/template_ast.hpp>
#include <common/template_builtins.hpp>
#include <common/template_filters.hpp>
#include <common/template_operators.hpp>
#include <common/template_value.hpp>

namespace prefillshare::examples::detail {

/// One rendering. Throws TemplateFailure.
class Interpreter {
 public:
  Interpreter(const TemplateLimits& limits, const nlohmann::ordered_json& context)
      : limits_(limits), budget_(limits.max_work) {
    const Place start;
    scopes_.emplace_back();
    for (const auto& [name, value] : context.items())
      scopes_[0].insert_or_assign(name, from_json(value, start, budget_));
  }

  [[nodiscard]] std::string run(const Block& block) {
    scopes_.emplace_back();
    std::string out;
    run_block(block, out);
    return out;
  }

 private:
  enum class Flow { kNext, kBreak, kContinue };
  using Scope = std::map<std::string, Value, std::less<>>;

  // A scope as long as a C++ scope.
  class ScopeGuard {
   public:
    explicit ScopeGuard(std::vector<Scope>& scopes) : scopes_(scopes) { scopes_.emplace_back(); }
    ~ScopeGuard() { scopes_.pop_back(); }
    ScopeGuard(const ScopeGuard&) = delete;
    ScopeGuard& operator=(const ScopeGuard&) = delete;

   private:
    std::vector<Scope>& scopes_;
  };

  Flow run_block(const Block& block, std::string& out) {
    for (const auto& stmt : block) {
      if (const Flow flow = run(*stmt, out); flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  Flow run(const Stmt& stmt, std::string& out) {
    budget_.charge(stmt.at, 1);
    switch (stmt.kind) {
      case StmtKind::kText:
        budget_.charge(stmt.at, stmt.text.size());
        out += stmt.text;
        break;
      case StmtKind::kOutput: append_str(out, eval(*stmt.exprs[0]), stmt.exprs[0]->at, budget_); break;
      case StmtKind::kIf: return run_if(stmt, out);
      case StmtKind::kFor: run_for(stmt, out); break;
      case StmtKind::kSet: run_set(stmt); break;
      case StmtKind::kSetBlock: {
        std::string text;
        {
          const ScopeGuard scope(scopes_);
          run_block(stmt.blocks[0], text);
        }
        assign(stmt, stmt.targets[0], Value::text(std::move(text)));
        break;
      }
      case StmtKind::kGeneration: return run_block(stmt.blocks[0], out);
      case StmtKind::kBreak: return Flow::kBreak;
      case StmtKind::kContinue: return Flow::kContinue;
    }
    if (out.size() > limits_.max_output) {
      fail(stmt.at, StatusCode::kExhausted, "more than ", limits_.max_output, " bytes of output");
    }
    return Flow::kNext;
  }

  Flow run_if(const Stmt& stmt, std::string& out) {
    for (std::size_t i = 0; i < stmt.exprs.size(); ++i) {
      if (truthy(eval(*stmt.exprs[i]))) return run_block(stmt.blocks[i], out);
    }
    return stmt.blocks.size() > stmt.exprs.size() ? run_block(stmt.blocks.back(), out) : Flow::kNext;
  }

  void run_for(const Stmt& stmt, std::string& out) {
    List items = make_list(stmt.at, elements(eval(*stmt.exprs[0]), stmt.at, budget_));
    if (stmt.exprs[1] != nullptr) {
      std::vector<Value> kept;
      for (const Value& item : items->items) {
        const ScopeGuard scope(scopes_);
        bind(stmt, item);
        if (truthy(eval(*stmt.exprs[1]))) kept.push_back(item);
      }
      items = make_list(stmt.at, std::move(kept));
    }
    for (std::size_t i = 0; i < items->items.size(); ++i) {
      const ScopeGuard scope(scopes_);
      auto loop = std::make_shared<LoopBox>();
      loop->items = items;
      loop->index = i;
      if (depth_of(Value(Loop(loop))) > kMaxNesting)
        fail(stmt.at, StatusCode::kExhausted, "values nested too deep");
      scopes_.back().insert_or_assign("loop", Value(Loop(std::move(loop))));
      bind(stmt, items->items[i]);
      if (run_block(stmt.blocks[0], out) == Flow::kBreak) break;
    }
    if (items->items.empty() && stmt.blocks.size() > 1) run_block(stmt.blocks[1], out);
  }

  void bind(const Stmt& stmt, const Value& value) {
    budget_.charge(stmt.at, 1);
    if (stmt.targets.size() == 1) {
      scopes_.back().insert_or_assign(stmt.targets[0], value);
      return;
    }
    const std::vector<Value> parts = elements(value, stmt.at, budget_);
    if (parts.size() != stmt.targets.size()) {
      wrong(stmt.at, parts.size(), " values for ", stmt.targets.size(), " names");
    }
    for (std::size_t i = 0; i < parts.size(); ++i) scopes_.back().insert_or_assign(stmt.targets[i], parts[i]);
  }

  void run_set(const Stmt& stmt) {
    Value value = eval(*stmt.exprs[0]);
    if (stmt.targets.size() > 1) return bind(stmt, value);
    assign(stmt, stmt.targets[0], std::move(value));
  }

  void assign(const Stmt& stmt, const std::string& name, Value value) {
    if (stmt.text.empty()) {
      scopes_.back().insert_or_assign(name, std::move(value));
      return;
    }
    const Value owner = lookup(stmt.text);
    if (!owner.is<Namespace*>()) {
      wrong(stmt.at, "cannot set '", stmt.text, ".", name, "': '", stmt.text, "' is ", owner.type_name(),
            ", only a namespace() can be changed");
    }
    owner.as<Namespace*>()->members.insert_or_assign(name, std::move(value));
  }

  [[nodiscard]] Value lookup(const std::string& name) {
    for (std::size_t i = scopes_.size(); i-- > 0;) {
      if (const auto found = scopes_[i].find(name); found != scopes_[i].end()) return found->second;
    }
    if (name == "range") return Function::kRange;
    if (name == "namespace") return Function::kNamespace;
    if (name == "dict") return Function::kDict;
    if (name == "raise_exception") return Function::kRaiseException;
    return Value::undefined(name);
  }

  Value eval(const Expr& expr) {
    budget_.charge(expr.at, 1);
    switch (expr.kind) {
      case ExprKind::kConstant: return expr.value;
      case ExprKind::kName: return lookup(expr.text);
      case ExprKind::kList:
      case ExprKind::kTuple: return make_list(expr.at, eval_all(expr, 0));
      case ExprKind::kDict: return dict(expr);
      case ExprKind::kAttribute: return attribute(eval(*expr.children[0]), expr);
      // Operands are evaluated in their own statements: C++ leaves the order of arguments open.
      case ExprKind::kItem: {
        const Value object = eval(*expr.children[0]);
        return item(object, eval(*expr.children[1]), expr.at, budget_);
      }
      case ExprKind::kSlice: {
        const Value object = eval(*expr.children[0]);
        std::array<std::optional<Value>, 3> parts;
        for (std::size_t i = 0; i < 3; ++i) {
          if (expr.children[i + 1] != nullptr) parts[i] = eval(*expr.children[i + 1]);
        }
        return slice(object, parts, expr.at, budget_);
      }
      case ExprKind::kCall: return call(expr);
      case ExprKind::kFilter: {
        const std::string callee = "filter " + expr.text;
        const Value subject = eval(*expr.children[0]);
        return run_filter(subject, expr.text, arguments(expr, callee), budget_);
      }
      case ExprKind::kTest: {
        const std::string callee = "test '" + expr.text + "'";
        const Value subject = eval(*expr.children[0]);
        return run_test(subject, expr.text, arguments(expr, callee), budget_);
      }
      case ExprKind::kNot: return !truthy(eval(*expr.children[0]));
      case ExprKind::kNegative:
      case ExprKind::kPositive: return sign(expr);
      case ExprKind::kBinary: {
        const Value left = eval(*expr.children[0]);
        return binary(expr.text, left, eval(*expr.children[1]), expr.at, budget_);
      }
      case ExprKind::kAnd: {
        Value left = eval(*expr.children[0]);
        return truthy(left) ? eval(*expr.children[1]) : left;
      }
      case ExprKind::kOr: {
        Value left = eval(*expr.children[0]);
        return truthy(left) ? left : eval(*expr.children[1]);
      }
      case ExprKind::kCompare: return compare(expr);
      case ExprKind::kConcat: {
        std::string out;
        for (const ExprPtr& part : expr.children) append_str(out, eval(*part), part->at, budget_);
        return Value::text(std::move(out));
      }
      case ExprKind::kCondition:
        if (truthy(eval(*expr.children[0]))) return eval(*expr.children[1]);
        return expr.children[2] != nullptr ? eval(*expr.children[2]) : Value();
    }
    unsupported(expr.at, "this expression");
  }

  std::vector<Value> eval_all(const Expr& expr, std::size_t from) {
    std::vector<Value> out;
    budget_.charge(expr.at, 32 * expr.children.size());
    for (std::size_t i = from; i < expr.children.size(); ++i) out.push_back(eval(*expr.children[i]));
    return out;
  }

  // `callee` must outlive the result.
  Arguments arguments(const Expr& expr, std::string_view callee) {
    Arguments out{expr.at, callee, eval_all(expr, 1), {}};
    for (const auto& [name, value] : expr.keyword) out.keyword.emplace_back(name, eval(*value));
    return out;
  }

  Value dict(const Expr& expr) {
    std::vector<std::pair<std::string, Value>> items;
    for (std::size_t i = 0; i + 1 < expr.children.size(); i += 2) {
      const Value key = eval(*expr.children[i]);
      if (!key.is<Text>()) unsupported(expr.children[i]->at, "a dict key that is ", key.type_name());
      put(items, key.str(), eval(*expr.children[i + 1]), expr.at);
    }
    return make_dict(expr.at, std::move(items));
  }
  void put(std::vector<std::pair<std::string, Value>>& items, std::string_view key, Value value, Place at) {
    budget_.charge(at, 32 + items.size() + key.size());
    for (auto& [name, old] : items) {
      if (name == key) {
        old = std::move(value);
        return;
      }
    }
    items.emplace_back(key, std::move(value));
  }

  Value attribute(const Value& object, const Expr& expr) {
    if (object.is<Dict>()) {
      for (const std::string_view method :
           {"items", "keys", "values", "get", "update", "pop", "copy", "clear"}) {
        if (expr.text == method) unsupported(expr.at, "the method ", method, " of a dict without a call");
      }
    }
    if (object.is<Namespace*>()) {
      const auto& members = object.as<Namespace*>()->members;
      const auto found = members.find(expr.text);
      return found == members.end() ? Value::undefined(expr.text) : found->second;
    }
    if (object.is<Loop>()) return loop_member(*object.as<Loop>(), expr.text, expr.at);
    return item(object, Value::text(expr.text), expr.at, budget_);
  }

  Value call(const Expr& expr) {
    const Expr& callee = *expr.children[0];
    if (callee.kind == ExprKind::kAttribute) {
      const Value object = eval(*callee.children[0]);
      const std::string name = "method ." + callee.text + "() of " + object.type_name();
      if (object.is<Undefined>()) undefined(object, callee.at);
      const Arguments args = arguments(expr, name);
      if (object.is<Text>()) return call_text_method(object.str(), callee.text, args, budget_);
      if (object.is<Dict>()) return call_dict_method(object, callee.text, args, budget_);
      unsupported(callee.at, name);
    }
    const Value function = eval(callee);
    if (function.is<Undefined>()) undefined(function, callee.at);
    if (!function.is<Function>()) wrong(callee.at, "cannot call ", function.type_name());
    const Arguments args = arguments(expr, callee.kind == ExprKind::kName ? callee.text : "function");
    switch (function.as<Function>()) {
      case Function::kRange: return range(args, budget_);
      case Function::kRaiseException:
        args.only(1);
        fail(args.at, StatusCode::kInvalidArgument,
             "the template says: ", to_str(args.need(0), args.at, budget_));
      default: break;
    }
    if (!args.values.empty()) unsupported(args.at, args.callee, "() with an argument that has no name");
    if (function.as<Function>() == Function::kDict) {
      std::vector<std::pair<std::string, Value>> items;
      for (const auto& [key, value] : args.keyword) put(items, key, value, args.at);
      return make_dict(args.at, std::move(items));
    }
    budget_.charge(args.at, 256);
    namespaces_.push_back(std::make_unique<Namespace>());
    for (const auto& [key, value] : args.keyword)
      namespaces_.back()->members.insert_or_assign(std::string(key), value);
    return namespaces_.back().get();
  }

  Value sign(const Expr& expr) {
    const Value value = eval(*expr.children[0]);
    const bool minus = expr.kind == ExprKind::kNegative;
    if (value.is<Undefined>()) undefined(value, expr.at);
    if (value.is<double>()) return minus ? -value.as<double>() : value.as<double>();
    if (!value.is_whole()) wrong(expr.at, "cannot apply a sign to ", value.type_name());
    if (minus && value.whole() == INT64_MIN) wrong(expr.at, "integer overflow");
    return minus ? -value.whole() : value.whole();
  }

  Value compare(const Expr& expr) {
    Value left = eval(*expr.children[0]);
    for (std::size_t i = 0; i < expr.names.size(); ++i) {
      Value right = eval(*expr.children[i + 1]);
      const std::string& op = expr.names[i];
      const Place at = expr.at;
      bool holds = false;
      if (op == "==" || op == "!=") {
        holds = equal(left, right, at, budget_) == (op == "==");
      } else if (op == "in" || op == "not in") {
        holds = run_test(left, "in", {at, op, {right}, {}}, budget_) == (op == "in");
      } else {
        if (left.is<Undefined>()) undefined(left, at);
        if (right.is<Undefined>()) undefined(right, at);
        // Not the negation of the opposite: a NaN is in no order with anything.
        const bool swap = op[0] == '>';
        holds = swap ? less(right, left, at, budget_) : less(left, right, at, budget_);
        if (!holds && op.size() == 2) holds = equal(left, right, at, budget_);
      }
      if (!holds) return false;
      left = std::move(right);
    }
    return true;
  }

  const TemplateLimits& limits_;
  Budget budget_;
  std::vector<Scope> scopes_;
  std::vector<std::unique_ptr<Namespace>> namespaces_;
};

}  // namespace prefillshare::examples::detail
