// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/calibrate.hpp - runs a model over calibration tokens block by block, so that each linear
// layer is replaced knowing what it will see behind the layers replaced before it.
// Layer: model (host only).
// See: examples/06_quantize.cpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/quantize/corrected.hpp>
#include <codegemm/quantize/gram.hpp>
#include <prefillshare/kv/storage.hpp>
#include <prefillshare/model/block_reader.hpp>
#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/model/forward.hpp>
#include <prefillshare/model/llama.hpp>

namespace prefillshare {

namespace detail {

/// A dense layer that multiplies, or keeps its inputs and gives zeros, or does nothing and gives zeros.
class ObservedLinear {
 public:
  enum class Use { kMultiply, kObserve, kSkip };

  ObservedLinear() = default;
  explicit ObservedLinear(DenseLinear dense) : dense_(std::move(dense)) {}

  [[nodiscard]] std::int64_t rows() const noexcept { return dense_.rows(); }
  [[nodiscard]] std::int64_t cols() const noexcept { return dense_.cols(); }
  [[nodiscard]] std::int64_t parameter_bytes() const noexcept { return dense_.parameter_bytes(); }
  [[nodiscard]] std::size_t workspace_bytes(std::int64_t tokens, int workers) const noexcept {
    return dense_.workspace_bytes(tokens, workers);
  }

  void multiply() noexcept { use_ = Use::kMultiply; }
  void skip() noexcept { use_ = Use::kSkip; }
  /// The next inputs are appended to `inputs`.
  void observe(std::vector<float>* inputs) noexcept {
    use_ = Use::kObserve;
    inputs_ = inputs;
  }
  [[nodiscard]] const DenseLinear& dense() const noexcept { return dense_; }

  Status forward(MatrixView<const float> x, MatrixView<float> y, std::span<std::byte> workspace,
                 Executor& executor) const {
    if (use_ == Use::kMultiply) return dense_.forward(x, y, workspace, executor);
    for (std::int64_t t = 0; t < y.rows; ++t) std::fill_n(y.row(t), y.cols, 0.0F);
    if (use_ == Use::kObserve) {
      for (std::int64_t t = 0; t < x.rows; ++t) inputs_->insert(inputs_->end(), x.row(t), x.row(t) + x.cols);
    }
    return {};
  }

