// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/host_copy_engine.hpp - tiers in host memory and a file, copied by the caller's threads.
// Layer: kv (host only).
#pragma once

#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_file.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/copy_engine.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// What HostCopyEngine asks of the storage of tier 0: a block's bytes, bytes_per_block() of them, in an order
/// of the storage's own. Called from the threads that work() on copies, for different blocks at once.
template <class Storage>
concept KvBlockBytes = requires(Storage storage, const Storage constant, BlockId block,
                                std::span<std::byte> to, std::span<const std::byte> from) {
  { constant.bytes_per_block() } -> std::convertible_to<std::int64_t>;
  { constant.read_block(block, to) } -> std::same_as<codegemm::Status>;
  { storage.write_block(block, from) } -> std::same_as<codegemm::Status>;
};

/// Where the tiers of a HostCopyEngine lie. A tier of 0 blocks is there and takes none.
struct HostTiers {
  std::int64_t memory_blocks = 0;  ///< tier 1: host memory, taken by create()
  std::int64_t file_blocks = 0;    ///< tier 2: a file of no name in `folder`, gone when the engine is
  std::string folder;              ///< where tier 2 lies
  std::int64_t queue_size = 64;    ///< copies under way at most
};

/// Copies between a storage that the host can read (tier 0), host memory (tier 1) and a file (tier 2).
/// Starts no thread: copies wait in a queue until one of the caller's threads takes them, in work() until
/// stop(), or one at a time in work_one() wherever the caller has a moment. The storage outlives it.
template <KvBlockBytes Storage>
class HostCopyEngine final : public CopyEngine {
 public:
  /// kInvalidArgument, kOutOfMemory; kIoError with errno when the file cannot be made.
  [[nodiscard]] static codegemm::Result<std::unique_ptr<HostCopyEngine>> create(Storage& storage,
                                                                                const HostTiers& tiers) {
    const std::int64_t bytes = storage.bytes_per_block();
    const auto fits = [&](std::int64_t blocks) {
      return blocks >= 0 && blocks < std::numeric_limits<std::int32_t>::max() &&
             blocks <= std::numeric_limits<std::int64_t>::max() / bytes;
    };
    if (bytes < 1 || !fits(tiers.memory_blocks) || !fits(tiers.file_blocks) || tiers.queue_size < 1) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "HostCopyEngine: ", tiers.memory_blocks,
                             " blocks in memory and ", tiers.file_blocks, " in a file of ", bytes,
                             " bytes each, a queue of ", tiers.queue_size);
    }
    std::unique_ptr<HostCopyEngine> engine;
    const bool allocated = detail::try_allocate([&] {
      engine.reset(new HostCopyEngine(storage, tiers));
      engine->memory_.reset(new std::byte[static_cast<std::size_t>(tiers.memory_blocks * bytes)]);
      engine->waiting_.resize(static_cast<std::size_t>(tiers.queue_size));
      engine->ended_.resize(static_cast<std::size_t>(tiers.queue_size));
    });
    if (!allocated) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "HostCopyEngine: no memory for ",
                             tiers.memory_blocks, " blocks of ", bytes, " bytes");
    }
    if (tiers.file_blocks == 0) return engine;
    auto file = detail::BlockFile::create(tiers.folder, tiers.file_blocks, bytes);
    if (!file.ok()) return file.status();
    engine->file_ = std::move(file).value();
    return engine;
  }

  /// No thread may be in work() any more.
  ~HostCopyEngine() override = default;

  [[nodiscard]] int tiers() const noexcept override { return 2; }
  [[nodiscard]] std::int64_t slots(int tier) const noexcept override {
    return tier == 1 ? tiers_.memory_blocks : tiers_.file_blocks;
  }
  [[nodiscard]] std::int64_t queue_size() const noexcept override { return tiers_.queue_size; }

  [[nodiscard]] codegemm::Status start(BlockPlace from, BlockPlace to, std::uint64_t ticket) override {
    {
      const std::lock_guard lock(mutex_);
      if (under_way_ == tiers_.queue_size) {
        return codegemm::error(codegemm::StatusCode::kExhausted, "HostCopyEngine: all ", under_way_,
                               " places of the queue are taken");
      }
      ++under_way_;
      waiting_[(first_waiting_ + waiting_count_++) % waiting_.size()] = {from, to, ticket};
    }
    wake_.notify_one();
    return {};
  }
  [[nodiscard]] bool poll(CopyResult& result) override {
    const std::lock_guard lock(mutex_);
    if (ended_count_ == 0) return false;
    result = std::move(ended_[--ended_count_]);
    --under_way_;
    return true;
  }

  /// Does one copy on this thread, if one waits.
  bool work_one() {
    std::unique_lock lock(mutex_);
    if (waiting_count_ == 0) return false;
    do_one(lock);
    return true;
  }
  /// Does copies on this thread until stop(). Any number of threads.
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return waiting_count_ > 0 || stopped_; });
      if (stopped_) return;
      do_one(lock);
    }
  }
  /// Sends the threads out of work(), for good. Copies that wait stay waiting.
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    wake_.notify_all();
  }

 private:
  struct Job {
    BlockPlace from;
    BlockPlace to;
    std::uint64_t ticket = 0;
  };

  HostCopyEngine(Storage& storage, const HostTiers& tiers) : storage_(&storage), tiers_(tiers) {}

  /// Takes the oldest job and does it without the lock.
  void do_one(std::unique_lock<std::mutex>& lock) {
    const Job job = waiting_[first_waiting_];
    first_waiting_ = (first_waiting_ + 1) % waiting_.size();
    --waiting_count_;
    lock.unlock();
    codegemm::Status status = copy(job);
    lock.lock();
    ended_[ended_count_++] = {job.ticket, std::move(status)};
  }

  [[nodiscard]] codegemm::Status copy(const Job& job) {
    if (job.from.tier == 1) return put(job.to, memory(job.from.slot));
    if (job.to.tier == 1) return get(job.from, memory(job.to.slot));
    std::unique_ptr<std::byte[]> bytes;  // between the storage and the file
    if (!detail::try_allocate([&] { bytes.reset(new std::byte[block_bytes()]); })) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "HostCopyEngine: no memory for a block of ",
                             block_bytes(), " bytes");
    }
    if (codegemm::Status status = get(job.from, {bytes.get(), block_bytes()}); !status.ok()) return status;
    return put(job.to, {bytes.get(), block_bytes()});
  }
  [[nodiscard]] codegemm::Status get(BlockPlace from, std::span<std::byte> bytes) {
    return from.tier == 0 ? storage_->read_block(from.slot, bytes) : file_.read(from.slot, bytes);
  }
  [[nodiscard]] codegemm::Status put(BlockPlace to, std::span<std::byte> bytes) {
    return to.tier == 0 ? storage_->write_block(to.slot, bytes) : file_.write(to.slot, bytes);
  }
  [[nodiscard]] std::size_t block_bytes() const {
    return static_cast<std::size_t>(storage_->bytes_per_block());
  }
  [[nodiscard]] std::span<std::byte> memory(std::int32_t slot) {
    return {memory_.get() + static_cast<std::size_t>(slot) * block_bytes(), block_bytes()};
  }

  Storage* storage_;
  HostTiers tiers_;
  std::unique_ptr<std::byte[]> memory_;  // [memory_blocks][bytes_per_block], written before it is read
  detail::BlockFile file_;

  std::mutex mutex_;  // of all below
  std::condition_variable wake_;
  std::vector<Job> waiting_;  // a ring of queue_size
  std::size_t first_waiting_ = 0;
  std::size_t waiting_count_ = 0;
  std::vector<CopyResult> ended_;  // room for queue_size
  std::size_t ended_count_ = 0;
  std::int64_t under_way_ = 0;  // started and not polled
  bool stopped_ = false;
};

}  // namespace prefillshare
