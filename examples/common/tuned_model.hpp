// SPDX-License-Identifier: Apache-2.0
//
// common/tuned_model.hpp - writes a fine-tuned model as a folder.
// Layer: examples (host only).
#pragma once

#include <string>
#include <vector>

#include <codegemm/base/executor.hpp>
#include <codegemm/io/atomic_file.hpp>
#include <codegemm/io/model_checkpoint.hpp>
#include <common/config_json_writer.hpp>
#include <common/model_loader.hpp>
#include <common/model_writer.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/train/trainer.hpp>

namespace prefillshare::examples {

/// Dense in fp32 or, where codebooks were tuned, quantized as `quantized`, the folder that it came from, with
/// its norms. Other tensors and the config are those of `source`. Throws UserError.
inline void write_tuned_model(const TensorSource& source, const std::string& folder,
                              const TrainableModel<float>& model, const std::string& quantized,
                              codegemm::Executor& executor) {
  const auto matrices = model.matrices();
  if (matrices.empty()) {
    const auto dense = unwrap(model.dense(executor));
    nlohmann::json config = unwrap(source_config(source));
    config.erase("quantization_config");
    config.erase("codegemm");
    config["torch_dtype"] = "float32";
    check(save_model(folder + "/model.safetensors", *dense));
    check(codegemm::write_file(folder + "/config.json", config.dump(2)));
    return;
  }
  std::vector<codegemm::NamedMatrix> named;
  named.reserve(matrices.size());
  for (const auto& [name, matrix] : matrices) named.push_back({name, matrix.view()});
  ReplacedTensors norms;
  for (const Parameter<float>& p : model.parameters()) {
    if (p.name.find("norm.weight") != std::string::npos)
      norms[p.name].assign(p.value.span().begin(), p.value.span().end());
  }
  const auto kind = unwrap(codegemm::ModelCheckpoint::open(quantized)).kind();
  check(write_quantized_model(source, folder, kind, named, norms));
}

}  // namespace prefillshare::examples
