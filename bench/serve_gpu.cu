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
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <prefillshare/serve/cuda/card_split.cuh>
#include <prefillshare/serve/cuda/decode_worker.cuh>
#include <prefillshare/serve/cuda/prefill_runner.cuh>

#include "support/cost_tables.hpp"
#include "support/gpu_models.cuh"
#include "support/gpu_program.hpp"
#include "support/gpu_timing.cuh"
#include "support/line_plot.hpp"
#include "support/report.hpp"
#include "support/serve_plan.hpp"
#include "support/sim_card.hpp"

namespace {

using namespace codegemm::bench;
using nlohmann::json;

constexpr int kAgents = 4;
constexpr std::int64_t kMostRunning = 16;  // prefill jobs that share a step
constexpr std::int64_t kChunk = 4096;      // tokens of a step at most
constexpr std::int64_t kMostBatch = 32;    // sequences of a decode step

struct Options {
  std::string json_path, plot, plan, times;
  double memory_gib = 100.0;
  int seconds = 100000;
  bool quick = false;
  bool times_only = false;
};

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

/// The card in two parts, decode steps on the smaller one.
struct Parts {
  CardSplit split;
  DeviceWorkspace<__half> decode;

  [[nodiscard]] CardParts multiprocessors() const {
    return {split.rest().device.multiprocessors, split.part().device.multiprocessors};
  }
};

/// What all systems use, one at a time.
struct Card {
  Device device;
  cudaStream_t stream = nullptr;
  DeviceWorkspace<__half>* workspace = nullptr;
  CardShape shape;  // but for the blocks

  [[nodiscard]] DevicePlace<__half> whole() const { return {device, stream, workspace}; }
  /// Where prefills run beside decode steps.
  [[nodiscard]] DevicePlace<__half> rest(const Parts& parts) const {
    return {parts.split.rest().device, parts.split.rest().stream, workspace};
  }
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

