// SPDX-License-Identifier: Apache-2.0
//
// bench/support/card_engine.hpp - sessions of several agents on one card, as they arrive: the library's
// workers and admission in one loop, on a GPU or in simulated time. Every decision is made here and in the
// workers, so that a simulation differs from a run in nothing but what a step takes.
//
// Steps run one after the other, or decode steps beside a prefill: each on a part of the card while there are
// both, on all of it while there is one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/serve/admission.hpp>
#include <prefillshare/serve/decode_order.hpp>
#include <prefillshare/serve/decode_worker.hpp>
#include <prefillshare/serve/prefill_worker.hpp>
#include <prefillshare/sim/metrics.hpp>
#include <prefillshare/sim/workload.hpp>

namespace codegemm::bench {

/// Who makes the base caches, and where they lie. The memory is the same in all.
enum class CardSharing : int {
  kSeparate,  ///< each agent's model prefills for itself, in a part of the memory of its own
  kPooled,    ///< the same, all in one pool
  kShared,    ///< one base model for all agents, one cache
};

[[nodiscard]] inline const char* name_of(CardSharing sharing) {
  switch (sharing) {
    case CardSharing::kSeparate: return "separate";
    case CardSharing::kPooled: return "pooled";
    case CardSharing::kShared: return "shared";
  }
  return "";
}

struct CardOptions {
  CardSharing sharing = CardSharing::kShared;
  int agents = 4;
  std::int64_t blocks = 0;        // of each pool
  std::int64_t chunk_tokens = 0;  // prefilled in a step, by whichever model
  std::int64_t vocab_size = 0;    // of the tokens that come from outside
  bool beside = false;            // decode steps run beside a prefill
  bool largest_first = false;     // a decode step is that of one module: the one with the most answers
  bool prefill_first = false;     // no decode step while a chunk can be computed; not with `beside`
  bool admission = true;          // sessions begin when their contexts have room at their longest
  std::int64_t most_sessions = std::numeric_limits<std::int64_t>::max();  // at once
  double most_seconds = std::numeric_limits<double>::infinity();          // then the run is given up
  std::uint64_t salt = 0;  // runs on one system with different ones have no text in common
};

/// What a run has measured; seconds.
struct CardOutcome {
  std::vector<double> sessions;           // from arrival to the last token
  std::vector<double> calls;              // from the issue of a call to its last token
  std::vector<double> first_token;        // to its first
  std::vector<double> per_token;          // mean of those after it
  double seconds = 0.0;                   // from the first arrival to the last token
  double tokens_per_second = 0.0;         // over all of it
  double steady_tokens_per_second = 0.0;  // between the ends of the first and the last tenth of the calls
  std::int64_t output_tokens = 0;
  std::int64_t computed_tokens = 0;  // by prefill modules
  std::int64_t reused_tokens = 0;
  std::int64_t refused_starts = 0;  // prefilled, and no memory to decode in: prefilled or looked up again
  std::int64_t steps = 0;
  std::int64_t kv_bytes_in_use = 0;  // most at once
  std::int64_t kv_bytes_held = 0;    // in use or cached, most at once
  std::int64_t most_sessions = 0;    // begun and not ended, most at once
  std::uint64_t token_sum = 0;       // of all generated tokens: equal runs have equal ones
  bool given_up = false;             // after most_seconds

  [[nodiscard]] double hit_ratio() const {
    const auto wanted = static_cast<double>(reused_tokens + computed_tokens);
    return wanted > 0.0 ? static_cast<double>(reused_tokens) / wanted : 0.0;
  }
};

/// Caches, and the worker that decodes from them.
template <class DecodeWorkerType>
struct CardPool {
  typename DecodeWorkerType::Allocator* allocator = nullptr;
  DecodeWorkerType* decode = nullptr;  // with all agents' modules in their order, or the agent's one
};

/// One run. Clock: now() seconds from its start, wait_until(seconds). Where decode runs beside a prefill
/// also:
///   begin_prefill(part)   the next chunks run on the prefills' part of the card, or on all of it
///   end_prefill()         a ticket for what was begun since
///   done(ticket)          whether that has run; wait(ticket) until then
///   begin_decode(part)    the next decode steps run on theirs, or on all of it
template <class PrefillWorkerType, class DecodeWorkerType, class Clock>
class CardEngine {
 public:
  using Pool = CardPool<DecodeWorkerType>;

