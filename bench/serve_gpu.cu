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
// they come. Step times are measured in the same run, and the same sessions simulated with them (sim/).
//
// usage: serve-gpu [--json FILE] [--plot PREFIX] [--memory GIB] [--sessions N] [--chunk TOKENS] [--seconds N]
//                  [--rates R,R,...] [--quick]
//   --seconds  no run is begun after so many
// What nvcc remarks on in Eigen and in the kernels of processors.
#pragma nv_diag_suppress 20012, 1675, 550, 2810

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <prefillshare/serve/cuda/decode_worker.cuh>
#include <prefillshare/serve/cuda/prefill_runner.cuh>

#include "support/cost_tables.hpp"
#include "support/gpu_models.cuh"
#include "support/gpu_program.hpp"
#include "support/gpu_timing.cuh"
#include "support/line_plot.hpp"
#include "support/report.hpp"
#include "support/sim_card.hpp"

namespace {

using namespace codegemm::bench;
using nlohmann::json;

constexpr int kAgents = 4;
constexpr std::int64_t kMostRunning = 16;  // prefill jobs that share a step

struct Options {
  std::string json_path, plot;
  double memory_gib = 100.0;
  int sessions = 24;
  int chunk = 4096;
  int seconds = 100000;
  std::vector<double> rates{1.0, 2.0, 8.0};
  bool quick = false;
};

/// The simulator's ReAct pattern (sim/workload.hpp) with answers of 16 tokens instead of 100 and two turns
/// instead of three or four, so that a session ends within seconds.
prefillshare::AgentPattern react() {
  return {"react", std::vector<prefillshare::AgentStep>(kAgents, {16, 500}), 4096, 0, 2, 2, 0.0};
}
/// The same of Reflexion: answers a sixth as long.
prefillshare::AgentPattern reflexion() {
  return {"reflexion", {{33, 500}, {10, 100}, {42, 150}, {25, 300}}, 4096, 0, 2, 2, 0.0};
}

class RealClock {
 public:
  using Clock = std::chrono::steady_clock;
  [[nodiscard]] double now() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  void wait_until(double seconds) const {
    std::this_thread::sleep_until(
        start_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
  }

 private:
  Clock::time_point start_ = Clock::now();
};

/// What all systems use, one at a time.
struct Card {
  Device device;
  cudaStream_t stream = nullptr;
  DeviceWorkspace<__half>* workspace = nullptr;
  PrefillBatch* batch = nullptr;
  CardShape shape;  // but for the blocks
};

template <class T>
T take(codegemm::Result<T> made) {
  check(made.status());
  return std::move(made).value();
}

/// A system on the card: its pools, its workers.
template <class DecodeModel>
class System {
 public:
  using Prefill = DevicePrefillWorker<Dense, Dense>;
  using Decode = DeviceDecodeWorker<__half>;
  using Engine = CardEngine<Prefill, Decode, RealClock>;

  /// bases: one, or one for each agent. `blocks` of all pools together.
  System(CardSharing sharing, const std::vector<std::shared_ptr<const DenseModel>>& bases,
         const std::vector<std::shared_ptr<const DecodeModel>>& decode, std::int64_t blocks,
         std::int64_t chunk, const Card& card)
      : card_(card), sharing_(sharing), blocks_(blocks) {
    const std::size_t pools = sharing == CardSharing::kSeparate ? decode.size() : 1;
    for (std::size_t i = 0; i < pools; ++i) {
      auto pool = std::make_unique<Pool>(take(DeviceKvStorage<__half>::create(
          card.shape.kv, blocks / static_cast<std::int64_t>(pools), card.stream)));
      pool->allocator = take(DeviceKvAllocator<__half>::create(pool->storage));
      pool->worker = take(Decode::create(resources(*pool), std::int64_t{1} << 20));
      for (std::size_t agent = 0; agent < decode.size(); ++agent) {
        if (pools > 1 && agent != i) continue;
        auto module = take(factorize(bases[0]->config, decode[agent]));
        check(pool->worker->add_module(std::move(module), card.shape.batch_sizes, card.shape.max_context)
                  .status());
      }
      parts_.push_back({pool->allocator.get(), pool->worker.get()});
      pools_.push_back(std::move(pool));
    }
    for (std::size_t i = 0; i < bases.size(); ++i) {
      modules_.push_back(std::make_unique<DevicePrefillModule<Dense, Dense>>(
          bases[i], CacheKey{bases.size() == 1 ? "base" : "agent " + std::to_string(i), "1", ""}));
      const DevicePrefill<Dense, Dense> runner(*modules_.back(), resources(*pools_[pools > 1 ? i : 0]),
                                               *card.batch, card.shape.max_context);
      prefills_.push_back(std::make_unique<Prefill>(
          take(Prefill::create(runner, {chunk, kMostRunning, std::int64_t{1} << 20}))));
      workers_.push_back(prefills_.back().get());
    }
  }

