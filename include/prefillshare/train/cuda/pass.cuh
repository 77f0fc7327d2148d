// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/pass.cuh - loss and gradients of a whole decoder over a batch of segments on the
// GPU.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
// See: PrefillShare (arXiv 2602.12029) equation 7; prefillshare/train/pass.hpp
#pragma once

#include <cstdint>
#include <utility>

#include <prefillshare/train/cuda/cache_forward.cuh>
#include <prefillshare/train/cuda/loss_batch.cuh>
#include <prefillshare/train/cuda/loss_head.cuh>
#include <prefillshare/train/cuda/pass_graphs.cuh>

namespace prefillshare::cuda {

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
    if (max_rows < 1 || max_context < 1 || max_rows > Sent::kMostRows) {
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
    if (Status s = batch_.check(*weights.config, batch); !s.ok()) return s;
    if (batch.tokens.empty()) return {};
    if (Status s = batch_.send(batch, 0.0F, rope_, ts_.stream()); !s.ok()) return s;
    detail::BlockLaunches<S> launches(ts_, c_, batch_.rows());
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
    if (Status s = batch_.check(c_, batch); !s.ok()) return s;
    if (batch.tokens.empty()) return DeviceBlockInputs<S>();
    if (Status s = batch_.send(batch, 0.0F, rope_, ts_.stream()); !s.ok()) return s;
    ts_.copy(stream(0), x, batch.tokens.size() * static_cast<std::size_t>(c_.hidden_size) * sizeof(float),
             cudaMemcpyDeviceToDevice);
    detail::BlockLaunches<S> launches(ts_, c_, batch_.rows());
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
  using Sent = detail::SentBatch<S>;

  DeviceTrainPass(detail::TrainStream ts, const ModelConfig& config) : ts_(std::move(ts)), c_(config) {}

  [[nodiscard]] Status run(const detail::DeviceWeightsView<S>& w, DeviceTrainable<S>* model,
                           const DeviceLossBatch<S>& batch, float scale, float* losses) {
    if (Status s = batch_.check(*w.config, batch); !s.ok()) return s;
    if (batch.tokens.empty()) return {};
    if (Status s = batch_.send(batch, scale, rope_, ts_.stream()); !s.ok()) return s;
    if (batch.teacher != nullptr) {
      if (Status s = head_.allow_teacher(c_); !s.ok()) return s.with_prefix("DeviceTrainPass");
      ts_.copy(head_.teacher(), batch.teacher,
               batch.labels.size() * static_cast<std::size_t>(c_.hidden_size) * sizeof(S),
               cudaMemcpyDeviceToDevice);
    }
    const auto body = [&] {
      detail::BlockLaunches<S> launches(ts_, c_, batch_.rows());
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
          {static_cast<std::uintptr_t>(batch_.rows().rows), batch_.segments(),
           static_cast<std::uintptr_t>(batch_.loss_count()), static_cast<std::uintptr_t>(batch.prefixes.rows),
           number(batch.prefixes.data), number(w.matrices), number(w.vectors), number(w.biases),
           number(model->gradients()), number(model->head_gradient()), number(model->block_gradients(0).qkv),
           number(batch.teacher == nullptr ? nullptr : batch.teacher_head)},
          body);
    }
    ts_.copy(losses, head_.losses(), batch.labels.size() * sizeof(float), cudaMemcpyDeviceToDevice);
    return ts_.take();
  }

  [[nodiscard]] Status allocate() {
    const std::int64_t r = Sent::padded_rows(max_rows_);
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
    return batch_.allocate(c_, max_rows_, max_context_);
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
            batch_.loss_rows(),
            batch_.labels(),
            batch_.numbers(),
            batch_.loss_count(),
            batch_.rows().rows,
            batch.teacher == nullptr ? nullptr : batch.teacher_head};
  }

  void forward(const detail::DeviceWeightsView<S>& w, const DeviceLossBatch<S>& batch,
               detail::BlockLaunches<S>& launches) {
    EmbedArgs embed;
    embed.tokens = batch_.tokens();
    embed.table = w.embedding();
    embed.out = stream(0);
    embed.width = static_cast<int>(c_.hidden_size);
    embed.vocab = static_cast<int>(c_.vocab_size);
    ts_.start(embed_kernel<S>, embed, batch_.rows().rows, kEmbedThreads);
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
                         launches.norm_parts(batch_.rows().rows), h, vectors);
      if (c_.qk_norm) {
        launches.add_parts(head_parts_.data(), c_.layers, detail::kHeadParts, launches.head_parts(),
                           2 * c_.head_dim, vectors + detail::WeightsLayout(c_).head_norms());
      }
    }
    if (model.embedding_gradient() == nullptr) return;
    detail::EmbedBackwardArgs args = batch_.occurrences();
    args.d = head_.dx();
    args.gradient = model.embedding_gradient();
    args.width = static_cast<int>(h);
    ts_.start(detail::embed_backward_kernel<0>, args, batch_.rows().rows, detail::kElementThreads);
  }

  detail::TrainStream ts_;
  ModelConfig c_;
  std::int64_t max_rows_ = 0;
  std::int64_t max_context_ = 0;
  std::int64_t rows_stride_ = 0;  // rows that the arrays have
  std::int64_t kept_ = 1;         // blocks whose activations are kept
  detail::DeviceRope rope_;
  Sent batch_;
  detail::PassGraphs graphs_;

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
