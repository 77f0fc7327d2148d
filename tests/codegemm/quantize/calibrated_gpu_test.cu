// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/quantize/calibrated_gpu_test.cu - the calibrated quantizer on the GPU against the host's:
// each step from the same state, then whole layers.

// What nvcc's front end remarks on in Eigen.
#pragma nv_diag_suppress 20012, 1675

#include <codegemm/quantize/cuda/calibrated.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include <Eigen/Cholesky>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/quantize/corrected.hpp>
#include <codegemm/quantize/cuda/corrected.cuh>
#include <support/calibration.hpp>

#include "../cuda/gpu.cuh"

namespace codegemm::test {
namespace {

using cuda::Device;
using cuda::DeviceQuantizer;
using cuda::detail::DeviceSteps;
using detail::HostSteps;
using detail::SearchMode;

struct Case {
  const char* format;
  std::int64_t rows, cols;
};
// One or several stretches of columns, groups that end short, each vector length; the smallest first.
constexpr Case kCases[] = {{"m3v4b5g32", 9, 128},  {"m1v4g128", 37, 300}, {"m2v8g-1", 70, 272},
                           {"m2v2b4g64", 33, 130}, {"m1v16b8g16", 5, 48}, {"m1v8b10g-1", 41, 1024}};

struct Problem {
  DenseMatrix w, x;
  AdditiveState state;

  Problem(const Case& c, std::uint64_t seed) {
    Rng rng(seed);
    w = random_dense(rng, c.rows, c.cols);
    x = correlated_inputs(rng, 2 * c.cols, c.cols);
    state = random_state(rng, parse_format(c.format).value(), w, x);
  }
  /// A copy whose weights are here.
  [[nodiscard]] AdditiveState copy() const { return state; }
};

double worst_of(const std::vector<float>& got, const std::vector<float>& want) {
  REQUIRE(got.size() == want.size());
  double off = 0.0;
  double size = 1e-30;
  for (std::size_t i = 0; i < got.size(); ++i) {
    off = std::max(off, std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i])));
    if (!std::isfinite(got[i])) off = HUGE_VAL;
    size = std::max(size, std::abs(static_cast<double>(want[i])));
  }
  return off / size;
}

double loss_of(const AdditiveState& s) {
  SerialExecutor serial;
  return detail::weighted_error(s, true, serial);
}

