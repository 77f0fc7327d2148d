// SPDX-License-Identifier: Apache-2.0
//
// common/template_value.hpp - the values that a chat template computes with, and the limits that it has.
// Layer: examples (host only).
// See: common/chat_template.hpp, the head of this group of files.
#pragma once

#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>
#include <common/utf8.hpp>

namespace prefillshare::examples {

using codegemm::error;
using codegemm::Status;
using codegemm::StatusCode;

/// What a template may use. A template comes with a model file, so it is not trusted to end by itself.
struct TemplateLimits {
  std::size_t max_source = std::size_t{1} << 20;  ///< bytes of the template
  std::size_t max_output = std::size_t{1} << 26;  ///< bytes of the rendered text
  std::int64_t max_work = std::int64_t{1} << 28;  ///< steps, and bytes and elements copied
};

namespace detail {

/// A place in the template; both count from 1, the column in bytes.
struct Place {
  int line = 1;
  int column = 1;
};

/// How the interpreter leaves: thrown inside it only, turned into a Status at ChatTemplate's boundary.
struct TemplateFailure {
  Status status;
};

template <class... Parts>
[[noreturn]] void fail(Place at, StatusCode code, const Parts&... parts) {
  throw TemplateFailure{error(code, "chat template, line ", at.line, ", column ", at.column, ": ", parts...)};
}
/// For a construct that Jinja may well know, but this interpreter does not.
template <class... Parts>
[[noreturn]] void unsupported(Place at, const Parts&... parts) {
  fail(at, StatusCode::kUnsupported, parts..., " is not supported");
}
template <class... Parts>
[[noreturn]] void wrong(Place at, const Parts&... parts) {
  fail(at, StatusCode::kInvalidArgument, parts...);
}

inline constexpr int kMaxNesting = 64;     // of brackets, of blocks and of values within values
inline constexpr int kMaxExprDepth = 200;  // of "a + b + c + ...", which nests to the left

/// Counts down what is left of TemplateLimits::max_work.
class Budget {
 public:
  explicit Budget(std::int64_t work) : left_(work) {}
  void charge(Place at, std::size_t work) {
    if (work > static_cast<std::size_t>(left_))
      fail(at, StatusCode::kExhausted, "the template takes too much work");
    left_ -= static_cast<std::int64_t>(work);
  }

 private:
  std::int64_t left_;
};

class Value;
struct ListBox;
struct DictBox;
struct LoopBox;
/// Attributes of a namespace(). Owned by the interpreter's run, not by values: {% set ns.self = ns %} is
/// legal.
struct Namespace {
  std::map<std::string, Value, std::less<>> members;
};
struct Undefined {
  std::shared_ptr<const std::string> name;
};
struct None {};
enum class Function { kRange, kNamespace, kDict, kRaiseException };

using Text = std::shared_ptr<const std::string>;
using List = std::shared_ptr<const ListBox>;
using Dict = std::shared_ptr<const DictBox>;
using Loop = std::shared_ptr<const LoopBox>;

/// One value. Texts, lists and dicts are shared and never change once made, as in Hugging Face's sandbox.
class Value {
 public:
  using Variant =
      std::variant<Undefined, None, bool, std::int64_t, double, Text, List, Dict, Loop, Namespace*, Function>;

  Value() : data_(Undefined{}) {}
  template <class T>
  Value(T value) : data_(std::move(value)) {}  // NOLINT(google-explicit-constructor): one of the alternatives
  static Value text(std::string value) {
    return Value(Text(std::make_shared<const std::string>(std::move(value))));
  }
  static Value undefined(std::string_view name) {
    return Value(Undefined{std::make_shared<const std::string>(name)});
  }

