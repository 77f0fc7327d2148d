// SPDX-License-Identifier: Apache-2.0
//
// bench/support/explore_latency.hpp - the time of one token through a model's linear layers, weights out of
// memory.
#pragma once

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/base/executor.hpp>
#include <codegemm/gemm.hpp>
#include <support/random.hpp>

#include "cpu_peers.hpp"
#include "machine.hpp"
#include "problems.hpp"

namespace codegemm::bench {

/// A linear layer of a block.
struct LayerShape {
  std::string name;  // "q_proj"
  Shape shape;
};

/// How long is measured.
struct LatencyEffort {
  double cold_bytes = kColdBytes;
  double seconds = 1.0;
};

/// Median microseconds of each layer, and the bytes that its weights take as the kernels hold them.
struct BlockTimes {
  std::vector<double> us;
  std::vector<std::int64_t> bytes;
};

/// A token goes through one block after the other, so many that no cache holds them. Weights are random: how
/// long a product takes does not depend on what they are.
[[nodiscard]] inline BlockTimes time_block(Format format, const std::vector<LayerShape>& layers,
                                           const LatencyEffort& effort, Executor& executor) {
  test::Rng random(1);
  std::vector<std::vector<PackedMatrix>> blocks;
  double bytes = 0.0;
  std::size_t workspace_size = 64;
  while (blocks.size() < 2 || bytes < effort.cold_bytes) {
    std::vector<PackedMatrix>& block = blocks.emplace_back();
    for (const LayerShape& layer : layers) {
      Result<PackedMatrix> packed = pack(random_weights(format, layer.shape, random).view());
      if (!packed.ok()) throw std::runtime_error(packed.status().message());
      bytes += static_cast<double>(packed->bytes());
      workspace_size = std::max(workspace_size, workspace_bytes(*packed, 1, executor.workers()));
      block.push_back(std::move(packed).value());
    }
  }
  std::vector<Matrix> inputs;
  std::vector<Matrix> outputs;
  BlockTimes out;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    inputs.push_back(random_matrix(1, layers[i].shape.cols, random));
    outputs.emplace_back(1, layers[i].shape.rows);
    out.bytes.push_back(static_cast<std::int64_t>(blocks.front()[i].bytes()));
  }
  AlignedBuffer<std::byte> workspace;
  if (!workspace.reserve(workspace_size)) throw std::bad_alloc();
  std::vector<std::vector<double>> times(layers.size());
  const auto begin = std::chrono::steady_clock::now();
  for (std::size_t round = 0; round < blocks.size() || seconds_since(begin) < effort.seconds; ++round) {
    const std::vector<PackedMatrix>& block = blocks[round % blocks.size()];
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      const Status status = gemm(block[i], {inputs[i].data(), 1, inputs[i].cols()},
                                 {outputs[i].data(), 1, outputs[i].cols()}, workspace.span(), executor);
      if (!status.ok()) throw std::runtime_error(status.message());
      times[i].push_back(seconds_since(start));
    }
  }
  for (std::vector<double>& one : times) out.us.push_back(median(std::move(one)) * 1e6);
  return out;
}

/// Median microseconds of ggml's product of one token with weights of its types, each measured once.
class GgmlTimes {
 public:
  GgmlTimes(const LatencyEffort& effort, Executor& executor) : effort_(effort), executor_(executor) {}

  [[nodiscard]] const Ggml& library() const { return ggml_; }

  /// NaN where the library is not there, or has no product for the type and shape.
  [[nodiscard]] double us(int type, Shape shape) {
    const auto key = std::make_tuple(type, shape.rows, shape.cols);
    const auto found = us_.find(key);
    return found != us_.end() ? found->second : us_[key] = measure(type, shape);
  }

 private:
  [[nodiscard]] double measure(int id, Shape shape) const {
    if (!ggml_.loaded()) return std::nan("");
    for (const Ggml::Type& type : Ggml::file_types()) {
      if (type.id != id) continue;
      test::Rng random(1);
      const auto w = ggml_.weights(type, shape, random);
      if (!w) return std::nan("");
      const Matrix x = random_matrix(1, shape.cols, random);
      Matrix y(1, shape.rows);
      std::vector<double> times;
      const auto begin = std::chrono::steady_clock::now();
      const double seconds = effort_.seconds / 4.0;
      for (std::size_t i = 0; i < w->copies.size() || seconds_since(begin) < seconds; ++i) {
        const auto start = std::chrono::steady_clock::now();
        ggml_.multiply(type, *w, i % w->copies.size(), x.data(), y.data(), executor_);
        times.push_back(seconds_since(start));
      }
      return median(std::move(times)) * 1e6;
    }
    return std::nan("");
  }

  LatencyEffort effort_;
  Executor& executor_;
  Ggml ggml_;
  std::map<std::tuple<int, std::int64_t, std::int64_t>, double> us_;
};

}  // namespace codegemm::bench
