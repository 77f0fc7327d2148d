// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/peer_group.cuh - a group of GPUs that reach each other's memory: sums of the size
// that a decode step needs, in the time of one message.
// Layer: model/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include <cuda_runtime.h>

#include <codegemm/cuda/device.cuh>
#include <prefillshare/model/cuda/kernels/peer_exchange.cuh>
#include <prefillshare/model/cuda/rank_group.cuh>

namespace prefillshare::cuda {

/// A RankGroup in which each rank writes its values straight into a mailbox of every other (one hop, twice
/// the bytes): for the few kilobytes of a decode step, where NCCL's latency is most of its time. Sums are
/// added in the order of the ranks. What exceeds `most` values goes in several launches: prefill is better
/// served by NcclGroup.
///
/// A peer that does not answer in time makes its calls end with wrong values, and check() say so; the group
/// is of no use then. Each number of a call stands for 2^32 calls: a place of the mailbox that is not used
/// for exactly that many would be misread.
///
/// Owns nothing. The ranks may be GPUs of one process (cudaDeviceEnablePeerAccess) or of several
/// (cudaIpcOpenMemHandle), or streams of one GPU. One stream at a time uses it. Where two mailboxes lie on
/// one GPU, no kernel behind a sum gets its place before the sum is there: one that fills the GPU and then
/// waits would keep out the very rank that it waits for.
class PeerGroup {
 public:
  /// How a group is used.
  struct Options {
    std::int64_t most = std::int64_t{1} << 19;            ///< values of a launch
    std::int64_t timeout_ns = std::int64_t{10000000000};  ///< that a peer may keep others waiting
  };

  PeerGroup() = default;

  /// Bytes of each rank's mailbox: device memory, aligned to 256 bytes, zeroed once by the caller.
  [[nodiscard]] static std::size_t mailbox_bytes(int ranks, std::int64_t most) {
    return static_cast<std::size_t>(kPeerHead + 2 * ranks * ((most + 1) / 2) * 16);
  }

  /// mailboxes: [ranks], each as the current device reaches it; the own one's device is the current one. All
  /// ranks have the same options. kInvalidArgument, kNullPointer, kMisaligned, kCudaError.
  [[nodiscard]] static Result<PeerGroup> create(int rank, std::span<void* const> mailboxes,
                                                const Device& device, const Options& options) {
    const int ranks = static_cast<int>(mailboxes.size());
    if (ranks < 1 || ranks > kMostPeerRanks || rank < 0 || rank >= ranks || options.most < 2 ||
        options.timeout_ns < 1) {
      return codegemm::error(StatusCode::kInvalidArgument, "PeerGroup: rank ", rank, " of ", ranks,
                             ", at most ", kMostPeerRanks, "; ", options.most, " values, ",
                             options.timeout_ns, " ns");
    }
    PeerGroup out;
    for (int r = 0; r < ranks; ++r) {
      void* const box = mailboxes[static_cast<std::size_t>(r)];
      if (box == nullptr)
        return codegemm::error(StatusCode::kNullPointer, "PeerGroup: mailbox ", r, " is null");
      if (reinterpret_cast<std::uintptr_t>(box) % 256 != 0) {
        return codegemm::error(StatusCode::kMisaligned, "PeerGroup: mailbox ", r,
                               " is not aligned to 256 bytes");
      }
      out.mailboxes_[r] = static_cast<char*>(box);
    }
    out.device_ = device;
    out.options_ = options;
    out.rank_ = rank;
    out.ranks_ = ranks;
    return with_sharing(std::move(out));
  }

  [[nodiscard]] int rank() const noexcept { return rank_; }    ///< of this one
  [[nodiscard]] int ranks() const noexcept { return ranks_; }  ///< of the group

