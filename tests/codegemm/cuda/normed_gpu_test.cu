// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/normed_gpu_test.cu - products that normalize one token's row on the way (RMSNorm),
// against the double reference of the normalized row.
#include <cmath>
#include <cstring>
#include <vector>

#include "check_gemm.cuh"

namespace codegemm::test {
namespace {

// All that normalize, and one that does not.
struct Configs {
  using Gather = config_list<cuda::GatherM1V4G128, cuda::GatherM2V8G128, cuda::GatherM1V4G32,
                             cuda::GatherM1V4Row, cuda::GatherM2V8Row, cuda::GatherAny<2, 4>>;
  using Fused = config_list<>;
};

std::vector<float> row_of(Rng& rng, std::int64_t size, float scale) {
  std::vector<float> out(static_cast<std::size_t>(size));
  for (float& value : out) value = scale * static_cast<float>(rng.normal());
  return out;
}

// Rows of `parts` parts, values of x of about `scale`.
template <class X, class Y>
void check_normed(Format format, std::vector<std::int64_t> parts, std::int64_t cols, bool gated, float scale,
                  const cuda::Device& device, std::uint64_t seed) {
  constexpr float kEpsilon = 1e-5F;
  Rng rng(seed);
  std::vector<QuantizedMatrix> matrices;
  std::int64_t rows = 0;
  for (const std::int64_t part : parts) {
    matrices.push_back(random_matrix(format, part, cols, rng));
    rows += part;
  }
  CAPTURE(format_name(format), parts, cols, gated, scale, seed);
  DeviceWeights w(std::move(matrices));
  const std::int64_t out_rows = gated ? rows / 2 : rows;
  std::vector<float> x = row_of(rng, cols, scale);
  x[static_cast<std::size_t>(cols / 3)] *= 200.0F;  // one that stands out, as models have them
  const std::vector<float> weight = row_of(rng, cols, 1.0F);
  const auto residual = random_vector<Y>(static_cast<std::size_t>(out_rows), rng);

  double squares = 0.0;
  for (const float value : x) squares += static_cast<double>(value) * static_cast<double>(value);
  const double factor = 1.0 / std::sqrt(squares / static_cast<double>(cols) + static_cast<double>(kEpsilon));
  std::vector<float> normed(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    normed[i] = static_cast<float>(factor * static_cast<double>(x[i]) * static_cast<double>(weight[i]));
  }
  Reference want = reference_of(w.parts, normed, 1, cols);
  double size_of_product = norm(want);
  if (gated) {
    want = swiglu_of(want, 1, rows);
    size_of_product = 3.0 * norm(want);
  }
  for (std::int64_t n = 0; n < out_rows; ++n) {
    const auto i = static_cast<std::size_t>(n);
    want.y[i] += static_cast<double>(as_float(residual[i]));
    want.size[i] += std::abs(static_cast<double>(as_float(residual[i])));
  }

  DeviceBuffer<float> x_device(x);
  DeviceBuffer<float> weight_device(weight);
  DeviceBuffer<Y> residual_device(residual);
  DeviceBuffer<Y> y(static_cast<std::size_t>(out_rows));
  cuda::GemmProblem<X, Y> p;
  p.weights = w.view();
  p.x = MatrixView<const X>(nullptr, 1, cols);
  p.y = MatrixView<Y>(y.data(), 1, out_rows);
  p.residual = MatrixView<const Y>(residual_device.data(), 1, out_rows);
  p.activation = gated ? cuda::Activation::kSwiGlu : cuda::Activation::kNone;
  REQUIRE(cuda::normalizes<Configs>(p, device));
  p.normed = {x_device.data(), weight_device.data(), kEpsilon};
  DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
  workspace.clear();
  std::vector<Y> got[2];
  for (auto& out : got) {
    y.poison();
    require_ok(cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr));
    REQUIRE_CUDA(cudaDeviceSynchronize());
    out = y.download();
  }
  REQUIRE(y.guards_intact());
  REQUIRE(std::memcmp(got[0].data(), got[1].data(), got[0].size() * sizeof(Y)) == 0);
  // Inner products are rounded to fp16 once, the row's values before that.
  const double rounding = (format.m == 1 ? 2.0 : 4.0) * rounding_of<Half>();
  CHECK(worst(want, got[0], 1, out_rows, out_rows, cols, rounding) <= 1.0);
  if (out_rows >= 32) {
    const double most = 1.5 * rounding_of<Half>() * size_of_product + rounding_of<Y>() * norm(want);
    CHECK(relative_error(want, got[0], 1, out_rows, out_rows, 1.0) <= most);
  }
}

}  // namespace

TEST_CASE("cuda gemm: one token's row is normalized on the way", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(9000);
  for (const Format format :
       {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 1, 8, 32}, Format{4, 1, 8, -1}}) {
    for (const std::int64_t cols : {8, 264, 2048, 4096, 5120}) {
      check_normed<Half, Half>(format, {77}, cols, false, 1.0F, device, seed++);
      check_normed<BFloat16, float>(format, {128, 33}, cols, false, 300.0F, device, seed++);
    }
    if (device.arch >= 90) check_normed<Half, Half>(format, {320, 320}, 4096, true, 0.01F, device, seed++);
  }
  check_normed<Half, float>({4, 1, 8, 128}, {6144}, 8192, false, 1e-6F, device, seed++);
  check_normed<Half, float>({4, 1, 8, 128}, {64}, 16384, false, 2e4F, device, seed++);
  // Too long for a copy into the table's place.
  check_normed<Half, float>({4, 1, 8, 128}, {64}, 20480, false, 1.0F, device, seed++);
}

TEST_CASE("cuda gemm: what cannot normalize a row says so", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  Rng rng(seed_or(9100));
  const auto refused = [&](Format format, std::int64_t tokens) {
    DeviceWeights w(random_matrix(format, 64, 512, rng));
    DeviceBuffer<float> row(std::vector<float>(512, 1.0F));
    DeviceBuffer<float> y(static_cast<std::size_t>(64 * tokens));
    cuda::GemmProblem<Half, float> p;
    p.weights = w.view();
    p.x = MatrixView<const Half>(nullptr, tokens, 512);
    p.y = MatrixView<float>(y.data(), tokens, 64);
    CHECK_FALSE(cuda::normalizes<Configs>(p, device));
    p.normed = {row.data(), row.data(), 1e-5F};
    return cuda::validate<Configs>(p, device).code();
  };
  CHECK(refused({4, 1, 8, 128}, 2) == StatusCode::kUnsupported);
  CHECK(refused({4, 2, 8, 128}, 1) == StatusCode::kUnsupported);

  DeviceWeights w(random_matrix({4, 1, 8, 128}, 64, 512, rng));
  DeviceBuffer<float> row(std::vector<float>(520, 1.0F));
  DeviceBuffer<float> y(64);
  cuda::GemmProblem<Half, float> p;
  p.weights = w.view();
  p.x = MatrixView<const Half>(nullptr, 1, 512);
  p.y = MatrixView<float>(y.data(), 1, 64);
  p.normed = {row.data(), nullptr, 1e-5F};
  CHECK(cuda::validate<Configs>(p, device).code() == StatusCode::kNullPointer);
  p.normed = {row.data() + 1, row.data(), 1e-5F};
  CHECK(cuda::validate<Configs>(p, device).code() == StatusCode::kMisaligned);
  p.normed = {row.data(), row.data(), 1e-5F};
  CHECK(cuda::validate<Configs>(p, device).ok());
}

}  // namespace codegemm::test
