// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/prefill_worker.hpp - computes base caches for many requests at once, a chunk at a time.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <deque>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/serve/prefill_runner.hpp>

namespace prefillshare {

/// A base cache that is wanted.
struct PrefillJob {
  std::uint64_t id = 0;              ///< the caller's, one of its kind among those under way
  std::vector<std::int32_t> tokens;  ///< what the cache is to cover: a context but for its last token
  Sequence cache;                    ///< the session's, of a prefix of `tokens`; closed: taken from the tree
  std::int64_t pages_from = 0;       ///< pages of whole blocks from this token on are announced as they fill
  TenantId tenant = kDefaultTenant;  ///< whose blocks they are
  KvTime deadline = kKvNever;        ///< by the clock of step()
};

/// How a job ended. With an error the cache holds what was done until then, and is to be used or dropped.
struct PrefillResult {
  std::uint64_t id = 0;  ///< of the job
  Status status;         ///< kCancelled when cancelled or late; the announcer's; the forward pass's
  Sequence cache;        ///< what was computed, the session's to keep
  std::int64_t computed_tokens = 0;  ///< by this job
  std::int64_t reused_tokens = 0;    ///< found in the session's cache and in the tree
};

/// Pages that will not change any more: one layer of some blocks. To be sent, copied or counted by whoever is
/// told; they may be written again when the call returns and the job's cache is dropped.
struct PagesReady {
  std::uint64_t job = 0;            ///< its id
  int layer = 0;                    ///< of the model
  std::int64_t first_block = 0;     ///< of the cache: holds the tokens from first_block * block_tokens on
  std::span<const BlockId> blocks;  ///< in the worker's storage
  std::int64_t last_tokens = 0;     ///< tokens in the last of them; the others are full
};

/// What a PrefillWorker may be told.
struct PrefillOptions {
  std::int64_t chunk_tokens = 256;  ///< computed in one step, over all jobs
  std::int64_t most_running = 4;    ///< jobs that share a step
  std::int64_t most_waiting = 256;  ///< jobs; more are refused
};

/// Runs a prefill module for many jobs, in the caller's thread: nothing happens but in step(). Jobs start in
/// the order they came, as soon as the pool has all the blocks they need, so that a job that has started
/// never waits for another; those that run share each step's chunk evenly, so a short one is not kept by a
/// long one. What computes is `Runner`; what it was made of is the caller's and outlives the worker. On a GPU
/// a step puts its work into the runner's stream and does not wait: a cache stands when the stream gets
/// there, so what reads it is put into the same stream, or waits for it. Externally synchronized.
template <PrefillRunner Runner>
class BasicPrefillWorker {
 public:
  using Allocator = typename Runner::Allocator;  ///< of the caches

  /// The runner bounds the chunk and what may be asked for. kInvalidArgument for options below 1;
  /// kOutOfMemory.
  [[nodiscard]] static Result<BasicPrefillWorker> create(Runner runner, const PrefillOptions& options = {}) {
    if (options.chunk_tokens < 1 || options.most_running < 1 || options.most_waiting < 1) {
      return error(StatusCode::kInvalidArgument, "PrefillWorker: chunks of ", options.chunk_tokens,
                   " tokens, ", options.most_running, " running and ", options.most_waiting, " waiting jobs");
    }
    BasicPrefillWorker out(std::move(runner));
    out.options_ = options;
    out.options_.chunk_tokens = std::min(options.chunk_tokens, out.runner_.max_tokens());
    const auto most = static_cast<std::size_t>(options.most_running);
    if (!detail::try_allocate([&] {
          out.running_.reserve(most);
          out.chunks_.reserve(most);
          out.caches_.reserve(most);
          out.parts_.reserve(most);
        }) ||
        !out.runner_.reserve(options.most_running)) {
      return error(StatusCode::kOutOfMemory, "PrefillWorker: no memory for ", most, " jobs");
    }
    return out;
  }
  /// On processors. `workspace` was made for the module's model; its max_tokens bounds the chunk, its
  /// max_context what may be asked for.
  template <class Module>
  requires std::constructible_from<Runner, const Module&, Allocator&, HostKvStorage&, ForwardWorkspace,
                                   Executor&>
  [[nodiscard]] static Result<BasicPrefillWorker> create(const Module& module, Allocator& allocator,
                                                         HostKvStorage& storage, ForwardWorkspace workspace,
                                                         Executor& executor,
                                                         const PrefillOptions& options = {}) {
    return create(Runner(module, allocator, storage, std::move(workspace), executor), options);
  }