void check_steps(std::span<const Case> cases) {
  const Device device = gpu_or_skip();
  ThreadPool pool(2);
  auto made = DeviceSteps::create(device, nullptr);
  require_ok(made.status());
  DeviceSteps& gpu = *made;
  HostSteps host(pool);
  for (const Case& c : cases) {
    CAPTURE(c.format, c.rows, c.cols);
    const Problem problem(c, 61);
    AdditiveState here = problem.copy();
    AdditiveState there = problem.copy();
    require_ok(host.begin(here));
    require_ok(gpu.begin(there));
    REQUIRE(host.factor().value());
    REQUIRE(gpu.factor().value());
    for (const bool residual : {false, true}) {
      const double want = host.error(residual).value();
      CHECK(std::abs(gpu.error(residual).value() - want) <= 1e-4 * want);
    }

    // Fits. Codebooks first: the sums that they are made of, then the result.
    detail::HostCodebookSums sums(here, pool);
    const std::vector<float> values = book_values(here);
    require_ok(gpu.fit_codebooks(0));  // lists the uses
    const double blocks = worst_of(gpu.blocks(), sums.blocks());
    const double plain = worst_of(gpu.normal_map(values, false), sums.normal_map(values, false));
    const double left = worst_of(gpu.normal_map(values, true), sums.normal_map(values, true));
    CHECK(blocks <= 1e-5);
    CHECK(plain <= 1e-4);
    CHECK(left <= 1e-4);
    require_ok(host.fit_codebooks(8));
    require_ok(gpu.fit_codebooks(8));
    const double fitted = host.error(true).value();
    CHECK(std::abs(gpu.error(true).value() - fitted) <= 2e-3 * fitted);
    require_ok(host.fit_scales());
    require_ok(gpu.fit_scales());
    const double scaled = host.error(true).value();
    CHECK(std::abs(gpu.error(true).value() - scaled) <= 2e-3 * scaled);
    std::printf("%-11s %3ld x %4ld: blocks off by %.2g, maps by %.2g and %.2g; fitted %.6g (GPU %.6g)\n",
                c.format, static_cast<long>(c.rows), static_cast<long>(c.cols), blocks, plain, left, scaled,
                gpu.error(true).value());

    // Searches from the same codebooks and scales. Codes of a group whose scale is 0 stay.
    if (here.groups() > 1) here.scales_of(1)[0] = 0.0F;
    for (const SearchMode mode : {SearchMode::kRefine, SearchMode::kRebuild}) {
      for (const int beam : {1, 3, 8}) {
        CAPTURE(static_cast<int>(mode), beam);
        AdditiveState a = here;
        AdditiveState b = here;
        require_ok(host.begin(a));
        require_ok(gpu.begin(b));
        require_ok(host.search(mode, beam));
        require_ok(gpu.search(mode, beam));
        require_ok(gpu.end());
        const double before = loss_of(here);
        const double want = loss_of(a);
        const double got = loss_of(b);
        std::size_t different = 0;
        for (std::size_t i = 0; i < a.codes.size(); ++i) different += a.codes[i] == b.codes[i] ? 0 : 1;
        const double share = static_cast<double>(different) / static_cast<double>(a.codes.size());
        std::printf("  %s, beam %d: %.6g to %.6g (GPU %.6g), %.2f%% of the codes differ\n",
                    mode == SearchMode::kRefine ? "refine" : "rebuild", beam, before, want, got,
                    100.0 * share);
        CHECK(got <= before * (1.0 + 1e-6));
        CHECK(std::abs(got - want) <= 0.01 * want);
        CHECK(*std::max_element(b.codes.begin(), b.codes.end()) < here.format.centroids());
        for (std::int64_t j = 0; here.groups() > 1 && j < here.group_length() / here.format.v; ++j)
          CHECK(b.codes_of(1)[j] == here.codes_of(1)[j]);
        AdditiveState again = here;
        require_ok(gpu.begin(again));
        require_ok(gpu.search(mode, beam));
        require_ok(gpu.end());
        CHECK(again.codes == b.codes);
      }
    }
  }
}

void check_kmeans(std::span<const Case> layers) {
  const Device device = gpu_or_skip();
  ThreadPool pool(2);
  auto made = DeviceSteps::create(device, nullptr);
  require_ok(made.status());
  for (const Case& c : layers) {
    Rng rng(83);
    DenseMatrix w = random_dense(rng, c.rows, c.cols);
    w.row(1).setZero();  // a scale of 0
    const DenseMatrix x = correlated_inputs(rng, 2 * c.cols, c.cols);
    AdditiveState here = random_state(rng, parse_format(c.format).value(), w, x);
    here.books.clear();
    here.codes.clear();
    here.scales.clear();
    AdditiveState there = here;
    const std::vector<float> importance = detail::vector_importance(here.gram, here.format.v);
    for (const int refits : {1, 3}) {
      CAPTURE(c.format, c.rows, c.cols, refits);
      KMeansOptions options;
      options.sample = 4096;  // of more vectors, in some of the layers
      options.refits = refits;
      HostSteps host(pool);
      require_ok(host.begin(here));
      require_ok(host.start(options, importance, pool));
      require_ok(made->begin(there));
      require_ok(made->start(options, importance, pool));
      require_ok(made->end());
      REQUIRE(there.books.size() == here.books.size());
      const double books = worst_of(book_values(there), book_values(here));
      const double scales = worst_of(there.scales, here.scales);
      REQUIRE(there.codes.size() == here.codes.size());
      std::size_t different = 0;
      for (std::size_t i = 0; i < here.codes.size(); ++i)
        different += here.codes[i] == there.codes[i] ? 0 : 1;
      const double share = static_cast<double>(different) / static_cast<double>(here.codes.size());
      const double want = loss_of(here);
      const double got = loss_of(there);
      std::printf(
          "k-means %-11s %3ld x %4ld, %d refits: books off by %.2g, scales by %.2g, %.3f%% of the codes, "
          "error %.6g (GPU %.6g)\n",
          c.format, static_cast<long>(c.rows), static_cast<long>(c.cols), refits, books, scales,
          100.0 * share, want, got);
      CHECK(share <= 0.01);
      CHECK(std::abs(got - want) <= 0.002 * want);
      AdditiveState again = here;
      require_ok(made->begin(again));
      require_ok(made->start(options, importance, pool));
      require_ok(made->end());
      CHECK(again.codes == there.codes);
      CHECK(again.scales == there.scales);
      CHECK(book_values(again) == book_values(there));
      there.codes.clear();
    }
  }
}