  /// Prefill workers: one, or one for each agent; pools the same.
  CardEngine(std::vector<PrefillWorkerType*> prefills, std::vector<Pool> pools, Clock& clock,
             const CardOptions& options)
      : prefills_(std::move(prefills)), pools_(std::move(pools)), clock_(&clock), options_(options) {}

  [[nodiscard]] CardOutcome run(const prefillshare::Workload& workload) {
    workload_ = &workload;
    sessions_.assign(workload.sessions.size(), Session());
    prefillshare::AdmissionLimits limits;
    limits.blocks = options_.admission ? options_.blocks : std::numeric_limits<std::int64_t>::max();
    limits.begun = options_.most_sessions;
    prefillshare::AdmissionQueue<> queue(limits);
    std::size_t arrived = 0;
    std::size_t ended = 0;
    std::int64_t begun = 0;
    while (ended < sessions_.size()) {
      const double now = clock_->now();
      if (now > options_.most_seconds) {
        give_up();
        break;
      }
      for (; arrived < sessions_.size() && workload.sessions[arrived].arrival <= now; ++arrived) {
        prefillshare::AdmissionRequest request;
        request.id = arrived;
        request.blocks = blocks_of(arrived);
        check(queue.submit(request, now));
      }
      for (;;) {
        const prefillshare::Admission next = queue.next(now);
        if (next.kind != prefillshare::Admission::Kind::kAdmitted) break;
        begin_call(static_cast<std::size_t>(next.request.id));
        out_.most_sessions = std::max(out_.most_sessions, ++begun);
      }
      const bool worked = options_.beside ? step_beside() : step();
      for (const std::size_t id : over_) {
        queue.release(id);
        ++ended;
        --begun;
      }
      over_.clear();
      if (worked || ended == sessions_.size()) continue;
      if (arrived == sessions_.size()) throw std::runtime_error("the engine has stopped with sessions left");
      clock_->wait_until(workload.sessions[arrived].arrival);
    }
    finish();
    return std::move(out_);
  }

 private:
  struct Session {
    std::vector<std::int32_t> context;
    std::size_t call = 0;
    std::int64_t made = 0;
    double issued = 0.0;
    double first_token = 0.0;
  };
  /// Chunks of prefill under way, and whose caches are complete with them.
  struct Chunk {
    std::uint64_t ticket = 0;
    std::vector<prefillshare::PrefillResult> results;
  };
  struct End {
    double time = 0.0;
    std::int64_t tokens = 0;
  };

  static void check(const Status& status) {
    if (!status.ok()) throw std::runtime_error(status.message());
  }
  [[nodiscard]] const prefillshare::CallPlan& plan(std::size_t id) const {
    const prefillshare::SessionPlan& session = workload_->sessions[id];
    return workload_->calls[static_cast<std::size_t>(session.first_call) + sessions_[id].call];
  }
  [[nodiscard]] std::size_t agent_of(std::size_t id) const {
    return static_cast<std::size_t>(plan(id).module);
  }
  /// What a session may come to hold in a pool: its caches there, and one answer with its copy of a block.
  [[nodiscard]] std::int64_t blocks_of(std::size_t id) const {
    const prefillshare::CallPlan& last = workload_->calls_of(workload_->sessions[id]).back();
    const int caches = options_.sharing == CardSharing::kPooled ? options_.agents : 1;
    const int block_tokens = pools_[0].allocator->block_tokens();
    return caches * prefillshare::blocks_at_most(last.context, last.output, block_tokens) + 2;
  }

  void begin_call(std::size_t id) {
    Session& session = sessions_[id];
    const auto length = static_cast<std::size_t>(plan(id).context);
    // What comes from outside: another number for each place of each session.
    while (session.context.size() < length) {
      const auto at =
          (options_.salt << 52U) + (static_cast<std::uint64_t>(id) << 32U) + session.context.size();
      session.context.push_back(static_cast<std::int32_t>(prefillshare::detail::scramble(at) %
                                                          static_cast<std::uint64_t>(options_.vocab_size)));
    }
    session.issued = clock_->now();
    session.made = 0;
    submit(id);
  }
  void submit(std::size_t id) {
    const Session& session = sessions_[id];
    prefillshare::PrefillJob job;
    job.id = id;
    job.tokens.assign(session.context.begin(), session.context.end() - 1);
    check(prefills_[prefills_.size() == 1 ? 0 : agent_of(id)]->submit(std::move(job)));
  }

