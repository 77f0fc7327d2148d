// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/forward.hpp - the Llama-family forward pass on the CPU, over a paged KV cache.
// Layer: model (host only).
// See: PrefillShare (arXiv 2602.12029) equations 2 to 4: (y, dC) = F(x, C_past).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include <Eigen/Core>

#include <codegemm/base/aligned_buffer.hpp>
#include <prefillshare/attention/paged.hpp>
#include <prefillshare/attention/rope.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/model/after_layer.hpp>
#include <prefillshare/model/llama.hpp>

namespace prefillshare {

/// The activations of up to max_tokens tokens and the scratch memory of the layers, allocated once by the
/// caller and used by one forward pass at a time.
class ForwardWorkspace {
 public:
  /// Room for `max_tokens` tokens a call, on an executor of `workers`, over caches of up to `max_context`
  /// tokens. kInvalidArgument for numbers below 1; kOutOfMemory.
  template <LinearLayer Linear>
  [[nodiscard]] static Result<ForwardWorkspace> create(const LlamaModel<Linear>& model,
                                                       std::int64_t max_tokens, std::int64_t max_context,
                                                       int workers) {
    if (max_tokens < 1 || max_context < 1 || workers < 1) {
      return error(StatusCode::kInvalidArgument, "ForwardWorkspace for ", max_tokens,
                   " tokens, a context of ", max_context, " and ", workers, " workers");
    }
    const ModelConfig& c = model.config;
    Result<RopeTable> rope = RopeTable::create(c.rope, max_context);
    if (!rope.ok()) return rope.status();
    std::size_t scratch =
        workspace_bytes(PagedAttentionShape{max_tokens, max_context, static_cast<int>(c.heads),
                                            static_cast<int>(c.kv_heads), static_cast<int>(c.head_dim)},
                        workers);
    for_each_linear(model, [&](const std::string&, const Linear& layer) {
      scratch = std::max(scratch, layer.workspace_bytes(max_tokens, workers));
    });
    ForwardWorkspace out;
    out.max_tokens_ = max_tokens;
    out.workers_ = workers;
    out.rope = std::move(rope).value();
    const auto reserve = [&](AlignedFloats& buffer, std::int64_t width) {
      return buffer.reserve(static_cast<std::size_t>(max_tokens * width));
    };
    if (!reserve(out.hidden, c.hidden_size) || !reserve(out.normed, c.hidden_size) ||
        !reserve(out.q, c.q_size()) || !reserve(out.k, c.kv_size()) || !reserve(out.v, c.kv_size()) ||
        !reserve(out.attended, c.q_size()) || !reserve(out.gate, c.intermediate_size) ||
        !reserve(out.up, c.intermediate_size) || !out.scratch_.reserve(scratch)) {
      return error(StatusCode::kOutOfMemory, "ForwardWorkspace: no memory for ", max_tokens, " tokens and ",
                   scratch, " bytes of scratch");
    }
    return out;
  }

  [[nodiscard]] std::int64_t max_tokens() const noexcept { return max_tokens_; }  ///< tokens of a pass
  /// Positions of a sequence.
  [[nodiscard]] std::int64_t max_context() const noexcept { return rope.positions(); }
  /// Of the executor it was made for, at most.
  [[nodiscard]] int workers() const noexcept { return workers_; }

  /// Scratch of the layer that runs now, aligned to 64 bytes.
  [[nodiscard]] std::span<std::byte> scratch() noexcept { return scratch_.span(); }

  /// Aligned, so that vector and scalar code take the same elements on every run and give the same bits.
  using AlignedFloats = codegemm::AlignedBuffer<float>;

  RopeTable rope;          ///< of the model, for max_context() positions
  AlignedFloats hidden;    ///< [tokens][hidden], the residual stream
  AlignedFloats normed;    ///< [tokens][hidden]
  AlignedFloats q;         ///< [tokens][heads][head_dim]
  AlignedFloats k;         ///< [tokens][kv_heads][head_dim]
  AlignedFloats v;         ///< [tokens][kv_heads][head_dim]
  AlignedFloats attended;  ///< [tokens][heads][head_dim]
  AlignedFloats gate;      ///< [tokens][intermediate]
  AlignedFloats up;        ///< [tokens][intermediate]

