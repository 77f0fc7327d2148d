// SPDX-License-Identifier: Apache-2.0
//
// tests/examples/common/gguf_builder.hpp - makes small GGUF files, right ones and wrong ones, byte by byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <common/ggml_types.hpp>
#include <common/gguf.hpp>

namespace prefillshare::examples::test {

/// The bytes of numbers, as they lie in a file.
template <class T>
[[nodiscard]] std::string raw(T value) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::string out(sizeof(T), '\0');
  std::memcpy(out.data(), &value, sizeof(T));
  return out;
}
template <class T>
[[nodiscard]] std::string raw_all(std::span<const T> values) {
  std::string out(values.size_bytes(), '\0');
  if (!out.empty()) std::memcpy(out.data(), values.data(), values.size_bytes());
  return out;
}
[[nodiscard]] inline std::string raw_string(std::string_view text) {
  return raw<std::uint64_t>(text.size()).append(text);
}

class GgufBuilder {
 public:
  std::uint32_t version = 3;
  std::optional<std::uint64_t> claimed_tensors;   // instead of the true count
  std::optional<std::uint64_t> claimed_metadata;  // instead of the true count
  std::uint64_t alignment = 32;                   // that the data are laid out by

  /// A metadata entry of any type, right or wrong.
  GgufBuilder& entry(std::string_view key, std::uint32_t type, std::string_view payload) {
    metadata_ += raw_string(key) + raw(type);
    metadata_ += payload;
    ++metadata_count_;
    return *this;
  }
  GgufBuilder& entry(std::string_view key, GgufType type, std::string_view payload) {
    return entry(key, static_cast<std::uint32_t>(type), payload);
  }
  GgufBuilder& u32(std::string_view key, std::uint32_t value) {
    return entry(key, GgufType::kUint32, raw(value));
  }
  GgufBuilder& f32(std::string_view key, float value) { return entry(key, GgufType::kFloat32, raw(value)); }
  GgufBuilder& boolean(std::string_view key, bool value) {
    return entry(key, GgufType::kBool, raw<std::uint8_t>(value ? 1 : 0));
  }
  GgufBuilder& string(std::string_view key, std::string_view value) {
    return entry(key, GgufType::kString, raw_string(value));
  }
  GgufBuilder& strings(std::string_view key, const std::vector<std::string>& values) {
    std::string payload = array(GgufType::kString, values.size());
    for (const std::string& value : values) payload += raw_string(value);
    return entry(key, GgufType::kArray, payload);
  }
  /// The head of an array's payload.
  [[nodiscard]] static std::string array(GgufType element, std::uint64_t count) {
    return raw(static_cast<std::uint32_t>(element)) + raw(count);
  }

  /// A tensor whose data follow those before it. dims[0] is the row length.
  GgufBuilder& tensor(std::string_view name, const std::vector<std::uint64_t>& dims, std::uint32_t type,
                      std::string_view data) {
    pad(data_);
    tensor_info(name, dims, type, data_.size());
    data_ += data;
    return *this;
  }
  GgufBuilder& tensor(std::string_view name, const std::vector<std::uint64_t>& dims,
                      std::span<const float> values) {
    return tensor(name, dims, 0, raw_all(values));
  }
  /// Only the header's part of a tensor.
  GgufBuilder& tensor_info(std::string_view name, const std::vector<std::uint64_t>& dims, std::uint32_t type,
                           std::uint64_t offset) {
    tensors_ += raw_string(name) + raw(static_cast<std::uint32_t>(dims.size()));
    for (const std::uint64_t dim : dims) tensors_ += raw(dim);
    tensors_ += raw(type) + raw(offset);
    ++tensor_count_;
    return *this;
  }
  GgufBuilder& data(std::string_view bytes) {
    data_ += bytes;
    return *this;
  }

  /// The file, without padding after the last tensor.
  [[nodiscard]] std::string build() const {
    std::string out = "GGUF" + raw(version) + raw(claimed_tensors.value_or(tensor_count_)) +
                      raw(claimed_metadata.value_or(metadata_count_)) + metadata_ + tensors_;
    if (!data_.empty()) pad(out);
    return out + data_;
  }

 private:
  void pad(std::string& bytes) const {
    while (bytes.size() % alignment != 0) bytes += '\0';
  }

  std::string metadata_;
  std::string tensors_;
  std::string data_;
  std::uint64_t metadata_count_ = 0;
  std::uint64_t tensor_count_ = 0;
};

}  // namespace prefillshare::examples::test
