// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/safetensors_header.hpp - the types of a safetensors file, and its JSON header taken apart.
// Layer: io (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>

namespace codegemm {

/// Element types of the safetensors format. BOOL is one byte.
enum class Dtype {
  kF64,
  kF32,
  kF16,
  kBF16,
  kF8E4M3,
  kF8E5M2,
  kI64,
  kI32,
  kI16,
  kI8,
  kU64,
  kU32,
  kU16,
  kU8,
  kBool,
};

namespace detail {

struct DtypeInfo {
  Dtype dtype;
  std::string_view name;
  std::uint64_t bytes;
};
inline constexpr DtypeInfo kDtypes[] = {
    {Dtype::kF64, "F64", 8},   {Dtype::kF32, "F32", 4},        {Dtype::kF16, "F16", 2},
    {Dtype::kBF16, "BF16", 2}, {Dtype::kF8E4M3, "F8_E4M3", 1}, {Dtype::kF8E5M2, "F8_E5M2", 1},
    {Dtype::kI64, "I64", 8},   {Dtype::kI32, "I32", 4},        {Dtype::kI16, "I16", 2},
    {Dtype::kI8, "I8", 1},     {Dtype::kU64, "U64", 8},        {Dtype::kU32, "U32", 4},
    {Dtype::kU16, "U16", 2},   {Dtype::kU8, "U8", 1},          {Dtype::kBool, "BOOL", 1},
};

[[nodiscard]] constexpr const DtypeInfo& info(Dtype dtype) noexcept {
  return kDtypes[static_cast<int>(dtype)];
}

}  // namespace detail

/// The dtype as the file spells it: "F16".
[[nodiscard]] constexpr std::string_view to_string(Dtype dtype) noexcept { return detail::info(dtype).name; }
/// Bytes of one element.
[[nodiscard]] constexpr std::uint64_t item_size(Dtype dtype) noexcept { return detail::info(dtype).bytes; }

/// Bytes of JSON; the reference implementation's limit.
inline constexpr std::uint64_t kMostSafetensorsHeader = 100'000'000;
inline constexpr std::size_t kMostSafetensorsRank = 32;  ///< a limit of this reader

/// A tensor in a file. data is not necessarily aligned to its elements: copy it out with memcpy.
struct SafetensorsTensor {
  std::string name;                 ///< as in the file
  Dtype dtype = Dtype::kF32;        ///< type of an element
  std::vector<std::int64_t> shape;  ///< row-major; empty for a scalar; a dimension may be 0
  std::span<const std::byte> data;  ///< product of shape times item_size bytes, in the file

  /// The product of the shape.
  [[nodiscard]] std::int64_t elements() const noexcept {
    return static_cast<std::int64_t>(data.size() / item_size(dtype));
  }
};

/// One entry of "__metadata__".
struct SafetensorsText {
  std::string name;   ///< the key
  std::string value;  ///< the value
};

/// "[4096, 11008]"
[[nodiscard]] inline std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += concat(i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

/// Bytes of a tensor of this shape, into `bytes`; false where that is more than 2^63 - 1 or a dimension is
/// negative. A dimension of 0 does not excuse an absurd one beside it.
[[nodiscard]] inline bool shape_bytes(std::span<const std::int64_t> shape, Dtype dtype,
                                      std::uint64_t& bytes) {
  std::uint64_t product = item_size(dtype);
  bool empty = false;
  for (const std::int64_t dim : shape) {
    if (dim < 0) return false;
    const auto size = static_cast<std::uint64_t>(dim);
    if (size == 0) {
      empty = true;
      continue;
    }
    if (size > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) / product) return false;
    product *= size;
  }
  bytes = empty ? 0 : product;
  return true;
}

namespace detail {

/// Events of the JSON parser, taken straight into tensors: the header is a fixed, flat form, so no JSON tree
/// is built, nothing recurses, and whatever does not belong to the form is refused where it appears.
class SafetensorsHeader {
 public:
  using Json = nlohmann::json;

  struct Entry {
    SafetensorsTensor tensor;
    std::uint64_t offsets[2] = {0, 0};
    int offset_count = 0;
    bool has_dtype = false;
    bool has_shape = false;
    bool has_offsets = false;
  };

  /// `file` must outlive this.
  explicit SafetensorsHeader(std::string_view file) : file_(file) {}

  [[nodiscard]] const Status& status() const noexcept { return status_; }
  [[nodiscard]] std::vector<Entry>& entries() noexcept { return entries_; }
  [[nodiscard]] std::vector<SafetensorsText>& metadata() noexcept { return metadata_; }

  template <class... Parts>
  [[nodiscard]] bool fail(StatusCode code, const Parts&... parts) {
    std::string subject;
    if (level_ != Level::kOutside && level_ != Level::kRoot) {
      subject = level_ == Level::kMetadata ? "__metadata__"
                                           : concat("tensor ", codegemm::quoted(entries_.back().tensor.name));
      if (!field_.empty()) subject += concat(": ", codegemm::quoted(field_));
      subject += ": ";
    }
    status_ = error(code, file_, ": ", subject, parts...);
    return false;
  }

