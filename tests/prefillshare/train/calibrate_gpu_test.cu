// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/calibrate_gpu_test.cu - calibration on the GPU against the host's: the layers'
// inputs and weights.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/train/cuda/calibrate.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <prefillshare/model/calibrate.hpp>
#include <support/catch.hpp>

#include "gpu_training.cuh"

namespace prefillshare::test {
namespace {

/// Keeps what it is given and makes other weights of it.
struct Recorder {
  std::vector<std::string> names;
  std::vector<std::vector<float>> grams, weights;

  Result<std::optional<DenseLinear>> find(const std::string&, const DenseLinear&) {
    return std::optional<DenseLinear>();
  }
  Result<DenseLinear> make(const std::string& name, const DenseLinear& dense, MatrixView<const float> gram) {
    const auto size = static_cast<std::size_t>(dense.rows() * dense.cols());
    names.push_back(name);
    grams.emplace_back(gram.data, gram.data + gram.rows * gram.cols);
    weights.emplace_back(dense.weights().data, dense.weights().data + size);
    auto other = std::make_shared<std::vector<float>>(weights.back());
    for (std::size_t i = 0; i < size; ++i)
      (*other)[i] = 0.9F * (*other)[i] + 0.02F * std::sin(static_cast<float>(i));
    return DenseLinear(std::move(other), dense.rows(), dense.cols(),
                       std::vector<float>(dense.bias().begin(), dense.bias().end()));
  }
};

double relative(const std::vector<float>& got, const std::vector<float>& want) {
  double off = 0.0;
  double size = 1e-30;
  for (std::size_t i = 0; i < want.size(); ++i) {
    off += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  const double out = std::sqrt(off / size);
  return out == out ? out : HUGE_VAL;
}

}  // namespace

TEST_CASE("calibration on the GPU gives layers the inputs and weights of the host's", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  codegemm::ThreadPool pool(2);
  for (const std::size_t which : {0, 1, 3}) {
    const Variant v = variants()[which];
    const auto model = random_model(v.config, 1031);
    // The GPU's run has no weights but those of the block that it reads.
    const auto hollow = without_weights(*model);
    const auto read = [&](std::int64_t index) -> Result<LlamaLayer<DenseLinear>> {
      return model->layers.at(static_cast<std::size_t>(index));
    };
    Rng rng(1032);
    std::vector<std::vector<std::int32_t>> sequences;
    for (const std::int64_t length : {50, 7, 1, 61, 33})
      sequences.push_back(random_tokens(rng, length, v.config.vocab_size));
    for (const bool correct : {false, true}) {
      CAPTURE(v.name, correct);
      CalibrationRunOptions options;
      options.correct = correct;
      Recorder want;
      Recorder got;
      auto host = CalibrationRun::create(model, sequences, pool.workers(), options).value();
      auto gpu = cuda::DeviceCalibrationRun::create(hollow, sequences, options, 64, device, stream.get, read);
      require_ok(gpu.status());
      for (std::int64_t i = 0; i < v.config.layers; ++i) {
        require_ok(host.next_block(want, pool));
        require_ok(gpu->next_block(got));
      }
      CHECK(gpu->blocks_done() == v.config.layers);
      CHECK(gpu->next_block(got).code() == StatusCode::kInvalidArgument);
      REQUIRE(got.names == want.names);
      double grams = 0.0;
      double weights = 0.0;
      for (std::size_t i = 0; i < want.names.size(); ++i) {
        grams = std::max(grams, relative(got.grams[i], want.grams[i]));
        weights = std::max(weights, relative(got.weights[i], want.weights[i]));
      }
      std::printf("calibration, %s, corrected %d: H off by %.2g, weights by %.2g\n", v.name,
                  static_cast<int>(correct), grams, weights);
      CHECK(grams <= 1e-4);
      CHECK(weights <= 1e-3);
    }
  }
}

}  // namespace prefillshare::test
