// SPDX-License-Identifier: Apache-2.0
//
// common/template_operators.hpp - indexing, slices, ranges and the binary operators of a chat template.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/template_filters.hpp>
#include <common/template_value.hpp>

namespace prefillshare::examples::detail {

// Python's negative index; something out of range gives something out of range.
[[nodiscard]] constexpr std::size_t from_end(std::int64_t i, std::size_t size) {
  if (i < 0) i += static_cast<std::int64_t>(size);
  return i < 0 ? size : static_cast<std::size_t>(i);
}

/// object[key] and, with the name as the key, object.name.
[[nodiscard]] inline Value item(const Value& object, const Value& key, Place at, Budget& budget) {
  if (object.is<Undefined>()) undefined(object, at);
  if (object.is<Dict>() && key.is<Text>()) {
    budget.charge(at, object.as<Dict>()->items.size());
    if (const Value* found = find(*object.as<Dict>(), key.str()); found != nullptr) return *found;
  }
  if (key.is_whole() && object.is<List>()) {
    const auto& items = object.as<List>()->items;
    const std::size_t i = from_end(key.whole(), items.size());
    if (i < items.size()) return items[i];
  }
  if (key.is_whole() && object.is<Text>()) {
    const std::vector<Value> characters = elements(object, at, budget);
    const std::size_t i = from_end(key.whole(), characters.size());
    if (i < characters.size()) return characters[i];
  }
  return Value::undefined(key.is<Text>() ? std::string_view(key.str()) : "an index out of range");
}
/// loop.NAME inside a loop.
[[nodiscard]] inline Value loop_member(const LoopBox& loop, const std::string& name, Place at) {
  const auto& items = loop.items->items;
  const auto number = [](std::size_t value) { return Value(static_cast<std::int64_t>(value)); };
  if (name == "index") return number(loop.index + 1);
  if (name == "index0") return number(loop.index);
  if (name == "revindex") return number(items.size() - loop.index);
  if (name == "revindex0") return number(items.size() - loop.index - 1);
  if (name == "first") return loop.index == 0;
  if (name == "last") return loop.index + 1 == items.size();
  if (name == "length") return number(items.size());
  if (name == "depth") return std::int64_t{1};  // deeper in recursive loops only
  if (name == "depth0") return std::int64_t{0};
  if (name == "previtem") return loop.index == 0 ? Value::undefined("loop.previtem") : items[loop.index - 1];
  if (name == "nextitem") {
    return loop.index + 1 == items.size() ? Value::undefined("loop.nextitem") : items[loop.index + 1];
  }
  unsupported(at, "loop.", name);
}

/// object[start:stop:step], with each of the three as Python takes it; null where it was left out.
[[nodiscard]] inline Value slice(const Value& object, const std::array<std::optional<Value>, 3>& parts,
                                 Place at, Budget& budget) {
  if (object.is<Undefined>()) undefined(object, at);
  if (!object.is<List>() && !object.is<Text>()) wrong(at, "cannot slice ", object.type_name());
  const std::vector<Value> items = elements(object, at, budget);
  const auto size = static_cast<std::int64_t>(items.size());
  const auto part = [&](std::size_t i) -> std::optional<std::int64_t> {
    if (!parts[i].has_value() || parts[i]->is<None>()) return std::nullopt;
    if (!parts[i]->is_whole()) wrong(at, "slice bound is ", parts[i]->type_name(), ", must be an integer");
    return parts[i]->whole();
  };
  const std::int64_t step = part(2).value_or(1);
  if (step == 0) wrong(at, "slice step is 0");
  const auto bound = [&](std::size_t i, std::int64_t otherwise) {
    const std::optional<std::int64_t> given = part(i);
    if (!given.has_value()) return otherwise;
    const std::int64_t value = *given < 0 ? *given + size : *given;
    return std::clamp(value, step > 0 ? std::int64_t{0} : std::int64_t{-1}, step > 0 ? size : size - 1);
  };
  const std::int64_t start = bound(0, step > 0 ? 0 : size - 1);
  const std::int64_t stop = bound(1, step > 0 ? size : -1);
  std::vector<Value> out;
  for (std::int64_t i = start; step > 0 ? i < stop : i > stop;) {
    out.push_back(items[static_cast<std::size_t>(i)]);
    if (step > 0 ? step >= stop - i : step <= stop - i)
      break;  // the next one is out, and i + step may overflow
    i += step;
  }
  if (object.is<List>()) return make_list(at, std::move(out));
  return join_texts(at, out, {}, budget);
}

/// range(stop), range(start, stop) and range(start, stop, step), as a list.
[[nodiscard]] inline Value range(const Arguments& args, Budget& budget) {
  args.only(3);
  std::int64_t numbers[3] = {0, 0, 1};
  for (std::size_t i = 0; i < std::max(args.values.size(), std::size_t{1}); ++i) {
    const Value& value = args.need(i);
    if (!value.is_whole()) wrong(args.at, "range: argument ", i + 1, " is ", value.type_name());
    numbers[i] = value.whole();
    // Far more than a list may have; keeps the sums below from overflowing.
    if (numbers[i] > (INT64_MAX >> 2) || numbers[i] < -(INT64_MAX >> 2))
      wrong(args.at, "range: ", numbers[i], " is too large");
  }
  if (args.values.size() == 1) std::swap(numbers[0], numbers[1]);
  const std::int64_t step = numbers[2];
  if (step == 0) wrong(args.at, "range: step is 0");
  std::vector<Value> out;
  for (std::int64_t i = numbers[0]; step > 0 ? i < numbers[1] : i > numbers[1]; i += step) {
    budget.charge(args.at, 32);
    out.emplace_back(i);
  }
  return make_list(args.at, std::move(out));
}

/// left OP right for + - * / // and %.
[[nodiscard]] inline Value binary(const std::string& op, const Value& left, const Value& right, Place at,
                                  Budget& budget) {
  if (left.is<Undefined>()) undefined(left, at);
  if (right.is<Undefined>()) undefined(right, at);
  if (left.is_number() && right.is_number()) return arithmetic(op, left, right, at);
  if (op == "+" && left.is<Text>() && right.is<Text>()) {
    budget.charge(at, left.str().size() + right.str().size());
    return Value::text(left.str() + right.str());
  }
  if (op == "+" && left.is<List>() && right.is<List>()) {
    std::vector<Value> items = elements(left, at, budget);
    const std::vector<Value> more = elements(right, at, budget);
    items.insert(items.end(), more.begin(), more.end());
    return make_list(at, std::move(items));
  }
  if (op == "*" && (left.is<Text>() || right.is<Text>()) && (left.is_whole() || right.is_whole())) {
    const std::string& text = left.is<Text>() ? left.str() : right.str();
    std::string out;
    for (std::int64_t i = left.is<Text>() ? right.whole() : left.whole(); i > 0; --i) {
      budget.charge(at, text.size() + 1);
      out += text;
    }
    return Value::text(std::move(out));
  }
  if (op == "%" && left.is<Text>()) unsupported(at, "formatting with %");
  wrong(at, "cannot apply ", op, " to ", left.type_name(), " and ", right.type_name());
}

}  // namespace prefillshare::examples::detail