  // The parser's events; false ends it.
  bool null() { return fail_value("null"); }
  bool boolean(bool) { return fail_value("a boolean"); }
  bool number_integer(Json::number_integer_t value) {
    return level_ == Level::kArray ? fail(StatusCode::kCorruptData, "is ", value, ", must not be negative")
                                   : fail_value("a number");
  }
  bool number_float(Json::number_float_t, const std::string& text) {
    return level_ == Level::kArray ? fail(StatusCode::kCorruptData, "is ", codegemm::quoted(text),
                                          ", not an integer of at most 64 bits")
                                   : fail_value("a number");
  }
  bool binary(Json::binary_t&) { return fail_value("binary data"); }  // JSON text has none

  bool number_unsigned(Json::number_unsigned_t value) {
    if (level_ != Level::kArray) return fail_value("a number");
    Entry& entry = entries_.back();
    if (field_ == "shape") {
      if (entry.tensor.shape.size() == kMostSafetensorsRank) {
        return fail(StatusCode::kUnsupported, "has more than ", kMostSafetensorsRank, " dimensions");
      }
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        return fail(StatusCode::kCorruptData, "dimension ", value, " is above 2^63 - 1");
      }
      entry.tensor.shape.push_back(static_cast<std::int64_t>(value));
      return true;
    }
    if (entry.offset_count == 2) return fail(StatusCode::kCorruptData, "has more than two numbers");
    entry.offsets[entry.offset_count++] = value;
    return true;
  }

  bool string(std::string& value) {
    if (level_ == Level::kMetadata) {
      metadata_.push_back({std::move(field_), std::move(value)});
      field_.clear();
      return true;
    }
    if (level_ != Level::kTensor || field_ != "dtype") return fail_value("a string");
    const auto* known = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                     [&](const DtypeInfo& dtype) { return dtype.name == value; });
    if (known == std::end(kDtypes)) {
      std::string names;
      for (const DtypeInfo& dtype : kDtypes) names += concat(names.empty() ? "" : ", ", dtype.name);
      return fail(StatusCode::kUnsupported, "is ", codegemm::quoted(value), ", known are ", names);
    }
    entries_.back().tensor.dtype = known->dtype;
    return true;
  }

  bool start_object(std::size_t) {
    if (level_ == Level::kOutside) {
      level_ = Level::kRoot;
      return true;
    }
    if (level_ != Level::kRoot) return fail_value("an object");
    if (field_ == "__metadata__") {
      if (std::exchange(has_metadata_, true))
        return fail(StatusCode::kCorruptData, "'__metadata__' is there twice");
      level_ = Level::kMetadata;
    } else {
      entries_.emplace_back();
      entries_.back().tensor.name = std::move(field_);
      level_ = Level::kTensor;
    }
    field_.clear();
    return true;
  }

  bool key(std::string& value) {
    field_ = std::move(value);
    if (level_ != Level::kTensor) return true;
    Entry& entry = entries_.back();
    bool* seen = field_ == "dtype"          ? &entry.has_dtype
                 : field_ == "shape"        ? &entry.has_shape
                 : field_ == "data_offsets" ? &entry.has_offsets
                                            : nullptr;
    if (seen == nullptr)
      return fail(StatusCode::kCorruptData, "unknown field, known are dtype, shape, data_offsets");
    if (std::exchange(*seen, true)) return fail(StatusCode::kCorruptData, "is there twice");
    return true;
  }

  bool end_object() {
    if (level_ == Level::kTensor) {
      field_.clear();
      const Entry& entry = entries_.back();
      const char* missing = !entry.has_dtype     ? "dtype"
                            : !entry.has_shape   ? "shape"
                            : !entry.has_offsets ? "data_offsets"
                                                 : nullptr;
      if (missing != nullptr) return fail(StatusCode::kCorruptData, "has no '", missing, "'");
    }
    level_ = level_ == Level::kRoot ? Level::kOutside : Level::kRoot;
    field_.clear();
    return true;
  }

  bool start_array(std::size_t) {
    if (level_ != Level::kTensor || field_ == "dtype") return fail_value("an array");
    level_ = Level::kArray;
    return true;
  }

  bool end_array() {
    if (field_ == "data_offsets" && entries_.back().offset_count != 2) {
      return fail(StatusCode::kCorruptData, "has ", entries_.back().offset_count, " numbers, must have two");
    }
    level_ = Level::kTensor;
    return true;
  }

  template <class Exception>
  bool parse_error(std::size_t position, const std::string&, const Exception& exception) {
    level_ = Level::kOutside;
    return fail(StatusCode::kCorruptData, "the header is no JSON at its byte ", position, ": ",
                codegemm::quoted(exception.what(), 200));
  }

 private:
  enum class Level { kOutside, kRoot, kMetadata, kTensor, kArray };