 private:
  DenseLinear dense_;
  Use use_ = Use::kMultiply;
  std::vector<float>* inputs_ = nullptr;
};
static_assert(LinearLayer<ObservedLinear>);

}  // namespace detail

/// Replaces linear layers. find() gives a replacement that is there already (an interrupted run goes on), or
/// nothing; make() gets the layer's name, the dense weights that it is to stand for (corrected, if so asked)
/// and H = X^T X / T of its inputs ([K][K]).
template <class R>
concept LayerReplacer = requires(R& replacer, const std::string& name, const DenseLinear& dense,
                                 MatrixView<const float> gram) {
  { replacer.find(name, dense) } -> std::same_as<Result<std::optional<DenseLinear>>>;
  { replacer.make(name, dense, gram) } -> std::same_as<Result<DenseLinear>>;
};

/// A block whose linear layers are all replaced, and what it reads and is to give: the residual stream before
/// it, behind the blocks replaced so far, and what the dense block makes there: of the dense model's own
/// stream where the run corrects, else of the same inputs. [tokens][hidden_size], sequence after sequence.
struct ReplacedBlock {
  const ModelConfig& config;              ///< of the model
  std::int64_t index = 0;                 ///< of the block
  std::span<const std::int64_t> lengths;  ///< tokens of each sequence
  const float* inputs = nullptr;          ///< see above
  const float* targets = nullptr;         ///< see above
};

/// A LayerReplacer that, where finishes() says so, also looks at each block as a whole: finish() may change
/// `layer`, the block as replaced: its norms, and its linear layers for others of their shapes.
template <class R>
concept BlockFinisher = LayerReplacer<R> &&
    requires(R& replacer, const ReplacedBlock& block, LlamaLayer<DenseLinear>& layer) {
  { replacer.finishes() } -> std::same_as<bool>;
  { replacer.finish(block, layer) } -> std::same_as<Status>;
};

/// What calibrate_blocks() may be told.
struct CalibrationRunOptions {
  /// Layers are given weights corrected for the errors of those replaced before (corrected_weights()). Takes
  /// a second residual stream, that of the dense model, and about twice the time.
  bool correct = true;
  double correction_damping = 0.1;  ///< as in corrected_weights()
};

/// The residual stream of all calibration sequences between two blocks of a model. Blocks are replaced one
/// after the other; within a block q, k and v come first, then o, then gate and up, then down, each seeing
/// the inputs that the ones before, as replaced, give it; a BlockFinisher sees the whole block last.
/// Bit-identical for any number of workers, and whether replacements were found or made.
class CalibrationRun {
 public:
  /// Sequences of up to context_length tokens, none empty. With `read` each block comes from there when its
  /// turn is, and goes again: the layers of `model` then need only shapes (DenseLinear::without_weights()).
  /// kInvalidArgument for tokens outside of the vocabulary or a sequence's length; kOutOfMemory.
  [[nodiscard]] static Result<CalibrationRun> create(std::shared_ptr<const LlamaModel<DenseLinear>> model,
                                                     const std::vector<std::vector<std::int32_t>>& sequences,
                                                     int workers, const CalibrationRunOptions& options = {},
                                                     BlockReader read = {}) {
    const ModelConfig& c = model->config;
    std::int64_t longest = 0;
    std::int64_t total = 0;
    for (const std::vector<std::int32_t>& tokens : sequences) {
      const auto length = static_cast<std::int64_t>(tokens.size());
      if (length < 1 || length > c.context_length) {
        return error(StatusCode::kInvalidArgument, "CalibrationRun: a sequence of ", length,
                     " tokens, must be in 1..", c.context_length);
      }
      for (const std::int32_t token : tokens) {
        if (token >= 0 && token < c.vocab_size) continue;
        return error(StatusCode::kInvalidArgument, "CalibrationRun: token ", token, ", the vocabulary has ",
                     c.vocab_size);
      }
      longest = std::max(longest, length);
      total += length;
    }
    if (sequences.empty()) return error(StatusCode::kInvalidArgument, "CalibrationRun: no sequences");

    CalibrationRun run;
    run.shell_.config = c;
    run.shell_.embedding = model->embedding;
    run.shell_.layers.resize(1);  // for the workspace's size
    run.load_block(model->layers.front());
    Result<ForwardWorkspace> workspace = ForwardWorkspace::create(run.shell_, longest, longest, workers);
    if (!workspace.ok()) return workspace.status();
    run.workspace_ = std::make_unique<ForwardWorkspace>(*std::move(workspace));
    KvShape shape = kv_shape(c);
    shape.layers = 1;
    const std::int64_t blocks = (longest + shape.block_tokens - 1) / shape.block_tokens;
    Result<HostKvStorage> storage = HostKvStorage::create(shape, blocks);
    if (!storage.ok()) return storage.status();
    run.storage_ = std::make_unique<HostKvStorage>(*std::move(storage));
    for (std::int64_t i = 0; i < blocks; ++i) run.blocks_.push_back(static_cast<BlockId>(i));
    try {
      run.hidden_.resize(static_cast<std::size_t>(total * c.hidden_size));
      run.tokens_.resize(static_cast<std::size_t>(longest));
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "CalibrationRun: ", total, " tokens of ", c.hidden_size);
    }
    std::size_t at = 0;
    for (const std::vector<std::int32_t>& tokens : sequences) {
      for (const std::int32_t token : tokens) {
        std::copy_n(model->embedding->data() + token * c.hidden_size, c.hidden_size, run.hidden_.data() + at);
        at += static_cast<std::size_t>(c.hidden_size);
      }
      run.lengths_.push_back(static_cast<std::int64_t>(tokens.size()));
    }
    run.options_ = options;
    if (options.correct) {
      run.dense_hidden_ = run.hidden_;
      run.dense_shell_ = run.shell_;
    }
    run.model_ = std::move(model);
    run.read_ = std::move(read);
    return run;
  }

