// SPDX-License-Identifier: Apache-2.0
//
// common/config_json.hpp - the numbers that define a model, out of a Hugging Face config.json.
// Layer: examples (host only).
//
// Keys and defaults: the configuration classes of https://github.com/huggingface/transformers
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include <codegemm/base/quoted.hpp>
#include <common/hyperparameters.hpp>

namespace prefillshare::examples {

namespace detail {

using Json = nlohmann::json;

/// Null where the member is missing or null.
[[nodiscard]] inline const Json* find_member(const Json& object, const std::string& key) {
  const auto at = object.find(key);
  return at != object.end() && !at->is_null() ? &*at : nullptr;
}

struct JsonNumbers {
  const Json& object;
  const std::string& file;
  std::string prefix;  // of the key, for messages

  [[nodiscard]] Result<std::int64_t> find_integer(const std::string& key) const {
    const Json* value = find_member(object, key);
    if (value == nullptr) return missing(key);
    if (const auto* number = value->get_ptr<const Json::number_unsigned_t*>()) {
      return *number > static_cast<std::uint64_t>(INT64_MAX) ? INT64_MAX : static_cast<std::int64_t>(*number);
    }
    if (const auto* number = value->get_ptr<const Json::number_integer_t*>()) return *number;
    return wrong(key, *value, "an integer");
  }
  [[nodiscard]] Result<double> find_number(const std::string& key) const {
    const Json* value = find_member(object, key);
    if (value == nullptr) return missing(key);
    if (!value->is_number()) return wrong(key, *value, "a number");
    return value->get<double>();
  }

  [[nodiscard]] Status missing(const std::string& key) const {
    return error(StatusCode::kNotFound, file, ": ", codegemm::quoted(prefix + key), " is missing");
  }
  [[nodiscard]] Status wrong(const std::string& key, const Json& value, const char* wanted) const {
    return error(StatusCode::kCorruptData, file, ": ", codegemm::quoted(prefix + key), " is of type ",
                 value.type_name(), ", expected ", wanted);
  }
};

/// The text of a member, or `otherwise` where there is none.
[[nodiscard]] inline Result<std::string> string_or(const JsonNumbers& from, const std::string& key,
                                                   std::string_view otherwise) {
  const Json* value = find_member(from.object, key);
  if (value == nullptr) return std::string(otherwise);
  const auto* text = value->get_ptr<const Json::string_t*>();
  if (text == nullptr) return from.wrong(key, *value, "a string");
  return *text;
}

[[nodiscard]] inline Result<bool> boolean_or(const JsonNumbers& from, const std::string& key,
                                             bool otherwise) {
  const Json* value = find_member(from.object, key);
  if (value == nullptr) return otherwise;
  const auto* flag = value->get_ptr<const Json::boolean_t*>();
  if (flag == nullptr) return from.wrong(key, *value, "a boolean");
  return *flag;
}

/// "rope_scaling" of transformers 4 or "rope_parameters" of transformers 5, which also holds the base.
[[nodiscard]] inline Status read_rope(const Json& config, const std::string& file, ModelHyperparameters& h) {
  const JsonNumbers root{config, file, ""};
  HyperparameterReader<JsonNumbers> read_root(root, file);
  h.rope_theta = read_root.number_or("rope_theta", kThetaRange, 10000.0);
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    const Json* object = find_member(config, name);
    if (object == nullptr) continue;
    if (!object->is_object()) return root.wrong(name, *object, "an object");
    const JsonNumbers rope{*object, file, std::string(name) + "."};
    const Result<std::string> old_type = string_or(rope, "type", "default");
    if (!old_type.ok()) return old_type.status();
    const Result<std::string> type = string_or(rope, "rope_type", *old_type);
    if (!type.ok()) return type.status();
    h.rope_scaling = *type == "default" ? "none" : *type;
    HyperparameterReader<JsonNumbers> read(rope, file);
    h.rope_theta = read.number_or("rope_theta", kThetaRange, h.rope_theta);
    if (h.rope_scaling == "linear" || h.rope_scaling == "llama3")
      h.rope_factor = read.number("factor", kFactorRange);
    if (h.rope_scaling == "llama3") {
      h.rope_low_freq_factor = read.number("low_freq_factor", kFactorRange);
      h.rope_high_freq_factor = read.number("high_freq_factor", kFactorRange);
      h.rope_original_context = read.integer("original_max_position_embeddings", kContextRange);
    }
    const double part = read.number_or("partial_rotary_factor", {0.0, 1.0}, 1.0);
    if (!read.status().ok()) return read.status();
    if (part != 1.0) {
      return error(StatusCode::kUnsupported, file, ": '", name, ".partial_rotary_factor' is ", part,
                   ", only 1 is known");
    }
  }
  return read_root.status();
}

/// What would change the results and is in none of the known architectures as published.
[[nodiscard]] inline Status refuse_unknown_features(const JsonNumbers& root) {
  if (find_member(root.object, "quantization_config") != nullptr) {
    return error(StatusCode::kUnsupported, root.file,
                 ": 'quantization_config': quantized checkpoints are not read");
  }
  const Result<std::string> activation = string_or(root, "hidden_act", "silu");
  if (!activation.ok()) return activation.status();
  if (*activation != "silu") {
    return error(StatusCode::kUnsupported, root.file, ": 'hidden_act' is ", codegemm::quoted(*activation),
                 ", only silu is known");
  }
  HyperparameterReader<JsonNumbers> read(root, root.file);
  const double part = read.number_or("partial_rotary_factor", {0.0, 1.0}, 1.0);
  if (read.status().ok() && part != 1.0) {
    return error(StatusCode::kUnsupported, root.file, ": 'partial_rotary_factor' is ", part,
                 ", only 1 is known");
  }
  return read.status();
}

}  // namespace detail

