// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/loss_head.cuh - the end of a training pass on the GPU: final norm, output layer,
// and the loss against labels or a teacher, with its gradient.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <prefillshare/train/cuda/block.cuh>

namespace prefillshare::cuda::detail {

/// Its memory, for passes of up to `rows` rows.
template <TrainStorage S>
class LossHead {
 public:
  /// What a pass has to give.
  struct Input {
    const float* x = nullptr;                 // [rows][hidden], the last block's output
    const std::int32_t* loss_rows = nullptr;  // [count]
    const std::int32_t* labels = nullptr;     // [count]
    const LossNumbers* numbers = nullptr;     // device memory
    std::int64_t count = 0;                   // padding included
    std::int64_t rows = 0;                    // of x
    const S* teacher_head = nullptr;          // [vocab][hidden]; null: labels
  };

  void allocate(const ModelConfig& c, std::int64_t rows, Allocations& memory) {
    const std::int64_t h = c.hidden_size;
    stride_ = (c.vocab_size + 7) / 8 * 8;
    chunk_ = std::clamp<std::int64_t>((std::int64_t{1} << 27) / stride_, 1, rows);
    rows_ = rows;
    for (DeviceArray<S>* x : {&chosen_, &d_chosen_}) memory.make(*x, rows * h);
    memory.make(dx_, rows * h);
    if constexpr (!std::is_same_v<S, float>) memory.make(dx_low_, rows * h);
    memory.make(norm_parts_, kNormParts * h);
    memory.make(losses_, rows);
    memory.zeros(logits_, chunk_ * stride_);  // what lies behind the vocabulary is read, though not used
    memory.make(d_logits_, chunk_ * stride_);
  }
  /// What a teacher takes, on the first call.
  [[nodiscard]] Status allow_teacher(const ModelConfig& c) {
    if (teacher_.size() > 0) return {};
    Allocations memory;
    memory.zeros(teacher_, rows_ * c.hidden_size);
    memory.zeros(teacher_logits_, chunk_ * stride_);
    return memory.finish();
  }

  /// [count]
  [[nodiscard]] float* losses() const { return losses_.data(); }
  /// [count][hidden], read by run() where there is a teacher_head.
  [[nodiscard]] S* teacher() const { return teacher_.data(); }
  /// [count][hidden], written by normalize().
  [[nodiscard]] S* chosen() const { return chosen_.data(); }
  /// [rows][hidden]: after run() the gradient of x.
  [[nodiscard]] float* dx() const { return dx_.data(); }
  /// The same in S.
  [[nodiscard]] S* dx_low() const {
    if constexpr (std::is_same_v<S, float>) return dx_.data();
    if constexpr (!std::is_same_v<S, float>) return dx_low_.data();
  }

  void normalize(const DeviceWeightsView<S>& w, const Input& in, BlockLaunches<S>& launches) {
    NormArgs norm;
    norm.x = in.x;
    norm.chosen = in.loss_rows;
    norm.weight = w.final_norm();
    norm.out = chosen_.data();
    norm.rows = in.count;
    launches.norm(norm);
  }

  /// Losses; with a model to train also the gradients.
  void run(TrainStream& ts, const ModelConfig& c, DeviceTrainable<S>* model, const DeviceWeightsView<S>& w,
           const Input& in, BlockLaunches<S>& launches) {
    const bool backward = model != nullptr;
    const std::int64_t h = c.hidden_size;
    normalize(w, in, launches);
    for (std::int64_t first = 0; first < in.count; first += chunk_) {
      const std::int64_t size = std::min(chunk_, in.count - first);
      const S* const from = chosen_.data() + first * h;
      ts.nt(from, w.head(), logits_.data(), size, c.vocab_size, h, stride_);
      if (in.teacher_head != nullptr) {
        ts.nt(teacher_.data() + first * h, in.teacher_head, teacher_logits_.data(), size, c.vocab_size, h,
              stride_);
      }
      compare(ts, c, in, first, size, backward);
      if (!backward) continue;
      ts.nn(d_logits_.data(), w.head(), d_chosen_.data() + first * h, size, c.vocab_size, h, stride_);
      ts.tn(d_logits_.data(), from, model->head_gradient(), size, c.vocab_size, h, stride_);
    }
    if (backward) back(ts, c, *model, w, in, launches);
  }

