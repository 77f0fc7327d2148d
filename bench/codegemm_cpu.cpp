// SPDX-License-Identifier: Apache-2.0
//
// bench/codegemm_cpu.cpp - gemm() on the CPU against Eigen's fp32 product, both with weights out of memory:
// so many copies take turns that no cache holds them.

#if !defined(NDEBUG) && !defined(__clang_analyzer__)
#error "Benchmarks must be built in Release mode: cmake --preset bench"
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <regex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <CLI/CLI.hpp>
#include <Eigen/Dense>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/gemm.hpp>
#include <codegemm/reference.hpp>
#include <support/random.hpp>

#include "support/machine.hpp"
#include "support/problems.hpp"
#include "support/report.hpp"

namespace codegemm::bench {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr double kColdBytes = 256.0 * 1024 * 1024;

struct Problem {
  Shape shape;
  Format format;
  std::int64_t tokens;

  [[nodiscard]] std::string shape_text() const { return concat(shape.rows, 'x', shape.cols); }
  [[nodiscard]] std::string name() const {
    return concat("codegemm/", format_name(format), '/', shape_text(), '/', tokens);
  }
};

std::vector<Problem> all_problems() {
  std::vector<Problem> out;
  for (const Shape shape : model_shapes()) {
    for (Format f : {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 2, 8, 64}}) {
      if (shape.cols % f.g != 0) f.g = 64;  // SmolLM2's 576
      for (const std::int64_t tokens : {1, 4, 16, 64}) out.push_back({shape, f, tokens});
    }
  }
  return out;
}

Matrix random_matrix(std::int64_t rows, std::int64_t cols, test::Rng& random) {
  Matrix out(rows, cols);
  for (std::int64_t i = 0; i < rows * cols; ++i) out.data()[i] = random.uniform(-1.0F, 1.0F);
  return out;
}

struct Options {
  int threads = 1;
  bool quick = false;
};

// Iterations enough to visit every copy, and for half a second (quick: a twentieth).
std::int64_t rounds_for(double one_call, std::size_t copies, bool quick) {
  const double wanted = (quick ? 0.05 : 0.5) / std::max(one_call, 1e-7);
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(wanted), quick ? 3 : 11,
                                  std::max<std::int64_t>(11, static_cast<std::int64_t>(copies)));
}

// Runs call(copy) under Google Benchmark's loop and returns the median seconds.
template <class Call>
double time_calls(benchmark::State& state, std::size_t copies, Call&& call) {
  std::vector<double> times;
  std::size_t copy = 0;
  for ([[maybe_unused]] auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    call(copy);
    const double seconds = seconds_since(start);
    times.push_back(seconds);
    state.SetIterationTime(seconds);
    copy = (copy + 1) % copies;
  }
  return median(times);
}

// Eigen's product of tokens x K with N x K, cut by rows among the workers.
class EigenPeer {
 public:
  EigenPeer(Shape shape, test::Rng& random) {
    const double bytes = 4.0 * static_cast<double>(shape.rows * shape.cols);
    const auto copies = static_cast<std::size_t>(std::max(2.0, std::ceil(kColdBytes / bytes)));
    for (std::size_t i = 0; i < copies; ++i)
      weights_.push_back(random_matrix(shape.rows, shape.cols, random));
  }

  [[nodiscard]] std::size_t copies() const { return weights_.size(); }

  void multiply(std::size_t copy, const Matrix& x, Matrix& y, Executor& executor) const {
    const Matrix& w = weights_[copy];
    const std::int64_t parts = executor.workers();
    parallel_for(executor, parts, [&](std::int64_t part, int) {
      const std::int64_t first = w.rows() * part / parts;
      const std::int64_t count = w.rows() * (part + 1) / parts - first;
      if (x.rows() == 1) {
        y.row(0).segment(first, count).transpose().noalias() =
            w.middleRows(first, count) * x.row(0).transpose();
      } else {
        y.middleCols(first, count).noalias() = x * w.middleRows(first, count).transpose();
      }
    });
  }

 private:
  std::vector<Matrix> weights_;
};