 private:
  ForwardWorkspace() = default;

  std::int64_t max_tokens_ = 0;
  int workers_ = 1;
  codegemm::AlignedBuffer<std::byte> scratch_;
};

/// Where a forward pass reads the past and writes its own KV: the blocks of one sequence, already reserved.
struct KvTarget {
  HostKvStorage* storage = nullptr;  ///< where the blocks lie
  std::span<const BlockId> blocks;   ///< cover positions 0 .. first_position + tokens - 1
  std::int64_t first_position = 0;   ///< tokens that are in the cache already
};

/// One sequence's consecutive tokens in a pass over several sequences.
struct ForwardItem {
  std::span<const std::int32_t> tokens;  ///< at least one
  KvTarget kv;                           ///< their sequence
};

namespace detail {

/// out[t] = weight * x[t] / rms(x[t]), for each row of `width` values.
inline void rms_norm(const float* x, std::span<const float> weight, double epsilon, std::int64_t rows,
                     float* out) {
  const auto width = static_cast<Eigen::Index>(weight.size());
  const Eigen::Map<const Eigen::ArrayXf> w(weight.data(), width);
  for (std::int64_t t = 0; t < rows; ++t) {
    const Eigen::Map<const Eigen::ArrayXf> in(x + t * width, width);
    const float mean_square = in.square().sum() / static_cast<float>(width);
    const float scale = 1.0F / std::sqrt(mean_square + static_cast<float>(epsilon));
    Eigen::Map<Eigen::ArrayXf>(out + t * width, width) = in * scale * w;
  }
}

/// gate = silu(gate) * up, elementwise.
inline void swiglu(std::span<float> gate, std::span<const float> up) {
  Eigen::Map<Eigen::ArrayXf> g(gate.data(), static_cast<Eigen::Index>(gate.size()));
  const Eigen::Map<const Eigen::ArrayXf> u(up.data(), static_cast<Eigen::Index>(up.size()));
  g = g / (1.0F + (-g).exp()) * u;
}

inline void add_to(std::span<float> sum, const float* x) {
  const auto size = static_cast<Eigen::Index>(sum.size());
  Eigen::Map<Eigen::ArrayXf>(sum.data(), size) += Eigen::Map<const Eigen::ArrayXf>(x, size);
}

/// Runs body(first, count) over tokens in pieces that are worth a task.
template <class Body>
void for_token_ranges(std::int64_t tokens, Executor& executor, Body&& body) {
  constexpr std::int64_t kTokensPerTask = 32;
  codegemm::parallel_for(executor, (tokens + kTokensPerTask - 1) / kTokensPerTask,
                         [&](std::int64_t task, int) {
                           const std::int64_t first = task * kTokensPerTask;
                           body(first, std::min(kTokensPerTask, tokens - first));
                         });
}

/// One forward pass in progress: the operands that every step of a layer needs. Linear layers see the tokens
/// of all items as one matrix, item after item; positions, cache and attention are each item's own.
template <LinearLayer Linear>
class Forward {
 public:
  Forward(const LlamaModel<Linear>& model, std::span<const ForwardItem> items, ForwardWorkspace& workspace,
          Executor& executor)
      : model_(model), c_(model.config), items_(items), ws_(workspace), executor_(executor) {
    for (const ForwardItem& item : items) tokens_ += std::ssize(item.tokens);
  }

  void embed() {
    float* to = ws_.hidden.data();
    for (const ForwardItem& item : items_) {
      for (const std::int32_t token : item.tokens) {
        std::copy_n(model_.embedding->data() + token * c_.hidden_size, c_.hidden_size, to);
        to += c_.hidden_size;
      }
    }
  }

