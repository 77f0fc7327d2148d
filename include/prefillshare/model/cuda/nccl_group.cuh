// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/cuda/nccl_group.cuh - the ranks of an NCCL communicator as a group of GPUs.
// Layer: model/cuda (host, needs nvcc and NCCL: link prefillshare::nccl).
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>
#include <nccl.h>

#include <prefillshare/model/cuda/rank_group.cuh>

namespace prefillshare::cuda {

/// A failed NCCL call of a rank: kIoError with the ncclResult_t as native_code(), NCCL's text and the rank.
/// `what` names the call. ncclInProgress, which communicators that do not block return, is no failure.
[[nodiscard]] inline Status nccl_status(ncclResult_t code, const char* what, int rank, ncclComm_t comm) {
  if (code == ncclSuccess || code == ncclInProgress) return {};
  return Status(StatusCode::kIoError,
                codegemm::concat(what, ", rank ", rank, ": ", ncclGetErrorString(code), " (",
                                 ncclGetLastError(comm), ")"),
                static_cast<int>(code));
}

/// A RankGroup of a communicator of the caller's, which outlives it. NCCL connects the ranks in the first
/// call of a kind: make one before a stream is captured. One thread at a time; several ranks of one process
/// each need a thread.
class NcclGroup {
 public:
  NcclGroup() = default;

  /// kNullPointer, kIoError.
  [[nodiscard]] static Result<NcclGroup> create(ncclComm_t comm) {
    if (comm == nullptr) return codegemm::error(StatusCode::kNullPointer, "NcclGroup: no communicator");
    NcclGroup out;
    out.comm_ = comm;
    if (Status s = nccl_status(ncclCommUserRank(comm, &out.rank_), "ncclCommUserRank", -1, comm); !s.ok())
      return s;
    if (Status s = nccl_status(ncclCommCount(comm, &out.ranks_), "ncclCommCount", out.rank_, comm); !s.ok())
      return s;
    return out;
  }

  [[nodiscard]] int rank() const noexcept { return rank_; }    ///< of this one
  [[nodiscard]] int ranks() const noexcept { return ranks_; }  ///< of the group

  /// As RankGroup says. kShapeMismatch, kIoError.
  [[nodiscard]] Status sum(MatrixView<float> x, cudaStream_t stream) const {
    if (Status s = detail::check_sum(x); !s.ok()) return s;
    if (x.rows * x.cols == 0) return {};
    return nccl_status(ncclAllReduce(x.data, x.data, static_cast<std::size_t>(x.rows * x.cols), ncclFloat,
                                     ncclSum, comm_, stream),
                       "ncclAllReduce", rank_, comm_);
  }
  /// As RankGroup says. kShapeMismatch, kIoError.
  [[nodiscard]] Status gather(MatrixView<float> y, cudaStream_t stream) const {
    if (Status s = detail::check_gather(y, ranks_); !s.ok()) return s;
    if (y.rows * y.cols == 0) return {};
    // A row is the ranks' columns one after the other: gathered in place, all rows in one launch.
    const std::int64_t width = y.cols / ranks_;
    if (Status s = nccl_status(ncclGroupStart(), "ncclGroupStart", rank_, comm_); !s.ok()) return s;
    Status status;
    for (std::int64_t i = 0; i < y.rows && status.ok(); ++i) {
      float* const row = y.data + i * y.stride;
      static_cast<void>(
          status = nccl_status(ncclAllGather(row + rank_ * width, row, static_cast<std::size_t>(width),
                                             ncclFloat, comm_, stream),
                               "ncclAllGather", rank_, comm_));
    }
    const Status ended = nccl_status(ncclGroupEnd(), "ncclGroupEnd", rank_, comm_);
    return status.ok() ? ended : status;
  }

  /// What went wrong behind the calls: kIoError.
  [[nodiscard]] Status check() const {
    ncclResult_t code = ncclSuccess;
    if (Status s = nccl_status(ncclCommGetAsyncError(comm_, &code), "ncclCommGetAsyncError", rank_, comm_);
        !s.ok()) {
      return s;
    }
    return nccl_status(code, "an operation of NCCL", rank_, comm_);
  }

 private:
  ncclComm_t comm_ = nullptr;
  int rank_ = 0;
  int ranks_ = 1;
};
static_assert(RankGroup<NcclGroup>);

}  // namespace prefillshare::cuda
