// SPDX-License-Identifier: Apache-2.0
//
// bench/codegemm_cpu.cpp - gemm() on the CPU against Eigen's and OpenBLAS's fp32 product, AQLM's kernel and
// llama.cpp's block formats, all with weights out of memory: so many copies take turns that no cache holds
// them. All that multiply the same shape with as many tokens take turns, too, and with them a plain read of
// the memory; each worker has a processor of its own. Peers that are not installed are left out
// (scripts/bench --with-peers installs them).

#if !defined(NDEBUG) && !defined(__clang_analyzer__)
#error "Benchmarks must be built in Release mode: cmake --preset bench"
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <list>
#include <memory>
#include <new>
#include <regex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <Eigen/Dense>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/base/weight_arena.hpp>
#include <codegemm/gemm.hpp>
#include <codegemm/reference.hpp>
#include <support/random.hpp>

#include "support/contender.hpp"
#include "support/cpu_peers.hpp"
#include "support/machine.hpp"
#include "support/pinning.hpp"
#include "support/problems.hpp"
#include "support/report.hpp"
#include "support/rounds.hpp"

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
  std::int64_t rounds = 9;
  bool quick = false;
  Isa isa = detect_isa();

  [[nodiscard]] double turn_seconds() const { return quick ? 0.01 : 0.1; }
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

// What one token reads: codes, scales, and the codebooks that tables are made of. bytes() counts what other
// regimes read of the codebooks, too.
double bytes_read(const PackedView& w) {
  const Format f = w.format;
  const std::int64_t codes = w.row_blocks * w.vectors() * f.m * w.entry_words() * 8;
  const std::int64_t scales = f.scale_groups(w.cols) * w.padded_rows() * 2;
  const std::int64_t values = f.m * f.centroids() * f.v;
  return static_cast<double>(codes + scales + values * (w.codebooks_pairs != nullptr ? 2 : 4));
}

// Seconds of building the Psumbook alone, of one token: every table once, tiles cut among the workers.
double time_psumbook(const PackedMatrix& packed, const Matrix& x, Isa isa, Executor& executor) {
  const PackedView& w = packed.view();
  const Format f = w.format;
  const bool lookup = detail::choose_regime(w, 1, isa, detail::Regime::kAutomatic) == detail::Regime::kLookup;
  detail::CpuKernels kernels{};
  first_match(
      CpuConfigs{}, [&](auto config) { return config.kVecLen == f.v && config.kCodeBits == f.b; },
      [&](auto config) { kernels = detail::cpu_kernels_of<decltype(config)>(isa); });
  const detail::PsumbookPlan plan = detail::make_psumbook_plan(w, 1, lookup);
  std::vector<AlignedBuffer<float>> memory(static_cast<std::size_t>(executor.workers()));
  for (AlignedBuffer<float>& of_worker : memory) {
    if (!of_worker.reserve(static_cast<std::size_t>(plan.worker_floats()))) throw std::bad_alloc();
  }
  double best = 1e9;
  for (int round = 0; round < 20; ++round) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(executor, w.tiles, [&](std::int64_t tile, int worker) {
      const detail::PsumbookScratch scratch(plan, memory[static_cast<std::size_t>(worker)].data());
      const float* const from = x.data() + tile * w.tile_vectors * f.v;
      const std::int64_t count = w.vectors_in(tile);
      if (!lookup) {
        kernels.build1(
            {w.codebooks, w.codebooks_transposed, from, count, f.m, f.centroids(), scratch.tables});
        return;
      }
      detail::TileCodes none{nullptr, 0, 0};
      std::int64_t flushes = 0;
      if (!detail::make_segment(kernels, w, from, 0, count, w.scales, scratch, none, flushes)) {
        detail::encode_segment(kernels, w, from, 0, count, w.scales, scratch, none, flushes);
      }
    });
    best = std::min(best, seconds_since(start));
  }
  return best;
}

// One format's weights of a shape, packed again and again into one arena, as the layers of a model are.
struct OurWeights {
  Format format;
  Isa isa;
  QuantizedMatrix first;
  WeightArena arena;
  std::vector<PackedMatrix> packed;

  OurWeights(Format f, Shape shape, Isa isa_, test::Rng& random)
      : format(f), isa(isa_), first(random_weights(f, shape, random)) {
    packed.push_back(pack_again());
    packed.resize(cold_copies(static_cast<double>(packed[0].bytes())));
  }
  [[nodiscard]] PackedMatrix pack_again() { return detail::pack_for(first.view(), isa, &arena).value(); }
};

