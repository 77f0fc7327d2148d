// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/cuda/page_copy.cuh - pages of one layer from one place in device memory to another, and
// what the device transports share.
// Layer: serve/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <codegemm/cuda/device.cuh>
#include <codegemm/cuda/launch.cuh>
#include <prefillshare/kv/device_storage.cuh>
#include <prefillshare/serve/cuda/kernels/page_copy.cuh>
#include <prefillshare/serve/transport.hpp>

namespace prefillshare::cuda {

/// Takes pages in device memory layer by layer, as a prefill announces them, so that what is on the way and
/// what is being computed overlap. send() puts the transfer behind what `produced` holds, and returns; the
/// pages may be written again when poll() no longer counts the run. poll() tells the hand-offs what has
/// arrived and returns how many runs are under way; drain() waits for all. That all of a cache is there, the
/// hand-off's own state says.
template <class Transport, class T>
concept DevicePageTransport = requires(Transport& transport, const DeviceKvStorage<T>& from,
                                       const PageRun& run, cudaStream_t produced) {
  { transport.send(from, run, produced) } -> std::same_as<Status>;
  { transport.poll() } -> std::same_as<Result<std::int64_t>>;
  { transport.drain() } -> std::same_as<Status>;
};

/// Pages of one layer, side by side: page i is at base + i * bytes.
struct PageArray {
  void* base = nullptr;    ///< device memory that the current device reaches, aligned to 16 bytes
  std::int64_t bytes = 0;  ///< of a page, a multiple of 16
};

/// Puts into the stream: page to_pages[i] of `to` = page from_pages[i] of `from`, by a kernel of up to
/// `blocks` blocks on the stream's device. The numbers are read before it returns. kShapeMismatch,
/// kMisaligned, kCudaError.
[[nodiscard]] inline Status copy_pages(const PageArray& from, std::span<const BlockId> from_pages,
                                       const PageArray& to, std::span<const BlockId> to_pages, int blocks,
                                       cudaStream_t stream) {
  if (from_pages.size() != to_pages.size() || from.bytes != to.bytes || blocks < 1) {
    return codegemm::error(StatusCode::kShapeMismatch, "copy of ", from_pages.size(), " pages of ",
                           from.bytes, " bytes to ", to_pages.size(), " of ", to.bytes, " by ", blocks,
                           " blocks");
  }
  const auto off = [](const PageArray& pages) {
    return pages.bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(pages.base) % 16 != 0;
  };
  if (off(from) || off(to)) {
    return codegemm::error(StatusCode::kMisaligned, "copy of pages of ", from.bytes,
                           " bytes: they are not aligned to 16 bytes");
  }
  PageCopyArgs args;
  args.from = static_cast<const uint4*>(from.base);
  args.to = static_cast<uint4*>(to.base);
  args.page_words = from.bytes / 16;
  for (std::size_t done = 0; done < from_pages.size();) {
    const std::size_t count = std::min<std::size_t>(kPageCopyPages, from_pages.size() - done);
    args.pages = static_cast<int>(count);
    std::copy_n(from_pages.data() + done, count, args.from_pages);
    std::copy_n(to_pages.data() + done, count, args.to_pages);
    codegemm::cuda::LaunchShape shape;
    const std::int64_t tile = std::int64_t{kPageCopyThreads} * kPageCopyWords;
    shape.grid = dim3(static_cast<unsigned>(std::min<std::int64_t>(
        blocks, static_cast<std::int64_t>(count) * ((args.page_words + tile - 1) / tile))));
    shape.threads = kPageCopyThreads;
    if (Status s = codegemm::cuda::launch(page_copy_kernel<0>, shape, args, stream); !s.ok()) return s;
    done += count;
  }
  return {};
}

/// The pages of one layer of a storage.
template <class T>
[[nodiscard]] PageArray pages_of(const DeviceKvStorage<T>& storage, int layer) {
  return {storage.layer(layer), storage.page_elements() * static_cast<std::int64_t>(sizeof(T))};
}

namespace detail {

/// Whether a run can be sent from a storage at all.
template <class T>
[[nodiscard]] Status check_device_run(const DeviceKvStorage<T>& from, const PageRun& run) {
  const KvShape& shape = from.shape();
  bool there = run.layer >= 0 && run.layer < shape.layers && run.first >= 0 && !run.blocks.empty() &&
               run.last_tokens >= 1 && run.last_tokens <= shape.block_tokens;
  for (const BlockId block : run.blocks) there = there && block >= 0 && block < from.blocks();
  if (there) return {};
  return codegemm::error(StatusCode::kInvalidArgument, "hand-off ", run.handoff, ": ", run.blocks.size(),
                         " blocks from ", run.first, " of layer ", run.layer, ", ", run.last_tokens,
                         " tokens in the last, of a storage of ", from.blocks(), " blocks in ", shape.layers,
                         " layers");
}

[[nodiscard]] inline Status cuda_call(cudaError_t code, const char* what) {
  if (code != cudaSuccess) static_cast<void>(cudaGetLastError());
  return codegemm::cuda::cuda_status(code, what);
}

// CUDA events that are freed with their owner.
class Events {
 public:
  Events() = default;
  Events(Events&& other) noexcept : events_(std::exchange(other.events_, {})) {}
  Events& operator=(Events&& other) noexcept {
    events_.swap(other.events_);
    return *this;
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
  ~Events() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  [[nodiscard]] static Result<Events> create(std::size_t count) {
    Events out;
    if (!prefillshare::detail::try_reserve(out.events_, count)) {
      return codegemm::error(StatusCode::kOutOfMemory, "no memory for ", count, " events");
    }
    for (std::size_t i = 0; i < count; ++i) {
      cudaEvent_t event = nullptr;
      if (Status s = cuda_call(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
          !s.ok()) {
        return s;
      }
      out.events_.push_back(event);
    }
    return out;
  }
  [[nodiscard]] std::size_t size() const { return events_.size(); }
  [[nodiscard]] cudaEvent_t operator[](std::size_t i) const { return events_[i]; }

 private:
  std::vector<cudaEvent_t> events_;
};

// `to` goes on when `from` has got here. The event may be used again at once.
[[nodiscard]] inline Status join(cudaStream_t to, cudaStream_t from, cudaEvent_t event) {
  if (Status s = cuda_call(cudaEventRecord(event, from), "cudaEventRecord"); !s.ok()) return s;
  return cuda_call(cudaStreamWaitEvent(to, event, 0), "cudaStreamWaitEvent");
}

// What was put into a stream and has not been seen to end, oldest first, at most as many as were allowed.
template <class Entry>
class UnderWay {
 public:
  UnderWay() = default;
  UnderWay(UnderWay&& other) noexcept { *this = std::move(other); }
  UnderWay& operator=(UnderWay&& other) noexcept {
    std::swap(events_, other.events_);
    entries_.swap(other.entries_);
    std::swap(first_, other.first_);
    std::swap(count_, other.count_);
    return *this;
  }
  UnderWay(const UnderWay&) = delete;
  UnderWay& operator=(const UnderWay&) = delete;
  ~UnderWay() = default;

  [[nodiscard]] static Result<UnderWay> create(std::int64_t most) {
    if (most < 1 || most > (1 << 20)) {
      return codegemm::error(StatusCode::kInvalidArgument, "a transport for ", most, " runs under way");
    }
    auto events = Events::create(static_cast<std::size_t>(most));
    if (!events.ok()) return events.status();
    UnderWay out;
    out.events_ = std::move(events).value();
    if (!prefillshare::detail::try_allocate([&] { out.entries_.resize(out.events_.size()); })) {
      return codegemm::error(StatusCode::kOutOfMemory, "no memory for ", most, " runs under way");
    }
    return out;
  }

  [[nodiscard]] bool full() const { return count_ == entries_.size(); }
  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(count_); }
  // It ends when the stream gets here. Not when full().
  [[nodiscard]] Status push(const Entry& entry, cudaStream_t stream) {
    const std::size_t at = (first_ + count_) % entries_.size();
    if (Status s = cuda_call(cudaEventRecord(events_[at], stream), "cudaEventRecord"); !s.ok()) return s;
    entries_[at] = entry;
    ++count_;
    return {};
  }
  // ended(entry) for each that has; with `wait`, for the oldest at least.
  template <class Ended>
  [[nodiscard]] Status collect(bool wait, Ended&& ended) {
    while (count_ > 0) {
      const cudaError_t code = wait ? cudaEventSynchronize(events_[first_]) : cudaEventQuery(events_[first_]);
      if (code == cudaErrorNotReady) {
        static_cast<void>(cudaGetLastError());
        return {};
      }
      if (Status s = cuda_call(code, "a transfer of pages"); !s.ok()) return s;
      wait = false;
      const Entry entry = entries_[first_];
      first_ = (first_ + 1) % entries_.size();
      --count_;
      ended(entry);
    }
    return {};
  }
  // How many have not ended; ended(entry) for the others.
  template <class Ended>
  [[nodiscard]] Result<std::int64_t> poll(Ended&& ended) {
    if (Status s = collect(false, ended); !s.ok()) return s;
    return size();
  }
  // Waits for all.
  template <class Ended>
  [[nodiscard]] Status drain(Ended&& ended) {
    while (count_ > 0) {
      if (Status s = collect(true, ended); !s.ok()) return s;
    }
    return {};
  }

 private:
  Events events_;
  std::vector<Entry> entries_;
  std::size_t first_ = 0;
  std::size_t count_ = 0;
};

// Pages of a hand-off that are being written.
struct PagesOnTheWay {
  HandoffId handoff = 0;
  std::int64_t layer = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
};

// Tells the table of pages that have been written.
template <class Table>
[[nodiscard]] auto finish_in(Table& table) {
  return [&table](const PagesOnTheWay& pages) {
    // That it was aborted meanwhile is no failure of the transport: the blocks go back with this.
    static_cast<void>(table.finish(pages.handoff, pages.layer, pages.first, pages.count).ok());
  };
}

}  // namespace detail

}  // namespace prefillshare::cuda
