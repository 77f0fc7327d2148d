// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/block.hpp - one block of a Llama-family decoder over a batch of segments: forward with
// its activations kept, and backward.
// Layer: train (host only).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <prefillshare/attention/rope.hpp>
#include <prefillshare/model/config.hpp>
#include <prefillshare/train/attention.hpp>
#include <prefillshare/train/elementwise.hpp>
#include <prefillshare/train/products.hpp>
#include <prefillshare/train/tensor.hpp>

namespace prefillshare {

/// The linear layers of a block, in the order of the forward pass.
enum class BlockLinear : std::uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown };
inline constexpr std::size_t kBlockLinears = 7;  ///< layers of a block

/// y = x weight^T + bias, in memory that belongs to somebody else. bias is null or [weight.rows].
template <TrainScalar T>
struct LinearWeights {
  MatrixView<const T> weight;  ///< [N][K]
  const T* bias = nullptr;     ///< [N], or null
};

/// Where gradients are added; null where none is wanted.
template <TrainScalar T>
struct LinearGradients {
  T* weight = nullptr;  ///< [N][K]
  T* bias = nullptr;    ///< [N]
};

/// What one block computes with; all memory is somebody else's.
template <TrainScalar T>
struct BlockWeights {
  const T* input_norm = nullptr;                        ///< [hidden]
  const T* post_attention_norm = nullptr;               ///< [hidden]
  const T* q_norm = nullptr;                            ///< [head_dim], with qk_norm only
  const T* k_norm = nullptr;                            ///< [head_dim], with qk_norm only
  std::array<LinearWeights<T>, kBlockLinears> linears;  ///< by BlockLinear

  /// One of the layers.
  [[nodiscard]] const LinearWeights<T>& operator[](BlockLinear which) const {
    return linears[static_cast<std::size_t>(which)];
  }
};

/// Where one block's gradients are added; null where none is wanted.
template <TrainScalar T>
struct BlockGradients {
  T* input_norm = nullptr;                                ///< as BlockWeights
  T* post_attention_norm = nullptr;                       ///< as BlockWeights
  T* q_norm = nullptr;                                    ///< as BlockWeights
  T* k_norm = nullptr;                                    ///< as BlockWeights
  std::array<LinearGradients<T>, kBlockLinears> linears;  ///< by BlockLinear

  /// One of the layers.
  [[nodiscard]] LinearGradients<T>& operator[](BlockLinear which) {
    return linears[static_cast<std::size_t>(which)];
  }
};

namespace detail {

/// Rows and columns of a block's linear layers.
[[nodiscard]] inline std::array<std::pair<std::int64_t, std::int64_t>, kBlockLinears> linear_shapes(
    const ModelConfig& c) {
  return {{{c.q_size(), c.hidden_size},
           {c.kv_size(), c.hidden_size},
           {c.kv_size(), c.hidden_size},
           {c.hidden_size, c.q_size()},
           {c.intermediate_size, c.hidden_size},
           {c.intermediate_size, c.hidden_size},
           {c.hidden_size, c.intermediate_size}}};
}

/// Runs a block on up to `tokens` rows and keeps what its backward pass reads. forward() then backward() on
/// the same input; std::bad_alloc where memory is short. Store: as TrainPass.
template <TrainScalar T, class Store = StoreExactly>
class BlockPass {
 public:
  /// `rope` must outlive the pass and cover every position.
  BlockPass(const ModelConfig& config, const RopeTable& rope, std::int64_t tokens, Executor& executor,
            Store store = {})
      : c_(config),
        rope_(rope),
        products_(executor),
        store_(store),
        attention_({config.heads, config.kv_heads, config.head_dim}, executor.workers(), store) {
    for (Tensor<T>* x : {&normed_, &normed2_, &mid_, &d_normed_}) x->resize(tokens * c_.hidden_size);
    for (Tensor<T>* x : {&inverse_, &inverse2_}) x->resize(tokens);
    for (Tensor<T>* x : {&q_, &attended_, &dq_, &d_attended_}) x->resize(tokens * c_.q_size());
    for (Tensor<T>* x : {&k_, &v_, &dk_, &dv_}) x->resize(tokens * c_.kv_size());
    for (Tensor<T>* x : {&gate_, &up_, &act_}) x->resize(tokens * c_.intermediate_size);
    if (c_.qk_norm) {
      q_raw_.resize(tokens * c_.q_size());
      k_raw_.resize(tokens * c_.kv_size());
      inverse_q_.resize(tokens * c_.heads);
      inverse_k_.resize(tokens * c_.kv_heads);
    }
    if constexpr (kRounds) low_.resize(tokens * c_.hidden_size);
    parts_.resize(token_ranges(tokens) * std::max(c_.hidden_size, c_.head_dim));
  }

  [[nodiscard]] Products<T>& products() noexcept { return products_; }
  [[nodiscard]] Executor& executor() const noexcept { return products_.executor(); }

