// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/tune_block.hpp - tunes the codebooks, scales and norms of a quantized block so that the
// block as a whole gives what the dense one gave.
// Layer: train (host only).
// See: AQLM (arXiv 2401.06118), section 3.4 (fine-tuning within a block).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/quantize/additive.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/llama.hpp>
#include <prefillshare/train/adamw.hpp>
#include <prefillshare/train/block.hpp>
#include <prefillshare/train/trainable_linear.hpp>

namespace prefillshare {

/// How a quantized block is tuned.
struct BlockTuneOptions {
  int steps = 16;              ///< of Adam; 0 leaves the block as it is
  double rate = 1e-3;          ///< highest learning rate, in shares of each tensor's root mean square
  std::int64_t tokens = 2048;  ///< of a step: as many whole sequences as fit, at least one
  std::int64_t held_out = 4;   ///< sequences that only judge the result; at most a quarter of all
  std::uint64_t seed = 1;      ///< of the order of the sequences
};

/// Mean over tokens of |y - target|^2 / |target|^2 on the held-out sequences, fp16 rounding included.
struct BlockTuneReport {
  double before = 0.0;  ///< of what was given
  double after = 0.0;   ///< of what was returned
  bool kept = false;    ///< whether a tuned block is what was returned
  float share = 0.0F;   ///< of the way that Adam went, as kept
};

/// What a block reads and is to give: [tokens][hidden_size] each, sequence after sequence.
struct BlockStream {
  std::span<const std::int64_t> lengths;  ///< tokens of each sequence
  const float* inputs = nullptr;          ///< of the block
  const float* targets = nullptr;         ///< what it is to give
};

/// A quantized block: its layers in the order of BlockLinear, and its norms (head norms may be empty).
struct QuantizedBlock {
  std::vector<codegemm::QuantizedMatrix> linears;  ///< by BlockLinear
  std::vector<float> input_norm;                   ///< [hidden_size]
  std::vector<float> post_attention_norm;          ///< [hidden_size]
  std::vector<float> q_norm;                       ///< [head_dim] or empty
  std::vector<float> k_norm;                       ///< [head_dim] or empty
};

namespace detail {

class BlockTuner {
 public:
  BlockTuner(const ModelConfig& config, const QuantizedBlock& block, const LlamaLayer<DenseLinear>& biases,
             const BlockStream& stream, const BlockTuneOptions& options, const RopeTable& rope,
             Executor& executor)
      : c_(config), stream_(stream), options_(options), executor_(executor) {
    const DenseLinear* const dense[] = {&biases.q,    &biases.k,  &biases.v,   &biases.o,
                                        &biases.gate, &biases.up, &biases.down};
    for (std::size_t i = 0; i < kBlockLinears; ++i) {
      linears_.push_back(
          TrainableLinear<float>::codebooks(block.linears[i], *dense[i], codegemm::concat(i), parameters_));
      const std::int64_t size = linears_[i].rows() * linears_[i].cols();
      scratch_[i].resize(size);
      gradient_[i].resize(size);
    }
    const std::vector<float>* const norms[] = {&block.input_norm, &block.post_attention_norm, &block.q_norm,
                                               &block.k_norm};
    for (std::size_t i = 0; i < norms_.size(); ++i) {
      if (norms[i]->empty()) continue;
      const auto size = static_cast<std::int64_t>(norms[i]->size());
      norms_[i] = &add_parameter(parameters_, codegemm::concat("norm ", i), {size}, false);
      std::copy(norms[i]->begin(), norms[i]->end(), norms_[i]->value.data());
    }
    std::int64_t first = 0;
    for (const std::int64_t length : stream.lengths) {
      firsts_.push_back(first);
      first += length;
      rows_ = std::max(rows_, length);
    }
    rows_ = std::max(rows_, options.tokens);
    pass_ = std::make_unique<BlockPass<float>>(config, rope, rows_, executor);
    for (Tensor<float>* x : {&x_, &y_, &target_}) x->resize(rows_ * config.hidden_size);
    const auto sequences = static_cast<std::int64_t>(stream.lengths.size());
    held_out_ = std::min(options.held_out, sequences / 4);
    for (std::int64_t i = 0; i < sequences - held_out_; ++i) order_.push_back(i);
    codegemm::detail::SplitMix random(options.seed);
    for (std::size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random.next() % i]);
  }

