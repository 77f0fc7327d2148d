// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/pack_gpu_test.cu - weights packed on the GPU are, byte for byte, those packed on the
// host.
#include <cstring>
#include <utility>
#include <vector>

#include <codegemm/cuda/pack_on_device.cuh>

#include "gpu.cuh"

namespace codegemm::test {
namespace {

void check_pack(Format format, const std::vector<std::int64_t>& rows, std::int64_t cols, int sets,
                std::uint64_t seed) {
  CAPTURE(format_name(format), rows, cols, sets, seed);
  Rng rng(seed);
  std::vector<QuantizedMatrix> parts;
  for (const std::int64_t n : rows) parts.push_back(random_matrix(format, n, cols, rng));
  std::vector<QuantizedMatrixView> views;
  for (const QuantizedMatrix& part : parts) views.push_back(part.view());
  const auto want = cuda::pack(std::span<const QuantizedMatrixView>(views), {sets});
  require_ok(want.status());
  const auto got = cuda::pack_on_device(views, {sets});
  require_ok(got.status());
  CHECK(got->view.layout == want->layout());
  CHECK(got->view.unscale == want->view(nullptr).unscale);
  CHECK(got->view.rows == want->rows());
  REQUIRE(got->bytes.size() == want->bytes().size());
  std::vector<std::byte> bytes(got->bytes.size());
  REQUIRE_CUDA(cudaMemcpy(bytes.data(), got->bytes.data(), bytes.size(), cudaMemcpyDeviceToHost));
  CHECK(std::memcmp(bytes.data(), want->bytes().data(), bytes.size()) == 0);
}

}  // namespace

TEST_CASE("weights packed on the GPU are those packed on the host", "[gpu]") {
  static_cast<void>(gpu_or_skip());
  std::uint64_t seed = seed_or(9500);
  for (const int v : {2, 4, 8, 16}) {
    for (const int m : {1, 2, 3, 4}) {
      for (const int b : {4, 6, 8}) {
        for (const int g : {-1, 32, 128}) check_pack({v, m, b, g}, {83}, 1040, 0, seed++);
      }
    }
  }
  check_pack({8, 1, 16, -1}, {77}, 520, 0, seed++);
  check_pack({8, 1, 12, 64}, {16, 48, 5}, 1024, 0, seed++);
  check_pack({4, 1, 8, 128}, {256, 64, 64}, 4096, 0, seed++);
  check_pack({4, 1, 8, 128}, {1}, 8, 0, seed++);
  check_pack({4, 1, 8, 128}, {40}, 264, 2, seed++);
  check_pack({8, 2, 8, 128}, {700}, 2056, 0, seed++);
}

TEST_CASE("what the host does not pack the GPU does not either", "[gpu]") {
  static_cast<void>(gpu_or_skip());
  Rng rng(seed_or(9600));
  auto broken = random_matrix({8, 1, 6, 64}, 48, 512, rng);
  broken.codes()[5] |= 0x80U;
  const QuantizedMatrixView view = broken.view();
  CHECK(cuda::pack_on_device(std::span(&view, 1)).status().code() == StatusCode::kCorruptData);
  CHECK(cuda::pack_on_device({}).status().code() == StatusCode::kUnsupported);
}

}  // namespace codegemm::test
