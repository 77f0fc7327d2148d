// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/quantize/kmeans_test.cpp - quality against theory, determinism, odd inputs and refusals.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <codegemm/reference.hpp>

#include <support/catch.hpp>
#include <support/random.hpp>

using namespace codegemm;
using codegemm::test::Rng;

namespace {

// Relative squared error, by the reference.
double distortion(const QuantizedMatrix& q, const std::vector<float>& w) {
  double error = 0.0;
  double size = 0.0;
  for (std::int64_t n = 0; n < q.rows(); ++n) {
    for (std::int64_t k = 0; k < q.cols(); ++k) {
      const auto weight = static_cast<double>(w[static_cast<std::size_t>(n * q.cols() + k)]);
      const double off = reference_weight(q.view(), n, k) - weight;
      error += off * off;
      size += weight * weight;
    }
  }
  return size > 0.0 ? error / size : error;
}

bool same(const QuantizedMatrix& a, const QuantizedMatrix& b) {
  return std::equal(a.codes().begin(), a.codes().end(), b.codes().begin(), b.codes().end()) &&
         std::equal(a.codebooks().begin(), a.codebooks().end(), b.codebooks().begin(), b.codebooks().end()) &&
         std::equal(a.scales().begin(), a.scales().end(), b.scales().begin(), b.scales().end());
}

std::string refusal(const std::vector<float>& w, std::int64_t rows, std::int64_t cols, Format f) {
  SerialExecutor serial;
  const auto q = quantize_kmeans(MatrixView<const float>(w.data(), rows, cols), f, {}, serial);
  REQUIRE_FALSE(q.ok());
  CHECK(q.status().code() == StatusCode::kInvalidArgument);
  return q.status().message();
}

}  // namespace

TEST_CASE("a Gaussian matrix is quantized nearly as well as rate distortion theory allows", "[codegemm]") {
  const std::uint64_t seed = test::seed_or(21);
  CAPTURE(seed);
  Rng rng(seed);
  const std::int64_t rows = 256;
  const std::int64_t cols = 512;
  std::vector<float> w = rng.normals(rows * cols);
  for (float& value : w) value *= 0.02F;
  ThreadPool pool(2);
  // No code of R bits a weight does better than D = 2^-2R (the scales' 16 / g bits give a little back). The
  // losses are those of k-means with few dimensions and of additive codebooks, measured, with a tenth to
  // spare.
  struct Case {
    const char* name;
    double most;  // D / 2^-2R
  };
  for (const Case& c :
       {Case{"m1v4g64", 1.65}, Case{"m1v4b6g64", 1.6}, Case{"m1v2g64", 2.1}, Case{"m1v8g64", 1.4},
        Case{"m2v8g64", 1.75}, Case{"m2v4g64", 2.7}, Case{"m3v4g64", 5.2}, Case{"m1v4g-1", 1.8}}) {
    const Format f = parse_format(c.name).value();
    const auto q = quantize_kmeans(MatrixView<const float>(w.data(), rows, cols), f, {}, pool);
    REQUIRE(q.ok());
    CHECK(q->validate().ok());
    const double bound = std::exp2(-2.0 * f.m * f.b / f.v);
    const double d = distortion(*q, w);
    CAPTURE(c.name, d, bound);
    CHECK(d <= c.most * bound);
    CHECK(d >= 0.5 * bound);  // better would mean that the check is wrong
  }
}

TEST_CASE("the same seed gives the same bits for any number of workers; more codebooks, less error",
          "[codegemm]") {
  const std::uint64_t seed = test::seed_or(22);
  CAPTURE(seed);
  Rng rng(seed);
  const std::int64_t rows = 65;
  const std::int64_t cols = 120;
  const std::vector<float> w = rng.normals(rows * cols);
  const MatrixView<const float> view(w.data(), rows, cols);
  KMeansOptions options;
  options.sample = 1500;
  double last = 1.0;
  for (int m = 1; m <= 4; ++m) {
    const Format f{4, m, 6, 32};
    SerialExecutor serial;
    const auto want = quantize_kmeans(view, f, options, serial);
    REQUIRE(want.ok());
    for (const int workers : {1, 2, 3}) {
      ThreadPool pool(workers);
      const auto got = quantize_kmeans(view, f, options, pool);
      REQUIRE(got.ok());
      CHECK(same(*got, *want));
    }
    options.seed = 2;
    CHECK_FALSE(same(*quantize_kmeans(view, f, options, serial), *want));
    options.seed = 1;
    const double d = distortion(*want, w);
    CHECK(d < 0.6 * last);
    last = d;
  }
}