  /// The mean relative error of the sequences that are held out, or of all if none are.
  [[nodiscard]] double judge() {
    std::vector<std::int64_t> judged = order_;
    if (held_out_ > 0) {
      judged.clear();
      const auto sequences = static_cast<std::int64_t>(stream_.lengths.size());
      for (std::int64_t i = sequences - held_out_; i < sequences; ++i) judged.push_back(i);
    }
    const BlockWeights<float> w = weights();
    double sum = 0.0;
    std::int64_t tokens = 0;
    for (std::size_t at = 0; at < judged.size();) {
      const std::int64_t rows = gather(judged, at, false);
      pass_->forward(w, segments_, positions_.data(), 0, rows, x_.data(), y_.data());
      sum += compare(rows, false) * static_cast<double>(rows);
      tokens += rows;
    }
    return sum / static_cast<double>(tokens);
  }

  void run() {
    AdamWOptions adam;
    adam.beta2 = 0.95;
    adam.epsilon = 1e-12;
    adam.weight_decay = 0.0;
    AdamW<float> optimizer(parameters_, adam);
    std::vector<double> scales;
    for (const Parameter<float>& p : parameters_) {
      double squares = 0.0;
      for (const float x : p.value.span()) squares += static_cast<double>(x) * static_cast<double>(x);
      scales.push_back(std::sqrt(squares / static_cast<double>(p.value.size())));
    }
    std::size_t at = 0;
    for (int step = 0; step < options_.steps; ++step) {
      for (Parameter<float>& p : parameters_) p.gradient.zero();
      const std::int64_t rows = gather(order_, at, true);
      const BlockWeights<float> w = weights();
      pass_->forward(w, segments_, positions_.data(), 0, rows, x_.data(), y_.data());
      compare(rows, true);
      pass_->backward(w, gradients(), segments_, positions_.data(), 0, rows, x_.data(), y_.data());
      for (std::size_t i = 0; i < kBlockLinears; ++i)
        linears_[i].pull_back(gradient_[i].data(), pass_->products());
      const double rate = options_.rate * rate_share(RateSchedule::kCosine, step, options_.steps, 0.1);
      optimizer.update(parameters_, rate, scales, executor_);
    }
  }

  /// Parameters as they are: where a later move_to() begins or ends.
  [[nodiscard]] std::vector<Tensor<float>> snapshot() const {
    std::vector<Tensor<float>> out;
    for (const Parameter<float>& p : parameters_) {
      out.emplace_back(p.value.size());
      std::copy(p.value.span().begin(), p.value.span().end(), out.back().data());
    }
    return out;
  }

  /// The parameters at `share` of the way from `begin` to `end`, rounded to what fp16 holds.
  void move_to(const std::vector<Tensor<float>>& begin, const std::vector<Tensor<float>>& end, float share) {
    for (std::size_t i = 0; i < begin.size(); ++i) {
      Tensor<float>& value = parameters_[i].value;
      for (std::int64_t e = 0; e < value.size(); ++e) {
        const float x = begin[i][e] + share * (end[i][e] - begin[i][e]);
        const float rounded = codegemm::Half::from_float(x).to_float();
        value[e] = std::isfinite(rounded) ? rounded : begin[i][e];
      }
    }
  }

  /// The block as it is now.
  [[nodiscard]] QuantizedBlock block() const {
    QuantizedBlock out;
    for (const TrainableLinear<float>& linear : linears_) out.linears.push_back(linear.codes()->matrix());
    std::vector<float>* const norms[] = {&out.input_norm, &out.post_attention_norm, &out.q_norm, &out.k_norm};
    for (std::size_t i = 0; i < norms_.size(); ++i) {
      if (norms_[i] == nullptr) continue;
      norms[i]->assign(norms_[i]->value.span().begin(), norms_[i]->value.span().end());
    }
    return out;
  }

