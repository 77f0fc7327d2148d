// SPDX-License-Identifier: Apache-2.0
//
// bench/support/finetune_queue.hpp - the runs of the suite finetune, some side by side, each as soon as those
// that it waits for are done.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace codegemm::bench {

/// Jobs in the order in which they are begun, as far as what they wait for allows.
class FinetuneQueue {
 public:
  /// `worker`: 0 to one below their number.
  using Job = std::function<void(std::size_t worker)>;

  /// `after`: numbers of jobs that must be done before. `on_host`: one that keeps the host busy more than the
  /// GPU; at most half of the workers have such a job at a time. Gives the job's number.
  std::size_t add(Job job, std::vector<std::size_t> after = {}, bool on_host = false) {
    jobs_.push_back({std::move(job), std::move(after), on_host});
    return jobs_.size() - 1;
  }

  /// Does all jobs; a single worker is the calling thread. The first exception ends it: what is running is
  /// finished, nothing else begun, and the exception thrown.
  void run(std::size_t workers) {
    workers_ = workers;
    if (workers <= 1) {
      work(0);
    } else {
      std::vector<std::jthread> threads;
      for (std::size_t worker = 0; worker < workers; ++worker)
        threads.emplace_back([this, worker] { work(worker); });
    }
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  enum class State { kWaits, kRuns, kDone };
  struct Entry {
    Job job;
    std::vector<std::size_t> after;
    bool on_host = false;
    State state = State::kWaits;
  };

  void work(std::size_t worker) {
    std::unique_lock lock(mutex_);
    while (true) {
      Entry* next = nullptr;
      bool waiting = false;
      for (Entry& entry : jobs_) {
        if (entry.state != State::kWaits) continue;
        waiting = true;
        if (!ready(entry)) continue;
        next = &entry;
        break;
      }
      if (!waiting || failure_ != nullptr) return;
      if (next == nullptr) {
        changed_.wait(lock);
        continue;
      }
      next->state = State::kRuns;
      lock.unlock();
      std::exception_ptr failure;
      try {
        next->job(worker);
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      next->state = State::kDone;
      if (failure_ == nullptr) failure_ = failure;
      changed_.notify_all();
    }
  }

  [[nodiscard]] bool ready(const Entry& entry) const {
    if (entry.on_host) {
      const auto busy = static_cast<std::size_t>(std::count_if(
          jobs_.begin(), jobs_.end(), [](const Entry& e) { return e.on_host && e.state == State::kRuns; }));
      if (busy >= std::max<std::size_t>(1, workers_ / 2)) return false;
    }
    return std::all_of(entry.after.begin(), entry.after.end(),
                       [&](std::size_t job) { return jobs_[job].state == State::kDone; });
  }

  std::vector<Entry> jobs_;
  std::size_t workers_ = 1;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::exception_ptr failure_;
};

}  // namespace codegemm::bench