  /// As RankGroup says. kShapeMismatch, kCudaError.
  [[nodiscard]] Status sum(MatrixView<float> x, cudaStream_t stream) const {
    if (Status s = detail::check_sum(x); !s.ok()) return s;
    PeerExchangeArgs args = common();
    args.data = x.data;
    args.stride = x.rows * x.cols;
    return exchange(peer_exchange_kernel<true>, args, (args.stride + 1) / 2, stream);
  }
  /// As RankGroup says. kShapeMismatch, kCudaError.
  [[nodiscard]] Status gather(MatrixView<float> y, cudaStream_t stream) const {
    if (Status s = detail::check_gather(y, ranks_); !s.ok()) return s;
    PeerExchangeArgs args = common();
    args.data = y.data;
    args.stride = y.stride;
    args.width = static_cast<int>(y.cols / ranks_);
    return exchange(peer_exchange_kernel<false>, args, y.rows * ((args.width + 1) / 2), stream);
  }

  /// Waits for the stream: kIoError with the rank where one did not answer in time, kCudaError.
  [[nodiscard]] Status check(cudaStream_t stream) const {
    PeerState state;
    if (Status s = codegemm::cuda::cuda_status(
            cudaMemcpyAsync(&state, mailboxes_[rank_], sizeof(state), cudaMemcpyDeviceToHost, stream),
            "cudaMemcpyAsync");
        !s.ok()) {
      return s;
    }
    if (Status s = codegemm::cuda::cuda_status(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        !s.ok()) {
      return s;
    }
    if (state.failed == 0) return {};
    return codegemm::error(StatusCode::kIoError, "PeerGroup: rank ", state.failed - 1,
                           " did not answer rank ", rank_, " in ", options_.timeout_ns, " ns");
  }

 private:
  // Asks where the mailboxes are.
  [[nodiscard]] static Result<PeerGroup> with_sharing(PeerGroup out) {
    int gpus[kMostPeerRanks] = {};
    for (int r = 0; r < out.ranks_; ++r) {
      cudaPointerAttributes where = {};
      if (Status s = codegemm::cuda::cuda_status(cudaPointerGetAttributes(&where, out.mailboxes_[r]),
                                                 "cudaPointerGetAttributes");
          !s.ok()) {
        return s;
      }
      gpus[r] = where.device;
      const bool known = where.type == cudaMemoryTypeDevice;
      if (known && std::find(gpus, gpus + r, gpus[r]) != gpus + r) out.gpu_shared_ = true;
    }
    return out;
  }
  [[nodiscard]] PeerExchangeArgs common() const {
    PeerExchangeArgs args;
    std::copy_n(mailboxes_, kMostPeerRanks, args.mailboxes);
    args.lines = (options_.most + 1) / 2;
    args.timeout_ns = options_.timeout_ns;
    args.rank = rank_;
    args.ranks = ranks_;
    args.next_early = !gpu_shared_;
    return args;
  }
  [[nodiscard]] Status exchange(void (*kernel)(PeerExchangeArgs), PeerExchangeArgs& args, std::int64_t items,
                                cudaStream_t stream) const {
    if (ranks_ == 1) return {};
    for (; args.first < items; args.first += args.lines) {
      args.items = std::min(args.lines, items - args.first);
      // Blocks beyond those would only wait for the others' turn.
      const std::int64_t blocks = std::min<std::int64_t>((args.items + kPeerThreads - 1) / kPeerThreads,
                                                         std::int64_t{2} * device_.multiprocessors);
      if (Status s =
              detail::start(kernel, args, dim3(static_cast<unsigned>(blocks)), kPeerThreads, device_, stream);
          !s.ok()) {
        return s;
      }
    }
    return {};
  }

  char* mailboxes_[kMostPeerRanks] = {};
  Device device_;
  Options options_;
  int rank_ = 0;
  int ranks_ = 1;
  bool gpu_shared_ = false;  // by two ranks
};
static_assert(RankGroup<PeerGroup>);

}  // namespace prefillshare::cuda
