// SPDX-License-Identifier: Apache-2.0
//
// common/perplexity.hpp - how well a model predicts the tokens of a text.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include <Eigen/Core>

#include <common/unwrap.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/model/forward.hpp>

namespace prefillshare::examples {

/// Sums over predicted tokens.
struct PerplexitySums {
  double loss = 0.0;     // -log p, in nats
  double squares = 0.0;  // of each one's loss
  std::int64_t tokens = 0;

  [[nodiscard]] double mean() const { return loss / static_cast<double>(tokens); }
  /// NaN where there are no tokens.
  [[nodiscard]] double perplexity() const { return std::exp(mean()); }
  /// The standard error of the perplexity, as if the tokens' losses did not depend on one another.
  [[nodiscard]] double error() const {
    const auto count = static_cast<double>(tokens);
    return perplexity() * std::sqrt(std::max(0.0, squares / count - mean() * mean()) / count);
  }
};

/// -log p of `token`, where logits[vocabulary] are those of all tokens.
[[nodiscard]] inline double negative_log(const float* logits, std::int64_t vocabulary, std::int32_t token) {
  const Eigen::Map<const Eigen::ArrayXf> all(logits, vocabulary);
  const float top = all.maxCoeff();
  const double sum = static_cast<double>((all - top).exp().sum());
  return std::log(sum) + static_cast<double>(top - logits[token]);
}

/// The tokens of each window's second half, predicted from all before them in the window, as llama.cpp's
/// perplexity tool does it. All windows have the same number of tokens. on_window(windows done, sums so far)
/// may be empty. Throws UserError.
template <LinearLayer Linear>
[[nodiscard]] PerplexitySums score_windows(
    const LlamaModel<Linear>& model, const std::vector<std::vector<std::int32_t>>& windows,
    Executor& executor, const std::function<void(std::int64_t, const PerplexitySums&)>& on_window = {}) {
  PerplexitySums sums;
  if (windows.empty()) return sums;
  const ModelConfig& c = model.config;
  const auto length = static_cast<std::int64_t>(windows.front().size());
  const KvShape shape = kv_shape(c);
  const std::int64_t block_count = (length + shape.block_tokens - 1) / shape.block_tokens;
  HostKvStorage storage = unwrap(HostKvStorage::create(shape, block_count));
  std::vector<BlockId> blocks;
  for (std::int64_t i = 0; i < block_count; ++i) blocks.push_back(static_cast<BlockId>(i));
  ForwardWorkspace workspace = unwrap(ForwardWorkspace::create(model, length, length, executor.workers()));
  const std::int64_t rows = length - length / 2;  // the last of them predicts what the window does not hold
  std::vector<float> logits(static_cast<std::size_t>(rows * c.vocab_size));
  for (std::size_t w = 0; w < windows.size(); ++w) {
    const KvTarget target{&storage, blocks, 0};
    check(forward(model, windows[w], target, MatrixView<float>(logits.data(), rows, c.vocab_size), workspace,
                  executor));
    for (std::int64_t i = 0; i + 1 < rows; ++i) {
      const std::int32_t next = windows[w][static_cast<std::size_t>(length - rows + i + 1)];
      const double loss = negative_log(logits.data() + i * c.vocab_size, c.vocab_size, next);
      sums.loss += loss;
      sums.squares += loss * loss;
      ++sums.tokens;
    }
    if (on_window) on_window(static_cast<std::int64_t>(w) + 1, sums);
  }
  return sums;
}

}  // namespace prefillshare::examples
