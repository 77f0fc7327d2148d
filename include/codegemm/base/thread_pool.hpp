// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/thread_pool.hpp - an Executor on threads that the caller creates and owns.
// Layer: base (host only).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include <codegemm/base/executor.hpp>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace codegemm {

/// `threads` workers: the thread that calls run() and threads - 1 that live as long as the pool. Between
/// loops a worker polls for a short while, since a decode step is hundreds of short loops, and then sleeps.
/// One run() at a time. Tasks are handed out one by one, so uneven tasks balance themselves.
class ThreadPool final : public Executor {
 public:
  /// At least one worker; 0 or less means one for each hardware thread. std::system_error where the system
  /// gives no more threads; those that have begun are ended first.
  explicit ThreadPool(int threads = 0) : ThreadPool(NoThreads{}) {
    if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
    if (threads < 1) threads = 1;
    threads_.reserve(static_cast<std::size_t>(threads - 1));
    for (int worker = 1; worker < threads; ++worker) {
      threads_.emplace_back([this, worker] { serve(worker); });
    }
  }

  ~ThreadPool() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  [[nodiscard]] int workers() const noexcept override { return static_cast<int>(threads_.size()) + 1; }

  void run(std::int64_t count, Task task, void* context) override {
    if (count <= 0) return;
    if (threads_.empty() || count == 1) {
      for (std::int64_t i = 0; i < count; ++i) task(context, i, 0);
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      task_ = task;
      context_ = context;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
      epoch_.fetch_add(1, std::memory_order_release);
      if (sleepers_ > 0) wake_.notify_all();
    }
    drain(0);
    // The loop's state is on this stack frame: no worker may still be in it on return.
    for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; ++spins) pause(spins);
  }

 private:
  static constexpr int kPollsBeforeSleep = 20000;  // some tens of microseconds
  static constexpr int kPausesBeforeYield = 2000;  // a preempted worker needs this core

  // After this constructor there is a pool, and if starting a thread fails its destructor runs.
  struct NoThreads {};
  explicit ThreadPool(NoThreads) {}

  static void pause(int spins) {
    if (spins > kPausesBeforeYield) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  void drain(int worker) {
    for (std::int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count_;
         i = next_.fetch_add(1, std::memory_order_relaxed)) {
      task_(context_, i, worker);
    }
  }

  void serve(int worker) {
    std::uint64_t seen = 0;
    for (;;) {
      for (int poll = 0; poll < kPollsBeforeSleep && epoch_.load(std::memory_order_acquire) == seen; ++poll) {
        pause(poll);
      }
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
        --sleepers_;
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      drain(worker);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Written under mutex_ before epoch_ is raised, read by the workers after they have seen it raised.
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::int64_t count_ = 0;
  bool stop_ = false;
  int sleepers_ = 0;  // under mutex_

  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace codegemm
