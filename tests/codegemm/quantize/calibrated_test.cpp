// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/quantize/calibrated_test.cpp - each step of the calibrated quantizer against its own
// optimum, then the whole against k-means.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Dense>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/quantize/calibrated.hpp>
#include <codegemm/reference.hpp>

#include <support/calibration.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using namespace codegemm;
using namespace codegemm::test;
using detail::AdditiveState;
using detail::DenseMatrix;
using MatrixXd = Eigen::MatrixXd;
using VectorXd = Eigen::VectorXd;

namespace {

/// ||X (W - W^)^T||^2 / ||X W^T||^2, by the reference and in double.
double output_error(const QuantizedMatrix& q, const DenseMatrix& w, const DenseMatrix& x) {
  MatrixXd off = w.cast<double>();
  for (std::int64_t n = 0; n < q.rows(); ++n) {
    for (std::int64_t k = 0; k < q.cols(); ++k) off(n, k) -= reference_weight(q.view(), n, k);
  }
  const MatrixXd inputs = x.cast<double>();
  return (inputs * off.transpose()).squaredNorm() / (inputs * w.cast<double>().transpose()).squaredNorm();
}

bool same(const QuantizedMatrix& a, const QuantizedMatrix& b) {
  return std::equal(a.codes().begin(), a.codes().end(), b.codes().begin(), b.codes().end()) &&
         std::equal(a.codebooks().begin(), a.codebooks().end(), b.codebooks().begin(), b.codebooks().end()) &&
         std::equal(a.scales().begin(), a.scales().end(), b.scales().begin(), b.scales().end());
}

double loss(const AdditiveState& s) {
  SerialExecutor serial;
  return detail::weighted_error(s, true, serial);
}

MatrixXd gram_double(const AdditiveState& s) { return s.gram.cast<double>(); }

DenseMatrix factor_of(const AdditiveState& s) { return Eigen::LLT<DenseMatrix>(s.gram).matrixL(); }

}  // namespace

TEST_CASE("GramMatrix sums X^T X, whatever the workers", "[gram]") {
  const std::uint64_t seed = test::seed_or(51);
  CAPTURE(seed);
  Rng rng(seed);
  for (const std::int64_t cols : {1, 5, 96, 97, 250}) {
    CAPTURE(cols);
    const DenseMatrix a = random_dense(rng, 37, cols);
    const DenseMatrix b = random_dense(rng, 1, cols);
    std::vector<float> first;
    for (const int workers : {1, 2, 3}) {
      ThreadPool pool(workers);
      GramMatrix gram = GramMatrix::create(cols).value();
      REQUIRE(gram.add(view(a), pool).ok());
      REQUIRE(gram.add(view(b), pool).ok());
      REQUIRE(gram.add(MatrixView<const float>(nullptr, 0, cols), pool).ok());
      CHECK(gram.tokens() == 38);
      const std::vector<float> h = gram.matrix();
      if (first.empty()) first = h;
      CHECK(h == first);
    }
    MatrixXd all(38, cols);
    all << a.cast<double>(), b.cast<double>();
    const MatrixXd want = all.transpose() * all / 38.0;
    const MatrixXd got = Eigen::Map<const DenseMatrix>(first.data(), cols, cols).cast<double>();
    CHECK((got - want).cwiseAbs().maxCoeff() <= 1e-5);
  }
  SerialExecutor serial;
  GramMatrix gram = GramMatrix::create(4).value();
  CHECK(gram.matrix() == std::vector<float>(16, 0.0F));
  const DenseMatrix wide = random_dense(rng, 2, 5);
  CHECK(gram.add(view(wide), serial).code() == StatusCode::kShapeMismatch);
  CHECK(gram.add(MatrixView<const float>(wide.data(), 2, 4, 3), serial).message() ==
        "GramMatrix of 4 inputs: x is 2 x 4 of stride 3");
  CHECK(gram.add(MatrixView<const float>(nullptr, 2, 4), serial).code() == StatusCode::kNullPointer);
  CHECK(gram.tokens() == 0);
  auto cross = codegemm::CrossGramMatrix::create(4).value();
  const MatrixView<const float> part(wide.data(), 2, 4, 5);
  CHECK(cross.add(part, part.rows_from(0, 1), serial).message() ==
        "CrossGramMatrix: y has 2 tokens, x has 1");
  CHECK(cross.add(part, MatrixView<const float>(nullptr, 2, 4), serial).code() == StatusCode::kNullPointer);
  REQUIRE(cross.add(part, part, serial).ok());
  REQUIRE(gram.add(part, serial).ok());
  const std::vector<float> c = cross.matrix();
  const std::vector<float> h = gram.matrix();
  for (std::size_t i = 0; i < h.size(); ++i) CHECK(std::abs(c[i] - h[i]) <= 1e-6F);
  CHECK(std::move(gram).matrix() == h);
  CHECK(std::move(cross).matrix() == c);
  CHECK(GramMatrix::create(0).status().code() == StatusCode::kInvalidArgument);
}

