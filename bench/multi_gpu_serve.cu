// SPDX-License-Identifier: Apache-2.0
//
// bench/multi_gpu_serve.cu - suite multi-gpu-serve: sessions of four agents on a prefill GPU and a decode
// GPU, really executed at the shapes of Llama-3.1-8B: base caches go to the other by peer copy, layer
// by layer, while the next is computed. Decode modules in 2 bits; random weights, lengths fixed.
//
//   separate   each agent's model prefills for itself (4 models on the prefill GPU), its caches in a quarter
//              of the KV memory
//   pooled     the same models, their caches in one pool
//   shared     one base model prefills for all
//
// All sessions are there at once: throughput and latency past saturation. The prefill GPU's memory for
// weights and KV together is the same in all.
//
// usage: multi-gpu-serve [--json FILE] [--quick] [--sessions N]
//   FILE keeps its other rows
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <prefillshare/serve/cuda/decode_worker.cuh>
#include <prefillshare/serve/cuda/prefill_runner.cuh>

#include "support/multi_gpu_common.cuh"

namespace {

using namespace codegemm::bench;
using namespace codegemm::bench::multi;

using Base = DeviceLlama<Dense>;
using Decode = DeviceLlama<Coded, Dense>;
using Prefill = DevicePrefillWorker<Dense, Dense>;

constexpr int kAgents = 4;
constexpr std::int64_t kContext = 4096, kAnswer = 16, kObserved = 500, kTurns = 2;
constexpr std::int64_t kLongest = kContext + kTurns * kAgents * (kAnswer + kObserved);
constexpr std::int64_t kChunk = 2048, kMostRunning = 8;

struct ServeOptions {
  std::string json;
  bool quick = false;
  int sessions = 16;
};

// What the decode side asks of the prefill side.
struct Job {
  std::uint64_t id = 0;
  int agent = 0;
  std::vector<std::int32_t> tokens;
  HandoffGrant grant;
};

class Inbox {
 public:
  void put(Job job) {
    const std::lock_guard guard(lock_);
    jobs_.push_back(std::move(job));
  }
  std::deque<Job> take_all() {
    const std::lock_guard guard(lock_);
    return std::exchange(jobs_, {});
  }

 private:
  std::mutex lock_;
  std::deque<Job> jobs_;
};

struct Outcome {
  double seconds = 0.0;
  std::int64_t answers = 0;
  std::int64_t computed = 0, reused = 0;  // tokens of prefill
  double sent_bytes = 0.0;
  std::vector<double> sessions_s, first_token_s;
};

double percentile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
}

struct System {
  const char* name;
  int bases;  // prefill models
  int pools;  // of KV, of one size: one, or one for each base
};

// A prefill GPU with one base model or one for each agent.
class PrefillHalf {
 public:
  using Transport = PeerPageTransport<__half, Table>;

  PrefillHalf(const ModelConfig& config, const System& system, std::int64_t bytes, bool quick)
      : device_(device_of(0)), copies_(true) {
    auto cublas = take(Cublas::create());
    std::int64_t weights = 0;
    for (int i = 0; i < system.bases; ++i) {
      models_.push_back(std::make_shared<const Base>(
          RandomLlama(cublas, static_cast<std::uint64_t>(1 + 1000 * i)).dense_model(config)));
      weights +=
          linear_bytes(*models_.back()) + static_cast<std::int64_t>(models_.back()->embedding->bytes());
    }
    const std::int64_t block = kv_shape(config).bytes_per_block(sizeof(__half));
    const std::int64_t blocks = (quick ? bytes / 8 : bytes - weights) / block;
    for (int i = 0; i < system.pools; ++i)
      pools_.push_back(std::make_unique<KvPool>(config, blocks / system.pools, compute_.get));
    workspace_ = std::make_unique<DeviceWorkspace<__half>>(
        take(DeviceWorkspace<__half>::create(*models_[0], kChunk, kMostRunning, device_)));
    batch_ = std::make_unique<PrefillBatch>(
        take(PrefillBatch::create(kChunk, kMostRunning, kMostRunning * (kLongest / 16 + 1))));
    DeviceResources<__half> on;
    on.device = device_;
    on.stream = compute_.get;
    on.workspace = workspace_.get();
    for (int i = 0; i < system.bases; ++i) {
      on.allocator = pool_of(i).allocator.get();
      on.storage = &pool_of(i).storage;
      modules_.push_back(std::make_unique<DevicePrefillModule<Dense, Dense>>(
          models_[static_cast<std::size_t>(i)], CacheKey{codegemm::concat("base ", i), "1", ""}));
      const DevicePrefill<Dense, Dense> runner(*modules_.back(), on, *batch_, kLongest);
      workers_.push_back(
          std::make_unique<Prefill>(take(Prefill::create(runner, {kChunk, kMostRunning, 1 << 20}))));
    }
  }
  const CacheKey& key(int agent) const { return modules_[worker_of(agent)]->key(); }
  std::int64_t blocks() const {
    return pools_[0]->storage.blocks() * static_cast<std::int64_t>(pools_.size());
  }
  cudaStream_t copies() const { return copies_.get; }