// The relative error on 64 rows spread over the matrix, against the reference in double.
double error_of(const QuantizedMatrix& w, const Matrix& x, const Matrix& y) {
  double off2 = 0.0;
  double size2 = 0.0;
  const std::int64_t step = std::max<std::int64_t>(1, w.rows() / 64);
  for (std::int64_t n = step - 1; n < w.rows(); n += step) {
    Eigen::RowVectorXd row(w.cols());
    for (std::int64_t k = 0; k < w.cols(); ++k) row(k) = reference_weight(w.view(), n, k);
    for (std::int64_t t = 0; t < x.rows(); ++t) {
      const double want = row.dot(x.row(t).cast<double>());
      const double off = static_cast<double>(y(t, n)) - want;
      off2 += off * off;
      size2 += want * want;
    }
  }
  return std::sqrt(off2 / size2);
}

class Bench {
 public:
  Bench(const Options& options, Suite& suite)
      : options_(options), suite_(suite), pool_(std::max(1, options.threads)) {
    std::fprintf(stderr, "measuring memory on %d thread(s) ...\n", pool_.workers());
    suite_.name = "codegemm-cpu";
    suite_.machine = machine_json(pool_);
    suite_.memory = measure_memory(pool_);
    std::fprintf(stderr, "read %.1f GB/s, copy %.1f GB/s\n", suite_.memory.read_gb_per_s,
                 suite_.memory.copy_gb_per_s);
  }

  // Our row of one problem; throws if the result is wrong.
  void run(const Problem& problem, benchmark::State& state) {
    std::fprintf(stderr, "%s ...\n", problem.name().c_str());
    prepare(problem);
    const Matrix x = random_matrix(problem.tokens, problem.shape.cols, random_);
    Matrix y = Matrix::Constant(problem.tokens, problem.shape.rows, std::nanf(""));
    AlignedBuffer<std::byte> workspace;
    if (!workspace.reserve(workspace_bytes(packed_[0], problem.tokens, pool_.workers())))
      throw std::bad_alloc();
    const auto call = [&](std::size_t copy) {
      const Status status = gemm(packed_[copy], {x.data(), x.rows(), x.cols()},
                                 {y.data(), y.rows(), y.cols()}, workspace.span(), pool_);
      if (!status.ok()) throw std::runtime_error(status.message());
    };
    call(0);
    Row row;
    row.error = error_of(first_, x, y);
    if (!(row.error < 1e-5)) throw std::runtime_error(concat(problem.name(), ": error ", row.error));

    row.name = problem.name();
    row.shape = problem.shape_text();
    row.config = format_name(problem.format);
    row.tokens = problem.tokens;
    const double seconds = time_calls(state, packed_.size(), call);
    row.median_us = seconds * 1e6;
    row.gb_per_s = static_cast<double>(packed_[0].bytes()) / seconds * 1e-9;
    row.share_of_read = row.gb_per_s / suite_.memory.read_gb_per_s;
    const double peer = eigen_us(problem.shape, x, y);
    row.peers.push_back({"eigen", peer, peer / row.median_us});
    state.counters["GB/s"] = row.gb_per_s;
    state.counters["x_eigen"] = row.peers[0].ratio;
    std::fprintf(stderr, "  %.1f us, %.2f GB/s, error %.1e; eigen %.1f us, ratio %.2f\n", row.median_us,
                 row.gb_per_s, row.error, peer, row.peers[0].ratio);
    suite_.rows.push_back(std::move(row));
  }

  [[nodiscard]] std::int64_t iterations(const Problem& problem) const {
    // A guess at the time: 5 G weights times tokens a second.
    const double weights = static_cast<double>(problem.shape.rows * problem.shape.cols);
    const double copies = std::max(2.0, kColdBytes / (weights / 3.0));
    return rounds_for(weights * static_cast<double>(problem.tokens) / 5e9, static_cast<std::size_t>(copies),
                      options_.quick);
  }

