// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/recorder.hpp - what a simulated cluster measures of itself.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <prefillshare/sim/metrics.hpp>
#include <prefillshare/sim/nodes.hpp>

namespace prefillshare::detail {

/// Collects the times of calls and sessions and samples of KV memory, all in seconds and bytes, and makes the
/// percentiles, rates and means of a SimReport out of them.
class SimRecorder {
 public:
  void reserve(std::size_t calls) { latency_.reserve(calls); }

  /// A call has been answered now, with `output` tokens.
  void answered(const SimCall& one, std::int32_t output, double now) {
    latency_.push_back(now - one.issued);
    first_token_.push_back(one.first_token - one.issued);
    prefill_wait_.push_back(one.began - one.issued);
    if (output > 1) per_token_.push_back((now - one.first_token) / (output - 1));
    ends_.push_back({now, output});
  }
  void session_ended(double seconds) { session_latency_.push_back(seconds); }

  /// KV in use on either side, bytes.
  void sample(double prefill_bytes, double decode_bytes, SimReport& report) {
    report.prefill_kv_bytes_most = std::max(report.prefill_kv_bytes_most, prefill_bytes);
    report.decode_kv_bytes_most = std::max(report.decode_kv_bytes_most, decode_bytes);
    prefill_bytes_sum_ += prefill_bytes;
    decode_bytes_sum_ += decode_bytes;
    ++samples_;
  }

  /// Once, at the end: what was collected goes into the report.
  void finish(SimReport& report) {
    report.session_latency = percentiles(std::move(session_latency_));
    report.call_latency = percentiles(std::move(latency_));
    report.first_token = percentiles(std::move(first_token_));
    report.per_token = percentiles(std::move(per_token_));
    report.prefill_wait = percentiles(std::move(prefill_wait_));
    const std::size_t tenth = ends_.size() / 10;
    if (tenth > 0) {
      std::int64_t tokens = 0;
      for (std::size_t i = tenth; i < ends_.size() - tenth; ++i) tokens += ends_[i].tokens;
      const double seconds = ends_[ends_.size() - tenth - 1].time - ends_[tenth - 1].time;
      if (seconds > 0.0) report.tokens_per_second = static_cast<double>(tokens) / seconds;
    }
    report.prefill_kv_bytes_mean = prefill_bytes_sum_ / static_cast<double>(samples_);
    report.decode_kv_bytes_mean = decode_bytes_sum_ / static_cast<double>(samples_);
  }

 private:
  struct End {
    double time = 0.0;
    std::int32_t tokens = 0;
  };

  std::vector<double> latency_;
  std::vector<double> first_token_;
  std::vector<double> per_token_;
  std::vector<double> prefill_wait_;
  std::vector<double> session_latency_;
  std::vector<End> ends_;
  double prefill_bytes_sum_ = 0.0;
  double decode_bytes_sum_ = 0.0;
  std::int64_t samples_ = 0;
};

}  // namespace prefillshare::detail
