// SPDX-License-Identifier: Apache-2.0
//
// bench/serve_gpu.cu - suite serve-gpu: four agents' sessions on one card, really executed: shapes of
// Llama-3.1-8B with random weights, tokens sampled and fed back, sessions arriving at random, lengths fixed.
// Each agent's model with a prefill and a cache of its own, against one base model and one cache for all
// (PrefillShare); the same memory for weights and KV together in each.
//
//   separate   4 models, each prefills for itself, its KV in a quarter of the memory
//   pooled     the same with one pool of KV, each model's prefixes cached in it
//   shared     5 models: a base that prefills, 4 that decode from its cache
//   shared with codes of 2 bits: the same, decode modules in m1v4g128; the memory that frees holds KV
//
// Sessions begin when their contexts have room at their longest (admission); "no admission" takes them as
// they come. Decode steps run beside the prefill, on a part of the card while there are both (CardSplit), or
// both in one stream. Step times are measured in the same run or taken from an earlier one, and the same
// sessions simulated with them (sim/).
//
// usage: serve-gpu [--json FILE] [--plot PREFIX] [--memory GIB] [--seconds N] [--quick] [--plan FILE]
//                  [--times FILE] [--times-only]
//   --plan        the runs, as serve_plan.hpp reads them, instead of the suite's own
//   --times       step times of an earlier run on such a card
//   --times-only  step times for the plan and no run of it
//   --seconds     no run is begun after so many
// What nvcc remarks on in Eigen and in the kernels of processors.
#pragma nv_diag_suppress 20012, 1675, 550, 2810

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/serve/cuda/card_split.cuh>

#include "support/gpu_models.cuh"
#include "support/gpu_program.hpp"
#include "support/gpu_serve_card.cuh"
#include "support/gpu_serve_check.cuh"
#include "support/gpu_serve_system.cuh"
#include "support/gpu_step_times.cuh"
#include "support/gpu_timing.cuh"
#include "support/report.hpp"
#include "support/serve_gpu_report.hpp"
#include "support/serve_plan.hpp"
#include "support/sim_card.hpp"

namespace {

using namespace codegemm::bench;
using nlohmann::json;

struct Options {
  std::string json_path, plot, plan, times;
  double memory_gib = 100.0;
  int seconds = 100000;
  bool quick = false;
  bool times_only = false;
};

/// All of a model, its embedding too.
template <class Model>
std::int64_t model_bytes(const Model& model) {
  return linear_bytes(model) + static_cast<std::int64_t>(model.embedding->bytes());
}

class Suite {
 public:
  Suite(const Options& options, const Device& device, cudaStream_t stream)
      : options_(options), memory_(measure_bandwidth(stream, device.multiprocessors)) {
    card_.device = device;
    card_.stream = stream;
    const ModelConfig c = config_of("8b");
    card_.shape.kv = kv_shape(c);
    card_.shape.vocab_size = c.vocab_size;
    card_.shape.max_context = 4096 + 2 * 4 * 640;
    card_.shape.most_running = kMostRunning;
    card_.shape.batch_sizes = batch_buckets(options.quick ? 8 : kMostBatch);
    const auto read = [](const std::string& path) {
      std::ifstream file(path);
      if (!file) throw std::runtime_error(path + ": cannot be read");
      return json::parse(file);
    };
    if (!options.plan.empty()) {
      const json plan = read(options.plan);
      for (const json& row : plan.at("rows")) plan_.push_back(point_of(row));
      if (plan_.empty()) throw std::runtime_error(options.plan + ": no runs");
    } else {
      plan_ = options.quick ? short_plan() : whole_plan();
    }
    // Models of one kind at a time: those of codes last.
    std::stable_partition(plan_.begin(), plan_.end(),
                          [](const ServePoint& p) { return p.weights == "fp16"; });
    if (options.times.empty()) return;
    const json times = read(options.times);
    for (const json& row : times.at("rows")) {
      if (row.at("name") == "prefill_step" || row.at("name") == "decode_step") rows_.push_back(row);
    }
  }

