// SPDX-License-Identifier: Apache-2.0
//
// bench/tune.cu - suite tune: up to how many tokens each regime of the GPU product is the fastest on this
// card, for each format. --write puts the crossovers into include/codegemm/cuda/crossovers.hpp.
//
// usage: tune [--json FILE] [--write FILE] [--quick] [--format NAME]... [--shape NxK]...
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/gemm.cuh>

#include "support/gpu_problem.cuh"
#include "support/gpu_timing.cuh"
#include "support/report.hpp"

namespace {

using namespace codegemm;
using bench::Buffer;
using bench::check;
using bench::Option;
using bench::Shape;
using cuda::Regime;

constexpr std::array kTokens = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64};
constexpr int kMostGatherTokens = 8;  // it makes a pass for each token: beyond, it only gets worse
constexpr std::array kRegimes = {Regime::kGather, Regime::kFusedMma, Regime::kFusedWgmma};
constexpr std::array kRegimeNames = {"gather", "mma", "wgmma"};
constexpr double kMostError = 1e-3;

// Microseconds by [regime][token count]; 0 where the regime does not serve the problem.
using Times = std::array<std::array<double, kTokens.size()>, kRegimes.size()>;

struct Measured {
  Shape shape;
  Format format;
  Times us;
};

Measured measure(Shape shape, Format format, bool quick, const cuda::Device& device, cudaStream_t stream) {
  Measured out{shape, format, {}};
  const bench::ColdMatrix cold(shape, format, {}, 0);
  const std::vector<Half> x = bench::draw_tokens(kTokens.back(), shape.cols);
  const Buffer<Half> x_device(x);
  std::vector<Half> y(static_cast<std::size_t>(kTokens.back() * shape.rows));
  Buffer<Half> y_device(y.size());
  for (std::size_t t = 0; t < kTokens.size(); ++t) {
    for (std::size_t r = 0; r < kRegimes.size(); ++r) {
      if (kRegimes[r] == Regime::kGather && kTokens[t] > kMostGatherTokens) continue;
      cuda::GemmProblem<Half, Half> p;
      p.x = MatrixView<const Half>(x_device.data, kTokens[t], shape.cols);
      p.y = MatrixView<Half>(y_device.data, kTokens[t], shape.rows);
      p.weights = cold.view(0);
      p.tuning.regime = kRegimes[r];
      if (cuda::regime_of(p, device) != kRegimes[r]) continue;
      const std::size_t size = cuda::workspace_bytes(p, device);
      Buffer<std::byte> workspace(size);
      check(cudaMemset(workspace.data, 0, std::max<std::size_t>(size, 1)), "cudaMemset");
      check(cudaMemset(y_device.data, 0xFF, y.size() * sizeof(Half)), "cudaMemset");
      check(cuda::run(p, device, workspace.data, size, stream));
      check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      check(cudaMemcpy(y.data(), y_device.data, y.size() * sizeof(Half), cudaMemcpyDeviceToHost),
            "cudaMemcpy");
      const double error = bench::error_of(cold.parts(), x, y, kTokens[t]);
      if (!(error <= kMostError)) {
        throw std::runtime_error(concat(kRegimeNames[r], " on ", shape.name(), ' ', format_name(format),
                                        " with ", kTokens[t], " tokens is off by ", error));
      }
      out.us[r][t] = bench::time_us(stream, std::max(cold.copies(), 8), quick ? 5 : 15, [&](int i) {
        p.weights = cold.view(i);
        check(cuda::run(p, device, workspace.data, size, stream));
      });
    }
  }
  return out;
}

// What regime_of() would take, and its time; the regime left out where it serves no problem.
double time_of(const Times& us, std::size_t t, cuda::LastTokens last) {
  const double gather = us[0][t], mma = us[1][t], wgmma = us[2][t];
  if (gather > 0.0 && kTokens[t] <= last.gather) return gather;
  if (wgmma > 0.0 && (mma == 0.0 || kTokens[t] > last.mma)) return wgmma;
  return mma > 0.0 ? mma : gather;
}

// The pair with the least geometric mean of the times over the measured matrices and token counts, and the
// sum of the logarithms. Matrices of fewer than `gather_rows` rows are gathered for one token at most.
std::pair<cuda::LastTokens, double> choose(const std::vector<const Measured*>& all,
                                           std::int64_t gather_rows) {
  std::pair<cuda::LastTokens, double> best;
  bool first = true;
  const bool gathers =
      std::any_of(all.begin(), all.end(), [](const Measured* m) { return m->us[0][0] > 0.0; });
  for (int gather = 0; gather <= (gathers ? kMostGatherTokens : 0); ++gather) {
    if (gather > 0 && std::find(kTokens.begin(), kTokens.end(), gather) == kTokens.end()) continue;
    for (const int mma : kTokens) {
      const cuda::LastTokens last{gather, mma};
      const cuda::Crossover crossover{{}, {}, last, last, gather_rows};
      double sum = 0.0;
      for (const Measured* m : all) {
        for (std::size_t t = 0; t < kTokens.size(); ++t) {
          const double us = time_of(m->us, t, crossover.of(m->shape.rows, m->shape.cols));
          if (us > 0.0) sum += std::log(us);
        }
      }
      // Of equals the last: where a regime serves nothing, the others go on.
      if (first || sum <= best.second) best = {last, sum}, first = false;
    }
  }
  return best;
}

