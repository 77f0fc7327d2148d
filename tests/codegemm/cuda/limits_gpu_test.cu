// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/limits_gpu_test.cu - operands at the ends of what the GPU product takes: offsets beyond
// 32 bits, addresses at odd elements, empty matrices, and two streams whose products are both cut in pieces.
#include <algorithm>
#include <memory>
#include <vector>

#include "check_gemm.cuh"

namespace codegemm::test {
namespace {

struct Configs {
  using Gather =
      config_list<cuda::GatherM1V4G128, cuda::GatherM1V4Row, cuda::GatherAny<1, 4>, cuda::GatherAny<4, 4>>;
  using Fused = config_list<cuda::Fused<4, 1, 3>, cuda::Fused<4, 4, 0>>;
  static constexpr bool kSwiGlu = false;
};

// Row tile i of the packed `to` becomes row tile i % tiles of `from`, in every granule.
__global__ void repeat_tiles_kernel(uint4* to, const uint4* from, std::int64_t to_tiles,
                                    std::int64_t from_tiles, std::int64_t words, std::int64_t all) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < all; i += step) {
    const std::int64_t tile = i / words;
    const std::int64_t granule = tile / to_tiles;
    to[i] = from[(granule * from_tiles + tile % to_tiles % from_tiles) * words + i % words];
  }
}

// Counts the elements of y[tokens][rows] that are off by more than `within` from `want`, both of
// [token_period][row_period], again and again.
__global__ void count_wrong_kernel(const float* y, const std::uint16_t* y16, std::int64_t tokens,
                                   std::int64_t rows, std::int64_t stride, const float* want,
                                   const float* within, std::int64_t token_period, std::int64_t row_period,
                                   unsigned long long* wrong) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  unsigned long long mine = 0;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < tokens * rows; i += step) {
    const std::int64_t token = i / rows;
    const std::int64_t row = i % rows;
    const std::int64_t at = token * stride + row;
    const float got = y != nullptr ? y[at] : __half2float(__ushort_as_half(y16[at]));
    const std::int64_t expected = token % token_period * row_period + row % row_period;
    if (!(fabsf(got - want[expected]) <= within[expected])) ++mine;
  }
  if (mine > 0) atomicAdd(wrong, mine);
}

template <class Y>
[[nodiscard]] unsigned long long count_wrong(const Y* y, std::int64_t tokens, std::int64_t rows,
                                             std::int64_t stride, const Reference& want, std::int64_t cols,
                                             std::int64_t token_period, std::int64_t row_period,
                                             double weight_rounding) {
  std::vector<float> values;
  std::vector<float> within;
  for (std::size_t i = 0; i < want.y.size(); ++i) {  // as worst()
    values.push_back(static_cast<float>(want.y[i]));
    within.push_back(static_cast<float>(
        1.02 * (rounding_of<Y>() + 0x1p-24) * std::abs(want.y[i]) + 1e-7 +
        ((16.0 + std::sqrt(static_cast<double>(cols))) * 0x1p-24 + weight_rounding) * want.size[i]));
  }
  DeviceBuffer<float> values_device(values);
  DeviceBuffer<float> within_device(within);
  DeviceBuffer<unsigned long long> wrong(std::vector<unsigned long long>{0});
  const float* const y32 = sizeof(Y) == 4 ? reinterpret_cast<const float*>(y) : nullptr;
  count_wrong_kernel<<<1024, 256>>>(y32, reinterpret_cast<const std::uint16_t*>(y), tokens, rows, stride,
                                    values_device.data(), within_device.data(), token_period, row_period,
                                    wrong.data());
  REQUIRE_CUDA(cudaDeviceSynchronize());
  return wrong.download()[0];
}

[[nodiscard]] bool has_memory(std::size_t bytes) {
  std::size_t free = 0;
  std::size_t total = 0;
  REQUIRE_CUDA(cudaMemGetInfo(&free, &total));
  if (free > bytes + (std::size_t{1} << 30)) return true;
  WARN("left out: needs " << bytes << " bytes of device memory, " << free << " are free");
  return false;
}

