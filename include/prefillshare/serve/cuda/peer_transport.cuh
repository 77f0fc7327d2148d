// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/cuda/peer_transport.cuh - the hand-off to another GPU that this one reaches: a kernel
// stores the pages straight into the reserved blocks over there.
// Layer: serve/cuda (host, needs nvcc).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <prefillshare/serve/cuda/page_copy.cuh>

namespace prefillshare::cuda {

/// How a PeerPageTransport works.
struct PeerTransportOptions {
  /// Of the copy kernel: how much of the sending GPU it may take. Between two H200s, 16,384 tokens of
  /// Llama-3.1-8B: 8 reach 66% of the link's peak, 32 84%, 64 87%; a prefill beside 64 takes 2 to 4% longer.
  int blocks = 32;
  std::int64_t most_under_way = 1024;  ///< runs; send() waits for the oldest where there are more
};

/// To a decode worker of this process, whose pool lies in the memory of a GPU that the sending one reaches
/// (cudaDeviceEnablePeerAccess), or in its own. Pages travel one way, with nothing between: one kernel copies
/// all pages of a run, whole. Made, used and destroyed with the sending GPU current. One thread at a time;
/// the table may be used by others where it has a lock.
template <class T, class Table>
class PeerPageTransport {
 public:
  /// Table and storage are the decode worker's; they and the stream, of the sending GPU, outlive this.
  /// kInvalidArgument, kOutOfMemory, kCudaError.
  [[nodiscard]] static Result<PeerPageTransport> create(Table& table, const DeviceKvStorage<T>& to,
                                                        cudaStream_t copies,
                                                        const PeerTransportOptions& options = {}) {
    if (options.blocks < 1) {
      return codegemm::error(StatusCode::kInvalidArgument, "PeerPageTransport: ", options.blocks, " blocks");
    }
    auto under_way = detail::UnderWay<detail::PagesOnTheWay>::create(options.most_under_way);
    if (!under_way.ok()) return under_way.status();
    auto produced = detail::Events::create(1);
    if (!produced.ok()) return produced.status();
    PeerPageTransport out;
    out.table_ = &table;
    out.to_ = &to;
    out.copies_ = copies;
    out.options_ = options;
    out.under_way_ = std::move(under_way).value();
    out.produced_ = std::move(produced).value();
    return out;
  }
  /// The other has nothing under way.
  PeerPageTransport(PeerPageTransport&&) noexcept = default;
  PeerPageTransport& operator=(PeerPageTransport&&) = delete;
  PeerPageTransport(const PeerPageTransport&) = delete;
  PeerPageTransport& operator=(const PeerPageTransport&) = delete;
  ~PeerPageTransport() { static_cast<void>(drain()); }

  /// As DevicePageTransport says. kIncompatible where the pages are of another shape; as
  /// HandoffTable::begin(); kCudaError, and the pages are missing as before.
  [[nodiscard]] Status send(const DeviceKvStorage<T>& from, const PageRun& run, cudaStream_t produced) {
    if (from.shape() != to_->shape()) {
      return codegemm::error(StatusCode::kIncompatible, "hand-off ", run.handoff,
                             " between pages of unlike shapes");
    }
    if (Status s = detail::check_device_run(from, run); !s.ok()) return s;
    if (under_way_.full()) {
      if (Status s = under_way_.collect(true, detail::finish_in(*table_)); !s.ok()) return s;
    }
    const std::int64_t count = std::ssize(run.blocks);
    const Result<std::vector<BlockId>> blocks =
        table_->begin(run.handoff, run.layer, run.first, count, run.last_tokens);
    if (!blocks.ok()) return blocks.status();
    Status status = detail::join(copies_, produced, produced_[0]);
    if (status.ok()) {
      status = copy_pages(pages_of(from, run.layer), run.blocks, pages_of(*to_, run.layer), *blocks,
                          options_.blocks, copies_);
    }
    if (status.ok()) {
      status = under_way_.push({run.handoff, run.layer, run.first, count}, copies_);
    }
    if (!status.ok()) {
      static_cast<void>(cudaStreamSynchronize(copies_));  // a part of it may be on its way
      static_cast<void>(table_->fail(run.handoff, run.layer, run.first, count));
    }
    return status;
  }

  /// As DevicePageTransport says. kCudaError.
  [[nodiscard]] Result<std::int64_t> poll() { return under_way_.poll(detail::finish_in(*table_)); }
  /// The same.
  [[nodiscard]] Status drain() { return under_way_.drain(detail::finish_in(*table_)); }

 private:
  PeerPageTransport() = default;

  Table* table_ = nullptr;
  const DeviceKvStorage<T>* to_ = nullptr;
  cudaStream_t copies_ = nullptr;
  PeerTransportOptions options_;
  detail::UnderWay<detail::PagesOnTheWay> under_way_;
  detail::Events produced_;  // of the stream that a run was computed in
};

}  // namespace prefillshare::cuda
