// SPDX-License-Identifier: Apache-2.0
//
// common/gguf_hyperparameters.hpp - the numbers that define a model, out of GGUF metadata.
// Layer: examples (host only).
//
// Keys and defaults: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <string>
#include <string_view>
#include <vector>

#include <codegemm/base/quoted.hpp>
#include <common/gguf.hpp>
#include <common/hyperparameters.hpp>

namespace prefillshare::examples {

namespace detail {

struct GgufNumbers {
  const GgufFile& file;
  [[nodiscard]] Result<std::int64_t> find_integer(const std::string& key) const { return file.integer(key); }
  [[nodiscard]] Result<double> find_number(const std::string& key) const { return file.number(key); }
};

/// llama.cpp's converter stores the llama3 scaling as one factor for each frequency. Finds the numbers that
/// made them: all Llama 3.1 to 3.3 models have low 1, high 4, original context 8192, and the lowest frequency
/// is divided by the whole factor. Leaves the type "rope_freqs" where the factors are not of that form.
inline void explain_rope_freqs(ModelHyperparameters& h, const std::vector<float>& factors) {
  h.rope_freqs = true;
  h.rope_scaling = "rope_freqs";
  constexpr double kLow = 1.0;
  constexpr double kHigh = 4.0;
  constexpr std::int64_t kOriginal = 8192;
  const double whole = static_cast<double>(factors.back());
  if (!(whole >= 1.0 && whole <= kFactorRange.most)) return;
  for (std::size_t i = 0; i < factors.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(h.head_dim);
    const double turns =
        static_cast<double>(kOriginal) / (2.0 * std::numbers::pi * std::pow(h.rope_theta, exponent));
    double expected = 1.0;
    if (turns < kLow) {
      expected = whole;
    } else if (turns <= kHigh) {
      const double smooth = (turns - kLow) / (kHigh - kLow);
      expected = 1.0 / ((1.0 - smooth) / whole + smooth);
    }
    if (!(std::abs(static_cast<double>(factors[i]) - expected) <= 1e-3 * expected)) return;
  }
  h.rope_scaling = "llama3";
  h.rope_factor = whole;
  h.rope_low_freq_factor = kLow;
  h.rope_high_freq_factor = kHigh;
  h.rope_original_context = kOriginal;
}

}  // namespace detail

/// From a GGUF file's metadata. kUnsupported names the architecture or the feature, kCorruptData or kNotFound
/// the key and the number.
[[nodiscard]] inline Result<ModelHyperparameters> read_hyperparameters(const GgufFile& file,
                                                                       const HasTensor& has) {
  const Result<std::string_view> architecture = file.string("general.architecture");
  if (!architecture.ok()) return architecture.status();
  if (Status status = detail::check_architecture(file.name(), *architecture); !status.ok()) return status;

  ModelHyperparameters h;
  h.architecture = std::string(*architecture);
  const std::string prefix = h.architecture + ".";
  const detail::GgufNumbers numbers{file};
  detail::HyperparameterReader<detail::GgufNumbers> read(numbers, file.name());
  h.hidden_size = read.integer(prefix + "embedding_length", detail::kHiddenRange);
  h.layers = read.integer(prefix + "block_count", detail::kLayersRange);
  h.heads = read.integer(prefix + "attention.head_count", detail::kHeadsRange);
  h.kv_heads = read.integer_or(prefix + "attention.head_count_kv", detail::kHeadsRange, h.heads);
  h.intermediate_size = read.integer(prefix + "feed_forward_length", detail::kIntermediateRange);
  h.context_length = read.integer(prefix + "context_length", detail::kContextRange);
  h.sliding_window = read.integer_or(prefix + "attention.sliding_window", detail::kWindowRange, 0);
  h.rms_epsilon = read.number(prefix + "attention.layer_norm_rms_epsilon", detail::kEpsilonRange);
  h.rope_theta = read.number_or(prefix + "rope.freq_base", detail::kThetaRange, 10000.0);
  const std::int64_t even_split = h.heads > 0 ? h.hidden_size / h.heads : 0;
  h.head_dim = read.integer_or(prefix + "attention.key_length", detail::kHeadDimRange, even_split);
  const std::int64_t value_dim =
      read.integer_or(prefix + "attention.value_length", detail::kHeadDimRange, h.head_dim);
  const std::int64_t rope_dim = read.integer_or(prefix + "rope.dimension_count", {0, 1 << 20}, h.head_dim);
  const std::int64_t experts = read.integer_or(prefix + "expert_count", {0, 1 << 20}, 0);
  if (!read.status().ok()) return read.status();
  if (h.head_dim < 2 || h.head_dim > detail::kHeadDimRange.most) {
    return error(StatusCode::kCorruptData, file.name(), ": ", h.heads, " heads share ", h.hidden_size,
                 " hidden values, a head size of ", h.head_dim, ", must be in 2..",
                 detail::kHeadDimRange.most);
  }
  if (value_dim != h.head_dim || rope_dim != h.head_dim) {
    return error(StatusCode::kUnsupported, file.name(), ": key, value and RoPE sizes of a head are ",
                 h.head_dim, ", ", value_dim, " and ", rope_dim, ", must be the same");
  }
  if (experts > 0) {
    return error(StatusCode::kUnsupported, file.name(), ": a mixture of ", experts,
                 " experts is not known here");
  }

  if (file.find(prefix + "rope.scaling.type") != nullptr) {
    const Result<std::string_view> type = file.string(prefix + "rope.scaling.type");
    if (!type.ok()) return type.status();
    h.rope_scaling = std::string(*type);
  } else if (file.find(prefix + "rope.scale_linear") != nullptr) {  // the older key
    h.rope_scaling = "linear";
    h.rope_factor = read.number(prefix + "rope.scale_linear", detail::kFactorRange);
  }
  h.rope_factor = read.number_or(prefix + "rope.scaling.factor", detail::kFactorRange, h.rope_factor);
  h.rope_original_context =
      read.integer_or(prefix + "rope.scaling.original_context_length", detail::kContextRange, 0);
  if (!read.status().ok()) return read.status();

  const GgufTensor* embedding = file.find_tensor("token_embd.weight");
  if (embedding == nullptr)
    return error(StatusCode::kNotFound, file.name(), ": tensor 'token_embd.weight' is missing");
  h.vocab_size = embedding->rows();
  if (h.vocab_size > detail::kVocabRange.most) {
    return error(StatusCode::kCorruptData, file.name(), ": tensor 'token_embd.weight' has ", h.vocab_size,
                 " rows, at most ", detail::kVocabRange.most, " tokens are allowed");
  }
  h.tied_embeddings = !has("lm_head.weight");

  if (const GgufTensor* freqs = file.find_tensor("rope_freqs.weight"); freqs != nullptr) {
    if (freqs->rows() != 1 || freqs->row_elements() != h.head_dim / 2) {
      return error(StatusCode::kCorruptData, file.name(), ": tensor 'rope_freqs.weight' is ", freqs->rows(),
                   " x ", freqs->row_elements(), ", must be 1 x ", h.head_dim / 2);
    }
    std::vector<float> factors(static_cast<std::size_t>(h.head_dim / 2));
    if (Status status = file.read_rows(*freqs, 0, 1, factors.data()); !status.ok()) return status;
    detail::explain_rope_freqs(h, factors);
  }
  if (Status status = detail::finish_hyperparameters(h, file.name(), has); !status.ok()) return status;
  return h;
}

}  // namespace prefillshare::examples
