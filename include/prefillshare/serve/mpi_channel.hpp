// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/mpi_channel.hpp - messages between the processes of an MPI job, on one host or many.
// Layer: serve (host only). Needs MPI 3.0: link prefillshare::mpi, or what mpicxx links.
// See: examples/08_serve_mpi.cpp
//
// What MPI does when a process dies, and what this does about it. By default mpirun ends the whole job: no
// process is left to serve anything. Open MPI 4 (what Debian 12 has; ULFM came with 5) keeps the others
// running with
//
//   mpirun --enable-recovery ...
//
// and they can go on talking to each other. But nobody is told: a send to the dead process stays pending for
// ever and returns no error, and a message that it had half sent never arrives. So nothing here ever waits
// for a process: sends and receives are started and looked after, whoever is silent for too long is declared
// dead by PeerWatch, and give_up() sets its pending operations aside. MPI_Finalize is the one call that still
// waits for everybody: most times it returns, now and then it waits for the dead one for ever. A process of a
// job that has lost one ends by std::_Exit() instead, which this mpirun does not mind. A group whose mpirun
// lacks the option works too; it then dies with its first process, as every plain MPI job does. Sockets would
// notice a death at once, but would be one more engine, and slower between hosts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1  // no C++ bindings: they are gone from MPI 3.0
#endif
#include <mpi.h>

#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/serve/wire.hpp>

namespace prefillshare {

/// A MessageChannel over a communicator of its own; a peer's number is its rank. One thread at a time
/// (MPI_THREAD_FUNNELED or SERIALIZED will do). Create it after MPI_Init and destroy it before MPI_Finalize.
/// Errors of MPI are kIoError with the MPI error code as native_code(), the call, MPI's own text and the
/// rank.
class MpiChannel {
 public:
  static constexpr int kTag = 1;  ///< of the channel's messages

