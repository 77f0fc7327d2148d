// SPDX-License-Identifier: Apache-2.0
//
// examples/04_codegemm_gpu.cu - the drop-in call from a plain CUDA program: pack once, copy once, then run.
// test:
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <codegemm/gemm.cuh>
#include <codegemm/reference.hpp>

#define CHECK(ok, why)                                                                                       \
  if (!(ok)) return std::printf("%s\n", why), 1
// [guide: cuda_formats]
struct Formats {  // that the program multiplies by; the default has them all, and takes minutes to compile
  using Gather = codegemm::config_list<codegemm::cuda::GatherM1V4G128>;  // few tokens
  using Fused = codegemm::config_list<codegemm::cuda::Fused<4, 1, 3>>;   // more
  static constexpr bool kSwiGlu = false;
};
// [guide: end]
int main() {
  if (int n = 0; cudaGetDeviceCount(&n) != cudaSuccess || n == 0) return std::puts("SKIPPED: no GPU"), 4;
  const auto device = codegemm::cuda::query_device(0);  // once, when the program starts
  CHECK(device.ok(), device.status().message().c_str());
  auto w = codegemm::QuantizedMatrix::create(codegemm::Format{4, 1, 8, 128}, 4096, 4096);  // m1v4g128
  CHECK(w.ok(), w.status().message().c_str());
  for (auto& word : w->codes()) word = static_cast<std::uint32_t>(std::rand()) * 2U;
  for (auto& c : w->codebooks()) c = codegemm::Half::from_float(static_cast<float>(std::rand() % 201) - 100);
  for (auto& scale : w->scales()) scale = codegemm::Half::from_float(0.0002F);  // a file would have them
  // [guide: cuda_pack]
  // Into the kernels' layout, and to the device: memory is the caller's.
  const auto packed = codegemm::cuda::pack(w->view());
  CHECK(packed.ok(), packed.status().message().c_str());
  void* weights = nullptr;
  __half *x = nullptr, *y = nullptr;
  CHECK(cudaMalloc(&weights, packed->bytes().size()) == cudaSuccess, "out of device memory");
  CHECK(cudaMalloc(&x, 8192) == cudaSuccess && cudaMalloc(&y, 8192) == cudaSuccess, "out of device memory");
  cudaMemcpy(weights, packed->bytes().data(), packed->bytes().size(), cudaMemcpyHostToDevice);
  // [guide: end]
  std::vector<codegemm::Half> values(4096, codegemm::Half::from_float(0.5F));
  cudaMemcpy(x, values.data(), 4096 * 2, cudaMemcpyHostToDevice);
  // [guide: cuda_run]
  codegemm::cuda::GemmProblem<__half, __half> problem;  // y[1][4096] = x[1][4096] W^T
  problem.weights = packed->view(weights);
  problem.x = {x, 1, 4096};
  problem.y = {y, 1, 4096};
  const std::size_t bytes = codegemm::cuda::workspace_bytes<Formats>(problem, *device);
  void* workspace = nullptr;  // one byte more, as a product may need none
  CHECK(cudaMalloc(&workspace, bytes + 1) == cudaSuccess, "out of device memory");
  cudaMemset(workspace, 0, bytes + 1);
  const codegemm::Status status = codegemm::cuda::run<Formats>(problem, *device, workspace, bytes, nullptr);
  CHECK(status.ok(), status.message().c_str());
  // [guide: end]
  CHECK(cudaMemcpy(values.data(), y, 4096 * 2, cudaMemcpyDeviceToHost) == cudaSuccess, "the kernel failed");
  double want = 0.0;
  for (int k = 0; k < 4096; ++k) want += 0.5 * codegemm::reference_weight(w->view(), 7, k);
  std::printf("y[7] = %.4f, in double %.4f\n", static_cast<double>(values[7].to_float()), want);
  return std::abs(static_cast<double>(values[7].to_float()) - want) < 1e-3 * (1.0 + std::abs(want)) ? 0 : 1;
}