  template <class T>
  [[nodiscard]] bool is() const noexcept {
    return std::holds_alternative<T>(data_);
  }
  /// The value as a T; only after is<T>().
  template <class T>
  [[nodiscard]] const T& as() const {
    return *std::get_if<T>(&data_);
  }
  [[nodiscard]] const std::string& str() const { return *as<Text>(); }
  [[nodiscard]] bool is_number() const noexcept { return is<bool>() || is<std::int64_t>() || is<double>(); }
  [[nodiscard]] bool is_whole() const noexcept { return is<bool>() || is<std::int64_t>(); }
  /// After is_whole(); True counts as 1, as in Python.
  [[nodiscard]] std::int64_t whole() const { return is<bool>() ? (as<bool>() ? 1 : 0) : as<std::int64_t>(); }
  [[nodiscard]] double real() const { return is<double>() ? as<double>() : static_cast<double>(whole()); }
  /// For messages.
  [[nodiscard]] const char* type_name() const noexcept {
    constexpr const char* kNames[] = {"undefined", "none",        "a boolean", "an integer",
                                      "a float",   "a string",    "a list",    "a dict",
                                      "a loop",    "a namespace", "a function"};
    return kNames[data_.index()];
  }

 private:
  Variant data_;
};

struct ListBox {
  std::vector<Value> items;
  int depth = 1;
};
struct DictBox {
  std::vector<std::pair<std::string, Value>> items;  // in the order they came, as in Python
  int depth = 1;
};
struct LoopBox {
  List items;
  std::size_t index = 0;
};

[[nodiscard]] inline int depth_of(const Value& value) {
  if (value.is<List>()) return value.as<List>()->depth;
  if (value.is<Dict>()) return value.as<Dict>()->depth;
  if (value.is<Loop>()) return value.as<Loop>()->items->depth + 1;
  return 0;
}

// Depth is bounded so that destroying, printing and comparing a value may recurse.
[[nodiscard]] inline List make_list(Place at, std::vector<Value> items) {
  auto box = std::make_shared<ListBox>();
  for (const Value& item : items) box->depth = std::max(box->depth, depth_of(item) + 1);
  if (box->depth > kMaxNesting)
    fail(at, StatusCode::kExhausted, "lists nested more than ", kMaxNesting, " deep");
  box->items = std::move(items);
  return box;
}
[[nodiscard]] inline Dict make_dict(Place at, std::vector<std::pair<std::string, Value>> items) {
  auto box = std::make_shared<DictBox>();
  for (const auto& [key, item] : items) box->depth = std::max(box->depth, depth_of(item) + 1);
  if (box->depth > kMaxNesting)
    fail(at, StatusCode::kExhausted, "dicts nested more than ", kMaxNesting, " deep");
  box->items = std::move(items);
  return box;
}

[[nodiscard]] inline const Value* find(const DictBox& dict, std::string_view key) {
  for (const auto& [name, value] : dict.items) {
    if (name == key) return &value;
  }
  return nullptr;
}

[[nodiscard]] inline bool truthy(const Value& value) {
  if (value.is<Undefined>() || value.is<None>()) return false;
  if (value.is_number()) return value.is<double>() ? value.as<double>() != 0.0 : value.whole() != 0;
  if (value.is<Text>()) return !value.str().empty();
  if (value.is<List>()) return !value.as<List>()->items.empty();
  if (value.is<Dict>()) return !value.as<Dict>()->items.empty();
  return true;
}

/// A float as Python's repr() writes it: the shortest digits that read back the same.
[[nodiscard]] inline std::string float_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[40];
  const double size = std::fabs(value);
  const bool plain = value == 0.0 || (size >= 1e-4 && size < 1e16);
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value,
                                 plain ? std::chars_format::fixed : std::chars_format::scientific)
                       .ptr;
  std::string out(buffer, end);
  if (plain && out.find('.') == std::string::npos) out += ".0";
  return out;
}