  void run() {
    const ModelConfig c = config_of("8b");
    cublas_ = take(Cublas::create());
    const auto memory = static_cast<std::int64_t>(options_.memory_gib * 1073741824.0);
    const auto blocks_beside = [&](std::int64_t weights) {
      if (weights >= memory) throw std::runtime_error("--memory is less than the weights take");
      return (memory - weights) / card_.shape.kv.bytes_per_block(sizeof(__half));
    };
    base_.push_back(std::make_shared<const DenseModel>(dense_model(c, cublas_)));
    const std::int64_t one = model_bytes(*base_[0]);
    auto workspace = take(DeviceWorkspace<__half>::create(*base_[0], kChunk, 64, card_.device));
    card_.workspace = &workspace;
    const bool time = options_.times.empty();
    if (uses("fp16")) {
      std::vector<std::shared_ptr<const DenseModel>> models;
      for (int i = 0; i < kAgents; ++i)
        models.push_back(std::make_shared<const DenseModel>(dense_model(c, cublas_)));
      const std::int64_t beside = blocks_beside(kAgents * one);
      if (time) {
        StepTimes times(card_, std::min<std::int64_t>(beside, options_.quick ? 8192 : 16384), options_.quick);
        times.prefill("fp16", *base_[0], rows_);
        times.decode("fp16", *models[0], rows_);
        for (const int part : parts_of("fp16"))
          times.beside("fp16", *base_[0], "fp16", *models[0], parts(part), rows_);
        write();
      }
      sweep(CardSharing::kShared, "fp16", base_, models, blocks_beside((kAgents + 1) * one));
      sweep(CardSharing::kSeparate, "fp16", models, models, beside);
      sweep(CardSharing::kPooled, "fp16", models, models, beside);
    }
    if (uses(kCodes)) {
      std::vector<std::shared_ptr<const CodedModel>> coded;
      std::int64_t weights = one;
      for (int i = 0; i < kAgents; ++i) {
        coded.push_back(std::make_shared<const CodedModel>(
            coded_model(c, take(codegemm::parse_format(kCodes)), cublas_)));
        weights += model_bytes(*coded.back());
      }
      // One workspace for both kinds of layers: that of codes has memory of its own that stays zeroed.
      const auto add_codes = [&](DeviceWorkspace<__half>& to, const Device& device) {
        auto of_codes = take(DeviceWorkspace<__half>::create(*coded[0], 64, 64, device));
        to.zeroed = std::move(of_codes.zeroed);
      };
      add_codes(workspace, card_.device);
      for (const int part : parts_of(kCodes)) {
        ServeParts& split = parts(part);
        add_codes(split.decode, split.split.part().device);
      }
      check_workers(card_, base_[0], coded[0]);
      if (time) {
        StepTimes times(card_, options_.quick ? 8192 : 16384, options_.quick);
        times.decode(kCodes, *coded[0], rows_);
        for (const int part : parts_of(kCodes))
          times.beside("fp16", *base_[0], kCodes, *coded[0], parts(part), rows_);
        write();
      }
      sweep(CardSharing::kShared, kCodes, base_, coded, blocks_beside(weights));
    }
    for (json& row : compare_systems(rows_)) {
      std::fprintf(stderr, "%s\n", row.dump().c_str());
      rows_.push_back(std::move(row));
    }
    write();
  }

 private:
  static constexpr const char* kCodes = "m1v4g128";