  /// y[tokens][hidden] = the block of x. positions: [tokens]; `layer` picks the segments' prefixes.
  void forward(const BlockWeights<T>& w, std::span<const Segment<T>> segments, const std::int64_t* positions,
               std::int64_t layer, std::int64_t tokens, const T* x, T* y) {
    Executor& ex = executor();
    const std::int64_t h = c_.hidden_size;
    norm_tokens(x, w.input_norm, c_.rms_epsilon, tokens, 1, h, normed_.data(), inverse_.data(), ex);
    store(normed_, tokens * h);
    apply(w[BlockLinear::kQ], normed_, tokens, c_.qk_norm ? q_raw_ : q_);
    apply(w[BlockLinear::kK], normed_, tokens, c_.qk_norm ? k_raw_ : k_);
    apply(w[BlockLinear::kV], normed_, tokens, v_);
    store(c_.qk_norm ? q_raw_ : q_, tokens * c_.q_size());
    store(c_.qk_norm ? k_raw_ : k_, tokens * c_.kv_size());
    store(v_, tokens * c_.kv_size());
    if (c_.qk_norm) {
      norm_tokens(q_raw_.data(), w.q_norm, c_.rms_epsilon, tokens, c_.heads, c_.head_dim, q_.data(),
                  inverse_q_.data(), ex);
      norm_tokens(k_raw_.data(), w.k_norm, c_.rms_epsilon, tokens, c_.kv_heads, c_.head_dim, k_.data(),
                  inverse_k_.data(), ex);
    }
    turn_heads(rope_, positions, tokens, c_.heads, false, q_.data(), ex);
    turn_heads(rope_, positions, tokens, c_.kv_heads, false, k_.data(), ex);
    store(q_, tokens * c_.q_size());
    store(k_, tokens * c_.kv_size());
    attention_.forward(segments, layer, q_.data(), k_.data(), v_.data(), attended_.data(), ex);
    store(attended_, tokens * c_.q_size());
    apply(w[BlockLinear::kO], attended_, tokens, mid_);
    store(mid_, tokens * h);
    add(x, tokens * h, mid_.data());
    norm_tokens(mid_.data(), w.post_attention_norm, c_.rms_epsilon, tokens, 1, h, normed2_.data(),
                inverse2_.data(), ex);
    store(normed2_, tokens * h);
    apply(w[BlockLinear::kGate], normed2_, tokens, gate_);
    apply(w[BlockLinear::kUp], normed2_, tokens, up_);
    for (Tensor<T>* both : {&gate_, &up_}) store(*both, tokens * c_.intermediate_size);
    swiglu(gate_.data(), up_.data(), tokens * c_.intermediate_size, act_.data(), ex);
    store(act_, tokens * c_.intermediate_size);
    const LinearWeights<T>& down = w[BlockLinear::kDown];
    products_.nt(act_.rows(tokens, c_.intermediate_size), down.weight, MatrixView<T>(y, tokens, h));
    add_bias_rows(down.bias, tokens, h, y);
    store_(y, tokens * h);
    add(mid_.data(), tokens * h, y);
  }

