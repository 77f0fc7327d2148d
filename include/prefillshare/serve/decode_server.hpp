// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/decode_server.hpp - a decode worker that prefill processes use through messages.
// Layer: serve (host only).
// See: examples/08_serve_mpi.cpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/serve/channel_transport.hpp>
#include <prefillshare/serve/decode_worker.hpp>
#include <prefillshare/serve/peers.hpp>

namespace prefillshare {

/// What a DecodeServer may be told.
struct DecodeServerOptions {
  std::int64_t most_handoffs = 16;      ///< under way at once
  KvTime handoff_time = 30000;          ///< a hand-off that takes longer is given up
  std::int64_t messages_per_step = 64;  ///< read before the next token is decoded
  HandoffId first_handoff = 1;          ///< another one each time that the process is started
  WatchOptions watch;                   ///< of the prefill processes
};

/// Serves whoever has said Hello: reserves blocks for its contexts, takes in their pages, decodes, sends the
/// tokens. A prefill process that falls silent or speaks nonsense is given up, with all it has asked for.
/// Every Ask ends with one End, or with the loss of one of the two processes. Nothing happens but in step(),
/// in the caller's thread. Worker, allocator, storage and channel are the caller's and outlive the server.
template <MessageChannel Channel>
class DecodeServer {
 public:
  /// `config` and `key` are those of the base that the worker's modules were factorized from: who says Hello
  /// must be that base.
  DecodeServer(DecodeWorker& worker, KvAllocator& allocator, HostKvStorage& storage, Channel& channel,
               const ModelConfig& config, CacheKey key, const DecodeServerOptions& options = {})
      : worker_(&worker),
        storage_(&storage),
        channel_(&channel),
        config_(config),
        key_(std::move(key)),
        options_(options),
        table_(allocator, storage.shape().layers, options.most_handoffs, options.first_handoff),
        watch_(options.watch) {}

  /// Reads messages, starts what is complete, decodes one token of every request, and says what is due.
  /// `next_token` as in DecodeWorker::step(). An error of the channel's own is returned; nothing is lost by
  /// it.
  template <class NextToken>
  [[nodiscard]] Status step(KvTime now, NextToken&& next_token) {
    now_ = now;
    Status status = read_messages();
    watch_.for_each_silent(now, [&](int peer, KvTime silent) {
      lose(peer, error(StatusCode::kIoError, "process ", peer, " was silent for ", silent));
    });
    give_up_late();
    start_complete();
    worker_->step(now, next_token, [&](const DecodeEvent& event) { tell(event); });
    watch_.for_each_due(now, [&](int peer) {
      write_word(MessageKind::kAlive, message_);
      say(peer);
    });
    return status;
  }

  /// No request of any kind is under way.
  [[nodiscard]] bool idle() const noexcept { return asks_.empty(); }
  [[nodiscard]] bool knows(int peer) const { return watch_.knows(peer); }  ///< has said Hello
  [[nodiscard]] bool alive(int peer) const { return watch_.alive(peer); }  ///< and was not lost since
  /// Prefill processes that have said Hello, and were not lost and have not left since.
  [[nodiscard]] std::int64_t living_peers() const { return watch_.living(); }
  /// The hand-offs under way.
  [[nodiscard]] const HandoffTable<>& handoffs() const noexcept { return table_; }
  /// Why a peer was given up last; ok() when none was.
  [[nodiscard]] const Status& last_loss() const noexcept { return last_loss_; }

 private:
  enum class Stage { kReceiving, kReady, kDecoding };
  struct Ask {
    int peer = 0;
    std::uint64_t peer_id = 0;
    Stage stage = Stage::kReceiving;
    HandoffId handoff = 0;
    KvTime handoff_deadline = kKvNever;
    DecodeRequest request;  // its id is this server's
    Sequence base;          // when kReady
  };
  using Asks = std::map<std::uint64_t, Ask>;

  [[nodiscard]] Status read_messages() {
    for (std::int64_t i = 0; i < options_.messages_per_step; ++i) {
      Result<std::optional<int>> from = channel_->receive(incoming_);
      if (!from.ok()) return from.status();
      if (!from->has_value()) return {};
      const int peer = **from;
      watch_.heard(peer, now_);
      if (Status s = handle(peer); !s.ok()) {
        lose(peer, s.with_prefix(codegemm::concat("process ", peer)));
      }
    }
    return {};
  }