TEST_CASE("vectors that are all in the codebook are kept exactly", "[codegemm]") {
  Rng rng(23);
  std::vector<float> w(2048);
  for (float& value : w) value = rng.below(2) == 0 ? 0.5F : -0.5F;  // 2^4 different vectors, one size
  SerialExecutor serial;
  const auto q = quantize_kmeans(MatrixView<const float>(w.data(), 32, 64), Format{4, 1, 4, 32}, {}, serial);
  REQUIRE(q.ok());
  CHECK(distortion(*q, w) < 1e-6);
}

TEST_CASE("groups of zeros, constant, tiny, large and outlying weights", "[codegemm]") {
  Rng rng(24);
  SerialExecutor serial;
  const Format f{4, 2, 6, 32};
  const auto quantize = [&](const std::vector<float>& w) {
    auto q = quantize_kmeans(MatrixView<const float>(w.data(), 16, 64), f, {}, serial);
    REQUIRE(q.ok());
    CHECK(q->validate().ok());
    return distortion(*q, w);
  };
  const std::vector<float> zeros(1024, 0.0F);
  CHECK(quantize(zeros) == 0.0);
  const std::vector<float> constant(1024, -3.25F);
  CHECK(quantize(constant) < 1e-6);
  const std::vector<float> normal = rng.normals(1024);
  const double usual = quantize(normal);
  CHECK(usual < 0.12);
  for (const float size : {1e-7F, 1e-4F, 1e3F, 1e6F}) {  // beyond fp16's range on both sides
    std::vector<float> w = normal;
    for (float& value : w) value *= size;
    CAPTURE(size);
    CHECK(quantize(w) < 1.1 * usual + 1e-6);
  }
  std::vector<float> some = normal;
  std::fill(some.begin() + 32, some.begin() + 64, 0.0F);  // row 0, group 1
  auto q = quantize_kmeans(MatrixView<const float>(some.data(), 16, 64), f, {}, serial);
  REQUIRE(q.ok());
  for (std::int64_t k = 32; k < 64; ++k) CHECK(reference_weight(q->view(), 0, k) == 0.0);
  std::vector<float> outlier = normal;
  outlier[100] = 1000.0F;
  CHECK(quantize(outlier) < 1e-2);
}

TEST_CASE("every format of the canonical layout, tails and strides", "[codegemm]") {
  Rng rng(25);
  SerialExecutor serial;
  for (const Format f :
       {Format{2, 1, 4, 10}, Format{16, 4, 8, -1}, Format{8, 2, 10, 16}, Format{4, 3, 5, 1024}}) {
    const std::vector<float> w = rng.normals(700);
    const MatrixView<const float> view(w.data(), 7, 80, 100);
    KMeansOptions options;
    double last_progress = 0.0;
    options.progress = [&](double share) {
      CHECK(share > last_progress);
      last_progress = share;
    };
    const auto q = quantize_kmeans(view, f, options, serial);
    REQUIRE(q.ok());
    CHECK(last_progress == 1.0);
    std::vector<float> dense;
    for (std::int64_t n = 0; n < 7; ++n) dense.insert(dense.end(), view.row(n), view.row(n) + 80);
    CAPTURE(format_name(f));
    CHECK(distortion(*q, dense) < 0.6);
  }
  for (const auto rows : {0, 4}) {
    const auto q =
        quantize_kmeans(MatrixView<const float>(nullptr, rows, rows == 0 ? 64 : 0), Format{}, {}, serial);
    REQUIRE(q.ok());
    CHECK(q->rows() == rows);
  }
}