  /// bases: one, or one for each agent. `blocks` of all pools together. parts: where decode steps run beside
  /// a prefill, or null.
  System(CardSharing sharing, const std::vector<std::shared_ptr<const DenseModel>>& bases,
         const std::vector<std::shared_ptr<const DecodeModel>>& decode, std::int64_t blocks, Parts* parts,
         const Card& card)
      : card_(card), split_(parts), sharing_(sharing), blocks_(blocks) {
    const std::size_t pools = sharing == CardSharing::kSeparate ? decode.size() : 1;
    std::vector<DevicePlace<__half>> further;
    if (parts != nullptr) {
      further.push_back({parts->split.part().device, parts->split.part().stream, &parts->decode});
    }
    for (std::size_t i = 0; i < pools; ++i) {
      auto pool = std::make_unique<Pool>(take(DeviceKvStorage<__half>::create(
          card.shape.kv, blocks / static_cast<std::int64_t>(pools), card.stream)));
      pool->allocator = take(DeviceKvAllocator<__half>::create(pool->storage));
      pool->worker = take(Decode::create(resources(*pool), std::int64_t{1} << 20, further));
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
      // Each has an input of its own: it is written again when the one before has left the host.
      batches_.push_back(std::make_unique<PrefillBatch>(
          take(PrefillBatch::create(kChunk, kMostRunning, kMostRunning * card.shape.max_context / 16))));
      const DevicePrefill<Dense, Dense> runner(*modules_.back(), resources(*pools_[pools > 1 ? i : 0]),
                                               *batches_.back(), card.shape.max_context);
      prefills_.push_back(std::make_unique<Prefill>(
          take(Prefill::create(runner, {kChunk, kMostRunning, std::int64_t{1} << 20}))));
      workers_.push_back(prefills_.back().get());
    }
    for (cudaEvent_t& event : events_)
      check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  }
  System(const System&) = delete;
  System& operator=(const System&) = delete;
  ~System() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  /// options: chunk_tokens, beside and admission are the caller's.
  CardOutcome run(const prefillshare::Workload& workload, CardOptions options) {
    if (options.beside && split_ == nullptr) throw std::runtime_error("a system on a card that is not split");
    options.sharing = sharing_;
    options.agents = kAgents;
    options.blocks = blocks_ / static_cast<std::int64_t>(pools_.size()) - 1;  // a padding page is set aside
    options.vocab_size = card_.shape.vocab_size;
    options.salt = ++runs_;
    check(cudaDeviceSynchronize(), "a system");
    Machine machine(*this);
    CardEngine<Prefill, Decode, Machine> engine(workers_, parts_, machine, options);
    CardOutcome out = engine.run(workload);
    machine.begin_prefill(false);
    machine.begin_decode(false);
    check(cudaDeviceSynchronize(), "a run");
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

  /// Time, and where the workers' steps run.
  class Machine : public RealClock {
   public:
    explicit Machine(System& system) : system_(system) {}

    void begin_prefill(bool part) {
      if (part == part_) return;
      part_ = part;
      const DevicePlace<__half> to = part ? system_.card_.rest(*system_.split_) : system_.card_.whole();
      for (Prefill* worker : system_.workers_) check(worker->runner().move_to(to));
      stream_ = to.stream;
    }
    [[nodiscard]] std::uint64_t end_prefill() {
      check(cudaEventRecord(event(tickets_), stream_), "cudaEventRecord");
      return tickets_++;
    }
    [[nodiscard]] bool done(std::uint64_t ticket) const {
      const cudaError_t code = cudaEventQuery(event(ticket));
      if (code == cudaErrorNotReady) {
        static_cast<void>(cudaGetLastError());
        return false;
      }
      check(code, "cudaEventQuery");
      return true;
    }
    void wait(std::uint64_t ticket) const {
      check(cudaEventSynchronize(event(ticket)), "cudaEventSynchronize");
    }
    void begin_decode(bool part) {
      if (part == decode_part_) return;
      decode_part_ = part;
      for (const auto& pool : system_.pools_) check(pool->worker->use(part ? 1 : 0));
    }

   private:
    // Two chunks are under way at most.
    [[nodiscard]] cudaEvent_t event(std::uint64_t ticket) const {
      return system_.events_[ticket % system_.events_.size()];
    }

    System& system_;
    bool part_ = false;
    bool decode_part_ = false;
    cudaStream_t stream_ = system_.card_.stream;
    std::uint64_t tickets_ = 0;
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
  Parts* split_;
  CardSharing sharing_;
  std::int64_t blocks_;
  std::uint64_t runs_ = 0;
  std::array<cudaEvent_t, 4> events_ = {};
  std::vector<std::unique_ptr<Pool>> pools_;
  std::vector<std::unique_ptr<DevicePrefillModule<Dense, Dense>>> modules_;
  std::vector<std::unique_ptr<PrefillBatch>> batches_;
  std::vector<std::unique_ptr<Prefill>> prefills_;
  std::vector<CardPool<Decode>> parts_;
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

/// Steps as the workers run them, behind contexts of pages that no step shares: alone on the card, or each on
/// its part while steps of the other kind run on the other.
class StepTimes {
 public:
  StepTimes(const Card& card, std::int64_t blocks, bool quick)
      : card_(card),
        quick_(quick),
        storage_(take(DeviceKvStorage<__half>::create(card.shape.kv, blocks, card.stream))),
        batch_(take(PrefillBatch::create(kChunk, 1, 16384 / 16))) {
    allocator_ = take(DeviceKvAllocator<__half>::create(storage_));
    fill(storage_.layer(0), static_cast<std::size_t>(blocks * storage_.bytes_per_block()) / sizeof(__half),
         1.0F, 0.0F, next_seed());
    check(cudaDeviceSynchronize(), "the pages");
  }

  template <class Model>
  void prefill(const std::string& weights, const Model& model, json& rows) {
    const auto place = card_.whole();
    for (const std::int64_t tokens : {16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096}) {
      for (const std::int64_t context : {0, 2048, 4096, 8192}) {
        if (quick_ && context > 4096) continue;
        add(rows, prefill_row(weights, tokens, context, prefill_seconds(model, tokens, context, place)));
      }
    }
  }
  template <class Model>
  void decode(const std::string& weights, const Model& model, json& rows) {
    const auto place = card_.whole();
    for (const std::int64_t batch : card_.shape.batch_sizes) {
      const std::int64_t longest = std::min<std::int64_t>(8192, storage_.blocks() / batch * 16);
      auto graph = capture(model, batch, longest, place);
      for (const std::int64_t context : {longest / 8, longest}) {
        const double seconds = decode_seconds(*graph, batch, context, longest, quick_ ? 3 : 8);
        add(rows, decode_row(weights, batch, batch * context, seconds));
      }
    }
    std::fflush(stdout);
  }

  /// Both on the parts of a card, while the other runs without end.
  template <class Base, class Model>
  void beside(const std::string& base_weights, const Base& base, const std::string& weights,
              const Model& model, Parts& parts, json& rows) {
    const CardParts sizes = parts.multiprocessors();
    const DevicePlace<__half> rest = card_.rest(parts);
    const DevicePlace<__half> part{parts.split.part().device, parts.split.part().stream, &parts.decode};
    {
      constexpr std::int64_t kBatch = 6;
      constexpr std::int64_t kContext = 6144;
      auto graph = capture(model, kBatch, kContext, part);
      const Background others(
          [&] { static_cast<void>(decode_seconds(*graph, kBatch, kContext, kContext, 1)); });
      for (const std::int64_t tokens : {16, 128, 256, 512, 1024, 2048, 4096}) {
        for (const std::int64_t context : {0, 4096, 8192}) {
          add(rows, prefill_row(base_weights, tokens, context, prefill_seconds(base, tokens, context, rest),
                                {sizes.prefill, weights}));
        }
      }
    }
    // A chunk of the usual size, the same again and again.
    constexpr std::int64_t kTokens = 2048;
    constexpr std::int64_t kBefore = 4096;
    const Chunk chunk(*this, kTokens, kBefore);
    std::map<std::int64_t, decltype(capture(model, 1, 16, part))> graphs;
    std::vector<std::int64_t> batches;
    for (const std::int64_t batch : {1, 2, 4, 6, 8, 12, 16, 24}) {
      if (batch > card_.shape.batch_sizes.back()) continue;
      batches.push_back(batch);
      graphs[batch] = capture(model, batch, longest_of(batch), part);
    }
    const Background others([&] { chunk.run(base, rest); });
    for (const std::int64_t batch : batches) {
      const std::int64_t longest = longest_of(batch);
      for (const std::int64_t context : {longest / 8, longest}) {
        const double seconds = decode_seconds(*graphs[batch], batch, context, longest, quick_ ? 3 : 6);
        add(rows, decode_row(weights, batch, batch * context, seconds, {sizes.decode, base_weights}));
      }
    }
  }

 private:
  /// Work without end, in a thread, until it is destroyed.
  class Background {
   public:
    explicit Background(std::function<void()> work)
        : thread_([this, work = std::move(work)] {
            try {
              while (!over_) work();
            } catch (const std::exception& error) {
              std::fprintf(stderr, "beside: %s\n", error.what());
              std::exit(1);
            }
          }) {}
    Background(const Background&) = delete;
    Background& operator=(const Background&) = delete;
    ~Background() {
      over_ = true;
      thread_.join();
    }

   private:
    std::atomic<bool> over_{false};
    std::thread thread_;  // last: it uses the others
  };
  /// The next tokens of a sequence.
  class Chunk {
   public:
    Chunk(StepTimes& times, std::int64_t tokens, std::int64_t context)
        : times_(times), ids_(static_cast<std::size_t>(tokens + context)) {
      prefillshare::SimRandom random(static_cast<std::uint64_t>(++times.chunks_));
      for (std::int32_t& id : ids_) {
        id = static_cast<std::int32_t>(random.between(0, times.card_.shape.vocab_size - 1));
      }
      sequence_ = take(times.allocator_->open(CacheKey{"step times", std::to_string(times.chunks_), ""}, {}));
      check(times.allocator_->reserve(sequence_, tokens + context));
      const std::span<const std::int32_t> all(ids_);
      check(times.allocator_->commit(sequence_, all.first(static_cast<std::size_t>(context))));
      new_ = all.subspan(static_cast<std::size_t>(context));
    }
    template <class Model>
    void run(const Model& model, const DevicePlace<__half>& place) const {
      const Sequence* const one = &sequence_;
      const auto sent = times_.batch_.send(std::span(&new_, 1), std::span(&one, 1),
                                           times_.card_.shape.vocab_size, place.stream);
      check(sent.status());
      check(forward(model, *sent, times_.storage_, {}, *place.workspace, place.device, place.stream));
      check(cudaStreamSynchronize(place.stream), "a chunk");
    }

   private:
    StepTimes& times_;
    std::vector<std::int32_t> ids_;
    std::span<const std::int32_t> new_;
    Sequence sequence_;
  };

  static void add(json& rows, json row) {
    std::printf("%s\n", row.dump().c_str());
    rows.push_back(std::move(row));
  }
  [[nodiscard]] std::int64_t longest_of(std::int64_t batch) const {
    return std::min<std::int64_t>(8192, (storage_.blocks() - 1024) / batch * 16);
  }
  template <class Model>
  [[nodiscard]] double prefill_seconds(const Model& model, std::int64_t tokens, std::int64_t context,
                                       const DevicePlace<__half>& place) {
    const Chunk chunk(*this, tokens, context);
    return seconds_of([&] { chunk.run(model, place); }, place.stream, quick_ ? 2 : 3);
  }
  template <class Model>
  [[nodiscard]] auto capture(const Model& model, std::int64_t batch, std::int64_t longest,
                             const DevicePlace<__half>& place) {
    return take(DecodeGraph<typename Model::Linear, typename Model::Head>::capture(
        model, storage_, *place.workspace, static_cast<int>(batch), batch * longest / 16, false, place.device,
        place.stream));
  }
  /// The sequences' pages are the pool's last ones.
  template <class Graph>
  [[nodiscard]] double decode_seconds(Graph& graph, std::int64_t batch, std::int64_t context,
                                      std::int64_t longest, int repeats) const {
    PageTable table;
    table.indptr.push_back(0);
    for (std::int64_t i = 0; i < batch; ++i) {
      for (std::int64_t page = 0; page < context / 16; ++page) {
        table.indices.push_back(static_cast<std::int32_t>(storage_.blocks() - 1 - i * (longest / 16) - page));
      }
      table.indptr.push_back(static_cast<std::int32_t>(table.indices.size()));
      table.last_page_len.push_back(16);
    }
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(batch), 1);
    DecodeStep step;
    step.table = &table;
    step.tokens = tokens;
    std::vector<double> times;
    for (int i = 0; i <= repeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      check(graph.launch(step));
      check(graph.wait().status());
      times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    times.erase(times.begin());
    return median(times);
  }

  const Card& card_;
  bool quick_;
  DeviceKvStorage<__half> storage_;
  PrefillBatch batch_;
  std::unique_ptr<DeviceKvAllocator<__half>> allocator_;
  std::int64_t chunks_ = 0;
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
        Parts& split = parts(part);
        add_codes(split.decode, split.split.part().device);
      }
      check_workers(base_[0], coded[0]);
      if (time) {
        StepTimes times(card_, options_.quick ? 8192 : 16384, options_.quick);
        times.decode(kCodes, *coded[0], rows_);
        for (const int part : parts_of(kCodes))
          times.beside("fp16", *base_[0], kCodes, *coded[0], parts(part), rows_);
        write();
      }
      sweep(CardSharing::kShared, kCodes, base_, coded, blocks_beside(weights));
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
    auto input = take(PrefillBatch::create(kChunk, kMostRunning, kMostRunning * 1024));
    Prefill prefill = take(Prefill::create(DevicePrefill<Dense, Dense>(base, on, input, 4096), {512, 4, 64}));
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
        const auto batch =
            take(input.send(std::span(&last, 1), std::span(&one, 1), card_.shape.vocab_size, card_.stream));
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
  Parts& parts(int multiprocessors) {
    auto& made = parts_[multiprocessors];
    if (made == nullptr) {
      auto split = take(CardSplit::create(card_.device, 0, multiprocessors));
      for (const CardPart& part : {split.part(), split.rest()}) {
        check(cublas_->add_stream(part.stream, part.device.multiprocessors));
      }
      auto memory = take(DeviceWorkspace<__half>::create(*base_[0], 64, 64, split.part().device));
      made = std::make_unique<Parts>(Parts{std::move(split), std::move(memory)});
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
    std::unique_ptr<System<DecodeModel>> system;
    for (std::size_t i = 0; i < mine.size(); ++i) {
      if (clock_.now() > options_.seconds) return;
      Parts* const split = mine[i].parts.decode > 0 ? &parts(mine[i].parts.decode) : nullptr;
      if (i == 0 || !mine[i].same_system(mine[i - 1])) {
        system.reset();  // its memory goes first
        system = std::make_unique<System<DecodeModel>>(sharing, bases, decode, blocks, split, card_);
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
                 "%-9s %-24s seed %llu %4.1f/s: %7.1f tokens/s (steady %7.1f), session p50 %6.2f p95 %6.2f s "
                 "(simulated %+.1f%% %+.1f%%), call p95 %5.2f s, hits %.3f, %5.1f s\n",
                 point.pattern.c_str(), label(row).c_str(), static_cast<unsigned long long>(point.seed),
                 point.rate, real.tokens_per_second, real.steady_tokens_per_second,
                 row["session_s"]["p50"].get<double>(), row["session_s"]["p95"].get<double>(),
                 100.0 * row["simulated_over_real"]["session_p50"].get<double>(),
                 100.0 * row["simulated_over_real"]["session_p95"].get<double>(),
                 row["call_s"]["p95"].get<double>(), real.hit_ratio(), real.seconds);
    rows_.push_back(std::move(row));
    write();
  }

  /// A system as it is printed.
  static std::string label(const json& row) {
    return row["system"].get<std::string>() + ", " + row["config"].get<std::string>() +
           (row["decode_multiprocessors"].get<int>() > 0 ? "" : ", one stream") +
           (row["largest_first"].get<bool>() ? "" : ", all modules at once") +
           (row["prefill_first"].get<bool>() ? "" : ", chunk and step in turn") +
           (row["admission"].get<bool>() ? "" : ", no admission");
  }

  /// Every system over the shared ones of the same conditions, and at the best of its runs of that pattern.
  void compare() {
    json ratios = json::array();
    std::map<std::string, double> best;  // pattern and system: tokens/s
    const auto is_point = [](const json& row) { return row.contains("system"); };
    const auto name = [](const json& row) { return row["name"].get<std::string>() + '/' + label(row); };
    for (const json& row : rows_) {
      if (!is_point(row)) continue;
      double& most = best[name(row)];
      most = std::max(most, row["tokens_per_s"].get<double>());
    }
    for (const json& shared : rows_) {
      if (!is_point(shared) || shared["system"] != "shared" || !shared["admission"].get<bool>()) continue;
      for (const json& other : rows_) {
        if (!is_point(other) || other["system"] == "shared") continue;
        const auto same = [&](const char* field) { return other[field] == shared[field]; };
        if (!same("name") || !same("sessions_per_s") || !same("sessions") || !same("seed") ||
            !same("largest_first") || !same("prefill_first") ||
            (other["decode_multiprocessors"].get<int>() > 0) !=
                (shared["decode_multiprocessors"].get<int>() > 0)) {
          continue;
        }
        ratios.push_back(
            {{"name", shared["name"].get<std::string>() + "_ratio"},
             {"config", shared["config"]},
             {"against", label(other)},
             {"sessions_per_s", shared["sessions_per_s"]},
             {"seed", shared["seed"]},
             {"throughput_ratio", ratio(shared["tokens_per_s"], other["tokens_per_s"])},
             {"steady_throughput_ratio", ratio(shared["steady_tokens_per_s"], other["steady_tokens_per_s"])},
             {"best_throughput_ratio", best[name(shared)] / best[name(other)]},
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
    for (const char* const pattern : {"react", "reflexion"}) {
      std::map<std::string, Points> speed, latency, simulated;
      for (const json& row : rows_) {
        if (!row.contains("system") || row["name"] != pattern || row["seed"] != 1 ||
            row["sessions"] != plan_.front().sessions || !row["admission"].get<bool>()) {
          continue;
        }
        const double rate = row["sessions_per_s"].get<double>();
        speed[label(row)].emplace_back(rate, row["tokens_per_s"].get<double>());
        latency[label(row)].emplace_back(rate, row["session_s"]["p95"].get<double>());
        simulated[label(row)].emplace_back(rate, row["simulated"]["session_s"]["p95"].get<double>());
      }
      if (speed.empty()) continue;
      const auto diagram = [](const std::string& title, std::map<std::string, Points>& lines) {
        Diagram out{title, "sessions/s that arrive", {}};
        for (auto& [name, points] : lines) {
          std::sort(points.begin(), points.end());
          out.lines.push_back({name, points});
        }
        return out;
      };
      Diagram late = diagram("p95 of a session from its arrival, s", latency);
      Diagram later = diagram("the same, simulated with the measured step times", simulated);
      late.logarithmic = later.logarithmic = true;
      check(
          write_text(plot_lines({diagram(std::string(pattern) + ": generated tokens/s", speed), late, later}),
                     options_.plot + "-" + pattern + ".svg"));
    }
  }

  const Options& options_;
  MemorySpeed memory_;
  RealClock clock_;
  Card card_;
  std::shared_ptr<Cublas> cublas_;
  std::map<int, std::unique_ptr<Parts>> parts_;  // by what was asked for
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
