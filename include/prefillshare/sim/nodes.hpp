// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/nodes.hpp - the workers of a simulated cluster, and the calls that pass through them.
// Layer: sim (host only).
//
// A block is one token here: an allocator over blocks of one token makes the same decisions, for a fraction
// of the hashing. Its name (Workload::name_blocks) is the token. Partly filled blocks are counted where they
// lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/events.hpp>
#include <prefillshare/serve/admission.hpp>
#include <prefillshare/serve/handoff.hpp>
#include <prefillshare/serve/router.hpp>
#include <prefillshare/sim/event_queue.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// The allocator of a simulated worker: blocks with nothing behind them.
using SimAllocator = BasicKvAllocator<NoKvStorage>;

namespace detail {

enum class SimEvent : std::uint8_t {
  kSession,      // subject: the session, which arrives
  kPatience,     // a session may have waited too long
  kCall,         // subject: the slot of a call, which is issued
  kPrefillStep,  // subject: the worker, whose step ends
  kTransferred,  // subject: the slot
  kStaged,       // subject: the slot
  kDecodeStep,   // subject: the worker, whose batch changes
  kDown,         // subject: the fault
  kUp,
  kSample,
};

/// Where a call is.
enum class SimPhase : std::uint8_t {
  kIdle,      // not issued, or over
  kStranded,  // no worker is up for it
  kGate,      // waits until its decode worker sets blocks aside
  kQueued,    // at its prefill worker, nothing held
  kPrefill,   // holds blocks there
  kPending,   // prefilled; its decode worker has no room
  kTransfer,
  kReady,  // at its decode worker, not in the batch
  kDecode,
};

struct SimCall {
  std::int32_t slot = 0;  // its number here; the next call of its session has the same
  std::int64_t session = 0;
  std::int32_t index = 0;  // of the session's calls
  std::int32_t module = 0;
  RequestId id = 0;
  SimPhase phase = SimPhase::kIdle;
  std::uint32_t version = 0;  // raised when an attempt ends: events of earlier ones are void

  std::int64_t context = 0;    // tokens of this attempt's prompt
  std::int64_t remaining = 0;  // tokens to generate
  std::int64_t generated = 0;  // of the answer, by earlier attempts too
  std::int32_t prefill = 0;    // workers, by their number in the cluster
  std::int32_t decode = 0;
  Ticket prefill_ticket;
  Ticket decode_ticket;

  Sequence base;  // at the prefill worker
  std::optional<Handoff<SimAllocator>> handoff;
  Sequence fork;                    // at the decode worker
  std::int64_t computed = 0;        // tokens that the prefill worker has, of context - 1
  std::int64_t private_blocks = 0;  // of the fork
  std::int64_t writing = 0;         // blocks under way
  double prefill_spent = 0.0;
  bool gate_held = false;
  bool staging = false;  // on its way to host memory
  bool staged = false;   // there

  double issued = 0.0;
  double began = -1.0;  // the prefill, of the first attempt
  double first_token = -1.0;
};

struct PrefillNode {
  struct Part {
    std::int32_t call = 0;
    std::uint32_t version = 0;
    std::int64_t tokens = 0;
  };
  std::int32_t pool = 0;  // whose router it is known to
  WorkerId in_pool = 0;   // and under which number
  std::unique_ptr<EventLog> log;
  std::unique_ptr<SimAllocator> allocator;
  std::deque<std::int32_t> queue;     // calls that hold nothing
  std::vector<std::int32_t> running;  // calls that hold blocks, first come first
  std::vector<Part> parts;            // of the step under way
  bool alive = true;
  bool busy = false;
  std::uint32_t version = 0;
  std::uint64_t epoch = 1;
  double speed = 1.0;
  double link_free = 0.0;
  double host_link_free = 0.0;
  double step_seconds = 0.0;
  double busy_seconds = 0.0;
};

struct DecodeNode {
  std::int32_t pool = 0;
  WorkerId in_pool = 0;
  std::unique_ptr<SimAllocator> allocator;
  std::unique_ptr<AdmissionQueue<>> gate;
  std::deque<std::int32_t> pending;  // prefilled calls, without a gate
  std::deque<std::int32_t> ready;
  std::vector<std::int32_t> batch;  // in the order in which they joined
  bool alive = true;
  bool running = false;
  std::uint32_t version = 0;
  std::uint64_t epoch = 1;
  double speed = 1.0;
  double link_free = 0.0;
  double segment_start = 0.0;  // steps of an unchanged batch
  double step_seconds = 0.0;
  std::int64_t segment_steps = 0;
  double busy_seconds = 0.0;
};

}  // namespace detail
}  // namespace prefillshare
