// SPDX-License-Identifier: Apache-2.0
//
// examples/05_psumbook_block.cu - a kernel of one's own around the Psumbook: the largest |w . x| of a
// matrix's rows, by a block, without an output vector. Here the block is all there is; a real kernel would
// take a part of the rows. test:
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <codegemm/cuda/block/psumbook.cuh>
#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/reference.hpp>

namespace {

constexpr int kRows = 512, kCols = 1024, kWarps = 16;
// One codebook, vectors of 4, two columns a lane: 64 KiB of shared memory, 256 weights of each row at a time.
using Book = codegemm::cuda::Psumbook<4, 1, 2>;

__global__ void largest_kernel(codegemm::cuda::DevicePackedView w, codegemm::cuda::Activations x,
                               float* largest) {
  extern __shared__ __align__(1024) char book[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const auto* const codebooks = reinterpret_cast<const std::uint16_t*>(w.data + w.layout.codebooks_at);
  float rows[kRows / 16 / kWarps] = {};  // a row of each of the warp's tiles
  // [guide: collective]
  for (int granule = 0; granule < w.layout.granules; ++granule) {
    const codegemm::cuda::Activations xs[1] = {x};
    Book::build(book, codebooks, xs, granule * Book::kSegments * 4, 4, 8);
    __syncthreads();
    for (int i = 0; i < kRows / 16 / kWarps; ++i) {
      const std::byte* const tile = w.data + w.layout.tiles_at +
                                    (granule * w.layout.row_tiles + i * kWarps + warp) * w.layout.tile_bytes;
      const auto* const codes = reinterpret_cast<const uint4*>(tile);
      const uint4 of_lane[2] = {codes[lane], codes[32 + lane]};
      float sums[1][16];
      Book::gather(book, of_lane, lane, sums);
      const __half* const scales = reinterpret_cast<const __half*>(tile + 1024) + lane;  // 16 lanes share one
      rows[i] += codegemm::cuda::reduce_rows<4>(sums[0], scales);
    }
    __syncthreads();
  }
  // [guide: end]
  float most = 0.0F;
  for (const float row : rows) most = fmaxf(most, fabsf(row));
  atomicMax(reinterpret_cast<int*>(largest),
            __float_as_int(most * w.unscale));  // positive floats order as their bits
}

int fail(const char* why) {
  std::printf("%s\n", why);
  return 1;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return std::puts("SKIPPED: no GPU"), 4;
  auto w = codegemm::QuantizedMatrix::create(codegemm::Format{4, 1, 8, 128}, kRows, kCols);
  if (!w.ok()) return fail(w.status().message().c_str());
  for (auto& word : w->codes()) word = static_cast<std::uint32_t>(std::rand()) * 2U;
  for (auto& value : w->codebooks())
    value = codegemm::Half::from_float(static_cast<float>(std::rand() % 201 - 100) * 0.01F);
  for (auto& value : w->scales()) value = codegemm::Half::from_float(0.02F);
  const auto packed = codegemm::cuda::pack(w->view(), codegemm::cuda::PackOptions{2});
  if (!packed.ok()) return fail(packed.status().message().c_str());

  std::vector<codegemm::Half> x(kCols);
  for (auto& value : x)
    value = codegemm::Half::from_float(static_cast<float>(std::rand() % 201 - 100) * 0.01F);
  void *weights = nullptr, *x_device = nullptr;
  float* largest = nullptr;
  if (cudaMalloc(&weights, packed->bytes().size()) != cudaSuccess ||
      cudaMalloc(&x_device, kCols * 2) != cudaSuccess || cudaMalloc(&largest, 4) != cudaSuccess) {
    return fail("out of device memory");
  }
  cudaMemcpy(weights, packed->bytes().data(), packed->bytes().size(), cudaMemcpyHostToDevice);
  cudaMemcpy(x_device, x.data(), kCols * 2, cudaMemcpyHostToDevice);
  cudaMemset(largest, 0, 4);
  cudaFuncSetAttribute(largest_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Book::bytes(8));
  largest_kernel<<<1, kWarps * 32, Book::bytes(8)>>>(
      packed->view(weights), {static_cast<const std::uint16_t*>(x_device), kCols, false}, largest);
  float got = 0.0F;
  if (cudaMemcpy(&got, largest, 4, cudaMemcpyDeviceToHost) != cudaSuccess) return fail("the kernel failed");

  std::vector<double> y(kRows);
  std::vector<double> x_double(kCols);
  for (int k = 0; k < kCols; ++k)
    x_double[static_cast<std::size_t>(k)] = static_cast<double>(x[static_cast<std::size_t>(k)].to_float());
  codegemm::reference_gemm(w->view(), codegemm::MatrixView<const double>(x_double.data(), 1, kCols),
                           codegemm::MatrixView<double>(y.data(), 1, kRows));
  double want = 0.0;
  for (const double value : y) want = std::fmax(want, std::fabs(value));
  std::printf("largest |w . x|: %.5f, in double %.5f\n", static_cast<double>(got), want);
  return std::fabs(static_cast<double>(got) - want) < 1e-4 * want ? 0 : 1;
}
