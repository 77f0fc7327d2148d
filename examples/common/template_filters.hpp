// SPDX-License-Identifier: Apache-2.0
//
// common/template_filters.hpp - Jinja's filters, methods of dicts and arithmetic, as chat templates use them.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/template_builtins.hpp>
#include <common/template_value.hpp>

namespace prefillshare::examples::detail {

[[noreturn]] inline void undefined(const Value& value, Place at) {
  const auto& name = value.as<Undefined>().name;
  wrong(at, name == nullptr ? std::string("a value") : codegemm::quoted(*name), " is undefined");
}

/// What a loop over `value` yields: items, keys or characters. Fails for what cannot be looped over.
[[nodiscard]] inline std::vector<Value> elements(const Value& value, Place at, Budget& budget) {
  std::vector<Value> out;
  if (value.is<List>()) {
    budget.charge(at, 32 * value.as<List>()->items.size());
    return value.as<List>()->items;
  }
  if (value.is<Dict>()) {
    for (const auto& [key, item] : value.as<Dict>()->items) {
      budget.charge(at, 32 + key.size());
      out.push_back(Value::text(key));
    }
  } else if (value.is<Text>()) {
    for (std::string_view text = value.str(); !text.empty();) {
      const std::size_t step = utf8_step(text);
      budget.charge(at, 64);
      out.push_back(Value::text(std::string(text.substr(0, step))));
      text.remove_prefix(step);
    }
  } else if (!value.is<Undefined>()) {
    wrong(at, "cannot loop over ", value.type_name());
  }
  return out;
}

[[nodiscard]] inline Value dict_items(const Value& dict, Place at, Budget& budget) {
  std::vector<Value> out;
  for (const auto& [key, item] : dict.as<Dict>()->items) {
    budget.charge(at, 64 + key.size());
    out.emplace_back(make_list(at, {Value::text(key), item}));
  }
  return make_list(at, std::move(out));
}

[[nodiscard]] inline Value call_dict_method(const Value& dict, const std::string& name, const Arguments& call,
                                            Budget& budget) {
  if (name == "items" || name == "keys" || name == "values") {
    call.only(0);
    if (name == "items") return dict_items(dict, call.at, budget);
    if (name == "keys") return make_list(call.at, elements(dict, call.at, budget));
    std::vector<Value> out;
    for (const auto& [key, item] : dict.as<Dict>()->items) {
      budget.charge(call.at, 32);
      out.push_back(item);
    }
    return make_list(call.at, std::move(out));
  }
  if (name == "get") {
    call.only(2);
    budget.charge(call.at, dict.as<Dict>()->items.size());
    const Value& key = call.need(0);
    const Value* found = key.is<Text>() ? find(*dict.as<Dict>(), key.str()) : nullptr;
    const Value* otherwise = call.get(1);
    return found != nullptr ? *found : otherwise != nullptr ? *otherwise : Value(None{});
  }
  unsupported(call.at, call.callee);
}

/// Python's numbers, except that an integer beyond 64 bits is an error.
[[nodiscard]] inline Value arithmetic(std::string_view op, const Value& left, const Value& right, Place at) {
  if (left.is_whole() && right.is_whole() && op != "/") {
    const std::int64_t a = left.whole(), b = right.whole();
    std::int64_t out = 0;
    bool overflow = false;
    if (op == "+") {
      overflow = __builtin_add_overflow(a, b, &out);
    } else if (op == "-") {
      overflow = __builtin_sub_overflow(a, b, &out);
    } else if (op == "*") {
      overflow = __builtin_mul_overflow(a, b, &out);
    } else {
      if (b == 0) wrong(at, "division by zero");
      if (b == -1) {
        overflow = op == "//" && a == INT64_MIN;
        out = op == "//" && !overflow ? -a : 0;
      } else {  // Python rounds down, C++ towards zero
        const std::int64_t rest = a % b;
        const bool adjust = rest != 0 && (rest < 0) != (b < 0);
        out = op == "//" ? a / b - (adjust ? 1 : 0) : rest + (adjust ? b : 0);
      }
    }
    if (overflow) wrong(at, "integer overflow");
    return out;
  }
  const double a = left.real(), b = right.real();
  if (op == "+") return a + b;
  if (op == "-") return a - b;
  if (op == "*") return a * b;
  if (!(b < 0.0) && !(b > 0.0)) wrong(at, "division by zero");
  if (op == "/") return a / b;
  double rest = std::fmod(a, b);
  if (rest != 0.0 && (rest < 0.0) != (b < 0.0)) rest += b;
  return op == "%" ? rest : std::floor((a - rest) / b + 0.5);
}

/// A member by "name" or "name.inner", as `attribute=` of map and selectattr names it.
[[nodiscard]] inline Value member_by_path(Value object, std::string_view path, Place at, Budget& budget) {
  while (true) {
    const std::size_t dot = path.find('.');
    const std::string_view name = path.substr(0, dot);
    if (object.is<Undefined>()) undefined(object, at);
    Value next = Value::undefined(name);
    if (object.is<Dict>()) {
      budget.charge(at, object.as<Dict>()->items.size() + 1);
      if (const Value* found = find(*object.as<Dict>(), name); found != nullptr) next = *found;
    }
    object = std::move(next);
    if (dot == std::string_view::npos) return object;
    path.remove_prefix(dot + 1);
  }
}

[[nodiscard]] Value run_filter(const Value& value, const std::string& name, const Arguments& call,
                               Budget& budget);

/// select, reject, selectattr and rejectattr.
[[nodiscard]] inline Value select(const Value& value, const std::string& name, const Arguments& call,
                                  Budget& budget) {
  const bool by_member = name == "selectattr" || name == "rejectattr";
  const bool wanted = name[0] == 's';
  const std::size_t skip = by_member ? 1 : 0;
  const std::string path = by_member ? call.text(0) : std::string();
  call.only(call.values.size());
  const std::string test = call.values.size() > skip ? call.text(skip) : std::string();
  const std::string callee = "test '" + test + "'";
  Arguments rest{call.at, callee, {}, {}};
  for (std::size_t i = skip + 1; i < call.values.size(); ++i) rest.values.push_back(call.values[i]);
  std::vector<Value> out;
  for (Value& item : elements(value, call.at, budget)) {
    const Value subject = by_member ? member_by_path(item, path, call.at, budget) : item;
    const bool holds = test.empty() ? truthy(subject) : run_test(subject, test, rest, budget);
    if (holds == wanted) out.push_back(std::move(item));
  }
  return make_list(call.at, std::move(out));
}

[[nodiscard]] inline Value map_items(const Value& value, const Arguments& call, Budget& budget) {
  std::vector<Value> out;
  if (const Value* path = call.get(call.values.size(), "attribute"); path != nullptr) {
    call.only(0, {"attribute", "default"});
    if (!path->is<Text>()) unsupported(call.at, "map with an attribute that is ", path->type_name());
    const Value* otherwise = call.get(0, "default");
    for (const Value& item : elements(value, call.at, budget)) {
      Value member = member_by_path(item, path->str(), call.at, budget);
      if (member.is<Undefined>() && otherwise != nullptr) member = *otherwise;
      out.push_back(std::move(member));
    }
    return make_list(call.at, std::move(out));
  }
  const std::string filter = call.text(0);
  if (filter == "map") unsupported(call.at, "map of map");  // would nest without an end
  const std::string callee = "filter " + filter;
  Arguments rest{call.at, callee, std::vector<Value>(call.values.begin() + 1, call.values.end()),
                 call.keyword};
  for (const Value& item : elements(value, call.at, budget))
    out.push_back(run_filter(item, filter, rest, budget));
  return make_list(call.at, std::move(out));
}

[[nodiscard]] inline Value to_json(const Value& value, const Arguments& call, Budget& budget) {
  call.only(0, {"indent", "ensure_ascii", "separators", "sort_keys"});
  JsonWriter writer(call.at, budget);
  if (const Value* indent = call.get(0, "indent"); indent != nullptr && !indent->is<None>()) {
    if (!indent->is_whole() || indent->whole() < 0 || indent->whole() > 16)
      wrong(call.at, "tojson: indent must be 0..16");
    writer.indent = static_cast<std::size_t>(indent->whole());
    writer.comma = ",";
  }
  if (const Value* ascii = call.get(0, "ensure_ascii"); ascii != nullptr && truthy(*ascii)) {
    unsupported(call.at, "tojson with ensure_ascii");
  }
  if (const Value* marks = call.get(0, "separators"); marks != nullptr && !marks->is<None>()) {
    const bool pair = marks->is<List>() && marks->as<List>()->items.size() == 2 &&
                      marks->as<List>()->items[0].is<Text>() && marks->as<List>()->items[1].is<Text>();
    if (!pair) wrong(call.at, "tojson: separators must be two strings");
    writer.comma = marks->as<List>()->items[0].str();
    writer.colon = marks->as<List>()->items[1].str();
  }
  if (const Value* sort = call.get(0, "sort_keys"); sort != nullptr) writer.sort_keys = truthy(*sort);
  std::string out;
  writer.write(out, value);
  return Value::text(std::move(out));
}

[[nodiscard]] inline Value join_filter(const Value& value, const Arguments& call, Budget& budget) {
  call.only(2, {"d", "attribute"});
  const Value* mark = call.get(0, "d");
  std::vector<Value> items = elements(value, call.at, budget);
  if (const Value* path = call.get(1, "attribute"); path != nullptr && !path->is<None>()) {
    if (!path->is<Text>()) unsupported(call.at, "join with an attribute that is ", path->type_name());
    for (Value& item : items) item = member_by_path(item, path->str(), call.at, budget);
  }
  return join_texts(call.at, items, mark == nullptr ? std::string() : to_str(*mark, call.at, budget), budget);
}

[[nodiscard]] inline Value length(const Value& value, const Arguments& call, Budget& budget) {
  call.only(0);
  std::size_t count = 0;
  if (value.is<Text>()) {
    budget.charge(call.at, value.str().size());
    count = count_characters(value.str());
  } else if (value.is<List>()) {
    count = value.as<List>()->items.size();
  } else if (value.is<Dict>()) {
    count = value.as<Dict>()->items.size();
  } else if (!value.is<Undefined>()) {
    wrong(call.at, call.callee, " of ", value.type_name());
  }
  return static_cast<std::int64_t>(count);
}

[[nodiscard]] inline Value to_integer(const Value& value, const Arguments& call) {
  call.only(1, {"default"});
  const Value* otherwise = call.get(0, "default");
  if (value.is_whole()) return value.whole();
  if (value.is<double>() && std::fabs(value.as<double>()) < 0x1p62)
    return static_cast<std::int64_t>(value.as<double>());
  if (value.is<Text>()) {
    const std::string text = strip(value.str(), nullptr, true, true);
    const bool plus = !text.empty() && text[0] == '+';
    std::int64_t number = 0;
    const char* end = text.data() + text.size();
    const auto read = std::from_chars(text.data() + (plus ? 1 : 0), end, number);
    if (read.ec == std::errc() && read.ptr == end) return number;
    if (text.find_first_of("0123456789") != std::string::npos) {
      unsupported(call.at, call.callee, " of ",
                  codegemm::quoted(text));  // "1.5", "1_000": Python has more forms
    }
  }
  return otherwise != nullptr ? *otherwise : Value(std::int64_t{0});
}

/// A filter; unsupported where there is none of that name here.
[[nodiscard]] inline Value run_filter(const Value& value, const std::string& name, const Arguments& call,
                                      Budget& budget) {
  if (name == "default" || name == "d") {
    call.only(2, {"default_value", "boolean"});
    const Value* falsy = call.get(1, "boolean");
    const bool missing = value.is<Undefined>() || (falsy != nullptr && truthy(*falsy) && !truthy(value));
    const Value* otherwise = call.get(0, "default_value");
    return !missing ? value : otherwise != nullptr ? *otherwise : Value::text({});
  }
  if (name == "trim" || name == "upper" || name == "lower" || name == "capitalize" || name == "replace") {
    const std::string text = to_str(value, call.at, budget);
    if (name != "trim") return call_text_method(text, name, call, budget);
    call.only(1, {"chars"});
    const Value* set = call.get(0, "chars");
    const bool given = set != nullptr && !set->is<None>();
    return Value::text(strip(text, given ? &call.text(0, "chars") : nullptr, true, true));
  }
  if (name == "length" || name == "count") return length(value, call, budget);
  if (name == "tojson") return to_json(value, call, budget);
  if (name == "join") return join_filter(value, call, budget);
  if (name == "select" || name == "reject" || name == "selectattr" || name == "rejectattr") {
    return select(value, name, call, budget);
  }
  if (name == "map") return map_items(value, call, budget);
  if (name == "int") return to_integer(value, call);
  call.only(0);
  if (name == "string") return Value::text(to_str(value, call.at, budget));
  if (name == "safe") return value.is<Text>() ? value : Value::text(to_str(value, call.at, budget));
  if (name == "list") return make_list(call.at, elements(value, call.at, budget));
  if (name == "items") {
    if (value.is<Undefined>()) return make_list(call.at, {});
    if (!value.is<Dict>()) wrong(call.at, "filter items of ", value.type_name());
    return dict_items(value, call.at, budget);
  }
  if (name == "first" || name == "last" || name == "reverse") {
    std::vector<Value> items = elements(value, call.at, budget);
    if (name == "reverse") {
      std::reverse(items.begin(), items.end());
      return value.is<Text>() ? join_texts(call.at, items, {}, budget)
                              : Value(make_list(call.at, std::move(items)));
    }
    if (items.empty()) return Value::undefined("the item of an empty list");
    return name == "first" ? items.front() : items.back();
  }
  unsupported(call.at, call.callee);
}

}  // namespace prefillshare::examples::detail