TEST_CASE("fitted codebooks are those of the normal equations", "[calibrated]") {
  const std::uint64_t seed = test::seed_or(52);
  CAPTURE(seed);
  Rng rng(seed);
  for (const Format f : {Format{4, 1, 4, 8}, Format{2, 2, 4, -1}, Format{8, 3, 4, 16}}) {
    CAPTURE(format_name(f));
    const DenseMatrix w = random_dense(rng, 150, 32);
    AdditiveState s = random_state(rng, f, w, correlated_inputs(rng, 300, 32));
    // The rows of the map from centroid values to a row of weights, stacked: vec(W^) = D p.
    const std::int64_t size = f.m * f.centroids() * f.v;
    MatrixXd normal = MatrixXd::Zero(size, size);
    VectorXd right = VectorXd::Zero(size);
    const MatrixXd h = gram_double(s);
    for (std::int64_t n = 0; n < s.rows; ++n) {
      MatrixXd d = MatrixXd::Zero(s.cols, size);
      for (std::int64_t k = 0; k < s.cols; ++k) {
        for (std::int64_t c = 0; c < f.m; ++c) {
          const std::int64_t code = s.codes_of(n)[c * s.vectors() + k / f.v];
          d(k, (c * f.centroids() + code) * f.v + k % f.v) +=
              static_cast<double>(s.scales_of(n)[k / s.group_length()]);
        }
      }
      normal += d.transpose() * h * d;
      right += d.transpose() * h * w.row(n).transpose().cast<double>();
    }
    const VectorXd best = normal.completeOrthogonalDecomposition().solve(right);
    const double total = [&] {
      double sum = 0.0;
      for (std::int64_t n = 0; n < s.rows; ++n) {
        const VectorXd row = w.row(n).transpose().cast<double>();
        sum += row.dot(h * row);
      }
      return sum;
    }();
    const double optimum = total - best.dot(right);
    const double before = loss(s);
    SerialExecutor serial;
    detail::CodebookFit(s, serial).run(200);
    const double after = loss(s);
    CAPTURE(before, after, optimum);
    CHECK(after < 0.99 * before);
    CHECK(after >= optimum * (1.0 - 1e-4));
    CHECK(after <= optimum * (1.0 + 1e-3));  // fp16 rounding
  }
}

TEST_CASE("fitted scales are the least-squares ones; a pass over groups never makes it worse",
          "[calibrated]") {
  const std::uint64_t seed = test::seed_or(53);
  CAPTURE(seed);
  Rng rng(seed);
  const DenseMatrix w = random_dense(rng, 70, 48);
  const DenseMatrix x = correlated_inputs(rng, 200, 48);
  SerialExecutor serial;
  AdditiveState row = random_state(rng, Format{4, 2, 4, -1}, w, x);
  detail::fit_scales(row, serial);
  const std::vector<float> values = detail::book_values(row);
  for (std::int64_t n = 0; n < row.rows; ++n) {
    Eigen::VectorXf u(48);
    detail::decode_row(row, n, values.data(), u.data());
    const VectorXd hu = gram_double(row) * u.cast<double>();
    const double want = hu.dot(w.row(n).transpose().cast<double>()) / hu.dot(u.cast<double>());
    CHECK(std::abs(static_cast<double>(row.scales_of(n)[0]) - want) <= 2e-3 * std::abs(want) + 1e-3);
  }
  AdditiveState grouped = random_state(rng, Format{4, 1, 4, 20}, w, x);  // the last group is shorter
  double last = loss(grouped);
  for (int pass = 0; pass < 30; ++pass) {
    detail::fit_scales(grouped, serial);
    CHECK(loss(grouped) <= last * (1.0 + 1e-5));
    last = loss(grouped);
  }
  // At the joint optimum no single scale can gain.
  grouped.scales_of(3)[1] += 0.02F;
  CHECK(loss(grouped) > last);
}

