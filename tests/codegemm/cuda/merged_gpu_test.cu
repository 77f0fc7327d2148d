// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/merged_gpu_test.cu - matrices merged along N, SwiGLU, and shards, in every regime.
#include <codegemm/cuda/dequantize.cuh>
#include <codegemm/shard.hpp>

#include <vector>

#include "check_gemm.cuh"

namespace codegemm::test {
namespace {

using cuda::DefaultConfigs;

using WithoutSwiGlu = FusedAlone<config_list<cuda::FusedM1V4G128>>;

TEST_CASE("cuda gemm: merged matrices, each with its own codebooks", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(11000);
  for (const Format format :
       {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 1, 8, 32}, Format{4, 1, 8, -1}}) {
    for (const std::int64_t tokens : {1, 5, 16, 40, 200}) {
      Case qkv{format, 336 + 64 + 70, 1032, tokens, true, 8};
      qkv.parts = {336, 64, 70};
      check_in<DefaultConfigs, Half, Half>(qkv, device, seed++);
      Case four{format, 16 + 16 + 400 + 48, 2048, tokens, false, 0};
      four.parts = {16, 16, 400, 48};
      check_in<DefaultConfigs, BFloat16, float>(four, device, seed++);
    }
  }
  // Many blocks of rows; wgmma goes over several of each part, and changes its table.
  for (const std::int64_t tokens : {1, 16, 200}) {
    Case large{{4, 1, 8, 128}, 4096 + 1024 + 1024, 1024, tokens};
    large.parts = {4096, 1024, 1024};
    large.tuning.token_tile = 32;
    check_in<DefaultConfigs, Half, Half>(large, device, seed++);
  }
}

TEST_CASE("cuda gemm: SwiGLU over gate and up", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(12000);
  for (const Format format :
       {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 1, 8, 32}, Format{8, 2, 8, -1}}) {
    for (const bool two_parts : {true, false}) {
      for (const std::int64_t tokens : {1, 6, 16, 33, 64, 150, 300}) {
        Case c{format, 2 * 432, 1032, tokens, true, 8};
        if (two_parts) c.parts = {432, 432};
        c.gated = true;
        check_in<DefaultConfigs, Half, Half>(c, device, seed++);
        c.bias = false;
        c.pad = 16;
        check_in<DefaultConfigs, BFloat16, float>(c, device, seed++);
      }
    }
    for (const int splits : {1, 2, 4}) {
      for (const std::int64_t tokens : {1, 12, 48}) {
        Case c{format, 2 * 272, 16384 + 8, tokens, true, 0};
        c.parts = {272, 272};
        c.gated = true;
        c.tuning.splits = splits;
        check_in<DefaultConfigs, Half, float>(c, device, seed++);
      }
    }
  }
  for (const int token_tile : {32, 64, 128, 256}) {
    Case c{{4, 1, 8, 128}, 2 * 2064, 520, 611, true, 4};
    c.parts = {2064, 2064};
    c.gated = true;
    c.tuning.token_tile = token_tile;
    c.tuning.splits = 1;
    check_in<DefaultConfigs, Half, Half>(c, device, seed++);
  }
}

TEST_CASE("cuda gemm: a format for any v, b and g, merged and gated", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(12500);
  for (const Format format : {Format{2, 1, 4, 32}, Format{4, 2, 6, 64}, Format{8, 4, 8, -1}}) {
    Case c{format, 2 * 96, 1040, 3, true, 1};
    c.parts = {96, 96};
    check_in<DefaultConfigs, Half, float>(c, device, seed++);
    c.gated = true;
    check_in<DefaultConfigs, Half, float>(c, device, seed++);
  }
  Case wide{{8, 1, 12, 128}, 2 * 96, 1040, 20, true, 8};
  wide.parts = {96, 96};
  check_in<DefaultConfigs, Half, Half>(wide, device, seed++);
  wide.gated = true;
  check_in<DefaultConfigs, Half, Half>(wide, device, seed++);
}

