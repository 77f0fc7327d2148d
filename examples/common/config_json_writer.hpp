// SPDX-License-Identifier: Apache-2.0
//
// common/config_json_writer.hpp - the config.json of a model that comes without one (a GGUF file).
// Layer: examples (host only).
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include <common/hyperparameters.hpp>

namespace prefillshare::examples {

/// What transformers needs to build the model; read_hyperparameters() gives the same numbers back.
/// kUnsupported for a RoPE scaling that has no name there.
[[nodiscard]] inline Result<nlohmann::json> config_json(const ModelHyperparameters& h) {
  const char* const classes[][2] = {{"llama", "LlamaForCausalLM"},
                                    {"mistral", "MistralForCausalLM"},
                                    {"qwen2", "Qwen2ForCausalLM"},
                                    {"qwen3", "Qwen3ForCausalLM"}};
  nlohmann::json out = {{"model_type", h.architecture},
                        {"vocab_size", h.vocab_size},
                        {"hidden_size", h.hidden_size},
                        {"intermediate_size", h.intermediate_size},
                        {"num_hidden_layers", h.layers},
                        {"num_attention_heads", h.heads},
                        {"num_key_value_heads", h.kv_heads},
                        {"head_dim", h.head_dim},
                        {"max_position_embeddings", h.context_length},
                        {"rms_norm_eps", h.rms_epsilon},
                        {"rope_theta", h.rope_theta},
                        {"hidden_act", "silu"},
                        {"tie_word_embeddings", h.tied_embeddings},
                        {"torch_dtype", "float16"}};
  for (const auto& [architecture, name] : classes) {
    if (h.architecture == architecture) out["architectures"] = {name};
  }
  if (h.architecture == "llama") out["attention_bias"] = h.attention_bias;
  if (h.architecture == "mistral") {
    out["sliding_window"] = h.sliding_window > 0 ? nlohmann::json(h.sliding_window) : nlohmann::json();
  } else if (h.sliding_window > 0) {
    out["use_sliding_window"] = true;
    out["sliding_window"] = h.sliding_window;
  }
  if (h.rope_scaling == "linear") {
    out["rope_scaling"] = {{"rope_type", "linear"}, {"factor", h.rope_factor}};
  } else if (h.rope_scaling == "llama3") {
    out["rope_scaling"] = {{"rope_type", "llama3"},
                           {"factor", h.rope_factor},
                           {"low_freq_factor", h.rope_low_freq_factor},
                           {"high_freq_factor", h.rope_high_freq_factor},
                           {"original_max_position_embeddings", h.rope_original_context}};
  } else if (!h.rope_scaling.empty() && h.rope_scaling != "none" && h.rope_scaling != "default") {
    return error(StatusCode::kUnsupported, "RoPE scaling ", codegemm::quoted(h.rope_scaling),
                 " has no place in a config.json");
  }
  return out;
}

}  // namespace prefillshare::examples