  /// options: chunk_tokens and admission are the caller's.
  CardOutcome run(const prefillshare::Workload& workload, CardOptions options) {
    options.sharing = sharing_;
    options.agents = kAgents;
    options.blocks = blocks_ / static_cast<std::int64_t>(pools_.size()) - 1;  // a padding page is set aside
    options.vocab_size = card_.shape.vocab_size;
    options.salt = ++runs_;
    check(cudaStreamSynchronize(card_.stream), "a system");
    RealClock clock;
    Engine engine(workers_, parts_, clock, options);
    CardOutcome out = engine.run(workload);
    check(cudaStreamSynchronize(card_.stream), "a run");
    for (const auto& pool : pools_) {
      check(pool->allocator->check_invariants());
      if (pool->allocator->stats().in_use_blocks != 1) throw std::runtime_error("a run has kept blocks");
    }
    return out;
  }

 private:
  struct Pool {
    explicit Pool(DeviceKvStorage<__half> of) : storage(std::move(of)) {}
    DeviceKvStorage<__half> storage;
    std::unique_ptr<DeviceKvAllocator<__half>> allocator;
    std::unique_ptr<Decode> worker;
  };

  [[nodiscard]] DeviceResources<__half> resources(Pool& pool) const {
    DeviceResources<__half> out;
    out.device = card_.device;
    out.stream = card_.stream;
    out.allocator = pool.allocator.get();
    out.storage = &pool.storage;
    out.workspace = card_.workspace;
    return out;
  }

