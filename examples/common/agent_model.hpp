// SPDX-License-Identifier: Apache-2.0
//
// common/agent_model.hpp - what every process of a session of agents has of the model.
// Layer: examples (host only).
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include <codegemm/base/executor.hpp>
#include <codegemm/format.hpp>
#include <common/model_loader.hpp>
#include <common/quantized_model.hpp>
#include <common/unwrap.hpp>
#include <prefillshare/model/modules.hpp>

namespace prefillshare::examples {

/// The model as loaded, its name, its limits, and decode modules out of it. Functions throw UserError.
struct AgentModel {
  LoadedModel loaded;
  CacheKey key;
  std::int64_t context = 0;
  std::string cache;   // folder for quantized weights
  bool dense = false;  // decode modules are the model as it is

  AgentModel(const std::string& path, std::string cache_folder, bool dense_modules)
      : loaded(unwrap(load_model(*unwrap(open_model(path)), {}))),
        key{"base", loaded.fingerprint, ""},
        context(config().context_length),
        cache(std::move(cache_folder)),
        dense(dense_modules) {}

  [[nodiscard]] const ModelConfig& config() const { return loaded.model->config; }

  /// Blocks for two sequences of the longest context.
  [[nodiscard]] HostKvStorage storage() const {
    const KvShape shape = kv_shape(config());
    return unwrap(HostKvStorage::create(shape, 2 * (context / shape.block_tokens + 1)));
  }

  /// use(module) with a decode module of this format.
  template <class Use>
  void with_decode_module(codegemm::Format format, codegemm::Executor& executor, Use&& use) const {
    if (dense) return use(unwrap(factorize(config(), loaded.model)));
    use(unwrap(factorize(config(), unwrap(quantized_model(loaded, format, cache, executor)))));
  }
};

}  // namespace prefillshare::examples
