// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/model/dense_linear_gpu_test.cu - a dense layer's products against plain double
// loops.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/model/cuda/dense_linear.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <support/random.hpp>

#include "../../codegemm/cuda/gpu.cuh"

namespace prefillshare::test {
namespace {

using codegemm::MatrixView;
using codegemm::test::DeviceBuffer;
using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using codegemm::test::Rng;

template <class T>
std::vector<T> random_values(Rng& rng, std::int64_t count, float size) {
  std::vector<T> out(static_cast<std::size_t>(count));
  for (T& value : out) value = static_cast<T>(size * rng.normal());
  return out;
}
template <class T>
double at(const std::vector<T>& values, std::int64_t i) {
  return static_cast<double>(static_cast<float>(values[static_cast<std::size_t>(i)]));
}

// One output in double, and the sum of its parts' sizes, which errors are relative to.
struct Product {
  double sum = 0.0;
  double size = 0.0;
};

// Of the row of x from `x_at` on and row n of the weights.
template <class T>
Product product_of(const std::vector<T>& x, std::int64_t x_at, const std::vector<T>& weights, std::int64_t n,
                   std::int64_t cols) {
  Product out;
  for (std::int64_t k = 0; k < cols; ++k) {
    const double part = at(x, x_at + k) * at(weights, n * cols + k);
    out.sum += part;
    out.size += std::abs(part);
  }
  return out;
}

// A row that the layer normalizes: as the products of that row, of which each value was rounded to T.
template <class T>
void check_normed(const cuda::DeviceDenseLinear<T>& layer, const std::vector<T>& weights,
                  const std::vector<float>& bias, Rng& rng, const cuda::LinearCall& call) {
  constexpr double kUlp = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
  constexpr float kEpsilon = 1e-5F;
  const std::int64_t cols = layer.cols();
  const std::int64_t rows = layer.rows();
  const auto x = random_values<float>(rng, cols, 30.0F);
  const auto factors = random_values<float>(rng, cols, 1.0F);
  double squares = 0.0;
  for (const float value : x) squares += static_cast<double>(value) * static_cast<double>(value);
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(cols) + static_cast<double>(kEpsilon));
  const auto product = [&](std::int64_t n) {  // and what it may be off
    double sum = 0.0;
    double all = 0.0;
    for (std::int64_t k = 0; k < cols; ++k) {
      const double part = scale * at(x, k) * at(factors, k) * at(weights, n * cols + k);
      sum += part;
      all += std::abs(part);
    }
    return std::pair(sum, (1.01 * kUlp + static_cast<double>(cols) * 0x1p-24) * all + 1e-6);
  };
  DeviceBuffer<float> x_device(x);
  DeviceBuffer<float> factors_device(factors);
  const cuda::NormedRow row{x_device.data(), factors_device.data(), kEpsilon};
  DeviceBuffer<T> y(std::vector<T>(static_cast<std::size_t>(rows)));
  DeviceBuffer<float> full(std::vector<float>(static_cast<std::size_t>(rows)));
  DeviceBuffer<T> gated(std::vector<T>(static_cast<std::size_t>(rows)));
  require_ok(layer.forward(row, MatrixView<T>(y.data(), 1, rows), call));
  require_ok(layer.project(row, MatrixView<float>(full.data(), 1, rows), call));
  require_ok(layer.gated(row, MatrixView<T>(gated.data(), 1, rows / 2), call));
  REQUIRE_CUDA(cudaDeviceSynchronize());
  const auto got = y.download();
  const auto got_full = full.download();
  const auto got_gated = gated.download();
  int wrong = 0;
  for (std::int64_t n = 0; n < rows; ++n) {
    const auto [sum, bound] = product(n);
    const double biased = sum + static_cast<double>(bias[static_cast<std::size_t>(n)]);
    wrong += std::abs(at(got_full, n) - sum) <= bound ? 0 : 1;
    wrong += std::abs(at(got, n) - biased) <= bound + kUlp * std::abs(biased) ? 0 : 1;
    if (n >= rows / 2) continue;
    const auto [up, up_bound] = product(n + rows / 2);
    const double open = sum / (1.0 + std::exp(-sum));
    const double off = 1.1 * bound * (std::abs(up) + up_bound) + up_bound * std::abs(open);
    wrong += std::abs(at(got_gated, n) - open * up) <= off + (kUlp + 0x1p-20) * std::abs(open * up) ? 0 : 1;
  }
  CHECK(wrong == 0);
}

// Rows of x and y lie apart from each other, and what lies between is not to be touched.
template <class T>
void check_layer(std::int64_t rows, std::int64_t cols, const cuda::Device& device,
                 cuda::OneToken one_token = cuda::OneToken::kStream) {
  Rng rng(static_cast<std::uint64_t>(rows + cols));
  const std::vector<T> weights =
      random_values<T>(rng, rows * cols, 1.0F / std::sqrt(static_cast<float>(cols)));
  std::vector<float> bias;
  for (const T value : random_values<T>(rng, rows, 1.0F)) bias.push_back(static_cast<float>(value));
  auto on_device = cuda::DeviceArray<T>::copy_of(weights);
  require_ok(on_device.status());
  auto cublas = cuda::Cublas::create();
  require_ok(cublas.status());
  auto made = cuda::DeviceDenseLinear<T>::create(
      *cublas, std::make_shared<const cuda::DeviceArray<T>>(std::move(on_device).value()), rows, cols, bias);
  require_ok(made.status());
  made->set_one_token(one_token);
  const bool streams = one_token == cuda::OneToken::kStream && device.arch >= 90;
  CHECK(made->normalizes(1, device) == streams);
  CHECK_FALSE(made->normalizes(2, device));
  constexpr double kUlp = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
  for (const std::int64_t tokens : {1, 2, 9, 33}) {
    CAPTURE(rows, cols, tokens);
    const std::int64_t x_stride = cols + 8;
    const std::int64_t y_stride = rows + 8;
    const std::vector<T> x = random_values<T>(rng, tokens * x_stride, 1.0F);
    std::vector<double> want(static_cast<std::size_t>(tokens * rows));
    std::vector<double> size(want.size());  // what errors are relative to
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t n = 0; n < rows; ++n) {
        const Product one = product_of(x, t * x_stride, weights, n, cols);
        want[static_cast<std::size_t>(t * rows + n)] = one.sum;
        size[static_cast<std::size_t>(t * rows + n)] = one.size;
      }
    }
    DeviceBuffer<T> x_device(x);
    const auto scratch = cuda::DeviceArray<std::byte>::create(made->memory(tokens, device).scratch);
    require_ok(scratch.status());
    cuda::LinearCall call;
    call.device = device;
    call.scratch = {scratch->data(), scratch->bytes()};
    const MatrixView<const T> x_view(x_device.data(), tokens, cols, x_stride);
    // Sums in fp32, an addition more for each column in the worst order; then one rounding.
    const double exact = static_cast<double>(cols) * 0x1p-24;
    const auto compare = [&](const auto& got, std::int64_t width, const auto& expected, double first) {
      int wrong = 0;
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t n = 0; n < y_stride; ++n) {
          const double value = at(got, t * y_stride + n);
          if (n >= width) {
            wrong += value == first ? 0 : 1;
            continue;
          }
          const auto [answer, bound] = expected(t, n);
          wrong += std::abs(value - answer) <= bound ? 0 : 1;
        }
      }
      CHECK(wrong == 0);
    };
    const auto sum = [&](std::int64_t t, std::int64_t n) {
      const auto i = static_cast<std::size_t>(t * rows + n);
      return std::pair(want[i], exact * size[i]);
    };
    const auto cells = static_cast<std::size_t>(tokens * y_stride);
    DeviceBuffer<T> y(std::vector<T>(cells, static_cast<T>(7.0F)));
    require_ok(made->forward(x_view, MatrixView<T>(y.data(), tokens, rows, y_stride), call));
    REQUIRE_CUDA(cudaDeviceSynchronize());
    compare(
        y.download(), rows,
        [&](std::int64_t t, std::int64_t n) {
          const auto [value, bound] = sum(t, n);
          const double biased = value + static_cast<double>(bias[static_cast<std::size_t>(n)]);
          // cuBLAS rounds before the bias is added.
          return std::pair(biased, bound + kUlp * (std::abs(biased) + std::abs(value)));
        },
        7.0);
    DeviceBuffer<float> full(std::vector<float>(cells, 3.0F));
    const MatrixView<float> full_view(full.data(), tokens, rows, y_stride);
    require_ok(made->project(x_view, full_view, call));
    REQUIRE_CUDA(cudaDeviceSynchronize());
    compare(full.download(), rows, sum, 3.0);
    require_ok(made->add(x_view, full_view, call));
    REQUIRE_CUDA(cudaDeviceSynchronize());
    compare(
        full.download(), rows,
        [&](std::int64_t t, std::int64_t n) {
          const auto [value, bound] = sum(t, n);
          return std::pair(2.0 * value, 2.0 * bound + 0x1p-22 * std::abs(value));
        },
        3.0);
    if (streams && tokens == 1) check_normed(*made, weights, bias, rng, call);
    if (rows % 16 != 0) continue;
    DeviceBuffer<T> gated(std::vector<T>(cells, static_cast<T>(7.0F)));
    require_ok(made->gated(x_view, MatrixView<T>(gated.data(), tokens, rows / 2, y_stride), call));
    REQUIRE_CUDA(cudaDeviceSynchronize());
    compare(
        gated.download(), rows / 2,
        [&](std::int64_t t, std::int64_t n) {
          const auto [gate, gate_bound] = sum(t, n);
          const auto [up, up_bound] = sum(t, n + rows / 2);
          const double open = gate / (1.0 + std::exp(-gate));
          // The slope of silu is below 1.1; with cuBLAS both are rounded first.
          const double off = 1.1 * (gate_bound + kUlp * std::abs(gate)) * std::abs(up) +
                             (up_bound + kUlp * std::abs(up)) * (std::abs(open) + gate_bound);
          return std::pair(open * up, off + (kUlp + 0x1p-20) * std::abs(open * up) + 1e-6);
        },
        7.0);
  }
}