  /// An error is the peer's end: it does not speak this protocol, or not truthfully.
  [[nodiscard]] Status handle(int peer) {
    const Result<MessageKind> kind = message_kind(incoming_);
    if (!kind.ok()) return kind.status();
    if (*kind == MessageKind::kHello) return greet(peer);
    if (!watch_.alive(peer)) return error(StatusCode::kCorruptData, "speaks without a Hello");
    switch (*kind) {
      case MessageKind::kAsk: return take_ask(peer);
      case MessageKind::kPages: return take_pages(peer);
      case MessageKind::kCancel: return take_cancel(peer);
      case MessageKind::kAlive: return {};
      case MessageKind::kBye:
        watch_.declare_dead(peer);
        drop_all(peer, error(StatusCode::kCancelled, "process ", peer, " has left"));
        return {};
      default: return error(StatusCode::kCorruptData, "sends what only a decode process says");
    }
  }

  [[nodiscard]] Status greet(int peer) {
    const Result<HelloMessage> hello = read_hello(incoming_);
    if (!hello.ok()) return hello.status();
    if (Status s = check_compatible(hello->config, config_); !s.ok()) return refuse_hello(peer, s);
    if (hello->key != key_ || hello->block_tokens != storage_->shape().block_tokens) {
      return refuse_hello(
          peer, error(StatusCode::kIncompatible, "the decode process serves base ", key_.model_id,
                      " version ", key_.model_version, " in blocks of ", storage_->shape().block_tokens,
                      " tokens, not ", hello->key.model_id, " version ", hello->key.model_version,
                      " in blocks of ", hello->block_tokens));
    }
    watch_.add(peer, now_);
    return {};
  }
  /// Says why, before the peer is given up.
  [[nodiscard]] Status refuse_hello(int peer, Status status) {
    write_message(EndMessage{0, EndMessage::Kind::kFailed, status}, message_);
    say(peer);
    return status;
  }

  [[nodiscard]] Status take_ask(int peer) {
    Result<AskMessage> read = read_ask(incoming_);
    if (!read.ok()) return read.status();
    Ask ask;
    ask.peer = peer;
    ask.peer_id = read->id;
    ask.request.id = next_id_;
    ask.request.module = read->module;
    ask.request.last_token = read->context.back();
    ask.request.max_tokens = read->max_tokens;
    ask.request.stop_tokens = std::move(read->stop_tokens);
    if (read->time_limit > 0 && read->time_limit < kKvNever - now_)
      ask.request.deadline = now_ + read->time_limit;
    ask.handoff_deadline = now_ + options_.handoff_time;
    const auto tokens = std::span<const std::int32_t>(read->context).first(read->context.size() - 1);
    Status status = worker_->check(ask.request, std::ssize(tokens));
    if (find(peer, read->id) != asks_.end()) {
      status = error(StatusCode::kInvalidArgument, "request ", read->id, " is under way already");
    }
    if (status.ok() && std::ssize(asks_) >= worker_->most_active() + options_.most_handoffs) {
      status = error(StatusCode::kExhausted, asks_.size(), " requests are under way");
    }
    Result<HandoffGrant> grant = status.ok() ? table_.reserve(key_, tokens, {peer, ask.handoff_deadline})
                                             : Result<HandoffGrant>(status);
    if (!grant.ok()) {
      write_message(EndMessage{read->id, EndMessage::Kind::kFailed, grant.status()}, message_);
      say(peer);
      return {};
    }
    ask.handoff = grant->id;
    write_message(GrantMessage{read->id, grant->id, grant->cached_tokens, grant->missing_blocks}, message_);
    say(peer);
    Ask& added = asks_.emplace(next_id_++, std::move(ask)).first->second;
    if (grant->missing_blocks == 0) become_ready(added);
    return {};
  }

  [[nodiscard]] Status take_pages(int peer) {
    const Result<PagesMessage> pages = read_pages(incoming_, storage_->shape());
    if (!pages.ok()) return pages.status();
    const auto at = std::find_if(asks_.begin(), asks_.end(), [&](const auto& one) {
      return one.second.stage == Stage::kReceiving && one.second.handoff == pages->header.handoff;
    });
    if (at == asks_.end()) return {};  // late pages of what was cancelled: nobody's any more
    Ask& ask = at->second;
    if (ask.peer != peer) return error(StatusCode::kCorruptData, "sends pages of another process's hand-off");
    const Result<HandoffState> state = receive_pages(*pages, table_, *storage_);
    if (!state.ok()) return state.status();
    if (*state == HandoffState::kComplete) become_ready(ask);
    return {};
  }

  [[nodiscard]] Status take_cancel(int peer) {
    const Result<std::uint64_t> id = read_cancel(incoming_);
    if (!id.ok()) return id.status();
    const auto at = find(peer, *id);
    if (at == asks_.end()) return {};  // it has ended: the two messages crossed
    drop(at, error(StatusCode::kCancelled, "request ", *id, " was cancelled"));
    return {};
  }