  /// Norm, k and v of one layer, written to the cache. All that the last layer of a prefill module has to do.
  Status write_cache(const LlamaLayer<Linear>& layer, int index) {
    for_token_ranges(tokens_, executor_, [&](std::int64_t first, std::int64_t count) {
      rms_norm(ws_.hidden.data() + first * c_.hidden_size, layer.input_norm, c_.rms_epsilon, count,
               ws_.normed.data() + first * c_.hidden_size);
    });
    if (Status s = apply(layer.k, ws_.normed, ws_.k); !s.ok()) return s;
    if (Status s = apply(layer.v, ws_.normed, ws_.v); !s.ok()) return s;
    if (Status s = position_heads(ws_.k, layer.k_norm, c_.kv_heads); !s.ok()) return s;
    return for_each_item([&](const ForwardItem& item, std::int64_t first, std::int64_t count) {
      return append_kv(item.kv.storage->layer(index), item.kv.blocks, item.kv.first_position,
                       rows_of(ws_.k, c_.kv_size(), first, count),
                       rows_of(ws_.v, c_.kv_size(), first, count));
    });
  }

  Status attend(const LlamaLayer<Linear>& layer, int index) {
    if (Status s = apply(layer.q, ws_.normed, ws_.q); !s.ok()) return s;
    if (Status s = position_heads(ws_.q, layer.q_norm, c_.heads); !s.ok()) return s;
    Status attended = for_each_item([&](const ForwardItem& item, std::int64_t first, std::int64_t count) {
      PagedAttentionArgs args;
      args.kv = item.kv.storage->layer(index);
      args.blocks = item.kv.blocks;
      args.first_position = item.kv.first_position;
      args.q = rows_of(ws_.q, c_.q_size(), first, count);
      args.out = rows_of(ws_.attended, c_.q_size(), first, count);
      args.heads = static_cast<int>(c_.heads);
      args.workspace = ws_.scratch();
      return paged_attention(args, executor_);
    });
    if (!attended.ok()) return attended;
    return add_projection(layer.o, ws_.attended);
  }

  Status feed_forward(const LlamaLayer<Linear>& layer) {
    for_token_ranges(tokens_, executor_, [&](std::int64_t first, std::int64_t count) {
      rms_norm(ws_.hidden.data() + first * c_.hidden_size, layer.post_attention_norm, c_.rms_epsilon, count,
               ws_.normed.data() + first * c_.hidden_size);
    });
    if (Status s = apply(layer.gate, ws_.normed, ws_.gate); !s.ok()) return s;
    if (Status s = apply(layer.up, ws_.normed, ws_.up); !s.ok()) return s;
    for_token_ranges(tokens_, executor_, [&](std::int64_t first, std::int64_t count) {
      const auto offset = static_cast<std::size_t>(first * c_.intermediate_size);
      const auto size = static_cast<std::size_t>(count * c_.intermediate_size);
      swiglu(ws_.gate.span().subspan(offset, size), ws_.up.span().subspan(offset, size));
    });
    return add_projection(layer.down, ws_.gate);
  }

  /// The logits of each item's last `logits.rows / items` tokens, item after item.
  Status head(MatrixView<float> logits) {
    const std::int64_t rows = logits.rows / std::ssize(items_);
    float* to = ws_.normed.data();
    std::int64_t end = 0;
    for (const ForwardItem& item : items_) {
      end += std::ssize(item.tokens);
      rms_norm(ws_.hidden.data() + (end - rows) * c_.hidden_size, model_.final_norm, c_.rms_epsilon, rows,
               to);
      to += rows * c_.hidden_size;
    }
    return model_.head.forward(MatrixView<const float>(ws_.normed.data(), logits.rows, c_.hidden_size),
                               logits, ws_.scratch(), executor_);
  }

 private:
  Status apply(const Linear& layer, const codegemm::AlignedBuffer<float>& in,
               codegemm::AlignedBuffer<float>& out) {
    return layer.forward(MatrixView<const float>(in.data(), tokens_, layer.cols()),
                         MatrixView<float>(out.data(), tokens_, layer.rows()), ws_.scratch(), executor_);
  }