  const Card& card_;
  CardSharing sharing_;
  std::int64_t blocks_;
  std::uint64_t runs_ = 0;
  std::vector<std::unique_ptr<Pool>> pools_;
  std::vector<std::unique_ptr<DevicePrefillModule<Dense, Dense>>> modules_;
  std::vector<std::unique_ptr<Prefill>> prefills_;
  std::vector<typename Engine::Pool> parts_;
  std::vector<Prefill*> workers_;
};

/// All of a model, its embedding too.
template <class Model>
std::int64_t model_bytes(const Model& model) {
  return linear_bytes(model) + static_cast<std::int64_t>(model.embedding->bytes());
}

double seconds_of(const std::function<void()>& work, cudaStream_t stream, int repeats) {
  std::vector<double> times;
  for (int i = 0; i < repeats + 1; ++i) {
    check(cudaStreamSynchronize(stream), "a step");
    const auto start = std::chrono::steady_clock::now();
    work();
    check(cudaStreamSynchronize(stream), "a step");
    if (i > 0)
      times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return median(times);
}

/// Steps as the workers run them, alone, behind contexts of pages that no step shares.
class StepTimes {
 public:
  StepTimes(const Card& card, std::int64_t blocks, bool quick)
      : card_(card),
        quick_(quick),
        storage_(take(DeviceKvStorage<__half>::create(card.shape.kv, blocks, card.stream))) {
    allocator_ = take(DeviceKvAllocator<__half>::create(storage_));
    fill(storage_.layer(0), static_cast<std::size_t>(blocks * storage_.bytes_per_block()) / sizeof(__half),
         1.0F, 0.0F, next_seed());
    check(cudaDeviceSynchronize(), "the pages");
  }

  template <class Model>
  void prefill(const std::string& weights, const Model& model, std::int64_t chunk, json& rows) {
    for (const std::int64_t tokens : {16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096}) {
      if (tokens > chunk) continue;
      for (const std::int64_t context : {0, 2048, 4096, 8192}) {
        if (quick_ && context > 4096) continue;
        prefillshare::SimRandom random(static_cast<std::uint64_t>(tokens + context));
        std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens + context));
        for (std::int32_t& id : ids) {
          id = static_cast<std::int32_t>(random.between(0, card_.shape.vocab_size - 1));
        }
        Sequence sequence =
            take(allocator_->open(CacheKey{"step times", codegemm::concat(tokens, ' ', context), ""}, {}));
        check(allocator_->reserve(sequence, tokens + context));
        const std::span<const std::int32_t> all(ids);
        check(allocator_->commit(sequence, all.first(static_cast<std::size_t>(context))));
        const auto chunk_ids = all.subspan(static_cast<std::size_t>(context));
        const Sequence* const one = &sequence;
        const double seconds = seconds_of(
            [&] {
              const auto sent = card_.batch->send(std::span(&chunk_ids, 1), std::span(&one, 1),
                                                  card_.shape.vocab_size, card_.stream);
              check(sent.status());
              check(forward(model, *sent, storage_, {}, *card_.workspace, card_.device, card_.stream));
            },
            card_.stream, quick_ ? 2 : 3);
        rows.push_back(prefill_row(weights, tokens, context, seconds));
        std::printf("%s\n", rows.back().dump().c_str());
      }
    }
  }
  template <class Model>
  void decode(const std::string& weights, const Model& model, json& rows) {
    using Graph = DecodeGraph<typename Model::Linear, typename Model::Head>;
    for (const std::int64_t batch : card_.shape.batch_sizes) {
      const std::int64_t longest = std::min<std::int64_t>(8192, storage_.blocks() / batch * 16);
      auto graph = take(Graph::capture(model, storage_, *card_.workspace, static_cast<int>(batch),
                                       batch * longest / 16, false, card_.device, card_.stream));
      for (const std::int64_t context : {longest / 8, longest}) {
        PageTable table;
        table.indptr.push_back(0);
        for (std::int64_t i = 0; i < batch; ++i) {
          for (std::int64_t page = 0; page < context / 16; ++page) {
            table.indices.push_back(static_cast<std::int32_t>(i * (longest / 16) + page));
          }
          table.indptr.push_back(static_cast<std::int32_t>(table.indices.size()));
          table.last_page_len.push_back(16);
        }
        const std::vector<std::int32_t> tokens(static_cast<std::size_t>(batch), 1);
        DecodeStep step;
        step.table = &table;
        step.tokens = tokens;
        const double seconds = seconds_of([&] { check(graph->launch(step)); }, card_.stream, quick_ ? 3 : 8);
        rows.push_back(decode_row(weights, batch, batch * context, seconds));
        std::printf("%s\n", rows.back().dump().c_str());
      }
    }
    std::fflush(stdout);
  }