// Packs all copies, those of the formats in turns: a machine's memory is not equally fast everywhere, and
// each of them is to have its part of what is slow.
void pack_copies(std::list<OurWeights>& all, Executor& executor) {
  struct Place {
    double part;  // of the format's copies, before this one
    OurWeights* weights;
    std::size_t copy;
  };
  std::vector<Place> places;
  for (OurWeights& w : all) {
    for (std::size_t i = 1; i < w.packed.size(); ++i) {
      places.push_back({static_cast<double>(i) / static_cast<double>(w.packed.size()), &w, i});
    }
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.part < b.part; });
  parallel_for(executor, std::ssize(places), [&](std::int64_t i, int) {
    const Place& place = places[static_cast<std::size_t>(i)];
    place.weights->packed[place.copy] = place.weights->pack_again();
  });
}

// A plain read of the memory, some MB a call.
class MemoryRead {
 public:
  MemoryRead() : words_(static_cast<std::size_t>(kWords), 1) {}

  void read(std::size_t call, Executor& executor) {
    const std::int64_t piece = static_cast<std::int64_t>(call) % (kWords / kPieceWords);
    std::vector<std::uint64_t> sums(static_cast<std::size_t>(executor.workers()));
    parallel_for(executor, kPieceWords / kChunkWords, [&](std::int64_t chunk, int worker) {
      sums[static_cast<std::size_t>(worker)] +=
          sum_words(words_.data() + piece * kPieceWords + chunk * kChunkWords, kChunkWords);
    });
    for (const std::uint64_t sum : sums) total_ += sum;
  }
  static constexpr double kCallBytes = 16.0 * 1024 * 1024;

  /// Of all words read: so that no reading is left out.
  [[nodiscard]] std::uint64_t total() const { return total_; }

 private:
  static constexpr std::int64_t kWords = static_cast<std::int64_t>(kColdBytes) / 8;
  static constexpr std::int64_t kPieceWords = static_cast<std::int64_t>(kCallBytes) / 8;
  static constexpr std::int64_t kChunkWords = std::int64_t{1} << 15;
  std::vector<std::uint64_t> words_;
  std::uint64_t total_ = 0;
};

class Bench {
 public:
  Bench(const Options& options, Suite& suite)
      : options_(options),
        suite_(suite),
        allowed_(allowed_processors()),
        pool_(std::max(1, options.threads)),
        openblas_(options.threads) {
    pin_workers(pool_, allowed_);
    std::fprintf(stderr, "measuring memory on %d thread(s) ...\n", pool_.workers());
    suite_.name = "codegemm-cpu";
    suite_.machine = machine_json(pool_);
    suite_.machine["isa"] = isa_name(options.isa);
    suite_.memory = measure_memory(pool_);
    std::fprintf(stderr, "read %.1f GB/s, copy %.1f GB/s\n", suite_.memory.read_gb_per_s,
                 suite_.memory.copy_gb_per_s);
  }

  // The wanted problems of one shape; after_some is called when rows of some more tokens are there.
  template <class AfterSome>
  void run(Shape shape, const std::vector<Problem>& problems, AfterSome&& after_some) {
    std::fprintf(stderr, "%lldx%lld: weights ...\n", static_cast<long long>(shape.rows),
                 static_cast<long long>(shape.cols));
    std::set<std::int64_t> tokens;
    std::list<OurWeights> ours;  // contenders hold on to their place
    for (const Problem& problem : problems) {
      tokens.insert(problem.tokens);
      if (find(ours, problem.format) == nullptr)
        ours.emplace_back(problem.format, shape, options_.isa, random_);
    }
    pack_copies(ours, pool_);
    const DenseWeights dense(shape, random_);
    for (const std::int64_t count : tokens) {
      std::vector<const Problem*> some;
      for (const Problem& problem : problems) {
        if (problem.tokens == count) some.push_back(&problem);
      }
      run_tokens(shape, count, some, ours, dense);
      after_some();
    }
  }

 private:
  [[nodiscard]] static OurWeights* find(std::list<OurWeights>& all, Format format) {
    for (OurWeights& w : all) {
      if (format_name(w.format) == format_name(format)) return &w;
    }
    return nullptr;
  }

  [[nodiscard]] static std::string aqlm_name(Format f) { return concat("aqlm-", f.m, "x8-g", f.v); }

  // What one product needs beside its weights.
  struct Operands {
    Matrix x;
    Matrix y;
    AlignedBuffer<std::byte> workspace;
  };

