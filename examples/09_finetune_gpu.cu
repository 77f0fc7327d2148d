// SPDX-License-Identifier: Apache-2.0
//
// examples/09_finetune_gpu.cu - 09_finetune.cpp with --device gpu: the same options, data and files, trained
// in bf16 with parameters and moments in fp32.
//
//   finetune_gpu --device gpu --model MODEL --data FILE.jsonl --out OUT_DIR --steps 200
//
// A state that one device saved is not taken by the other.
// test: --device gpu --model {model} --data {source}/examples/data/capitals.jsonl --out {work}/tuned --steps 2 --batch 2 --limit 4

#define EIGEN_NO_CUDA  // Eigen is for the host: as CUDA code it would do without vector instructions
#pragma nv_diag_suppress 20012, 1675, 550, 2810, 3189
#include <cstdlib>
#include <type_traits>

// Before the program's using-directives, by which "cuda" in CUDA's own headers would be prefillshare's, too.
#include <prefillshare/train/cuda/trainer.cuh>

#define FINETUNE_ON_GPU
#include <09_finetune.cpp>

namespace {

void tune_on_gpu(const FinetuneOptions& options, TrainableModel<float>& model,
                 const LlamaModel<DenseLinear>& base, const std::vector<TrainingExample>& examples,
                 const std::string& name, const std::vector<TrainingExample>& judged) {
  using S = __nv_bfloat16;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("SKIPPED: no GPU");
    std::exit(4);
  }
  const auto device = unwrap(codegemm::cuda::query_device(0));
  cudaStream_t stream = nullptr;
  check(codegemm::cuda::cuda_status(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                                    "cudaStreamCreate"));
  const std::unique_ptr<std::remove_pointer_t<cudaStream_t>, decltype(&cudaStreamDestroy)> owner(
      stream, &cudaStreamDestroy);
  const auto weights = std::make_shared<const prefillshare::cuda::DeviceFrozenWeights<S>>(
      unwrap(prefillshare::cuda::DeviceFrozenWeights<S>::create(base, device, stream)));
  auto trainer = unwrap(prefillshare::cuda::DeviceTrainer<S>::create(model, weights, examples, options.train,
                                                                     name, device, stream));
  tune(options, trainer, judged);
  check(trainer.download());
}

}  // namespace
