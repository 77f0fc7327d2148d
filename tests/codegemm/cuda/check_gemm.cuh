// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/cuda/check_gemm.cuh - one product in every regime of a set of configurations, against the
// double reference.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include <codegemm/gemm.cuh>

#include "gpu.cuh"

namespace codegemm::test {

struct Case {
  Format format;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t tokens;
  bool bias = false;
  std::int64_t pad = 0;  // extra stride of x and y
  cuda::GemmTuning tuning = {};
  int sets = 0;
  std::vector<std::int64_t> parts = {};  // rows of the parts, `rows` in all; empty: one
  bool gated = false;                    // SwiGLU
};

// Tensor cores alone, for products that do not end in SwiGLU: half of the kernels to compile.
template <class List>
struct FusedAlone {
  using Gather = config_list<>;
  using Fused = List;
  static constexpr bool kSwiGlu = false;
};

constexpr cuda::Regime kRegimes[] = {cuda::Regime::kGather, cuda::Regime::kFusedMma,
                                     cuda::Regime::kFusedWgmma};

// Whether the configurations of configs.cuh gather this problem from a HalfPsumbook.
template <class Problem>
bool half_psumbook(const Problem& p) {
  const Format f = p.weights.format;
  const int steps = p.weights.layout.scale_steps;
  return f.b == 8 && p.weights.layout.sets == 4 && ((f.v == 4 && f.m == 1) || (f.v == 8 && f.m == 2)) &&
         (steps == 1 || steps == 3 || steps == 5);
}

// Runs a case twice in every regime that serves it: the same bits, the right numbers, every output written
// and nothing beside them. Returns how many regimes did.
template <class Configs, class X, class Y>
int check_in(const Case& c, const cuda::Device& device, std::uint64_t seed) {
  CAPTURE(format_name(c.format), c.rows, c.cols, c.tokens, c.bias, c.pad, c.tuning.cluster, c.sets, seed);
  CAPTURE(c.tuning.splits, c.tuning.rounds_ahead, c.tuning.token_tile, c.parts, c.gated);
  Rng rng(seed);
  std::vector<QuantizedMatrix> parts;
  for (const std::int64_t rows : c.parts.empty() ? std::vector<std::int64_t>{c.rows} : c.parts)
    parts.push_back(random_matrix(c.format, rows, c.cols, rng));
  DeviceWeights w(std::move(parts), {c.sets});
  const std::int64_t out_rows = c.gated ? c.rows / 2 : c.rows;
  const std::int64_t x_stride = c.cols + c.pad;
  const std::int64_t y_stride = out_rows + c.pad;
  const auto x = random_vector<X>(static_cast<std::size_t>(c.tokens * x_stride), rng);
  const auto bias = random_vector<Y>(static_cast<std::size_t>(c.rows), rng);
  const auto residual = random_vector<Y>(static_cast<std::size_t>(c.tokens * y_stride), rng);
  DeviceBuffer<X> x_device(x);
  DeviceBuffer<Y> bias_device(bias);
  DeviceBuffer<Y> residual_device(residual);
  DeviceBuffer<Y> y(static_cast<std::size_t>(c.tokens * y_stride));
  Reference want = reference_of(w.parts, x, c.tokens, x_stride);
  double size_of_product = norm(want);
  const auto add = [&](std::int64_t rows, auto&& value) {
    for (std::int64_t t = 0; c.bias && t < c.tokens; ++t) {
      for (std::int64_t n = 0; n < rows; ++n) {
        const double more = static_cast<double>(as_float(value(t, n)));
        want.y[static_cast<std::size_t>(t * rows + n)] += more;
        want.size[static_cast<std::size_t>(t * rows + n)] += std::abs(more);
      }
    }
  };
  add(c.rows, [&](std::int64_t, std::int64_t n) { return bias[static_cast<std::size_t>(n)]; });
  if (c.gated) {
    want = swiglu_of(want, c.tokens, c.rows);
    size_of_product = 3.0 * norm(want);  // errors of both factors
  }
  add(out_rows,
      [&](std::int64_t t, std::int64_t n) { return residual[static_cast<std::size_t>(t * y_stride + n)]; });

  int served = 0;
  for (const cuda::Regime regime : kRegimes) {
    cuda::GemmProblem<X, Y> p;
    p.weights = w.view();
    p.x = MatrixView<const X>(x_device.data(), c.tokens, c.cols, x_stride);
    p.y = MatrixView<Y>(y.data(), c.tokens, out_rows, y_stride);
    p.activation = c.gated ? cuda::Activation::kSwiGlu : cuda::Activation::kNone;
    p.bias = c.bias ? bias_device.data() : nullptr;
    if (c.bias) p.residual = MatrixView<const Y>(residual_device.data(), c.tokens, out_rows, y_stride);
    p.tuning = c.tuning;
    p.tuning.regime = regime;
    if (cuda::regime_of<Configs>(p, device) != regime) continue;
    ++served;
    CAPTURE(static_cast<int>(regime));
    DeviceBuffer<std::byte> workspace(cuda::workspace_bytes<Configs>(p, device));
    workspace.clear();
    std::vector<Y> got[2];
    for (auto& out : got) {
      y.poison();
      const Status status = cuda::run<Configs>(p, device, workspace.data(), workspace.size(), nullptr);
      require_ok(status);
      REQUIRE_CUDA(cudaDeviceSynchronize());
      out = y.download();
    }
    REQUIRE(y.guards_intact());
    REQUIRE(workspace.guards_intact());
    REQUIRE(std::memcmp(got[0].data(), got[1].data(), got[0].size() * sizeof(Y)) == 0);
    // On tensor cores a weight may be rounded to x's type: twice where it is a sum of several centroids. A
    // HalfPsumbook's inner products are rounded to fp16 once; those of two codebooks may nearly cancel.
    const bool gathered = regime == cuda::Regime::kGather;
    const double weight_rounding = !gathered          ? 3.0 * rounding_of<X>()
                                   : half_psumbook(p) ? (c.format.m == 1 ? 1.0 : 3.0) * rounding_of<Half>()
                                                      : 0.0;
    CHECK(worst(want, got[0], c.tokens, out_rows, y_stride, c.cols, weight_rounding) <= 1.0);
    const double rounding = !gathered          ? rounding_of<X>()
                            : half_psumbook(p) ? rounding_of<Half>()
                            : c.gated          ? 4e-6
                                               : 1e-6;
    const double most = rounding * size_of_product + rounding_of<Y>() * norm(want);
    if (out_rows * c.tokens >= 32) {
      CHECK(relative_error(want, got[0], c.tokens, out_rows, y_stride, 1.0) <= most);
    }
    for (std::int64_t t = 0; t < c.tokens; ++t) {  // what lies between the rows of y stays as it was
      for (std::int64_t i = out_rows; i < y_stride; ++i) {
        unsigned char bytes[sizeof(Y)];
        std::memcpy(bytes, &got[0][static_cast<std::size_t>(t * y_stride + i)], sizeof(Y));
        for (const unsigned char byte : bytes) REQUIRE(byte == 0xFF);
      }
    }
  }
  REQUIRE(served > 0);
  return served;
}

}  // namespace codegemm::test