  // Until `over`: takes jobs, computes, sends. `lock` guards the transport, which the decode side polls.
  void run(Inbox& inbox, Transport& transport, std::mutex& lock, const std::atomic<bool>& over,
           Outcome& out) {
    use(0);
    std::map<std::uint64_t, HandoffGrant> grants;
    while (!over.load()) {
      for (Job& job : inbox.take_all()) {
        grants.emplace(job.id, job.grant);
        PrefillJob wanted;
        wanted.id = job.id;
        wanted.tokens = std::move(job.tokens);
        wanted.pages_from = job.grant.cached_tokens;
        check(workers_[worker_of(job.agent)]->submit(std::move(wanted)));
      }
      bool idle = true;
      for (std::size_t i = 0; i < workers_.size(); ++i) {
        if (workers_[i]->idle()) continue;
        idle = false;
        const KvPool& pool = pool_of(static_cast<int>(i));
        workers_[i]->step(
            0,
            [&](const PagesReady& pages) {
              const HandoffGrant& grant = grants.at(pages.job);
              PageRun run;
              run.handoff = grant.id;
              run.layer = pages.layer;
              run.first = pages.first_block - grant.cached_tokens / 16;
              run.blocks = pages.blocks;
              run.last_tokens = pages.last_tokens;
              out.sent_bytes += static_cast<double>(pages.blocks.size()) *
                                static_cast<double>(pages_of(pool.storage, 0).bytes);
              const std::lock_guard guard(lock);
              return transport.send(pool.storage, run, compute_.get);
            },
            [&](PrefillResult&& result) {
              check(result.status);
              out.computed += result.computed_tokens;
              out.reused += result.reused_tokens;
              grants.erase(result.id);
              // Its pages may be on their way still: it goes when the copies behind it are through.
              Kept kept{std::move(result.cache), nullptr};
              check(cudaEventCreateWithFlags(&kept.copied, cudaEventDisableTiming), "cudaEventCreate");
              check(cudaEventRecord(kept.copied, copies_.get), "cudaEventRecord");
              kept_.push_back(std::move(kept));
            });
      }
      while (!kept_.empty() && cudaEventQuery(kept_.front().copied) == cudaSuccess) drop_first();
      if (idle) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    copies_.wait();
    while (!kept_.empty()) drop_first();
    for (const auto& pool : pools_) {
      check(pool->allocator->check_invariants());
      if (pool->allocator->stats().in_use_blocks != 0)
        throw std::runtime_error("the prefill GPU keeps blocks");
    }
  }

 private:
  struct Kept {
    Sequence cache;
    cudaEvent_t copied;
  };
  void drop_first() {
    check(cudaEventDestroy(kept_.front().copied), "cudaEventDestroy");
    kept_.pop_front();
  }
  KvPool& pool_of(int base) const { return *pools_[pools_.size() > 1 ? static_cast<std::size_t>(base) : 0]; }
  std::size_t worker_of(int agent) const { return workers_.size() > 1 ? static_cast<std::size_t>(agent) : 0; }

  Device device_;
  Stream compute_;
  Stream copies_;
  std::vector<std::shared_ptr<const Base>> models_;
  std::vector<std::unique_ptr<KvPool>> pools_;
  std::unique_ptr<DeviceWorkspace<__half>> workspace_;
  std::unique_ptr<PrefillBatch> batch_;
  std::vector<std::unique_ptr<DevicePrefillModule<Dense, Dense>>> modules_;
  std::vector<std::unique_ptr<Prefill>> workers_;
  std::deque<Kept> kept_;
};

// The decode GPU with the agents' decode modules, and the sessions.
class DecodeHalf {
 public:
  DecodeHalf(const ModelConfig& config, int number, std::int64_t blocks, int sessions)
      : number_(number), device_(device_of(number)) {
    pool_ = std::make_unique<KvPool>(config, blocks, stream_.get);
    auto cublas = take(Cublas::create());
    std::vector<std::shared_ptr<const Decode>> models;
    for (int i = 0; i < kAgents; ++i)
      models.push_back(std::make_shared<const Decode>(
          RandomLlama(cublas, static_cast<std::uint64_t>(100000 + 1000 * i)).coded_model(config)));
    const std::vector<std::int64_t> sizes = batch_buckets(std::min(sessions, 32));
    workspace_ = std::make_unique<DeviceWorkspace<__half>>(
        take(DeviceWorkspace<__half>::create(*models[0], sizes.back(), sizes.back(), device_)));
    DeviceResources<__half> on;
    on.device = device_;
    on.stream = stream_.get;
    on.allocator = pool_->allocator.get();
    on.storage = &pool_->storage;
    on.workspace = workspace_.get();
    worker_ = take(DeviceDecodeWorker<__half>::create(on, std::int64_t{1} << 20));
    for (const auto& model : models)
      check(worker_->add_module(take(factorize(config, model)), sizes, kLongest + kAnswer).status());
    table_ = std::make_unique<Table>(*pool_->allocator, config.layers, sessions);
    use(number);
  }