  /// In place of dy[tokens][hidden] the gradient of x; the weights' are added to `g`. After forward() with
  /// the same arguments; what it kept is used up.
  void backward(const BlockWeights<T>& w, BlockGradients<T> g, std::span<const Segment<T>> segments,
                const std::int64_t* positions, std::int64_t layer, std::int64_t tokens, const T* x, T* dy) {
    Executor& ex = executor();
    const std::int64_t h = c_.hidden_size;
    const std::int64_t wide = c_.intermediate_size;
    MatrixView<const T> d = lowered(dy, tokens);
    weight_gradient(g[BlockLinear::kDown], d, act_.rows(tokens, wide));
    products_.nn(d, w[BlockLinear::kDown].weight, act_.rows(tokens, wide), false);  // act is used up
    store(act_, tokens * wide);
    swiglu_backward(act_.data(), tokens * wide, gate_.data(), up_.data(), ex);
    for (Tensor<T>* both : {&gate_, &up_}) store(*both, tokens * wide);
    const MatrixView<const T> d_gate(gate_.data(), tokens, wide);
    const MatrixView<const T> d_up(up_.data(), tokens, wide);
    const MatrixView<const T> normed2(normed2_.data(), tokens, h);
    weight_gradient(g[BlockLinear::kGate], d_gate, normed2);
    weight_gradient(g[BlockLinear::kUp], d_up, normed2);
    products_.nn(d_gate, w[BlockLinear::kGate].weight, d_normed_.rows(tokens, h), false);
    products_.nn(d_up, w[BlockLinear::kUp].weight, d_normed_.rows(tokens, h), true);
    store(d_normed_, tokens * h);
    norm_tokens_backward(mid_.data(), w.post_attention_norm, inverse2_.data(), d_normed_.data(), tokens, 1, h,
                         dy, true, g.post_attention_norm, parts_.data(), ex);

    d = lowered(dy, tokens);
    weight_gradient(g[BlockLinear::kO], d, attended_.rows(tokens, c_.q_size()));
    products_.nn(d, w[BlockLinear::kO].weight, d_attended_.rows(tokens, c_.q_size()), false);
    store(d_attended_, tokens * c_.q_size());
    attention_.backward(segments, layer, q_.data(), k_.data(), v_.data(), attended_.data(),
                        d_attended_.data(), dq_.data(), dk_.data(), dv_.data(), ex);
    const auto store_gradients = [&] {
      store(dq_, tokens * c_.q_size());
      for (Tensor<T>* both : {&dk_, &dv_}) store(*both, tokens * c_.kv_size());
    };
    store_gradients();
    turn_heads(rope_, positions, tokens, c_.heads, true, dq_.data(), ex);
    turn_heads(rope_, positions, tokens, c_.kv_heads, true, dk_.data(), ex);
    if (c_.qk_norm) {
      norm_tokens_backward(q_raw_.data(), w.q_norm, inverse_q_.data(), dq_.data(), tokens, c_.heads,
                           c_.head_dim, dq_.data(), false, g.q_norm, parts_.data(), ex);
      norm_tokens_backward(k_raw_.data(), w.k_norm, inverse_k_.data(), dk_.data(), tokens, c_.kv_heads,
                           c_.head_dim, dk_.data(), false, g.k_norm, parts_.data(), ex);
    }
    store_gradients();
    const MatrixView<const T> normed(normed_.data(), tokens, h);
    bool first = true;
    for (const auto& [which, gradient] : {std::pair{BlockLinear::kQ, &dq_}, std::pair{BlockLinear::kK, &dk_},
                                          std::pair{BlockLinear::kV, &dv_}}) {
      const MatrixView<const T> out(gradient->data(), tokens, w[which].weight.rows);
      weight_gradient(g[which], out, normed);
      products_.nn(out, w[which].weight, d_normed_.rows(tokens, h), !first);
      first = false;
    }
    store(d_normed_, tokens * h);
    norm_tokens_backward(x, w.input_norm, inverse_.data(), d_normed_.data(), tokens, 1, h, dy, true,
                         g.input_norm, parts_.data(), ex);
  }

 private:
  static constexpr bool kRounds = !std::is_same_v<Store, StoreExactly>;

  void store(Tensor<T>& x, std::int64_t size) const { store_(x.data(), size); }
  /// The gradient of the residual stream as products read it: it is itself kept as it is.
  [[nodiscard]] MatrixView<const T> lowered(const T* dy, std::int64_t tokens) {
    if constexpr (kRounds) {
      std::copy_n(dy, tokens * c_.hidden_size, low_.data());
      store(low_, tokens * c_.hidden_size);
      return low_.rows(tokens, c_.hidden_size);
    } else {
      return {dy, tokens, c_.hidden_size};
    }
  }

  void apply(const LinearWeights<T>& layer, const Tensor<T>& in, std::int64_t tokens, Tensor<T>& out) {
    products_.nt(in.rows(tokens, layer.weight.cols), layer.weight, out.rows(tokens, layer.weight.rows));
    add_bias_rows(layer.bias, tokens, layer.weight.rows, out.data());
  }

  void weight_gradient(const LinearGradients<T>& g, MatrixView<const T> d, MatrixView<const T> in) {
    if (g.weight != nullptr) products_.tn(d, in, MatrixView<T>(g.weight, d.cols, in.cols), true);
    if (g.bias != nullptr) add_column_sums(d.data, d.rows, d.cols, g.bias);
  }

  static void add_bias_rows(const T* bias, std::int64_t tokens, std::int64_t width, T* y) {
    if (bias == nullptr) return;
    for (std::int64_t t = 0; t < tokens; ++t)
      TrainArray<T>(y + t * width, width) += TrainConstArray<T>(bias, width);
  }

  void add(const T* x, std::int64_t size, T* y) {
    for_elements(size, executor(), [&](std::int64_t first, std::int64_t count) {
      TrainArray<T>(y + first, count) += TrainConstArray<T>(x + first, count);
    });
  }

  const ModelConfig c_;
  const RopeTable& rope_;
  Products<T> products_;
  Store store_;
  SegmentAttention<T, Store> attention_;
  Tensor<T> normed_, normed2_, mid_, d_normed_;       // [tokens][hidden]
  Tensor<T> low_;                                     // the same, where Store rounds
  Tensor<T> inverse_, inverse2_;                      // [tokens]
  Tensor<T> q_, q_raw_, attended_, dq_, d_attended_;  // [tokens][heads][head_dim]
  Tensor<T> k_, k_raw_, v_, dk_, dv_;                 // [tokens][kv_heads][head_dim]
  Tensor<T> inverse_q_, inverse_k_;                   // [tokens][heads], [tokens][kv_heads]
  Tensor<T> gate_, up_, act_;                         // [tokens][intermediate]
  Tensor<T> parts_;                                   // [ranges][hidden]
};

}  // namespace detail
}  // namespace prefillshare