void check_factors(std::initializer_list<std::int64_t> sizes) {
  const Device device = gpu_or_skip();
  ThreadPool pool(2);
  auto work = cuda::detail::DeviceWork::create(device, nullptr);
  require_ok(work.status());
  auto correction = cuda::DeviceCorrection::create(device, nullptr);
  require_ok(correction.status());
  cuda::DeviceArray<std::int32_t> failed;
  work->reserve(failed, 1);
  for (const std::int64_t n : sizes) {
    CAPTURE(n);
    Rng rng(97);
    const DenseMatrix x = correlated_inputs(rng, 2 * n + 8, n);
    const DenseMatrix y = x + 0.3F * random_dense(rng, x.rows(), n);
    const auto tokens = static_cast<float>(x.rows());
    const DenseMatrix gram = x.transpose() * x / tokens;
    const DenseMatrix cross = y.transpose() * x / tokens;
    DenseMatrix damped = gram;
    damped.diagonal().array() += 0.05F * gram.trace() / static_cast<float>(n);

    DeviceBuffer<float> matrix(std::vector<float>(damped.data(), damped.data() + n * n));
    cuda::detail::factor_lower(*work, matrix.data(), n, failed.data());
    CHECK(work->get(failed.data(), 1).front() == 0);
    require_ok(work->finish());
    const std::vector<float> got = matrix.download();
    const Eigen::MatrixXd want = Eigen::LLT<Eigen::MatrixXd>(damped.cast<double>()).matrixL();
    double off = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j <= i; ++j)
        off = std::max(off,
                       std::abs(static_cast<double>(got[static_cast<std::size_t>(i * n + j)]) - want(i, j)));
    }
    CHECK(off <= 2e-5 * want.cwiseAbs().maxCoeff());
    // One pivot that is not positive, wherever it is.
    for (const std::int64_t at : {std::int64_t{0}, n / 2, n - 1}) {
      DenseMatrix bad = damped;
      bad(at, at) = -1.0F;
      matrix.upload(std::vector<float>(bad.data(), bad.data() + n * n));
      cuda::detail::factor_lower(*work, matrix.data(), n, failed.data());
      CHECK(work->get(failed.data(), 1).front() == 1);
      require_ok(work->finish());
    }

    const DenseMatrix w = random_dense(rng, 37, n);
    const auto host = corrected_weights(view(w), view(gram), view(cross), 0.05, pool);
    require_ok(host.status());
    DeviceBuffer<float> h(std::vector<float>(gram.data(), gram.data() + n * n));
    DeviceBuffer<float> c(std::vector<float>(cross.data(), cross.data() + n * n));
    DeviceBuffer<float> weights(std::vector<float>(w.data(), w.data() + w.size()));
    DeviceBuffer<float> out(static_cast<std::size_t>(w.size()));
    require_ok(correction->prepare(h.data(), c.data(), n, 0.05));
    require_ok(correction->correct(weights.data(), w.rows(), out.data()));
    const double corrected = worst_of(out.download(), *host);
    std::printf("n = %4ld: factor off by %.2g, corrected weights by %.2g\n", static_cast<long>(n), off,
                corrected);
    CHECK(corrected <= 1e-3);
    for (auto* const buffer : {&h, &c, &weights, &out}) CHECK(buffer->guards_intact());
  }
  DeviceBuffer<float> zeros(std::vector<float>(16, 0.0F));
  const Status refused = correction->prepare(zeros.data(), zeros.data(), 4, 0.1);
  CHECK(refused.message() == "corrected_weights: H of 4 x 4 and damping 0.1 is not positive definite");
  CHECK(correction->prepare(zeros.data(), zeros.data(), 4, 0.0).message() ==
        "corrected_weights: damping is 0, must be positive");
}

}  // namespace

