// SPDX-License-Identifier: Apache-2.0
//
// common/gguf_value.hpp - the typed metadata values of a GGUF file and the cursor that reads them.
// Layer: examples (host only).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>

namespace prefillshare::examples {

using codegemm::error;
using codegemm::Status;
using codegemm::StatusCode;

static_assert(std::endian::native == std::endian::little,
              "GGUF numbers are read as they lie in a little-endian file");

/// The numbers that GGUF gives to the types of metadata values.
enum class GgufType : std::uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

namespace detail {

struct GgufTypeInfo {
  std::string_view name;
  std::uint64_t bytes;  // 0: varies
};
inline constexpr GgufTypeInfo kGgufTypes[] = {
    {"uint8", 1}, {"int8", 1},   {"uint16", 2}, {"int16", 2},  {"uint32", 4}, {"int32", 4},   {"float32", 4},
    {"bool", 1},  {"string", 0}, {"array", 0},  {"uint64", 8}, {"int64", 8},  {"float64", 8},
};
[[nodiscard]] constexpr const GgufTypeInfo& info(GgufType type) {
  return kGgufTypes[static_cast<std::uint32_t>(type)];
}

/// bytes must hold a T at `at`; nothing there need be aligned.
template <class T>
[[nodiscard]] T load(std::span<const std::byte> bytes, std::size_t at = 0) {
  T value{};
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

}  // namespace detail

/// One metadata value, still as bytes in the file, already checked to be well formed: a scalar's bytes, a
/// string's text, or an array's elements. The as_...() functions give nothing where the value is of another
/// kind.
class GgufValue {
 public:
  GgufValue() = default;
  /// For a scalar or a string: its bytes.
  GgufValue(GgufType type, std::span<const std::byte> payload) : type_(type), payload_(payload) {}
  /// For an array: `count` elements of `element` in payload.
  GgufValue(GgufType element, std::uint64_t count, std::span<const std::byte> payload)
      : type_(GgufType::kArray), element_(element), count_(count), payload_(payload) {}

  [[nodiscard]] GgufType type() const noexcept { return type_; }
  /// Of an array.
  [[nodiscard]] GgufType element_type() const noexcept { return element_; }
  [[nodiscard]] std::uint64_t count() const noexcept { return count_; }

  [[nodiscard]] std::optional<bool> as_bool() const {
    if (type_ != GgufType::kBool) return std::nullopt;
    return detail::load<std::uint8_t>(payload_) != 0;
  }
  /// Any integer type.
  [[nodiscard]] std::optional<std::int64_t> as_integer() const { return integer(type_, payload_); }
  /// Any integer or floating-point type.
  [[nodiscard]] std::optional<double> as_number() const { return number(type_, payload_); }
  [[nodiscard]] std::optional<std::string_view> as_string() const {
    if (type_ != GgufType::kString) return std::nullopt;
    return text(payload_);
  }

  [[nodiscard]] std::optional<std::vector<std::string_view>> as_strings() const {
    if (type_ != GgufType::kArray || element_ != GgufType::kString) return std::nullopt;
    std::vector<std::string_view> out;
    out.reserve(static_cast<std::size_t>(count_));
    std::span<const std::byte> rest = payload_;
    for (std::uint64_t i = 0; i < count_; ++i) {
      const auto length = static_cast<std::size_t>(detail::load<std::uint64_t>(rest));
      out.push_back(text(rest.subspan(sizeof(std::uint64_t), length)));
      rest = rest.subspan(sizeof(std::uint64_t) + length);
    }
    return out;
  }
  [[nodiscard]] std::optional<std::vector<std::int64_t>> as_integers() const {
    return elements<std::int64_t>(
        [](GgufType type, std::span<const std::byte> at) { return integer(type, at); });
  }
  [[nodiscard]] std::optional<std::vector<float>> as_numbers() const {
    return elements<float>([](GgufType type, std::span<const std::byte> at) -> std::optional<float> {
      const std::optional<double> value = number(type, at);
      if (!value.has_value()) return std::nullopt;
      return static_cast<float>(*value);
    });
  }
  /// The inner arrays of an array of arrays.
  [[nodiscard]] std::optional<std::vector<GgufValue>> as_arrays() const;

  /// For messages: "the string 'abc'", "the uint32 7", "an array of 3 int32".
  [[nodiscard]] std::string describe() const {
    const std::string_view name = detail::info(type_).name;
    if (type_ == GgufType::kArray) {
      return codegemm::concat("an array of ", count_, " ", detail::info(element_).name);
    }
    if (type_ == GgufType::kString) return codegemm::concat("the string ", codegemm::quoted(*as_string()));
    if (type_ == GgufType::kBool) return codegemm::concat("the bool ", *as_bool());
    if (type_ == GgufType::kUint64)
      return codegemm::concat("the uint64 ", detail::load<std::uint64_t>(payload_));
    if (const std::optional<std::int64_t> value = as_integer())
      return codegemm::concat("the ", name, " ", *value);
    return codegemm::concat("the ", name, " ", *as_number());
  }