// A matrix of `rows` rows, which are those of a small one again and again: 592 of them, so that no power of
// two is a whole number of repetitions.
void check_repeated(Format format, std::int64_t rows, std::int64_t cols, int regimes, std::uint64_t seed) {
  constexpr std::int64_t kPeriod = 592;
  const cuda::Device device = gpu_or_skip();
  CAPTURE(format_name(format), rows, cols, seed);
  Rng rng(seed);
  DeviceWeights small(random_matrix(format, kPeriod, cols, rng));
  const auto layout = cuda::packed_layout(format, rows, cols);
  REQUIRE(layout.ok());
  REQUIRE(layout->tile_bytes == small.packed.layout().tile_bytes);
  REQUIRE(layout->tiles_at == small.packed.layout().tiles_at);  // no scales beside the tiles
  if (!has_memory(layout->bytes)) return;
  DeviceBuffer<std::byte> large(layout->bytes);
  REQUIRE_CUDA(cudaMemcpy(large.data(), small.buffer.data(), layout->tiles_at, cudaMemcpyDeviceToDevice));
  REQUIRE(layout->tile_bytes % 16 == 0);
  repeat_tiles_kernel<<<1024, 256>>>(reinterpret_cast<uint4*>(large.data() + layout->tiles_at),
                                     reinterpret_cast<const uint4*>(small.buffer.data() + layout->tiles_at),
                                     layout->row_tiles, small.packed.layout().row_tiles,
                                     layout->tile_bytes / 16,
                                     static_cast<std::int64_t>(layout->bytes - layout->tiles_at) / 16);
  REQUIRE_CUDA(cudaDeviceSynchronize());
  cuda::DevicePackedView view = small.view();
  view.rows = rows;
  view.layout = *layout;
  view.data = large.data();
  int served = 0;
  for (const std::int64_t tokens : {1, 5, 40}) {
    const auto x = random_vector<Half>(static_cast<std::size_t>(tokens * cols), rng);
    DeviceBuffer<Half> x_device(x);
    DeviceBuffer<float> y(static_cast<std::size_t>(tokens * rows));
    const Reference want = reference_of(small.parts[0], x, tokens, cols);
    for (const cuda::Regime regime : kRegimes) {
      cuda::GemmProblem<Half, float> p;
      p.weights = view;
      p.x = MatrixView<const Half>(x_device.data(), tokens, cols);
      p.y = MatrixView<float>(y.data(), tokens, rows);
      p.tuning.regime = regime;
      if (cuda::regime_of<Configs>(p, device) != regime) continue;
      CAPTURE(tokens, static_cast<int>(regime));
      DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
      workspace.clear();
      y.poison();
      require_ok(cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr));
      REQUIRE_CUDA(cudaDeviceSynchronize());
      ++served;
      const double rounding = regime == cuda::Regime::kGather ? (half_psumbook(p) ? rounding_of<Half>() : 0.0)
                                                              : 3.0 * rounding_of<Half>();
      CHECK(count_wrong(y.data(), tokens, rows, rows, want, cols, tokens, kPeriod, rounding) == 0);
    }
  }
  CHECK(served == 3 * (device.arch == 90 ? regimes : regimes - 1));
}

TEST_CASE("cuda gemm: more weights than 32 bits count", "[gpu]") {
  check_repeated({4, 1, 8, 128}, 147456 + 16, 16384, 3, seed_or(1));
}

TEST_CASE("cuda gemm: packed weights of more than 4 GiB", "[gpu]") {
  // mma.sync counts bytes in 32 bits: it must leave them to the others.
  check_repeated({4, 4, 8, 128}, 262144 + 48, 16384, 2, seed_or(2));
}

TEST_CASE("cuda gemm: rows of x and y that begin beyond 32 bits", "[gpu]") {
  constexpr std::int64_t kTokens = 16500, kTokenPeriod = 7, kPeriod = 592, kCols = 256;
  constexpr std::int64_t kStride = 131072 + 8;  // kTokens * kStride > 2^31
  const cuda::Device device = gpu_or_skip();
  if (!has_memory(static_cast<std::size_t>(2 * kTokens * kStride) * sizeof(Half))) return;
  Rng rng(seed_or(3));
  DeviceWeights w(random_matrix({4, 1, 8, 128}, kPeriod, kCols, rng));
  const auto few = random_vector<Half>(static_cast<std::size_t>(kTokenPeriod * kCols), rng);
  const Reference want = reference_of(w.parts[0], few, kTokenPeriod, kCols);
  std::vector<Half> all;
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const auto from = few.begin() + t % kTokenPeriod * kCols;
    all.insert(all.end(), from, from + kCols);
  }
  DeviceBuffer<Half> x(static_cast<std::size_t>(kTokens * kStride));
  DeviceBuffer<Half> y(static_cast<std::size_t>(kTokens * kStride));
  REQUIRE_CUDA(cudaMemcpy2D(x.data(), kStride * sizeof(Half), all.data(), kCols * sizeof(Half),
                            kCols * sizeof(Half), kTokens, cudaMemcpyHostToDevice));
  for (const cuda::Regime regime : kRegimes) {
    cuda::GemmProblem<Half, Half> p;
    p.weights = w.view();
    p.x = MatrixView<const Half>(x.data(), kTokens, kCols, kStride);
    p.y = MatrixView<Half>(y.data(), kTokens, kPeriod, kStride);
    p.tuning.regime = regime;
    if (regime == cuda::Regime::kFusedWgmma && device.arch != 90) continue;
    CAPTURE(static_cast<int>(regime));
    REQUIRE(cuda::regime_of<Configs>(p, device) == regime);
    DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
    workspace.clear();
    y.poison();
    require_ok(cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr));
    REQUIRE_CUDA(cudaDeviceSynchronize());
    CHECK(count_wrong(y.data(), kTokens, kPeriod, kStride, want, kCols, kTokenPeriod, kPeriod,
                      3.0 * rounding_of<Half>()) == 0);
    REQUIRE(y.guards_intact());
  }
}