  /// hidden += layer(in). `normed` is free at this point and takes the product.
  Status add_projection(const Linear& layer, const codegemm::AlignedBuffer<float>& in) {
    if (Status s = apply(layer, in, ws_.normed); !s.ok()) return s;
    add_to(ws_.hidden.span().first(static_cast<std::size_t>(tokens_ * c_.hidden_size)), ws_.normed.data());
    return {};
  }

  /// Optional head norm, then RoPE at the tokens' positions, in place.
  Status position_heads(codegemm::AlignedBuffer<float>& x, std::span<const float> norm, std::int64_t heads) {
    const std::int64_t width = heads * c_.head_dim;
    if (!norm.empty()) {
      for_token_ranges(tokens_, executor_, [&](std::int64_t first, std::int64_t count) {
        float* rows = x.data() + first * width;
        rms_norm(rows, norm, c_.rms_epsilon, count * heads, rows);
      });
    }
    return for_each_item([&](const ForwardItem& item, std::int64_t first, std::int64_t count) {
      return ws_.rope.apply(rows_of(x, width, first, count), item.kv.first_position);
    });
  }

  /// body(item, its first row, its rows) until one fails.
  template <class Body>
  Status for_each_item(Body&& body) {
    std::int64_t first = 0;
    for (const ForwardItem& item : items_) {
      const std::int64_t count = std::ssize(item.tokens);
      if (Status s = body(item, first, count); !s.ok()) return s;
      first += count;
    }
    return {};
  }
  [[nodiscard]] static MatrixView<float> rows_of(codegemm::AlignedBuffer<float>& x, std::int64_t width,
                                                 std::int64_t first, std::int64_t count) {
    return MatrixView<float>(x.data() + first * width, count, width);
  }

  const LlamaModel<Linear>& model_;
  const ModelConfig& c_;
  std::span<const ForwardItem> items_;
  std::int64_t tokens_ = 0;  // of all items
  ForwardWorkspace& ws_;
  Executor& executor_;
};

/// What every item of a pass must be; the total of tokens is checked by the caller.
[[nodiscard]] inline Status check_item(const ModelConfig& config, const ForwardItem& item,
                                       const ForwardWorkspace& workspace) {
  const std::int64_t count = std::ssize(item.tokens);
  if (item.kv.storage == nullptr) return error(StatusCode::kNullPointer, "forward: no KV storage");
  if (item.kv.first_position < 0 || item.kv.first_position + count > workspace.max_context()) {
    return error(StatusCode::kInvalidArgument, "tokens at positions ", item.kv.first_position, " to ",
                 item.kv.first_position + count - 1, " in a workspace for contexts of ",
                 workspace.max_context(), " tokens");
  }
  for (std::size_t t = 0; t < item.tokens.size(); ++t) {
    if (item.tokens[t] < 0 || item.tokens[t] >= config.vocab_size) {
      return error(StatusCode::kInvalidArgument, "token ", t, " has id ", item.tokens[t],
                   ", the vocabulary has ", config.vocab_size);
    }
  }
  return {};
}

[[nodiscard]] inline Status check_pass(std::int64_t tokens, const ForwardWorkspace& workspace,
                                       const Executor& executor) {
  if (tokens > workspace.max_tokens()) {
    return error(StatusCode::kInvalidArgument, "forward of ", tokens, " tokens in a workspace for ",
                 workspace.max_tokens());
  }
  if (executor.workers() > workspace.workers()) {
    return error(StatusCode::kInvalidArgument, "executor of ", executor.workers(), " workers, workspace for ",
                 workspace.workers());
  }
  return {};
}

/// The layers of a pass whose operands are checked.
template <LinearLayer Linear, class AfterLayer>
[[nodiscard]] Status run_layers(const LlamaModel<Linear>& model, std::span<const ForwardItem> items,
                                MatrixView<float> logits, ForwardWorkspace& workspace, Executor& executor,
                                AfterLayer&& after_layer) {
  Forward<Linear> pass(model, items, workspace, executor);
  pass.embed();
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const LlamaLayer<Linear>& layer = model.layers[i];
    const int index = static_cast<int>(i);
    if (Status s = pass.write_cache(layer, index); !s.ok()) return s;
    if (Status s = after_layer(index); !s.ok()) return s;
    if (i + 1 == model.layers.size() && logits.rows == 0) break;
    if (Status s = pass.attend(layer, index); !s.ok()) return s;
    if (Status s = pass.feed_forward(layer); !s.ok()) return s;
  }
  return logits.rows > 0 ? pass.head(logits) : Status();
}

}  // namespace detail

