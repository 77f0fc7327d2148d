// SPDX-License-Identifier: Apache-2.0
//
// common/hyperparameters.hpp - the numbers that define a model, as its file gives them.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>

namespace prefillshare::examples {

using codegemm::error;
using codegemm::Result;
using codegemm::Status;
using codegemm::StatusCode;

/// As the file gives them, every number in a range that some model could have and the architecture one of
/// those known here. Whether the forward pass serves them is the caller's to say.
struct ModelHyperparameters {
  std::string architecture;  // llama, mistral, qwen2 or qwen3
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t layers = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;  // divides heads
  std::int64_t head_dim = 0;  // even
  std::int64_t intermediate_size = 0;
  std::int64_t context_length = 0;
  std::int64_t sliding_window = 0;  // tokens that one token attends to; 0: all
  double rms_epsilon = 0.0;
  double rope_theta = 0.0;
  std::string rope_scaling = "none";  // none, linear, llama3, or the file's name for something else
  double rope_factor = 1.0;
  double rope_low_freq_factor = 1.0;       // llama3
  double rope_high_freq_factor = 4.0;      // llama3
  std::int64_t rope_original_context = 0;  // llama3; 0 where the file does not say
  bool rope_freqs = false;                 // a GGUF that holds one factor for each RoPE frequency
  bool tied_embeddings = false;            // no head of its own
  bool attention_bias = false;             // on q, k and v
  bool qk_norm = false;
};

/// Whether the model has a tensor of this (Hugging Face) name.
using HasTensor = std::function<bool(std::string_view name)>;

namespace detail {

struct IntegerRange {
  std::int64_t least;
  std::int64_t most;
};
// Generous for any published model, small enough that no product of two overflows.
inline constexpr IntegerRange kVocabRange{1, 1 << 24};
inline constexpr IntegerRange kHiddenRange{1, 1 << 20};
inline constexpr IntegerRange kIntermediateRange{1, 1 << 22};
inline constexpr IntegerRange kLayersRange{1, 1 << 12};
inline constexpr IntegerRange kHeadsRange{1, 1 << 12};
inline constexpr IntegerRange kHeadDimRange{2, 1 << 12};
inline constexpr IntegerRange kContextRange{1, 1 << 26};
inline constexpr IntegerRange kWindowRange{0, INT64_C(1) << 40};

struct NumberRange {
  double least;
  double most;
};
inline constexpr NumberRange kEpsilonRange{1e-20, 0.5};
inline constexpr NumberRange kThetaRange{1.0, 1e12};
inline constexpr NumberRange kFactorRange{1e-6, 1e6};

inline constexpr std::string_view kArchitectures[] = {"llama", "mistral", "qwen2", "qwen3"};

[[nodiscard]] inline Status check_architecture(std::string_view file, std::string_view name) {
  std::string known;
  for (const std::string_view architecture : kArchitectures) {
    if (architecture == name) return {};
    known += codegemm::concat(known.empty() ? "" : ", ", architecture);
  }
  return error(StatusCode::kUnsupported, file, ": architecture is ", codegemm::quoted(name), ", known are ",
               known);
}

/// Reads values by key, keeps the first failure and goes on as if nothing was: the caller looks once, at
/// status(). Source: find_integer(key), find_number(key) -> Result, kNotFound where the key is missing.
template <class Source>
class HyperparameterReader {
 public:
  HyperparameterReader(const Source& source, std::string file) : source_(source), file_(std::move(file)) {}

  [[nodiscard]] const Status& status() const noexcept { return status_; }

  std::int64_t integer(const std::string& key, IntegerRange range) {
    return checked(key, source_.find_integer(key), range);
  }
  std::int64_t integer_or(const std::string& key, IntegerRange range, std::int64_t otherwise) {
    Result<std::int64_t> value = source_.find_integer(key);
    return missing(value) ? otherwise : checked(key, std::move(value), range);
  }
  double number(const std::string& key, NumberRange range) {
    return checked(key, source_.find_number(key), range);
  }
  double number_or(const std::string& key, NumberRange range, double otherwise) {
    Result<double> value = source_.find_number(key);
    return missing(value) ? otherwise : checked(key, std::move(value), range);
  }

  template <class... Parts>
  void fail(StatusCode code, const Parts&... parts) {
    if (status_.ok()) status_ = error(code, file_, ": ", parts...);
  }

 private:
  template <class T>
  static bool missing(const Result<T>& value) {
    return !value.ok() && value.status().code() == StatusCode::kNotFound;
  }

  template <class T, class Range>
  T checked(const std::string& key, Result<T> value, Range range) {
    if (!value.ok()) {
      if (status_.ok()) status_ = value.status();
      return T{};
    }
    if (!(*value >= range.least && *value <= range.most)) {  // in this form for NaN
      fail(StatusCode::kCorruptData, codegemm::quoted(key), " is ", *value, ", must be in ", range.least,
           "..", range.most);
    }
    return *value;
  }

  const Source& source_;
  std::string file_;
  Status status_;
};

/// What both kinds of file leave to the tensors, and the checks across numbers.
[[nodiscard]] inline Status finish_hyperparameters(ModelHyperparameters& h, std::string_view file,
                                                   const HasTensor& has) {
  if (h.heads % h.kv_heads != 0) {
    return error(StatusCode::kCorruptData, file, ": ", h.heads, " attention heads are not a multiple of ",
                 h.kv_heads, " KV heads");
  }
  if (h.head_dim % 2 != 0) {
    return error(StatusCode::kCorruptData, file, ": the head size is ", h.head_dim,
                 ", must be even for RoPE");
  }
  h.attention_bias = has("model.layers.0.self_attn.q_proj.bias");
  h.qk_norm = has("model.layers.0.self_attn.q_norm.weight");
  // Left out without a word, these would give wrong results.
  for (const std::string_view name :
       {"self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"}) {
    const std::string first = codegemm::concat("model.layers.0.", name);
    if (has(first))
      return error(StatusCode::kUnsupported, file, ": has the tensor '", first, "': no such bias is known");
  }
  return {};
}

}  // namespace detail
}  // namespace prefillshare::examples
