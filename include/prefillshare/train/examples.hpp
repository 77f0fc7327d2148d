// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/examples.hpp - prompts and targets, the base's cache of a prompt, and the batches that
// they become: equation 7 with teacher forcing.
// Layer: train (host only).
// See: PrefillShare (arXiv 2602.12029) section 3.2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/kv/storage.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/model/forward.hpp>
#include <prefillshare/train/pass.hpp>

namespace prefillshare {

/// What a decode module learns: after `prompt` comes `target`, which ends with the token that ends a turn.
struct TrainingExample {
  std::vector<std::int32_t> prompt;  ///< what the module is given
  std::vector<std::int32_t> target;  ///< what it is to answer

  /// Of both together.
  [[nodiscard]] std::int64_t tokens() const noexcept {
    return static_cast<std::int64_t>(prompt.size() + target.size());
  }
};

/// Why an example cannot be trained on: kInvalidArgument for an empty prompt or target, more than `most`
/// tokens, or a token outside of the vocabulary.
[[nodiscard]] inline Status validate(const TrainingExample& example, std::int64_t most,
                                     std::int64_t vocabulary) {
  if (example.prompt.empty()) return error(StatusCode::kInvalidArgument, "the prompt is empty");
  if (example.target.empty()) return error(StatusCode::kInvalidArgument, "the target is empty");
  if (example.tokens() > most) {
    return error(StatusCode::kInvalidArgument, "prompt and target have ", example.prompt.size(), " + ",
                 example.target.size(), " tokens, at most ", most, " are allowed");
  }
  for (const auto* ids : {&example.prompt, &example.target}) {
    for (const std::int32_t id : *ids) {
      if (id >= 0 && id < vocabulary) continue;
      return error(StatusCode::kInvalidArgument, "token ", id, ", the vocabulary has ", vocabulary);
    }
  }
  return {};
}

/// Of a prompt of n tokens, those whose KV the decode module reads from the base: the first
/// round(sharing * (n - 1)). The sharing ratio counts tokens from the front, not layers, since that is what
/// serving shares: a prefix of the context. What is left, at least the last prompt token, the decode module
/// runs itself. 1 is PrefillShare, 0 is ordinary fine-tuning and serving.
[[nodiscard]] inline std::int64_t shared_tokens(std::int64_t prompt, double sharing) {
  return std::llround(std::clamp(sharing, 0.0, 1.0) * static_cast<double>(prompt - 1));
}

/// Keys (after RoPE) and values that the base made of some tokens: [layers][tokens][kv_heads * head_dim].
struct BaseKv {
  std::int64_t tokens = 0;    ///< of the prompt
  std::vector<float> keys;    ///< see above
  std::vector<float> values;  ///< see above
};

/// The frozen base of a fine-tuning: runs prompts by the same forward pass that serves them.
template <LinearLayer Linear>
class FrozenBase {
 public:
  /// For prompts of up to max_tokens tokens. Errors of ForwardWorkspace and HostKvStorage.
  [[nodiscard]] static Result<FrozenBase> create(std::shared_ptr<const LlamaModel<Linear>> model,
                                                 std::int64_t max_tokens, int workers) {
    if (model == nullptr) return error(StatusCode::kNullPointer, "FrozenBase: no model");
    if (Status s = validate(*model); !s.ok()) return s;
    Result<ForwardWorkspace> workspace = ForwardWorkspace::create(*model, max_tokens, max_tokens, workers);
    if (!workspace.ok()) return workspace.status();
    const KvShape shape = kv_shape(model->config);
    const std::int64_t blocks = (max_tokens + shape.block_tokens - 1) / shape.block_tokens;
    Result<HostKvStorage> storage = HostKvStorage::create(shape, blocks);
    if (!storage.ok()) return storage.status();
    FrozenBase out;
    out.model_ = std::move(model);
    out.workspace_ = std::make_unique<ForwardWorkspace>(*std::move(workspace));
    out.storage_ = std::make_unique<HostKvStorage>(*std::move(storage));
    out.blocks_.resize(static_cast<std::size_t>(blocks));
    std::iota(out.blocks_.begin(), out.blocks_.end(), BlockId{0});
    return out;
  }

  [[nodiscard]] const ModelConfig& config() const noexcept { return model_->config; }  ///< of the base

