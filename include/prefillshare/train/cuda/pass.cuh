// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/pass.cuh - loss and gradients of a whole decoder over a batch of segments on the
// GPU.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
// See: PrefillShare (arXiv 2602.12029) equation 7; prefillshare/train/pass.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/cache_forward.cuh>
#include <prefillshare/train/cuda/loss_head.cuh>
#include <prefillshare/train/cuda/pass_graphs.cuh>

namespace prefillshare::cuda {

/// LossBatch with prefixes on the device: sequences one after the other in rows, and the tokens that some
/// rows are to predict. Segments cover the rows in order, without gaps; segment i's prefix is the next
/// segments[i].prefix rows of `prefixes`.
template <TrainStorage S>
struct DeviceLossBatch {
  /// As Segment, its prefix in `prefixes`.
  struct Piece {
    std::int64_t count = 0;   ///< rows
    std::int64_t prefix = 0;  ///< tokens before them
  };
  std::vector<std::int32_t> tokens;     ///< [rows]
  std::vector<Piece> segments;          ///< the rows cut into sequences
  std::vector<std::int32_t> loss_rows;  ///< ascending
  std::vector<std::int32_t> labels;     ///< [loss_rows]: the next token at each of them
  DevicePrefixView<S> prefixes;         ///< device memory, read by the pass
  /// [loss_rows][hidden], device memory: what hidden() gives of a teacher at these rows. Its softmax is
  /// learned in place of the labels. Null: no teacher.
  const S* teacher = nullptr;
  const S* teacher_head = nullptr;  ///< [vocab][hidden], device memory: the teacher's output layer