// The best line for a format: with every number of rows that was measured as the least for more than one
// gathered token, and without one.
cuda::Crossover choose_all(cuda::Card card, Format format, const std::vector<Measured>& measured) {
  std::vector<const Measured*> small, large;
  std::vector<std::int64_t> least_rows = {0};
  for (const Measured& m : measured) {
    (m.shape.rows * m.shape.cols <= cuda::kSmallWeights ? small : large).push_back(&m);
    least_rows.push_back(m.shape.rows);
  }
  std::sort(least_rows.begin(), least_rows.end());
  // Without matrices of one size, those of the other speak for both.
  if (small.empty()) small = large;
  if (large.empty()) large = small;
  cuda::Crossover best;
  double least = 0.0;
  for (const std::int64_t rows : least_rows) {
    const auto of_small = choose(small, rows);
    const auto of_large = choose(large, rows);
    const double sum = of_small.second + of_large.second;
    if (rows == 0 || sum < least) {
      best = {card, format, of_small.first, of_large.first, rows};
      least = sum;
    }
  }
  return best;
}

std::string line_of(const cuda::Crossover& c) {
  return concat("    {{", c.card.arch, ", ", c.card.multiprocessors, ", ", c.card.memory_bits, "}, {",
                c.format.v, ", ", c.format.m, ", ", c.format.b, ", ", c.format.g, "}, {", c.small.gather,
                ", ", c.small.mma, "}, {", c.large.gather, ", ", c.large.mma, "}",
                c.gather_rows > 0 ? concat(", ", c.gather_rows) : std::string(), "},\n");
}

// Replaces the lines between the marks: this card's formats by what was measured now, all others as they
// were.
void write_crossovers(const std::string& path, const std::vector<cuda::Crossover>& now) {
  std::ifstream in(path);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  const std::string begin = "    // tune: begin\n", end = "    // tune: end\n";
  const std::size_t from = text.find(begin), to = text.find(end);
  if (!in || from == std::string::npos || to == std::string::npos || to < from)
    throw std::runtime_error(concat("--write: ", path, " has no lines marked 'tune: begin' and 'tune: end'"));
  std::string lines;
  for (const cuda::Crossover& c : now) lines += line_of(c);
  for (const cuda::Crossover& c : cuda::kCrossovers) {
    const bool measured = std::any_of(now.begin(), now.end(), [&](const cuda::Crossover& n) {
      return n.card == c.card && n.format == c.format;
    });
    if (!measured) lines += line_of(c);
  }
  check(bench::write_text(text.substr(0, from + begin.size()) + lines + text.substr(to), path));
}

int program(int argc, char** argv) {
  std::vector<Shape> shapes;
  std::vector<Format> formats;
  std::string json;
  std::string header;
  bool quick = false;
  bench::parse(argc, argv,
               {{"--quick", Option::flag(quick)},
                {"--json", Option::value(json)},
                {"--write", Option::value(header)},
                {"--shape", bench::shape_option(shapes)},
                {"--format", bench::format_option(formats)}});
  if (shapes.empty())
    shapes = {{1024, 4096},  {4096, 4096}, {6144, 4096}, {14336, 4096},
              {4096, 14336}, {8192, 8192}, {28672, 8192}};
  if (formats.empty()) {
    formats = {{4, 1, 8, 128}, {8, 2, 8, 128}, {4, 1, 8, 32}, {4, 1, 8, -1}, {8, 2, 8, -1}, {8, 1, 16, -1}};
  }

  const auto device = cuda::query_device(0);
  check(device.status());
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  const bench::MemorySpeed speed = bench::measure_bandwidth(stream, device->multiprocessors);
  const std::string card = bench::describe_card(*device);
  std::printf("%s\n", card.c_str());
  nlohmann::json rows = nlohmann::json::array();
  std::vector<cuda::Crossover> crossovers;
  for (const Format format : formats) {
    std::vector<Measured> measured;
    for (const Shape shape : shapes) {
      measured.push_back(measure(shape, format, quick, *device, stream));
      const Measured& m = measured.back();
      std::printf("%-12s %-10s  tokens", shape.name().c_str(), format_name(format).c_str());
      for (const int t : kTokens) std::printf(" %7d", t);
      std::printf("\n");
      for (std::size_t r = 0; r < kRegimes.size(); ++r) {
        std::printf("%24s %6s", "", kRegimeNames[r]);
        for (std::size_t t = 0; t < kTokens.size(); ++t) {
          if (m.us[r][t] == 0.0) {
            std::printf("       -");
            continue;
          }
          std::printf(" %7.2f", m.us[r][t]);
          rows.push_back({{"name", "gemm"},
                          {"shape", shape.name()},
                          {"config", format_name(format)},
                          {"regime", kRegimeNames[r]},
                          {"tokens", kTokens[t]},
                          {"median_us", m.us[r][t]}});
        }
        std::printf("\n");
      }
      std::fflush(stdout);
    }
    const cuda::Crossover c =
        choose_all({device->arch, device->multiprocessors, device->memory_bits}, format, measured);
    crossovers.push_back(c);
    std::printf("%s", line_of(c).c_str());
  }
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  if (!json.empty())
    check(bench::write_text(bench::frame_json({"tune", card, speed, {}}, std::move(rows)).dump(2) + '\n',
                            json));
  if (!header.empty()) write_crossovers(header, crossovers);
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return codegemm::bench::run_suite("tune", argc, argv, program); }