 private:
  [[nodiscard]] BlockWeights<float> weights() {
    BlockWeights<float> out;
    const auto norm = [&](std::size_t i) { return norms_[i] != nullptr ? norms_[i]->value.data() : nullptr; };
    out.input_norm = norm(0);
    out.post_attention_norm = norm(1);
    out.q_norm = norm(2);
    out.k_norm = norm(3);
    for (std::size_t i = 0; i < kBlockLinears; ++i)
      out.linears[i] = linears_[i].materialize(scratch_[i].data(), pass_->products());
    return out;
  }

  [[nodiscard]] BlockGradients<float> gradients() {
    BlockGradients<float> out;
    const auto norm = [&](std::size_t i) {
      return norms_[i] != nullptr ? norms_[i]->gradient.data() : nullptr;
    };
    out.input_norm = norm(0);
    out.post_attention_norm = norm(1);
    out.q_norm = norm(2);
    out.k_norm = norm(3);
    for (std::size_t i = 0; i < kBlockLinears; ++i)
      out.linears[i] = linears_[i].gradients(gradient_[i].data());
    return out;
  }

  /// Lays sequences order[at], order[at + 1], ... one after the other, as many as fit, and moves `at` behind
  /// them; with `wrap` from the end back to the beginning, each at most once. Returns their rows.
  std::int64_t gather(const std::vector<std::int64_t>& order, std::size_t& at, bool wrap) {
    segments_.clear();
    positions_.clear();
    std::int64_t rows = 0;
    const std::int64_t h = c_.hidden_size;
    while (segments_.size() < order.size() && at < order.size()) {
      const auto sequence = static_cast<std::size_t>(order[at]);
      const std::int64_t length = stream_.lengths[sequence];
      if (rows > 0 && rows + length > options_.tokens) break;
      std::copy_n(stream_.inputs + firsts_[sequence] * h, length * h, x_.data() + rows * h);
      std::copy_n(stream_.targets + firsts_[sequence] * h, length * h, target_.data() + rows * h);
      segments_.push_back({rows, length, 0, 0, nullptr, nullptr});
      for (std::int64_t i = 0; i < length; ++i) positions_.push_back(i);
      rows += length;
      ++at;
      if (wrap && at == order.size()) at = 0;
    }
    return rows;
  }

  /// The mean relative error of y; with `gradient` y becomes its gradient. Each token counts in relation to
  /// its own size, as what reads it next is an RMSNorm; else the few tokens with huge activations decide.
  double compare(std::int64_t rows, bool gradient) {
    const std::int64_t h = c_.hidden_size;
    std::vector<double> errors(static_cast<std::size_t>(rows));
    for_ranges(rows, executor_, [&](std::int64_t, std::int64_t first, std::int64_t count) {
      for (std::int64_t t = first; t < first + count; ++t) {
        TrainArray<float> y(y_.data() + t * h, h);
        const TrainConstArray<float> target(target_.data() + t * h, h);
        y -= target;
        const float size = target.square().sum() + 1e-20F;
        errors[static_cast<std::size_t>(t)] = static_cast<double>(y.square().sum() / size);
        if (gradient) y *= 2.0F / (size * static_cast<float>(rows));
      }
    });
    double sum = 0.0;
    for (const double e : errors) sum += e;
    return sum / static_cast<double>(rows);
  }

  const ModelConfig& c_;
  const BlockStream& stream_;
  const BlockTuneOptions& options_;
  Executor& executor_;
  ParameterList<float> parameters_;
  std::vector<TrainableLinear<float>> linears_;
  std::array<Parameter<float>*, 4> norms_{};
  std::array<Tensor<float>, kBlockLinears> scratch_;
  std::array<Tensor<float>, kBlockLinears> gradient_;
  std::unique_ptr<BlockPass<float>> pass_;
  std::vector<std::int64_t> firsts_;  // first token of each sequence
  std::vector<std::int64_t> order_;   // sequences to learn from
  std::int64_t held_out_ = 0;
  std::int64_t rows_ = 0;
  std::vector<Segment<float>> segments_;
  std::vector<std::int64_t> positions_;
  Tensor<float> x_, y_, target_;  // [rows][hidden]
};

}  // namespace detail