  /// The base cache of `tokens`. Errors of forward(); kOutOfMemory.
  [[nodiscard]] Result<BaseKv> run(std::span<const std::int32_t> tokens, Executor& executor) {
    BaseKv out;
    out.tokens = static_cast<std::int64_t>(tokens.size());
    if (tokens.empty()) return out;
    const KvTarget target{storage_.get(), blocks_, 0};
    if (Status s = forward(*model_, tokens, target, MatrixView<float>(), *workspace_, executor); !s.ok())
      return s;
    const ModelConfig& c = model_->config;
    const std::int64_t width = c.kv_size();
    const auto size = static_cast<std::size_t>(c.layers * out.tokens * width);
    const bool fits = detail::try_allocate([&] {
      out.keys.resize(size);
      out.values.resize(size);
    });
    if (!fits) return error(StatusCode::kOutOfMemory, "FrozenBase: the cache of ", out.tokens, " tokens");
    const int block_tokens = kv_shape(c).block_tokens;
    for (std::int64_t layer = 0; layer < c.layers; ++layer) {
      for (std::int64_t t = 0; t < out.tokens; ++t) {
        const BlockId block = blocks_[static_cast<std::size_t>(t / block_tokens)];
        const int slot = static_cast<int>(t % block_tokens);
        const std::int64_t to = (layer * out.tokens + t) * width;
        std::copy_n(storage_->k(static_cast<int>(layer), block, slot), width, out.keys.data() + to);
        std::copy_n(storage_->v(static_cast<int>(layer), block, slot), width, out.values.data() + to);
      }
    }
    return out;
  }

 private:
  FrozenBase() = default;

  std::shared_ptr<const LlamaModel<Linear>> model_;
  std::unique_ptr<ForwardWorkspace> workspace_;
  std::unique_ptr<HostKvStorage> storage_;
  std::vector<BlockId> blocks_;
};

/// Rows that an example takes in a batch: the prompt behind what is shared and the target but its last token.
[[nodiscard]] inline std::int64_t example_rows(const TrainingExample& example, double sharing) {
  const auto prompt = static_cast<std::int64_t>(example.prompt.size());
  return example.tokens() - 1 - shared_tokens(prompt, sharing);
}

/// Appends an example behind the base's cache of its first kv.tokens prompt tokens, which must stay where it
/// is as long as the batch is used. The label of each row is the token that follows it; losses are taken from
/// the last prompt token on.
inline void append_example(const TrainingExample& example, const BaseKv& kv, LossBatch<float>& batch) {
  const auto prompt = static_cast<std::int64_t>(example.prompt.size());
  const auto target = static_cast<std::int64_t>(example.target.size());
  Segment<float> s;
  s.first = static_cast<std::int64_t>(batch.tokens.size());
  s.count = prompt - kv.tokens + target - 1;
  s.prefix = s.prefix_stride = kv.tokens;
  s.keys = kv.keys.data();
  s.values = kv.values.data();
  batch.segments.push_back(s);
  batch.tokens.insert(batch.tokens.end(), example.prompt.begin() + kv.tokens, example.prompt.end());
  batch.tokens.insert(batch.tokens.end(), example.target.begin(), example.target.end() - 1);
  for (std::int64_t i = 0; i < target; ++i) {
    batch.loss_rows.push_back(s.first + prompt - kv.tokens - 1 + i);
    batch.labels.push_back(example.target[static_cast<std::size_t>(i)]);
  }
}

/// Packs examples by length: the longest first, each into the first pass that has room for its rows. Returns
/// the passes as indices into `rows`, a pass of its own for one that is too long for any.
[[nodiscard]] inline std::vector<std::vector<std::size_t>> pack_by_length(std::span<const std::int64_t> rows,
                                                                          std::int64_t most) {
  std::vector<std::size_t> order(rows.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return rows[a] > rows[b]; });
  std::vector<std::vector<std::size_t>> passes;
  std::vector<std::int64_t> filled;
  for (const std::size_t i : order) {
    std::size_t pass = 0;
    while (pass < passes.size() && filled[pass] + rows[i] > most) ++pass;
    if (pass == passes.size()) {
      passes.emplace_back();
      filled.push_back(0);
    }
    passes[pass].push_back(i);
    filled[pass] += rows[i];
  }
  return passes;
}

}  // namespace prefillshare