  void run_tokens(Shape shape, std::int64_t tokens, const std::vector<const Problem*>& problems,
                  std::list<OurWeights>& ours, const DenseWeights& dense) {
    const Matrix x = random_matrix(tokens, shape.cols, random_);
    std::vector<Contender> contenders;
    std::vector<Row> rows;
    std::list<Operands> operands;
    for (const Problem* problem : problems) {
      std::fprintf(stderr, "%s\n", problem->name().c_str());
      OurWeights& w = *find(ours, problem->format);
      operands.push_back({x, Matrix::Constant(tokens, shape.rows, std::nanf("")), {}});
      rows.push_back(first_row(*problem, w, operands.back()));
      contenders.push_back(timed(problem->name(), [&w, &with = operands.back(), this](std::size_t call) {
        multiply(w.packed[call % w.packed.size()], with);
      }));
    }
    MemoryRead memory;
    contenders.push_back(timed("read", [&](std::size_t call) { memory.read(call, pool_); }));
    Operands peer{x, Matrix::Constant(tokens, shape.rows, std::nanf("")), {}};
    add_dense(dense, peer, contenders);
    std::list<std::unique_ptr<Ggml::Weights>> blocks;
    std::list<Aqlm> aqlm;
    if (tokens == 1) {
      if (ggml_.loaded()) add_ggml(shape, peer, blocks, contenders);
      add_aqlm(shape, problems, aqlm, contenders);
    }
    run_rounds(contenders, options_.rounds, options_.turn_seconds());
    if (memory.total() == 0) throw std::runtime_error("memory was not read");

    const double read_gb_per_s = MemoryRead::kCallBytes / by_name(contenders, "read").median_us() * 1e-3;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      Row& row = rows[i];
      row.median_us = contenders[i].median_us();
      row.quarter_us = quantile(contenders[i].seconds, 0.25) * 1e6;
      row.three_quarters_us = quantile(contenders[i].seconds, 0.75) * 1e6;
      row.gb_per_s = bytes_read(find(ours, problems[i]->format)->packed[0].view()) / row.median_us * 1e-3;
      row.read_gb_per_s = read_gb_per_s;
      row.share_of_read = row.gb_per_s / read_gb_per_s;
      for (std::size_t p = rows.size(); p < contenders.size(); ++p) {
        const std::string& name = contenders[p].name;
        if (name == "read" || (name.starts_with("aqlm") && name != aqlm_name(problems[i]->format))) continue;
        const double us = contenders[p].median_us();
        row.peers.push_back({name, us, us / row.median_us});
      }
      print(row);
      suite_.rows.push_back(std::move(row));
    }
  }

  // The name and the error of a row; throws if the result is wrong.
  Row first_row(const Problem& problem, const OurWeights& w, Operands& with) {
    const std::int64_t floats =
        detail::workspace_floats(w.packed[0].view(), problem.tokens, pool_.workers(), options_.isa);
    if (!with.workspace.reserve(static_cast<std::size_t>(floats) * sizeof(float))) throw std::bad_alloc();
    multiply(w.packed[0], with);
    Row row;
    row.error = error_of(w.first, with.x, with.y);
    if (!(row.error < 1e-3)) throw std::runtime_error(concat(problem.name(), ": error ", row.error));
    row.name = problem.name();
    row.shape = problem.shape_text();
    row.config = format_name(problem.format);
    row.tokens = problem.tokens;
    if (problem.tokens == 1) row.psumbook_us = time_psumbook(w.packed[0], with.x, options_.isa, pool_) * 1e6;
    return row;
  }

  void multiply(const PackedMatrix& w, Operands& with) {
    const Status status =
        detail::gemm_with(w, MatrixView<const float>(with.x.data(), with.x.rows(), with.x.cols()),
                          MatrixView<float>(with.y.data(), with.y.rows(), with.y.cols()),
                          with.workspace.span(), pool_, options_.isa, detail::Regime::kAutomatic);
    if (!status.ok()) throw std::runtime_error(status.message());
  }

  void add_dense(const DenseWeights& w, Operands& with, std::vector<Contender>& contenders) {
    const Matrix want = with.x * w.copies[0].transpose();
    const auto check = [&](const char* name) {
      if (!((with.y - want).norm() <= 1e-4F * want.norm()))
        throw std::runtime_error(concat(name, ": wrong result"));
    };
    multiply_eigen(w.copies[0], with.x, with.y, pool_);
    check("eigen");
    contenders.push_back(timed("eigen", [&](std::size_t call) {
      multiply_eigen(w.copies[call % w.copies.size()], with.x, with.y, pool_);
    }));
    if (!openblas_.loaded()) return;
    openblas_.multiply(w.copies[0], with.x, with.y);
    check("openblas");
    contenders.push_back(timed("openblas", [&](std::size_t call) {
      openblas_.multiply(w.copies[call % w.copies.size()], with.x, with.y);
    }));
    contenders.back().rest = kPeerRest;
  }

  void add_ggml(Shape shape, Operands& with, std::list<std::unique_ptr<Ggml::Weights>>& blocks,
                std::vector<Contender>& contenders) {
    for (const Ggml::Type& type : Ggml::types()) {
      std::unique_ptr<Ggml::Weights> made = ggml_.weights(type, shape, random_);
      if (made == nullptr) continue;
      const Ggml::Weights& w = *blocks.emplace_back(std::move(made));
      ggml_.multiply(type, w, 0, with.x.data(), with.y.data(), pool_);
      const double error = ggml_.error(type, w, with.x.data(), with.y.data());
      // Its activations have 8 bits.
      if (!(error < 2e-2)) throw std::runtime_error(concat(type.name, ": error ", error));
      contenders.push_back(timed(type.name, [&](std::size_t call) {
        ggml_.multiply(type, w, call % w.copies.size(), with.x.data(), with.y.data(), pool_);
      }));
    }
  }

  void add_aqlm(Shape shape, const std::vector<const Problem*>& problems, std::list<Aqlm>& all,
                std::vector<Contender>& contenders) {
    std::vector<Format> formats;
    unpin(allowed_);  // their processes may use all of them
    for (const Problem* problem : problems) {
      if (problem->format.b != 8) continue;
      formats.push_back(problem->format);
      all.emplace_back(shape, problem->format, pool_.workers());
    }
    pin_workers(pool_, allowed_);
    auto format = formats.begin();
    for (Aqlm& aqlm : all) {
      const std::string name = aqlm_name(*format++);
      if (!aqlm.ready()) continue;
      contenders.push_back({name, [&aqlm](std::int64_t calls) { return aqlm.time(calls); }, kPeerRest});
    }
  }

  [[nodiscard]] static const Contender& by_name(const std::vector<Contender>& all, const std::string& name) {
    return *std::find_if(all.begin(), all.end(), [&](const Contender& c) { return c.name == name; });
  }

  static void print(const Row& row) {
    std::fprintf(stderr, "%s %.1f us (%.1f to %.1f), %.2f GB/s, %.0f%%, error %.1e", row.name.c_str(),
                 row.median_us, row.quarter_us, row.three_quarters_us, row.gb_per_s,
                 100.0 * row.share_of_read, row.error);
    for (const Peer& peer : row.peers) {
      std::fprintf(stderr, "; %s %.1f us, ratio %.2f", peer.name.c_str(), peer.median_us, peer.ratio);
    }
    std::fprintf(stderr, "\n");
  }

  static constexpr std::chrono::milliseconds kPeerRest{50};  // of threads that are not ours
  Options options_;
  Suite& suite_;
  cpu_set_t allowed_;
  ThreadPool pool_;
  test::Rng random_{1};
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
  app.add_option("--rounds", options.rounds, "Rounds in which each has a turn of a tenth of a second")
      ->check(CLI::Range(1, 1000));
  std::string isa;
  app.add_option("--isa", isa,
                 "Our kernels for this instruction set, not for this machine's: avx2, avx512 ...");
  app.add_flag("--quick", options.quick, "Turns of a tenth of the time");
  app.add_option("--json", json, "Write the results to this file");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  for (const Isa known : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi, Isa::kNeon}) {
    if (isa == isa_name(known)) options.isa = known;
  }
  if (!isa.empty() && (isa != isa_name(options.isa) || !isa_available(options.isa))) {
    std::fprintf(stderr, "--isa %s: this machine runs %s\n", isa.c_str(), isa_name(detect_isa()));
    return 2;
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
  const auto write = [&] {
    if (json.empty()) return;
    if (const Status status = write_json(suite, json); !status.ok())
      throw std::runtime_error(status.message());
  };
  for (const Shape shape : model_shapes()) {
    std::vector<Problem> of_shape;
    for (const Problem& problem : problems) {
      if (problem.shape.rows == shape.rows && problem.shape.cols == shape.cols) of_shape.push_back(problem);
    }
    if (!of_shape.empty()) bench.run(shape, of_shape, write);
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
