// SPDX-License-Identifier: Apache-2.0
//
// bench/finetune_gpu.cu - suite finetune-gpu: PrefillShare's claim on a real model, whole: three tasks, three
// seeds, a grid of learning rates, the curve over the sharing ratio, modules of 2 and 4 bits, and the
// specialists of the demo.

// Eigen is for the host alone here; as CUDA code it would do without vector instructions.
#define EIGEN_NO_CUDA
#pragma nv_diag_suppress 20012, 1675, 550, 2810, 3189

#include <cstdio>
#include <utility>

#include <CLI/CLI.hpp>

#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/run_program.hpp>

#include "support/finetune_gpu_backend.cuh"
#include "support/finetune_suite.hpp"
#include "support/gpu_timing.cuh"

namespace {

using namespace codegemm::bench;
using prefillshare::examples::unwrap;

int run(const FinetuneOptions& options) {
  const auto pools = make_pools(options);
  const codegemm::cuda::Device device = unwrap(codegemm::cuda::query_device(0));
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  Suite frame{"finetune", describe_card(device), measure_bandwidth(stream, device.multiprocessors), {}};
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  const auto tokenizer = unwrap(prefillshare::examples::load_tokenizer(options.model));
  const auto loaded =
      unwrap(prefillshare::examples::load_model(*unwrap(prefillshare::examples::open_model(options.model))));
  FinetuneSuite<FinetuneGpuBackend> suite(options, loaded, tokenizer, pools, std::move(frame));
  suite.run();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  FinetuneOptions options;
  options.jobs = 5;  // a model of this size does not fill a card; 22 GB each
  options.formats = {"m1v4g64", "m1v4g64-calibrated", "m2v2b4g64"};
  // Rounds on the GPU cost less than a good beginning on the host.
  options.quantizer.rounds = 6;
  options.quantizer.kmeans.iterations = 8;
  options.quantizer.kmeans.rounds = 4;
  options.quantizer.kmeans.refits = 1;
  options.quantizer.kmeans.sample = 32768;
  CLI::App app{
      "Fine-tunes decode modules on the cache of a frozen base and judges what they answer, on a GPU."};
  add_options(app, options);
  return prefillshare::examples::run_program("finetune-gpu", app, argc, argv, [&] { return run(options); });
}