  /// Collective over `comm`, which it does not use itself: a duplicate, which returns errors, carries the
  /// messages.
  [[nodiscard]] static Result<MpiChannel> create(MPI_Comm comm) {
    MpiChannel out;
    if (Status s = check(MPI_Comm_dup(comm, &out.comm_), "MPI_Comm_dup", -1); !s.ok()) return s;
    if (Status s =
            check(MPI_Comm_set_errhandler(out.comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler", -1);
        !s.ok()) {
      return s;
    }
    int size = 0;
    if (Status s = check(MPI_Comm_rank(out.comm_, &out.rank_), "MPI_Comm_rank", -1); !s.ok()) return s;
    if (Status s = check(MPI_Comm_size(out.comm_, &size), "MPI_Comm_size", -1); !s.ok()) return s;
    if (!detail::try_allocate([&] { out.peers_.resize(static_cast<std::size_t>(size)); })) {
      return error(StatusCode::kOutOfMemory, "MpiChannel: no memory for ", size, " peers");
    }
    return out;
  }

  /// The other may only be destroyed.
  MpiChannel(MpiChannel&& other) noexcept
      : comm_(std::exchange(other.comm_, MPI_COMM_NULL)),
        rank_(other.rank_),
        any_given_up_(other.any_given_up_),
        peers_(std::move(other.peers_)),
        sends_(std::move(other.sends_)),
        receives_(std::move(other.receives_)) {}
  MpiChannel& operator=(MpiChannel&&) = delete;
  MpiChannel(const MpiChannel&) = delete;
  MpiChannel& operator=(const MpiChannel&) = delete;

  /// What is still under way goes on without the channel, its memory left to MPI: flush() before where all is
  /// to be out and no memory to stay behind.
  ~MpiChannel() {
    if (comm_ == MPI_COMM_NULL) return;
    for (std::deque<Operation>* operations : {&sends_, &receives_}) {
      for (Operation& one : *operations) abandon(one);
    }
    // Collective, so only where everybody is still there to do it.
    if (!any_given_up_) MPI_Comm_free(&comm_);
  }

  [[nodiscard]] int rank() const noexcept { return rank_; }                            ///< of this process
  [[nodiscard]] int size() const noexcept { return static_cast<int>(peers_.size()); }  ///< processes
  /// The channel's own communicator. Messages of tag kTag on it are the channel's.
  [[nodiscard]] MPI_Comm comm() const noexcept { return comm_; }

  /// kInvalidArgument: no such rank, or a message over kMostMessageBytes.
  [[nodiscard]] Status send(int peer, Message message) {
    if (peer < 0 || peer >= size() || message.size() > kMostMessageBytes) {
      return error(StatusCode::kInvalidArgument, "MpiChannel: ", message.size(), " bytes to rank ", peer,
                   " of ", size(), ", at most ", kMostMessageBytes);
    }
    if (state(peer).given_up) return {};
    Operation one;
    one.peer = peer;
    one.bytes = std::make_unique<Message>(std::move(message));
    const int code = MPI_Isend(one.bytes->data(), static_cast<int>(one.bytes->size()), MPI_BYTE, peer, kTag,
                               comm_, &one.request);
    if (Status s = check(code, "MPI_Isend", peer); !s.ok()) return s;
    state(peer).queued_bytes += std::ssize(*one.bytes);
    sends_.push_back(std::move(one));
    return progress_sends();
  }

  /// As MessageChannel says: the sender's rank, or nothing where no message has come.
  [[nodiscard]] Result<std::optional<int>> receive(Message& message) {
    if (Status s = progress_sends(); !s.ok()) return s;
    if (Status s = start_receives(); !s.ok()) return s;
    for (auto at = receives_.begin(); at != receives_.end(); ++at) {
      // In order from one peer: what it sent later waits for what is not here yet.
      const bool first = std::none_of(receives_.begin(), at,
                                      [&](const Operation& earlier) { return earlier.peer == at->peer; });
      if (!first) continue;
      int done = 0;
      const int code = MPI_Test(&at->request, &done, MPI_STATUS_IGNORE);
      if (code == MPI_SUCCESS && done == 0) continue;
      const int peer = at->peer;
      message = std::move(*at->bytes);
      receives_.erase(at);
      if (Status s = check(code, "MPI_Test of a receive", peer); !s.ok()) return s;
      return std::optional<int>(peer);
    }
    return std::optional<int>();
  }

  /// As MessageChannel says.
  [[nodiscard]] std::int64_t queued_bytes(int peer) const {
    return peer >= 0 && peer < size() ? peers_[static_cast<std::size_t>(peer)].queued_bytes : 0;
  }

  /// A peer was given up: MPI_Finalize may not return.
  [[nodiscard]] bool any_given_up() const noexcept { return any_given_up_; }

  /// As MessageChannel says.
  void give_up(int peer) {
    if (peer < 0 || peer >= size() || state(peer).given_up) return;
    state(peer).given_up = true;
    any_given_up_ = true;
    for (std::deque<Operation>* operations : {&sends_, &receives_}) {
      for (Operation& one : *operations) {
        if (one.peer == peer) abandon(one);
      }
      std::erase_if(*operations, [&](const Operation& one) { return one.peer == peer; });
    }
    state(peer).queued_bytes = 0;
  }

  /// One look at what is still to be sent; true when nothing is. To be called until it is, before the end.
  [[nodiscard]] Result<bool> flush() {
    if (Status s = progress_sends(); !s.ok()) return s;
    return sends_.empty();
  }

 private:
  // Receives under way at once: a peer that dies within a message must not keep the others', and nobody may
  // make this process hold any number of buffers.
  static constexpr std::size_t kMostReceives = 32;

  struct Operation {
    MPI_Request request = MPI_REQUEST_NULL;
    int peer = 0;
    std::unique_ptr<Message> bytes;  // MPI reads or writes them until the request is done
  };
  struct Peer {
    std::int64_t queued_bytes = 0;
    bool given_up = false;
  };

  MpiChannel() = default;

  [[nodiscard]] static Status check(int code, const char* call, int peer) {
    if (code == MPI_SUCCESS) return {};
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) length = 0;
    const std::string_view words(text, static_cast<std::size_t>(length));
    return Status(StatusCode::kIoError,
                  peer >= 0 ? codegemm::concat(call, ", rank ", peer, ": ", words)
                            : codegemm::concat(call, ": ", words),
                  code);
  }
  [[nodiscard]] Peer& state(int peer) { return peers_[static_cast<std::size_t>(peer)]; }

  [[nodiscard]] Status progress_sends() {
    for (auto at = sends_.begin(); at != sends_.end();) {
      int done = 0;
      const int peer = at->peer;
      const int code = MPI_Test(&at->request, &done, MPI_STATUS_IGNORE);
      if (code == MPI_SUCCESS && done == 0) {
        ++at;
        continue;
      }
      state(peer).queued_bytes -= std::ssize(*at->bytes);
      at = sends_.erase(at);
      if (Status s = check(code, "MPI_Test of a send", peer); !s.ok()) return s;
    }
    return {};
  }

  [[nodiscard]] Status start_receives() {
    while (receives_.size() < kMostReceives) {
      int there = 0;
      MPI_Message matched = MPI_MESSAGE_NULL;
      MPI_Status status;
      if (Status s =
              check(MPI_Improbe(MPI_ANY_SOURCE, kTag, comm_, &there, &matched, &status), "MPI_Improbe", -1);
          !s.ok()) {
        return s;
      }
      if (there == 0) return {};
      int count = 0;
      const int counted = MPI_Get_count(&status, MPI_BYTE, &count);
      Operation one;
      one.peer = status.MPI_SOURCE;
      const bool fits =
          counted == MPI_SUCCESS && count >= 0 && static_cast<std::size_t>(count) <= kMostMessageBytes;
      if (!detail::try_allocate(
              [&] { one.bytes = std::make_unique<Message>(fits ? static_cast<std::size_t>(count) : 0); })) {
        return error(StatusCode::kOutOfMemory, "MpiChannel: no memory for ", count, " bytes from rank ",
                     one.peer);
      }
      // One that is too long is never received: it stands for an empty message, which no protocol accepts. To
      // receive it into less memory is no way to refuse it, since Open MPI 4 then writes all of it there.
      if (fits) {
        const int code = MPI_Imrecv(one.bytes->data(), count, MPI_BYTE, &matched, &one.request);
        if (Status s = check(code, "MPI_Imrecv", one.peer); !s.ok()) return s;
      }
      if (state(one.peer).given_up) {
        abandon(one);
      } else {
        receives_.push_back(std::move(one));
      }
    }
    return {};
  }

  /// The memory stays MPI's, for good: it may be read or written whenever the peer, dead or only slow, goes
  /// on.
  static void abandon(Operation& one) {
    int done = 0;
    if (one.request == MPI_REQUEST_NULL) return;
    if (MPI_Test(&one.request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done != 0) return;
    MPI_Request_free(&one.request);
    static_cast<void>(one.bytes.release());
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  bool any_given_up_ = false;
  std::vector<Peer> peers_;
  std::deque<Operation> sends_;     // in the order they were started
  std::deque<Operation> receives_;  // in the order they were matched
};
static_assert(MessageChannel<MpiChannel>);

}  // namespace prefillshare
