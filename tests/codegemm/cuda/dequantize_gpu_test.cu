// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/dequantize_gpu_test.cu - the weights themselves against the double reference.
#include <codegemm/cuda/dequantize.cuh>

#include <vector>

#include "gpu.cuh"

namespace codegemm::test {
namespace {

template <class T>
void check(Format format, std::int64_t rows, std::int64_t cols, std::int64_t pad, const cuda::Device& device,
           std::uint64_t seed) {
  CAPTURE(format_name(format), rows, cols, pad, seed);
  Rng rng(seed);
  DeviceWeights w(random_matrix(format, rows, cols, rng));
  DeviceBuffer<T> out(static_cast<std::size_t>(rows * (cols + pad)));
  out.poison();
  REQUIRE(
      cuda::dequantize(w.view(), MatrixView<T>(out.data(), rows, cols, cols + pad), device, nullptr).ok());
  REQUIRE_CUDA(cudaDeviceSynchronize());
  REQUIRE(out.guards_intact());
  const std::vector<T> got = out.download();
  const QuantizedMatrixView view = w.parts[0].view();
  for (std::int64_t n = 0; n < rows; ++n) {
    for (std::int64_t k = 0; k < cols; ++k) {
      const double want = reference_weight(view, n, k);
      const double value = static_cast<double>(as_float(got[static_cast<std::size_t>(n * (cols + pad) + k)]));
      REQUIRE(std::abs(value - want) <= 1.01 * rounding_of<T>() * std::abs(want) + 1e-7);
    }
    for (std::int64_t k = cols; k < cols + pad; ++k)
      REQUIRE(!(as_float(got[static_cast<std::size_t>(n * (cols + pad) + k)]) == 0.0F));
  }
}

TEST_CASE("cuda dequantize: every vector length, codebook count, code size and scale group", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(1);
  for (const int v : {2, 4, 8, 16}) {
    for (const int m : {1, 2, 3, 4}) {
      for (const int b : {4, 8, 11, 16}) {
        if (b == 16 && m > 2) continue;  // large, and no other path
        check<Half>({v, m, b, 64}, 37, 1040, 3, device, seed++);
      }
    }
  }
  for (const int g : {-1, 8, 24, 32, 128, 1024}) {
    check<float>({8, 2, 8, g}, 50, 1096, 0, device, seed++);
    check<BFloat16>({4, 1, 8, g}, 50, 1096, 1, device, seed++);
  }
}

TEST_CASE("cuda dequantize: what it refuses") {
  Rng rng(2);
  const auto packed = cuda::pack(random_matrix({4, 1, 8, 128}, 48, 512, rng).view());
  REQUIRE(packed.ok());
  const cuda::Device device{90, 132, 232448, {}};
  const auto view = packed->view(reinterpret_cast<const void*>(4096));
  float* const w = reinterpret_cast<float*>(8192);
  const auto code = [&](MatrixView<float> out, const cuda::DevicePackedView& v) {
    return cuda::dequantize(v, out, device, nullptr).code();
  };
  CHECK(code(MatrixView<float>(w, 47, 512), view) == StatusCode::kShapeMismatch);
  CHECK(code(MatrixView<float>(w, 48, 512, 511), view) == StatusCode::kInvalidArgument);
  CHECK(code(MatrixView<float>(nullptr, 48, 512), view) == StatusCode::kNullPointer);
  CHECK(code(MatrixView<float>(reinterpret_cast<float*>(8194), 48, 512), view) == StatusCode::kMisaligned);
  auto other = view;
  other.version = 1;
  CHECK(code(MatrixView<float>(w, 48, 512), other) == StatusCode::kIncompatible);
}

}  // namespace
}  // namespace codegemm::test
