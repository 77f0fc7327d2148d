// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/gather_gpu_test.cu - the GPU product by gathering from Psumbooks.
#include <vector>

#include "check_gemm.cuh"

namespace codegemm::test {
namespace {

struct Configs {
  using Gather = cuda::GatherConfigs;
  using Fused = config_list<>;
};

template <class X, class Y>
int check(const Case& c, const cuda::Device& device, std::uint64_t seed) {
  return check_in<Configs, X, Y>(c, device, seed);
}

// Small enough for compute-sanitizer (scripts/gpu-check).
TEST_CASE("cuda gemm: a small one of each kind", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(500);
  cuda::GemmTuning alone;
  alone.cluster = 1;
  check<Half, Half>({{4, 1, 8, 128}, 77, 1096, 1, true, 1}, device, seed++);
  check<BFloat16, float>({{8, 2, 8, 128}, 33, 2048, 1, false, 0}, device, seed++);
  check<Half, Half>({{4, 1, 8, 32}, 700, 544, 1}, device, seed++);
  check<Half, Half>({{4, 1, 8, 32}, 400, 5000, 1}, device, seed++);
  check<Half, Half>({{8, 2, 8, 128}, 5200, 4096, 2}, device, seed++);  // two tokens in one pass
  check<Half, float>({{16, 3, 6, 48}, 40, 1600, 1}, device, seed++);
  check<Half, Half>({{4, 1, 8, 128}, 40, 16384, 1, false, 0, alone}, device, seed++);
}

TEST_CASE("cuda gemm: so many row tiles that blocks are large", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  check<Half, Half>({{4, 1, 8, 128}, 31000, 4096, 1}, device, seed_or(700));
  check<Half, Half>({{8, 2, 8, -1}, 32000, 4096, 1, true, 8}, device, seed_or(701));
}

TEST_CASE("cuda gemm: tuned formats on every edge of their tiles", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(1);
  for (const Format format : {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 1, 8, 32},
                              Format{4, 1, 8, -1}, Format{8, 2, 8, -1}}) {
    for (const std::int64_t rows : {1, 15, 16, 17, 257, 1031}) {
      for (const std::int64_t cols : {8, 248, 256, 264, 2048, 2560}) {
        for (const std::int64_t tokens : {1, 2}) {
          for (const int sets : {0, 2}) {
            check<Half, Half>({format, rows, cols, tokens, false, 0, {}, sets}, device, seed++);
          }
        }
      }
    }
  }
}

TEST_CASE("cuda gemm: every vector length and number of codebooks", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(1000);
  for (const int v : {2, 4, 8, 16}) {
    for (const int m : {1, 2, 3, 4}) {
      for (const int b : {4, 5, 6, 7, 8}) check<Half, float>({{v, m, b, 64}, 83, 1040, 1}, device, seed++);
    }
  }
}

TEST_CASE("cuda gemm: every scale group", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(2000);
  for (const int g : {-1, 8, 16, 24, 32, 48, 64, 96, 128, 256, 1024, 4096}) {
    for (const std::int64_t tokens : {1, 3}) {
      check<Half, float>({{4, 1, 8, g}, 50, 1096, tokens}, device, seed++);
      check<Half, float>({{8, 2, 8, g}, 50, 1096, tokens}, device, seed++);
      check<Half, float>({{8, 1, 8, g}, 50, 1096, tokens}, device, seed++);
    }
  }
  check<Half, float>({{4, 1, 8, 4}, 50, 1096, 1}, device, seed++);
  check<Half, float>({{2, 3, 8, 2}, 50, 1096, 1}, device, seed++);
}

TEST_CASE("cuda gemm: token counts, types, strides and bias", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(3000);
  for (std::int64_t tokens = 1; tokens <= 8; ++tokens) {
    for (const bool bias : {false, true}) {
      check<Half, Half>({{4, 1, 8, 128}, 300, 1036, tokens, bias, 0}, device, seed++);  // rows at 8 bytes
      const Case c{{4, 1, 8, 128}, 300, 1032, tokens, bias, 3};
      check<Half, Half>(c, device, seed++);
      check<Half, float>(c, device, seed++);
      check<BFloat16, BFloat16>(c, device, seed++);
      check<BFloat16, float>(c, device, seed++);
    }
  }
}

TEST_CASE("cuda gemm: blocks that sum through memory, as before compute capability 9.0", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(4000);
  cuda::GemmTuning tuning;
  tuning.cluster = 1;
  for (const Format format :
       {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 1, 8, 32}, Format{8, 3, 6, -1}}) {
    for (const std::int64_t rows : {1, 17, 1031, 5000}) {
      for (const std::int64_t cols : {16, 264, 2560}) {
        for (const std::int64_t tokens : {1, 3}) {
          check<Half, Half>({format, rows, cols, tokens, true, 1, tuning}, device, seed++);
        }
      }
    }
  }
}