 private:
  void compare(TrainStream& ts, const ModelConfig& c, const Input& in, std::int64_t first, std::int64_t size,
               bool backward) {
    if (in.teacher_head != nullptr) {
      DistillationArgs args;
      args.logits = logits_.data();
      args.teacher = teacher_logits_.data();
      args.labels = in.labels + first;
      args.losses = losses_.data() + first;
      args.d = backward ? d_logits_.data() : nullptr;
      args.stride = stride_;
      args.numbers = in.numbers;
      args.first = static_cast<int>(first);
      args.vocab = static_cast<int>(c.vocab_size);
      ts.start(distillation_kernel<S>, args, size, kCrossEntropyThreads);
      return;
    }
    CrossEntropyArgs args;
    args.logits = logits_.data();
    args.labels = in.labels + first;
    args.losses = losses_.data() + first;
    args.d = backward ? d_logits_.data() : nullptr;
    args.stride = stride_;
    args.vocab = static_cast<int>(c.vocab_size);
    args.numbers = in.numbers;
    args.first = static_cast<int>(first);
    ts.start(cross_entropy_kernel<S>, args, size, kCrossEntropyThreads);
  }

  /// The final norm's gradient, and that of x.
  void back(TrainStream& ts, const ModelConfig& c, DeviceTrainable<S>& model, const DeviceWeightsView<S>& w,
            const Input& in, BlockLaunches<S>& launches) {
    const std::int64_t h = c.hidden_size;
    zero(ts, dx_.data(), in.rows * h * static_cast<std::int64_t>(sizeof(float)));
    if (dx_low_.size() > 0) zero(ts, dx_low_.data(), in.rows * h * static_cast<std::int64_t>(sizeof(S)));
    if (in.count == 0) return;
    NormBackwardArgs norm_back;
    norm_back.x = in.x;
    norm_back.weight = w.final_norm();
    norm_back.dy = d_chosen_.data();
    norm_back.dx = dx_.data();
    norm_back.dx_low = dx_low_.data();
    norm_back.chosen = in.loss_rows;
    norm_back.rows = in.count;
    float* const sums = model.vector_gradients();
    norm_back.parts = sums == nullptr ? nullptr : norm_parts_.data();
    launches.norm_backward(norm_back);
    if (sums == nullptr) return;
    launches.add_parts(norm_parts_.data(), 1, kNormParts, launches.norm_parts(in.count), h,
                       sums + WeightsLayout(c).final_norm());
  }

  /// By a kernel, so that a graph has nothing but kernels. A row has a multiple of 16 bytes.
  static void zero(TrainStream& ts, void* to, std::int64_t bytes) {
    ZeroArgs args;
    args.to = static_cast<uint4*>(to);
    args.size = bytes / 16;
    ts.start(zero_kernel<0>, args, (args.size + kElementThreads - 1) / kElementThreads, kElementThreads);
  }

  std::int64_t rows_ = 0;
  std::int64_t stride_ = 0;            // of logits
  std::int64_t chunk_ = 1;             // rows of logits
  DeviceArray<S> chosen_, d_chosen_;   // [loss rows][hidden]
  DeviceArray<S> teacher_;             // the same; empty without a teacher
  DeviceArray<float> dx_;              // [rows][hidden], of the residual stream
  DeviceArray<S> dx_low_;              // the same in S; empty where S is float
  DeviceArray<float> norm_parts_;      // [kNormParts][hidden]
  DeviceArray<float> losses_;          // [rows], of the loss rows
  DeviceArray<float> logits_;          // [chunk][stride]
  DeviceArray<float> teacher_logits_;  // [chunk][stride]; empty without a teacher
  DeviceArray<S> d_logits_;            // [chunk][stride]
};

}  // namespace prefillshare::cuda::detail
