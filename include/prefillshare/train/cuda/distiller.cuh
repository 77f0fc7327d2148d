// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/distiller.cuh - trains a quantized model on what the dense one says about a text,
// end to end: codebooks, scales and norms, and codes if asked to.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
// See: Hinton, Vinyals and Dean (arXiv 1503.02531); AQLM (arXiv 2401.06118), appendix A (end-to-end
// fine-tuning)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/adamw.cuh>
#include <prefillshare/train/cuda/code_moves.cuh>
#include <prefillshare/train/cuda/device_step.cuh>
#include <prefillshare/train/cuda/pass.cuh>
#include <prefillshare/train/trainer.hpp>

namespace prefillshare::cuda {

/// Minimizes the Kullback-Leibler divergence of the student's next-token distribution from the teacher's,
/// mean over the tokens of sequences, by AdamW; with a share s of labels (1 - s) of it and s times the
/// cross-entropy of the text's own next token (section 2 of arXiv 1503.02531, at temperature 1). Each tensor
/// learns at options.rate times its root mean square at the beginning. Codes stay, or move with the gradient
/// (CodeMoveOptions). The teacher runs once over all sequences; its last hidden states are kept (hidden_size
/// numbers a token). Of TrainOptions `sharing` and `max_tokens` have no meaning here. The same bits for the
/// same seed on the same card, so that a run that was killed is run again. One read back from the device a
/// step. S: TrainStorage.
template <TrainStorage S>
class DeviceDistiller {
 public:
  /// Trains `student`, which must outlive the distiller, as must the stream; the teacher has its config.
  /// Errors: kInvalidArgument for options, for a share of labels outside 0..1, and for a sequence of fewer
  /// than 2 tokens or more than context_length, with its number; kShapeMismatch for a teacher of another
  /// config; those of DeviceTrainPass.
  [[nodiscard]] static Result<DeviceDistiller> create(
      TrainableModel<float>& student, std::shared_ptr<const DeviceFrozenWeights<S>> teacher,
      std::vector<std::vector<std::int32_t>> sequences, const TrainOptions& options, const Device& device,
      cudaStream_t stream, Activations activations = Activations::kKept, const CodeMoveOptions& moves = {},
      double label_share = 0.0) {
    if (teacher == nullptr) return codegemm::error(StatusCode::kNullPointer, "DeviceDistiller: no teacher");
    if (Status s = prefillshare::detail::check_train_options(options); !s.ok()) return s;
    const ModelConfig& c = student.config();
    if (!(teacher->config() == c)) {
      return codegemm::error(StatusCode::kShapeMismatch,
                             "DeviceDistiller: the teacher has another config than the student");
    }
    if (sequences.empty())
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceDistiller: no sequences");
    if (Status s = check(sequences, c); !s.ok()) return s;
    if (!(moves.rate >= 0.0) || !std::isfinite(moves.rate) || moves.every < 1 ||
        !(moves.until >= 0.0 && moves.until <= 1.0)) {
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceDistiller: codes move at a rate of ",
                             moves.rate, " every ", moves.every, " steps until ", moves.until,
                             " of them: must be 0 or more, 1 or more and in 0..1");
    }
    if (!(label_share >= 0.0 && label_share <= 1.0)) {
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceDistiller: a share of labels of ",
                             label_share, ", must be in 0..1");
    }
    std::int64_t longest = 0;
    for (const auto& tokens : sequences) longest = std::max(longest, std::ssize(tokens));
    const std::int64_t rows = std::max(options.pass_tokens, longest);
    Result<DeviceTrainPass<S>> pass =
        DeviceTrainPass<S>::create(c, rows, longest, activations, device, stream);
    if (!pass.ok()) return pass.status();
    Result<DeviceTrainable<S>> weights = DeviceTrainable<S>::create(student, device, stream);
    if (!weights.ok()) return weights.status();
    Result<DeviceAdamW> optimizer = DeviceAdamW::create(weights->size(), options.adam);
    if (!optimizer.ok()) return optimizer.status();
    Result<detail::DeviceStepper> stepper = detail::DeviceStepper::create();
    if (!stepper.ok()) return stepper.status();
    try {
      DeviceDistiller out(student, std::move(teacher), *std::move(pass), *std::move(weights),
                          *std::move(optimizer), *std::move(stepper), options);
      out.label_share_ = label_share;
      out.sequences_ = std::move(sequences);
      out.order_ =
          prefillshare::detail::ExampleOrder(static_cast<std::int64_t>(out.sequences_.size()), options);
      if (Status s = out.allocate(rows); !s.ok()) return s.with_prefix("DeviceDistiller");
      if (moves.rate > 0.0) {
        Result<detail::DeviceCodeMoves> made =
            detail::DeviceCodeMoves::create(out.weights_.code_layers(), moves);
        if (!made.ok()) return made.status().with_prefix("DeviceDistiller");
        out.moves_ = *std::move(made);
        out.move_options_ = moves;
      }
      if (Status s = out.ask_teacher(); !s.ok()) return s;
      return out;
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "DeviceDistiller: no memory for the sequences");
    }
  }

  /// Steps done.
  [[nodiscard]] std::int64_t steps_done() const noexcept { return optimizer_.steps(); }
  [[nodiscard]] bool done() const noexcept { return steps_done() >= options_.steps; }  ///< all steps are done
  /// The weights on the device, as they are.
  [[nodiscard]] const DeviceTrainable<S>& weights() const noexcept { return weights_; }

  /// One step; waits for it. The loss is the mean divergence in nats before the update. kInvalidArgument
  /// after the last step and where loss or gradient is not finite, the parameters then as before the step;
  /// kOutOfMemory, kCudaError.
  [[nodiscard]] Result<TrainProgress> step() {
    const std::int64_t number = steps_done();
    if (done()) {
      return codegemm::error(StatusCode::kInvalidArgument, "DeviceDistiller: all ", number,
                             " steps are done");
    }
    try {
      const std::vector<std::size_t> chosen = order_.of_step(number);
      std::int64_t targets = 0;
      for (const std::size_t i : chosen) targets += targets_of(sequences_[i]);
      const auto passes = [&](float scale) -> Result<const float*> {
        const Status ran = for_passes(
            sequences_, chosen, [&](float* losses) { return pass_.run(weights_, batch_, scale, losses); });
        if (!ran.ok()) return ran;
        return static_cast<const float*>(losses_.data());
      };
      const auto taken = stepper_.take(weights_, optimizer_, options_, targets, targets, pass_.train_stream(),
                                       passes, shares_.data());
      if (!taken.ok()) return taken.status();
      if (!taken->finite) {
        return codegemm::error(StatusCode::kInvalidArgument, "the loss (", taken->loss,
                               ") or the gradient is not finite in step ", number + 1,
                               "; the parameters are those after ", number, " steps");
      }
      if (Status s = follow(taken->progress); !s.ok()) return s;
      return taken->progress;
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "DeviceDistiller: no memory for a step of ",
                             options_.batch, " sequences");
    }
  }

  /// All steps that are left, then download().
  [[nodiscard]] Status run(const std::function<void(const TrainProgress&)>& progress = {}) {
    while (!done()) {
      const Result<TrainProgress> now = step();
      if (!now.ok()) return now.status();
      if (progress) progress(*now);
    }
    return download();
  }

  /// The parameters as they are, to the student on the host. kCudaError.
  [[nodiscard]] Status download() {
    if (Status s = weights_.download(*student_, pass_.train_stream()); !s.ok() || !moves_.has_value())
      return s;
    return weights_.download_codes(*student_, pass_.train_stream());
  }
  /// How often a code has changed so far.
  [[nodiscard]] std::int64_t codes_moved() const noexcept { return codes_moved_; }

  /// Mean divergence in nats over the tokens of other sequences, none longer than the longest to train on;
  /// waits. Errors as create() and step().
  [[nodiscard]] Result<double> divergence(const std::vector<std::vector<std::int32_t>>& sequences) {
    if (Status s = check(sequences, pass_.max_context()); !s.ok()) return s;
    try {
      std::vector<std::size_t> one(1);
      double sum = 0.0;
      std::int64_t count = 0;
      for (std::size_t i = 0; i < sequences.size(); ++i) {
        const std::int64_t targets = targets_of(sequences[i]);
        one[0] = i;
        batch_.clear();
        append(sequences[i]);
        if (Status s = pass_.hidden(teacher_->view(), batch_, teacher_rows_.data()); !s.ok()) return s;
        batch_.teacher = teacher_rows_.data();
        batch_.teacher_head = teacher_->view().head();
        if (Status s = pass_.evaluate(weights_.view(), batch_, losses_.data()); !s.ok()) return s;
        std::vector<float> losses(static_cast<std::size_t>(targets));
        detail::TrainStream& ts = pass_.train_stream();
        ts.copy(losses.data(), losses_.data(), losses.size() * sizeof(float), cudaMemcpyDeviceToHost);
        ts.synchronize();
        if (Status s = ts.take(); !s.ok()) return s;
        for (const float loss : losses) sum += static_cast<double>(loss);
        count += targets;
      }
      return count > 0 ? sum / static_cast<double>(count) : 0.0;
    } catch (const std::bad_alloc&) {
      return codegemm::error(StatusCode::kOutOfMemory, "DeviceDistiller: no memory for ", sequences.size(),
                             " sequences");
    }
  }

 private:
  using Sequences = std::vector<std::vector<std::int32_t>>;

  DeviceDistiller(TrainableModel<float>& student, std::shared_ptr<const DeviceFrozenWeights<S>> teacher,
                  DeviceTrainPass<S> pass, DeviceTrainable<S> weights, DeviceAdamW optimizer,
                  detail::DeviceStepper stepper, const TrainOptions& options)
      : student_(&student),
        teacher_(std::move(teacher)),
        pass_(std::move(pass)),
        weights_(std::move(weights)),
        optimizer_(std::move(optimizer)),
        stepper_(std::move(stepper)),
        options_(options) {}

  [[nodiscard]] static Status check(const Sequences& sequences, const ModelConfig& c) {
    return check(sequences, c.context_length);
  }
  [[nodiscard]] static Status check(const Sequences& sequences, std::int64_t longest) {
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      if (sequences[i].size() >= 2 && std::ssize(sequences[i]) <= longest) continue;
      return codegemm::error(StatusCode::kInvalidArgument, "sequence ", i, " has ", sequences[i].size(),
                             " tokens, must be in 2..", longest);
    }
    return {};
  }
  /// Each token but the last predicts the next.
  [[nodiscard]] static std::int64_t targets_of(const std::vector<std::int32_t>& tokens) {
    return std::ssize(tokens) - 1;
  }

  [[nodiscard]] Status allocate(std::int64_t rows) {
    const std::int64_t h = pass_config().hidden_size;
    std::int64_t total = 0;
    std::int64_t longest = 0;
    for (const auto& tokens : sequences_) {
      first_.push_back(total);
      total += targets_of(tokens);
      longest = std::max(longest, targets_of(tokens));
    }
    detail::Allocations memory;
    memory.make(hidden_, total * h);
    memory.make(teacher_rows_, rows * h);
    memory.make(losses_, options_.batch * longest);
    std::vector<float> shares(static_cast<std::size_t>(weights_.size() / 4 + 1), 0.0F);
    std::size_t i = 0;
    for (const Parameter<float>& p : student_->parameters()) {
      double squares = 0.0;
      for (const float x : p.value.span()) squares += static_cast<double>(x) * static_cast<double>(x);
      const double size = static_cast<double>(std::max<std::int64_t>(1, p.value.size()));
      const std::int64_t at = weights_.offset(i++);
      std::fill(shares.begin() + at / 4, shares.begin() + (at + p.value.size() + 3) / 4,
                static_cast<float>(std::sqrt(squares / size)));
    }
    memory.copy<float>(shares_, shares);
    return memory.finish();
  }
  [[nodiscard]] const ModelConfig& pass_config() const noexcept { return teacher_->config(); }

  void append(const std::vector<std::int32_t>& tokens) {
    const auto first = static_cast<std::int32_t>(batch_.tokens.size());
    const std::int64_t targets = targets_of(tokens);
    batch_.segments.push_back({targets, 0});
    batch_.tokens.insert(batch_.tokens.end(), tokens.begin(), tokens.end() - 1);
    for (std::int64_t i = 0; i < targets; ++i)
      batch_.loss_rows.push_back(first + static_cast<std::int32_t>(i));
    batch_.labels.insert(batch_.labels.end(), tokens.begin() + 1, tokens.end());
  }

  /// After a step: the free weights, and now and then the codes.
  [[nodiscard]] Status follow(const TrainProgress& now) {
    const auto last = static_cast<std::int64_t>(move_options_.until * static_cast<double>(options_.steps));
    if (!moves_.has_value() || now.step > last) return {};
    detail::TrainStream& ts = pass_.train_stream();
    moves_->follow(weights_.code_layers(), now.rate / options_.rate, optimizer_.state(), ts);
    if (now.step % move_options_.every != 0 && now.step != last) return {};
    const Result<std::int64_t> moved = moves_->move(weights_.code_layers(), ts);
    if (!moved.ok()) return moved.status();
    codes_moved_ += *moved;
    weights_.codes_changed(ts);
    ts.synchronize();
    return ts.take();
  }

  /// Where a sequence's rows of the teacher lie.
  [[nodiscard]] S* hidden_of(std::size_t sequence) const {
    return hidden_.data() + first_[sequence] * pass_config().hidden_size;
  }

  [[nodiscard]] Status ask_teacher() {
    for (std::size_t i = 0; i < sequences_.size();) {
      S* const to = hidden_of(i);  // of sequences that lie one after the other
      batch_.clear();
      do append(sequences_[i++]);
      while (i < sequences_.size() &&
             std::ssize(batch_.tokens) + targets_of(sequences_[i]) <= pass_.max_rows());
      if (Status s = pass_.hidden(teacher_->view(), batch_, to); !s.ok()) return s;
    }
    pass_.train_stream().synchronize();
    return pass_.train_stream().take();
  }

  /// Calls body(where losses go) for each pass over sequences[chosen], in batch_ with the teacher's rows.
  template <class Body>
  [[nodiscard]] Status for_passes(const Sequences& sequences, const std::vector<std::size_t>& chosen,
                                  Body&& body) {
    std::vector<std::int64_t> rows;
    rows.reserve(chosen.size());
    for (const std::size_t i : chosen) rows.push_back(targets_of(sequences[i]));
    const auto width = static_cast<std::size_t>(pass_config().hidden_size);
    std::int64_t done = 0;
    for (const std::vector<std::size_t>& pack : pack_by_length(rows, options_.pass_tokens)) {
      batch_.clear();
      for (const std::size_t at : pack) {
        const std::size_t sequence = chosen[at];
        pass_.train_stream().copy(teacher_rows_.data() + batch_.loss_rows.size() * width, hidden_of(sequence),
                                  static_cast<std::size_t>(rows[at]) * width * sizeof(S),
                                  cudaMemcpyDeviceToDevice);
        append(sequences[sequence]);
      }
      batch_.teacher = teacher_rows_.data();
      batch_.teacher_head = teacher_->view().head();
      batch_.label_share = label_share_;
      if (Status s = body(losses_.data() + done); !s.ok()) return s;
      done += std::ssize(batch_.labels);
    }
    return {};
  }

  TrainableModel<float>* student_;
  std::shared_ptr<const DeviceFrozenWeights<S>> teacher_;
  DeviceTrainPass<S> pass_;
  DeviceTrainable<S> weights_;
  DeviceAdamW optimizer_;
  detail::DeviceStepper stepper_;
  TrainOptions options_;
  CodeMoveOptions move_options_;
  std::optional<detail::DeviceCodeMoves> moves_;
  std::int64_t codes_moved_ = 0;
  double label_share_ = 0.0;
  Sequences sequences_;
  std::vector<std::int64_t> first_;  // [sequences]: its first row in hidden_
  prefillshare::detail::ExampleOrder order_;
  DeviceLossBatch<S> batch_;     // of the pass at hand
  DeviceArray<S> hidden_;        // [rows of all sequences][hidden], the teacher's
  DeviceArray<S> teacher_rows_;  // [rows of a pass][hidden]
  DeviceArray<float> losses_;    // [rows of a step]
  DeviceArray<float> shares_;    // [parameters / 4]
};

}  // namespace prefillshare::cuda