/// Tunes the codebooks, scales and norms of `block` by Adam, codes fixed, so that its output on stream.inputs
/// comes nearer to stream.targets. `biases` gives the layers' biases, which stay. Where Adam ended, and some
/// points on the way there, are rounded to fp16 and judged on sequences that were not learned from; the best
/// is returned, and the block as it was where none is better. The same bits for any number of workers.
/// `report` may be null. Errors: kInvalidArgument for options, kShapeMismatch for a block that does not fit
/// the config, kOutOfMemory.
[[nodiscard]] inline Result<QuantizedBlock> tune_block(const ModelConfig& config, const QuantizedBlock& block,
                                                       const LlamaLayer<DenseLinear>& biases,
                                                       const BlockStream& stream,
                                                       const BlockTuneOptions& options, Executor& executor,
                                                       BlockTuneReport* report = nullptr) {
  if (options.steps < 0 || !(options.rate > 0.0) || options.tokens < 1 || options.held_out < 0) {
    return error(StatusCode::kInvalidArgument, "tune_block: steps = ", options.steps,
                 ", rate = ", options.rate, ", tokens = ", options.tokens, ", held_out = ", options.held_out);
  }
  if (Status s = validate(config); !s.ok()) return s;
  const auto shapes = detail::linear_shapes(config);
  if (block.linears.size() != kBlockLinears) {
    return error(StatusCode::kShapeMismatch, "tune_block: ", block.linears.size(), " linear layers, not ",
                 kBlockLinears);
  }
  for (std::size_t i = 0; i < kBlockLinears; ++i) {
    if (block.linears[i].rows() == shapes[i].first && block.linears[i].cols() == shapes[i].second) continue;
    return error(StatusCode::kShapeMismatch, "tune_block: linear layer ", i, " is ", block.linears[i].rows(),
                 " x ", block.linears[i].cols(), ", the config needs ", shapes[i].first, " x ",
                 shapes[i].second);
  }
  const auto hidden = static_cast<std::size_t>(config.hidden_size);
  const auto head = static_cast<std::size_t>(config.qk_norm ? config.head_dim : 0);
  if (block.input_norm.size() != hidden || block.post_attention_norm.size() != hidden ||
      block.q_norm.size() != head || block.k_norm.size() != head) {
    return error(StatusCode::kShapeMismatch, "tune_block: norms of ", block.input_norm.size(), ", ",
                 block.post_attention_norm.size(), ", ", block.q_norm.size(), " and ", block.k_norm.size(),
                 " values, the config needs ", hidden, " and ", head);
  }
  std::int64_t longest = 0;
  for (const std::int64_t length : stream.lengths) {
    if (length < 1)
      return error(StatusCode::kInvalidArgument, "tune_block: a sequence of ", length, " tokens");
    longest = std::max(longest, length);
  }
  if (longest == 0 || options.steps == 0) return block;
  if (stream.inputs == nullptr || stream.targets == nullptr)
    return error(StatusCode::kNullPointer, "tune_block: inputs or targets are null");
  Result<RopeTable> rope = RopeTable::create(config.rope, longest);
  if (!rope.ok()) return rope.status();
  try {
    BlockTuneReport own;
    BlockTuneReport& out = report != nullptr ? *report : own;
    detail::BlockTuner tuner(config, block, biases, stream, options, *rope, executor);
    out.before = out.after = tuner.judge();
    const std::vector<Tensor<float>> begin = tuner.snapshot();
    tuner.run();
    const std::vector<Tensor<float>> end = tuner.snapshot();
    // Part of the way keeps most of the gain and little of the noise that Adam's steps are made of.
    float best = 0.0F;
    for (const float share : {1.0F, 0.5F, 0.25F, 0.125F}) {
      tuner.move_to(begin, end, share);
      const double judged = tuner.judge();
      if (!(judged < out.after)) continue;
      out.after = judged;
      best = share;
    }
    out.kept = best > 0.0F;
    out.share = best;
    if (!out.kept) return block;
    tuner.move_to(begin, end, best);
    return tuner.block();
  } catch (const std::bad_alloc&) {
    return error(StatusCode::kOutOfMemory, "tune_block: no memory for ", options.tokens, " tokens");
  }
}

}  // namespace prefillshare