TEST_CASE("a beam as wide as a codebook finds the best of all codes", "[calibrated]") {
  const std::uint64_t seed = test::seed_or(54);
  CAPTURE(seed);
  Rng rng(seed);
  SerialExecutor serial;
  const DenseMatrix w = random_dense(rng, 40, 8);
  const DenseMatrix x = correlated_inputs(rng, 100, 8);
  AdditiveState s = random_state(rng, Format{4, 1, 4, -1}, w, x);
  const MatrixXd h = gram_double(s);
  detail::search_codes(s, factor_of(s), detail::SearchMode::kRebuild, 16, serial);
  for (std::int64_t n = 0; n < s.rows; ++n) {
    const auto row_loss = [&](std::int64_t a, std::int64_t b) {
      VectorXd e(8);
      for (int d = 0; d < 4; ++d) {
        const auto scale = static_cast<double>(s.scales_of(n)[0]);
        e(d) = static_cast<double>(w(n, d)) - scale * static_cast<double>(s.books[0].centroid(a)[d]);
        e(4 + d) = static_cast<double>(w(n, 4 + d)) - scale * static_cast<double>(s.books[0].centroid(b)[d]);
      }
      return e.dot(h * e);
    };
    double least = std::numeric_limits<double>::infinity();
    for (std::int64_t a = 0; a < 16; ++a) {
      for (std::int64_t b = 0; b < 16; ++b) least = std::min(least, row_loss(a, b));
    }
    const double got = row_loss(s.codes_of(n)[0], s.codes_of(n)[1]);
    CHECK(got <= least * (1.0 + 1e-4) + 1e-9);
  }
}

TEST_CASE("a search never raises the loss of a row, and a wider beam lowers it more", "[calibrated]") {
  const std::uint64_t seed = test::seed_or(55);
  CAPTURE(seed);
  Rng rng(seed);
  SerialExecutor serial;
  // More than one block of 128 columns, with a rest; more than one tile of rows.
  const DenseMatrix w = random_dense(rng, 45, 272);
  const DenseMatrix x = correlated_inputs(rng, 600, 272);
  for (const Format f :
       {Format{2, 2, 4, 34}, Format{4, 1, 6, 68}, Format{8, 2, 5, -1}, Format{16, 4, 4, 64}}) {
    CAPTURE(format_name(f));
    const AdditiveState start = random_state(rng, f, w, x);
    const DenseMatrix factor = factor_of(start);
    double rebuilt[3] = {};
    double refined[3] = {};
    const int beams[3] = {1, 4, 12};
    for (int i = 0; i < 3; ++i) {
      AdditiveState s = start;
      detail::search_codes(s, factor, detail::SearchMode::kRefine, beams[i], serial);
      refined[i] = loss(s);
      s = start;
      detail::search_codes(s, factor, detail::SearchMode::kRebuild, beams[i], serial);
      rebuilt[i] = loss(s);
      detail::search_codes(s, factor, detail::SearchMode::kRefine, beams[i], serial);
      CHECK(loss(s) <= rebuilt[i] * (1.0 + 1e-4));
      // Each row for itself.
      AdditiveState again = s;
      detail::search_codes(again, factor, detail::SearchMode::kRebuild, 1, serial);
      for (std::int64_t n = 0; n < s.rows; ++n) {
        const auto row_loss = [&](const AdditiveState& state) {
          DenseMatrix e(1, state.cols);
          detail::residual_rows(state, detail::book_values(state), n, 1, e.data());
          return (e.cast<double>() * gram_double(state) * e.cast<double>().transpose()).value();
        };
        CHECK(row_loss(again) <= row_loss(s) * (1.0 + 1e-4));
      }
    }
    CAPTURE(loss(start), refined[0], refined[1], refined[2], rebuilt[0], rebuilt[1], rebuilt[2]);
    CHECK(refined[0] < 0.7 * loss(start));
    CHECK(refined[1] < refined[0]);
    CHECK(refined[2] < refined[1]);
    CHECK(rebuilt[0] < refined[0]);
    CHECK(rebuilt[1] < rebuilt[0]);
    CHECK(rebuilt[2] < rebuilt[1]);
  }
}

