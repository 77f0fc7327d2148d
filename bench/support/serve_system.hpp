// SPDX-License-Identifier: Apache-2.0
//
// bench/support/serve_system.hpp - several agents' sessions on one machine, with one prefill for all agents
// or one for each, out of the library's own workers.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/model/dense_linear.hpp>
#include <prefillshare/serve/decode_worker.hpp>
#include <prefillshare/serve/prefill_worker.hpp>

namespace codegemm::bench {

using prefillshare::CacheKey;
using prefillshare::DecodeEvent;
using prefillshare::DecodeWorker;
using prefillshare::DenseLinear;
using prefillshare::ForwardWorkspace;
using prefillshare::HostKvStorage;
using prefillshare::KvAllocator;
using prefillshare::LlamaModel;
using prefillshare::PrefillJob;
using prefillshare::PrefillModule;
using prefillshare::PrefillResult;
using prefillshare::PrefillWorker;

/// How the agents' base caches are made and where they lie. The memory for KV is the same in all.
enum class Sharing : int {
  kShared,    ///< one prefill module, one cache for all agents
  kPooled,    ///< a prefill module and caches for each agent, in one pool
  kSeparate,  ///< the same, and a pool of its own for each agent: a part of the memory
};

[[nodiscard]] inline const char* name_of(Sharing sharing) {
  switch (sharing) {
    case Sharing::kShared: return "shared";
    case Sharing::kPooled: return "pooled";
    case Sharing::kSeparate: return "separate";
  }
  return "";
}

/// What a session does: all agents in turn, turn after turn, on one growing context. Lengths in tokens.
struct Pattern {
  std::string name;
  std::int64_t document = 0;  // what the first call begins with, the session's own
  std::int64_t turns = 0;     // of each agent
  std::int64_t input = 0;     // joins the context before a call: an instruction, an observation
  std::int64_t output = 0;    // of a call, all of which joins the context

  [[nodiscard]] std::int64_t context(int agents) const {
    return document + turns * agents * (input + output);
  }
};

/// One call as its user sees it, in seconds from when it was wanted.
struct CallTimes {
  double first_token = 0.0;
  double end = 0.0;
};

struct Outcome {
  double seconds = 0.0;
  std::int64_t output_tokens = 0;
  std::int64_t computed_tokens = 0;  // by prefill modules
  std::int64_t reused_tokens = 0;
  std::int64_t kv_bytes = 0;  // most that was held at once, in use or cached
  std::vector<CallTimes> calls;
  std::vector<double> sessions;                     // seconds from first to last
  std::vector<std::vector<std::int32_t>> contexts;  // each session's at its end
};

struct SystemOptions {
  Sharing sharing = Sharing::kShared;
  int agents = 4;
  std::int64_t blocks = 0;  // in all
  std::int64_t chunk = 128;
  std::int64_t context = 0;
  std::int64_t concurrency = 1;  // sessions at once
};

/// The engine: a chunk of prefill and a token of every answer in each step.
template <prefillshare::LinearLayer Decode>
class ServeSystem {
 public:
  ServeSystem(const std::shared_ptr<const LlamaModel<DenseLinear>>& base,
              std::shared_ptr<const LlamaModel<Decode>> decode, const SystemOptions& options,
              Executor& executor)
      : options_(options), executor_(&executor) {
    const int pools = options.sharing == Sharing::kSeparate ? options.agents : 1;
    const int bases = options.sharing == Sharing::kShared ? 1 : options.agents;
    for (int i = 0; i < bases; ++i) {
      modules_.push_back(std::make_unique<PrefillModule<DenseLinear>>(
          base, CacheKey{bases == 1 ? "base" : "agent " + std::to_string(i), "1", ""}));
    }
    for (int i = 0; i < pools; ++i) {
      auto pool = std::make_unique<Pool>(
          HostKvStorage::create(kv_shape(base->config), options.blocks / pools).value());
      pool->allocator = KvAllocator::create(pool->storage).value();
      pool->decode =
          std::make_unique<DecodeWorker>(*pool->allocator, pool->storage, executor, options.concurrency);
      for (int agent = 0; agent < options.agents; ++agent) {
        if (pools > 1 && agent != i) continue;
        if (auto added = pool->decode->add_module(factorize(*modules_[0], decode).value(),
                                                  options.concurrency, options.context);
            !added.ok()) {
          throw std::runtime_error(added.status().message());
        }
      }
      pools_.push_back(std::move(pool));
    }
    for (int i = 0; i < bases; ++i) {
      Pool& pool = *pools_[static_cast<std::size_t>(pools > 1 ? i : 0)];
      prefills_.push_back(
          PrefillWorker<DenseLinear>::create(
              *modules_[static_cast<std::size_t>(i)], *pool.allocator, pool.storage,
              ForwardWorkspace::create(*base, options.chunk, options.context, executor.workers()).value(),
              executor, {options.chunk, 4, 4096})
              .value());
    }
  }