  Outcome run(PrefillHalf& prefill, int sessions, std::uint64_t seed) {
    Outcome out;
    Inbox inbox;
    std::mutex lock;
    std::atomic<bool> over = false;
    use(0);
    // Never full: send() would tell the table of what has arrived, which is this side's to do.
    PeerTransportOptions peer;
    peer.most_under_way = 1 << 14;
    auto transport = take(PrefillHalf::Transport::create(*table_, pool_->storage, prefill.copies(), peer));
    Outcome prefilled;
    std::thread other([&] {
      try {
        prefill.run(inbox, transport, lock, over, prefilled);
      } catch (const std::exception& e) {
        std::fprintf(stderr, "multi-gpu-serve: prefill: %s\n", e.what());
        std::fflush(nullptr);
        std::_Exit(1);
      }
    });
    use(number_);
    const auto start = Clock::now();
    std::vector<Session> all(static_cast<std::size_t>(sessions));
    for (std::size_t i = 0; i < all.size(); ++i)
      all[i].context = random_prompt(kContext, pool_vocab_, seed * 1000 + i);
    std::int64_t left = sessions;
    while (left > 0) {
      bool moved = false;
      for (std::size_t i = 0; i < all.size(); ++i) moved = advance(all[i], i, prefill, inbox, start) || moved;
      {
        const std::lock_guard guard(lock);
        check(transport.poll().status());
      }
      if (worker_->active() > 0) {
        worker_->step(0, [&](const DecodeEvent& event) {
          Session& session = all[event.id / 1000];
          if (event.kind == DecodeEvent::Kind::kFailed) check(event.status);
          if (event.kind == DecodeEvent::Kind::kToken) {
            if (session.answer.empty()) out.first_token_s.push_back(us_since(session.asked) * 1e-6);
            session.answer.push_back(event.token);
            return;
          }
          out.answers += std::ssize(session.answer);
          session.context.insert(session.context.end(), session.answer.begin(), session.answer.end());
          const auto observed = random_prompt(kObserved, pool_vocab_, event.id + seed);
          session.context.insert(session.context.end(), observed.begin(), observed.end());
          session.answer.clear();
          session.state = Session::State::kIdle;
          if (++session.call == kTurns * kAgents) {
            session.state = Session::State::kOver;
            out.sessions_s.push_back(us_since(start) * 1e-6);
            --left;
          }
        });
      } else if (!moved) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    }
    out.seconds = us_since(start) * 1e-6;
    over.store(true);
    other.join();
    out.computed = prefilled.computed;
    out.reused = prefilled.reused;
    out.sent_bytes = prefilled.sent_bytes;
    check(table_->check_invariants());
    check(pool_->allocator->check_invariants());
    if (table_->size() != 0 || pool_->allocator->stats().in_use_blocks != 1)  // one pads the batches
      throw std::runtime_error("the decode GPU keeps blocks");
    use(0);
    return out;
  }

 private:
  struct Session {
    enum class State { kIdle, kHandoff, kDecoding, kOver };
    State state = State::kIdle;
    std::vector<std::int32_t> context, answer;
    std::int64_t call = 0;
    HandoffId handoff = 0;
    Clock::time_point asked;
    bool waiting = false;  // asked, and there was no room
  };

  // The next step of a session's call; whether there was one.
  bool advance(Session& session, std::size_t index, PrefillHalf& prefill, Inbox& inbox, Clock::time_point) {
    const int agent = static_cast<int>(session.call % kAgents);
    const std::uint64_t id = index * 1000 + static_cast<std::uint64_t>(session.call);
    const auto tokens = std::span<const std::int32_t>(session.context).first(session.context.size() - 1);
    if (session.state == Session::State::kIdle) {
      if (!session.waiting) session.asked = Clock::now();
      const auto grant = table_->reserve(prefill.key(agent), tokens);
      session.waiting = grant.status().code() == StatusCode::kExhausted;
      if (session.waiting) return false;
      check(grant.status());
      session.handoff = grant->id;
      session.state = Session::State::kHandoff;
      if (grant->missing_blocks > 0)
        inbox.put({id, agent, std::vector<std::int32_t>(tokens.begin(), tokens.end()), *grant});
      return true;
    }
    if (session.state == Session::State::kHandoff) {
      if (take(table_->state(session.handoff)) != HandoffState::kComplete) return false;
      const Sequence base = take(table_->take(session.handoff));
      DecodeRequest request;
      request.id = id;
      request.module = agent;
      request.last_token = session.context.back();
      request.max_tokens = kAnswer;
      check(worker_->start(request, base));
      session.state = Session::State::kDecoding;
      return true;
    }
    return false;
  }

