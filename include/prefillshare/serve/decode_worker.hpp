// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/decode_worker.hpp - several decode modules side by side, each decoding many requests in
// one batch.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/serve/decode_lane.hpp>

namespace prefillshare {

/// Names a decode module within its worker, from 0 in the order of add_module().
using ModuleId = std::int32_t;

/// An answer that is wanted.
struct DecodeRequest {
  std::uint64_t id = 0;                   ///< the caller's, one of its kind among those under way
  ModuleId module = 0;                    ///< of the worker
  std::int32_t last_token = 0;            ///< of the context: the one that the base cache does not cover
  std::int64_t max_tokens = 0;            ///< at least 1; memory for all of them is taken at the start
  std::vector<std::int32_t> stop_tokens;  ///< end the answer; not part of it
  KvTime deadline = kKvNever;             ///< by the clock of step()
  float temperature = 0.0F;               ///< where the lane samples by itself; 0: the largest logit
  std::uint64_t seed = 0;                 ///< of its draws
};

/// What happened to a request in a step. Every request ends with exactly one event that is not kToken.
struct DecodeEvent {
  /// What happened.
  enum class Kind : int {
    kToken,    ///< `token` is the answer's next
    kStopped,  ///< by a stop token
    kLength,   ///< by max_tokens; comes after the last kToken
    kFailed,   ///< see `status`: kCancelled (by cancel() or its deadline), or the forward pass's error
  };
  std::uint64_t id = 0;      ///< as in the request
  Kind kind = Kind::kToken;  ///< what happened
  std::int32_t token = 0;    ///< of kToken
  Status status;             ///< of kFailed; else ok()
};

/// Decodes in the caller's thread: nothing happens but in step(), which gives every request one token.
/// Requests of one module run as one batch, which reads the weights once; see forward_batch() for what that
/// does to the bits.
///
/// Memory for an answer's whole length is taken when it starts, and what is taken together is never more than
/// the pool has: a request that has started ends, whatever starts after it. Every block is given back with
/// the event that ends the request. The allocator is the caller's and outlives the worker. Externally
/// synchronized.
template <DecodeLane Lane>
class BasicDecodeWorker {
 public:
  using Allocator = typename Lane::Allocator;  ///< of base caches and answers

  /// Up to `most_active` requests at once.
  BasicDecodeWorker(Allocator& allocator, std::int64_t most_active)
      : allocator_(&allocator), most_active_(most_active) {}

  /// A decode module more. kNullPointer, kOutOfMemory.
  [[nodiscard]] Result<ModuleId> add_lane(std::unique_ptr<Lane> lane) {
    if (lane == nullptr) return error(StatusCode::kNullPointer, "DecodeWorker: no lane");
    const auto most = static_cast<std::size_t>(lane->max_batch());
    if (!detail::try_allocate([&] {
          slots_.reserve(most);
          LaneState state{std::move(lane), {}, 0};
          state.batch.reserve(most);
          lanes_.push_back(std::move(state));
        })) {
      return error(StatusCode::kOutOfMemory, "DecodeWorker: no memory for batches of ", most);
    }
    return static_cast<ModuleId>(lanes_.size() - 1);
  }
  [[nodiscard]] std::int64_t modules() const noexcept { return std::ssize(lanes_); }  ///< modules added

  /// Takes a request on the base cache of its context, of this worker's allocator, which the caller may keep
  /// or drop. Same pool as the prefill worker's: this is the hand-off, and no page moves. kExhausted: no
  /// place, or no memory for the answer; come back later, nothing was taken. kNotFound: no such module.
  /// kInvalidArgument: over the context's limit, a token outside of the vocabulary, no answer wanted, an id
  /// that is under way.
  [[nodiscard]] Status start(DecodeRequest request, const Sequence& base) {
    if (Status s = check(request, base.length()); !s.ok()) return s;
    if (std::ssize(active_) >= most_active_) {
      return error(StatusCode::kExhausted, "decode request ", request.id, ": ", active_.size(),
                   " are active, at most ", most_active_);
    }
    Result<Sequence> own = allocator_->fork(base);
    if (!own.ok()) return own.status();
    if (Status s = allocator_->reserve(*own, request.max_tokens); !s.ok()) return s;
    const std::int32_t token = request.last_token;
    if (!detail::try_allocate([&] {
          active_.push_back({std::move(request), *std::move(own), token, 0, false});
        })) {
      return error(StatusCode::kOutOfMemory, "decode request: no memory");
    }
    return {};
  }