// Small enough for compute-sanitizer (scripts/gpu-check).
TEST_CASE("cuda gemm: a small one of each merged kind", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(12700);
  for (const std::int64_t tokens : {1, 9, 40}) {
    Case c{{4, 1, 8, 128}, 2 * 32, 520, tokens, true, 8};
    c.parts = {32, 32};
    check_in<DefaultConfigs, Half, Half>(c, device, seed++);
    c.gated = true;
    check_in<DefaultConfigs, Half, Half>(c, device, seed++);
  }
}

TEST_CASE("cuda dequantize: merged matrices", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  const std::uint64_t seed = seed_or(13000);
  CAPTURE(seed);
  Rng rng(seed);
  std::vector<QuantizedMatrix> parts;
  for (const std::int64_t rows : {48, 16, 21}) parts.push_back(random_matrix({4, 1, 8, 64}, rows, 520, rng));
  DeviceWeights w(std::move(parts));
  DeviceBuffer<float> out(85 * 520);
  out.poison();
  REQUIRE(cuda::dequantize(w.view(), MatrixView<float>(out.data(), 85, 520), device, nullptr).ok());
  REQUIRE_CUDA(cudaDeviceSynchronize());
  const std::vector<float> got = out.download();
  std::size_t at = 0;
  for (const QuantizedMatrix& part : w.parts) {
    for (std::int64_t n = 0; n < part.rows(); ++n) {
      for (std::int64_t k = 0; k < 520; ++k, ++at) {
        const double want = reference_weight(part.view(), n, k);
        REQUIRE(std::abs(static_cast<double>(got[at]) - want) <= 1e-6 * std::abs(want) + 1e-7);
      }
    }
  }
}

// y of a matrix, in the regime that the library chooses.
std::vector<float> product(const QuantizedMatrix& matrix, const std::vector<Half>& x, std::int64_t tokens,
                           std::int64_t first_col, std::int64_t stride, const cuda::Device& device) {
  auto packed = cuda::pack(matrix.view());
  REQUIRE(packed.ok());
  DeviceBuffer<std::byte> weights(packed->bytes().size());
  REQUIRE_CUDA(
      cudaMemcpy(weights.data(), packed->bytes().data(), packed->bytes().size(), cudaMemcpyHostToDevice));
  DeviceBuffer<Half> x_device(x);
  DeviceBuffer<float> y(static_cast<std::size_t>(tokens * matrix.rows()));
  cuda::GemmProblem<Half, float> p;
  p.weights = packed->view(weights.data());
  p.x = MatrixView<const Half>(x_device.data() + first_col, tokens, matrix.cols(), stride);
  p.y = MatrixView<float>(y.data(), tokens, matrix.rows());
  DeviceBuffer<std::byte> workspace(cuda::workspace_bytes(p, device));
  workspace.clear();
  REQUIRE(cuda::run(p, device, workspace.data(), workspace.size(), nullptr).ok());
  REQUIRE_CUDA(cudaDeviceSynchronize());
  return y.download();
}

TEST_CASE("cuda gemm: shards along N and K give what the whole gives", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(14000);
  for (const Format format : {Format{4, 1, 8, 128}, Format{8, 2, 8, 64}, Format{4, 2, 6, -1}}) {
    for (const std::int64_t tokens : {1, 8, 50}) {
      CAPTURE(format_name(format), tokens, seed);
      Rng rng(seed++);
      constexpr std::int64_t kRows = 530, kCols = 2048;
      const QuantizedMatrix whole = random_matrix(format, kRows, kCols, rng);
      const auto x = random_vector<Half>(static_cast<std::size_t>(tokens * kCols), rng);
      const Reference want = reference_of(whole, x, tokens, kCols);
      const auto check = [&](const std::vector<float>& got) {
        CHECK(worst(want, got, tokens, kRows, kRows, kCols, 3.0 * rounding_of<Half>()) <= 1.0);
      };
      check(product(whole, x, tokens, 0, kCols, device));

      std::vector<float> joined(static_cast<std::size_t>(tokens * kRows));
      for (const auto& [first, rows] : {std::pair<int, int>{0, 200}, {200, 77}, {277, 253}}) {
        const auto shard = shard_rows(whole.view(), first, rows);
        REQUIRE(shard.ok());
        const auto part = product(*shard, x, tokens, 0, kCols, device);
        for (std::int64_t t = 0; t < tokens; ++t) {
          std::copy_n(part.data() + t * rows, rows, joined.data() + t * kRows + first);
        }
      }
      check(joined);

      std::vector<float> sum(joined.size());
      for (const auto& [first, cols] : {std::pair<int, int>{0, 512}, {512, 128}, {640, 1408}}) {
        const auto shard = shard_cols(whole.view(), first, cols);
        REQUIRE(shard.ok());
        const auto part = product(*shard, x, tokens, first, kCols, device);
        for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
      }
      check(sum);
    }
  }
}