 private:
  static std::string_view text(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  static std::optional<std::int64_t> integer(GgufType type, std::span<const std::byte> at) {
    switch (type) {
      case GgufType::kUint8: return detail::load<std::uint8_t>(at);
      case GgufType::kInt8: return detail::load<std::int8_t>(at);
      case GgufType::kUint16: return detail::load<std::uint16_t>(at);
      case GgufType::kInt16: return detail::load<std::int16_t>(at);
      case GgufType::kUint32: return detail::load<std::uint32_t>(at);
      case GgufType::kInt32: return detail::load<std::int32_t>(at);
      case GgufType::kInt64: return detail::load<std::int64_t>(at);
      case GgufType::kUint64: {
        const auto value = detail::load<std::uint64_t>(at);
        if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return std::nullopt;
        return static_cast<std::int64_t>(value);
      }
      default: return std::nullopt;
    }
  }

  static std::optional<double> number(GgufType type, std::span<const std::byte> at) {
    if (type == GgufType::kFloat32) return static_cast<double>(detail::load<float>(at));
    if (type == GgufType::kFloat64) return detail::load<double>(at);
    if (type == GgufType::kUint64) return static_cast<double>(detail::load<std::uint64_t>(at));
    const std::optional<std::int64_t> value = integer(type, at);
    if (!value.has_value()) return std::nullopt;
    return static_cast<double>(*value);
  }

  template <class T, class Convert>
  std::optional<std::vector<T>> elements(const Convert& convert) const {
    if (type_ != GgufType::kArray) return std::nullopt;
    const std::uint64_t bytes = detail::info(element_).bytes;
    if (bytes == 0) return std::nullopt;
    std::vector<T> out;
    out.reserve(static_cast<std::size_t>(count_));
    for (std::uint64_t i = 0; i < count_; ++i) {
      const std::optional<T> value = convert(
          element_, payload_.subspan(static_cast<std::size_t>(i * bytes), static_cast<std::size_t>(bytes)));
      if (!value.has_value()) return std::nullopt;
      out.push_back(*value);
    }
    return out;
  }

  GgufType type_ = GgufType::kArray;  // an empty array
  GgufType element_ = GgufType::kUint8;
  std::uint64_t count_ = 0;
  std::span<const std::byte> payload_;
};

struct GgufEntry {
  std::string_view name;
  GgufValue value;
};

/// Reads forward through the bytes of a file and never past their end. A call that returns false has set
/// status(), which names the file, what was being read, and the numbers.
class GgufCursor {
 public:
  /// `file` must outlive the cursor.
  GgufCursor(std::span<const std::byte> bytes, std::string_view file) : bytes_(bytes), file_(file) {}

  [[nodiscard]] const Status& status() const noexcept { return status_; }
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_; }
  [[nodiscard]] std::uint64_t position() const noexcept { return position_; }
  [[nodiscard]] std::uint64_t remaining() const noexcept { return bytes_.size() - position_; }

  /// What the following reads belong to: "tensor" 'blk.0.attn_q.weight', or "tensor number" 7 while it has no
  /// name.
  void set_subject(std::string_view kind, std::string_view name = {}) {
    kind_ = kind;
    subject_ = name;
    number_.reset();
  }
  void set_subject(std::string_view kind, std::uint64_t number) {
    kind_ = kind;
    number_ = number;
  }

  template <class... Parts>
  [[nodiscard]] bool fail(StatusCode code, const Parts&... parts) {
    std::string subject;
    if (!kind_.empty()) {
      subject = number_.has_value() ? codegemm::concat(kind_, " ", *number_, ": ")
                                    : codegemm::concat(kind_, " ", codegemm::quoted(subject_), ": ");
    }
    status_ = error(code, file_, ": ", subject, parts...);
    return false;
  }

  /// Whether `count` things of at least `least` bytes can still come.
  [[nodiscard]] bool fits(std::uint64_t count, std::uint64_t least, std::string_view what) {
    if (count <= remaining() / least) return true;
    return fail(StatusCode::kCorruptData, what, " is ", count, ", but the ", remaining(),
                " bytes after byte ", position_, " have room for at most ", remaining() / least);
  }

  template <class T>
  [[nodiscard]] bool read(T& out, std::string_view what) {
    std::span<const std::byte> at;
    if (!take(sizeof(T), at, what)) return false;
    out = detail::load<T>(at);
    return true;
  }