// Small cases stand apart: they are what compute-sanitizer's tools get through in a minute.

TEST_CASE("each step of the quantizer on the GPU is the host's", "[calibrated][gpu]") {
  check_steps(std::span(kCases).subspan(1));
}
TEST_CASE("each step of the quantizer on the GPU is the host's: a small layer", "[calibrated][gpu][small]") {
  check_steps(std::span(kCases).first(1));
}

TEST_CASE("k-means on the GPU gives the host's codebooks, codes and scales", "[calibrated][gpu]") {
  constexpr Case kLayers[] = {{"m1v4g128", 67, 300}, {"m2v8g-1", 130, 272}, {"m1v8b12g-1", 141, 1024}};
  check_kmeans(kLayers);
}
TEST_CASE("k-means on the GPU gives the host's results: small layers", "[calibrated][gpu][small]") {
  constexpr Case kLayers[] = {{"m2v2b4g64", 33, 130}, {"m3v4b5g32", 9, 128}, {"m1v16b8g16", 5, 48}};
  check_kmeans(kLayers);
}

TEST_CASE("factors of H and corrected weights on the GPU are the host's", "[calibrated][gpu]") {
  check_factors({200, 576, 1000});
}
TEST_CASE("factors of H and corrected weights on the GPU are the host's: small ones",
          "[calibrated][gpu][small]") {
  check_factors({1, 17, 64, 65});
}

TEST_CASE("layers quantized on the GPU are as good as the host's, and the same bits again",
          "[calibrated][gpu]") {
  const Device device = gpu_or_skip();
  ThreadPool pool(2);
  auto made = DeviceQuantizer::create(device, nullptr);
  require_ok(made.status());
  for (const Case& c : {Case{"m1v4g64", 96, 256}, Case{"m2v8g-1", 64, 256}, Case{"m2v4b4g64", 96, 320}}) {
    CAPTURE(c.format);
    Rng rng(71);
    const DenseMatrix w = random_dense(rng, c.rows, c.cols);
    const DenseMatrix x = correlated_inputs(rng, 3 * c.cols, c.cols);
    const std::vector<float> gram = gram_of(x);
    const MatrixView<const float> h(gram.data(), c.cols, c.cols);
    CalibratedOptions options;
    options.rounds = 6;
    options.tolerance = 0.002;
    options.beam = 2;
    CalibratedReport on_host;
    CalibratedReport on_gpu;
    const Format f = parse_format(c.format).value();
    require_ok(quantize_calibrated(view(w), h, f, options, pool, &on_host).status());
    const auto first = made->quantize_calibrated(view(w), h, f, options, pool, &on_gpu);
    require_ok(first.status());
    std::printf("%s: k-means %.5f, host %.5f in %d rounds, GPU %.5f in %d\n", c.format, on_host.kmeans_error,
                on_host.error, on_host.rounds, on_gpu.error, on_gpu.rounds);
    CHECK(std::abs(on_gpu.kmeans_error - on_host.kmeans_error) <= 1e-4 * on_host.kmeans_error);
    CHECK(on_gpu.error <= 1.02 * on_host.error);
    CHECK(on_gpu.error < on_host.kmeans_error);
    SerialExecutor serial;
    const auto again = made->quantize_calibrated(view(w), h, f, options, serial, nullptr);
    require_ok(again.status());
    CHECK(std::equal(again->codes().begin(), again->codes().end(), first->codes().begin()));
    CHECK(std::equal(again->codebooks().begin(), again->codebooks().end(), first->codebooks().begin()));
    CHECK(std::equal(again->scales().begin(), again->scales().end(), first->scales().begin()));
  }
}

}  // namespace codegemm::test
