// SPDX-License-Identifier: Apache-2.0
//
// codegemm/base/thread_pool.hpp - an Executor on threads that the caller creates and owns.
// Layer: base (host only).
#pragma once

#include <algorithm>
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
/// One run() at a time. Worker i begins with task i, without asking anyone; the others are handed out one by
/// one, so uneven tasks balance themselves, and the caller does what a sleeper has not begun.
class ThreadPool final : public Executor {
 public:
  /// At least one worker; 0 or less means one for each hardware thread. std::system_error where the system
  /// gives no more threads; those that have begun are ended first.
  explicit ThreadPool(int threads = 0) : ThreadPool(Seats{wanted(threads)}) {
    const int workers = this->workers();
    threads_.reserve(static_cast<std::size_t>(workers - 1));
    for (int worker = 1; worker < workers; ++worker) {
      threads_.emplace_back([this, worker] { serve(worker); });
    }
  }

  ~ThreadPool() override {
    {
      const std::lock_guard lock(mutex_);
      publish(0);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  [[nodiscard]] int workers() const noexcept override { return static_cast<int>(seats_.size()); }

  void run(std::int64_t count, Task task, void* context) override {
    if (count <= 0) return;
    if (threads_.empty() || count == 1) {
      for (std::int64_t i = 0; i < count; ++i) task(context, i, 0);
      return;
    }
    const std::int64_t seated = std::min<std::int64_t>(count, workers());
    loop_.task = task;
    loop_.context = context;
    loop_.count = count;
    next_.value.store(static_cast<std::uint64_t>(seated), std::memory_order_relaxed);
    publish(seated);
    // No lock, which would wait until the others' copies of the line are gone. Who is just lying down may be
    // missed and sleeps over this loop.
    if (sleepers_.load(std::memory_order_relaxed) > 0) {
      const std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    const std::uint64_t epoch = loop_.word.load(std::memory_order_relaxed) >> kSeatedBits;
    task(context, 0, 0);
    drain(0);
    // The loop's state is on this stack frame: no worker may still be in it on return, nor come in after it.
    for (std::int64_t worker = 1; worker < seated; ++worker) {
      std::atomic<std::uint64_t>& seat = seats_[static_cast<std::size_t>(worker)].value;
      if (take(seat, epoch, done(epoch))) {
        task(context, worker, 0);
        continue;
      }
      for (int spins = 0; seat.load(std::memory_order_acquire) != done(epoch); ++spins) pause(spins);
    }
  }

 private:
  static constexpr int kPollsBeforeSleep = 20000;  // some tens of microseconds
  static constexpr int kPausesBeforeYield = 2000;  // a preempted worker needs this core

  static constexpr int kSeatedBits = 16;
  static constexpr std::uint64_t kSeatedMask = (1U << kSeatedBits) - 1U;

  // Alone where it is, its neighbour that processors bring along included: who writes it disturbs nobody
  // else.
  struct alignas(128) Apart {
    std::atomic<std::uint64_t> value{0};
  };

  // After this constructor there is a pool, and if starting a thread fails its destructor runs.
  struct Seats {
    std::size_t count;
  };
  explicit ThreadPool(Seats seats) : seats_(seats.count) {}

  static std::size_t wanted(int threads) {
    if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
    return static_cast<std::size_t>(std::clamp(threads, 1, (1 << kSeatedBits) - 1));
  }

  // A seat has the number of the last loop that its worker has begun or that is done with it.
  static constexpr std::uint64_t begun(std::uint64_t epoch) { return 2 * epoch + 1; }
  static constexpr std::uint64_t done(std::uint64_t epoch) { return 2 * epoch + 2; }

  // Whether the worker's first task of a loop was not taken before; it is then.
  static bool take(std::atomic<std::uint64_t>& seat, std::uint64_t epoch, std::uint64_t to) {
    std::uint64_t was = seat.load(std::memory_order_acquire);
    return was < begun(epoch) && seat.compare_exchange_strong(was, to, std::memory_order_acq_rel);
  }

  // The next loop, in which so many workers have a task to begin with.
  void publish(std::int64_t seated) {
    const std::uint64_t epoch = (loop_.word.load(std::memory_order_relaxed) >> kSeatedBits) + 1;
    loop_.word.store(epoch << kSeatedBits | static_cast<std::uint64_t>(seated), std::memory_order_release);
  }

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
    if (loop_.count == static_cast<std::int64_t>(loop_.word.load(std::memory_order_relaxed) & kSeatedMask))
      return;
    const auto next = [&] {
      return static_cast<std::int64_t>(next_.value.fetch_add(1, std::memory_order_relaxed));
    };
    for (std::int64_t i = next(); i < loop_.count; i = next()) loop_.task(loop_.context, i, worker);
  }

  void serve(int worker) {
    std::atomic<std::uint64_t>& seat = seats_[static_cast<std::size_t>(worker)].value;
    std::uint64_t seen = 0;
    for (;;) {
      std::uint64_t word = loop_.word.load(std::memory_order_acquire);
      for (int poll = 0; poll < kPollsBeforeSleep && word == seen; ++poll) {
        pause(poll);
        word = loop_.word.load(std::memory_order_acquire);
      }
      if (word == seen) {
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_relaxed);
        wake_.wait(lock, [&] { return loop_.word.load(std::memory_order_acquire) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        word = loop_.word.load(std::memory_order_acquire);
      }
      seen = word;
      const std::uint64_t epoch = word >> kSeatedBits;
      const auto seated = static_cast<int>(word & kSeatedMask);
      if (seated == 0) return;  // the pool ends
      // Once the seat is taken the loop cannot end, and what it says is this loop's.
      if (worker >= seated || !take(seat, epoch, begun(epoch))) continue;
      loop_.task(loop_.context, worker, worker);
      drain(worker);
      seat.store(done(epoch), std::memory_order_release);
    }
  }

  // What a worker is to know, in one line: written before `word` is, which says the number of
  // the loop and how many workers have a task to begin with.
  struct alignas(128) Loop {
    std::atomic<std::uint64_t> word{0};
    Task task = nullptr;
    void* context = nullptr;
    std::int64_t count = 0;
  };
  Loop loop_;
  Apart next_;
  std::vector<Apart> seats_;  // of the workers
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace codegemm
