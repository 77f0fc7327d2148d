// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/dense_test.cpp - the product with fp32 weights against loops in double, at every edge.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/dense.hpp>

#include <support/catch.hpp>
#include <support/random.hpp>

using namespace codegemm;
using codegemm::test::Rng;

namespace {

constexpr std::byte kGuard{0xA5};

// Weights, x and y have strides of their own; y and the workspace are poisoned.
std::vector<float> multiply(const std::vector<float>& w, std::int64_t rows, std::int64_t cols,
                            const std::vector<float>& x, std::int64_t tokens, Executor& executor, Isa isa) {
  const std::int64_t stride = rows + 5;
  std::vector<float> y(static_cast<std::size_t>(tokens * stride), std::numeric_limits<float>::quiet_NaN());
  const std::size_t bytes = dense_workspace_bytes(rows, cols, tokens, executor.workers());
  AlignedBuffer<std::byte> workspace;
  REQUIRE(workspace.reserve(bytes + 64));
  std::memset(workspace.data(), 0xFF, bytes);
  std::memset(workspace.data() + bytes, static_cast<int>(kGuard), 64);
  const Status status = detail::dense_gemm_with(
      {w.data(), rows, cols, cols + 3}, {x.data(), tokens, cols, cols + 1}, {y.data(), tokens, rows, stride},
      std::span<std::byte>(workspace.data(), bytes), executor, isa);
  INFO(status.message());
  REQUIRE(status.ok());
  for (std::size_t i = 0; i < 64; ++i) REQUIRE(workspace[bytes + i] == kGuard);
  std::vector<float> out;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t n = 0; n < stride; ++n) {
      const float value = y[static_cast<std::size_t>(t * stride + n)];
      if (n < rows) {
        out.push_back(value);
      } else {
        REQUIRE(std::isnan(value));
      }
    }
  }
  return out;
}

}  // namespace

TEST_CASE("dense_gemm agrees with loops in double at edge shapes", "[codegemm]") {
  const std::uint64_t seed = test::seed_or(41);
  CAPTURE(seed);
  Rng rng(seed);
  for (const std::int64_t rows : {1, 15, 16, 17, 48, 49, 101}) {
    for (const std::int64_t cols : {1, 3, 4, 255, 256, 257, 515}) {
      for (const std::int64_t tokens : {1, 5, 6, 7, 241}) {
        if (tokens > 7 && rows * cols > 5000) continue;
        const std::vector<float> w = rng.normals(rows * (cols + 3));
        const std::vector<float> x = rng.normals(tokens * (cols + 1));
        for (const Isa isa : {Isa::kPortable, detect_isa()}) {
          CAPTURE(rows, cols, tokens, isa_name(isa));
          SerialExecutor serial;
          const std::vector<float> y = multiply(w, rows, cols, x, tokens, serial, isa);
          std::size_t bad = 0;
          for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t n = 0; n < rows; ++n) {
              double want = 0.0;
              double size = 0.0;
              for (std::int64_t k = 0; k < cols; ++k) {
                const double term = static_cast<double>(w[static_cast<std::size_t>(n * (cols + 3) + k)]) *
                                    static_cast<double>(x[static_cast<std::size_t>(t * (cols + 1) + k)]);
                want += term;
                size += std::fabs(term);
              }
              const double off = static_cast<double>(y[static_cast<std::size_t>(t * rows + n)]) - want;
              if (!(std::fabs(off) <= static_cast<double>(cols + 2) * 0x1p-24 * size)) ++bad;
            }
          }
          CHECK(bad == 0);
          ThreadPool pool(3);
          const std::vector<float> again = multiply(w, rows, cols, x, tokens, pool, isa);
          CHECK(std::memcmp(again.data(), y.data(), y.size() * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("dense_gemm refuses wrong calls and leaves y alone", "[codegemm]") {
  SerialExecutor serial;
  const std::vector<float> w(32, 1.0F);
  const std::vector<float> x(16, 1.0F);
  std::vector<float> y(8, 7.0F);
  AlignedBuffer<std::byte> workspace;
  const std::size_t bytes = dense_workspace_bytes(4, 8, 2, 1);
  REQUIRE(workspace.reserve(bytes + 64));
  const auto code = [&](MatrixView<const float> wv, MatrixView<const float> xv, MatrixView<float> yv,
                        std::span<std::byte> space) {
    const Status status = dense_gemm(wv, xv, yv, space, serial);
    for (const float value : y) CHECK(value == 7.0F);
    return status.code();
  };
  const MatrixView<const float> wv(w.data(), 4, 8);
  const MatrixView<const float> xv(x.data(), 2, 8);
  const MatrixView<float> yv(y.data(), 2, 4);
  const std::span<std::byte> space = workspace.span();
  CHECK(code(wv, {x.data(), 2, 7}, yv, space) == StatusCode::kShapeMismatch);
  CHECK(code(wv, xv, {y.data(), 2, 3}, space) == StatusCode::kShapeMismatch);
  CHECK(code(wv, {nullptr, 2, 8}, yv, space) == StatusCode::kNullPointer);
  CHECK(code(wv, xv, yv, space.first(bytes - 1)) == StatusCode::kWorkspaceTooSmall);
  CHECK(code(wv, xv, yv, space.subspan(4)) == StatusCode::kMisaligned);
  CHECK(dense_gemm(wv, {nullptr, 0, 8}, {nullptr, 0, 4}, {}, serial).ok());
  // K = 0: every sum is empty.
  CHECK(dense_gemm({nullptr, 4, 0}, {nullptr, 2, 0}, yv, {}, serial).ok());
  for (const float value : y) CHECK(value == 0.0F);
}