  /// Whether start() could ever take the request on a base cache of `length` tokens, without taking it.
  [[nodiscard]] Status check(const DecodeRequest& request, std::int64_t length) const {
    if (request.module < 0 || request.module >= modules()) {
      return error(StatusCode::kNotFound, "decode request ", request.id, ": module ", request.module, " of ",
                   modules());
    }
    const Lane& lane = *lanes_[static_cast<std::size_t>(request.module)].lane;
    const std::int64_t limit = lane.max_context();
    if (request.max_tokens < 1 || request.max_tokens > limit || length + request.max_tokens > limit) {
      return error(StatusCode::kInvalidArgument, "decode request ", request.id, ": ", request.max_tokens,
                   " tokens after a context of ", length + 1, ", the limit is ", limit, " in all");
    }
    if (request.last_token < 0 || request.last_token >= lane.vocab_size()) {
      return error(StatusCode::kInvalidArgument, "decode request ", request.id, ": token ",
                   request.last_token, ", the vocabulary has ", lane.vocab_size());
    }
    // The partly filled last block of the base cache is copied before the answer goes on in it.
    const std::int64_t block_tokens = allocator_->block_tokens();
    const std::int64_t needed = (length + request.max_tokens + block_tokens - 1) / block_tokens +
                                (length % block_tokens != 0 ? 1 : 0);
    if (const std::int64_t have = allocator_->pool().blocks() - blocks_set_aside_; needed > have) {
      return error(StatusCode::kInvalidArgument, "decode request ", request.id, ": ",
                   length + request.max_tokens, " tokens need ", needed, " blocks of ", block_tokens,
                   ", the pool has ", have);
    }
    for (const Active& one : active_) {
      if (one.request.id != request.id) continue;
      return error(StatusCode::kInvalidArgument, "decode request ", request.id, " is under way already");
    }
    return {};
  }

  /// Whether the request was there: it then ends in the next step with kCancelled.
  bool cancel(std::uint64_t id) {
    for (Active& one : active_) {
      if (one.request.id != id || one.cancelled) continue;
      one.cancelled = true;
      return true;
    }
    return false;
  }

  [[nodiscard]] std::int64_t active() const noexcept { return std::ssize(active_); }  ///< requests under way
  /// Those of one module.
  [[nodiscard]] std::int64_t active(ModuleId module) const noexcept {
    return std::count_if(active_.begin(), active_.end(),
                         [module](const Active& one) { return one.request.module == module; });
  }
  /// Most of them at once, since the beginning.
  [[nodiscard]] std::int64_t most_active() const noexcept { return most_active_; }

  /// One token for each request; how many there were. All modules' batches are begun before the first is
  /// waited for; what does not fit a module's batch goes in a further round.
  /// next_token(std::uint64_t id, std::span<float> logits) -> std::int32_t: the sampler; it may overwrite the
  /// logits. on_event(const DecodeEvent&): round by round in the order of modules and then of requests.
  /// Neither calls the worker.
  template <class NextToken, class OnEvent>
  requires(!ChoosingLane<Lane>) std::int64_t step(KvTime now, NextToken&& next_token, OnEvent&& on_event) {
    return advance(
        now, kAllModules,
        [&](Lane& lane, std::size_t i, const Active& one) {
          return next_token(one.request.id, lane.logits(i));
        },
        on_event);
  }
  /// The same where the lanes sample, by each request's temperature and seed.
  template <class OnEvent>
  requires ChoosingLane<Lane> std::int64_t step(KvTime now, OnEvent&& on_event) {
    return step_module(now, kAllModules, on_event);
  }
  /// The same for the requests of one module: the caller chooses whose weights are worth reading next. The
  /// others' wait; those that are cancelled or late end all the same.
  template <class OnEvent>
  requires ChoosingLane<Lane> std::int64_t step_module(KvTime now, ModuleId module, OnEvent&& on_event) {
    return advance(
        now, module, [](Lane& lane, std::size_t i, const Active&) { return lane.token(i); }, on_event);
  }

 protected:
  /// Blocks of the pool that are held for good, and never serve an answer.
  void set_blocks_aside(std::int64_t blocks) noexcept { blocks_set_aside_ = blocks; }
  /// fn(Lane&) for each module, in their order.
  template <class Fn>
  void each_lane(Fn&& fn) {
    for (LaneState& state : lanes_) fn(*state.lane);
  }

 private:
  struct Active {
    DecodeRequest request;
    Sequence own;           // a fork of the base cache
    std::int32_t token;     // runs next
    std::int64_t made = 0;  // of the answer
    bool cancelled = false;
    bool over = false;  // its last event is out
  };
  struct LaneState {
    std::unique_ptr<Lane> lane;
    std::vector<std::size_t> batch;  // of the round, in active_
    std::size_t next;                // of active_, to be looked at
    Status status = {};              // of the batch
  };

  template <class OnEvent>
  static void end(Active& one, const DecodeEvent& event, OnEvent&& on_event) {
    one.over = true;
    one.own.reset();
    on_event(event);
  }
  template <class OnEvent>
  static void fail(Active& one, Status status, OnEvent&& on_event) {
    end(one, {one.request.id, DecodeEvent::Kind::kFailed, 0, std::move(status)}, on_event);
  }

  static constexpr ModuleId kAllModules = -1;

