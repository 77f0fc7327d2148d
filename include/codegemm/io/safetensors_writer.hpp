// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/safetensors_writer.hpp - writes safetensors files, whole or not at all.
// Layer: io (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/status.hpp>
#include <codegemm/io/atomic_file.hpp>
#include <codegemm/io/safetensors_header.hpp>

namespace codegemm {

namespace detail {

/// A JSON string: quotation marks, backslashes and control characters escaped.
inline void append_json(std::string& out, std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20U) {
      out += "\\u00";
      out += kHex[byte >> 4U];
      out += kHex[byte & 15U];
    } else {
      out += c;
    }
  }
  out += '"';
}

}  // namespace detail

/// Writes a safetensors file through AtomicFile. Tensors of wider elements come first, else in the order
/// given (as the reference implementation does it), so every tensor is aligned to its elements. Metadata keep
/// their order. kInvalidArgument where a name is taken twice or is no UTF-8, or data and shape disagree;
/// nothing is written then.
[[nodiscard]] inline Status write_safetensors(std::string path, std::span<const SafetensorsTensor> tensors,
                                              std::span<const SafetensorsText> metadata = {}) {
  std::vector<const SafetensorsTensor*> order;
  order.reserve(tensors.size());
  for (const SafetensorsTensor& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [](const SafetensorsTensor* a, const SafetensorsTensor* b) {
    return item_size(a->dtype) > item_size(b->dtype);
  });

  std::string header(sizeof(std::uint64_t), '\0');  // its own length first
  header += '{';
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    for (const SafetensorsText& text : metadata) {
      if (&text != metadata.data()) header += ',';
      detail::append_json(header, text.name);
      header += ':';
      detail::append_json(header, text.value);
    }
    header += '}';
  }
  std::uint64_t offset = 0;
  for (const SafetensorsTensor* tensor : order) {
    if (header.back() != '{') header += ',';
    detail::append_json(header, tensor->name);
    header += concat(":{\"dtype\":\"", to_string(tensor->dtype), "\",\"shape\":[");
    for (std::size_t i = 0; i < tensor->shape.size(); ++i)
      header += concat(i == 0 ? "" : ",", tensor->shape[i]);
    const std::uint64_t end = offset + tensor->data.size();
    header += concat("],\"data_offsets\":[", offset, ",", end, "]}");
    offset = end;
  }
  header += '}';
  header.append((8 - header.size() % 8) % 8, ' ');
  const std::uint64_t length = header.size() - sizeof(length);
  if (length > kMostSafetensorsHeader) {
    return error(StatusCode::kInvalidArgument, path, ": the header would have ", length, " bytes, at most ",
                 kMostSafetensorsHeader, " are allowed");
  }
  std::memcpy(header.data(), &length, sizeof(length));

  // What is written must be readable: the reader's own checks find every wrong shape, name and size.
  const Result<detail::SafetensorsLayout> layout =
      detail::parse_safetensors_header(std::string_view(header).substr(sizeof(length)), offset, path);
  if (!layout.ok()) return Status(StatusCode::kInvalidArgument, layout.status().message());

  Result<AtomicFile> file = AtomicFile::create(std::move(path));
  if (!file.ok()) return file.status();
  if (Status status = file->write(header); !status.ok()) return status;
  for (const SafetensorsTensor* tensor : order) {
    if (Status status = file->write(tensor->data); !status.ok()) return status;
  }
  return file->commit();
}

}  // namespace codegemm
