// SPDX-License-Identifier: Apache-2.0
//
// bench/codegemm_cpu.cpp - gemm() on the CPU against Eigen's and OpenBLAS's fp32 product, AQLM's kernel and
// llama.cpp's block formats, all with weights out of memory: so many copies take turns that no cache holds
// them. Peers that are not installed are left out (scripts/bench --with-peers installs them).

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

#include "support/cpu_peers.hpp"
#include "support/machine.hpp"
#include "support/problems.hpp"
#include "support/report.hpp"

namespace codegemm::bench {
namespace {

struct Problem {
  Shape shape;
  Format format;
  std::int64_t tokens;

  [[nodiscard]] std::string shape_text() const { return concat(shape.rows, 'x', shape.cols); }
  [[nodiscard]] std::string name() const {
    return concat("codegemm/", format_name(format), '/', shape_text(), '/', tokens);
  }
};

// 2 bits a weight three times, then 3 and 4 bits; with 4-bit codes as well as with 8-bit ones.
std::vector<Problem> all_problems() {
  std::vector<Problem> out;
  for (const Shape shape : model_shapes()) {
    for (Format f : {Format{4, 1, 8, 128}, Format{8, 2, 8, 128}, Format{4, 2, 4, 128}, Format{4, 3, 4, 128},
                     Format{2, 1, 6, 128}, Format{2, 2, 4, 128}, Format{2, 1, 8, 128}, Format{4, 2, 8, 64}}) {
      if (shape.cols % f.g != 0) f.g = 64;  // SmolLM2's 576
      for (const std::int64_t tokens : {1, 4, 16, 64}) out.push_back({shape, f, tokens});
    }
  }
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

// Seconds of building the Psumbook alone, of one token: every table once, tiles cut among the workers.
double time_psumbook(const PackedMatrix& packed, const Matrix& x, Executor& executor) {
  const PackedView& w = packed.view();
  const Format f = w.format;
  const Isa isa = detect_isa();
  const bool lookup = detail::choose_regime(w, 1, isa, detail::Regime::kAutomatic) == detail::Regime::kLookup;
  detail::CpuKernels kernels{};
  first_match(
      CpuConfigs{}, [&](auto config) { return config.kVecLen == f.v && config.kCodeBits == f.b; },
      [&](auto config) { kernels = detail::cpu_kernels_of<decltype(config)>(isa); });
  const std::int64_t entries = w.tile_vectors * f.m;
  std::vector<AlignedBuffer<float>> tables(static_cast<std::size_t>(executor.workers()));
  std::vector<AlignedBuffer<std::uint8_t>> encoded(tables.size());
  for (std::size_t i = 0; i < tables.size(); ++i) {
    if (!tables[i].reserve(static_cast<std::size_t>(entries * f.centroids())) ||
        !encoded[i].reserve(static_cast<std::size_t>(entries * detail::encoded_bytes(f.b)))) {
      throw std::bad_alloc();
    }
  }
  double best = 1e9;
  for (int round = 0; round < 20; ++round) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(executor, w.tiles, [&](std::int64_t tile, int worker) {
      float* const out = tables[static_cast<std::size_t>(worker)].data();
      const std::int64_t count = w.vectors_in(tile);
      kernels.build1({w.codebooks, w.codebooks_transposed, x.data() + tile * w.tile_vectors * f.v, count, f.m,
                      f.centroids(), out});
      const std::int64_t flush = detail::flush_entries(f.b);
      for (std::int64_t e = 0; lookup && e < count * f.m; e += flush) {
        kernels.lookup.encode(
            {out + e * f.centroids(), std::min(flush, count * f.m - e),
             encoded[static_cast<std::size_t>(worker)].data() + e * detail::encoded_bytes(f.b)});
      }
    });
    best = std::min(best, seconds_since(start));
  }
  return best;
}

class Bench {
 public:
  Bench(const Options& options, Suite& suite)
      : options_(options), suite_(suite), pool_(std::max(1, options.threads)), openblas_(options.threads) {
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
    if (!(row.error < 1e-3)) throw std::runtime_error(concat(problem.name(), ": error ", row.error));

    row.name = problem.name();
    row.shape = problem.shape_text();
    row.config = format_name(problem.format);
    row.tokens = problem.tokens;
    const double seconds = time_calls(state, packed_.size(), call);
    row.median_us = seconds * 1e6;
    row.gb_per_s = static_cast<double>(packed_[0].bytes()) / seconds * 1e-9;
    row.share_of_read = row.gb_per_s / suite_.memory.read_gb_per_s;
    if (problem.tokens == 1) row.psumbook_us = time_psumbook(packed_[0], x, pool_) * 1e6;
    for (const auto& [name, us] : peers(problem, x)) row.peers.push_back({name, us, us / row.median_us});
    state.counters["GB/s"] = row.gb_per_s;
    std::fprintf(stderr, "  %.1f us, %.2f GB/s, error %.1e", row.median_us, row.gb_per_s, row.error);
    for (const Peer& peer : row.peers) {
      state.counters["x_" + peer.name] = peer.ratio;
      std::fprintf(stderr, "; %s %.1f us, ratio %.2f", peer.name.c_str(), peer.median_us, peer.ratio);
    }
    std::fprintf(stderr, "\n");
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
    first_ = random_weights(problem.format, problem.shape, random_);
    packed_.clear();
    packed_.push_back(pack(first_.view()).value());
    const double copies = std::ceil(kColdBytes / static_cast<double>(packed_[0].bytes()));
    packed_.resize(std::max<std::size_t>(2, static_cast<std::size_t>(copies)));
    parallel_for(pool_, std::ssize(packed_) - 1, [&](std::int64_t i, int) {
      packed_[static_cast<std::size_t>(i + 1)] = pack(first_.view()).value();
    });
  }

