// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/cuda/nccl_wire.cuh - messages between two GPUs by NCCL's send and receive.
// Layer: serve/cuda (host, needs nvcc and NCCL: link prefillshare::nccl).
#pragma once

#include <cstddef>

#include <cuda_runtime.h>
#include <nccl.h>

#include <prefillshare/model/cuda/nccl_group.cuh>
#include <prefillshare/serve/cuda/staged_pages.cuh>

namespace prefillshare::cuda {

/// One end of a pair of ranks. The communicator is the caller's, outlives this and carries nothing else
/// meanwhile (ncclCommSplit makes one for the purpose). Errors are kIoError with NCCL's code, text and the
/// rank. A peer that died is noticed by nobody here: ncclCommAbort() ends what waits for it.
class NcclWire {
 public:
  /// To and from rank `peer` of `comm`. kInvalidArgument, kNullPointer, kIoError.
  [[nodiscard]] static Result<NcclWire> create(ncclComm_t comm, int peer) {
    const Result<NcclGroup> group = NcclGroup::create(comm);
    if (!group.ok()) return group.status();
    if (peer < 0 || peer >= group->ranks() || peer == group->rank()) {
      return codegemm::error(StatusCode::kInvalidArgument, "NcclWire from rank ", group->rank(), " to rank ",
                             peer, " of ", group->ranks());
    }
    return NcclWire(comm, group->rank(), peer);
  }

  /// As PageWire says.
  [[nodiscard]] Status send(const void* from, std::size_t bytes, cudaStream_t stream) {
    return nccl_status(ncclSend(from, bytes, ncclChar, peer_, comm_, stream), "ncclSend", rank_, comm_);
  }
  /// As PageWire says.
  [[nodiscard]] Status receive(void* to, std::size_t bytes, cudaStream_t stream) {
    return nccl_status(ncclRecv(to, bytes, ncclChar, peer_, comm_, stream), "ncclRecv", rank_, comm_);
  }

 private:
  NcclWire(ncclComm_t comm, int rank, int peer) : comm_(comm), rank_(rank), peer_(peer) {}

  ncclComm_t comm_;
  int rank_;
  int peer_;
};
static_assert(PageWire<NcclWire>);

}  // namespace prefillshare::cuda