TEST_CASE("what cannot be quantized is refused with its place", "[codegemm]") {
  std::vector<float> w(128, 1.0F);
  w[3 * 16 + 5] = std::numeric_limits<float>::quiet_NaN();
  CHECK(refusal(w, 8, 16, Format{4, 1, 8, 16}) == "quantize_kmeans: weight at row 3, column 5 is nan");
  w[3 * 16 + 5] = -std::numeric_limits<float>::infinity();
  CHECK(refusal(w, 8, 16, Format{4, 1, 8, 16}) == "quantize_kmeans: weight at row 3, column 5 is -inf");
  w[3 * 16 + 5] = 1e30F;
  CHECK(refusal(w, 8, 16, Format{4, 1, 8, 16}) ==
        "quantize_kmeans: row 3, group 0 has a root mean square of 2.5e+29, too large for fp16 scales and "
        "codebooks");
  CHECK(refusal(w, 8, 15, Format{4, 1, 8, 16}) == "quantized matrix: K = 15 is not a multiple of v = 4");
  CHECK(refusal(w, 8, 16, Format{4, 5, 8, 16}) == "format: m = 5 is not in 1..4");
  SerialExecutor serial;
  const MatrixView<const float> narrow(w.data(), 8, 16, 12);
  CHECK(quantize_kmeans(narrow, Format{}, {}, serial).status().message() ==
        "quantize_kmeans: weights have stride 12, below their 16 columns");
  CHECK(quantize_kmeans(MatrixView<const float>(nullptr, 8, 16), Format{}, {}, serial).status().code() ==
        StatusCode::kNullPointer);
  KMeansOptions options;
  options.sample = 0;
  CHECK(
      quantize_kmeans(MatrixView<const float>(w.data(), 8, 16), Format{}, options, serial).status().code() ==
      StatusCode::kInvalidArgument);
}

TEST_CASE("the search finds the nearest centroid, the first of equals", "[codegemm]") {
  const std::uint64_t seed = test::seed_or(26);
  CAPTURE(seed);
  Rng rng(seed);
  for (const int v : {2, 4, 8, 16}) {
    detail::SearchBook book(v, 64);
    for (float& value : book.values) value = rng.normal();
    std::copy_n(book.centroid(3), v, book.values.data() + std::ptrdiff_t{40} * v);  // a double
    book.refresh();
    const std::int64_t count = 101;
    std::vector<float> x = rng.normals(count * v);
    std::copy_n(book.centroid(40), v, x.data());
    std::vector<std::uint16_t> codes(static_cast<std::size_t>(count), 0xFFFF);
    detail::find_nearest(book, x.data(), count, codes.data());
    CHECK(codes[0] == 3);
    for (std::int64_t n = 0; n < count; ++n) {
      std::vector<double> distances;
      for (std::int64_t i = 0; i < 64; ++i) {
        double d2 = 0.0;
        for (std::int64_t d = 0; d < v; ++d) {
          const double off = static_cast<double>(x[static_cast<std::size_t>(n * v + d)]) -
                             static_cast<double>(book.centroid(i)[d]);
          d2 += off * off;
        }
        distances.push_back(d2);
      }
      const double least = *std::min_element(distances.begin(), distances.end());
      const std::uint16_t code = codes[static_cast<std::size_t>(n)];
      REQUIRE(code < 64);
      CHECK(distances[code] <= least + 1e-5);  // rounding may prefer another that is as near
    }
  }
  detail::SearchBook book(4, 16);
  for (float& value : book.values) value = rng.normal();
  book.refresh();
  const std::vector<float> x = rng.normals(132);
  std::vector<std::uint16_t> one(33);
  std::vector<std::uint16_t> other(33);
  detail::find_nearest(book, x.data(), 33, one.data());
  detail::nearest_portable<4>(book, x.data(), 33, other.data());
  CHECK(one == other);
}