  /// The suite's runs: rates up to past saturation, other arrivals (seeds), more sessions than fit the memory
  /// at once, the other pattern; and what was tried besides: every module's step each time, and decode steps
  /// beside a prefill.
  [[nodiscard]] static std::vector<ServePoint> whole_plan() {
    std::vector<ServePoint> out;
    const auto add = [&](CardSharing sharing, double rate, std::uint64_t seed = 1,
                         const char* weights = "fp16") -> ServePoint& {
      ServePoint& point = out.emplace_back();
      point.sharing = sharing;
      point.weights = weights;
      point.rate = rate;
      point.seed = seed;
      return point;
    };
    for (const CardSharing sharing : {CardSharing::kShared, CardSharing::kSeparate}) {
      for (const double rate : {1.0, 2.0, 4.0, 8.0}) add(sharing, rate);
      for (const double rate : {2.0, 8.0}) add(sharing, rate, 2);
      add(sharing, 8.0).sessions = 48;
      add(sharing, 2.0).pattern = "reflexion";
      add(sharing, 8.0).prefill_first = false;
      add(sharing, 8.0).parts.decode = 24;
    }
    add(CardSharing::kSeparate, 8.0).admission = false;
    add(CardSharing::kPooled, 8.0);
    for (const double rate : {1.0, 2.0, 4.0, 8.0}) add(CardSharing::kShared, rate, 1, kCodes);
    add(CardSharing::kShared, 8.0, 2, kCodes);
    add(CardSharing::kShared, 2.0, 1, kCodes).pattern = "reflexion";
    return out;
  }
  [[nodiscard]] static std::vector<ServePoint> short_plan() {
    std::vector<ServePoint> out(2);
    out[1].sharing = CardSharing::kSeparate;
    for (ServePoint& point : out) point.rate = 8.0, point.sessions = 8;
    return out;
  }

  [[nodiscard]] bool uses(const std::string& weights) const {
    return std::any_of(plan_.begin(), plan_.end(), [&](const ServePoint& p) { return p.weights == weights; });
  }
  /// The sizes of parts that runs with such decode modules ask for.
  [[nodiscard]] std::vector<int> parts_of(const std::string& weights) const {
    std::vector<int> out;
    for (const ServePoint& point : plan_) {
      if (point.weights == weights && point.parts.decode > 0) out.push_back(point.parts.decode);
    }
    std::sort(out.begin(), out.end());
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
  }
  /// The card with so many multiprocessors set apart for decode steps.
  ServeParts& parts(int multiprocessors) {
    auto& made = parts_[multiprocessors];
    if (made == nullptr) {
      auto split = take(CardSplit::create(card_.device, 0, multiprocessors));
      for (const CardPart& part : {split.part(), split.rest()}) {
        check(cublas_->add_stream(part.stream, part.device.multiprocessors));
      }
      auto memory = take(DeviceWorkspace<__half>::create(*base_[0], 64, 64, split.part().device));
      made = std::make_unique<ServeParts>(ServeParts{std::move(split), std::move(memory)});
    }
    return *made;
  }