/// str(value), appended to `out`. Lists and dicts have no text here: their Python form is of no use to a
/// model.
inline void append_str(std::string& out, const Value& value, Place at, Budget& budget) {
  if (value.is<Undefined>()) return;
  if (value.is<None>()) {
    out += "None";
  } else if (value.is<bool>()) {
    out += value.as<bool>() ? "True" : "False";
  } else if (value.is<std::int64_t>()) {
    out += std::to_string(value.as<std::int64_t>());
  } else if (value.is<double>()) {
    out += float_text(value.as<double>());
  } else if (value.is<Text>()) {
    budget.charge(at, value.str().size());
    out += value.str();
  } else {
    unsupported(at, "writing ", value.type_name(), " as text without tojson");
  }
}
[[nodiscard]] inline std::string to_str(const Value& value, Place at, Budget& budget) {
  std::string out;
  append_str(out, value, at, budget);
  return out;
}

/// Python's ==.
[[nodiscard]] inline bool equal(const Value& a, const Value& b, Place at, Budget& budget) {
  budget.charge(at, 1);
  if (a.is_whole() && b.is_whole()) return a.whole() == b.whole();
  if (a.is_number() && b.is_number()) return !(a.real() < b.real()) && !(b.real() < a.real());
  if (a.is<Text>() && b.is<Text>()) {
    budget.charge(at, std::min(a.str().size(), b.str().size()));
    return a.str() == b.str();
  }
  if (a.is<List>() && b.is<List>()) {
    const auto &x = a.as<List>()->items, &y = b.as<List>()->items;
    if (x.size() != y.size()) return false;
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (!equal(x[i], y[i], at, budget)) return false;
    }
    return true;
  }
  if (a.is<Dict>() && b.is<Dict>()) {
    const auto& x = a.as<Dict>()->items;
    if (x.size() != b.as<Dict>()->items.size()) return false;
    for (const auto& [key, value] : x) {
      budget.charge(at, x.size());
      const Value* other = find(*b.as<Dict>(), key);
      if (other == nullptr || !equal(value, *other, at, budget)) return false;
    }
    return true;
  }
  if (a.is<Namespace*>() && b.is<Namespace*>()) return a.as<Namespace*>() == b.as<Namespace*>();
  return (a.is<None>() && b.is<None>()) || (a.is<Undefined>() && b.is<Undefined>());
}

/// Python's <, for numbers and for strings (whose order by code point is their order by byte).
[[nodiscard]] inline bool less(const Value& a, const Value& b, Place at, Budget& budget) {
  if (a.is_whole() && b.is_whole()) return a.whole() < b.whole();
  if (a.is_number() && b.is_number()) return a.real() < b.real();
  if (a.is<Text>() && b.is<Text>()) {
    budget.charge(at, std::min(a.str().size(), b.str().size()));
    return a.str() < b.str();
  }
  wrong(at, "cannot order ", a.type_name(), " and ", b.type_name());
}

/// A value out of JSON: messages, tools and whatever else the caller passes.
[[nodiscard]] inline Value from_json(const nlohmann::ordered_json& json, Place at, Budget& budget,
                                     int depth = 0) {
  using Kind = nlohmann::ordered_json::value_t;
  budget.charge(at, 1);
  if (depth > kMaxNesting)
    fail(at, StatusCode::kExhausted, "context nested more than ", kMaxNesting, " deep");
  switch (json.type()) {
    case Kind::null: return None{};
    case Kind::boolean: return json.get<bool>();
    case Kind::number_integer: return json.get<std::int64_t>();
    case Kind::number_unsigned: {
      const auto value = json.get<std::uint64_t>();
      if (value > static_cast<std::uint64_t>(INT64_MAX))
        wrong(at, "integer ", value, " in the context is above 2^63 - 1");
      return static_cast<std::int64_t>(value);
    }
    case Kind::number_float: return json.get<double>();
    case Kind::string: return Value::text(json.get<std::string>());
    case Kind::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const auto& item : json) items.push_back(from_json(item, at, budget, depth + 1));
      return make_list(at, std::move(items));
    }
    case Kind::object: {
      std::vector<std::pair<std::string, Value>> items;
      items.reserve(json.size());
      for (const auto& [key, item] : json.items())
        items.emplace_back(key, from_json(item, at, budget, depth + 1));
      return make_dict(at, std::move(items));
    }
    default: wrong(at, "binary data in the context");
  }
}

}  // namespace detail

}  // namespace prefillshare::examples