// Every operand one element beyond a multiple of 16 bytes, and rows that are not a whole number of words.
template <class X, class Y>
void check_odd(std::int64_t tokens, const cuda::Device& device, std::uint64_t seed) {
  constexpr std::int64_t kRows = 301, kCols = 1032, kXStride = 1035, kYStride = 307;
  CAPTURE(tokens, seed, sizeof(Y));
  Rng rng(seed);
  DeviceWeights w(random_matrix({4, 1, 8, 128}, kRows, kCols, rng));
  const auto x = random_vector<X>(static_cast<std::size_t>(tokens * kXStride + 1), rng);
  const auto bias = random_vector<Y>(kRows + 1, rng);
  const auto residual = random_vector<Y>(static_cast<std::size_t>(tokens * kYStride + 1), rng);
  DeviceBuffer<X> x_device(x);
  DeviceBuffer<Y> bias_device(bias);
  DeviceBuffer<Y> residual_device(residual);
  DeviceBuffer<Y> y(residual.size());
  Reference want = reference_of(w.parts[0], std::vector<X>(x.begin() + 1, x.end()), tokens, kXStride);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < kRows; ++n) {
      const auto at = static_cast<std::size_t>(t * kRows + n);
      for (const Y more : {bias[static_cast<std::size_t>(n + 1)],
                           residual[static_cast<std::size_t>(t * kYStride + n + 1)]}) {
        want.y[at] += static_cast<double>(as_float(more));
        want.size[at] += std::abs(static_cast<double>(as_float(more)));
      }
    }
  }
  for (const cuda::Regime regime : {cuda::Regime::kAuto, cuda::Regime::kGather, cuda::Regime::kFusedMma}) {
    for (const bool in_place : {false, true}) {
      cuda::GemmProblem<X, Y> p;
      p.weights = w.view();
      p.x = MatrixView<const X>(x_device.data() + 1, tokens, kCols, kXStride);
      p.y = MatrixView<Y>(y.data() + 1, tokens, kRows, kYStride);
      p.bias = bias_device.data() + 1;
      p.residual =
          MatrixView<const Y>((in_place ? y.data() : residual_device.data()) + 1, tokens, kRows, kYStride);
      p.tuning.regime = regime;
      CAPTURE(static_cast<int>(regime), in_place);
      REQUIRE(cuda::regime_of<Configs>(p, device) != cuda::Regime::kFusedWgmma);  // wants 16 bytes
      DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
      workspace.clear();
      y.poison();
      if (in_place) y.upload(residual);
      require_ok(cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr));
      REQUIRE_CUDA(cudaDeviceSynchronize());
      REQUIRE(y.guards_intact());
      const std::vector<Y> got = y.download();
      const std::vector<Y> shifted(got.begin() + 1, got.end());
      CHECK(worst(want, shifted, tokens, kRows, kYStride, kCols, 3.0 * rounding_of<X>()) <= 1.0);
      const unsigned char poison[sizeof(float)] = {0xFF, 0xFF, 0xFF, 0xFF};
      const void* const before = in_place ? static_cast<const void*>(residual.data()) : poison;
      REQUIRE(std::memcmp(got.data(), before, sizeof(Y)) == 0);
    }
  }
}

TEST_CASE("cuda gemm: operands at odd elements, with a residual of their own and in place", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(10);
  for (const std::int64_t tokens : {1, 2, 5, 16, 17, 70, 200}) {
    check_odd<Half, Half>(tokens, device, seed++);
    check_odd<Half, float>(tokens, device, seed++);
    check_odd<BFloat16, BFloat16>(tokens, device, seed++);
  }
}