  int number_;
  Device device_;
  Stream stream_;
  std::int64_t pool_vocab_ = llama_8b().vocab_size;
  std::unique_ptr<KvPool> pool_;
  std::unique_ptr<DeviceWorkspace<__half>> workspace_;
  std::unique_ptr<DeviceDecodeWorker<__half>> worker_;
  std::unique_ptr<Table> table_;
};

void add_row(const ServeOptions& options, const nlohmann::json& row) {
  std::printf("%s\n", row.dump().c_str());
  std::fflush(stdout);
  if (options.json.empty()) return;
  nlohmann::json all;
  if (std::ifstream file(options.json); file) all = nlohmann::json::parse(file, nullptr, false);
  if (!all.is_object() || !all.contains("rows"))
    all = frame_json({"multi-gpu", describe_card(device_of(0)), {}, {}}, nlohmann::json::array());
  nlohmann::json rows = nlohmann::json::array();
  for (const auto& one : all["rows"]) {
    if (one.value("part", "") != "serve" || one.value("name", "") != row["name"]) rows.push_back(one);
  }
  rows.push_back(row);
  all["rows"] = std::move(rows);
  check(write_text(all.dump(2) + '\n', options.json));
}

int program(int argc, char** argv) {
  ServeOptions options;
  parse(argc, argv,
        {{"--json", Option::value(options.json)},
         {"--quick", Option::flag(options.quick)},
         {"--sessions", Option::value(options.sessions)}});
  if (options.sessions < 1) throw std::runtime_error("--sessions from 1 on");
  const int gpus = gpu_count();
  if (gpus == 0) throw std::runtime_error("no GPU");
  const int to = gpus > 1 ? 1 : 0;
  enable_peers(gpus);
  ModelConfig config = llama_8b();
  if (options.quick) config.layers = 4;
  const std::int64_t bytes = std::int64_t{options.quick ? 16 : 110} << 30;
  const std::int64_t needed = options.sessions * kAgents * (kLongest / 16 + 2);
  use(to);
  DecodeHalf decode(config, to, options.quick ? needed / 2 : needed, options.sessions);
  double shared_tokens_per_s = 0.0;
  double shared_p95 = 0.0;
  for (const System& system :
       {System{"shared", 1, 1}, {"pooled", kAgents, 1}, {"separate", kAgents, kAgents}}) {
    use(0);
    PrefillHalf prefill(config, system, bytes, options.quick);
    // Of its own: the decode GPU keeps what the system before has handed over.
    const auto seed = static_cast<std::uint64_t>(system.bases * system.pools);
    static_cast<void>(decode.run(prefill, std::min(options.sessions, 2), 900 + seed));
    const Outcome out = decode.run(prefill, options.sessions, seed);
    const double tokens_per_s = static_cast<double>(out.answers) / out.seconds;
    const double p95 = percentile(out.sessions_s, 0.95);
    nlohmann::json row = {
        {"part", "serve"},
        {"name", system.name},
        {"gpus", std::min(gpus, 2)},
        {"model", "8b"},
        {"layers", config.layers},
        {"sessions", options.sessions},
        {"prefill_blocks", prefill.blocks()},
        {"tokens_per_s", tokens_per_s},
        {"session_p50_s", percentile(out.sessions_s, 0.5)},
        {"session_p95_s", p95},
        {"first_token_p50_s", percentile(out.first_token_s, 0.5)},
        {"first_token_p95_s", percentile(out.first_token_s, 0.95)},
        {"prefilled_tokens", out.computed},
        {"hit_ratio", static_cast<double>(out.reused) /
                          static_cast<double>(std::max<std::int64_t>(1, out.reused + out.computed))},
        {"handed_over_bytes", out.sent_bytes},
        {"seconds", out.seconds}};
    if (system.bases == 1) {
      shared_tokens_per_s = tokens_per_s;
      shared_p95 = p95;
    } else {
      row["throughput_ratio"] = shared_tokens_per_s / tokens_per_s;
      row["p95_ratio"] = p95 / shared_p95;
    }
    add_row(options, row);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run_suite("multi-gpu-serve", argc, argv, program); }