  template <class DecodeModel>
  void sweep(CardSharing sharing, const std::string& weights,
             const std::vector<std::shared_ptr<const DenseModel>>& bases,
             const std::vector<std::shared_ptr<const DecodeModel>>& decode, std::int64_t blocks) {
    if (options_.times_only) return;
    std::vector<ServePoint> mine;
    for (const ServePoint& point : plan_) {
      if (point.sharing == sharing && point.weights == weights) mine.push_back(point);
    }
    // One after the other of each system that is built.
    std::stable_sort(mine.begin(), mine.end(), [](const ServePoint& a, const ServePoint& b) {
      return a.parts.decode < b.parts.decode;
    });
    std::unique_ptr<ServeSystem<DecodeModel>> system;
    for (std::size_t i = 0; i < mine.size(); ++i) {
      if (clock_.now() > options_.seconds) return;
      ServeParts* const split = mine[i].parts.decode > 0 ? &parts(mine[i].parts.decode) : nullptr;
      if (i == 0 || !mine[i].same_system(mine[i - 1])) {
        system.reset();  // its memory goes first
        system = std::make_unique<ServeSystem<DecodeModel>>(sharing, bases, decode, blocks, split, card_);
        warm_up(*system, mine[i]);
      }
      if (split != nullptr) mine[i].parts = split->multiprocessors();
      run_point(*system, mine[i], blocks);
    }
  }
  template <class AnySystem>
  void warm_up(AnySystem& system, ServePoint point) {
    point.rate = 100.0;
    point.seed = 7;
    point.sessions = 2;
    static_cast<void>(system.run(point.workload(), point.options()));
  }
  template <class AnySystem>
  void run_point(AnySystem& system, const ServePoint& point, std::int64_t blocks) {
    const CardOutcome real = system.run(point.workload(), point.options());
    CardShape shape = card_.shape;
    shape.blocks = blocks;
    const auto start = std::chrono::steady_clock::now();
    const CardOutcome simulated = simulate_point(point, shape, rows_);
    json row = point_row(point);
    row["memory_gib"] = options_.memory_gib;
    row["kv_budget_bytes"] = blocks * card_.shape.kv.bytes_per_block(sizeof(__half));
    row["calls"] = real.calls.size();
    row.update(outcome_json(real));
    row["simulated"] = outcome_json(simulated);
    row["simulation_s"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const auto off = [&](const char* what, const char* share) {
      const double want = row[what][share].get<double>();
      return want > 0.0 ? row["simulated"][what][share].get<double>() / want - 1.0 : 0.0;
    };
    row["simulated_over_real"] = {{"session_p50", off("session_s", "p50")},
                                  {"session_p95", off("session_s", "p95")},
                                  {"call_p50", off("call_s", "p50")},
                                  {"call_p95", off("call_s", "p95")}};
    std::printf("%s\n", row.dump().c_str());
    std::fprintf(stderr,
                 "%-9s %-24s seed %llu %4.1f/s: %7.1f tokens/s (steady %7.1f), session p50 %6.2f p95 %6.2f s "
                 "(simulated %+.1f%% %+.1f%%), call p95 %5.2f s, hits %.3f, %5.1f s\n",
                 point.pattern.c_str(), system_label(row).c_str(),
                 static_cast<unsigned long long>(point.seed), point.rate, real.tokens_per_second,
                 real.steady_tokens_per_second, row["session_s"]["p50"].get<double>(),
                 row["session_s"]["p95"].get<double>(),
                 100.0 * row["simulated_over_real"]["session_p50"].get<double>(),
                 100.0 * row["simulated_over_real"]["session_p95"].get<double>(),
                 row["call_s"]["p95"].get<double>(), real.hit_ratio(), real.seconds);
    rows_.push_back(std::move(row));
    write();
  }

  void write() const {
    if (!options_.json_path.empty()) {
      const codegemm::bench::Suite frame{"serve-gpu", describe_card(card_.device), memory_, {}};
      check(write_text(frame_json(frame, rows_).dump(2) + '\n', options_.json_path));
    }
    if (!options_.plot.empty()) check(plot_serve_rows(rows_, options_.plot, plan_.front().sessions));
  }

  const Options& options_;
  MemorySpeed memory_;
  RealClock clock_;
  ServeCard card_;
  std::shared_ptr<Cublas> cublas_;
  std::map<int, std::unique_ptr<ServeParts>> parts_;  // by what was asked for
  std::vector<std::shared_ptr<const DenseModel>> base_;
  std::vector<ServePoint> plan_;
  json rows_ = json::array();
};

int program(int argc, char** argv) {
  Options options;
  parse(argc, argv,
        {{"--json", Option::value(options.json_path)},
         {"--plot", Option::value(options.plot)},
         {"--plan", Option::value(options.plan)},
         {"--times", Option::value(options.times)},
         {"--times-only", Option::flag(options.times_only)},
         {"--memory", Option::value([&](const char* text) { options.memory_gib = std::atof(text); })},
         {"--seconds", Option::value(options.seconds)},
         {"--quick", Option::flag(options.quick)}});
  const auto device = codegemm::cuda::query_device(0);
  check(device.status());
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  Suite suite(options, *device, stream);
  suite.run();
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run_suite("serve-gpu", argc, argv, program); }