  /// Queues a job. kExhausted: too many wait, come back later. kInvalidArgument: a context over the limit or
  /// over the whole pool, a token outside of the vocabulary, a cache that does not fit the tokens. On an
  /// error `job` is as it was.
  [[nodiscard]] Status submit(PrefillJob&& job) {
    const std::int64_t length = std::ssize(job.tokens);
    const std::int64_t limit = runner_.max_context();
    if (length > limit) {
      return error(StatusCode::kInvalidArgument, "prefill job ", job.id, ": context of ", length,
                   " tokens, the limit is ", limit);
    }
    const std::int64_t block_tokens = allocator().block_tokens();
    if ((length + block_tokens - 1) / block_tokens > allocator().pool().blocks()) {
      return error(StatusCode::kInvalidArgument, "prefill job ", job.id, ": ", length,
                   " tokens do not fit a pool of ", allocator().pool().blocks(), " blocks of ", block_tokens);
    }
    for (std::size_t t = 0; t < job.tokens.size(); ++t) {
      if (job.tokens[t] >= 0 && job.tokens[t] < runner_.vocab_size()) continue;
      return error(StatusCode::kInvalidArgument, "prefill job ", job.id, ": token ", t, " has id ",
                   job.tokens[t], ", the vocabulary has ", runner_.vocab_size());
    }
    if (job.cache.length() > length || job.cache.is_fork() || job.pages_from < 0 ||
        job.pages_from % block_tokens != 0) {
      return error(StatusCode::kInvalidArgument, "prefill job ", job.id, ": a cache of ", job.cache.length(),
                   " tokens and pages from ", job.pages_from, " for ", length, " tokens");
    }
    if (std::ssize(waiting_) >= options_.most_waiting) {
      return error(StatusCode::kExhausted, "prefill job ", job.id, ": ", waiting_.size(),
                   " jobs wait, at most ", options_.most_waiting);
    }
    Running entry;
    entry.job = std::move(job);
    waiting_.push_back(std::move(entry));
    return {};
  }

  /// Whether the job was there: it then ends in the next step with kCancelled.
  bool cancel(std::uint64_t id) {
    const auto mark = [&](auto& jobs) {
      for (Running& entry : jobs) {
        if (entry.job.id != id || !entry.status.ok()) continue;
        entry.status = error(StatusCode::kCancelled, "prefill job ", id, " was cancelled");
        return true;
      }
      return false;
    };
    return mark(running_) || mark(waiting_);
  }

  /// What computes; not during a step().
  [[nodiscard]] Runner& runner() noexcept { return runner_; }

  /// Jobs that share the steps.
  [[nodiscard]] std::int64_t running() const noexcept { return std::ssize(running_); }
  [[nodiscard]] std::int64_t waiting() const noexcept { return std::ssize(waiting_); }  ///< jobs behind them
  /// Nothing to do.
  [[nodiscard]] bool idle() const noexcept { return running_.empty() && waiting_.empty(); }

