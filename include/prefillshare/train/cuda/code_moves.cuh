// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/code_moves.cuh - changes the codes of a quantized model while it is trained.
// Layer: train/cuda (host, needs nvcc).
// See: Malinovskii et al., PV-Tuning (arXiv 2405.14852); Bengio, Leonard and Courville (arXiv 1308.3432), the
// straight-through estimator
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <prefillshare/train/cuda/composed.cuh>
#include <prefillshare/train/cuda/kernels/code_moves.cuh>
#include <prefillshare/train/cuda/train_stream.cuh>

namespace prefillshare::cuda {

/// How codes follow the gradient.
struct CodeMoveOptions {
  double rate = 0.0;       ///< highest rate of the free weights, in shares of their size; 0: codes stay
  std::int64_t every = 5;  ///< steps between two changes of codes
  double until = 0.8;      ///< share of the steps after which codes stay, so that the rest fits them
  double beta1 = 0.9;      ///< of Adam on the free weights
  double beta2 = 0.98;     ///< the same
};

namespace detail {

/// Free weights beside those that the codes say. They go where the gradient of the codes' weights sends them
/// (straight through), and now and then codes become those nearest to them. Twelve bytes a weight. The same
/// bits each time on the same card.
class DeviceCodeMoves {
 public:
  /// The layers must outlive it, and keep their address when codes are moved. kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<DeviceCodeMoves> create(const CodesLayers& layers,
                                                      const CodeMoveOptions& options) {
    DeviceCodeMoves out(options);
    std::int64_t total = 0;
    for (const CodesTask& task : layers.tasks()) total += std::int64_t{task.rows} * task.cols;
    Allocations memory;
    memory.zeros(out.memory_, 3 * total);
    memory.make(out.count_, 1);
    if (Status s = memory.finish(); !s.ok()) return s;
    std::vector<MoveTask> moves;
    std::int64_t at = 0;
    for (std::size_t i = 0; i < layers.tasks().size(); ++i) {
      const CodesTask& task = layers.tasks()[i];
      MoveTask move;
      move.ahead = out.memory_.data() + at;
      move.first = move.ahead + total;
      move.second = move.first + total;
      move.codes = layers.codes(i);
      move.size = layers.size(i);
      moves.push_back(move);
      at += std::int64_t{task.rows} * task.cols;
      out.blocks_.add(i, 0, task.rows, kComposeRows);
      if (std::find(out.lengths_.begin(), out.lengths_.end(), task.v) == out.lengths_.end())
        out.lengths_.push_back(task.v);
    }
    memory.copy<MoveTask>(out.moves_, moves);
    out.blocks_.upload(memory);
    if (Status s = memory.finish(); !s.ok()) return s;
    return out;
  }

  /// After the gradients of a step. share: of the highest rate; state: of that step's update, device memory.
  void follow(const CodesLayers& layers, double share, const StepState* state, TrainStream& ts) {
    ++steps_;
    const double correct1 = 1.0 - std::pow(options_.beta1, static_cast<double>(steps_));
    const double correct2 = 1.0 - std::pow(options_.beta2, static_cast<double>(steps_));
    MoveArgs args = args_of(layers);
    args.state = state;
    args.beta1 = static_cast<float>(options_.beta1);
    args.beta2 = static_cast<float>(options_.beta2);
    args.root = static_cast<float>(1.0 / std::sqrt(correct2));
    args.rate = static_cast<float>(share * options_.rate / correct1);
    ts.start(move_ahead_kernel<0>, args, blocks_.blocks(), kComposeThreads);
  }
  /// Changes codes; waits, and gives how many. What is made of them is to be made again.
  [[nodiscard]] Result<std::int64_t> move(const CodesLayers& layers, TrainStream& ts) {
    ts.zero(count_.data(), sizeof(std::int32_t));
    const MoveArgs args = args_of(layers);
    for (const std::int32_t length : lengths_) {
      codegemm::detail::with_vec_len(
          length, [&](auto v) { ts.start(move_codes_kernel<v>, args, blocks_.blocks(), kComposeThreads); });
    }
    std::int32_t count = 0;
    ts.copy(&count, count_.data(), sizeof(count), cudaMemcpyDeviceToHost);
    ts.synchronize();
    if (Status s = ts.take(); !s.ok()) return s;
    return std::int64_t{count};
  }

 private:
  explicit DeviceCodeMoves(const CodeMoveOptions& options) : options_(options) {}

  [[nodiscard]] MoveArgs args_of(const CodesLayers& layers) const {
    MoveArgs args;
    args.tasks = layers.device_tasks();
    args.moves = moves_.data();
    args.blocks = blocks_.data();
    args.counts = count_.data();
    return args;
  }

  CodeMoveOptions options_;
  std::int64_t steps_ = 0;
  std::vector<std::int32_t> lengths_;  // of vectors, each once
  ComposeBlocks blocks_;
  DeviceArray<float> memory_;  // [3][weights]
  DeviceArray<MoveTask> moves_;
  DeviceArray<std::int32_t> count_;
};

}  // namespace detail
}  // namespace prefillshare::cuda