/// From the text of a config.json; `file` is for messages. Errors as for GGUF.
[[nodiscard]] inline Result<ModelHyperparameters> read_hyperparameters(std::string_view config_json,
                                                                       const std::string& file,
                                                                       const HasTensor& has) {
  const detail::Json config = detail::Json::parse(config_json, nullptr, false);
  if (config.is_discarded()) return error(StatusCode::kCorruptData, file, ": is no JSON");
  if (!config.is_object()) {
    return error(StatusCode::kCorruptData, file, ": is a JSON ", config.type_name(), ", must be an object");
  }
  const detail::JsonNumbers root{config, file, ""};
  const Result<std::string> architecture = detail::string_or(root, "model_type", "");
  if (!architecture.ok()) return architecture.status();
  if (architecture->empty()) return root.missing("model_type");
  if (Status status = detail::check_architecture(file, *architecture); !status.ok()) return status;
  if (Status status = detail::refuse_unknown_features(root); !status.ok()) return status;

  ModelHyperparameters h;
  h.architecture = *architecture;
  detail::HyperparameterReader<detail::JsonNumbers> read(root, file);
  h.vocab_size = read.integer("vocab_size", detail::kVocabRange);
  h.hidden_size = read.integer("hidden_size", detail::kHiddenRange);
  h.layers = read.integer("num_hidden_layers", detail::kLayersRange);
  h.heads = read.integer("num_attention_heads", detail::kHeadsRange);
  // Only here is the default the same in every version of the configuration class; the others must say it.
  h.kv_heads = h.architecture == "llama"
                   ? read.integer_or("num_key_value_heads", detail::kHeadsRange, h.heads)
                   : read.integer("num_key_value_heads", detail::kHeadsRange);
  h.intermediate_size = read.integer("intermediate_size", detail::kIntermediateRange);
  h.context_length = read.integer("max_position_embeddings", detail::kContextRange);
  h.rms_epsilon = read.number_or("rms_norm_eps", detail::kEpsilonRange, 1e-6);
  const std::int64_t even_split = h.heads > 0 ? h.hidden_size / h.heads : 0;
  h.head_dim = h.architecture == "qwen3" ? read.integer("head_dim", detail::kHeadDimRange)
                                         : read.integer_or("head_dim", detail::kHeadDimRange, even_split);
  if (!read.status().ok()) return read.status();
  if (h.head_dim < 2 || h.head_dim > detail::kHeadDimRange.most) {
    return error(StatusCode::kCorruptData, file, ": ", h.heads, " heads share ", h.hidden_size,
                 " hidden values, a head size of ", h.head_dim, ", must be in 2..",
                 detail::kHeadDimRange.most);
  }

  const Result<bool> tied = detail::boolean_or(root, "tie_word_embeddings", false);
  if (!tied.ok()) return tied.status();
  h.tied_embeddings = *tied;
  // Mistral attends to a window unless told null; Qwen does only when told so.
  const Result<bool> windowed = detail::boolean_or(root, "use_sliding_window", h.architecture == "mistral");
  if (!windowed.ok()) return windowed.status();
  if (*windowed && h.architecture != "llama") {
    const bool absent = config.find("sliding_window") == config.end();
    h.sliding_window = read.integer_or("sliding_window", detail::kWindowRange,
                                       absent && h.architecture == "mistral" ? 4096 : 0);
    if (!read.status().ok()) return read.status();
  }
  if (Status status = detail::read_rope(config, file, h); !status.ok()) return status;
  if (Status status = detail::finish_hyperparameters(h, file, has); !status.ok()) return status;
  return h;
}

}  // namespace prefillshare::examples
