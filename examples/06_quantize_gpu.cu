// SPDX-License-Identifier: Apache-2.0
//
// examples/06_quantize_gpu.cu - 06_quantize.cpp with --device gpu: the same options and files; rounds and
// calibration are on the GPU, k-means, with which layers begin, on the CPU.
//
//   quantize_gpu MODEL OUT_DIR --device gpu --calibration FILE [--format m1v4g64]
//
// A state that one device saved is not taken by the other.
// test: {model} {work}/model --device gpu --format m1v8b4g-1 --calibration {source}/examples/data/river_report.txt --sequences 2 --length 64 --rounds 1 --beam 1 --codebook-steps 2 --quiet

#define EIGEN_NO_CUDA  // Eigen is for the host: as CUDA code it would do without vector instructions
#pragma nv_diag_suppress 20012, 1675, 550, 2810, 3189
#define QUANTIZE_ON_GPU
#include <06_quantize.cpp>

#include <cstdlib>

#include <common/gpu_quantizer.cuh>

namespace {

QuantizeBackend gpu_backend() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("SKIPPED: no GPU");
    std::exit(4);
  }
  static GpuQuantizer gpu;  // as long as the backend
  return gpu.backend();
}

}  // namespace
