// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/state.hpp - a training run on disk: parameters, the optimizer's moments and the step;
// and a model's tensors under their names in Hugging Face checkpoints.
// Layer: train (host only).
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/quoted.hpp>
#include <codegemm/io/safetensors.hpp>
#include <codegemm/io/safetensors_writer.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/train/adamw.hpp>
#include <prefillshare/train/trainable_model.hpp>

namespace prefillshare {

namespace detail {

inline constexpr const char* kStateParts[] = {"parameter ", "first moment ", "second moment "};

/// body(part, parameter, values) for each tensor of a state.
template <class Body>
void for_each_state_tensor(ParameterList<float>& parameters, AdamW<float>& optimizer, Body&& body) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    body(0, parameters[i], parameters[i].value);
    body(1, parameters[i], optimizer.first()[i]);
    body(2, parameters[i], optimizer.second()[i]);
  }
}

}  // namespace detail

/// Writes a run's state as safetensors, whole or not at all. `run` says all that the result depends on.
/// Errors of write_safetensors().
[[nodiscard]] inline Status save_state(const std::string& path, const std::string& run,
                                       ParameterList<float>& parameters, AdamW<float>& optimizer) {
  std::vector<codegemm::SafetensorsTensor> tensors;
  detail::for_each_state_tensor(
      parameters, optimizer, [&](int part, const Parameter<float>& p, const Tensor<float>& values) {
        tensors.push_back({detail::kStateParts[part] + p.name, codegemm::Dtype::kF32, p.shape,
                           std::as_bytes(values.span())});
      });
  const codegemm::SafetensorsText texts[] = {{"run", run}, {"step", codegemm::concat(optimizer.steps())}};
  return codegemm::write_safetensors(path, tensors, texts);
}

/// Reads it back, bit for bit. kIncompatible for the state of another run, kCorruptData with the tensor's
/// name where the file does not fit the parameters; all is then as it was.
[[nodiscard]] inline Status load_state(const std::string& path, const std::string& run,
                                       ParameterList<float>& parameters, AdamW<float>& optimizer) {
  const Result<codegemm::SafetensorsFile> file = codegemm::SafetensorsFile::open(path);
  if (!file.ok()) return file.status();
  const std::string* const own = file->find_metadata("run");
  if (own == nullptr || *own != run) {
    return error(StatusCode::kIncompatible, path, ": belongs to another run (",
                 own == nullptr ? "unnamed" : codegemm::quoted(*own, 300), "), this one is ",
                 codegemm::quoted(run, 300));
  }
  const std::string* const step = file->find_metadata("step");
  std::int64_t steps = -1;
  if (step != nullptr) {
    const char* const end = step->data() + step->size();
    const auto [stop, failed] = std::from_chars(step->data(), end, steps);
    if (failed != std::errc() || stop != end) steps = -1;
  }
  if (steps < 0) return error(StatusCode::kCorruptData, path, ": has no 'step'");
  Status wrong;
  detail::for_each_state_tensor(
      parameters, optimizer, [&](int part, const Parameter<float>& p, const Tensor<float>&) {
        const std::string name = detail::kStateParts[part] + p.name;
        const codegemm::SafetensorsTensor* tensor = file->find(name);
        if (wrong.ok() &&
            (tensor == nullptr || tensor->dtype != codegemm::Dtype::kF32 || tensor->shape != p.shape))
          wrong = error(StatusCode::kCorruptData, path, ": tensor ", codegemm::quoted(name),
                        " is missing or of another shape");
      });
  if (!wrong.ok()) return wrong;
  detail::for_each_state_tensor(parameters, optimizer,
                                [&](int part, const Parameter<float>& p, Tensor<float>& values) {
                                  const auto bytes = file->find(detail::kStateParts[part] + p.name)->data;
                                  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
                                });
  optimizer.set_steps(steps);
  return {};
}

/// A model as a Hugging Face checkpoint's model.safetensors in fp32, whole or not at all; a tied head is left
/// out. Its config.json is the caller's business. Errors of write_safetensors().
[[nodiscard]] inline Status save_model(const std::string& path, const LlamaModel<DenseLinear>& model,
                                       std::span<const codegemm::SafetensorsText> metadata = {}) {
  std::vector<codegemm::SafetensorsTensor> tensors;
  const auto add = [&](const std::string& name, std::span<const float> values,
                       std::vector<std::int64_t> shape) {
    if (values.empty()) return;
    tensors.push_back({name, codegemm::Dtype::kF32, std::move(shape), std::as_bytes(values)});
  };
  const auto vector = [&](const std::string& name, std::span<const float> values) {
    add(name, values, {static_cast<std::int64_t>(values.size())});
  };
  add("model.embed_tokens.weight", *model.embedding, {model.config.vocab_size, model.config.hidden_size});
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const std::string prefix = codegemm::concat("model.layers.", i, ".");
    vector(prefix + "input_layernorm.weight", model.layers[i].input_norm);
    vector(prefix + "post_attention_layernorm.weight", model.layers[i].post_attention_norm);
    vector(prefix + "self_attn.q_norm.weight", model.layers[i].q_norm);
    vector(prefix + "self_attn.k_norm.weight", model.layers[i].k_norm);
  }
  vector("model.norm.weight", model.final_norm);
  for_each_linear(model, [&](const std::string& name, const DenseLinear& layer) {
    if (name == "lm_head" && model.config.tied_embeddings) return;
    const MatrixView<const float> w = layer.weights();
    add(name + ".weight", {w.data, static_cast<std::size_t>(w.rows * w.cols)}, {w.rows, w.cols});
    vector(name + ".bias", layer.bias());
  });
  return codegemm::write_safetensors(path, tensors, metadata);
}

}  // namespace prefillshare
