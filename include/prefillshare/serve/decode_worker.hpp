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

#include <codegemm/base/aligned_buffer.hpp>
#include <prefillshare/kv/eviction.hpp>
#include <prefillshare/model/modules.hpp>

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

namespace detail {

/// A decode module whatever its linear layers are, with the memory for its batches.
class DecodeLane {
 public:
  DecodeLane(const DecodeLane&) = delete;
  DecodeLane& operator=(const DecodeLane&) = delete;
  virtual ~DecodeLane() = default;

  [[nodiscard]] virtual const ModelConfig& config() const noexcept = 0;
  [[nodiscard]] virtual Result<ForwardItem> place(const std::int32_t& token, KvAllocator& allocator,
                                                  HostKvStorage& storage, Sequence& own) const = 0;
  /// logits() gets a row for each item.
  [[nodiscard]] virtual Status run(std::span<const ForwardItem> items, Executor& executor) = 0;

  [[nodiscard]] std::span<float> logits(std::size_t item) noexcept {
    const auto width = static_cast<std::size_t>(config().vocab_size);
    return logits_.span().subspan(item * width, width);
  }
  [[nodiscard]] const ForwardWorkspace& workspace() const noexcept { return workspace_; }

 protected:
  explicit DecodeLane(ForwardWorkspace workspace) : workspace_(std::move(workspace)) {}

  ForwardWorkspace workspace_;
  codegemm::AlignedBuffer<float> logits_;  // [max_tokens of the workspace][vocab_size]
};

template <LinearLayer Linear>
class DecodeLaneOf final : public DecodeLane {
 public:
  DecodeLaneOf(DecodeModule<Linear> module, ForwardWorkspace workspace)
      : DecodeLane(std::move(workspace)), module_(std::move(module)) {}

  [[nodiscard]] bool reserve_logits() {
    return logits_.reserve(static_cast<std::size_t>(workspace_.max_tokens() * config().vocab_size));
  }
  [[nodiscard]] const ModelConfig& config() const noexcept override { return module_.config(); }
  [[nodiscard]] Result<ForwardItem> place(const std::int32_t& token, KvAllocator& allocator,
                                          HostKvStorage& storage, Sequence& own) const override {
    return module_.place(token, allocator, storage, own);
  }
  [[nodiscard]] Status run(std::span<const ForwardItem> items, Executor& executor) override {
    return module_.run(items, MatrixView<float>(logits_.data(), std::ssize(items), config().vocab_size),
                       workspace_, executor);
  }

 private:
  DecodeModule<Linear> module_;
};

}  // namespace detail

/// Decodes in the caller's thread: nothing happens but in step(), which gives every request one token.
/// Requests of one module run as one batch, which reads the weights once; see forward_batch() for what that
/// does to the bits.
///
/// Memory for an answer's whole length is taken when it starts, and what is taken together is never more than
/// the pool has: a request that has started ends, whatever starts after it. Every block is given back with
/// the event that ends the request. Allocator, storage and executor are the caller's and outlive the worker.
/// Externally synchronized.
class DecodeWorker {
 public:
  /// Up to `most_active` requests at once.
  DecodeWorker(KvAllocator& allocator, HostKvStorage& storage, Executor& executor, std::int64_t most_active)
      : allocator_(&allocator), storage_(&storage), executor_(&executor), most_active_(most_active) {}