  /// Blocks replaced so far.
  [[nodiscard]] std::int64_t blocks_done() const noexcept { return done_; }
  /// The residual stream behind them, [tokens][hidden_size], sequence after sequence.
  [[nodiscard]] std::span<const float> hidden() const noexcept { return hidden_; }

  /// Replaces the linear layers of the next block and runs all sequences through it. Errors are those of
  /// reading the block and the replacer's own, with the layer's name; kInvalidArgument after the last block;
  /// kShapeMismatch for a replacement of another shape; kOutOfMemory, after which the run cannot go on.
  template <LayerReplacer Replacer>
  [[nodiscard]] Status next_block(Replacer& replacer, Executor& executor) {
    if (done_ >= model_->config.layers)
      return error(StatusCode::kInvalidArgument, "CalibrationRun: all ", done_, " blocks are done");
    try {
      return run_block(replacer, executor);
    } catch (const std::bad_alloc&) {
      return error(StatusCode::kOutOfMemory, "CalibrationRun: no memory for block ", done_);
    }
  }

 private:
  using Layer = LlamaLayer<detail::ObservedLinear>;
  using Pass = detail::Forward<detail::ObservedLinear>;
  enum class Streams { kReplaced, kDense, kBoth };
  struct Part {
    std::string name;
    detail::ObservedLinear* linear;
  };

  CalibrationRun() = default;

  template <class Replacer>
  Status run_block(Replacer& replacer, Executor& executor) {
    if (read_) {
      load_block({});  // the block before goes first
      dense_shell_.layers.clear();
      const Result<LlamaLayer<DenseLinear>> block = read_(done_);
      if (!block.ok()) return block.status();
      load_block(*block);
    } else {
      load_block(model_->layers[static_cast<std::size_t>(done_)]);
    }
    bool finishes = false;
    if constexpr (BlockFinisher<Replacer>) finishes = replacer.finishes();
    const Streams both = options_.correct || finishes ? Streams::kBoth : Streams::kReplaced;
    std::vector<float> inputs;  // of the block
    if (finishes) inputs = hidden_;
    if (finishes && !options_.correct) {
      dense_hidden_ = hidden_;
      dense_shell_.config = shell_.config;
    }
    if (both == Streams::kBoth) dense_shell_.layers = shell_.layers;
    Layer& layer = shell_.layers.front();
    const std::string prefix = codegemm::concat("model.layers.", done_, ".");
    const Part q{prefix + "self_attn.q_proj", &layer.q};
    const Part k{prefix + "self_attn.k_proj", &layer.k};
    const Part v{prefix + "self_attn.v_proj", &layer.v};
    const Part o{prefix + "self_attn.o_proj", &layer.o};
    const Part gate{prefix + "mlp.gate_proj", &layer.gate};
    const Part up{prefix + "mlp.up_proj", &layer.up};
    const Part down{prefix + "mlp.down_proj", &layer.down};
    // What is only looked at adds zeros to the residual stream, so no pass but those of advance() changes it.
    const auto norm_in = [](Pass& pass, const Layer& block) { return pass.write_cache(block, 0); };
    const auto attend = [](Pass& pass, const Layer& block) {
      const Status s = pass.write_cache(block, 0);
      return s.ok() ? pass.attend(block, 0) : s;
    };
    const auto feed = [](Pass& pass, const Layer& block) { return pass.feed_forward(block); };

    layer.v.skip();
    if (Status s = replace({q, k, v}, &Layer::k, norm_in, replacer, executor); !s.ok()) return s;
    if (Status s = replace({o}, &Layer::o, attend, replacer, executor); !s.ok()) return s;
    if (Status s = advance(attend, both, executor); !s.ok()) return s;
    layer.up.skip();
    layer.down.skip();
    if (Status s = replace({gate, up}, &Layer::gate, feed, replacer, executor); !s.ok()) return s;
    if (Status s = replace({down}, &Layer::down, feed, replacer, executor); !s.ok()) return s;
    if (Status s = advance(feed, finishes ? Streams::kDense : both, executor); !s.ok()) return s;
    if constexpr (BlockFinisher<Replacer>) {
      if (finishes) {
        if (Status s = finish(replacer, prefix, inputs); !s.ok()) return s;
        hidden_ = std::move(inputs);
        if (Status s = advance(attend, Streams::kReplaced, executor); !s.ok()) return s;
        if (Status s = advance(feed, Streams::kReplaced, executor); !s.ok()) return s;
      }
    }
    ++done_;
    return {};
  }