 private:
  // The packed copies of a problem's weights; kept while only the tokens change.
  void prepare(const Problem& problem) {
    const auto key = std::make_tuple(problem.shape.rows, problem.shape.cols, format_name(problem.format));
    if (key == key_) return;
    key_ = key;
    packed_.clear();
    double bytes = 0.0;
    while (packed_.size() < 2 || bytes < kColdBytes) {
      QuantizedMatrix w = random_weights(problem.format, problem.shape, random_);
      packed_.push_back(pack(w.view()).value());
      bytes += static_cast<double>(packed_.back().bytes());
      if (packed_.size() == 1) first_ = std::move(w);
    }
  }

  // Measured once for each shape and number of tokens.
  double eigen_us(Shape shape, const Matrix& x, Matrix& y) {
    const auto key = std::make_tuple(shape.rows, shape.cols, x.rows());
    if (const auto found = eigen_.find(key); found != eigen_.end()) return found->second;
    if (!peer_ || peer_shape_ != std::make_pair(shape.rows, shape.cols)) {
      peer_ = std::make_unique<EigenPeer>(shape, random_);
      peer_shape_ = {shape.rows, shape.cols};
    }
    std::vector<double> times;
    const auto begin = std::chrono::steady_clock::now();
    const double budget = options_.quick ? 0.05 : 0.5;
    for (std::size_t i = 0; times.size() < (options_.quick ? 3U : 11U) || seconds_since(begin) < budget;
         ++i) {
      const auto start = std::chrono::steady_clock::now();
      peer_->multiply(i % peer_->copies(), x, y, pool_);
      times.push_back(seconds_since(start));
      benchmark::DoNotOptimize(y.data());
    }
    return eigen_[key] = median(times) * 1e6;
  }

  Options options_;
  Suite& suite_;
  ThreadPool pool_;
  test::Rng random_{1};
  std::tuple<std::int64_t, std::int64_t, std::string> key_;
  std::vector<PackedMatrix> packed_;
  QuantizedMatrix first_ = QuantizedMatrix::create(Format{}, 0, 0).value();
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, double> eigen_;
  std::unique_ptr<EigenPeer> peer_;
  std::pair<std::int64_t, std::int64_t> peer_shape_;
};

int run(int argc, char** argv) {
  Options options;
  std::string json;
  std::string filter;
  CLI::App app("gemm() on the CPU against Eigen, weights out of memory");
  app.add_option("--threads", options.threads, "Worker threads, also for Eigen")->check(CLI::Range(1, 1024));
  app.add_option("--filter", filter,
                 "Only names that this regular expression finds, such as m1v4.*/4096x4096/1$");
  app.add_flag("--quick", options.quick, "A tenth of the measuring time");
  app.add_option("--json", json, "Write the results to this file");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  std::vector<Problem> problems;
  const std::regex wanted(filter);
  for (const Problem& problem : all_problems()) {
    if (std::regex_search(problem.name(), wanted)) problems.push_back(problem);
  }
  if (problems.empty()) {
    std::fprintf(stderr, "--filter %s: finds none of %zu benchmarks, such as %s\n", filter.c_str(),
                 all_problems().size(), all_problems()[0].name().c_str());
    return 2;
  }

  Suite suite;
  Bench bench(options, suite);
  std::string failure;
  for (const Problem& problem : problems) {
    benchmark::RegisterBenchmark(problem.name().c_str(),
                                 [&bench, &failure, problem](benchmark::State& state) {
                                   try {
                                     bench.run(problem, state);
                                   } catch (const std::exception& error) {
                                     failure = error.what();
                                     state.SkipWithError(failure.c_str());
                                   }
                                 })
        ->UseManualTime()
        ->Iterations(bench.iterations(problem))
        ->Unit(benchmark::kMicrosecond);
  }
  int no_arguments = 1;
  benchmark::Initialize(&no_arguments, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  if (!failure.empty()) {
    std::fprintf(stderr, "failed: %s\n", failure.c_str());
    return 1;
  }
  if (!json.empty()) {
    if (const Status status = write_json(suite, json); !status.ok()) {
      std::fprintf(stderr, "%s\n", status.message().c_str());
      return 2;
    }
  }
  return 0;
}

}  // namespace
}  // namespace codegemm::bench

int main(int argc, char** argv) {
  try {
    return codegemm::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "codegemm-cpu: %s\n", error.what());
    return 2;
  }
}
