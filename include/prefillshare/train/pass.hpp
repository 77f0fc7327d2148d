// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/pass.hpp - loss and gradients of a whole decoder over a batch of segments; activations
// are recomputed block by block.
// Layer: train (host only).
// See: PrefillShare (arXiv 2602.12029) equation 7.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/train/block.hpp>
#include <prefillshare/train/trainable_model.hpp>

namespace prefillshare {

/// Sequences one after the other in rows, and the tokens that some rows are to predict. Segments cover the
/// rows in order, without gaps.
template <TrainScalar T>
struct LossBatch {
  std::vector<std::int32_t> tokens;     ///< [rows]
  std::vector<Segment<T>> segments;     ///< the rows cut into sequences
  std::vector<std::int64_t> loss_rows;  ///< ascending
  std::vector<std::int32_t> labels;     ///< [loss_rows]: the next token at each of them
};

/// The memory of passes of up to `rows` rows: one block's activations and the residual stream between blocks.
/// Store is called with all that a pass on a device with narrower storage (train/cuda) would store in it:
/// activations, gradients of them and composed weights, not the residual stream and its gradient.
template <TrainScalar T, class Store = StoreExactly>
class TrainPass {
 public:
  /// Positions up to max_context. kInvalidArgument for numbers below 1; kOutOfMemory. The executor must
  /// outlive the pass.
  [[nodiscard]] static Result<TrainPass> create(const ModelConfig& config, std::int64_t max_rows,
                                                std::int64_t max_context, Executor& executor,
                                                Store store = {}) {
    if (max_rows < 1 || max_context < 1) {
      return error(StatusCode::kInvalidArgument, "TrainPass for ", max_rows, " rows and a context of ",
                   max_context);
    }
    if (Status s = validate(config); !s.ok()) return s;
    Result<RopeTable> rope = RopeTable::create(config.rope, max_context);
    if (!rope.ok()) return rope.status();
    try {
      TrainPass out(config, store);
      out.max_rows_ = max_rows;
      out.rope_ = std::make_unique<RopeTable>(*std::move(rope));
      out.block_ =
          std::make_unique<detail::BlockPass<T, Store>>(config, *out.rope_, max_rows, executor, store);
      const std::int64_t rows = max_rows * config.hidden_size;
      for (std::int64_t i = 0; i <= config.layers; ++i) out.stream_.emplace_back(rows);
      for (Tensor<T>* x : {&out.gradient_, &out.chosen_, &out.normed_, &out.d_normed_}) x->resize(rows);
      out.inverse_.resize(max_rows);
      out.parts_.resize(detail::token_ranges(max_rows) * config.hidden_size);
      out.chunk_ = std::clamp<std::int64_t>((std::int64_t{1} << 24) / config.vocab_size, 1, max_rows);
      out.logits_.resize(out.chunk_ * config.vocab_size);
      return out;
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "TrainPass: no memory for ", max_rows, " rows of ",
                   config.layers, " blocks");
    }
  }