TEST_CASE("cuda pack and validate: merged matrices") {
  Rng rng(15);
  const auto a = random_matrix({4, 1, 8, 128}, 48, 512, rng);
  const auto b = random_matrix({4, 1, 8, 128}, 40, 512, rng);
  const auto c = random_matrix({4, 1, 8, 128}, 48, 256, rng);
  const auto d = random_matrix({4, 1, 8, 64}, 48, 512, rng);
  const auto code = [](std::vector<QuantizedMatrixView> parts) {
    return cuda::pack(std::span<const QuantizedMatrixView>(parts)).status().code();
  };
  CHECK(code({a.view(), b.view()}) == StatusCode::kOk);
  CHECK(code({b.view(), a.view()}) == StatusCode::kUnsupported);  // 40 rows before others
  CHECK(code({a.view(), c.view()}) == StatusCode::kShapeMismatch);
  CHECK(code({a.view(), d.view()}) == StatusCode::kInvalidArgument);
  CHECK(code({}) == StatusCode::kUnsupported);
  CHECK(code({a.view(), a.view(), a.view(), a.view(), a.view()}) == StatusCode::kUnsupported);

  const cuda::Device device{90, 132, 232448, {0, 132, 66, 44, 33, 24, 20, 18, 16}};
  const auto validate_gated = [&](std::vector<QuantizedMatrixView> parts, std::int64_t y_cols) {
    const auto packed = cuda::pack(std::span<const QuantizedMatrixView>(parts));
    REQUIRE(packed.ok());
    cuda::GemmProblem<Half, Half> p;
    p.weights = packed->view(reinterpret_cast<const void*>(4096));
    p.x = MatrixView<const Half>(reinterpret_cast<const Half*>(8192), 2, 512);
    p.y = MatrixView<Half>(reinterpret_cast<Half*>(16384), 2, y_cols);
    CHECK(cuda::validate<WithoutSwiGlu>(p, device).code() ==
          (y_cols == p.weights.rows ? StatusCode::kOk : StatusCode::kShapeMismatch));
    p.activation = cuda::Activation::kSwiGlu;
    const StatusCode code = cuda::validate(p, device).code();
    CHECK(cuda::validate<WithoutSwiGlu>(p, device).code() ==
          (code == StatusCode::kOk ? StatusCode::kUnsupported : code));
    return code;
  };
  CHECK(validate_gated({a.view(), a.view()}, 48) == StatusCode::kOk);
  CHECK(validate_gated({a.view(), a.view()}, 96) == StatusCode::kShapeMismatch);
  CHECK(validate_gated({a.view(), b.view()}, 44) == StatusCode::kShapeMismatch);
  CHECK(validate_gated({a.view()}, 24) == StatusCode::kShapeMismatch);  // not a multiple of 32
  CHECK(validate_gated({a.view(), a.view(), a.view(), a.view()}, 96) == StatusCode::kShapeMismatch);

  const auto packed = cuda::pack(a.view());
  REQUIRE(packed.ok());
  auto view = packed->view(reinterpret_cast<const void*>(4096));
  view.layout.parts = 9;
  cuda::GemmProblem<Half, Half> p;
  p.weights = view;
  CHECK(cuda::validate(p, device).code() == StatusCode::kInvalidArgument);
  p.weights.layout.parts = 1;
  p.weights.layout.first_tile[1] = 2;
  CHECK(cuda::validate(p, device).code() == StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace codegemm::test
