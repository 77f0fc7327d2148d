// SPDX-License-Identifier: Apache-2.0
//
// common/template_builtins.hpp - the string methods and tests that chat templates use, with Python's results.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/template_lexer.hpp>
#include <common/template_value.hpp>
#include <common/utf8.hpp>

namespace prefillshare::examples::detail {

/// The arguments of a call, and what names the call in a message.
struct Arguments {
  Place at;
  std::string_view callee;  // "filter join"
  std::vector<Value> values;
  std::vector<std::pair<std::string_view, Value>> keyword;

  /// Argument number `i` or by name; null where it was not given.
  [[nodiscard]] const Value* get(std::size_t i, std::string_view name = {}) const {
    if (i < values.size()) return &values[i];
    for (const auto& [key, value] : keyword) {
      if (!name.empty() && key == name) return &value;
    }
    return nullptr;
  }
  [[nodiscard]] const Value& need(std::size_t i, std::string_view name = {}) const {
    const Value* value = get(i, name);
    if (value == nullptr) wrong(at, callee, " needs argument ", i + 1);
    return *value;
  }
  [[nodiscard]] const std::string& text(std::size_t i, std::string_view name = {}) const {
    const Value& value = need(i, name);
    if (!value.is<Text>())
      wrong(at, callee, ": argument ", i + 1, " is ", value.type_name(), ", must be a string");
    return value.str();
  }
  /// Nothing beyond `most` by place and the `names` by name.
  void only(std::size_t most, std::initializer_list<std::string_view> names = {}) const {
    if (values.size() > most) wrong(at, callee, " takes at most ", most, " arguments, got ", values.size());
    for (const auto& [key, value] : keyword) {
      if (std::find(names.begin(), names.end(), key) == names.end())
        unsupported(at, callee, " with the argument '", key, "'");
    }
  }
};

[[nodiscard]] inline std::size_t count_characters(std::string_view text) {
  std::size_t count = 0;
  for (; !text.empty(); ++count) text.remove_prefix(utf8_step(text));
  return count;
}

/// str.strip(): white space, or the characters of `set`, from the asked sides.
[[nodiscard]] inline std::string strip(std::string_view text, const std::string* set, bool left, bool right) {
  const auto cut = [set](std::string_view character) {
    if (set != nullptr) return set->find(character) != std::string::npos;
    const CodePoint point = utf8_decode(character);
    return point.length > 0 && is_space(point.value);
  };
  while (left && !text.empty() && cut(text.substr(0, utf8_step(text)))) text.remove_prefix(utf8_step(text));
  while (right && !text.empty() && cut(text.substr(last_character(text))))
    text = text.substr(0, last_character(text));
  return std::string(text);
}

// Upper and lower case need Unicode's tables beyond ASCII; rather refused than wrong.
[[nodiscard]] inline std::string change_case(const Arguments& call, std::string text, bool upper,
                                             bool first_only = false) {
  bool change_up = upper;
  for (char& c : text) {
    if ((static_cast<unsigned char>(c) & 0x80U) != 0)
      unsupported(call.at, call.callee, " of a text beyond ASCII");
    if (change_up && c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    if (!change_up && c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    if (first_only) change_up = false;
  }
  return text;
}

[[nodiscard]] inline std::string replace(const Arguments& call, std::string_view text, std::string_view from,
                                         std::string_view to, std::int64_t most, Budget& budget) {
  std::string out;
  std::size_t at = 0;
  while (most != 0) {
    std::size_t next = text.find(from, at);
    if (from.empty()) {  // Python puts `to` before every character and at the end
      next = at;
      if (at > text.size()) break;
    }
    if (next == std::string_view::npos) break;
    budget.charge(call.at, to.size() + 1);
    out.append(text, at, next - at).append(to);
    at = next + from.size();
    if (from.empty()) {
      if (at == text.size()) return out;
      const std::size_t step = utf8_step(text.substr(at));
      out.append(text, at, step);
      at += step;
    }
    if (most > 0) --most;
  }
  return out.append(text.substr(std::min(at, text.size())));
}

[[nodiscard]] inline Value split(const Arguments& call, std::string_view text, Budget& budget) {
  call.only(2, {"sep", "maxsplit"});
  std::int64_t most = -1;
  if (const Value* limit = call.get(1, "maxsplit"); limit != nullptr) {
    if (!limit->is_whole()) wrong(call.at, call.callee, ": maxsplit is ", limit->type_name());
    most = limit->whole();
  }
  const Value* separator = call.get(0, "sep");
  std::vector<Value> parts;
  const auto put = [&](std::string_view part) {
    budget.charge(call.at, part.size() + 32);
    parts.push_back(Value::text(std::string(part)));
  };
  if (separator == nullptr || separator->is<None>()) {
    text.remove_prefix(leading_space(text));
    while (!text.empty()) {
      if (most-- == 0) {
        put(text);
        break;
      }
      std::size_t end = 0;
      while (end < text.size() && leading_space(text.substr(end, 4)) == 0) end += utf8_step(text.substr(end));
      put(text.substr(0, end));
      text.remove_prefix(end);
      text.remove_prefix(leading_space(text));
    }
    return make_list(call.at, std::move(parts));
  }
  const std::string& mark = call.text(0, "sep");
  if (mark.empty()) wrong(call.at, call.callee, ": empty separator");
  for (std::size_t found = text.find(mark); found != std::string_view::npos && most-- != 0;
       found = text.find(mark)) {
    put(text.substr(0, found));
    text.remove_prefix(found + mark.size());
  }
  put(text);
  return make_list(call.at, std::move(parts));
}

[[nodiscard]] inline Value ends_match(const Arguments& call, std::string_view text, bool start) {
  call.only(1);
  const auto matches = [&](const std::string& part) {
    if (part.size() > text.size()) return false;
    return (start ? text.substr(0, part.size()) : text.substr(text.size() - part.size())) == part;
  };
  const Value& wanted = call.need(0);
  if (!wanted.is<List>()) return matches(call.text(0));
  for (const Value& one : wanted.as<List>()->items) {
    if (!one.is<Text>()) wrong(call.at, call.callee, ": ", one.type_name(), " among the texts");
    if (matches(one.str())) return true;
  }
  return false;
}

[[nodiscard]] inline Value join_texts(Place at, const std::vector<Value>& items, std::string_view mark,
                                      Budget& budget) {
  std::string out;
  for (std::size_t i = 0; i < items.size(); ++i) {
    budget.charge(at, mark.size() + 1);
    if (i > 0) out += mark;
    append_str(out, items[i], at, budget);
  }
  return Value::text(std::move(out));
}

/// A method of a string; unsupported where there is none of that name here.
[[nodiscard]] inline Value call_text_method(const std::string& text, const std::string& name,
                                            const Arguments& call, Budget& budget) {
  budget.charge(call.at, text.size() + 1);
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    call.only(1);
    const Value* set = call.get(0);
    const bool given = set != nullptr && !set->is<None>();
    return Value::text(strip(text, given ? &call.text(0) : nullptr, name != "rstrip", name != "lstrip"));
  }
  if (name == "split") return split(call, text, budget);
  if (name == "startswith" || name == "endswith") return ends_match(call, text, name == "startswith");
  if (name == "upper" || name == "lower") return Value::text(change_case(call, text, name == "upper"));
  if (name == "capitalize") return Value::text(change_case(call, text, true, true));
  if (name == "replace") {
    call.only(3);
    const Value* most = call.get(2);
    if (most != nullptr && !most->is_whole()) wrong(call.at, call.callee, ": count is ", most->type_name());
    return Value::text(
        replace(call, text, call.text(0), call.text(1), most == nullptr ? -1 : most->whole(), budget));
  }
  if (name == "join") {
    call.only(1);
    const Value& list = call.need(0);
    if (!list.is<List>()) unsupported(call.at, call.callee, " of ", list.type_name());
    for (const Value& item : list.as<List>()->items) {
      if (!item.is<Text>()) wrong(call.at, call.callee, ": ", item.type_name(), " among the texts");
    }
    return join_texts(call.at, list.as<List>()->items, text, budget);
  }
  if (name == "find") {
    call.only(1);
    const std::size_t found = text.find(call.text(0));
    if (found == std::string::npos) return std::int64_t{-1};
    return static_cast<std::int64_t>(count_characters(std::string_view(text).substr(0, found)));
  }
  unsupported(call.at, call.callee);
}

/// A test ("x is NAME"), without its arguments checked for number. `undefined` and the like need no value.
[[nodiscard]] inline bool run_test(const Value& value, const std::string& name, const Arguments& call,
                                   Budget& budget) {
  const auto order = [&](bool swap) {
    return swap ? less(call.need(0), value, call.at, budget) : less(value, call.need(0), call.at, budget);
  };
  if (name == "defined") return !value.is<Undefined>();
  if (name == "undefined") return value.is<Undefined>();
  if (name == "none") return value.is<None>();
  if (name == "string") return value.is<Text>();
  if (name == "number") return value.is_number();
  if (name == "integer") return value.is<std::int64_t>();
  if (name == "float") return value.is<double>();
  if (name == "boolean") return value.is<bool>();
  if (name == "true") return value.is<bool>() && value.as<bool>();
  if (name == "false") return value.is<bool>() && !value.as<bool>();
  if (name == "mapping") return value.is<Dict>();
  if (name == "sequence")
    return value.is<List>() || value.is<Text>() || value.is<Dict>() || value.is<Undefined>();
  if (name == "iterable")
    return value.is<List>() || value.is<Text>() || value.is<Dict>() || value.is<Undefined>();
  if (name == "eq" || name == "equalto" || name == "==") return equal(value, call.need(0), call.at, budget);
  if (name == "ne" || name == "!=") return !equal(value, call.need(0), call.at, budget);
  if (name == "lt" || name == "lessthan" || name == "<") return order(false);
  if (name == "gt" || name == "greaterthan" || name == ">") return order(true);
  if (name == "ge" || name == ">=") return !order(false);
  if (name == "le" || name == "<=") return !order(true);
  if (name == "odd" || name == "even" || name == "divisibleby") {
    if (!value.is_whole()) wrong(call.at, call.callee, " of ", value.type_name());
    std::int64_t by = 2;
    if (name == "divisibleby") {
      if (!call.need(0).is_whole()) wrong(call.at, call.callee, " by ", call.need(0).type_name());
      by = call.need(0).whole();
      if (by == 0) wrong(call.at, call.callee, " by 0");
    }
    const bool divides = by == -1 || value.whole() % by == 0;
    return name == "odd" ? !divides : divides;
  }
  if (name == "in") {
    const Value& where = call.need(0);
    if (where.is<List>()) {
      for (const Value& item : where.as<List>()->items) {
        if (equal(value, item, call.at, budget)) return true;
      }
      return false;
    }
    if (where.is<Undefined>()) return false;
    if (where.is<Dict>()) {
      budget.charge(call.at, where.as<Dict>()->items.size() + 1);
      return value.is<Text>() && find(*where.as<Dict>(), value.str()) != nullptr;
    }
    if (!where.is<Text>() || !value.is<Text>()) {
      wrong(call.at, "cannot look for ", value.type_name(), " in ", where.type_name());
    }
    budget.charge(call.at, where.str().size());
    return where.str().find(value.str()) != std::string::npos;
  }
  if (name == "lower" || name == "upper") {
    const std::string text = to_str(value, call.at, budget);
    const bool letters = std::any_of(text.begin(), text.end(),
                                     [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); });
    return letters && change_case(call, text, name == "upper") == text;
  }
  unsupported(call.at, call.callee);
}

/// json.dumps() as Hugging Face's tojson calls it: no escapes beyond those that JSON needs.
class JsonWriter {
 public:
  JsonWriter(Place at, Budget& budget) : at_(at), budget_(budget) {}
  std::string comma = ", ";
  std::string colon = ": ";
  std::optional<std::size_t> indent;
  bool sort_keys = false;

