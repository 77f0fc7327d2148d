// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/json_file.hpp - small JSON files (config.json, an index of shards), read with limits.
// Layer: io (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/io/mapped_file.hpp>

namespace codegemm {

inline constexpr std::size_t kMostJsonFileBytes = std::size_t{64} << 20;  ///< larger files are refused
inline constexpr int kMostJsonDepth = 100;  ///< writing JSON recurses: a hostile depth would end the stack

/// Maps a JSON file. Errors of MappedFile::open, and kCorruptData for one of more than 64 MiB.
[[nodiscard]] inline Result<MappedFile> open_json_file(std::string path) {
  Result<MappedFile> file = MappedFile::open(std::move(path));
  if (file.ok() && file->bytes().size() > kMostJsonFileBytes) {
    return error(StatusCode::kCorruptData, file->path(), ": has ", file->bytes().size(), " bytes, at most ",
                 kMostJsonFileBytes, " are allowed");
  }
  return file;
}

/// The bytes of a mapped file as text; valid as long as the file is.
[[nodiscard]] inline std::string_view text_of(const MappedFile& file) noexcept {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

namespace detail {

/// The deepest nesting of brackets outside of strings.
[[nodiscard]] inline std::int64_t json_depth(std::string_view text) noexcept {
  std::int64_t depth = 0;
  std::int64_t most = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      most = ++depth > most ? depth : most;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return most;
}

/// An integer member in [least, most]; kCorruptData where it is missing, of another type or outside.
[[nodiscard]] inline Result<std::int64_t> json_integer(const nlohmann::json& object, const char* name,
                                                       std::int64_t least, std::int64_t most) {
  const auto at = object.find(name);
  if (at == object.end()) return error(StatusCode::kCorruptData, "has no '", name, "'");
  // A number above 2^63 - 1 is unsigned in this parser, every other integer fits.
  const bool fits = at->is_number_integer() &&
                    !(at->is_number_unsigned() && at->get<std::uint64_t>() > std::uint64_t{INT64_MAX});
  const std::int64_t value = fits ? at->get<std::int64_t>() : 0;
  if (fits && value >= least && value <= most) return value;
  return error(StatusCode::kCorruptData, "'", name, "' is ", fits ? concat(value) : at->type_name(),
               ", must be an integer in ", least, "..", most);
}

}  // namespace detail

/// Parses a text that must be a JSON object; `name` is for messages. kCorruptData for anything else, and for
/// brackets nested more than 100 deep.
[[nodiscard]] inline Result<nlohmann::json> parse_json_object(std::string_view text, std::string_view name) {
  if (detail::json_depth(text) > kMostJsonDepth) {
    return error(StatusCode::kCorruptData, name, ": is nested deeper than ", kMostJsonDepth, " levels");
  }
  nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  if (json.is_discarded()) return error(StatusCode::kCorruptData, name, ": is no JSON");
  if (!json.is_object())
    return error(StatusCode::kCorruptData, name, ": is of type ", json.type_name(), ", must be an object");
  return json;
}

}  // namespace codegemm
