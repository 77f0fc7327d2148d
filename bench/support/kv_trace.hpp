// SPDX-License-Identifier: Apache-2.0
//
// bench/support/kv_trace.hpp - a trace of prompts replayed through the allocator under a policy, and the best
// that any policy could have done.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <limits>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/kv/agent_eviction.hpp>
#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/priority_eviction.hpp>

namespace codegemm::bench {

struct TraceRequest {
  std::int64_t time_ms = 0;
  std::vector<std::int32_t> blocks;  // by number; equal numbers, equal prefixes
};

struct Trace {
  std::vector<TraceRequest> requests;
  std::int64_t accesses = 0;  // blocks of all requests
  std::int64_t unique = 0;    // the working set
};

/// bench/data/README.md tells the form. Throws with the line.
[[nodiscard]] inline Trace read_trace(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  Trace trace;
  std::vector<std::int32_t> parent;
  std::int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.empty() || line[0] == '#') continue;
    std::istringstream fields(line);
    TraceRequest request;
    std::int64_t input = 0;
    std::int64_t output = 0;
    std::int64_t last = 0;
    std::int64_t added = 0;
    if (!(fields >> request.time_ms >> input >> output >> last >> added) || last < -1 ||
        last >= std::ssize(parent) || added < 0 || added > 100000) {
      throw std::runtime_error(path + ": line " + std::to_string(number));
    }
    for (auto at = static_cast<std::int32_t>(last); at >= 0; at = parent[static_cast<std::size_t>(at)]) {
      request.blocks.push_back(at);
    }
    std::reverse(request.blocks.begin(), request.blocks.end());
    for (std::int64_t i = 0; i < added; ++i) {
      const auto block = static_cast<std::int32_t>(parent.size());
      parent.push_back(request.blocks.empty() ? -1 : request.blocks.back());
      request.blocks.push_back(block);
    }
    trace.accesses += std::ssize(request.blocks);
    trace.requests.push_back(std::move(request));
  }
  trace.unique = std::ssize(parent);
  return trace;
}

/// What the caller says of a request's blocks when it ends.
enum class Hints {
  kNone,
  kReused,       // priority 80 for ten minutes to what was found in the cache: it is wanted more than once
  kFiveMinutes,  // the next use, if it comes within five minutes: what an agent graph knows
  kAll,          // every next use: Belady's rule within the allocator
};

struct Replay {
  std::int64_t hits = 0;  // blocks
  double seconds = 0.0;
};

/// Each request opens a sequence, fills what is missing and closes. A trace's block is one token in a block
/// of one token here: the allocator's decisions are the same, and its numbers are the trace's.
template <class Eviction>
[[nodiscard]] Replay replay(const Trace& trace, std::int64_t capacity, Hints hints) {
  using Storage = prefillshare::NoKvStorage;
  Storage storage({1, 1, 1, 1}, capacity);
  auto allocator =
      prefillshare::BasicKvAllocator<Storage, prefillshare::ChainHash, Eviction>::create(storage).value();
  constexpr std::int64_t kNever = prefillshare::kKvNever;
  std::vector<std::vector<std::int64_t>> next;  // of each block of each request: the next request with it
  if (hints == Hints::kFiveMinutes || hints == Hints::kAll) {
    next.resize(trace.requests.size());
    std::vector<std::int64_t> seen(static_cast<std::size_t>(trace.unique), kNever);
    for (std::size_t i = trace.requests.size(); i-- > 0;) {
      for (const std::int32_t block : trace.requests[i].blocks) {
        next[i].push_back(seen[static_cast<std::size_t>(block)]);
        seen[static_cast<std::size_t>(block)] = static_cast<std::int64_t>(i);
      }
    }
  }
  const prefillshare::CacheKey key{"trace", "1", ""};
  Replay result;
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < trace.requests.size(); ++i) {
    const TraceRequest& request = trace.requests[i];
    if constexpr (prefillshare::HintedEviction<Eviction>) {
      allocator->set_time(hints == Hints::kReused ? request.time_ms : static_cast<std::int64_t>(i));
    }
    auto sequence = allocator->open(key, request.blocks).value();
    const std::int64_t found = sequence.length();
    result.hits += found;
    const auto missing =
        std::span<const std::int32_t>(request.blocks).subspan(static_cast<std::size_t>(found));
    if (!allocator->reserve(sequence, std::ssize(missing)).ok() ||
        !allocator->commit(sequence, missing).ok()) {
      throw std::runtime_error("a request does not fit");
    }
    if constexpr (prefillshare::HintedEviction<Eviction>) {
      prefillshare::Retention retention;
      if (hints == Hints::kReused) {
        retention.priority = 80;
        retention.expires = request.time_ms + 600'000;
        static_cast<void>(allocator->retain(sequence, 0, found, retention).ok());
      }
      for (std::int64_t b = 0; b < std::ssize(request.blocks) && !next.empty(); ++b) {
        retention.next_use = next[i][static_cast<std::size_t>(b)];
        if (hints == Hints::kFiveMinutes && retention.next_use != kNever &&
            trace.requests[static_cast<std::size_t>(retention.next_use)].time_ms >
                request.time_ms + 300'000) {
          retention.next_use = kNever;
        }
        static_cast<void>(allocator->retain(sequence, b, b + 1, retention).ok());
      }
    }
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

/// Belady's offline optimum for single blocks: hits that no policy can exceed.
[[nodiscard]] inline std::int64_t offline_optimum(const Trace& trace, std::int64_t capacity) {
  std::vector<std::int32_t> accesses;
  for (const TraceRequest& request : trace.requests) {
    accesses.insert(accesses.end(), request.blocks.begin(), request.blocks.end());
  }
  constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
  std::vector<std::int64_t> next(accesses.size());
  std::vector<std::int64_t> seen(static_cast<std::size_t>(trace.unique), kNever);
  for (std::size_t i = accesses.size(); i-- > 0;) {
    next[i] = std::exchange(seen[static_cast<std::size_t>(accesses[i])], static_cast<std::int64_t>(i));
  }
  std::set<std::pair<std::int64_t, std::int32_t>> cached;  // by next access
  std::int64_t hits = 0;
  for (std::size_t i = 0; i < accesses.size(); ++i) {
    const auto found = cached.find({static_cast<std::int64_t>(i), accesses[i]});
    if (found != cached.end()) {
      ++hits;
      cached.erase(found);
    } else if (std::ssize(cached) == capacity) {
      cached.erase(std::prev(cached.end()));
    }
    cached.insert({next[i], accesses[i]});
  }
  return hits;
}

}  // namespace codegemm::bench
