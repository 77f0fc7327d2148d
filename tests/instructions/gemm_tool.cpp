// SPDX-License-Identifier: Apache-2.0
//
// tests/instructions/gemm_tool.cpp - one multiplication with AVX2, for callgrind to count.
// usage: gemm_tool FORMAT N K TOKENS

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <codegemm/gemm.hpp>

#include <codegemm/samples.hpp>
#include <support/random.hpp>

using namespace codegemm;

namespace {

struct Call {
  const PackedMatrix& w;
  MatrixView<const float> x;
  MatrixView<float> y;
  std::span<std::byte> workspace;
  SerialExecutor& executor;
};

}  // namespace

extern "C" {
bool counted_call(const void* call);
// What callgrind collects: it knows the function by this name.
[[gnu::noinline]] bool counted_call(const void* call) {
  const Call& c = *static_cast<const Call*>(call);
  return detail::gemm_with(c.w, c.x, c.y, c.workspace, c.executor, Isa::kAvx2, detail::Regime::kAutomatic)
      .ok();
}
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: gemm_tool FORMAT N K TOKENS\n");
    return 2;
  }
  if (!isa_available(Isa::kAvx2)) return 4;
  const Format f = parse_format(argv[1]).value();
  const std::int64_t rows = std::atoll(argv[2]);
  const std::int64_t cols = std::atoll(argv[3]);
  const std::int64_t tokens = std::atoll(argv[4]);
  test::Rng rng(1);
  const QuantizedMatrix quantized = test::random_quantized(rng, f, rows, cols);
  const PackedMatrix w = detail::pack_for(quantized.view(), Isa::kAvx2).value();
  const std::vector<float> x = rng.normals(tokens * cols);
  std::vector<float> y(static_cast<std::size_t>(tokens * rows));
  SerialExecutor serial;
  AlignedBuffer<std::byte> workspace;
  const std::int64_t floats =
      detail::exact_workspace_floats(w.view(), tokens, 1, Isa::kAvx2, detail::Regime::kAutomatic);
  if (!workspace.reserve(static_cast<std::size_t>(floats) * sizeof(float))) return 1;
  const Call call{w, {x.data(), tokens, cols}, {y.data(), tokens, rows}, workspace.span(), serial};
  return counted_call(&call) ? 0 : 1;
}