  /// Starts what can start and computes one chunk. The tokens computed; 0 with jobs waiting means that the
  /// pool has no room for the first of them now.
  ///
  /// on_pages(const PagesReady&) -> Status: told of pages as each layer is written, before the next one is
  /// computed; of those found in the cache, when the job starts. An error ends that job.
  /// on_done(PrefillResult&&): told of each job once. Neither calls the worker.
  template <class OnPages, class OnDone>
  std::int64_t step(KvTime now, OnPages&& on_pages, OnDone&& on_done) {
    expire(now, on_done);
    start_waiting(on_pages, on_done);
    const std::int64_t computed = compute(on_pages);
    for (std::size_t i = 0; i < running_.size();) {
      Running& entry = running_[i];
      if (!entry.status.ok() || entry.job.cache.length() == std::ssize(entry.job.tokens)) {
        finish(entry, on_done);
        running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
    return computed;
  }

 private:
  struct Running {
    PrefillJob job;
    Status status;
    std::int64_t computed = 0;
    std::int64_t reused = 0;
    std::int64_t announced = 0;  // blocks, or not to be announced
  };
  struct Part {
    Running* entry;
    std::int64_t end_block;  // blocks up to here are final when this chunk is done
    std::int64_t end_token;
  };

  explicit BasicPrefillWorker(Runner runner) : runner_(std::move(runner)) {}

  [[nodiscard]] Allocator& allocator() const noexcept { return runner_.allocator(); }

  template <class OnDone>
  static void finish(Running& entry, OnDone&& on_done) {
    on_done(PrefillResult{entry.job.id, std::move(entry.status), std::move(entry.job.cache), entry.computed,
                          entry.reused});
  }

  template <class OnDone>
  void expire(KvTime now, OnDone&& on_done) {
    const auto over = [&](Running& entry) {
      if (entry.status.ok() && entry.job.deadline <= now) {
        entry.status = error(StatusCode::kCancelled, "prefill job ", entry.job.id, ": its deadline is past");
      }
      return !entry.status.ok();
    };
    const auto sweep = [&](auto& jobs) {
      for (auto at = jobs.begin(); at != jobs.end();) {
        if (over(*at)) {
          finish(*at, on_done);
          at = jobs.erase(at);
        } else {
          ++at;
        }
      }
    };
    sweep(running_);
    sweep(waiting_);
  }

  template <class OnPages, class OnDone>
  void start_waiting(OnPages&& on_pages, OnDone&& on_done) {
    while (!waiting_.empty() && running() < options_.most_running) {
      Running& entry = waiting_.front();
      Status status = start(entry);
      if (status.code() == StatusCode::kExhausted) return;  // the first waits for blocks, and the rest for it
      if (status.ok()) status = announce_found(entry, on_pages);
      entry.status = std::move(status);
      if (entry.status.ok()) {
        running_.push_back(std::move(entry));
      } else {
        finish(entry, on_done);
      }
      waiting_.pop_front();
    }
  }

  /// Takes what the session and the tree have, and blocks for all the rest.
  [[nodiscard]] Status start(Running& entry) {
    PrefillJob& job = entry.job;
    const std::span<const std::int32_t> tokens(job.tokens);
    if (!job.cache.is_open()) {
      Result<Sequence> opened = allocator().open(runner_.key(), tokens, job.tenant);
      if (!opened.ok()) return opened.status();
      job.cache = *std::move(opened);
    } else if (job.cache.reserved() == 0) {
      const auto found =
          allocator().extend(job.cache, tokens.subspan(static_cast<std::size_t>(job.cache.length())));
      if (!found.ok()) return found.status();
    }
    entry.reused = job.cache.length();
    Status status = allocator().reserve(job.cache, std::ssize(tokens) - job.cache.length());
    // What is only found may be evicted for others while this one waits.
    if (status.code() == StatusCode::kExhausted) job.cache.reset();
    return status;
  }

  template <class OnPages>
  [[nodiscard]] Status announce_found(Running& entry, OnPages&& on_pages) {
    const std::int64_t block_tokens = allocator().block_tokens();
    const std::int64_t length = entry.job.cache.length();
    const bool whole = length == std::ssize(entry.job.tokens);
    const std::int64_t end = whole ? (length + block_tokens - 1) / block_tokens : length / block_tokens;
    entry.announced = entry.job.pages_from / block_tokens;
    for (int layer = 0; layer < runner_.layers(); ++layer) {
      if (Status s = announce(entry, layer, end, length, on_pages); !s.ok()) return s;
    }
    entry.announced = std::max(entry.announced, end);
    return {};
  }
  template <class OnPages>
  [[nodiscard]] Status announce(const Running& entry, int layer, std::int64_t end, std::int64_t tokens,
                                OnPages&& on_pages) {
    if (end <= entry.announced) return {};
    const std::int64_t block_tokens = allocator().block_tokens();
    PagesReady pages;
    pages.job = entry.job.id;
    pages.layer = layer;
    pages.first_block = entry.announced;
    pages.blocks = entry.job.cache.blocks().subspan(static_cast<std::size_t>(entry.announced),
                                                    static_cast<std::size_t>(end - entry.announced));
    pages.last_tokens = std::min(block_tokens, tokens - (end - 1) * block_tokens);
    return on_pages(static_cast<const PagesReady&>(pages));
  }

  template <class OnPages>
  std::int64_t compute(OnPages&& on_pages) {
    chunks_.clear();
    caches_.clear();
    parts_.clear();
    const std::int64_t block_tokens = allocator().block_tokens();
    std::int64_t budget = options_.chunk_tokens;
    std::int64_t left = 0;  // jobs that want a part of it
    for (const Running& entry : running_) left += missing(entry) > 0 ? 1 : 0;
    for (std::size_t i = 0; i < running_.size() && budget > 0; ++i) {
      Running& entry = running_[(first_ + i) % running_.size()];
      if (missing(entry) == 0) continue;
      // Whole blocks where they can be had: what is cut elsewhere is announced a step later.
      std::int64_t share = std::max(std::int64_t{1}, budget / std::max(std::int64_t{1}, left));
      if (share > block_tokens) share -= (entry.job.cache.length() + share) % block_tokens;
      const std::int64_t count = std::min({missing(entry), share, budget});
      --left;
      budget -= count;
      const std::int64_t end = entry.job.cache.length() + count;
      const bool last = end == std::ssize(entry.job.tokens);
      chunks_.push_back(
          std::span<const std::int32_t>(entry.job.tokens)
              .subspan(static_cast<std::size_t>(entry.job.cache.length()), static_cast<std::size_t>(count)));
      caches_.push_back(&entry.job.cache);
      parts_.push_back({&entry, (last ? end + block_tokens - 1 : end) / block_tokens, end});
    }
    if (parts_.empty()) return 0;
    ++first_;
    const Status status = runner_.run(chunks_, caches_, [&](int layer) {
      for (const Part& part : parts_) {
        if (!part.entry->status.ok()) continue;  // the pass goes on for the others
        static_cast<void>(part.entry->status =
                              announce(*part.entry, layer, part.end_block, part.end_token, on_pages));
      }
      return Status();
    });
    std::int64_t computed = 0;
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      Running& entry = *parts_[i].entry;
      if (!status.ok()) {
        entry.status = status;
        continue;
      }
      entry.announced = std::max(entry.announced, parts_[i].end_block);
      entry.computed += std::ssize(chunks_[i]);
      computed += std::ssize(chunks_[i]);
    }
    return computed;
  }
  [[nodiscard]] static std::int64_t missing(const Running& entry) {
    return std::ssize(entry.job.tokens) - entry.job.cache.length();
  }

  Runner runner_;
  PrefillOptions options_;
  std::deque<Running> waiting_;
  std::vector<Running> running_;
  std::size_t first_ = 0;  // whose turn it is
  // One step's, kept for their memory.
  std::vector<std::span<const std::int32_t>> chunks_;
  std::vector<Sequence*> caches_;
  std::vector<Part> parts_;
};

/// On processors.
template <LinearLayer Base>
using PrefillWorker = BasicPrefillWorker<HostPrefill<Base>>;

}  // namespace prefillshare
