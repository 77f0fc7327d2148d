// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/metrics.hpp - what a run of the simulator has measured.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace prefillshare {

/// p50, p95 and p99 by nearest rank; all 0 of nothing.
struct Percentiles {
  std::int64_t count = 0;  ///< values
  double mean = 0.0;       ///< arithmetic
  double p50 = 0.0;        ///< median
  double p95 = 0.0;        ///< 95 of 100 are at most this
  double p99 = 0.0;        ///< 99 of 100 are at most this
  double most = 0.0;       ///< the largest
};

/// Of these values, in any order.
[[nodiscard]] inline Percentiles percentiles(std::vector<double> values) {
  Percentiles out;
  out.count = static_cast<std::int64_t>(values.size());
  if (values.empty()) return out;
  const auto rank = [&](double share) {
    const double place = std::ceil(share * static_cast<double>(values.size())) - 1.0;
    const auto at = values.begin() + static_cast<std::ptrdiff_t>(std::max(place, 0.0));
    std::nth_element(values.begin(), at, values.end());
    return *at;
  };
  double sum = 0.0;
  for (const double value : values) sum += value;
  out.mean = sum / static_cast<double>(values.size());
  out.p50 = rank(0.50);
  out.p95 = rank(0.95);
  out.p99 = rank(0.99);
  out.most = rank(1.00);
  return out;
}

/// Times in simulated seconds: of a session from its arrival, so that waiting for admission counts; of a call
/// from the moment it is issued.
struct SimReport {
  /// Every session and every call ends once: finished, or refused by a full queue.
  std::int64_t sessions_finished = 0;
  std::int64_t sessions_refused = 0;  ///< by a full queue or after their patience
  std::int64_t calls_finished = 0;    ///< with all their tokens
  std::int64_t calls_unfinished = 0;  ///< no worker was there for them until the end
  std::int64_t output_tokens = 0;     ///< of all calls
  double seconds = 0.0;               ///< from 0 to the last end

  Percentiles session_latency;     ///< seconds, to the last call's end
  Percentiles call_latency;        ///< seconds, to its last token
  Percentiles first_token;         ///< TTFT
  Percentiles per_token;           ///< after the first, the mean of each call
  Percentiles prefill_wait;        ///< from the issue to the first step of the prefill
  double tokens_per_second = 0.0;  ///< between the ends of the first and the last tenth of the calls

  std::int64_t prompt_tokens = 0;    ///< looked up at a prefill worker, all attempts
  std::int64_t hit_tokens = 0;       ///< and found
  std::int64_t computed_tokens = 0;  ///< by prefill workers
  std::int64_t attempts = 0;         ///< prefills begun; more than calls when some were begun again
  std::int64_t preempted = 0;        ///< calls that lost their decode memory to others
  std::int64_t rerouted = 0;         ///< attempts that died with a worker
  std::int64_t staged = 0;           ///< caches parked in host memory
  double transferred_bytes = 0.0;    ///< from prefill to decode workers
  double staged_bytes = 0.0;         ///< to host memory

  double prefill_busy = 0.0;           ///< share of the workers' time until the last end
  double decode_busy = 0.0;            ///< share of the workers' time until the last end
  double mean_batch = 0.0;             ///< sequences in a decode step
  double prefill_kv_bytes_most = 0.0;  ///< in use, of all workers together, sampled
  double decode_kv_bytes_most = 0.0;   ///< the same of decode workers
  double prefill_kv_bytes_mean = 0.0;  ///< the mean of the samples
  double decode_kv_bytes_mean = 0.0;   ///< the mean of the samples
  std::uint64_t events = 0;            ///< handled by the simulator

  /// Prompt tokens that were cached where they were wanted, as a share of all.
  [[nodiscard]] double hit_ratio() const noexcept {
    return prompt_tokens > 0 ? static_cast<double>(hit_tokens) / static_cast<double>(prompt_tokens) : 0.0;
  }
};

}  // namespace prefillshare
