// SPDX-License-Identifier: Apache-2.0
//
// common/template_ast.hpp - the tree of a chat template.
// Layer: examples (host only).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <common/template_value.hpp>

namespace prefillshare::examples::detail {

enum class ExprKind {
  kConstant,   // value
  kName,       // text
  kList,       // children
  kTuple,      // children
  kDict,       // children: key, value, key, value
  kAttribute,  // children[0].text
  kItem,       // children[0][children[1]]
  kSlice,      // children: object, start, stop, step; null where left out
  kCall,       // children: callee, arguments
  kFilter,     // children[0] | text(children[1..])
  kTest,       // children[0] is text(children[1..])
  kNot,
  kNegative,
  kPositive,
  kBinary,  // text: + - * / // %
  kAnd,
  kOr,
  kCompare,    // children[0] names[0] children[1] names[1] children[2] ...
  kConcat,     // children joined by ~
  kCondition,  // children: condition, value, otherwise (may be null)
};

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct Expr {
  ExprKind kind{};
  Place at;
  std::string text;
  Value value;
  std::vector<ExprPtr> children;
  std::vector<std::string> names;                        // operators of kCompare
  std::vector<std::pair<std::string, ExprPtr>> keyword;  // arguments by name
  int depth = 1;
};

enum class StmtKind { kText, kOutput, kIf, kFor, kSet, kSetBlock, kBreak, kContinue, kGeneration };

struct Stmt;
using Block = std::vector<std::unique_ptr<Stmt>>;

struct Stmt {
  StmtKind kind{};
  Place at;
  std::string text;                  // kText; the namespace of a kSet to "ns.name"
  std::vector<std::string> targets;  // kFor, kSet, kSetBlock
  std::vector<ExprPtr> exprs;  // kOutput, kSet: value; kIf: conditions; kFor: iterable, filter (may be null)
  std::vector<Block> blocks;   // kIf: one for each condition, then else; kFor: body, else
};

}  // namespace prefillshare::examples::detail