  using Times = std::map<std::string, double>;  // microseconds by peer

  template <class Call>
  [[nodiscard]] double peer_us(Call&& call) {
    std::vector<double> times;
    const auto begin = std::chrono::steady_clock::now();
    const double budget = options_.quick ? 0.05 : 0.5;
    while (times.size() < (options_.quick ? 3U : 11U) || seconds_since(begin) < budget) {
      const auto start = std::chrono::steady_clock::now();
      call(times.size());
      times.push_back(seconds_since(start));
    }
    return median(times) * 1e6;
  }

  // Each measured once for a shape and number of tokens, AQLM's for a format too.
  Times peers(const Problem& problem, const Matrix& x) {
    const Shape shape = problem.shape;
    const auto key = std::make_tuple(shape.rows, shape.cols, x.rows());
    if (peers_.count(key) == 0) peers_[key] = measure_peers(shape, x);
    Times out = peers_[key];
    if (problem.tokens == 1 && problem.format.b == 8) {
      const double us = aqlm_us(shape, problem.format, pool_.workers(), options_.quick);
      if (us > 0.0) out[concat("aqlm-", problem.format.m, "x8-g", problem.format.v)] = us;
    }
    return out;
  }

  Times measure_peers(Shape shape, const Matrix& x) {
    Times out;
    Matrix y = Matrix::Constant(x.rows(), shape.rows, std::nanf(""));
    {
      const DenseWeights w(shape, random_);
      const std::size_t copies = w.copies.size();
      const Matrix want = x * w.copies[0].transpose();
      const auto check = [&](const char* name) {
        if (!((y - want).norm() <= 1e-4F * want.norm()))
          throw std::runtime_error(concat(name, ": wrong result"));
      };
      multiply_eigen(w.copies[0], x, y, pool_);
      check("eigen");
      out["eigen"] = peer_us([&](std::size_t i) { multiply_eigen(w.copies[i % copies], x, y, pool_); });
      if (openblas_.loaded()) {
        openblas_.multiply(w.copies[0], x, y);
        check("openblas");
        out["openblas"] = peer_us([&](std::size_t i) { openblas_.multiply(w.copies[i % copies], x, y); });
      }
    }
    if (x.rows() != 1 || !ggml_.loaded()) return out;
    for (const Ggml::Type& type : Ggml::types()) {
      const auto w = ggml_.weights(type, shape, random_);
      if (!w) continue;
      ggml_.multiply(type, *w, 0, x.data(), y.data(), pool_);
      const double error = ggml_.error(type, *w, x.data(), y.data());
      // Its activations have 8 bits.
      if (!(error < 2e-2)) throw std::runtime_error(concat(type.name, ": error ", error));
      out[type.name] = peer_us(
          [&](std::size_t i) { ggml_.multiply(type, *w, i % w->copies.size(), x.data(), y.data(), pool_); });
    }
    return out;
  }

  Options options_;
  Suite& suite_;
  ThreadPool pool_;
  test::Rng random_{1};
  std::tuple<std::int64_t, std::int64_t, std::string> key_;
  std::vector<PackedMatrix> packed_;
  QuantizedMatrix first_ = QuantizedMatrix::create(Format{}, 0, 0).value();
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, Times> peers_;
  OpenBlas openblas_;
  Ggml ggml_;
};

int run(int argc, char** argv) {
  Options options;
  std::string json;
  std::string filter;
  CLI::App app("gemm() on the CPU against its peers, weights out of memory");
  app.add_option("--threads", options.threads, "Worker threads, also for the peers")
      ->check(CLI::Range(1, 1024));
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