  template <class Choose, class OnEvent>
  std::int64_t advance(KvTime now, ModuleId only, Choose&& choose, OnEvent&& on_event) {
    for (Active& one : active_) {
      if (one.cancelled || one.request.deadline <= now) {
        fail(one,
             error(StatusCode::kCancelled, "decode request ", one.request.id,
                   one.cancelled ? " was cancelled" : ": its deadline is past"),
             on_event);
      }
    }
    for (LaneState& state : lanes_) state.next = 0;
    std::int64_t made = 0;
    for (bool more = true; more;) {
      more = false;
      for (std::size_t module = 0; module < lanes_.size(); ++module) {
        if (only != kAllModules && static_cast<std::size_t>(only) != module) continue;
        more = begin(lanes_[module], static_cast<ModuleId>(module), on_event) || more;
      }
      for (LaneState& state : lanes_) made += end_batch(state, choose, on_event);
    }
    std::erase_if(active_, [](const Active& one) { return one.over; });
    return made;
  }
  /// Begins the lane's next batch; whether it may have another one after it.
  template <class OnEvent>
  bool begin(LaneState& state, ModuleId module, OnEvent&& on_event) {
    const auto most = static_cast<std::size_t>(state.lane->max_batch());
    state.batch.clear();
    slots_.clear();
    for (; state.next < active_.size() && state.batch.size() < most; ++state.next) {
      Active& one = active_[state.next];
      if (one.request.module != module || one.over) continue;
      if (Status s = allocator_->append_private(one.own, 1); !s.ok()) {
        fail(one, std::move(s), on_event);
        continue;
      }
      state.batch.push_back(state.next);
      slots_.push_back({&one.own, one.token, one.request.temperature,
                        one.request.seed + static_cast<std::uint64_t>(one.made)});
    }
    if (!state.batch.empty()) state.status = state.lane->launch(slots_);
    return state.batch.size() == most;
  }
  template <class Choose, class OnEvent>
  std::int64_t end_batch(LaneState& state, Choose&& choose, OnEvent&& on_event) {
    if (state.batch.empty()) return 0;
    if (state.status.ok()) state.status = state.lane->wait();
    std::int64_t made = 0;
    for (std::size_t i = 0; i < state.batch.size(); ++i) {
      Active& one = active_[state.batch[i]];
      if (!state.status.ok()) {
        fail(one, state.status, on_event);
        continue;
      }
      const DecodeRequest& request = one.request;
      one.token = choose(*state.lane, i, one);
      ++made;
      if (std::find(request.stop_tokens.begin(), request.stop_tokens.end(), one.token) !=
          request.stop_tokens.end()) {
        end(one, {request.id, DecodeEvent::Kind::kStopped, one.token, {}}, on_event);
        continue;
      }
      on_event(DecodeEvent{request.id, DecodeEvent::Kind::kToken, one.token, {}});
      if (++one.made == request.max_tokens) {
        end(one, {request.id, DecodeEvent::Kind::kLength, one.token, {}}, on_event);
      }
    }
    state.batch.clear();
    return made;
  }

  Allocator* allocator_;
  std::int64_t most_active_;
  std::int64_t blocks_set_aside_ = 0;
  std::vector<LaneState> lanes_;
  std::vector<Active> active_;     // in the order of start()
  std::vector<DecodeSlot> slots_;  // of the batch that is being begun; kept for its memory
};

/// On processors. Storage and executor are the caller's and outlive the worker.
class DecodeWorker : public BasicDecodeWorker<HostDecodeLane> {
 public:
  /// Up to `most_active` requests at once.
  DecodeWorker(KvAllocator& allocator, HostKvStorage& storage, Executor& executor, std::int64_t most_active)
      : BasicDecodeWorker(allocator, most_active), storage_(&storage), executor_(&executor) {}

  /// A decode module more, with batches of up to `max_batch` requests (the rest of a step's go in further
  /// batches) over contexts of up to `max_context` tokens. Its fit to the base's cache was checked by
  /// factorize(); kIncompatible where it does not fit this worker's pages. kInvalidArgument, kOutOfMemory.
  template <LinearLayer Linear>
  [[nodiscard]] Result<ModuleId> add_module(DecodeModule<Linear> module, std::int64_t max_batch,
                                            std::int64_t max_context) {
    if (Status s = check_pages(module.config(), storage_->shape()); !s.ok()) return s;
    Result<ForwardWorkspace> workspace =
        ForwardWorkspace::create(module.model(), max_batch, max_context, executor_->workers());
    if (!workspace.ok()) return workspace.status();
    std::unique_ptr<detail::HostDecodeLaneOf<Linear>> lane;
    if (!detail::try_allocate([&] {
          lane = std::make_unique<detail::HostDecodeLaneOf<Linear>>(std::move(module), *std::move(workspace),
                                                                    *storage_, *executor_);
        }) ||
        !lane->reserve()) {
      return error(StatusCode::kOutOfMemory, "DecodeWorker: no memory for batches of ", max_batch);
    }
    return add_lane(std::move(lane));
  }

 private:
  HostKvStorage* storage_;
  Executor* executor_;
};

}  // namespace prefillshare