  /// A chunk of prefill and a token for every answer under way, or one of both. Whether there was anything to
  /// do. Prefills first, answers gather for a step that is worth more; since what begins is bounded
  /// (admission), so is what an answer waits for.
  bool step() {
    ++out_.steps;
    done_.clear();
    const std::int64_t computed = prefill_chunk(done_);
    const bool worked = !done_.empty();
    begin_answers(done_);
    if (options_.prefill_first && computed > 0) return true;
    return decode_round() > 0 || worked || computed > 0;
  }
  /// The same with chunks under way while tokens are made. Their caches are kept, and no answer begins on
  /// them, until they have run.
  bool step_beside() {
    ++out_.steps;
    bool worked = false;
    while (!chunks_.empty() && clock_->done(chunks_.front().ticket)) {
      begin_answers(chunks_.front().results);
      chunks_.pop_front();
      worked = true;
    }
    const bool decoding = active() > 0;
    // One chunk is queued behind that which runs, so that no end of a chunk waits for that of a decode step.
    // While nothing is decoded the next chunk is not begun yet: answers may begin before it.
    while (chunks_.size() < (decoding ? 2 : 1)) {
      Chunk chunk;
      clock_->begin_prefill(decoding);
      if (prefill_chunk(chunk.results) == 0 && chunk.results.empty()) break;
      chunk.ticket = clock_->end_prefill();
      chunks_.push_back(std::move(chunk));
      worked = true;
    }
    if (decoding) {
      clock_->begin_decode(!chunks_.empty());
      return decode_round() > 0 || worked;
    }
    if (chunks_.empty()) return worked;
    clock_->wait(chunks_.front().ticket);
    return true;
  }

  /// A chunk for the first prefill workers in turn that have one; the tokens.
  std::int64_t prefill_chunk(std::vector<prefillshare::PrefillResult>& done) {
    std::int64_t computed = 0;
    for (std::size_t i = 0; i < prefills_.size() && computed < options_.chunk_tokens; ++i) {
      PrefillWorkerType& worker = *prefills_[next_prefill_++ % prefills_.size()];
      if (worker.idle()) continue;
      computed += worker.step(
          0, [](const prefillshare::PagesReady&) { return Status(); },
          [&](prefillshare::PrefillResult&& result) { done.push_back(std::move(result)); });
    }
    return computed;
  }
  void begin_answers(std::vector<prefillshare::PrefillResult>& done) {
    std::vector<std::size_t> again;
    for (prefillshare::PrefillResult& result : done) {
      check(result.status);
      const auto id = static_cast<std::size_t>(result.id);
      out_.computed_tokens += result.computed_tokens;
      out_.reused_tokens += result.reused_tokens;
      if (!start(id, result.cache)) {
        // Its cache may be evicted for others until there is room.
        ++out_.refused_starts;
        again.push_back(id);
      }
      result.cache.reset();
    }
    for (const std::size_t id : again) submit(id);
  }
  [[nodiscard]] std::int64_t active() const {
    std::int64_t out = 0;
    for (const Pool& pool : pools_) out += pool.decode->active();
    return out;
  }
  /// A token for every answer, or for those of one module.
  std::int64_t decode_round() {
    std::int64_t made = 0;
    std::int64_t in_use = 0;
    std::int64_t held = 0;
    const auto happens = [&](const prefillshare::DecodeEvent& event) { happened(event); };
    if (options_.largest_first && active() > 0) made = largest_round(happens);
    for (const Pool& pool : pools_) {
      if (!options_.largest_first && pool.decode->active() > 0) made += pool.decode->step(0, happens);
      const prefillshare::KvStats stats = pool.allocator->stats();
      in_use += stats.bytes_in_use;
      held += stats.bytes_in_use + stats.bytes_cached;
    }
    out_.kv_bytes_in_use = std::max(out_.kv_bytes_in_use, in_use);
    out_.kv_bytes_held = std::max(out_.kv_bytes_held, held);
    return made;
  }
  template <class OnEvent>
  std::int64_t largest_round(const OnEvent& happens) {
    counts_.clear();
    for (std::size_t agent = 0; agent < static_cast<std::size_t>(options_.agents); ++agent) {
      counts_.push_back(decoder_of(agent).active(module_of(agent)));
    }
    const std::size_t agent = order_.next(counts_);
    return decoder_of(agent).step_module(0, module_of(agent), happens);
  }
  [[nodiscard]] DecodeWorkerType& decoder_of(std::size_t agent) const {
    return *pools_[pools_.size() == 1 ? 0 : agent].decode;
  }
  [[nodiscard]] prefillshare::ModuleId module_of(std::size_t agent) const {
    return static_cast<prefillshare::ModuleId>(pools_.size() == 1 ? agent : 0);
  }