TEST_CASE("on correlated inputs every format is far better than by k-means, also on new inputs",
          "[calibrated]") {
  const std::uint64_t seed = test::seed_or(56);
  CAPTURE(seed);
  Rng rng(seed);
  const std::int64_t rows = 96;
  const std::int64_t cols = 192;
  const DenseMatrix w = random_dense(rng, rows, cols) * 0.03F;
  const DenseMatrix x = correlated_inputs(rng, 2000, cols);
  const std::vector<float> gram = gram_of(x.topRows(1500));
  const DenseMatrix held_out = x.bottomRows(500);
  ThreadPool pool(2);
  CalibratedOptions options;
  options.beam = 2;
  options.rounds = 3;
  options.damping = 0.01;  // the report's errors are those of the damped H
  options.kmeans.sample = 8192;
  for (const char* name : {"m1v4g64", "m2v8g64", "m1v4b6g-1", "m1v2b4g32", "m2v4b6g32", "m3v8b5g-1",
                           "m4v16b6g64", "m1v8b10g64"}) {
    CAPTURE(name);
    const Format f = parse_format(name).value();
    CalibratedReport report;
    const auto q = quantize_calibrated(view(w), {gram.data(), cols, cols}, f, options, pool, &report);
    CAPTURE(q.status().message());
    REQUIRE(q.ok());
    CHECK(q->validate().ok());
    const double plain = output_error(quantize_kmeans(view(w), f, options.kmeans, pool).value(), w, held_out);
    const double ours = output_error(*q, w, held_out);
    CAPTURE(plain, ours, report.error, report.kmeans_error, report.rounds);
    CHECK(ours < 0.5 * plain);
    CHECK(report.error < 0.5 * report.kmeans_error);
    CHECK(report.rounds >= 1);
    CHECK(std::abs(ours - report.error) < 0.35 * report.error);
  }
}

TEST_CASE("the same bits for any number of workers, other bits for another seed", "[calibrated]") {
  const std::uint64_t seed = test::seed_or(57);
  CAPTURE(seed);
  Rng rng(seed);
  const DenseMatrix w = random_dense(rng, 131, 140);
  const std::vector<float> gram = gram_of(correlated_inputs(rng, 500, 140));
  CalibratedOptions options;
  options.rounds = 2;
  options.beam = 3;
  options.kmeans.sample = 2000;
  const Format f{4, 2, 5, 28};
  SerialExecutor serial;
  std::vector<double> shares;
  options.progress = [&](double share, double error) {
    CHECK((shares.empty() || share > shares.back() || share == 1.0));
    CHECK(error > 0.0);
    shares.push_back(share);
  };
  const auto want = quantize_calibrated(view(w), {gram.data(), 140, 140}, f, options, serial);
  REQUIRE(want.ok());
  CHECK(shares.back() == 1.0);
  options.progress = nullptr;
  for (const int workers : {2, 3, 5}) {
    ThreadPool pool(workers);
    CHECK(same(*quantize_calibrated(view(w), {gram.data(), 140, 140}, f, options, pool), *want));
  }
  options.kmeans.seed = 2;
  CHECK_FALSE(same(*quantize_calibrated(view(w), {gram.data(), 140, 140}, f, options, serial), *want));
}