/// Runs `tokens` at positions kv.first_position onwards, writes their KV and, where asked, their logits.
///
/// logits.rows says which: 0 none (a prefill module: the last layer then stops after its KV, since nothing
/// reads its output), 1 those of the last token, tokens.size() those of all; logits.cols = vocab_size.
/// after_layer(layer) -> Status: see IgnoreLayers.
/// Errors: kInvalidArgument for a token outside of the vocabulary, too many tokens for the workspace or a
/// context past what it was made for; kShapeMismatch for logits of another shape.
template <LinearLayer Linear, class AfterLayer = IgnoreLayers>
[[nodiscard]] Status forward(const LlamaModel<Linear>& model, std::span<const std::int32_t> tokens,
                             const KvTarget& kv, MatrixView<float> logits, ForwardWorkspace& workspace,
                             Executor& executor, AfterLayer&& after_layer = {}) {
  const ModelConfig& c = model.config;
  const std::int64_t count = std::ssize(tokens);
  if (count == 0) return {};
  const ForwardItem item{tokens, kv};
  if (Status s = detail::check_pass(count, workspace, executor); !s.ok()) return s;
  if (Status s = detail::check_item(c, item, workspace); !s.ok()) return s;
  if (logits.rows < 0 || logits.rows > count || (logits.rows > 0 && logits.cols != c.vocab_size)) {
    return error(StatusCode::kShapeMismatch, "logits are ", logits.rows, " x ", logits.cols,
                 ", the pass has ", count, " tokens and the vocabulary ", c.vocab_size);
  }
  return detail::run_layers(model, std::span(&item, 1), logits, workspace, executor,
                            std::forward<AfterLayer>(after_layer));
}

/// The same for tokens of several sequences at once, each with its own blocks and positions, so that the
/// weights are read once for all of them: continuous batching. No two items write the same blocks.
///
/// logits.rows is 0 (none) or items.size(): those of each item's last token.
/// With one token an item, a linear layer that treats each token alike (DenseLinear up to kFewTokens) and
/// rows that fill cache lines (hidden_size and intermediate_size multiples of 16), an item's logits and KV
/// are those of forward() bit for bit, whatever else is in the batch; otherwise up to rounding. Errors: those
/// of forward(), naming the item; kInvalidArgument for an item without tokens.
template <LinearLayer Linear, class AfterLayer = IgnoreLayers>
[[nodiscard]] Status forward_batch(const LlamaModel<Linear>& model, std::span<const ForwardItem> items,
                                   MatrixView<float> logits, ForwardWorkspace& workspace, Executor& executor,
                                   AfterLayer&& after_layer = {}) {
  const ModelConfig& c = model.config;
  if (items.empty()) return {};
  std::int64_t total = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    Status status = items[i].tokens.empty() ? error(StatusCode::kInvalidArgument, "no tokens")
                                            : detail::check_item(c, items[i], workspace);
    if (!status.ok()) return status.with_prefix(codegemm::concat("item ", i));
    total += std::ssize(items[i].tokens);
  }
  if (Status s = detail::check_pass(total, workspace, executor); !s.ok()) return s;
  if (logits.rows != 0 && (logits.rows != std::ssize(items) || logits.cols != c.vocab_size)) {
    return error(StatusCode::kShapeMismatch, "logits are ", logits.rows, " x ", logits.cols,
                 ", the pass has ", items.size(), " items and the vocabulary ", c.vocab_size);
  }
  return detail::run_layers(model, items, logits, workspace, executor, std::forward<AfterLayer>(after_layer));
}

}  // namespace prefillshare