TEST_CASE("cuda gemm: tunings change the speed, not the answer", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(5000);
  for (const int cluster : {1, 2, 5, 8}) {
    for (const int rounds_ahead : {0, 1, 15}) {
      const cuda::GemmTuning tuning{cluster, rounds_ahead, rounds_ahead * 10000};
      check<Half, Half>({{4, 1, 8, 128}, 4099, 2560, 2, false, 0, tuning}, device, seed++);
      check<Half, Half>({{8, 2, 8, 128}, 2100, 6144, 1, false, 0, tuning}, device, seed++);
    }
  }
}

TEST_CASE("cuda gemm: large K and the error that the paper's kernel has", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  Rng rng(seed_or(6000));
  for (const Format format : {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 1, 8, 32}}) {
    DeviceWeights w(random_matrix(format, 512, 14336, rng));
    const auto x = random_vector<Half>(14336, rng);
    DeviceBuffer<Half> x_device(x);
    DeviceBuffer<Half> y(512);
    y.poison();
    cuda::GemmProblem<Half, Half> p;
    p.weights = w.view();
    p.x = MatrixView<const Half>(x_device.data(), 1, 14336);
    p.y = MatrixView<Half>(y.data(), 1, 512);
    DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
    workspace.clear();
    REQUIRE(cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr).ok());
    REQUIRE_CUDA(cudaDeviceSynchronize());
    CHECK(relative_error(reference_of(w.parts[0], x, 1, 14336), y.download(), 1, 512, 512) <= 5e-4);
  }
}

TEST_CASE("cuda gemm: captured in a graph and replayed with other inputs, in a chain", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  Rng rng(seed_or(7000));
  // Two layers: each waits for the output of the one before, which the overlap must not break.
  DeviceWeights first(random_matrix({4, 1, 8, 128}, 2048, 1024, rng));
  DeviceWeights second(random_matrix({8, 2, 8, 128}, 777, 2048, rng));
  for (const int cluster : {8, 1}) {
    CAPTURE(cluster);
    DeviceBuffer<Half> x(1024);
    DeviceBuffer<Half> middle(2048);
    DeviceBuffer<float> y(777);
    cuda::GemmProblem<Half, Half> a;
    a.weights = first.view();
    a.x = MatrixView<const Half>(x.data(), 1, 1024);
    a.y = MatrixView<Half>(middle.data(), 1, 2048);
    a.tuning.cluster = cluster;
    cuda::GemmProblem<Half, float> b;
    b.weights = second.view();
    b.x = MatrixView<const Half>(middle.data(), 1, 2048);
    b.y = MatrixView<float>(y.data(), 1, 777);
    b.tuning.cluster = cluster;
    // One workspace serves both: calls of one stream follow one another.
    DeviceBuffer<std::byte> workspace(
        std::max(cuda::workspace_bytes<Configs>(a, device), cuda::workspace_bytes<Configs>(b, device)));
    workspace.clear();

    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    REQUIRE_CUDA(cudaStreamCreate(&stream));
    REQUIRE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    REQUIRE(cuda::run<Configs>(a, device, workspace.data(), workspace.size(), stream).ok());
    REQUIRE(cuda::run<Configs>(b, device, workspace.data(), workspace.size(), stream).ok());
    REQUIRE_CUDA(cudaStreamEndCapture(stream, &graph));
    REQUIRE_CUDA(cudaGraphInstantiate(&replay, graph, 0));
    for (int i = 0; i < 20; ++i) {
      const auto values = random_vector<Half>(1024, rng);
      x.upload(values);
      middle.poison();
      y.poison();
      REQUIRE_CUDA(cudaGraphLaunch(replay, stream));
      REQUIRE_CUDA(cudaStreamSynchronize(stream));
      const auto between = middle.download();
      CHECK(worst(reference_of(first.parts[0], values, 1, 1024), between, 1, 2048, 2048, 1024,
                  rounding_of<Half>()) <= 1.0);
      CHECK(worst(reference_of(second.parts[0], between, 1, 2048), y.download(), 1, 777, 777, 2048,
                  rounding_of<Half>()) <= 1.0);
    }
    REQUIRE_CUDA(cudaGraphExecDestroy(replay));
    REQUIRE_CUDA(cudaGraphDestroy(graph));
    REQUIRE_CUDA(cudaStreamDestroy(stream));
  }
}