TEST_CASE("cuda gemm: no inputs leave bias and residual, no outputs or tokens leave nothing to do", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  Rng rng(seed_or(20));
  for (const int b : {8, 6}) {  // a Psumbook of fp16, and one for any format
    CAPTURE(b);
    DeviceWeights w(random_matrix({4, 1, b, -1}, 40, 0, rng));
    for (const std::int64_t tokens : {1, 3, 40}) {
      CAPTURE(tokens);
      const auto bias = random_vector<float>(40, rng);
      const auto residual = random_vector<float>(static_cast<std::size_t>(tokens * 40), rng);
      DeviceBuffer<float> bias_device(bias);
      DeviceBuffer<float> residual_device(residual);
      DeviceBuffer<float> y(residual.size());
      y.poison();
      cuda::GemmProblem<Half, float> p;
      p.weights = w.view();
      p.x = MatrixView<const Half>(nullptr, tokens, 0);
      p.y = MatrixView<float>(y.data(), tokens, 40);
      p.bias = bias_device.data();
      p.residual = MatrixView<const float>(residual_device.data(), tokens, 40);
      DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
      workspace.clear();
      require_ok(cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr));
      REQUIRE_CUDA(cudaDeviceSynchronize());
      const auto got = y.download();
      for (std::size_t i = 0; i < got.size(); ++i) CHECK(got[i] == bias[i % 40] + residual[i]);
    }
  }
  DeviceWeights no_rows(random_matrix({4, 1, 8, 128}, 0, 512, rng));
  DeviceBuffer<Half> x(3 * 512);
  cuda::GemmProblem<Half, float> p;
  p.weights = no_rows.view();
  p.x = MatrixView<const Half>(x.data(), 3, 512);
  p.y = MatrixView<float>(nullptr, 3, 0);
  CHECK(cuda::workspace_bytes<Configs>(p, device) == 0);
  CHECK(cuda::run<Configs>(p, device, nullptr, 0, nullptr).ok());
  REQUIRE_CUDA(cudaDeviceSynchronize());
}

TEST_CASE("cuda gemm: two streams whose products on tensor cores are cut in pieces", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  if (device.arch != 90) return;  // elsewhere no product on tensor cores has a workspace
  constexpr std::int64_t kRows = 1100, kCols = 2048, kTokens = 300;
  Rng rng(seed_or(30));
  DeviceWeights w(random_matrix({4, 1, 8, 128}, kRows, kCols, rng));
  Stream streams[2];
  std::vector<std::vector<Half>> x;
  std::vector<std::unique_ptr<DeviceBuffer<Half>>> x_device;
  std::vector<std::unique_ptr<DeviceBuffer<float>>> y;
  std::vector<std::unique_ptr<DeviceBuffer<std::byte>>> workspaces;
  cuda::GemmProblem<Half, float> problems[2];
  for (auto& p : problems) {
    x.push_back(random_vector<Half>(kTokens * kCols, rng));
    x_device.push_back(std::make_unique<DeviceBuffer<Half>>(x.back()));
    y.push_back(std::make_unique<DeviceBuffer<float>>(kTokens * kRows));
    y.back()->poison();
    p.weights = w.view();
    p.x = MatrixView<const Half>(x_device.back()->data(), kTokens, kCols);
    p.y = MatrixView<float>(y.back()->data(), kTokens, kRows);
    p.tuning.regime = cuda::Regime::kFusedWgmma;
    p.tuning.token_tile = 64;
    p.tuning.splits = 3;
    workspaces.push_back(
        std::make_unique<DeviceBuffer<std::byte>>(cuda::workspace_bytes<Configs>(p, device)));
    REQUIRE(workspaces.back()->size() > 0);
    workspaces.back()->clear();
  }
  for (int round = 0; round < 50; ++round) {
    for (std::size_t i = 0; i < 2; ++i) {
      require_ok(cuda::run<Configs>(problems[i], device, workspaces[i]->data(), workspaces[i]->size(),
                                    streams[i].get));
    }
  }
  REQUIRE_CUDA(cudaDeviceSynchronize());
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(worst(reference_of(w.parts[0], x[i], kTokens, kCols), y[i]->download(), kTokens, kRows, kRows,
                kCols, 3.0 * rounding_of<Half>()) <= 1.0);
    REQUIRE(workspaces[i]->guards_intact());
  }
}

}  // namespace
}  // namespace codegemm::test
