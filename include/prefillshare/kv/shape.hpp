// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/shape.hpp - how many numbers one token leaves in the KV cache.
// Layer: kv (host only).
#pragma once

#include <cstdint>

#include <codegemm/base/status.hpp>

namespace prefillshare {

/// The part of a model's configuration that decides the size of its KV cache, and how many tokens lie in
/// one block. Two modules can share a cache only if all four numbers agree.
struct KvShape {
  int layers = 0;         ///< of the model
  int kv_heads = 0;       ///< heads of K and of V, after grouping (GQA)
  int head_dim = 0;       ///< elements of a head
  int block_tokens = 16;  ///< tokens of a block

  /// K and V of all layers for one token. `element_bytes` is the storage's: 4 for fp32.
  [[nodiscard]] constexpr std::int64_t bytes_per_token(int element_bytes = 4) const noexcept {
    return std::int64_t{2} * layers * kv_heads * head_dim * element_bytes;
  }
  /// K and V of all layers for the tokens of a block.
  [[nodiscard]] constexpr std::int64_t bytes_per_block(int element_bytes = 4) const noexcept {
    return bytes_per_token(element_bytes) * block_tokens;
  }

  /// All four numbers are equal.
  friend constexpr bool operator==(const KvShape&, const KvShape&) = default;
};

/// Each number within [1, bound]; the bounds are far above any model and keep the byte counts within int64.
[[nodiscard]] inline codegemm::Status validate(const KvShape& shape) {
  struct Field {
    const char* name;
    int value;
    int bound;
  };
  const Field fields[] = {{"layers", shape.layers, 1 << 16},
                          {"kv_heads", shape.kv_heads, 1 << 14},
                          {"head_dim", shape.head_dim, 1 << 14},
                          {"block_tokens", shape.block_tokens, 1 << 12}};
  for (const Field& field : fields) {
    if (field.value < 1 || field.value > field.bound) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "KvShape: ", field.name, " = ",
                             field.value, ", expected 1 to ", field.bound);
    }
  }
  return {};
}

}  // namespace prefillshare
