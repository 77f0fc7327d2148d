// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/cuda_copy_engine.cuh - tiers below device memory: pinned host memory and a file.
// Layer: kv (host, needs nvcc).
#pragma once

#include <algorithm>
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

#include <cuda_runtime.h>

#include <codegemm/base/status.hpp>
#include <codegemm/cuda/device.cuh>
#include <prefillshare/kv/block_file.hpp>
#include <prefillshare/kv/copy_engine.hpp>
#include <prefillshare/kv/device_storage.cuh>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare::cuda {

/// The blocks of tier 0 as bytes, [layers][blocks][page_bytes] of device memory, and the stream in which
/// kernels read and write them.
struct DeviceBlocks {
  std::byte* data = nullptr;      ///< device memory
  std::int64_t layers = 0;        ///< pages of a block, one in each layer
  std::int64_t blocks = 0;        ///< blocks
  std::int64_t page_bytes = 0;    ///< of a page
  cudaStream_t stream = nullptr;  ///< copies wait for what is in it when they start

  /// Of a block.
  [[nodiscard]] std::int64_t bytes_per_block() const noexcept { return layers * page_bytes; }
};

/// All blocks of a storage, which must outlive whoever uses them.
template <class T>
[[nodiscard]] DeviceBlocks device_blocks(const DeviceKvStorage<T>& storage) {
  DeviceBlocks out;
  out.data = reinterpret_cast<std::byte*>(storage.layer(0));
  out.layers = storage.shape().layers;
  out.blocks = storage.blocks();
  out.page_bytes = storage.page_elements() * static_cast<std::int64_t>(sizeof(T));
  out.stream = storage.stream();
  return out;
}

/// Where the tiers of a CudaCopyEngine lie. Memory and streams are the caller's, and outlive the copies. A
/// tier of no blocks is there and takes none.
struct CudaTiers {
  std::span<std::byte> memory;   ///< tier 1: pinned host memory, as many whole blocks as it has room for
  std::int64_t file_blocks = 0;  ///< tier 2: a file of no name in `folder`, gone when the engine is
  std::string folder;            ///< where tier 2 lies
  std::span<std::byte> staging;  ///< pinned: blocks between device and file, as many as may be at once
  cudaStream_t out = nullptr;    ///< copies from the device; not the stream of the kernels, or they wait
  cudaStream_t in = nullptr;     ///< copies to the device
  std::int64_t queue_size = 64;  ///< copies under way at most
};

