// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/cuda/staged_pages.cuh - the hand-off as messages between two GPUs: scattered pages are
// gathered into one piece, sent, and scattered into the reserved blocks; what lies in one piece is sent as it
// lies.
// Layer: serve/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <prefillshare/serve/cuda/page_copy.cuh>

namespace prefillshare::cuda {

/// Moves bytes between two GPUs: what one end sends, the other receives in the same order and sizes. Both put
/// work into a stream of their device and return.
template <class W>
concept PageWire = requires(W& wire, void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  { wire.send(from, bytes, stream) } -> std::same_as<Status>;
  { wire.receive(to, bytes, stream) } -> std::same_as<Status>;
};

/// What the receiver has to know of a run before its pages come: the caller takes it there, in the order of
/// the calls of send().
struct PageNotice {
  HandoffId handoff = 0;         ///< as granted by the receiver
  std::int64_t layer = 0;        ///< of the model
  std::int64_t first = 0;        ///< block of the hand-off that the first is sent for
  std::int64_t count = 0;        ///< blocks
  std::int64_t last_tokens = 0;  ///< tokens in the last of them
};
/// Of a run.
[[nodiscard]] inline PageNotice notice_of(const PageRun& run) {
  return {run.handoff, run.layer, run.first, std::ssize(run.blocks), run.last_tokens};
}

/// Streams and memory of one end, on its device; they outlive it. Both ends have the same chunk_pages.
struct StagedPageOptions {
  cudaStream_t wire = nullptr;         ///< messages; not the one that computes
  cudaStream_t copies = nullptr;       ///< gathering or scattering, beside the messages
  std::span<std::byte> staging;        ///< device memory, aligned to 16 bytes: a chunk at least, four do best
  std::int64_t chunk_pages = 64;       ///< of a message
  int copy_blocks = 32;                ///< of the kernel that gathers or scatters
  std::int64_t most_under_way = 1024;  ///< runs; more wait for the oldest
};

namespace detail {

// The slots of staging memory, in turn, and the events that order the two streams.
class Staging {
 public:
  [[nodiscard]] static Result<Staging> create(const StagedPageOptions& options, std::int64_t page_bytes) {
    const std::int64_t chunk = options.chunk_pages * page_bytes;
    if (options.chunk_pages < 1 || options.copy_blocks < 1 || std::ssize(options.staging) < chunk) {
      return codegemm::error(StatusCode::kWorkspaceTooSmall, "staging of ", options.staging.size(),
                             " bytes for chunks of ", options.chunk_pages, " pages of ", page_bytes);
    }
    Staging out;
    out.chunk_ = chunk;
    out.slots_ = static_cast<std::size_t>(std::min<std::int64_t>(8, std::ssize(options.staging) / chunk));
    auto events = Events::create(1 + 2 * out.slots_);
    if (!events.ok()) return events.status();
    out.events_ = std::move(events).value();
    out.base_ = options.staging.data();
    // Page numbers within a slot.
    if (!prefillshare::detail::try_allocate(
            [&] { out.numbers_.resize(static_cast<std::size_t>(options.chunk_pages)); })) {
      return codegemm::error(StatusCode::kOutOfMemory, "no memory for ", options.chunk_pages,
                             " page numbers");
    }
    std::iota(out.numbers_.begin(), out.numbers_.end(), 0);
    return out;
  }

  [[nodiscard]] std::size_t next() { return turn_++ % slots_; }
  [[nodiscard]] std::byte* slot(std::size_t i) const { return base_ + static_cast<std::int64_t>(i) * chunk_; }
  [[nodiscard]] std::span<const BlockId> numbers(std::size_t count) const {
    return std::span<const BlockId>(numbers_).first(count);
  }
  [[nodiscard]] cudaEvent_t order() const { return events_[0]; }
  [[nodiscard]] cudaEvent_t full(std::size_t i) const { return events_[1 + 2 * i]; }
  [[nodiscard]] cudaEvent_t empty(std::size_t i) const { return events_[2 + 2 * i]; }