  /// No rows, no prefixes, no teacher.
  void clear() {
    tokens.clear();
    segments.clear();
    loss_rows.clear();
    labels.clear();
    prefixes = {};
    teacher = teacher_head = nullptr;
  }
};

/// What the linear layers of one block read and what the block gives, a row each; device memory of the pass,
/// as it is until the pass's next call.
template <TrainStorage S>
struct DeviceBlockInputs {
  const S* qkv = nullptr;      ///< [rows][hidden]
  const S* o = nullptr;        ///< [rows][heads * head_dim]
  const S* gate_up = nullptr;  ///< [rows][hidden]
  const S* down = nullptr;     ///< [rows][intermediate]
  const float* out = nullptr;  ///< [rows][hidden], the residual stream behind the block
};

/// What of a pass is kept for its backward half.
enum class Activations : std::uint8_t {
  kKept,        ///< all: some 19 KB a row and block at hidden size 576
  kRecomputed,  ///< the residual stream between blocks; blocks run once more, as on the CPU
};

/// The memory of passes of up to `rows` rows. One thread, one stream. S: TrainStorage.
template <TrainStorage S>
class DeviceTrainPass {
 public:
  /// Positions up to max_context. kInvalidArgument for numbers below 1; kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceTrainPass> create(const ModelConfig& config, std::int64_t max_rows,
                                                      std::int64_t max_context, Activations activations,
                                                      const Device& device, cudaStream_t stream) {
    if (max_rows < 1 || max_context < 1 || max_rows > kMostRows) {
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceTrainPass for ", max_rows,
                             " rows and a context of ", max_context);
    }
    if (Status s = prefillshare::validate(config); !s.ok()) return s;
    Result<detail::TrainStream> ts = detail::TrainStream::create(device, stream);
    if (!ts.ok()) return ts.status();
    Result<detail::DeviceRope> rope = detail::DeviceRope::create(config.rope, max_context);
    if (!rope.ok()) return rope.status();
    DeviceTrainPass out(*std::move(ts), config);
    out.max_rows_ = max_rows;
    out.max_context_ = max_context;
    out.rope_ = *std::move(rope);
    out.kept_ = activations == Activations::kKept ? config.layers : 1;
    if (Status s = out.allocate(); !s.ok()) return s.with_prefix("DeviceTrainPass");
    return out;
  }

  /// losses[i] = -log p(labels[i]) at loss_rows[i], on the device, or with a teacher the Kullback-Leibler
  /// divergence of the model's softmax from the teacher's, and the gradient of scale * (their sum) is
  /// added to the model's. Puts the work into the stream. Errors as TrainPass::run(), before anything is
  /// launched; kNullPointer for a teacher without an output layer; kOutOfMemory, kCudaError.
  [[nodiscard]] Status run(DeviceTrainable<S>& model, const DeviceLossBatch<S>& batch, float scale,
                           float* losses) {
    return run(model.view(), &model, batch, scale, losses);
  }
  /// The losses alone, of any weights of this config.
  [[nodiscard]] Status evaluate(const detail::DeviceWeightsView<S>& weights, const DeviceLossBatch<S>& batch,
                                float* losses) {
    return run(weights, nullptr, batch, 0.0F, losses);
  }
  /// out[i] = the last hidden state at loss_rows[i] behind the final norm, which the output layer multiplies:
  /// [loss_rows][hidden], device memory. Puts the work into the stream. Errors as run().
  [[nodiscard]] Status hidden(const detail::DeviceWeightsView<S>& weights, const DeviceLossBatch<S>& batch,
                              S* out) {
    if (Status s = check(*weights.config, batch); !s.ok()) return s;
    if (batch.tokens.empty()) return {};
    if (Status s = send(batch, 0.0F); !s.ok()) return s;
    detail::BlockLaunches<S> launches(ts_, c_, rows_);
    forward(weights, batch, launches);
    head_.normalize(weights, head_input(batch), launches);
    ts_.copy(out, head_.chosen(), batch.labels.size() * static_cast<std::size_t>(c_.hidden_size) * sizeof(S),
             cudaMemcpyDeviceToDevice);
    return ts_.take();
  }

  /// Runs one block on the residual stream x[rows][hidden], device memory; of `batch` segments count, and the
  /// number of tokens. Puts the work into the stream. Errors as run().
  [[nodiscard]] Result<DeviceBlockInputs<S>> run_block(const detail::DeviceBlockWeights<S>& block,
                                                       const DeviceLossBatch<S>& batch, const float* x) {
    if (Status s = check(c_, batch); !s.ok()) return s;
    if (batch.tokens.empty()) return DeviceBlockInputs<S>();
    if (Status s = send(batch, 0.0F); !s.ok()) return s;
    ts_.copy(stream(0), x, batch.tokens.size() * static_cast<std::size_t>(c_.hidden_size) * sizeof(float),
             cudaMemcpyDeviceToDevice);
    detail::BlockLaunches<S> launches(ts_, c_, rows_);
    const detail::BlockActivations<S> a = activations(0);
    launches.norm(a.x, nullptr, nullptr, block.input_norm, a.normed);
    launches.project(block, a);
    launches.finish(block, a, scratch(), batch.prefixes.layer(0, c_.kv_size()));
    launches.norm(a.mid, y_.data(), stream(1), nullptr, nullptr);
    if (Status s = ts_.take(); !s.ok()) return s;
    return DeviceBlockInputs<S>{a.normed, a.attended, a.normed2, a.act, stream(1)};
  }

  /// As DeviceTrainer's.
  void use_graphs(bool on) noexcept { graphs_.enable(on); }

  [[nodiscard]] std::int64_t max_rows() const noexcept { return max_rows_; }  ///< of a batch
  /// Positions of a sequence, its prefix included.
  [[nodiscard]] std::int64_t max_context() const noexcept { return max_context_; }
  /// For DeviceTrainable.
  [[nodiscard]] detail::TrainStream& train_stream() noexcept { return ts_; }

 private:
  static constexpr std::int64_t kMostRows = std::int64_t{1} << 20;

  DeviceTrainPass(detail::TrainStream ts, const ModelConfig& config) : ts_(std::move(ts)), c_(config) {}

  [[nodiscard]] Status run(const detail::DeviceWeightsView<S>& w, DeviceTrainable<S>* model,
                           const DeviceLossBatch<S>& batch, float scale, float* losses) {
    if (Status s = check(*w.config, batch); !s.ok()) return s;
    if (batch.tokens.empty()) return {};
    if (Status s = send(batch, scale); !s.ok()) return s;
    if (batch.teacher != nullptr) {
      if (Status s = head_.allow_teacher(c_); !s.ok()) return s.with_prefix("DeviceTrainPass");
      ts_.copy(head_.teacher(), batch.teacher,
               batch.labels.size() * static_cast<std::size_t>(c_.hidden_size) * sizeof(S),
               cudaMemcpyDeviceToDevice);
    }
    const auto body = [&] {
      detail::BlockLaunches<S> launches(ts_, c_, rows_);
      forward(w, batch, launches);
      head_.run(ts_, c_, model, w, head_input(batch), launches);
      if (model != nullptr) back(*model, w, batch, launches);
    };
    if (model == nullptr) {
      body();
    } else {
      const auto number = [](const auto& value) { return reinterpret_cast<std::uintptr_t>(value); };
      ts_.bind();
      graphs_.run(
          ts_,
          {static_cast<std::uintptr_t>(rows_.rows), segments_.size(),
           static_cast<std::uintptr_t>(loss_count_), static_cast<std::uintptr_t>(batch.prefixes.rows),
           number(batch.prefixes.data), number(w.matrices), number(w.vectors), number(w.biases),
           number(model->gradients()), number(model->head_gradient()), number(model->block_gradients(0).qkv),
           number(batch.teacher == nullptr ? nullptr : batch.teacher_head)},
          body);
    }
    ts_.copy(losses, head_.losses(), batch.labels.size() * sizeof(float), cudaMemcpyDeviceToDevice);
    return ts_.take();
  }

  [[nodiscard]] Status allocate() {
    const std::int64_t r = padded_rows(max_rows_);
    rows_stride_ = r;
    const std::int64_t h = c_.hidden_size;
    const std::int64_t width = c_.q_size() + 2 * c_.kv_size();
    detail::Allocations memory;
    memory.make(x_, (c_.layers + 1) * r * h);
    memory.make(mid_, kept_ * r * h);
    memory.make(lse_, kept_ * r * c_.heads);
    for (DeviceArray<S>* x : {&normed_, &normed2_}) memory.make(*x, kept_ * r * h);
    if (c_.qk_norm) memory.make(raw_, kept_ * r * width);
    memory.make(qkv_, kept_ * r * width);
    memory.make(attended_, kept_ * r * c_.q_size());
    memory.make(both_, kept_ * r * 2 * c_.intermediate_size);
    memory.make(act_, kept_ * r * c_.intermediate_size);
    for (DeviceArray<S>* x : {&y_, &d_normed_}) memory.make(*x, r * h);
    memory.make(d_act_, r * c_.intermediate_size);
    memory.make(d_attended_, r * c_.q_size());
    memory.make(d_qkv_, r * width);
    memory.make(delta_, r * c_.heads);
    memory.make(norm_parts_, 2 * c_.layers * detail::kNormParts * h);
    if (c_.qk_norm) memory.make(head_parts_, c_.layers * detail::kHeadParts * 2 * c_.head_dim);
    if (c_.attention_bias) memory.make(bias_parts_, detail::kColumnParts * width);
    head_.allocate(c_, r, memory);
    if (Status s = memory.finish(); !s.ok()) return s;
    // Tokens, positions, segments and their tiles, loss rows, labels, the rows of each token, and numbers.
    const std::int64_t segments = padded_segments(r + r / kPaddingRows + 1);
    return input_.allocate(3 * r + 4 * segments +
                           2 * (detail::AttentionTiles::most(r * (c_.heads / c_.kv_heads), segments) +
                                detail::AttentionTiles::most(r, segments)) +
                           2 * r + 3 * r + 1 + 2);
  }

  static constexpr std::int64_t kPaddingRows = 64;  // of a segment of padding, at most

  /// One more at least: what is padding has a row of its own.
  [[nodiscard]] static std::int64_t padded_rows(std::int64_t rows) {
    return detail::padded_size(rows + 1, 64);
  }
  [[nodiscard]] static std::int64_t padded_segments(std::int64_t segments) {
    return detail::padded_size(segments, 16);
  }

  [[nodiscard]] Status check(const ModelConfig& config, const DeviceLossBatch<S>& batch) const {
    const std::int64_t rows = std::ssize(batch.tokens);
    const auto wrong = [](const auto&... parts) {
      return codegemm::error(StatusCode::kInvalidArgument, "LossBatch: ", parts...);
    };
    if (!(config == c_))
      return codegemm::error(StatusCode::kShapeMismatch, "TrainPass: made for another config");
    if (rows > max_rows_) return wrong(rows, " rows, the pass is for ", max_rows_);
    std::int64_t at = 0;
    std::int64_t before = 0;
    for (const auto& s : batch.segments) {
      if (s.count < 1 || s.prefix < 0 || s.prefix + s.count > max_context_ || s.count > rows - at ||
          s.prefix > batch.prefixes.rows - before) {
        return wrong("a segment of ", s.count, " rows at row ", at, " behind ", s.prefix, " of ",
                     batch.prefixes.rows - before, " tokens; rows ", rows, ", context at most ",
                     max_context_);
      }
      at += s.count;
      before += s.prefix;
    }
    if (before > 0 && batch.prefixes.data == nullptr)
      return codegemm::error(StatusCode::kNullPointer, "LossBatch: a prefix without keys or values");
    if (at != rows) return wrong("segments cover ", at, " of ", rows, " rows");
    if (batch.teacher != nullptr && batch.teacher_head == nullptr)
      return codegemm::error(StatusCode::kNullPointer, "LossBatch: a teacher without its output layer");
    if (batch.labels.size() != batch.loss_rows.size())
      return wrong(batch.labels.size(), " labels for ", batch.loss_rows.size(), " rows");
    for (const auto* ids : {&batch.tokens, &batch.labels}) {
      for (const std::int32_t id : *ids) {
        if (id < 0 || id >= c_.vocab_size) return wrong("token ", id, ", the vocabulary has ", c_.vocab_size);
      }
    }
    std::int32_t last = -1;
    for (const std::int32_t row : batch.loss_rows) {
      if (row <= last || row >= rows) return wrong("loss row ", row, " behind ", last, ", rows ", rows);
      last = row;
    }
    return {};
  }

  /// What the kernels read of a batch, to the device, in sizes that few batches differ in. Padding is
  /// sequences of their own behind the others, and loss rows of the last row without a gradient.
  [[nodiscard]] Status send(const DeviceLossBatch<S>& batch, float scale) {
    positions_.clear();
    segments_.clear();
    std::int64_t before = 0;
    const auto add = [&](std::int64_t count, std::int64_t prefix) {
      segments_.push_back({static_cast<std::int32_t>(positions_.size()), static_cast<std::int32_t>(count),
                           static_cast<std::int32_t>(prefix), static_cast<std::int32_t>(before)});
      for (std::int64_t i = 0; i < count; ++i) positions_.push_back(static_cast<std::int32_t>(prefix + i));
      before += prefix;
    };
    for (const auto& s : batch.segments) add(s.count, s.prefix);
    const std::int64_t rows = padded_rows(std::ssize(batch.tokens));
    const std::int64_t most = std::min(kPaddingRows, max_context_);
    while (std::ssize(positions_) < rows) add(std::min(most, rows - std::ssize(positions_)), 0);
    tokens_.assign(batch.tokens.begin(), batch.tokens.end());
    tokens_.resize(static_cast<std::size_t>(rows), 0);
    tiles_.assign(segments_, c_.heads / c_.kv_heads);
    const std::int64_t segments = padded_segments(std::ssize(segments_));
    tiles_.pad(rows, c_.heads / c_.kv_heads, segments);
    segments_.resize(static_cast<std::size_t>(segments));
    list_occurrences(tokens_);
    ids_.resize(static_cast<std::size_t>(rows), 0);
    id_begin_.resize(static_cast<std::size_t>(rows) + 1, static_cast<std::int32_t>(rows));
    loss_count_ =
        batch.loss_rows.empty() ? 0 : std::min(rows, detail::padded_size(std::ssize(batch.loss_rows), 16));
    loss_list_.assign(batch.loss_rows.begin(), batch.loss_rows.end());
    loss_list_.resize(static_cast<std::size_t>(loss_count_), static_cast<std::int32_t>(rows) - 1);
    label_list_.assign(batch.labels.begin(), batch.labels.end());
    label_list_.resize(static_cast<std::size_t>(loss_count_), 0);
    const detail::LossNumbers numbers{scale, static_cast<std::int32_t>(batch.loss_rows.size())};

    using Ints = std::span<const std::int32_t>;
    if (Status s = input_.begin(); !s.ok()) return s;
    rows_.rows = rows;
    tokens_on_device_ = input_.add(Ints(tokens_));
    rows_.positions = input_.add(Ints(positions_));
    rows_.cos = rope_.cos.data();
    rows_.sin = rope_.sin.data();
    rows_.tiles.segments = input_.add(std::span<const detail::DeviceSegment>(segments_));
    rows_.tiles.segment_of = input_.add(Ints(tiles_.segment_of));
    rows_.tiles.queries = input_.add(Ints(tiles_.queries));
    rows_.tiles.keys = input_.add(Ints(tiles_.keys));
    rows_.tiles.query_tiles = std::ssize(tiles_.queries) / 2;
    rows_.tiles.key_tiles = std::ssize(tiles_.keys) / 2;
    loss_rows_ = input_.add(Ints(loss_list_));
    labels_ = input_.add(Ints(label_list_));
    embed_.ids = input_.add(Ints(ids_));
    embed_.row_begin = input_.add(Ints(id_begin_));
    embed_.rows = input_.add(Ints(occurrences_));
    numbers_ = input_.add(std::span<const detail::LossNumbers>(&numbers, 1));
    return input_.send(ts_.stream());
  }

  /// Where each token occurs, so that one block adds up its gradient: ids in the order of their first rows.
  void list_occurrences(const std::vector<std::int32_t>& tokens) {
    // How often, then where the next one goes.
    counts_.resize(static_cast<std::size_t>(c_.vocab_size));
    ids_.clear();
    id_begin_.assign(1, 0);
    for (const std::int32_t id : tokens) {
      if (counts_[static_cast<std::size_t>(id)]++ == 0) ids_.push_back(id);
    }
    for (const std::int32_t id : ids_) {
      std::int32_t& count = counts_[static_cast<std::size_t>(id)];
      const std::int32_t begin = id_begin_.back();
      id_begin_.push_back(begin + count);
      count = begin;
    }
    occurrences_.resize(tokens.size());
    for (std::size_t row = 0; row < tokens.size(); ++row) {
      const auto at = static_cast<std::size_t>(counts_[static_cast<std::size_t>(tokens[row])]++);
      occurrences_[at] = static_cast<std::int32_t>(row);
    }
    for (const std::int32_t id : ids_) counts_[static_cast<std::size_t>(id)] = 0;
  }

  [[nodiscard]] float* stream(std::int64_t i) const { return x_.data() + i * rows_stride_ * c_.hidden_size; }
  [[nodiscard]] detail::BlockActivations<S> activations(std::int64_t i) const {
    const std::int64_t at = (kept_ > 1 ? i : 0) * rows_stride_;
    const std::int64_t width = c_.q_size() + 2 * c_.kv_size();
    detail::BlockActivations<S> a;
    a.x = stream(i);
    a.mid = mid_.data() + at * c_.hidden_size;
    a.normed = normed_.data() + at * c_.hidden_size;
    a.qkv = qkv_.data() + at * width;
    a.raw = c_.qk_norm ? raw_.data() + at * width : a.qkv;
    a.attended = attended_.data() + at * c_.q_size();
    a.lse = lse_.data() + at * c_.heads;
    a.normed2 = normed2_.data() + at * c_.hidden_size;
    a.both = both_.data() + at * 2 * c_.intermediate_size;
    a.act = act_.data() + at * c_.intermediate_size;
    a.keys = a.qkv + c_.q_size();
    a.values = a.keys + c_.kv_size();
    a.kv_stride = width;
    return a;
  }
  [[nodiscard]] detail::BlockScratch<S> scratch() const {
    return {y_.data(),     d_act_.data(), d_normed_.data(),  d_attended_.data(),
            d_qkv_.data(), delta_.data(), bias_parts_.data()};
  }
  [[nodiscard]] typename detail::LossHead<S>::Input head_input(const DeviceLossBatch<S>& batch) const {
    return {stream(c_.layers),
            loss_rows_,
            labels_,
            numbers_,
            loss_count_,
            rows_.rows,
            batch.teacher == nullptr ? nullptr : batch.teacher_head};
  }

  void forward(const detail::DeviceWeightsView<S>& w, const DeviceLossBatch<S>& batch,
               detail::BlockLaunches<S>& launches) {
    EmbedArgs embed;
    embed.tokens = tokens_on_device_;
    embed.table = w.embedding();
    embed.out = stream(0);
    embed.width = static_cast<int>(c_.hidden_size);
    embed.vocab = static_cast<int>(c_.vocab_size);
    ts_.start(embed_kernel<S>, embed, rows_.rows, kEmbedThreads);
    for (std::int64_t i = 0; i < c_.layers; ++i) {
      const detail::DeviceBlockWeights<S> block = w.block(i);
      const detail::BlockActivations<S> a = activations(i);
      if (i == 0) {
        launches.norm(a.x, nullptr, nullptr, block.input_norm, a.normed);
      } else {
        launches.norm(activations(i - 1).mid, y_.data(), a.x, block.input_norm, a.normed);
      }
      launches.project(block, a);
      launches.finish(block, a, scratch(), batch.prefixes.layer(i, c_.kv_size()));
    }
    launches.norm(activations(c_.layers - 1).mid, y_.data(), stream(c_.layers), nullptr, nullptr);
  }

  void back(DeviceTrainable<S>& model, const detail::DeviceWeightsView<S>& w, const DeviceLossBatch<S>& batch,
            detail::BlockLaunches<S>& launches) {
    const std::int64_t h = c_.hidden_size;
    float* const vectors = model.vector_gradients();
    for (std::int64_t i = c_.layers - 1; i >= 0; --i) {
      const detail::DeviceBlockWeights<S> block = w.block(i);
      const detail::BlockActivations<S> a = activations(i);
      const detail::LayerPrefix<S> prefix = batch.prefixes.layer(i, c_.kv_size());
      if (kept_ < c_.layers && i + 1 < c_.layers) {  // the last block's activations are still there
        launches.norm(a.x, nullptr, nullptr, block.input_norm, a.normed);
        launches.project(block, a);
        launches.finish(block, a, scratch(), prefix);
      }
      float* const norms = vectors == nullptr ? nullptr : norm_parts_.data() + i * 2 * detail::kNormParts * h;
      float* const heads = vectors == nullptr || !c_.qk_norm
                               ? nullptr
                               : head_parts_.data() + i * detail::kHeadParts * 2 * c_.head_dim;
      launches.backward(block, model.block_gradients(i), a, scratch(), prefix, head_.dx(), head_.dx_low(),
                        norms, heads);
    }
    if (vectors != nullptr) {
      launches.add_parts(norm_parts_.data(), 2 * c_.layers, detail::kNormParts,
                         launches.norm_parts(rows_.rows), h, vectors);
      if (c_.qk_norm) {
        launches.add_parts(head_parts_.data(), c_.layers, detail::kHeadParts, launches.head_parts(),
                           2 * c_.head_dim, vectors + detail::WeightsLayout(c_).head_norms());
      }
    }
    if (model.embedding_gradient() == nullptr) return;
    detail::EmbedBackwardArgs args = embed_;
    args.d = head_.dx();
    args.gradient = model.embedding_gradient();
    args.width = static_cast<int>(h);
    ts_.start(detail::embed_backward_kernel<0>, args, rows_.rows, detail::kElementThreads);
  }

  detail::TrainStream ts_;
  ModelConfig c_;
  std::int64_t max_rows_ = 0;
  std::int64_t max_context_ = 0;
  std::int64_t rows_stride_ = 0;  // rows that the arrays have
  std::int64_t kept_ = 1;         // blocks whose activations are kept
  detail::DeviceRope rope_;
  detail::PassInput input_;
  // Of the batch at hand.
  detail::DeviceRows rows_;
  const std::int32_t* tokens_on_device_ = nullptr;
  const std::int32_t* loss_rows_ = nullptr;
  const std::int32_t* labels_ = nullptr;
  const detail::LossNumbers* numbers_ = nullptr;
  std::int64_t loss_count_ = 0;  // padding included
  detail::EmbedBackwardArgs embed_;
  detail::PassGraphs graphs_;
  std::vector<std::int32_t> tokens_, loss_list_, label_list_;
  std::vector<std::int32_t> positions_, occurrences_, ids_, id_begin_, counts_;
  std::vector<detail::DeviceSegment> segments_;
  detail::AttentionTiles tiles_;

  DeviceArray<float> x_;                         // [layers + 1][rows][hidden]
  DeviceArray<float> mid_, lse_;                 // of each kept block
  DeviceArray<S> normed_, normed2_, raw_, qkv_;  // the same
  DeviceArray<S> attended_, both_, act_;         // the same
  DeviceArray<S> y_, d_normed_;                  // [rows][hidden]
  DeviceArray<S> d_act_, d_attended_, d_qkv_;
  DeviceArray<float> delta_;       // [rows][heads]
  DeviceArray<float> norm_parts_;  // [2 layers][kNormParts][hidden]
  DeviceArray<float> head_parts_;  // [layers][kHeadParts][2][head_dim]
  DeviceArray<float> bias_parts_;  // [kColumnParts][q + 2 kv]
  detail::LossHead<S> head_;
};

}  // namespace prefillshare::cuda