  /// A decode module more, with batches of up to `max_batch` requests (the rest of a step's go in further
  /// batches) over contexts of up to `max_context` tokens. Its fit to the base's cache was checked by
  /// factorize(); kIncompatible where it does not fit this worker's pages. kInvalidArgument, kOutOfMemory.
  template <LinearLayer Linear>
  [[nodiscard]] Result<ModuleId> add_module(DecodeModule<Linear> module, std::int64_t max_batch,
                                            std::int64_t max_context) {
    const KvShape wanted = kv_shape(module.config(), storage_->shape().block_tokens);
    if (wanted != storage_->shape()) {
      const KvShape have = storage_->shape();
      return error(StatusCode::kIncompatible, "decode module of ", wanted.layers, " layers, ",
                   wanted.kv_heads, " KV heads of ", wanted.head_dim, " does not fit pages of ", have.layers,
                   " layers, ", have.kv_heads, " KV heads of ", have.head_dim);
    }
    Result<ForwardWorkspace> workspace =
        ForwardWorkspace::create(module.model(), max_batch, max_context, executor_->workers());
    if (!workspace.ok()) return workspace.status();
    bool enough = false;
    const bool allocated = detail::try_allocate([&] {
      auto lane = std::make_unique<detail::DecodeLaneOf<Linear>>(std::move(module), *std::move(workspace));
      enough = lane->reserve_logits();
      lanes_.push_back(std::move(lane));
      items_.reserve(static_cast<std::size_t>(max_batch));
      batch_.reserve(static_cast<std::size_t>(max_batch));
    });
    if (!allocated || !enough) {
      if (allocated) lanes_.pop_back();
      return error(StatusCode::kOutOfMemory, "DecodeWorker: no memory for batches of ", max_batch);
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
    const detail::DecodeLane& lane = *lanes_[static_cast<std::size_t>(request.module)];
    const std::int64_t limit = std::min(lane.config().context_length, lane.workspace().max_context());
    if (request.max_tokens < 1 || request.max_tokens > limit || length + request.max_tokens > limit) {
      return error(StatusCode::kInvalidArgument, "decode request ", request.id, ": ", request.max_tokens,
                   " tokens after a context of ", length + 1, ", the limit is ", limit, " in all");
    }
    if (request.last_token < 0 || request.last_token >= lane.config().vocab_size) {
      return error(StatusCode::kInvalidArgument, "decode request ", request.id, ": token ",
                   request.last_token, ", the vocabulary has ", lane.config().vocab_size);
    }
    // The partly filled last block of the base cache is copied before the answer goes on in it.
    const std::int64_t block_tokens = allocator_->block_tokens();
    const std::int64_t needed = (length + request.max_tokens + block_tokens - 1) / block_tokens +
                                (length % block_tokens != 0 ? 1 : 0);
    if (needed > allocator_->pool().blocks()) {
      return error(StatusCode::kInvalidArgument, "decode request ", request.id, ": ",
                   length + request.max_tokens, " tokens need ", needed, " blocks of ", block_tokens,
                   ", the pool has ", allocator_->pool().blocks());
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
  /// Most of them at once, since the beginning.
  [[nodiscard]] std::int64_t most_active() const noexcept { return most_active_; }

  /// One token for each request; how many there were.
  /// next_token(std::uint64_t id, std::span<float> logits) -> std::int32_t: the sampler; it may overwrite the
  /// logits. on_event(const DecodeEvent&): in the order of modules and then of requests. Neither calls the
  /// worker.
  template <class NextToken, class OnEvent>
  std::int64_t step(KvTime now, NextToken&& next_token, OnEvent&& on_event) {
    std::int64_t made = 0;
    for (Active& one : active_) {
      if (one.cancelled || one.request.deadline <= now) {
        fail(one,
             error(StatusCode::kCancelled, "decode request ", one.request.id,
                   one.cancelled ? " was cancelled" : ": its deadline is past"),
             on_event);
      }
    }
    for (ModuleId module = 0; module < modules(); ++module) {
      detail::DecodeLane& lane = *lanes_[static_cast<std::size_t>(module)];
      batch_.clear();
      for (Active& one : active_) {
        if (one.request.module != module || one.over) continue;
        batch_.push_back(&one);
        if (std::ssize(batch_) == lane.workspace().max_tokens())
          made += run_batch(lane, next_token, on_event);
      }
      made += run_batch(lane, next_token, on_event);
    }
    std::erase_if(active_, [](const Active& one) { return one.over; });
    return made;
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

  template <class NextToken, class OnEvent>
  std::int64_t run_batch(detail::DecodeLane& lane, NextToken&& next_token, OnEvent&& on_event) {
    items_.clear();
    std::erase_if(batch_, [&](Active* one) {
      Result<ForwardItem> item = lane.place(one->token, *allocator_, *storage_, one->own);
      if (item.ok()) {
        items_.push_back(*item);
        return false;
      }
      fail(*one, item.status(), on_event);
      return true;
    });
    if (batch_.empty()) return 0;
    const Status status = lane.run(items_, *executor_);
    std::int64_t made = 0;
    for (std::size_t i = 0; i < batch_.size(); ++i) {
      Active& one = *batch_[i];
      if (!status.ok()) {
        fail(one, status, on_event);
        continue;
      }
      const DecodeRequest& request = one.request;
      one.token = next_token(request.id, lane.logits(i));
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
    batch_.clear();
    return made;
  }

  KvAllocator* allocator_;
  HostKvStorage* storage_;
  Executor* executor_;
  std::int64_t most_active_;
  std::vector<std::unique_ptr<detail::DecodeLane>> lanes_;
  std::vector<Active> active_;  // in the order of start()
  // One step's, kept for their memory.
  std::vector<Active*> batch_;
  std::vector<ForwardItem> items_;
};

}  // namespace prefillshare