 private:
  std::byte* base_ = nullptr;
  std::int64_t chunk_ = 0;  // bytes
  std::size_t slots_ = 0;
  std::size_t turn_ = 0;
  Events events_;
  std::vector<BlockId> numbers_;
};

[[nodiscard]] inline bool one_piece(std::span<const BlockId> blocks) {
  for (std::size_t i = 1; i < blocks.size(); ++i) {
    if (blocks[i] != blocks[i - 1] + 1) return false;
  }
  return true;
}
[[nodiscard]] inline std::byte* page(const PageArray& pages, BlockId block) {
  return static_cast<std::byte*>(pages.base) + block * pages.bytes;
}

}  // namespace detail

/// The sending end. Made, used and destroyed with its GPU current, when it waits for what is under way; one
/// thread at a time.
template <class T, PageWire Wire>
class StagedPageSender {
 public:
  /// Wire and storage outlive it. kWorkspaceTooSmall, kInvalidArgument, kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<StagedPageSender> create(Wire& wire, const DeviceKvStorage<T>& from,
                                                       const StagedPageOptions& options) {
    auto staging = detail::Staging::create(options, pages_of(from, 0).bytes);
    if (!staging.ok()) return staging.status();
    auto under_way = detail::UnderWay<int>::create(options.most_under_way);
    if (!under_way.ok()) return under_way.status();
    StagedPageSender out;
    out.wire_ = &wire;
    out.from_ = &from;
    out.options_ = options;
    out.staging_ = std::move(staging).value();
    out.under_way_ = std::move(under_way).value();
    return out;
  }
  /// The other has nothing under way.
  StagedPageSender(StagedPageSender&&) noexcept = default;
  StagedPageSender& operator=(StagedPageSender&&) = delete;
  StagedPageSender(const StagedPageSender&) = delete;
  StagedPageSender& operator=(const StagedPageSender&) = delete;
  ~StagedPageSender() { static_cast<void>(drain()); }

  /// Puts the messages of a run behind what `produced` holds, and returns. The receiver is to be told
  /// notice_of(run). kInvalidArgument for a run that is not there (nothing was sent then); those of the wire
  /// and kCudaError: what was sent is not known, the wire is of no use any more.
  [[nodiscard]] Status send(const PageRun& run, cudaStream_t produced) {
    if (Status s = detail::check_device_run(*from_, run); !s.ok()) return s;
    if (under_way_.full()) {
      if (Status s = under_way_.collect(true, [](int) {}); !s.ok()) return s;
    }
    if (Status s = detail::join(options_.wire, produced, staging_.order()); !s.ok()) return s;
    if (Status s = detail::join(options_.copies, produced, staging_.order()); !s.ok()) return s;
    const PageArray pages = pages_of(*from_, run.layer);
    for (std::size_t done = 0; done < run.blocks.size();) {
      const std::size_t count =
          std::min(static_cast<std::size_t>(options_.chunk_pages), run.blocks.size() - done);
      if (Status s = send_chunk(pages, run.blocks.subspan(done, count)); !s.ok()) return s;
      done += count;
    }
    return under_way_.push(run.layer, options_.wire);
  }

  /// Runs whose pages may not be written yet. kCudaError.
  [[nodiscard]] Result<std::int64_t> poll() {
    return under_way_.poll([](int) {});
  }
  /// Waits for all. kCudaError.
  [[nodiscard]] Status drain() {
    return under_way_.drain([](int) {});
  }

 private:
  StagedPageSender() = default;

  [[nodiscard]] Status send_chunk(const PageArray& pages, std::span<const BlockId> blocks) {
    const std::size_t bytes = blocks.size() * static_cast<std::size_t>(pages.bytes);
    if (detail::one_piece(blocks)) return wire_->send(detail::page(pages, blocks[0]), bytes, options_.wire);
    const std::size_t slot = staging_.next();
    if (Status s = detail::cuda_call(cudaStreamWaitEvent(options_.copies, staging_.empty(slot), 0),
                                     "cudaStreamWaitEvent");
        !s.ok()) {
      return s;
    }
    if (Status s = copy_pages(pages, blocks, {staging_.slot(slot), pages.bytes},
                              staging_.numbers(blocks.size()), options_.copy_blocks, options_.copies);
        !s.ok()) {
      return s;
    }
    if (Status s = detail::join(options_.wire, options_.copies, staging_.full(slot)); !s.ok()) return s;
    if (Status s = wire_->send(staging_.slot(slot), bytes, options_.wire); !s.ok()) return s;
    return detail::cuda_call(cudaEventRecord(staging_.empty(slot), options_.wire), "cudaEventRecord");
  }

  Wire* wire_ = nullptr;
  const DeviceKvStorage<T>* from_ = nullptr;
  StagedPageOptions options_;
  detail::Staging staging_;
  detail::UnderWay<int> under_way_;
};

