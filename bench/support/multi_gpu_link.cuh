// SPDX-License-Identifier: Apache-2.0
//
// bench/support/multi_gpu_link.cuh - bytes a second between two GPUs, and the time of a sum over all.
#pragma once

#include <algorithm>
#include <barrier>
#include <functional>
#include <span>
#include <vector>

#include "multi_gpu_common.cuh"

namespace codegemm::bench::multi {

// ---- link

inline double copy_gb_per_s(cudaStream_t stream, double bytes, const std::function<void()>& copy) {
  std::vector<double> times;
  for (int i = 0; i < 6; ++i) {
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    const auto start = Clock::now();
    copy();
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    if (i > 0) times.push_back(us_since(start));
  }
  return bytes / median(times) * 1e-3;
}

// The most that any way of copying reaches, GB/s.
inline double link_peak(int to, Rows* rows) {
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  use(to);
  auto target = device_array<std::byte>(kBytes);
  use(0);
  auto source = device_array<std::byte>(kBytes);
  check(cudaMemset(source.data(), 0x5A, kBytes), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaMemset");
  Stream stream;
  double peak = 0.0;
  const auto tell = [&](const char* how, int blocks, double speed) {
    peak = std::max(peak, speed);
    if (rows != nullptr) rows->add("link", {{"name", how}, {"blocks", blocks}, {"gb_per_s", speed}});
  };
  tell("cudaMemcpyPeer", 0, copy_gb_per_s(stream.get, kBytes, [&] {
         check(cudaMemcpyPeerAsync(target.data(), to, source.data(), 0, kBytes, stream.get),
               "cudaMemcpyPeerAsync");
       }));
  const BlockId zero = 0;
  for (const int blocks : {4, 8, 16, 32, 64, 132}) {
    tell("copy kernel", blocks, copy_gb_per_s(stream.get, kBytes, [&] {
           check(copy_pages({source.data(), kBytes}, std::span(&zero, 1), {target.data(), kBytes},
                            std::span(&zero, 1), blocks, stream.get));
         }));
  }
  return peak;
}

// ---- sums

template <class Group>
void measure_sums(const char* kind, int ranks, const std::function<const Group&(int)>& group, Rows& rows) {
  std::barrier all(ranks);
  for (const std::int64_t count : {8192, 8 * 8192, 32 * 8192, 256 * 8192}) {
    double us = 0.0;
    on_ranks(ranks, [&](int r) {
      constexpr int kSums = 50;
      Stream stream;
      auto data = take(DeviceArray<float>::zeros(static_cast<std::size_t>(count)));
      const MatrixView<float> x(data.data(), 1, count);
      all.arrive_and_wait();
      check(group(r).sum(x, stream.get));  // whatever the first call makes is made
      stream.wait();
      all.arrive_and_wait();
      const Replay graph(stream.get, kSums, [&](int) { check(group(r).sum(x, stream.get)); });
      std::vector<double> times;
      for (int i = 0; i < 12; ++i) {
        all.arrive_and_wait();
        const auto start = Clock::now();
        graph.enqueue();
        graph.wait();
        if (i > 1) times.push_back(us_since(start) / kSums);
      }
      check_group(group(r), stream.get);
      if (r == 0) us = median(times);
      all.arrive_and_wait();
    });
    rows.add("sums", {{"name", kind},
                      {"gpus", ranks},
                      {"bytes", count * 4},
                      {"us", us},
                      {"gb_per_s", static_cast<double>(count) * 4.0 / us * 1e-3}});
  }
}

}  // namespace codegemm::bench::multi