  /// Runs sessions of `pattern`, `concurrency` at a time, each on its own document; texts[i] has the tokens
  /// that join session i's context from outside, in order.
  [[nodiscard]] Outcome run(const Pattern& pattern, std::span<const std::vector<std::int32_t>> texts) {
    Outcome out;
    const auto start = Clock::now();
    std::size_t next = 0;
    std::vector<std::unique_ptr<Session>> live;
    while (next < texts.size() || !live.empty()) {
      while (next < texts.size() && std::ssize(live) < options_.concurrency) {
        live.push_back(std::make_unique<Session>());
        Session& session = *live.back();
        session.text = texts[next];
        session.id = next++;
        session.start = Clock::now();
        begin_call(session, pattern);
      }
      step(live, out);
      for (auto at = live.begin(); at != live.end();) {
        Session& session = **at;
        if (session.busy) {
          ++at;
          continue;
        }
        out.calls.push_back({session.first_token, seconds_since(session.call_start)});
        if (++session.calls < pattern.turns * options_.agents) {
          begin_call(session, pattern);
          ++at;
          continue;
        }
        out.sessions.push_back(seconds_since(session.start));
        out.contexts.resize(texts.size());
        out.contexts[session.id] = std::move(session.context);
        at = live.erase(at);
      }
    }
    out.seconds = seconds_since(start);
    return out;
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Pool {
    explicit Pool(HostKvStorage of) : storage(std::move(of)) {}
    HostKvStorage storage;
    std::unique_ptr<KvAllocator> allocator;
    std::unique_ptr<DecodeWorker> decode;
  };
  struct Session {
    std::size_t id = 0;
    std::span<const std::int32_t> text;
    std::vector<std::int32_t> context;
    std::int64_t calls = 0;
    std::int64_t output = 0;
    bool busy = false;
    double first_token = 0.0;
    Clock::time_point start, call_start;
  };

  [[nodiscard]] static double seconds_since(Clock::time_point from) {
    return std::chrono::duration<double>(Clock::now() - from).count();
  }
  [[nodiscard]] std::size_t agent_of(const Session& session) const {
    return static_cast<std::size_t>(session.calls % options_.agents);
  }
  [[nodiscard]] std::size_t prefill_of(const Session& session) const {
    return prefills_.size() == 1 ? 0 : agent_of(session);
  }
  [[nodiscard]] std::size_t pool_of(const Session& session) const {
    return pools_.size() == 1 ? 0 : agent_of(session);
  }

  void begin_call(Session& session, const Pattern& pattern) {
    const std::int64_t added = pattern.input + (session.calls == 0 ? pattern.document : 0);
    const auto part = session.text.first(static_cast<std::size_t>(added));
    session.text = session.text.subspan(part.size());
    session.context.insert(session.context.end(), part.begin(), part.end());
    session.call_start = Clock::now();
    session.first_token = 0.0;
    session.output = pattern.output;
    session.busy = true;
    submit(session);
  }
  void submit(const Session& session) {
    PrefillJob job;
    job.id = session.id;
    job.tokens.assign(session.context.begin(), session.context.end() - 1);
    const Status status = prefills_[prefill_of(session)].submit(std::move(job));
    if (!status.ok()) throw std::runtime_error(status.message());
  }

  void step(std::vector<std::unique_ptr<Session>>& live, Outcome& out) {
    const auto session_of = [&](std::uint64_t id) -> Session& {
      for (const auto& session : live) {
        if (session->id == id) return *session;
      }
      throw std::runtime_error("an event of no session");
    };
    std::vector<Session*> again;
    for (std::size_t i = 0; i < prefills_.size(); ++i) {
      PrefillWorker<DenseLinear>& worker = prefills_[next_prefill_++ % prefills_.size()];
      const std::int64_t computed = worker.step(
          0, [](const prefillshare::PagesReady&) { return Status(); },
          [&](PrefillResult&& result) {
            if (!result.status.ok()) throw std::runtime_error(result.status.message());
            Session& session = session_of(result.id);
            out.computed_tokens += result.computed_tokens;
            out.reused_tokens += result.reused_tokens;
            prefillshare::DecodeRequest request;
            request.id = session.id;
            request.module = static_cast<prefillshare::ModuleId>(pools_.size() == 1 ? agent_of(session) : 0);
            request.last_token = session.context.back();
            request.max_tokens = session.output;
            const Status status = pools_[pool_of(session)]->decode->start(std::move(request), result.cache);
            if (status.ok()) return;
            if (status.code() != StatusCode::kExhausted) throw std::runtime_error(status.message());
            again.push_back(&session);  // its cache may be evicted for others until there is room
          });
      if (computed > 0) break;  // one chunk a step, whoever's
    }
    for (Session* session : again) submit(*session);
    std::int64_t held = 0;
    for (const auto& pool : pools_) {
      pool->decode->step(
          0,
          [](std::uint64_t, std::span<float> logits) {
            return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
          },
          [&](const DecodeEvent& event) {
            Session& session = session_of(event.id);
            if (event.kind == DecodeEvent::Kind::kToken) {
              if (session.first_token == 0.0) session.first_token = seconds_since(session.call_start);
              session.context.push_back(event.token);
              ++out.output_tokens;
              return;
            }
            if (event.kind != DecodeEvent::Kind::kLength) throw std::runtime_error(event.status.message());
            session.busy = false;
          });
      const prefillshare::KvStats stats = pool->allocator->stats();
      held += stats.bytes_in_use + stats.bytes_cached;
    }
    out.kv_bytes = std::max(out.kv_bytes, held);
  }

  SystemOptions options_;
  Executor* executor_;
  std::vector<std::unique_ptr<PrefillModule<DenseLinear>>> modules_;
  std::vector<std::unique_ptr<Pool>> pools_;
  std::vector<PrefillWorker<DenseLinear>> prefills_;
  std::size_t next_prefill_ = 0;
};

}  // namespace codegemm::bench