/// The receiving end, at the decode worker whose table and storage it fills. Made, used and destroyed with
/// its GPU current, when it waits for what is under way; one thread at a time.
template <class T, class Table, PageWire Wire>
class StagedPageReceiver {
 public:
  /// All outlive it. kWorkspaceTooSmall, kInvalidArgument, kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<StagedPageReceiver> create(Wire& wire, Table& table,
                                                         const DeviceKvStorage<T>& to,
                                                         const StagedPageOptions& options) {
    auto staging = detail::Staging::create(options, pages_of(to, 0).bytes);
    if (!staging.ok()) return staging.status();
    auto under_way = detail::UnderWay<detail::PagesOnTheWay>::create(options.most_under_way);
    if (!under_way.ok()) return under_way.status();
    StagedPageReceiver out;
    out.wire_ = &wire;
    out.table_ = &table;
    out.to_ = &to;
    out.options_ = options;
    out.staging_ = std::move(staging).value();
    out.under_way_ = std::move(under_way).value();
    return out;
  }
  /// The other has nothing under way.
  StagedPageReceiver(StagedPageReceiver&&) noexcept = default;
  StagedPageReceiver& operator=(StagedPageReceiver&&) = delete;
  StagedPageReceiver(const StagedPageReceiver&) = delete;
  StagedPageReceiver& operator=(const StagedPageReceiver&) = delete;
  ~StagedPageReceiver() { static_cast<void>(drain()); }

  /// Puts the receipt of a run's messages into the streams, and returns. A hand-off that is over, or does not
  /// want these pages, takes none: its messages are received all the same, for others come behind them, and
  /// the Status is HandoffTable::begin()'s. Of the wire's errors and kCudaError none leaves a usable wire.
  [[nodiscard]] Status receive(const PageNotice& notice) {
    if (notice.count < 1 || notice.layer < 0 || notice.layer >= to_->shape().layers) {
      return codegemm::error(StatusCode::kInvalidArgument, "hand-off ", notice.handoff, ": ", notice.count,
                             " blocks of layer ", notice.layer);
    }
    if (under_way_.full()) {
      if (Status s = under_way_.collect(true, detail::finish_in(*table_)); !s.ok()) return s;
    }
    const Result<std::vector<BlockId>> blocks =
        table_->begin(notice.handoff, notice.layer, notice.first, notice.count, notice.last_tokens);
    Status status;
    for (std::int64_t done = 0; done < notice.count && status.ok();) {
      const std::int64_t count = std::min(options_.chunk_pages, notice.count - done);
      const auto part = blocks.ok() ? std::span<const BlockId>(*blocks).subspan(
                                          static_cast<std::size_t>(done), static_cast<std::size_t>(count))
                                    : std::span<const BlockId>();
      status = receive_chunk(pages_of(*to_, static_cast<int>(notice.layer)), part, count);
      done += count;
    }
    if (!blocks.ok()) return status.ok() ? blocks.status() : status;
    if (status.ok()) {
      status = detail::join(options_.copies, options_.wire, staging_.order());
    }
    if (status.ok()) {
      status = under_way_.push({notice.handoff, notice.layer, notice.first, notice.count}, options_.copies);
    }
    if (!status.ok()) {
      static_cast<void>(table_->fail(notice.handoff, notice.layer, notice.first, notice.count));
    }
    return status;
  }

  /// Tells the hand-offs what has arrived; runs that are under way. kCudaError.
  [[nodiscard]] Result<std::int64_t> poll() { return under_way_.poll(detail::finish_in(*table_)); }
  /// The same, and waits for all. kCudaError.
  [[nodiscard]] Status drain() { return under_way_.drain(detail::finish_in(*table_)); }

 private:
  StagedPageReceiver() = default;

  // Without blocks the pages are dropped.
  [[nodiscard]] Status receive_chunk(const PageArray& pages, std::span<const BlockId> blocks,
                                     std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(count * pages.bytes);
    if (!blocks.empty() && detail::one_piece(blocks))
      return wire_->receive(detail::page(pages, blocks[0]), bytes, options_.wire);
    const std::size_t slot = staging_.next();
    if (Status s = detail::cuda_call(cudaStreamWaitEvent(options_.wire, staging_.empty(slot), 0),
                                     "cudaStreamWaitEvent");
        !s.ok()) {
      return s;
    }
    if (Status s = wire_->receive(staging_.slot(slot), bytes, options_.wire); !s.ok()) return s;
    if (blocks.empty()) return {};  // the next message for this slot is behind it in the same stream
    if (Status s = detail::join(options_.copies, options_.wire, staging_.full(slot)); !s.ok()) return s;
    if (Status s = copy_pages({staging_.slot(slot), pages.bytes}, staging_.numbers(blocks.size()), pages,
                              blocks, options_.copy_blocks, options_.copies);
        !s.ok()) {
      return s;
    }
    return detail::cuda_call(cudaEventRecord(staging_.empty(slot), options_.copies), "cudaEventRecord");
  }

  Wire* wire_ = nullptr;
  Table* table_ = nullptr;
  const DeviceKvStorage<T>* to_ = nullptr;
  StagedPageOptions options_;
  detail::Staging staging_;
  detail::UnderWay<detail::PagesOnTheWay> under_way_;
};

}  // namespace prefillshare::cuda
