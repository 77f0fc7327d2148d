// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/fused_gpu_test.cu - the GPU product on tensor cores.
#include <algorithm>
#include <vector>

#include "check_gemm.cuh"

namespace codegemm::test {
namespace {

using Configs = FusedAlone<cuda::FusedConfigs>;

template <class X, class Y>
int check(const Case& c, const cuda::Device& device, std::uint64_t seed) {
  return check_in<Configs, X, Y>(c, device, seed);
}

TEST_CASE("cuda gemm: tensor cores on every edge of their tiles, grids and windows", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(8000);
  for (const Format format :
       {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 1, 8, 32}, Format{8, 2, 8, 64},
        Format{4, 1, 7, -1}, Format{8, 2, 8, 256}, Format{8, 1, 12, 128}}) {
    for (const std::int64_t tokens : {1, 7, 8, 9, 16, 17, 33, 64, 65, 150}) {
      check<Half, float>({format, 83, 1096, tokens, true, 1}, device, seed++);
      check<BFloat16, float>({format, 40, 776, tokens, false, 0}, device, seed++);
    }
    for (const int splits : {1, 2, 3, 6}) {
      for (const int rounds_ahead : {0, 3}) {
        cuda::GemmTuning tuning;
        tuning.splits = splits;
        tuning.rounds_ahead = rounds_ahead;
        check<Half, Half>({format, 700, 9216, 5, true, 0, tuning}, device, seed++);
        check<Half, float>({format, 1031, 8192 + 24, 12, true, 8, tuning}, device, seed++);
      }
    }
    check<Half, float>({format, 33, 40960, 16}, device, seed++);  // many windows
  }
}

TEST_CASE("cuda gemm: wgmma with every token tile", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(9000);
  for (const int token_tile : {32, 64, 128, 256}) {
    for (const int splits : {1, 2, 3}) {
      cuda::GemmTuning tuning;
      tuning.token_tile = token_tile;
      tuning.splits = splits;
      for (const std::int64_t tokens : {1, 31, 100, 300}) {
        check<Half, Half>({{4, 1, 8, 128}, 300, 1032, tokens, true, 8, tuning}, device, seed++);
        check<BFloat16, BFloat16>({{8, 2, 8, 128}, 75, 776, tokens, true, 8, tuning}, device, seed++);
        check<Half, Half>({{4, 1, 8, 32}, 300, 1032, tokens, false, 8, tuning}, device, seed++);
      }
    }
    // Clusters that share a product's sum: with 8 of them a share is down to 8 tokens.
    for (const int splits : {4, 8}) {
      cuda::GemmTuning tuning;
      tuning.token_tile = token_tile;
      tuning.splits = splits;
      for (const std::int64_t tokens : {33, 300}) {
        check<Half, Half>({{4, 1, 8, 128}, 300, 2312, tokens, false, 8, tuning}, device, seed++);
        check<BFloat16, float>({{8, 2, 8, 128}, 523, 2312, tokens, true, 8, tuning}, device, seed++);
        check<Half, BFloat16>({{4, 1, 8, 32}, 300, 2056, tokens, true, 8, tuning}, device, seed++);
      }
    }
  }
  for (const std::int64_t tokens : {100, 300}) {
    for (const std::int64_t rows : {75, 1031}) {
      cuda::GemmTuning tuning;
      tuning.warpgroups = 3;
      check<Half, Half>({{4, 1, 8, 128}, rows, 1032, tokens, true, 8, tuning}, device, seed++);
      check<BFloat16, float>({{8, 2, 8, 128}, rows, 1032, tokens, true, 8, tuning}, device, seed++);
    }
  }
  // More products than clusters run at once: five blocks of rows, 22 of tokens. What is left after whole
  // waves is cut into pieces, whose borders then lie anywhere.
  for (const int splits : {1, 2, 5}) {
    cuda::GemmTuning tuning;
    tuning.token_tile = 32;
    tuning.splits = splits;
    check<Half, Half>({{4, 1, 8, 128}, 1100, 1288, 700, true, 8, tuning}, device, seed++);
    check<BFloat16, float>({{8, 2, 8, 128}, 1100, 2056, 700, false, 8, tuning}, device, seed++);
  }
}

// Small enough for compute-sanitizer (scripts/gpu-check).
TEST_CASE("cuda gemm: a small one of each fused kind", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  std::uint64_t seed = seed_or(9500);
  cuda::GemmTuning split;
  split.splits = 2;
  check<Half, Half>({{4, 1, 8, 128}, 77, 1096, 5, true, 8}, device, seed++);
  check<BFloat16, float>({{8, 2, 8, 128}, 33, 2048, 12, true, 8, split}, device, seed++);
  check<Half, Half>({{8, 1, 12, 32}, 40, 544, 9}, device, seed++);
  check<Half, Half>({{8, 2, 8, 128}, 40, 4640, 3, true, 8}, device, seed++);  // two windows
  split.splits = 3;
  split.token_tile = 32;
  check<Half, Half>({{4, 1, 8, 128}, 300, 1032, 40, true, 8, split}, device, seed++);
  cuda::GemmTuning wide;
  wide.warpgroups = 3;
  check<Half, Half>({{4, 1, 8, 128}, 300, 1032, 40, true, 8, wide}, device, seed++);
}

TEST_CASE("cuda gemm: on tensor cores, captured in a graph and replayed with other inputs", "[gpu]") {
  const cuda::Device device = gpu_or_skip();
  Rng rng(seed_or(9700));
  // Two layers: each waits for the output of the one before, which the overlap must not break.
  DeviceWeights first(random_matrix({4, 1, 8, 128}, 1024, 1024, rng));
  DeviceWeights second(random_matrix({8, 2, 8, 128}, 776, 1024, rng));
  for (const std::int64_t tokens : {7, 40, 300}) {
    CAPTURE(tokens);
    DeviceBuffer<Half> x(static_cast<std::size_t>(tokens * 1024));
    DeviceBuffer<Half> between(static_cast<std::size_t>(tokens * 1024));
    DeviceBuffer<float> y(static_cast<std::size_t>(tokens * 776));
    cuda::GemmProblem<Half, Half> a;
    a.weights = first.view();
    a.x = MatrixView<const Half>(x.data(), tokens, 1024);
    a.y = MatrixView<Half>(between.data(), tokens, 1024);
    cuda::GemmProblem<Half, float> b;
    b.weights = second.view();
    b.x = MatrixView<const Half>(between.data(), tokens, 1024);
    b.y = MatrixView<float>(y.data(), tokens, 776);
    DeviceBuffer<std::byte> workspace(
        std::max(cuda::workspace_bytes<Configs>(a, device), cuda::workspace_bytes<Configs>(b, device)));
    workspace.clear();
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    REQUIRE_CUDA(cudaStreamCreate(&stream));
    REQUIRE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    REQUIRE(cuda::run<Configs>(a, device, workspace.data(), workspace.size(), stream).ok());
    REQUIRE(cuda::run<Configs>(b, device, workspace.data(), workspace.size(), stream).ok());
    REQUIRE_CUDA(cudaStreamEndCapture(stream, &graph));
    REQUIRE_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (int round = 0; round < 3; ++round) {
      const auto values = random_vector<Half>(x.size(), rng);
      x.upload(values);
      between.poison();
      y.poison();
      REQUIRE_CUDA(cudaGraphLaunch(exec, stream));
      REQUIRE_CUDA(cudaStreamSynchronize(stream));
      const auto middle = between.download();
      const Reference want_middle = reference_of(first.parts[0], values, tokens, 1024);
      CHECK(relative_error(want_middle, middle, tokens, 1024, 1024) <= 1e-3);
      CHECK(relative_error(reference_of(second.parts[0], middle, tokens, 1024), y.download(), tokens, 776,
                           776) <= 1e-3);
    }
    REQUIRE_CUDA(cudaGraphExecDestroy(exec));
    REQUIRE_CUDA(cudaGraphDestroy(graph));
    REQUIRE_CUDA(cudaStreamDestroy(stream));
  }
}

}  // namespace
}  // namespace codegemm::test