  template <class Replacer>
  Status finish(Replacer& replacer, const std::string& prefix, const std::vector<float>& inputs) {
    const Layer& from = shell_.layers.front();
    LlamaLayer<DenseLinear> layer;
    layer.input_norm = from.input_norm;
    layer.post_attention_norm = from.post_attention_norm;
    layer.q_norm = from.q_norm;
    layer.k_norm = from.k_norm;
    layer.q = from.q.dense();
    layer.k = from.k.dense();
    layer.v = from.v.dense();
    layer.o = from.o.dense();
    layer.gate = from.gate.dense();
    layer.up = from.up.dense();
    layer.down = from.down.dense();
    const ReplacedBlock block{model_->config, done_, lengths_, inputs.data(), dense_hidden_.data()};
    if (Status s = replacer.finish(block, layer); !s.ok()) return s.with_prefix(prefix + "*");
    load_block(layer);
    return {};
  }

  void load_block(const LlamaLayer<DenseLinear>& from) {
    Layer& to = shell_.layers.front();
    to.input_norm = from.input_norm;
    to.post_attention_norm = from.post_attention_norm;
    to.q_norm = from.q_norm;
    to.k_norm = from.k_norm;
    to.q = detail::ObservedLinear(from.q);
    to.k = detail::ObservedLinear(from.k);
    to.v = detail::ObservedLinear(from.v);
    to.o = detail::ObservedLinear(from.o);
    to.gate = detail::ObservedLinear(from.gate);
    to.up = detail::ObservedLinear(from.up);
    to.down = detail::ObservedLinear(from.down);
  }