  /// losses[i] = -log p(labels[i]) at loss_rows[i]. With `backward` the gradient of scale * (their sum) is
  /// added to the model's. Errors: kInvalidArgument for a batch that breaks its own rules, is larger than the
  /// pass or has tokens outside of the vocabulary; kShapeMismatch for another config; kOutOfMemory.
  [[nodiscard]] Status run(TrainableModel<T>& model, const LossBatch<T>& batch, bool backward, T scale,
                           std::vector<double>& losses) {
    if (Status s = check(model.config(), batch); !s.ok()) return s;
    try {
      losses.assign(batch.loss_rows.size(), 0.0);
      forward(model, batch);
      head(model, batch, backward, scale, losses);
      if (backward) back(model, batch);
      return {};
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "TrainPass: no memory for ", batch.tokens.size(), " rows");
    }
  }

  [[nodiscard]] std::int64_t max_rows() const noexcept { return max_rows_; }  ///< of a batch
  /// Positions of a sequence, its prefix included.
  [[nodiscard]] std::int64_t max_context() const noexcept { return rope_->positions(); }
  /// For TrainableModel.
  [[nodiscard]] detail::Products<T>& products() noexcept { return block_->products(); }

 private:
  TrainPass(const ModelConfig& config, Store store) : c_(config), store_(store) {}

  [[nodiscard]] Status check(const ModelConfig& config, const LossBatch<T>& batch) const {
    const auto rows = static_cast<std::int64_t>(batch.tokens.size());
    const auto wrong = [](const auto&... parts) {
      return error(StatusCode::kInvalidArgument, "LossBatch: ", parts...);
    };
    if (!(config == c_)) return error(StatusCode::kShapeMismatch, "TrainPass: made for another config");
    if (rows > max_rows_) return wrong(rows, " rows, the pass is for ", max_rows_);
    std::int64_t at = 0;
    for (const Segment<T>& s : batch.segments) {
      if (s.first != at || s.count < 1 || s.prefix < 0 || s.prefix > s.prefix_stride ||
          s.prefix + s.count > max_context() || s.count > rows - at) {
        return wrong("a segment of ", s.count, " rows at row ", s.first, " behind ", s.prefix, " of ",
                     s.prefix_stride, " tokens; rows ", rows, ", context at most ", max_context());
      }
      if (s.prefix > 0 && (s.keys == nullptr || s.values == nullptr))
        return error(StatusCode::kNullPointer, "LossBatch: a prefix without keys or values");
      at += s.count;
    }
    if (at != rows) return wrong("segments cover ", at, " of ", rows, " rows");
    if (batch.labels.size() != batch.loss_rows.size())
      return wrong(batch.labels.size(), " labels for ", batch.loss_rows.size(), " rows");
    for (const auto* ids : {&batch.tokens, &batch.labels}) {
      for (const std::int32_t id : *ids) {
        if (id < 0 || id >= c_.vocab_size) return wrong("token ", id, ", the vocabulary has ", c_.vocab_size);
      }
    }
    std::int64_t last = -1;
    for (const std::int64_t row : batch.loss_rows) {
      if (row <= last || row >= rows) return wrong("loss row ", row, " behind ", last, ", rows ", rows);
      last = row;
    }
    return {};
  }

  void forward(TrainableModel<T>& model, const LossBatch<T>& batch) {
    positions_.clear();
    for (const Segment<T>& s : batch.segments) {
      for (std::int64_t i = 0; i < s.count; ++i) positions_.push_back(s.prefix + i);
    }
    const std::int64_t h = c_.hidden_size;
    const T* const table = model.embedding();
    for (std::size_t t = 0; t < batch.tokens.size(); ++t)
      std::copy_n(table + batch.tokens[t] * h, h, stream_[0].data() + static_cast<std::int64_t>(t) * h);
    const auto rows = static_cast<std::int64_t>(batch.tokens.size());
    for (std::int64_t i = 0; i < c_.layers; ++i) {
      block_->forward(model.block(i, products(), store_), batch.segments, positions_.data(), i, rows,
                      stream(i).data(), stream(i + 1).data());
    }
  }

  /// Losses; with `backward` gradient_ becomes that of the last block's output.
  void head(TrainableModel<T>& model, const LossBatch<T>& batch, bool backward, T scale,
            std::vector<double>& losses) {
    Executor& ex = block_->executor();
    const std::int64_t h = c_.hidden_size;
    const auto count = static_cast<std::int64_t>(batch.loss_rows.size());
    const T* const last = stream(c_.layers).data();
    for (std::int64_t i = 0; i < count; ++i)
      std::copy_n(last + batch.loss_rows[static_cast<std::size_t>(i)] * h, h, chosen_.data() + i * h);
    detail::norm_tokens(chosen_.data(), model.final_norm(), c_.rms_epsilon, count, 1, h, normed_.data(),
                        inverse_.data(), ex);
    store_(normed_.data(), count * h);
    const LinearWeights<T> w = model.head(products(), store_);
    const LinearGradients<T> g = backward ? model.head_gradients() : LinearGradients<T>{};
    for (std::int64_t first = 0; first < count; first += chunk_) {
      const std::int64_t size = std::min(chunk_, count - first);
      const MatrixView<const T> in(normed_.data() + first * h, size, h);
      const MatrixView<T> logits(logits_.data(), size, c_.vocab_size);
      products().nt(in, w.weight, logits);
      codegemm::parallel_for(ex, size, [&](std::int64_t i, int) {
        const auto at = static_cast<std::size_t>(first + i);
        losses[at] = detail::cross_entropy_row(logits.row(i), c_.vocab_size, batch.labels[at], scale);
      });
      if (!backward) continue;
      store_(logits_.data(), size * c_.vocab_size);
      products().nn(logits, w.weight, MatrixView<T>(d_normed_.data() + first * h, size, h), false);
      if (g.weight != nullptr) products().tn(logits, in, MatrixView<T>(g.weight, c_.vocab_size, h), true);
    }
    if (!backward) return;
    store_(d_normed_.data(), count * h);
    model.collect_head(products());
    detail::norm_tokens_backward(chosen_.data(), model.final_norm(), inverse_.data(), d_normed_.data(), count,
                                 1, h, d_normed_.data(), false, model.final_norm_gradient(), parts_.data(),
                                 ex);
    std::fill_n(gradient_.data(), static_cast<std::int64_t>(batch.tokens.size()) * h, T{0});
    for (std::int64_t i = 0; i < count; ++i) {
      std::copy_n(d_normed_.data() + i * h, h,
                  gradient_.data() + batch.loss_rows[static_cast<std::size_t>(i)] * h);
    }
  }

  void back(TrainableModel<T>& model, const LossBatch<T>& batch) {
    const auto rows = static_cast<std::int64_t>(batch.tokens.size());
    for (std::int64_t i = c_.layers - 1; i >= 0; --i) {
      const BlockWeights<T> w = model.block(i, products(), store_);
      const T* const x = stream(i).data();
      if (i + 1 < c_.layers) {  // the last block's activations are still there
        block_->forward(w, batch.segments, positions_.data(), i, rows, x, stream(i + 1).data());
      }
      block_->backward(w, model.block_gradients(i), batch.segments, positions_.data(), i, rows, x,
                       gradient_.data());
      model.collect(i, products());
    }
    T* const table = model.embedding_gradient();
    if (table == nullptr) return;
    const std::int64_t h = c_.hidden_size;
    for (std::int64_t t = 0; t < rows; ++t) {
      detail::TrainArray<T>(table + batch.tokens[static_cast<std::size_t>(t)] * h, h) +=
          detail::TrainConstArray<T>(gradient_.data() + t * h, h);
    }
  }

  [[nodiscard]] Tensor<T>& stream(std::int64_t i) { return stream_[static_cast<std::size_t>(i)]; }

  ModelConfig c_;
  Store store_;
  std::int64_t max_rows_ = 0;
  std::unique_ptr<RopeTable> rope_;
  std::unique_ptr<detail::BlockPass<T, Store>> block_;
  std::vector<std::int64_t> positions_;   // [rows]
  std::vector<Tensor<T>> stream_;         // [layers + 1] of [rows][hidden]
  Tensor<T> gradient_;                    // [rows][hidden], of the residual stream
  Tensor<T> chosen_, normed_, d_normed_;  // [loss rows][hidden]
  Tensor<T> inverse_;                     // [loss rows]
  Tensor<T> parts_;                       // [ranges][hidden]
  Tensor<T> logits_;                      // [chunk][vocab]
  std::int64_t chunk_ = 1;
};

}  // namespace prefillshare