TEST_CASE("odd layers: few tokens, dead inputs, zero rows, one row, no data at all", "[calibrated]") {
  Rng rng(58);
  SerialExecutor serial;
  CalibratedOptions options;
  options.rounds = 2;
  DenseMatrix w = random_dense(rng, 40, 96);
  w.row(7).setZero();
  w.block(8, 32, 1, 32).setZero();
  DenseMatrix x = correlated_inputs(rng, 10, 96);  // rank 10 of 96
  x.middleCols(16, 8).setZero();
  x.col(40) = x.col(41);
  const std::vector<float> gram = gram_of(x);
  const Format f{4, 1, 6, 32};
  const auto q = quantize_calibrated(view(w), {gram.data(), 96, 96}, f, options, serial);
  REQUIRE(q.ok());
  for (std::int64_t k = 0; k < 96; ++k) {
    CHECK(reference_weight(q->view(), 7, k) == 0.0);
    for (std::int64_t n = 0; n < 40; ++n) CHECK(std::abs(reference_weight(q->view(), n, k)) < 20.0);
  }
  CHECK(output_error(*q, w, x) < 0.5 * output_error(quantize_kmeans(view(w), f, {}, serial).value(), w, x));

  const std::vector<float> none(std::size_t{96} * 96, 0.0F);
  CalibratedReport report;
  REQUIRE(quantize_calibrated(view(w), {none.data(), 96, 96}, f, options, serial, &report).ok());
  CHECK(report.error < report.kmeans_error);
  options.damping = 0.0;  // a singular H: no factor
  REQUIRE(quantize_calibrated(view(w), {gram.data(), 96, 96}, f, options, serial, &report).ok());
  CHECK(report.error < 0.5 * report.kmeans_error);

  const DenseMatrix one = random_dense(rng, 1, 96);
  CHECK(quantize_calibrated(view(one), {gram.data(), 96, 96}, f, options, serial).ok());
  const DenseMatrix zero = DenseMatrix::Zero(3, 96);
  const auto nothing = quantize_calibrated(view(zero), {gram.data(), 96, 96}, f, options, serial, &report);
  REQUIRE(nothing.ok());
  CHECK(report.error == 0.0);
  CHECK(quantize_calibrated({nullptr, 0, 96}, {gram.data(), 96, 96}, f, options, serial).ok());
  CHECK(quantize_calibrated({nullptr, 5, 0}, {nullptr, 0, 0}, f, options, serial).ok());
}

TEST_CASE("what cannot be calibrated is refused with its place", "[calibrated]") {
  Rng rng(59);
  SerialExecutor serial;
  DenseMatrix w = random_dense(rng, 4, 16);
  std::vector<float> gram(256, 0.5F);
  const Format f{4, 1, 4, 16};
  const auto refusal = [&](MatrixView<const float> h, const CalibratedOptions& options = {}) {
    const Status status = quantize_calibrated(view(w), h, f, options, serial).status();
    CHECK_FALSE(status.ok());
    return status.message();
  };
  CHECK(refusal({gram.data(), 15, 16}) ==
        "quantize_calibrated: H is 15 x 16 of stride 16, the weights have 16 columns");
  CHECK(refusal({nullptr, 16, 16}) == "quantize_calibrated: H is null");
  gram[3 * 16 + 5] = std::numeric_limits<float>::infinity();
  CHECK(refusal({gram.data(), 16, 16}) == "quantize_calibrated: H at row 3, column 5 is inf");
  gram[3 * 16 + 5] = 0.5F;
  gram[17] = -1.0F;
  CHECK(refusal({gram.data(), 16, 16}) == "quantize_calibrated: H at row 1, column 1 is -1");
  gram[17] = 1.0F;
  CalibratedOptions options;
  options.beam = 17;
  CHECK(refusal({gram.data(), 16, 16}, options).find("beam = 17 in 1..16") != std::string::npos);
  options = {};
  options.damping = std::numeric_limits<double>::quiet_NaN();
  CHECK(refusal({gram.data(), 16, 16}, options).find("damping = nan") != std::string::npos);
  w(2, 3) = std::numeric_limits<float>::quiet_NaN();
  CHECK(refusal({gram.data(), 16, 16}) == "quantize_kmeans: weight at row 2, column 3 is nan");
}

TEST_CASE("a task that runs out of memory is heard on the calling thread", "[calibrated]") {
  for (const int workers : {1, 3}) {
    ThreadPool pool(workers);
    std::atomic<int> ran{0};
    const auto body = [&](std::int64_t task, int) {
      ++ran;
      if (task == 5) throw std::bad_alloc();
    };
    CHECK_THROWS_AS(detail::guarded_for(pool, 1000, body), std::bad_alloc);
    if (workers == 1) CHECK(ran == 6);  // the rest is left out
    CHECK_NOTHROW(detail::guarded_for(pool, 5, body));
  }
}