  [[nodiscard]] bool read_string(std::string_view& out, std::string_view what) {
    std::uint64_t length = 0;
    std::span<const std::byte> at;
    if (!read(length, what) || !take(length, at, what)) return false;
    out = {reinterpret_cast<const char*>(at.data()), at.size()};
    return true;
  }

  [[nodiscard]] bool read_value(std::uint32_t type_number, GgufValue& out, int depth = 0) {
    GgufType type{};
    if (!to_type(type_number, type, "the value's type")) return false;
    std::span<const std::byte> payload;
    if (type == GgufType::kArray) return read_array(out, depth);
    if (type == GgufType::kString) {
      std::uint64_t length = 0;
      if (!read(length, "the string's length") || !take(length, payload, "the string")) return false;
    } else {
      if (!take(detail::info(type).bytes, payload, "the value")) return false;
      if (type == GgufType::kBool && !check_bools(payload)) return false;
    }
    out = GgufValue(type, payload);
    return true;
  }

 private:
  static constexpr int kMostDepth = 4;  // arrays within arrays; no known model nests at all

  [[nodiscard]] bool take(std::uint64_t count, std::span<const std::byte>& out, std::string_view what) {
    if (count > remaining()) {
      return fail(StatusCode::kCorruptData, what, " needs ", count, " bytes at byte ", position_,
                  ", but the file ends at byte ", bytes_.size());
    }
    out = bytes_.subspan(static_cast<std::size_t>(position_), static_cast<std::size_t>(count));
    position_ += count;
    return true;
  }

  [[nodiscard]] bool to_type(std::uint32_t number, GgufType& out, std::string_view what) {
    if (number > static_cast<std::uint32_t>(GgufType::kFloat64)) {
      return fail(StatusCode::kCorruptData, what, " is ", number, ", must be in 0..12");
    }
    out = static_cast<GgufType>(number);
    return true;
  }

  [[nodiscard]] bool check_bools(std::span<const std::byte> bytes) {
    for (const std::byte value : bytes) {
      if (value > std::byte{1}) {
        return fail(StatusCode::kCorruptData, "a bool is ", static_cast<int>(value), ", must be 0 or 1");
      }
    }
    return true;
  }

  [[nodiscard]] bool read_array(GgufValue& out, int depth) {
    if (depth == kMostDepth) {
      return fail(StatusCode::kCorruptData, "arrays are nested more than ", kMostDepth, " deep");
    }
    std::uint32_t element_number = 0;
    std::uint64_t count = 0;
    GgufType element{};
    if (!read(element_number, "the array's element type") || !read(count, "the array's length") ||
        !to_type(element_number, element, "the array's element type")) {
      return false;
    }
    const std::uint64_t start = position_;
    if (element == GgufType::kArray) {
      if (!fits(count, sizeof(std::uint32_t) + sizeof(std::uint64_t), "the array's length")) return false;
      for (std::uint64_t i = 0; i < count; ++i) {
        GgufValue inner;
        if (!read_array(inner, depth + 1)) return false;
      }
    } else if (element == GgufType::kString) {
      if (!fits(count, sizeof(std::uint64_t), "the array's length")) return false;
      for (std::uint64_t i = 0; i < count; ++i) {
        std::string_view ignored;
        if (!read_string(ignored, "a string of the array")) return false;
      }
    } else {
      const std::uint64_t bytes = detail::info(element).bytes;
      if (!fits(count, bytes, "the array's length")) return false;
      std::span<const std::byte> payload;
      if (!take(count * bytes, payload, "the array")) return false;
      if (element == GgufType::kBool && !check_bools(payload)) return false;
    }
    out = GgufValue(
        element, count,
        bytes_.subspan(static_cast<std::size_t>(start), static_cast<std::size_t>(position_ - start)));
    return true;
  }

  std::span<const std::byte> bytes_;
  std::string_view file_;
  std::uint64_t position_ = 0;
  std::string_view kind_;
  std::string_view subject_;
  std::optional<std::uint64_t> number_;
  Status status_;
};

inline std::optional<std::vector<GgufValue>> GgufValue::as_arrays() const {
  if (type_ != GgufType::kArray || element_ != GgufType::kArray) return std::nullopt;
  std::vector<GgufValue> out;
  GgufCursor cursor(payload_, {});
  for (std::uint64_t i = 0; i < count_; ++i) {
    GgufValue value;
    if (!cursor.read_value(static_cast<std::uint32_t>(GgufType::kArray), value)) return std::nullopt;
    out.push_back(value);
  }
  return out;
}

}  // namespace prefillshare::examples
