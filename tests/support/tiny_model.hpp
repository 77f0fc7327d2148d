// SPDX-License-Identifier: Apache-2.0
//
// tests/support/tiny_model.hpp - small models of random weights, and the forward pass in plain double loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>
#include <support/random.hpp>

namespace prefillshare::test {

using codegemm::test::Rng;

/// Two layers, three query heads on one KV head: every kind of tensor, quick under sanitizers.
[[nodiscard]] inline ModelConfig tiny_config() {
  ModelConfig c;
  c.vocab_size = 61;
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.layers = 2;
  c.heads = 6;
  c.kv_heads = 2;
  c.head_dim = 8;
  c.context_length = 256;
  c.rope.head_dim = 8;
  c.rope.theta = 10000.0;
  c.tied_embeddings = true;
  return c;
}

[[nodiscard]] inline std::vector<float> random_values(Rng& rng, std::int64_t count, float deviation) {
  std::vector<float> out = rng.normals(count);
  for (float& x : out) x *= deviation;
  return out;
}

[[nodiscard]] inline std::shared_ptr<const LlamaModel<DenseLinear>> random_model(const ModelConfig& c,
                                                                                 std::uint64_t seed) {
  Rng rng(seed);
  const auto norm = [&](std::int64_t size) {
    std::vector<float> out(static_cast<std::size_t>(size));
    for (float& x : out) x = rng.uniform(0.5F, 1.5F);
    return out;
  };
  const auto linear = [&](std::int64_t rows, std::int64_t cols, bool bias) {
    const float deviation = 1.0F / std::sqrt(static_cast<float>(cols));
    auto weights = std::make_shared<const std::vector<float>>(random_values(rng, rows * cols, deviation));
    return DenseLinear(std::move(weights), rows, cols,
                       bias ? random_values(rng, rows, 0.5F) : std::vector<float>());
  };
  auto model = std::make_shared<LlamaModel<DenseLinear>>();
  model->config = c;
  model->embedding =
      std::make_shared<const std::vector<float>>(random_values(rng, c.vocab_size * c.hidden_size, 1.0F));
  for (std::int64_t i = 0; i < c.layers; ++i) {
    LlamaLayer<DenseLinear> layer;
    layer.input_norm = norm(c.hidden_size);
    layer.post_attention_norm = norm(c.hidden_size);
    if (c.qk_norm) {
      layer.q_norm = norm(c.head_dim);
      layer.k_norm = norm(c.head_dim);
    }
    layer.q = linear(c.q_size(), c.hidden_size, c.attention_bias);
    layer.k = linear(c.kv_size(), c.hidden_size, c.attention_bias);
    layer.v = linear(c.kv_size(), c.hidden_size, c.attention_bias);
    layer.o = linear(c.hidden_size, c.q_size(), false);
    layer.gate = linear(c.intermediate_size, c.hidden_size, false);
    layer.up = linear(c.intermediate_size, c.hidden_size, false);
    layer.down = linear(c.hidden_size, c.intermediate_size, false);
    model->layers.push_back(std::move(layer));
  }
  model->final_norm = norm(c.hidden_size);
  model->head = c.tied_embeddings ? DenseLinear(model->embedding, c.vocab_size, c.hidden_size)
                                  : linear(c.vocab_size, c.hidden_size, false);
  return model;
}

[[nodiscard]] inline std::vector<std::int32_t> random_tokens(Rng& rng, std::int64_t count,
                                                             std::int64_t vocabulary) {
  std::vector<std::int32_t> out(static_cast<std::size_t>(count));
  for (std::int32_t& token : out) token = static_cast<std::int32_t>(rng.below(vocabulary));
  return out;
}

/// One layer's K and V of a context, in double: [tokens][kv_heads * head_dim].
struct ReferenceCache {
  std::vector<std::vector<double>> k;
  std::vector<std::vector<double>> v;
};

namespace detail {

inline std::vector<double> ref_norm(const std::vector<double>& x, std::span<const float> w, double epsilon) {
  double sum = 0.0;
  for (const double value : x) sum += value * value;
  const double scale = 1.0 / std::sqrt(sum / static_cast<double>(x.size()) + epsilon);
  std::vector<double> out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * static_cast<double>(w[i]);
  return out;
}

inline std::vector<double> ref_linear(const DenseLinear& layer, const std::vector<double>& x) {
  std::vector<double> y(static_cast<std::size_t>(layer.rows()));
  for (std::int64_t n = 0; n < layer.rows(); ++n) {
    double sum = layer.bias().empty() ? 0.0 : static_cast<double>(layer.bias()[static_cast<std::size_t>(n)]);
    for (std::int64_t k = 0; k < layer.cols(); ++k) {
      sum += static_cast<double>(layer.weights().row(n)[k]) * x[static_cast<std::size_t>(k)];
    }
    y[static_cast<std::size_t>(n)] = sum;
  }
  return y;
}

/// Head norm, then rotate-half RoPE, of all heads of one token.
inline void ref_position(std::vector<double>& x, std::span<const float> norm, const ModelConfig& c,
                         std::size_t at) {
  const auto dim = static_cast<std::size_t>(c.head_dim);
  for (std::size_t head = 0; head < x.size() / dim; ++head) {
    std::vector<double> h(x.begin() + static_cast<std::ptrdiff_t>(head * dim),
                          x.begin() + static_cast<std::ptrdiff_t>((head + 1) * dim));
    if (!norm.empty()) h = ref_norm(h, norm, c.rms_epsilon);
    for (std::size_t i = 0; i < dim / 2; ++i) {
      const double angle = static_cast<double>(at) *
                           std::pow(c.rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
      x[head * dim + i] = h[i] * std::cos(angle) - h[i + dim / 2] * std::sin(angle);
      x[head * dim + i + dim / 2] = h[i + dim / 2] * std::cos(angle) + h[i] * std::sin(angle);
    }
  }
}

}  // namespace detail

/// Logits of every token, [tokens][vocab], by the textbook and in double. `caches` (one for each layer) holds
/// the past and grows by the tokens; it may come from another model, as a base cache does. stored(x, layer,
/// is_v) is what the cache makes of an element of K, after RoPE, or of V.
template <class Stored>
[[nodiscard]] std::vector<std::vector<double>> reference_forward(const LlamaModel<DenseLinear>& model,
                                                                 std::span<const std::int32_t> tokens,
                                                                 std::vector<ReferenceCache>& caches,
                                                                 const Stored& stored) {
  using namespace detail;
  const ModelConfig& c = model.config;
  caches.resize(model.layers.size());
  const auto dim = static_cast<std::size_t>(c.head_dim);
  std::vector<std::vector<double>> all;
  for (const std::int32_t token : tokens) {
    const float* row = model.embedding->data() + token * c.hidden_size;
    std::vector<double> x(row, row + c.hidden_size);
    for (std::size_t i = 0; i < model.layers.size(); ++i) {
      const LlamaLayer<DenseLinear>& layer = model.layers[i];
      ReferenceCache& cache = caches[i];
      const std::size_t at = cache.k.size();
      const std::vector<double> normed = ref_norm(x, layer.input_norm, c.rms_epsilon);
      std::vector<double> q = ref_linear(layer.q, normed);
      std::vector<double> k = ref_linear(layer.k, normed);
      ref_position(q, layer.q_norm, c, at);
      ref_position(k, layer.k_norm, c, at);
      std::vector<double> v = ref_linear(layer.v, normed);
      for (double& value : k) value = stored(value, i, false);
      for (double& value : v) value = stored(value, i, true);
      cache.k.push_back(std::move(k));
      cache.v.push_back(std::move(v));
      std::vector<double> attended(q.size(), 0.0);
      for (std::size_t head = 0; head < static_cast<std::size_t>(c.heads); ++head) {
        const std::size_t kv = head / static_cast<std::size_t>(c.heads / c.kv_heads);
        std::vector<double> scores(at + 1);
        for (std::size_t s = 0; s <= at; ++s) {
          for (std::size_t d = 0; d < dim; ++d) scores[s] += q[head * dim + d] * cache.k[s][kv * dim + d];
          scores[s] /= std::sqrt(static_cast<double>(dim));
        }
        const double top = *std::max_element(scores.begin(), scores.end());
        double sum = 0.0;
        for (double& s : scores) sum += s = std::exp(s - top);
        for (std::size_t s = 0; s <= at; ++s) {
          for (std::size_t d = 0; d < dim; ++d)
            attended[head * dim + d] += scores[s] / sum * cache.v[s][kv * dim + d];
        }
      }
      const std::vector<double> projected = ref_linear(layer.o, attended);
      for (std::size_t d = 0; d < x.size(); ++d) x[d] += projected[d];
      const std::vector<double> post = ref_norm(x, layer.post_attention_norm, c.rms_epsilon);
      std::vector<double> gate = ref_linear(layer.gate, post);
      const std::vector<double> up = ref_linear(layer.up, post);
      for (std::size_t d = 0; d < gate.size(); ++d) gate[d] = gate[d] / (1.0 + std::exp(-gate[d])) * up[d];
      const std::vector<double> down = ref_linear(layer.down, gate);
      for (std::size_t d = 0; d < x.size(); ++d) x[d] += down[d];
    }
    all.push_back(ref_linear(model.head, ref_norm(x, model.final_norm, c.rms_epsilon)));
  }
  return all;
}

/// The same with a cache that holds everything exactly.
[[nodiscard]] inline std::vector<std::vector<double>> reference_forward(const LlamaModel<DenseLinear>& model,
                                                                        std::span<const std::int32_t> tokens,
                                                                        std::vector<ReferenceCache>& caches) {
  return reference_forward(model, tokens, caches, [](double value, std::size_t, bool) { return value; });
}

/// Largest |got - want| over rows, relative to the largest |want|; NaN counts as infinite.
[[nodiscard]] inline double worst_relative(std::span<const float> got,
                                           const std::vector<std::vector<double>>& want) {
  double worst = 0.0;
  double size = 0.0;
  std::size_t i = 0;
  for (const std::vector<double>& row : want) {
    for (const double value : row) {
      const double off = std::abs(static_cast<double>(got[i++]) - value);
      worst = off <= worst ? worst : (off > worst ? off : HUGE_VAL);
      size = std::max(size, std::abs(value));
    }
  }
  return worst / size;
}

}  // namespace prefillshare::test