  bool fail_value(const char* what) {
    switch (level_) {
      case Level::kOutside:
        return fail(StatusCode::kCorruptData, "the header is ", what, ", must be an object");
      case Level::kRoot:
        return fail(StatusCode::kCorruptData, codegemm::quoted(field_), " is ", what, ", must be an object");
      case Level::kMetadata: return fail(StatusCode::kCorruptData, "is ", what, ", must be a string");
      case Level::kTensor:
        return fail(StatusCode::kCorruptData, "is ", what, ", must be ",
                    field_ == "dtype" ? "a string" : "an array of numbers");
      case Level::kArray: return fail(StatusCode::kCorruptData, "holds ", what, ", must hold numbers only");
    }
    return false;
  }

  std::string_view file_;
  Level level_ = Level::kOutside;
  std::string field_;  // the last key, until its value has been taken
  bool has_metadata_ = false;
  std::vector<Entry> entries_;
  std::vector<SafetensorsText> metadata_;
  Status status_;
};

/// Sorts by name and refuses a name that is there twice.
template <class T, class Name>
[[nodiscard]] Status sort_unique(std::vector<T>& items, const Name& name, std::string_view file,
                                 const char* what) {
  std::sort(items.begin(), items.end(), [&](const T& a, const T& b) { return name(a) < name(b); });
  for (std::size_t i = 1; i < items.size(); ++i) {
    if (name(items[i - 1]) == name(items[i])) {
      return error(StatusCode::kCorruptData, file, ": ", what, " ", codegemm::quoted(name(items[i])),
                   " is there twice");
    }
  }
  return {};
}

/// A header taken apart and found consistent; each tensor's data are bytes [offsets[0], offsets[1]) of the
/// data section.
struct SafetensorsLayout {
  std::vector<SafetensorsHeader::Entry> entries;  // sorted by name; tensor.data still empty
  std::vector<SafetensorsText> metadata;          // sorted by name
};

/// Takes a header apart. Its tensors must cover the `data_bytes` bytes that follow it, each byte once.
[[nodiscard]] inline Result<SafetensorsLayout> parse_safetensors_header(std::string_view json,
                                                                        std::uint64_t data_bytes,
                                                                        std::string_view file) {
  if (json.empty() || json.front() != '{') {
    return error(StatusCode::kCorruptData, file, ": the header of ", json.size(),
                 " bytes does not start with '{'");
  }
  SafetensorsHeader header(file);
  if (!nlohmann::json::sax_parse(json.data(), json.data() + json.size(), &header)) return header.status();

  using Entry = SafetensorsHeader::Entry;
  SafetensorsLayout layout{std::move(header.entries()), std::move(header.metadata())};
  const auto by_name = [](const Entry& entry) -> const std::string& { return entry.tensor.name; };
  if (Status status = sort_unique(layout.entries, by_name, file, "tensor"); !status.ok()) return status;
  const auto by_key = [](const SafetensorsText& text) -> const std::string& { return text.name; };
  if (Status status = sort_unique(layout.metadata, by_key, file, "__metadata__"); !status.ok()) return status;

  for (const Entry& entry : layout.entries) {
    const SafetensorsTensor& tensor = entry.tensor;
    const std::uint64_t begin = entry.offsets[0];
    const std::uint64_t end = entry.offsets[1];
    if (begin > end || end > data_bytes) {
      return error(StatusCode::kCorruptData, file, ": tensor ", codegemm::quoted(tensor.name),
                   ": data_offsets ", begin, "..", end, " are not within the ", data_bytes, " bytes of data");
    }
    std::uint64_t bytes = 0;
    if (!shape_bytes(tensor.shape, tensor.dtype, bytes) || bytes != end - begin) {
      return error(StatusCode::kCorruptData, file, ": tensor ", codegemm::quoted(tensor.name), ": shape ",
                   shape_text(tensor.shape), " of ", to_string(tensor.dtype), " does not make the ",
                   end - begin, " bytes of data_offsets ", begin, "..", end);
    }
  }

  std::vector<const Entry*> order;
  order.reserve(layout.entries.size());
  for (const Entry& entry : layout.entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) {
    return std::pair(a->offsets[0], a->offsets[1]) < std::pair(b->offsets[0], b->offsets[1]);
  });
  std::uint64_t covered = 0;
  for (const Entry* entry : order) {
    if (entry->offsets[0] != covered) {
      return error(StatusCode::kCorruptData, file, ": tensor ", codegemm::quoted(entry->tensor.name),
                   ": data_offsets start at ", entry->offsets[0], ", must start at ", covered,
                   " where the tensor before ends");
    }
    covered = entry->offsets[1];
  }
  if (covered != data_bytes) {
    return error(StatusCode::kCorruptData, file, ": the tensors cover ", covered, " of the ", data_bytes,
                 " bytes of data");
  }
  return layout;
}

}  // namespace detail
}  // namespace codegemm