TEST_CASE("cuda gemm: two streams with two workspaces at once", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  Rng rng(seed_or(8000));
  DeviceWeights w(random_matrix({4, 1, 8, 128}, 1500, 16384, rng));
  cuda::GemmTuning tuning;
  tuning.cluster = 1;  // the way of summing that has a workspace
  cudaStream_t streams[2] = {};
  std::vector<std::vector<Half>> x;
  std::vector<std::unique_ptr<DeviceBuffer<Half>>> x_device;
  std::vector<std::unique_ptr<DeviceBuffer<float>>> y;
  std::vector<std::unique_ptr<DeviceBuffer<std::byte>>> workspaces;
  cuda::GemmProblem<Half, float> problems[2];
  for (int i = 0; i < 2; ++i) {
    REQUIRE_CUDA(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
    x.push_back(random_vector<Half>(16384, rng));
    x_device.push_back(std::make_unique<DeviceBuffer<Half>>(x.back()));
    y.push_back(std::make_unique<DeviceBuffer<float>>(1500));
    y.back()->poison();
    problems[i].weights = w.view();
    problems[i].x = MatrixView<const Half>(x_device.back()->data(), 1, 16384);
    problems[i].y = MatrixView<float>(y.back()->data(), 1, 1500);
    problems[i].tuning = tuning;
    workspaces.push_back(
        std::make_unique<DeviceBuffer<std::byte>>(cuda::workspace_bytes<Configs>(problems[i], device)));
    REQUIRE(workspaces.back()->size() > 0);
    workspaces.back()->clear();
  }
  REQUIRE_CUDA(cudaDeviceSynchronize());
  for (int round = 0; round < 50; ++round) {
    for (std::size_t i = 0; i < 2; ++i) {
      REQUIRE(
          cuda::run<Configs>(problems[i], device, workspaces[i]->data(), workspaces[i]->size(), streams[i])
              .ok());
    }
  }
  REQUIRE_CUDA(cudaDeviceSynchronize());
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(worst(reference_of(w.parts[0], x[i], 1, 16384), y[i]->download(), 1, 1500, 1500, 16384,
                rounding_of<Half>()) <= 1.0);
    REQUIRE_CUDA(cudaStreamDestroy(streams[i]));
  }
}

TEST_CASE("cuda gemm: zeros, extremes, infinity and NaN", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  Rng rng(seed_or(9000));
  DeviceWeights w(random_matrix({4, 1, 8, 128}, 40, 512, rng));
  const auto product = [&](const std::vector<BFloat16>& x) {
    DeviceBuffer<BFloat16> x_device(x);
    DeviceBuffer<float> y(40);
    y.poison();
    cuda::GemmProblem<BFloat16, float> p;
    p.weights = w.view();
    p.x = MatrixView<const BFloat16>(x_device.data(), 1, 512);
    p.y = MatrixView<float>(y.data(), 1, 40);
    DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
    workspace.clear();
    REQUIRE(cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr).ok());
    REQUIRE_CUDA(cudaDeviceSynchronize());
    return y.download();
  };
  std::vector<BFloat16> x(512);
  for (const float value : product(x)) CHECK(value == 0.0F);
  for (auto& value : x) value = BFloat16::from_float(rng.normal() * 1e30F);
  CHECK(worst(reference_of(w.parts[0], x, 1, 512), product(x), 1, 40, 40, 512, rounding_of<Half>()) <= 1.0);
  for (auto& value : x) value = BFloat16::from_float(rng.normal() * 1e-30F);
  CHECK(relative_error(reference_of(w.parts[0], x, 1, 512), product(x), 1, 40, 40) <= rounding_of<Half>());
  x[77] = BFloat16::from_float(INFINITY);
  for (const float value : product(x)) CHECK(!std::isfinite(value));
  x[77] = BFloat16::from_float(NAN);
  for (const float value : product(x)) CHECK(std::isnan(value));
}

// Two tokens share the words of a Psumbook.
TEST_CASE("cuda gemm: a token that is not finite leaves the other alone", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  Rng rng(seed_or(9500));
  DeviceWeights w(random_matrix({8, 2, 8, 128}, 333, 1536, rng));
  const auto x = random_vector<Half>(2 * 1536, rng);
  const auto product = [&](const std::vector<Half>& tokens) {
    DeviceBuffer<Half> x_device(tokens);
    DeviceBuffer<float> y(2 * 333);
    y.poison();
    cuda::GemmProblem<Half, float> p;
    p.weights = w.view();
    p.x = MatrixView<const Half>(x_device.data(), 2, 1536);
    p.y = MatrixView<float>(y.data(), 2, 333);
    DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
    workspace.clear();
    REQUIRE(cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr).ok());
    REQUIRE_CUDA(cudaDeviceSynchronize());
    return y.download();
  };
  const auto plain = product(x);
  for (const std::size_t bad : {std::size_t{0}, std::size_t{1}}) {
    for (const float value : {INFINITY, NAN}) {
      CAPTURE(bad, value);
      auto tokens = x;
      tokens[bad * 1536 + 1000] = Half::from_float(value);
      const auto got = product(tokens);
      for (std::size_t n = 0; n < 333; ++n) {
        CHECK(got[(1 - bad) * 333 + n] == plain[(1 - bad) * 333 + n]);
        CHECK_FALSE(std::isfinite(got[bad * 333 + n]));
      }
    }
  }
}

}  // namespace
}  // namespace codegemm::test