// Products whose algorithm was searched: they need rows that lie together.
template <class T>
void check_searched(std::int64_t rows, std::int64_t cols, std::int64_t tokens, const cuda::Device& device) {
  CAPTURE(rows, cols, tokens);
  Rng rng(static_cast<std::uint64_t>(rows * cols));
  const std::vector<T> weights =
      random_values<T>(rng, rows * cols, 1.0F / std::sqrt(static_cast<float>(cols)));
  const std::vector<T> x = random_values<T>(rng, tokens * cols, 1.0F);
  auto cublas = cuda::Cublas::create();
  require_ok(cublas.status());
  auto layer = cuda::DeviceDenseLinear<T>::create(
      *cublas, std::make_shared<const cuda::DeviceArray<T>>(*cuda::DeviceArray<T>::copy_of(weights)), rows,
      cols);
  require_ok(layer.status());
  layer->set_one_token(cuda::OneToken::kCublas);
  auto made = cuda::CublasProducts::create();
  require_ok(made.status());
  const std::shared_ptr<cuda::CublasProducts> products = std::move(*made);
  layer->set_products(products);
  DeviceBuffer<T> x_device(x);
  const auto cells = static_cast<std::size_t>(tokens * rows);
  DeviceBuffer<T> low(std::vector<T>(cells, static_cast<T>(7.0F)));
  DeviceBuffer<float> full(std::vector<float>(cells, 3.0F));
  const void* const w = layer->weights()->data();
  cudaStream_t stream = nullptr;
  REQUIRE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK_FALSE(products->has(layer->product(tokens)));
  CHECK(products->run(layer->product(tokens), w, x_device.data(), low.data(), nullptr).code() ==
        codegemm::StatusCode::kUnsupported);
  require_ok(products->search(layer->product(tokens), {&w, 1}, x_device.data(), low.data(), stream));
  for (const bool adds : {false, true}) {
    require_ok(
        products->search(layer->product(tokens, true, adds), {&w, 1}, x_device.data(), full.data(), stream));
    CHECK(products->has(layer->product(tokens, true, adds)));
  }
  CHECK_FALSE(products->has(layer->product(tokens + 1)));
  REQUIRE_CUDA(cudaStreamDestroy(stream));
  cuda::LinearCall call;
  call.device = device;
  const MatrixView<const T> view(x_device.data(), tokens, cols);
  require_ok(layer->forward(view, MatrixView<T>(low.data(), tokens, rows), call));
  require_ok(layer->project(view, MatrixView<float>(full.data(), tokens, rows), call));
  require_ok(layer->add(view, MatrixView<float>(full.data(), tokens, rows), call));
  REQUIRE_CUDA(cudaDeviceSynchronize());
  REQUIRE(low.guards_intact());
  REQUIRE(full.guards_intact());
  const auto got = low.download();
  const auto got_full = full.download();
  int wrong = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < rows; ++n) {
      const auto [sum, all] = product_of(x, t * cols, weights, n, cols);
      const double off = static_cast<double>(cols) * 0x1p-24 * all;
      const double ulp = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
      wrong += std::abs(at(got, t * rows + n) - sum) <= off + ulp * std::abs(sum) + 1e-6 ? 0 : 1;
      wrong +=
          std::abs(at(got_full, t * rows + n) - 2.0 * sum) <= 2.0 * off + 0x1p-22 * std::abs(sum) ? 0 : 1;
    }
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("a dense layer's products by an algorithm that was searched equal double loops") {
  const auto device = gpu_or_skip();
  check_searched<__half>(64, 128, 1, device);
  check_searched<__half>(1040, 2048, 1, device);
  check_searched<__half>(80, 1088, 8, device);
  check_searched<__nv_bfloat16>(256, 576, 3, device);
}

TEST_CASE("a dense layer's products of few and many tokens equal double loops") {
  const auto device = gpu_or_skip();
  check_layer<__half>(48, 64, device);
  check_layer<__half>(80, 1088, device);
  check_layer<__half>(24, 72, device);
  check_layer<__nv_bfloat16>(48, 576, device);
  check_layer<__half>(48, 1032, device, cuda::OneToken::kCublas);
  // More rows than the blocks of one token's kernel; more pieces than their rings hold, and a row that does
  // not fit into registers when it is normalized.
  check_layer<__half>(2080, 136, device);
  check_layer<__nv_bfloat16>(16, 14344, device);
}

}  // namespace prefillshare::test
