// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/config.hpp - the numbers that define a Llama-family decoder.
// Layer: model (host only).
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include <prefillshare/attention/rope.hpp>
#include <prefillshare/kv/shape.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// A decoder-only transformer of the Llama family: RMSNorm, grouped-query attention with rotate-half RoPE,
/// SwiGLU. Covers Llama 2/3, SmolLM2, Mistral (full attention), Qwen2 (attention_bias) and Qwen3 (qk_norm).
struct ModelConfig {
  std::int64_t vocab_size = 0;         ///< tokens
  std::int64_t hidden_size = 0;        ///< of the residual stream
  std::int64_t intermediate_size = 0;  ///< between gate, up and down
  std::int64_t layers = 0;             ///< blocks
  std::int64_t heads = 0;              ///< query heads
  std::int64_t kv_heads = 0;           ///< divides heads
  std::int64_t head_dim = 0;           ///< need not be hidden_size / heads
  std::int64_t context_length = 0;     ///< tokens that the model was trained to see
  double rms_epsilon = 1e-5;           ///< added to the mean of squares
  RopeConfig rope;                     ///< rope.head_dim = head_dim
  bool tied_embeddings = false;        ///< the head is the embedding table
  bool attention_bias = false;         ///< q, k and v have a bias
  bool qk_norm = false;                ///< RMSNorm of each q and k head before RoPE

  /// Rows of the q projection.
  [[nodiscard]] std::int64_t q_size() const noexcept { return heads * head_dim; }
  /// Rows of the k and v projections.
  [[nodiscard]] std::int64_t kv_size() const noexcept { return kv_heads * head_dim; }

  /// All of it is equal.
  friend bool operator==(const ModelConfig&, const ModelConfig&) = default;
};

/// kInvalidArgument with the member and its value where a config can belong to no model.
[[nodiscard]] inline Status validate(const ModelConfig& c) {
  struct Bound {
    const char* name;
    std::int64_t value;
    std::int64_t most;
  };
  // Generous for any published model, small enough that no product of two overflows.
  const Bound bounds[] = {
      {"vocab_size", c.vocab_size, 1 << 24},
      {"hidden_size", c.hidden_size, 1 << 20},
      {"intermediate_size", c.intermediate_size, 1 << 22},
      {"layers", c.layers, 1 << 12},
      {"heads", c.heads, 1 << 12},
      {"kv_heads", c.kv_heads, 1 << 12},
      {"head_dim", c.head_dim, 1 << 12},
      {"context_length", c.context_length, 1 << 26},
  };
  for (const Bound& bound : bounds) {
    if (bound.value < 1 || bound.value > bound.most) {
      return error(StatusCode::kInvalidArgument, "ModelConfig::", bound.name, " is ", bound.value,
                   ", must be in 1..", bound.most);
    }
  }
  if (c.heads % c.kv_heads != 0) {
    return error(StatusCode::kInvalidArgument, "ModelConfig::heads is ", c.heads,
                 ", not a multiple of kv_heads = ", c.kv_heads);
  }
  if (c.head_dim % 8 != 0) {
    return error(StatusCode::kInvalidArgument, "ModelConfig::head_dim is ", c.head_dim,
                 ", must be a multiple of 8");
  }
  if (c.rope.head_dim != c.head_dim) {
    return error(StatusCode::kInvalidArgument, "ModelConfig::rope.head_dim is ", c.rope.head_dim,
                 ", head_dim is ", c.head_dim);
  }
  if (!(c.rms_epsilon > 0.0 && c.rms_epsilon < 1.0)) {
    return error(StatusCode::kInvalidArgument, "ModelConfig::rms_epsilon is ", c.rms_epsilon,
                 ", must be in (0, 1)");
  }
  return validate(c.rope);
}

/// The shape of the KV cache that a model of this config writes and reads.
[[nodiscard]] inline KvShape kv_shape(const ModelConfig& c, int block_tokens = 16) {
  KvShape shape;
  shape.layers = static_cast<int>(c.layers);
  shape.kv_heads = static_cast<int>(c.kv_heads);
  shape.head_dim = static_cast<int>(c.head_dim);
  shape.block_tokens = block_tokens;
  return shape;
}

/// Whether a decode module of config `decode` can read the cache that a base of config `base` wrote. What the
/// cache is made of must agree: vocabulary (the same token ids), layers, KV heads, head size and RoPE; the
/// rest (hidden and intermediate size, query heads, weights) may differ. kIncompatible names every
/// difference.
[[nodiscard]] inline Status check_compatible(const ModelConfig& base, const ModelConfig& decode) {
  std::string differences;
  const auto compare = [&](const char* name, const auto& a, const auto& b) {
    if (a == b) return;
    differences += codegemm::concat(differences.empty() ? "" : "; ", name, ": base ", a, ", decode ", b);
  };
  compare("vocab_size", base.vocab_size, decode.vocab_size);
  compare("layers", base.layers, decode.layers);
  compare("kv_heads", base.kv_heads, decode.kv_heads);
  compare("head_dim", base.head_dim, decode.head_dim);
  compare("rope theta", base.rope.theta, decode.rope.theta);
  compare("rope scaling type", static_cast<int>(base.rope.scaling), static_cast<int>(decode.rope.scaling));
  compare("rope scaling factor", base.rope.factor, decode.rope.factor);
  compare("rope low_freq_factor", base.rope.low_freq_factor, decode.rope.low_freq_factor);
  compare("rope high_freq_factor", base.rope.high_freq_factor, decode.rope.high_freq_factor);
  compare("rope original_max_position_embeddings", base.rope.original_max_position_embeddings,
          decode.rope.original_max_position_embeddings);
  compare("rope layout", static_cast<int>(base.rope.layout), static_cast<int>(decode.rope.layout));
  compare("qk_norm", base.qk_norm, decode.qk_norm);
  if (differences.empty()) return {};
  return error(StatusCode::kIncompatible, "decode module does not fit the base's cache: ", differences);
}

}  // namespace prefillshare