  bool start(std::size_t id, const prefillshare::Sequence& cache) {
    const Session& session = sessions_[id];
    prefillshare::DecodeRequest request;
    request.id = id;
    request.module = module_of(agent_of(id));
    request.last_token = session.context.back();
    request.max_tokens = plan(id).output;
    request.temperature = 1.0F;
    request.seed =
        (static_cast<std::uint64_t>(id) << 32U) + (std::uint64_t{1} << 31U) + session.context.size();
    const Status status = decoder_of(agent_of(id)).start(std::move(request), cache);
    if (status.code() != StatusCode::kExhausted) check(status);
    return status.ok();
  }
  void happened(const prefillshare::DecodeEvent& event) {
    const auto id = static_cast<std::size_t>(event.id);
    Session& session = sessions_[id];
    if (event.kind == prefillshare::DecodeEvent::Kind::kToken) {
      if (session.made++ == 0) session.first_token = clock_->now();
      session.context.push_back(event.token);
      out_.token_sum += static_cast<std::uint64_t>(event.token);
      ++out_.output_tokens;
      return;
    }
    check(event.status);
    const double now = clock_->now();
    out_.calls.push_back(now - session.issued);
    out_.first_token.push_back(session.first_token - session.issued);
    if (session.made > 1) {
      out_.per_token.push_back((now - session.first_token) / static_cast<double>(session.made - 1));
    }
    ends_.push_back({now, session.made});
    if (++session.call < static_cast<std::size_t>(workload_->sessions[id].calls)) {
      begin_call(id);
      return;
    }
    out_.sessions.push_back(now - workload_->sessions[id].arrival);
    session.context = {};
    over_.push_back(id);
  }

  void give_up() {
    out_.given_up = true;
    for (; !chunks_.empty(); chunks_.pop_front()) clock_->wait(chunks_.front().ticket);
    for (std::size_t id = 0; id < sessions_.size(); ++id) {
      for (PrefillWorkerType* worker : prefills_) worker->cancel(id);
      for (const Pool& pool : pools_) pool.decode->cancel(id);
    }
    for (PrefillWorkerType* worker : prefills_) {
      while (!worker->idle()) {
        worker->step(
            0, [](const prefillshare::PagesReady&) { return Status(); },
            [](prefillshare::PrefillResult&&) {});
      }
    }
    for (const Pool& pool : pools_) pool.decode->step(0, [](const prefillshare::DecodeEvent&) {});
  }
  void finish() {
    if (ends_.empty()) return;
    out_.seconds = ends_.back().time - workload_->sessions.front().arrival;
    out_.tokens_per_second = static_cast<double>(out_.output_tokens) / out_.seconds;
    const std::size_t tenth = std::max<std::size_t>(ends_.size() / 10, 1);
    if (ends_.size() <= 2 * tenth) return;
    std::int64_t tokens = 0;
    for (std::size_t i = tenth; i < ends_.size() - tenth; ++i) tokens += ends_[i].tokens;
    const double seconds = ends_[ends_.size() - tenth - 1].time - ends_[tenth - 1].time;
    if (seconds > 0.0) out_.steady_tokens_per_second = static_cast<double>(tokens) / seconds;
  }

  std::vector<PrefillWorkerType*> prefills_;
  std::vector<Pool> pools_;
  Clock* clock_;
  CardOptions options_;
  const prefillshare::Workload* workload_ = nullptr;
  std::vector<Session> sessions_;  // as in the workload
  std::vector<std::size_t> over_;  // ended in this step
  std::vector<End> ends_;          // of calls
  std::size_t next_prefill_ = 0;
  std::deque<Chunk> chunks_;
  prefillshare::LargestBatchFirst order_;
  std::vector<std::int64_t> counts_;               // of answers, by agent
  std::vector<prefillshare::PrefillResult> done_;  // in this step
  CardOutcome out_;
};

}  // namespace codegemm::bench