 private:
  const Card& card_;
  bool quick_;
  DeviceKvStorage<__half> storage_;
  std::unique_ptr<DeviceKvAllocator<__half>> allocator_;
};

json spread(const std::vector<double>& values) {
  const prefillshare::Percentiles p = prefillshare::percentiles(values);
  return {{"p50", p.p50}, {"p95", p.p95}, {"p99", p.p99}, {"mean", p.mean}};
}
json measured(const CardOutcome& outcome) {
  return {{"tokens_per_s", outcome.tokens_per_second},
          {"steady_tokens_per_s", outcome.steady_tokens_per_second},
          {"session_s", spread(outcome.sessions)},
          {"call_s", spread(outcome.calls)},
          {"first_token_s", spread(outcome.first_token)},
          {"time_per_token_s", spread(outcome.per_token)},
          {"hit_ratio", outcome.hit_ratio()},
          {"prefilled_tokens", outcome.computed_tokens},
          {"output_tokens", outcome.output_tokens},
          {"kv_bytes_in_use", outcome.kv_bytes_in_use},
          {"kv_bytes_held", outcome.kv_bytes_held},
          {"sessions_at_once", outcome.most_sessions},
          {"refused_starts", outcome.refused_starts},
          {"steps", outcome.steps},
          {"seconds", outcome.seconds},
          {"given_up", outcome.given_up}};
}

/// A point of the sweep: what was run, and how to run it again in simulated time.
struct Setting {
  std::string system;   // as it is printed
  std::string weights;  // of the decode modules
  CardSharing sharing = CardSharing::kShared;
  bool admission = true;
  std::int64_t blocks = 0;
};

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
    card_.shape.batch_sizes = batch_buckets(options.quick ? 8 : std::min(options.sessions, 64));
    batch_.emplace(
        take(PrefillBatch::create(options.chunk, kMostRunning, kMostRunning * card_.shape.max_context / 16)));
    card_.batch = &*batch_;
    patterns_.push_back(react());
    if (!options.quick) patterns_.push_back(reflexion());
  }

  void run() {
    const ModelConfig c = config_of("8b");
    auto cublas = take(Cublas::create());
    const auto bytes_per_block = card_.shape.kv.bytes_per_block(sizeof(__half));
    const auto memory = static_cast<std::int64_t>(options_.memory_gib * 1073741824.0);
    const auto blocks_beside = [&](std::int64_t weights) {
      if (weights >= memory) throw std::runtime_error("--memory is less than the weights take");
      return (memory - weights) / bytes_per_block;
    };
    std::vector<std::shared_ptr<const DenseModel>> base{
        std::make_shared<const DenseModel>(dense_model(c, cublas))};
    const std::int64_t one = model_bytes(*base[0]);
    auto workspace = take(DeviceWorkspace<__half>::create(*base[0], options_.chunk, 64, card_.device));
    card_.workspace = &workspace;
    const auto dense_models = [&] {
      std::vector<std::shared_ptr<const DenseModel>> out;
      for (int i = 0; i < kAgents; ++i)
        out.push_back(std::make_shared<const DenseModel>(dense_model(c, cublas)));
      return out;
    };
    const std::int64_t beside = blocks_beside(kAgents * one);
    {
      const auto models = dense_models();
      {
        StepTimes times(card_, std::min<std::int64_t>(beside, options_.quick ? 8192 : 16384), options_.quick);
        times.prefill("fp16", *base[0], options_.chunk, rows_);
        times.decode("fp16", *models[0], rows_);
      }
      sweep({"shared", "fp16", CardSharing::kShared, true, blocks_beside((kAgents + 1) * one)}, base, models);
      sweep({"separate", "fp16", CardSharing::kSeparate, true, beside}, models, models);
    }
    {
      std::vector<std::shared_ptr<const CodedModel>> coded;
      std::int64_t weights = one;
      for (int i = 0; i < kAgents; ++i) {
        coded.push_back(std::make_shared<const CodedModel>(
            coded_model(c, take(codegemm::parse_format("m1v4g128")), cublas)));
        weights += model_bytes(*coded.back());
      }
      // One workspace for both kinds of layers: that of codes has memory of its own that stays zeroed.
      auto of_codes = take(DeviceWorkspace<__half>::create(*coded[0], 64, 64, card_.device));
      workspace.zeroed = std::move(of_codes.zeroed);
      check_workers(base[0], coded[0]);
      {
        StepTimes times(card_, options_.quick ? 8192 : 16384, options_.quick);
        times.decode("m1v4g128", *coded[0], rows_);
      }
      sweep({"shared", "m1v4g128", CardSharing::kShared, true, blocks_beside(weights)}, base, coded);
    }
    {
      const auto models = dense_models();
      sweep({"pooled", "fp16", CardSharing::kPooled, true, beside}, models, models);
    }
    compare();
    write();
  }

  /// One worker with a module of fp16 and one of codes: the first tokens of its batches are those of a plain
  /// pass of each module over the context's last token, but for what rounding may turn.
  void check_workers(const std::shared_ptr<const DenseModel>& dense,
                     const std::shared_ptr<const CodedModel>& coded) {
    constexpr int kContexts = 4;
    constexpr std::int64_t kTokens = 333;
    auto storage = take(
        DeviceKvStorage<__half>::create(card_.shape.kv, 4 * kContexts * (kTokens / 16 + 2), card_.stream));
    auto allocator = take(DeviceKvAllocator<__half>::create(storage));
    const DeviceResources<__half> on{card_.device, card_.stream, allocator.get(), &storage, card_.workspace};
    const DevicePrefillModule<Dense, Dense> base(dense, CacheKey{"base", "1", ""});
    using Prefill = DevicePrefillWorker<Dense, Dense>;
    Prefill prefill =
        take(Prefill::create(DevicePrefill<Dense, Dense>(base, on, *card_.batch, 4096), {512, 4, 64}));
    auto decode = take(DeviceDecodeWorker<__half>::create(on, 64));
    const std::vector<std::int64_t> sizes{1, kContexts + 1};
    check(decode->add_module(take(factorize(dense->config, dense)), sizes, 4096).status());
    check(decode->add_module(take(factorize(dense->config, coded)), sizes, 4096).status());
    std::vector<std::vector<std::int32_t>> contexts;
    for (int i = 0; i < kContexts; ++i) {
      prefillshare::SimRandom random(static_cast<std::uint64_t>(i) + 77);
      auto& context = contexts.emplace_back(static_cast<std::size_t>(kTokens + i));
      for (std::int32_t& id : context)
        id = static_cast<std::int32_t>(random.between(0, card_.shape.vocab_size - 1));
      prefillshare::PrefillJob job;
      job.id = static_cast<std::uint64_t>(i);
      job.tokens.assign(context.begin(), context.end() - 1);
      check(prefill.submit(std::move(job)));
    }
    std::vector<Sequence> caches(kContexts);
    while (!prefill.idle()) {
      prefill.step(
          0, [](const prefillshare::PagesReady&) { return Status(); },
          [&](prefillshare::PrefillResult&& result) {
            check(result.status);
            caches[result.id] = std::move(result.cache);
          });
    }
    std::map<std::uint64_t, std::int32_t> first;
    for (std::uint64_t id = 0; id < 2 * kContexts; ++id) {
      prefillshare::DecodeRequest request;
      request.id = id;
      request.module = static_cast<prefillshare::ModuleId>(id / kContexts);
      request.last_token = contexts[id % kContexts].back();
      request.max_tokens = 2;
      check(decode->start(std::move(request), caches[id % kContexts]));
    }
    while (decode->active() > 0) {
      decode->step(0, [&](const prefillshare::DecodeEvent& event) {
        check(event.status);
        first.try_emplace(event.id, event.token);
      });
    }
    int same = 0;
    const auto plain = [&](const auto& model, std::uint64_t module) {
      for (std::uint64_t i = 0; i < kContexts; ++i) {
        // The base's cache for both, and the module's own pass over the last token.
        Sequence fork = take(allocator->fork(caches[i]));
        check(allocator->reserve(fork, 1));
        const Sequence* const one = &fork;
        const std::span<const std::int32_t> last(&contexts[i].back(), 1);
        const MatrixView<float> logits(card_.workspace->logits.data(), 1, card_.shape.vocab_size);
        const auto batch = take(
            card_.batch->send(std::span(&last, 1), std::span(&one, 1), card_.shape.vocab_size, card_.stream));
        check(forward(model, batch, storage, logits, *card_.workspace, card_.device, card_.stream));
        check(cudaStreamSynchronize(card_.stream), "a pass");
        std::vector<float> row(static_cast<std::size_t>(card_.shape.vocab_size));
        check(cudaMemcpy(row.data(), logits.data, row.size() * sizeof(float), cudaMemcpyDeviceToHost),
              "cudaMemcpy");
        const auto most = std::max_element(row.begin(), row.end());
        if (!std::isfinite(*most)) throw std::runtime_error("a logit is not finite");
        same += first.at(module * kContexts + i) == most - row.begin() ? 1 : 0;
      }
    };
    plain(*dense, 0);
    plain(*coded, 1);
    std::fprintf(stderr, "workers: %d of %d first tokens are those of plain passes\n", same, 2 * kContexts);
    if (same < 2 * kContexts - 2)
      throw std::runtime_error("the workers choose other tokens than plain passes");
  }

 private:
  using Points = std::vector<std::pair<double, double>>;

  template <class DecodeModel>
  void sweep(const Setting& setting, const std::vector<std::shared_ptr<const DenseModel>>& bases,
             const std::vector<std::shared_ptr<const DecodeModel>>& decode) {
    System<DecodeModel> system(setting.sharing, bases, decode, setting.blocks, options_.chunk, card_);
    warm_up(system);
    for (const prefillshare::AgentPattern& pattern : patterns_) {
      for (const double rate : options_.rates) {
        // Not everything at every rate: a run behind the pooled baseline takes half a minute.
        const bool pooled = setting.sharing == CardSharing::kPooled;
        if (pattern.name != "react" && (pooled || rate != options_.rates[options_.rates.size() / 2]))
          continue;
        if (pooled && rate != options_.rates.back()) continue;
        point(system, setting, pattern, rate);
      }
    }
    if (setting.sharing == CardSharing::kPooled || setting.weights != "fp16") return;
    Setting open = setting;
    open.admission = false;
    point(system, open, patterns_[0], options_.rates.back());
  }
  template <class AnySystem>
  void warm_up(AnySystem& system) {
    auto pattern = patterns_[0];
    pattern.fewest_turns = pattern.most_turns = 1;
    const auto workload = take(prefillshare::make_workload(pattern, 2, 100.0, 7));
    CardOptions how;
    how.chunk_tokens = options_.chunk;
    static_cast<void>(system.run(workload, how));
  }
  template <class AnySystem>
  void point(AnySystem& system, const Setting& setting, const prefillshare::AgentPattern& pattern,
             double rate) {
    if (clock_.now() > options_.seconds) return;
    const int sessions = pattern.name == "react" ? options_.sessions : std::max(options_.sessions * 2 / 3, 1);
    const prefillshare::Workload workload = take(prefillshare::make_workload(pattern, sessions, rate, 1));
    CardOptions how;
    how.sharing = setting.sharing;
    how.agents = kAgents;
    how.chunk_tokens = options_.chunk;
    how.admission = setting.admission;
    const CardOutcome real = system.run(workload, how);
    CardShape shape = card_.shape;
    shape.blocks = setting.blocks;
    const auto cost = take(cost_from_rows(rows_, "fp16", setting.weights));
    const auto start = std::chrono::steady_clock::now();
    const CardOutcome simulated = simulate_card(shape, cost, workload, how);
    json row{{"name", pattern.name},
             {"system", setting.system},
             {"config", setting.weights},
             {"admission", setting.admission},
             {"sessions_per_s", rate},
             {"sessions", sessions},
             {"agents", kAgents},
             {"calls", std::ssize(workload.calls)},
             {"prompt_tokens", pattern.prompt_tokens},
             {"turns", pattern.fewest_turns},
             {"answer_tokens", json::array()},
             {"observation_tokens", json::array()},
             {"memory_gib", options_.memory_gib},
             {"kv_budget_bytes", setting.blocks * card_.shape.kv.bytes_per_block(sizeof(__half))},
             {"chunk_tokens", options_.chunk}};
    for (const prefillshare::AgentStep& step : pattern.agents) {
      row["answer_tokens"].push_back(step.output);
      row["observation_tokens"].push_back(step.observation);
    }
    row.update(measured(real));
    row["simulated"] = measured(simulated);
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
                 "%-9s %-8s %-8s%s %4.1f/s: %7.1f tokens/s, session p50 %6.2f p95 %6.2f s (simulated %+.1f%% "
                 "%+.1f%%), "
                 "call p95 %5.2f s, hits %.3f, %5.1f s\n",
                 pattern.name.c_str(), setting.system.c_str(), setting.weights.c_str(),
                 setting.admission ? "" : " no admission", rate, real.tokens_per_second,
                 row["session_s"]["p50"].get<double>(), row["session_s"]["p95"].get<double>(),
                 100.0 * row["simulated_over_real"]["session_p50"].get<double>(),
                 100.0 * row["simulated_over_real"]["session_p95"].get<double>(),
                 row["call_s"]["p95"].get<double>(), real.hit_ratio(), real.seconds);
    rows_.push_back(std::move(row));
    write();
  }

  /// Every system over the shared one in fp16 at each rate, and at the best of its rates.
  void compare() {
    json ratios = json::array();
    std::map<std::string, double> best;  // pattern and system: tokens/s
    const auto label = [](const json& row) {
      return row["system"].get<std::string>() + ' ' + row["config"].get<std::string>() +
             (row["admission"].get<bool>() ? "" : ", no admission");
    };
    const auto is_point = [](const json& row) { return row.contains("system"); };
    for (const json& row : rows_) {
      if (!is_point(row)) continue;
      double& most = best[row["name"].get<std::string>() + '/' + label(row)];
      most = std::max(most, row["tokens_per_s"].get<double>());
    }
    for (const json& shared : rows_) {
      if (!is_point(shared) || shared["system"] != "shared" || !shared["admission"].get<bool>()) continue;
      for (const json& other : rows_) {
        if (!is_point(other) || other["name"] != shared["name"] || other["system"] == "shared" ||
            other["sessions_per_s"] != shared["sessions_per_s"]) {
          continue;
        }
        const std::string pattern = shared["name"].get<std::string>();
        ratios.push_back(
            {{"name", pattern + "_ratio"},
             {"config", shared["config"]},
             {"against", label(other)},
             {"sessions_per_s", shared["sessions_per_s"]},
             {"throughput_ratio", ratio(shared["tokens_per_s"], other["tokens_per_s"])},
             {"steady_throughput_ratio", ratio(shared["steady_tokens_per_s"], other["steady_tokens_per_s"])},
             {"best_throughput_ratio",
              best[pattern + '/' + label(shared)] / best[pattern + '/' + label(other)]},
             {"p95_ratio", ratio(other["session_s"]["p95"], shared["session_s"]["p95"])},
             {"call_p95_ratio", ratio(other["call_s"]["p95"], shared["call_s"]["p95"])},
             {"first_token_p95_ratio",
              ratio(other["first_token_s"]["p95"], shared["first_token_s"]["p95"])}});
      }
    }
    for (json& row : ratios) {
      std::fprintf(stderr, "%s\n", row.dump().c_str());
      rows_.push_back(std::move(row));
    }
  }
  static double ratio(const json& a, const json& b) {
    return a.get<double>() / std::max(b.get<double>(), 1e-12);
  }

  void write() const {
    if (!options_.json_path.empty()) {
      const codegemm::bench::Suite frame{"serve-gpu", describe_card(card_.device), memory_, {}};
      check(write_text(frame_json(frame, rows_).dump(2) + '\n', options_.json_path));
    }
    if (options_.plot.empty()) return;
    for (const prefillshare::AgentPattern& pattern : patterns_) {
      std::map<std::string, Points> speed, latency, simulated;
      for (const json& row : rows_) {
        if (!row.contains("system") || row["name"] != pattern.name || !row["admission"].get<bool>()) continue;
        const std::string name = row["system"].get<std::string>() + ", " + row["config"].get<std::string>();
        const double rate = row["sessions_per_s"].get<double>();
        speed[name].emplace_back(rate, row["tokens_per_s"].get<double>());
        latency[name].emplace_back(rate, row["session_s"]["p95"].get<double>());
        simulated[name].emplace_back(rate, row["simulated"]["session_s"]["p95"].get<double>());
      }
      if (speed.empty()) continue;
      const auto diagram = [](const std::string& title, const std::map<std::string, Points>& lines) {
        Diagram out{title, "sessions/s that arrive", {}};
        for (const auto& [name, points] : lines) out.lines.push_back({name, points});
        return out;
      };
      Diagram late = diagram("p95 of a session from its arrival, s", latency);
      Diagram later = diagram("the same, simulated with the measured step times", simulated);
      late.logarithmic = later.logarithmic = true;
      check(write_text(plot_lines({diagram(pattern.name + ": generated tokens/s", speed), late, later}),
                       options_.plot + "-" + pattern.name + ".svg"));
    }
  }

  const Options& options_;
  MemorySpeed memory_;
  RealClock clock_;
  Card card_;
  std::optional<PrefillBatch> batch_;
  std::vector<prefillshare::AgentPattern> patterns_;
  json rows_ = json::array();
};

int program(int argc, char** argv) {
  Options options;
  parse(argc, argv,
        {{"--json", Option::value(options.json_path)},
         {"--plot", Option::value(options.plot)},
         {"--memory", Option::value([&](const char* text) { options.memory_gib = std::atof(text); })},
         {"--sessions", Option::value(options.sessions)},
         {"--chunk", Option::value(options.chunk)},
         {"--seconds", Option::value(options.seconds)},
         {"--rates", Option::value([&](const char* text) {
            options.rates.clear();
            std::istringstream fields(text);
            for (std::string field; std::getline(fields, field, ',');)
              options.rates.push_back(std::atof(field.c_str()));
          })},
         {"--quick", Option::flag(options.quick)}});
  if (options.sessions < 1 || options.chunk < 16 || options.rates.empty() ||
      !std::all_of(options.rates.begin(), options.rates.end(), [](double rate) { return rate > 0.0; })) {
    throw std::runtime_error("--sessions from 1, --chunk from 16 on, --rates above 0");
  }
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