  /// Replaces layers that see the same inputs. `observed` is the one of them whose inputs `run` shows.
  template <class Run, class Replacer>
  Status replace(const std::vector<Part>& parts, detail::ObservedLinear Layer::*observed, const Run& run,
                 Replacer& replacer, Executor& executor) {
    std::vector<std::optional<DenseLinear>> found;
    bool all = true;
    for (const Part& part : parts) {
      Result<std::optional<DenseLinear>> replacement = replacer.find(part.name, part.linear->dense());
      if (!replacement.ok()) return replacement.status().with_prefix(part.name);
      all = all && replacement->has_value();
      found.push_back(*std::move(replacement));
    }
    std::vector<float> gram;
    std::vector<float> cross;
    if (!all) {
      if (Status s = measure(observed, run, gram, cross, executor); !s.ok()) return s;
    }
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const DenseLinear& dense = parts[i].linear->dense();
      if (!found[i].has_value()) {
        const MatrixView<const float> view(gram.data(), dense.cols(), dense.cols());
        Result<DenseLinear> target = correct(dense, view, cross, executor);
        if (!target.ok()) return target.status().with_prefix(parts[i].name);
        Result<DenseLinear> made = replacer.make(parts[i].name, *target, view);
        if (!made.ok()) return made.status().with_prefix(parts[i].name);
        found[i] = *std::move(made);
      }
      if (found[i]->rows() != dense.rows() || found[i]->cols() != dense.cols()) {
        return error(StatusCode::kShapeMismatch, parts[i].name, " is ", dense.rows(), " x ", dense.cols(),
                     ", its replacement ", found[i]->rows(), " x ", found[i]->cols());
      }
      *parts[i].linear = detail::ObservedLinear(*std::move(found[i]));
    }
    return {};
  }

  /// H of the inputs that a layer has now and, to correct its weights, C with those of the dense model.
  template <class Run>
  Status measure(detail::ObservedLinear Layer::*observed, const Run& run, std::vector<float>& gram,
                 std::vector<float>& cross, Executor& executor) {
    const std::int64_t inputs = (shell_.layers.front().*observed).cols();
    Result<codegemm::GramMatrix> sums = codegemm::GramMatrix::create(inputs);
    if (!sums.ok()) return sums.status();
    std::optional<codegemm::CrossGramMatrix> both;
    if (options_.correct) {
      Result<codegemm::CrossGramMatrix> made = codegemm::CrossGramMatrix::create(inputs);
      if (!made.ok()) return made.status();
      both = *std::move(made);
    }
    std::vector<float> x;
    std::vector<float> y;
    (shell_.layers.front().*observed).observe(&x);
    if (options_.correct) (dense_shell_.layers.front().*observed).observe(&y);
    std::int64_t first = 0;
    for (const std::int64_t length : lengths_) {
      x.clear();
      y.clear();
      if (Status s = pass(shell_, hidden_, first, length, run, false, executor); !s.ok()) return s;
      const MatrixView<const float> now(x.data(), length, inputs);
      if (Status s = sums->add(now, executor); !s.ok()) return s;
      if (options_.correct) {
        if (Status s = pass(dense_shell_, dense_hidden_, first, length, run, false, executor); !s.ok())
          return s;
        if (Status s = both->add(MatrixView<const float>(y.data(), length, inputs), now, executor); !s.ok())
          return s;
      }
      first += length;
    }
    gram = std::move(*sums).matrix();
    if (options_.correct) {
      (dense_shell_.layers.front().*observed).multiply();
      cross = std::move(*both).matrix();
    }
    return {};
  }

  /// The weights that a replacement is to stand for.
  Result<DenseLinear> correct(const DenseLinear& dense, MatrixView<const float> gram,
                              const std::vector<float>& cross, Executor& executor) const {
    if (!options_.correct) return dense;
    Result<std::vector<float>> weights = codegemm::corrected_weights(
        dense.weights(), gram, MatrixView<const float>(cross.data(), gram.rows, gram.cols),
        options_.correction_damping, executor);
    if (!weights.ok()) return weights.status();
    return DenseLinear(std::make_shared<const std::vector<float>>(*std::move(weights)), dense.rows(),
                       dense.cols(), std::vector<float>(dense.bias().begin(), dense.bias().end()));
  }

  /// Runs a step of the block on one sequence; what it makes of the residual stream is kept if `keep`.
  template <class Run>
  Status pass(const LlamaModel<detail::ObservedLinear>& shell, std::vector<float>& hidden, std::int64_t first,
              std::int64_t length, const Run& run, bool keep, Executor& executor) {
    const std::int64_t size = length * shell.config.hidden_size;
    float* const at = hidden.data() + first * shell.config.hidden_size;
    std::copy_n(at, size, workspace_->hidden.data());
    const ForwardItem item{std::span(tokens_).first(static_cast<std::size_t>(length)),
                           {storage_.get(), blocks_, 0}};
    Pass forward_pass(shell, std::span(&item, 1), *workspace_, executor);
    if (Status s = run(forward_pass, shell.layers.front()); !s.ok()) return s;
    if (keep) std::copy_n(workspace_->hidden.data(), size, at);
    return {};
  }

  template <class Run>
  Status advance(const Run& run, Streams streams, Executor& executor) {
    std::int64_t first = 0;
    for (const std::int64_t length : lengths_) {
      if (streams != Streams::kDense) {
        if (Status s = pass(shell_, hidden_, first, length, run, true, executor); !s.ok()) return s;
      }
      if (streams != Streams::kReplaced) {
        if (Status s = pass(dense_shell_, dense_hidden_, first, length, run, true, executor); !s.ok())
          return s;
      }
      first += length;
    }
    return {};
  }

  std::shared_ptr<const LlamaModel<DenseLinear>> model_;
  BlockReader read_;                          // may be empty
  LlamaModel<detail::ObservedLinear> shell_;  // the block at hand as its only layer
  std::unique_ptr<ForwardWorkspace> workspace_;
  std::unique_ptr<HostKvStorage> storage_;
  std::vector<BlockId> blocks_;
  std::vector<std::int32_t> tokens_;  // stand-ins: the residual stream is put in, not looked up
  std::vector<std::int64_t> lengths_;
  std::vector<float> hidden_;
  CalibrationRunOptions options_;
  LlamaModel<detail::ObservedLinear> dense_shell_;  // the same block as it was, where weights are corrected
  std::vector<float> dense_hidden_;
  std::int64_t done_ = 0;
};

}  // namespace prefillshare