  void become_ready(Ask& ask) {
    Result<Sequence> base = table_.take(ask.handoff);
    CODEGEMM_ASSERT(base.ok());
    if (base.ok()) ask.base = *std::move(base);
    ask.stage = Stage::kReady;
  }

  /// Starts what is complete, oldest first. Where complete caches fill the pool so that no answer has room
  /// and nothing is decoding that would give some back, the youngest gives way.
  void start_complete() {
    for (auto at = asks_.begin(); at != asks_.end();) {
      const auto here = at++;
      Ask& ask = here->second;
      if (ask.stage != Stage::kReady) continue;
      const Status status = worker_->start(ask.request, ask.base);
      if (status.ok()) {
        ask.base.reset();
        ask.stage = Stage::kDecoding;
      } else if (status.code() != StatusCode::kExhausted) {
        drop(here, status);
      } else if (worker_->active() == 0 && asks_.size() > 1) {
        drop(std::prev(asks_.end()), error(StatusCode::kExhausted, "no KV memory for the answer"));
        at = asks_.begin();
      } else {
        return;
      }
    }
  }

  void give_up_late() {
    for (auto at = asks_.begin(); at != asks_.end();) {
      const auto here = at++;
      const Ask& ask = here->second;
      const bool receiving = ask.stage == Stage::kReceiving && ask.handoff_deadline <= now_;
      const bool waiting = ask.stage != Stage::kDecoding && ask.request.deadline <= now_;
      if (!receiving && !waiting) continue;
      drop(here, error(StatusCode::kCancelled, "request ", ask.peer_id, ": ",
                       receiving ? "its hand-off took too long" : "its deadline is past"));
    }
  }

  /// Ends a request that has no cache yet, or has one and is not decoding; a decoding one ends in the next
  /// step.
  void drop(typename Asks::iterator at, const Status& reason) {
    Ask& ask = at->second;
    if (ask.stage == Stage::kDecoding) {
      static_cast<void>(worker_->cancel(ask.request.id));
      return;
    }
    if (ask.stage == Stage::kReceiving) static_cast<void>(table_.abort(ask.handoff, reason));
    write_message(EndMessage{ask.peer_id, EndMessage::Kind::kFailed, reason}, message_);
    say(ask.peer);
    asks_.erase(at);
  }

  void lose(int peer, const Status& reason) {
    last_loss_ = reason;
    watch_.declare_dead(peer);
    channel_->give_up(peer);
    drop_all(peer, reason);
  }
  void drop_all(int peer, const Status& reason) {
    for (auto at = asks_.begin(); at != asks_.end();) {
      const auto here = at++;
      if (here->second.peer == peer) drop(here, reason);
    }
  }

  void tell(const DecodeEvent& event) {
    const auto at = asks_.find(event.id);
    if (at == asks_.end()) return;
    const int peer = at->second.peer;
    const std::uint64_t id = at->second.peer_id;
    if (event.kind == DecodeEvent::Kind::kToken) {
      write_message(TokenMessage{id, event.token}, message_);
    } else {
      const EndMessage::Kind kind = event.kind == DecodeEvent::Kind::kStopped  ? EndMessage::Kind::kStopped
                                    : event.kind == DecodeEvent::Kind::kLength ? EndMessage::Kind::kLength
                                                                               : EndMessage::Kind::kFailed;
      write_message(EndMessage{id, kind, event.status}, message_);
      asks_.erase(at);
    }
    say(peer);
  }

  /// Sends message_. That it could not be sent, the peer's silence will tell.
  void say(int peer) {
    watch_.said(peer, now_);
    static_cast<void>(channel_->send(peer, std::move(message_)).ok());
    message_.clear();
  }

  [[nodiscard]] typename Asks::iterator find(int peer, std::uint64_t peer_id) {
    return std::find_if(asks_.begin(), asks_.end(), [&](const auto& one) {
      return one.second.peer == peer && one.second.peer_id == peer_id;
    });
  }

  DecodeWorker* worker_;
  HostKvStorage* storage_;
  Channel* channel_;
  ModelConfig config_;
  CacheKey key_;
  DecodeServerOptions options_;
  HandoffTable<> table_;
  PeerWatch watch_;
  KvTime now_ = 0;
  Asks asks_;  // by this server's number: in the order they came
  std::uint64_t next_id_ = 1;
  Message incoming_;
  Message message_;
  Status last_loss_;
};

}  // namespace prefillshare