  void write(std::string& out, const Value& value, std::size_t level = 0) {
    budget_.charge(at_, 1 + level * indent.value_or(0));
    if (value.is<None>()) {
      out += "null";
    } else if (value.is<bool>()) {
      out += value.as<bool>() ? "true" : "false";
    } else if (value.is<std::int64_t>()) {
      out += std::to_string(value.as<std::int64_t>());
    } else if (value.is<double>()) {
      const std::string text = float_text(value.as<double>());
      out += text == "nan" ? "NaN" : text == "inf" ? "Infinity" : text == "-inf" ? "-Infinity" : text;
    } else if (value.is<Text>()) {
      write_text(out, value.str());
    } else if (value.is<List>()) {
      const auto& items = value.as<List>()->items;
      out += '[';
      for (std::size_t i = 0; i < items.size(); ++i) {
        if (i > 0) out += comma;
        new_line(out, level + 1);
        write(out, items[i], level + 1);
      }
      if (!items.empty()) new_line(out, level);
      out += ']';
    } else if (value.is<Dict>()) {
      write_dict(out, *value.as<Dict>(), level);
    } else {
      wrong(at_, "tojson of ", value.type_name());
    }
  }

 private:
  void write_dict(std::string& out, const DictBox& dict, std::size_t level) {
    std::vector<const std::pair<std::string, Value>*> items;
    for (const auto& item : dict.items) items.push_back(&item);
    if (sort_keys)
      std::sort(items.begin(), items.end(), [](const auto* a, const auto* b) { return a->first < b->first; });
    out += '{';
    for (std::size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out += comma;
      new_line(out, level + 1);
      write_text(out, items[i]->first);
      out += colon;
      write(out, items[i]->second, level + 1);
    }
    if (!items.empty()) new_line(out, level);
    out += '}';
  }
  void new_line(std::string& out, std::size_t level) const {
    if (indent.has_value()) out.append(1, '\n').append(level * *indent, ' ');
  }
  void write_text(std::string& out, std::string_view text) {
    static constexpr std::string_view kFrom = "\"\\\b\f\n\r\t", kTo = "\"\\bfnrt";
    budget_.charge(at_, text.size());
    out += '"';
    for (const char c : text) {
      if (const std::size_t known = kFrom.find(c); known != std::string_view::npos) {
        out.append(1, '\\').append(1, kTo[known]);
      } else if (static_cast<unsigned char>(c) < 0x20) {
        constexpr std::string_view kHex = "0123456789abcdef";
        out.append("\\u00")
            .append(1, kHex[static_cast<std::size_t>(c) >> 4])
            .append(1, kHex[static_cast<std::size_t>(c) & 15U]);
      } else {
        out += c;
      }
    }
    out += '"';
  }

  Place at_;
  Budget& budget_;
};

}  // namespace prefillshare::examples::detail