/// Copies between device memory (tier 0), pinned host memory (tier 1) and a file (tier 2). A copy to or from
/// the device is one asynchronous copy by the GPU's copy engines in the caller's stream, ordered after the
/// kernels that were in the blocks' stream when it started, and has ended when poll() says so: kernels that
/// are launched then may read or overwrite the block. CUDA is called by start() and poll() alone. The file is
/// read and written by the caller's threads in work() until stop(), or one block at a time in work_one().
class CudaCopyEngine final : public CopyEngine {
 public:
  /// kInvalidArgument for sizes that cannot be, and for memory that is not pinned; kOutOfMemory; kIoError
  /// with errno when the file cannot be made; kCudaError.
  [[nodiscard]] static codegemm::Result<std::unique_ptr<CudaCopyEngine>> create(const DeviceBlocks& device,
                                                                                const CudaTiers& tiers) {
    const std::int64_t bytes = device.bytes_per_block();
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - 1;
    if (device.data == nullptr || bytes < 1 || device.page_bytes < 1 || device.blocks < 1 ||
        tiers.file_blocks < 0 || tiers.file_blocks > kMost ||
        tiers.file_blocks > std::numeric_limits<std::int64_t>::max() / bytes || tiers.queue_size < 1 ||
        tiers.queue_size > kMost) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "CudaCopyEngine: ", device.blocks,
                             " blocks of ", device.layers, " pages of ", device.page_bytes, " bytes, ",
                             tiers.file_blocks, " blocks in a file, a queue of ", tiers.queue_size);
    }
    std::unique_ptr<CudaCopyEngine> engine;
    const bool allocated = prefillshare::detail::try_allocate([&] {
      engine.reset(new CudaCopyEngine(device, tiers));
      const auto count = static_cast<std::size_t>(tiers.queue_size);
      engine->jobs_.resize(count);
      for (Ring* ring : {&engine->idle_, &engine->copying_out_, &engine->copying_in_, &engine->waiting_,
                         &engine->for_file_, &engine->from_file_, &engine->ended_}) {
        ring->places.resize(count);
      }
      engine->idle_staging_.places.resize(static_cast<std::size_t>(engine->staging_blocks()));
    });
    if (!allocated) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "CudaCopyEngine: no memory for a queue of ",
                             tiers.queue_size);
    }
    if (engine->slots(1) > kMost || (tiers.file_blocks > 0 && engine->staging_blocks() < 1)) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "CudaCopyEngine: ", tiers.memory.size(),
                             " bytes of memory and ", tiers.staging.size(), " of staging for blocks of ",
                             bytes, " bytes, ", tiers.file_blocks, " of them in a file");
    }
    if (codegemm::Status s = check_pinned("memory", tiers.memory); !s.ok()) return s;
    if (codegemm::Status s = check_pinned("staging", tiers.staging); !s.ok()) return s;
    if (tiers.file_blocks > 0) {
      auto file = prefillshare::detail::BlockFile::create(tiers.folder, tiers.file_blocks, bytes);
      if (!file.ok()) return file.status();
      engine->file_ = std::move(file).value();
    }
    if (codegemm::Status s = make_event(engine->order_); !s.ok()) return s;
    for (std::size_t i = 0; i < engine->jobs_.size(); ++i) {
      if (codegemm::Status s = make_event(engine->jobs_[i].done); !s.ok()) return s;
      engine->idle_.push(static_cast<std::int32_t>(i));
    }
    for (std::int32_t i = 0; i < engine->staging_blocks(); ++i) engine->idle_staging_.push(i);
    return engine;
  }

  /// No thread may be in work() any more. Copies in the streams go on, in the caller's memory.
  ~CudaCopyEngine() override {
    for (const Job& job : jobs_) {
      if (job.done != nullptr) static_cast<void>(cudaEventDestroy(job.done));
    }
    if (order_ != nullptr) static_cast<void>(cudaEventDestroy(order_));
  }

  [[nodiscard]] int tiers() const noexcept override { return 2; }
  [[nodiscard]] std::int64_t slots(int tier) const noexcept override {
    return tier == 1 ? static_cast<std::int64_t>(tiers_.memory.size()) / device_.bytes_per_block()
                     : tiers_.file_blocks;
  }
  [[nodiscard]] std::int64_t queue_size() const noexcept override { return tiers_.queue_size; }

  [[nodiscard]] codegemm::Status start(BlockPlace from, BlockPlace to, std::uint64_t ticket) override {
    if (idle_.count == 0) {
      return codegemm::error(codegemm::StatusCode::kExhausted, "CudaCopyEngine: all ", tiers_.queue_size,
                             " places of the queue are taken");
    }
    const std::int32_t index = idle_.pop();
    Job& job = at(index);
    job.from = from;
    job.to = to;
    job.ticket = ticket;
    job.status = {};
    job.staging = -1;
    codegemm::Status status;
    if (from.tier + to.tier == 1) {
      status = begin_device_copy(index);
    } else if (from.tier > 0 && to.tier > 0) {
      give_to_file(index);
    } else if (idle_staging_.count > 0) {
      status = begin_staged(index);
    } else {
      waiting_.push(index);
    }
    if (!status.ok()) idle_.push(index);
    return status;
  }

  [[nodiscard]] bool poll(CopyResult& result) override {
    // Copies of one stream end in order.
    while (copying_out_.count > 0 && has_ended(copying_out_.front())) {
      const std::int32_t index = copying_out_.pop();
      if (at(index).to.tier == 2 && at(index).status.ok()) {
        give_to_file(index);
      } else {
        end(index);
      }
    }
    while (copying_in_.count > 0 && has_ended(copying_in_.front())) end(copying_in_.pop());
    for (;;) {
      std::int32_t index = 0;
      {
        const std::lock_guard lock(mutex_);
        if (from_file_.count == 0) break;
        index = from_file_.pop();
      }
      Job& job = at(index);
      if (job.to.tier == 0 && job.status.ok()) {
        job.status = begin_device_copy(index);
        if (job.status.ok()) continue;
      }
      end(index);
    }
    while (waiting_.count > 0 && idle_staging_.count > 0) {
      const std::int32_t index = waiting_.pop();
      if (at(index).status = begin_staged(index); !at(index).status.ok()) end(index);
    }
    if (ended_.count == 0) return false;
    const std::int32_t index = ended_.pop();
    result = {at(index).ticket, std::move(at(index).status)};
    idle_.push(index);
    return true;
  }

  /// Does what one copy needs of the file, on this thread, if one waits. Makes no CUDA call.
  bool work_one() {
    std::unique_lock lock(mutex_);
    if (for_file_.count == 0) return false;
    do_one(lock);
    return true;
  }
  /// Serves the file on this thread until stop(). Any number of threads.
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return for_file_.count > 0 || stopped_; });
      if (stopped_) return;
      do_one(lock);
    }
  }
  /// Sends the threads out of work(), for good. Copies that wait for the file stay waiting.
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
    std::int32_t staging = -1;   // its block there
    cudaEvent_t done = nullptr;  // its copy in a stream
    codegemm::Status status;
  };
  // Numbers in the order in which they came; never more than `places`.
  struct Ring {
    std::vector<std::int32_t> places;
    std::size_t first = 0;
    std::size_t count = 0;

    void push(std::int32_t number) { places[(first + count++) % places.size()] = number; }
    [[nodiscard]] std::int32_t front() const { return places[first]; }
    std::int32_t pop() {
      const std::int32_t number = front();
      first = (first + 1) % places.size();
      --count;
      return number;
    }
  };

  CudaCopyEngine(const DeviceBlocks& device, const CudaTiers& tiers) : device_(device), tiers_(tiers) {}

  [[nodiscard]] static codegemm::Status check_pinned(const char* name, std::span<std::byte> bytes) {
    if (bytes.empty()) return {};
    cudaPointerAttributes attributes = {};
    if (codegemm::Status s =
            checked(cudaPointerGetAttributes(&attributes, bytes.data()), "cudaPointerGetAttributes");
        !s.ok()) {
      return s;
    }
    if (attributes.type == cudaMemoryTypeHost) return {};
    return codegemm::error(codegemm::StatusCode::kInvalidArgument, "CudaCopyEngine: ", name, " of ",
                           bytes.size(), " bytes is not pinned host memory");
  }
  // A failure is reported here, not to the next caller.
  [[nodiscard]] static codegemm::Status checked(cudaError_t code, const char* what) {
    if (code != cudaSuccess) static_cast<void>(cudaGetLastError());
    return codegemm::cuda::cuda_status(code, what);
  }
  [[nodiscard]] static codegemm::Status make_event(cudaEvent_t& event) {
    return checked(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }

  [[nodiscard]] Job& at(std::int32_t index) { return jobs_[static_cast<std::size_t>(index)]; }
  [[nodiscard]] std::int32_t staging_blocks() const {
    return static_cast<std::int32_t>(std::min<std::int64_t>(
        static_cast<std::int64_t>(tiers_.staging.size()) / device_.bytes_per_block(), tiers_.queue_size));
  }
  [[nodiscard]] std::span<std::byte> host_block(std::span<std::byte> memory, std::int32_t slot) const {
    const auto bytes = static_cast<std::size_t>(device_.bytes_per_block());
    return memory.subspan(static_cast<std::size_t>(slot) * bytes, bytes);
  }
  // What of a job lies in host memory.
  [[nodiscard]] std::span<std::byte> host_bytes(const Job& job) const {
    if (job.staging >= 0) return host_block(tiers_.staging, job.staging);
    return host_block(tiers_.memory, job.from.tier == 1 ? job.from.slot : job.to.slot);
  }

  // Between device and file, with a block of staging that is free.
  [[nodiscard]] codegemm::Status begin_staged(std::int32_t index) {
    Job& job = at(index);
    job.staging = idle_staging_.pop();
    if (job.from.tier == 2) {
      give_to_file(index);
      return {};
    }
    codegemm::Status status = begin_device_copy(index);
    if (!status.ok()) {
      idle_staging_.push(job.staging);
      job.staging = -1;
    }
    return status;
  }
  // Between the device and host_bytes(): the block's pages of all layers in one copy, of three dimensions
  // since the way from layer to layer may be longer than a pitch.
  [[nodiscard]] codegemm::Status begin_device_copy(std::int32_t index) {
    Job& job = at(index);
    const bool leaves = job.from.tier == 0;
    const std::int32_t block = leaves ? job.from.slot : job.to.slot;
    const auto page = static_cast<std::size_t>(device_.page_bytes);
    const cudaPitchedPtr pages =
        make_cudaPitchedPtr(device_.data, page, page, static_cast<std::size_t>(device_.blocks));
    const cudaPitchedPtr host = make_cudaPitchedPtr(host_bytes(job).data(), page, page, 1);
    const cudaPos of_block = make_cudaPos(0, static_cast<std::size_t>(block), 0);
    cudaMemcpy3DParms copy = {};
    copy.srcPtr = leaves ? pages : host;
    copy.dstPtr = leaves ? host : pages;
    (leaves ? copy.srcPos : copy.dstPos) = of_block;
    copy.extent = make_cudaExtent(page, 1, static_cast<std::size_t>(device_.layers));
    copy.kind = leaves ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    cudaStream_t const stream = leaves ? tiers_.out : tiers_.in;
    if (codegemm::Status s = checked(cudaEventRecord(order_, device_.stream), "cudaEventRecord"); !s.ok()) {
      return s;
    }
    if (codegemm::Status s = checked(cudaStreamWaitEvent(stream, order_, 0), "cudaStreamWaitEvent");
        !s.ok()) {
      return s;
    }
    if (codegemm::Status s = checked(cudaMemcpy3DAsync(&copy, stream), "cudaMemcpy3DAsync"); !s.ok())
      return s;
    if (codegemm::Status s = checked(cudaEventRecord(job.done, stream), "cudaEventRecord"); !s.ok()) {
      static_cast<void>(cudaStreamSynchronize(stream));  // nothing goes on that nobody would hear of
      return s;
    }
    (leaves ? copying_out_ : copying_in_).push(index);
    return {};
  }
  [[nodiscard]] bool has_ended(std::int32_t index) {
    const cudaError_t code = cudaEventQuery(at(index).done);
    if (code == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());  // no failure
      return false;
    }
    static_cast<void>(at(index).status = checked(code, "CudaCopyEngine: copy"));
    return true;
  }
  void end(std::int32_t index) {
    if (at(index).staging >= 0) idle_staging_.push(at(index).staging);
    at(index).staging = -1;
    ended_.push(index);
  }
  void give_to_file(std::int32_t index) {
    {
      const std::lock_guard lock(mutex_);
      for_file_.push(index);
    }
    wake_.notify_one();
  }
  // Serves the oldest job without the lock.
  void do_one(std::unique_lock<std::mutex>& lock) {
    const std::int32_t index = for_file_.pop();
    lock.unlock();
    Job& job = at(index);
    const std::span<std::byte> bytes = host_bytes(job);
    job.status = job.from.tier == 2 ? file_.read(job.from.slot, bytes) : file_.write(job.to.slot, bytes);
    lock.lock();
    from_file_.push(index);
  }

  DeviceBlocks device_;
  CudaTiers tiers_;
  prefillshare::detail::BlockFile file_;
  cudaEvent_t order_ = nullptr;  // after the kernels that were there before a copy
  std::vector<Job> jobs_;        // [queue_size]; each is in one ring, or in work
  Ring idle_;
  Ring copying_out_;
  Ring copying_in_;
  Ring waiting_;  // for a block of staging
  Ring ended_;    // and not polled
  Ring idle_staging_;

  std::mutex mutex_;  // of all below
  std::condition_variable wake_;
  Ring for_file_;
  Ring from_file_;
  bool stopped_ = false;
};

}  // namespace prefillshare::cuda
