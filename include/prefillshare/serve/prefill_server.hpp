// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/prefill_server.hpp - a prefill worker that gives its caches to decode processes and
// brings their answers back.
// Layer: serve (host only).
// See: examples/08_serve_mpi.cpp
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/serve/channel_transport.hpp>
#include <prefillshare/serve/decode_worker.hpp>
#include <prefillshare/serve/peers.hpp>
#include <prefillshare/serve/prefill_worker.hpp>

namespace prefillshare {

/// An answer that is wanted of a decode process.
struct ServeRequest {
  std::uint64_t id = 0;                   ///< the caller's; each attempt gets another one
  int process = 0;                        ///< of the channel
  ModuleId module = 0;                    ///< of the process
  std::vector<std::int32_t> context;      ///< at least one token
  std::int64_t max_tokens = 0;            ///< of the answer
  std::vector<std::int32_t> stop_tokens;  ///< end the answer
  KvTime time_limit = 0;                  ///< 0: none
};

/// As a DecodeEvent, and with the status of all that can fail on the way: kIoError when the decode process
/// was lost (ask another one; the base cache is still here), kExhausted when it has no room now.
using ServeEvent = DecodeEvent;

/// What a PrefillServer may be told.
struct PrefillServerOptions {
  std::int64_t most_queued_bytes = std::int64_t{64} << 20;  ///< to one process, before it is asked for more
  WatchOptions watch;                                       ///< of the decode processes
};

/// One request's way: asked, granted (blocks are reserved over there), prefilled and sent layer by layer,
/// decoded. Each ends with one event that is not kToken, whatever fails; after that nothing more is said of
/// it, though its process should come back. Nothing happens but in step(), in the caller's thread. Worker,
/// storage and channel are the caller's and outlive the server.
template <LinearLayer Base, MessageChannel Channel>
class PrefillServer {
 public:
  /// All four outlive the server; the worker is its own.
  PrefillServer(const PrefillModule<Base>& module, PrefillWorker<Base>& worker, HostKvStorage& storage,
                Channel& channel, const PrefillServerOptions& options = {})
      : module_(&module),
        worker_(&worker),
        storage_(&storage),
        channel_(&channel),
        options_(options),
        watch_(options.watch) {}

  /// Says Hello to a decode process, which may be asked from then on. kInvalidArgument: it is known already.
  [[nodiscard]] Status add_process(int process, KvTime now) {
    if (watch_.knows(process)) {
      return error(StatusCode::kInvalidArgument, "process ", process, " is known already");
    }
    write_message(HelloMessage{module_->config(), module_->key(), storage_->shape().block_tokens}, message_);
    watch_.add(process, now);
    return channel_->send(process, std::move(message_));
  }
  /// Whether it may be asked: it was added and has not been lost.
  [[nodiscard]] bool alive(int process) const { return watch_.alive(process); }
  /// Requests that have not ended.
  [[nodiscard]] std::int64_t active() const noexcept { return std::ssize(requests_); }

  /// kIoError: the process is lost. kNotFound: it was never added. kExhausted: too much waits to be sent to
  /// it (it is slow), or too many jobs wait here. kInvalidArgument: no context, or the id is under way.
  [[nodiscard]] Status submit(ServeRequest request) {
    if (request.context.empty() || requests_.contains(request.id)) {
      return error(StatusCode::kInvalidArgument, "request ", request.id, ": ",
                   request.context.empty() ? "no context" : "under way already");
    }
    if (!watch_.alive(request.process)) {
      return error(watch_.knows(request.process) ? StatusCode::kIoError : StatusCode::kNotFound, "request ",
                   request.id, ": process ", request.process, " is not there");
    }
    const std::int64_t queued = channel_->queued_bytes(request.process);
    if (queued > options_.most_queued_bytes) {
      return error(StatusCode::kExhausted, "request ", request.id, ": ", queued, " bytes wait for process ",
                   request.process);
    }
    AskMessage ask;
    ask.id = request.id;
    ask.module = request.module;
    ask.max_tokens = request.max_tokens;
    ask.time_limit = request.time_limit;
    ask.stop_tokens = request.stop_tokens;
    ask.context = request.context;
    write_message(ask, message_);
    if (message_.size() > kMostMessageBytes) {
      return error(StatusCode::kInvalidArgument, "request ", request.id, ": a context of ",
                   ask.context.size(), " tokens");
    }
    if (Status s = channel_->send(request.process, std::move(message_)); !s.ok()) return s;
    const std::uint64_t id = request.id;
    requests_.emplace(id, Request{std::move(request), {}, false, {}});
    return {};
  }

  /// Whether it was under way: it then ends with kCancelled, in the next step at the earliest.
  bool cancel(std::uint64_t id) {
    const auto at = requests_.find(id);
    if (at == requests_.end()) return false;
    end_later(at->second, error(StatusCode::kCancelled, "request ", id, " was cancelled"));
    return true;
  }

  /// Says Bye to every process that is there; requests under way end with kCancelled in the next step.
  void leave() {
    for (auto& [id, request] : requests_) {
      end_later(request, error(StatusCode::kCancelled, "request ", id, ": the server leaves"));
    }
    watch_.for_each_living([&](int process) {
      write_word(MessageKind::kBye, message_);
      say(process);
      watch_.declare_dead(process);
    });
  }

  /// Reads what came, computes one chunk and sends its pages, and tells what became of requests:
  /// on_event(const ServeEvent&), which does not call the server. An error is the channel's own.
  template <class OnEvent>
  [[nodiscard]] Status step(KvTime now, OnEvent&& on_event) {
    now_ = now;
    Status status = read_messages(on_event);
    watch_.for_each_silent(now, [&](int process, KvTime silent) {
      lose(process, error(StatusCode::kIoError, "process ", process, " was silent for ", silent));
    });
    worker_->step(
        now, [&](const PagesReady& pages) { return send_pages(pages); },
        [&](PrefillResult&& result) { prefilled(result); });
    for (auto at = requests_.begin(); at != requests_.end();) {
      if (at->second.failure.ok()) {
        ++at;
        continue;
      }
      on_event(ServeEvent{at->first, DecodeEvent::Kind::kFailed, 0, std::move(at->second.failure)});
      at = requests_.erase(at);
    }
    watch_.for_each_due(now, [&](int process) {
      write_word(MessageKind::kAlive, message_);
      say(process);
    });
    return status;
  }

 private:
  struct Request {
    ServeRequest request;
    std::optional<GrantMessage> grant;
    bool prefilling = false;  // the worker has its job
    Status failure;           // to be told at the end of the step
  };

  template <class OnEvent>
  [[nodiscard]] Status read_messages(OnEvent&& on_event) {
    while (true) {
      Result<std::optional<int>> from = channel_->receive(incoming_);
      if (!from.ok()) return from.status();
      if (!from->has_value()) return {};
      const int process = **from;
      if (!watch_.alive(process)) continue;
      watch_.heard(process, now_);
      if (Status s = handle(process, on_event); !s.ok()) {
        lose(process, s.with_prefix(codegemm::concat("process ", process)));
      }
    }
  }

  /// An error is the process's end.
  template <class OnEvent>
  [[nodiscard]] Status handle(int process, OnEvent&& on_event) {
    const Result<MessageKind> kind = message_kind(incoming_);
    if (!kind.ok()) return kind.status();
    switch (*kind) {
      case MessageKind::kAlive: return {};
      case MessageKind::kGrant: return take_grant(process);
      case MessageKind::kToken: {
        const Result<TokenMessage> token = read_token(incoming_);
        if (!token.ok()) return token.status();
        if (Request* request = find(process, token->id); request != nullptr) {
          on_event(ServeEvent{token->id, DecodeEvent::Kind::kToken, token->token, {}});
        }
        return {};
      }
      case MessageKind::kEnd: return take_end(process, on_event);
      default: return error(StatusCode::kCorruptData, "sends what only a prefill process says");
    }
  }

  [[nodiscard]] Status take_grant(int process) {
    const Result<GrantMessage> grant = read_grant(incoming_);
    if (!grant.ok()) return grant.status();
    Request* request = find(process, grant->id);
    if (request == nullptr) return {};  // cancelled meanwhile; it was told
    const std::int64_t tokens = std::ssize(request->request.context) - 1;
    const std::int64_t block_tokens = storage_->shape().block_tokens;
    if (request->grant || grant->cached_tokens > tokens || grant->cached_tokens % block_tokens != 0 ||
        grant->missing_blocks != (tokens - grant->cached_tokens + block_tokens - 1) / block_tokens) {
      return error(StatusCode::kCorruptData, "grants ", grant->missing_blocks, " blocks behind ",
                   grant->cached_tokens, " tokens for a base cache of ", tokens);
    }
    request->grant = *grant;
    if (grant->missing_blocks == 0) return {};
    PrefillJob job;
    job.id = grant->id;
    job.tokens.assign(request->request.context.begin(), request->request.context.end() - 1);
    job.pages_from = grant->cached_tokens;
    const Status status = worker_->submit(std::move(job));
    request->prefilling = status.ok();
    if (!status.ok()) end_later(*request, status);
    return {};
  }

  template <class OnEvent>
  [[nodiscard]] Status take_end(int process, OnEvent&& on_event) {
    Result<EndMessage> end = read_end(incoming_);
    if (!end.ok()) return end.status();
    if (end->id == 0 && end->status.code() == StatusCode::kIncompatible) return end->status;  // of our Hello
    const Request* request = find(process, end->id);
    if (request == nullptr) return {};
    if (request->prefilling) static_cast<void>(worker_->cancel(end->id));
    requests_.erase(end->id);
    const DecodeEvent::Kind kind = end->kind == EndMessage::Kind::kStopped  ? DecodeEvent::Kind::kStopped
                                   : end->kind == EndMessage::Kind::kLength ? DecodeEvent::Kind::kLength
                                                                            : DecodeEvent::Kind::kFailed;
    on_event(ServeEvent{end->id, kind, 0, std::move(end->status)});
    return {};
  }

  [[nodiscard]] Status send_pages(const PagesReady& pages) {
    const auto at = requests_.find(pages.job);
    if (at == requests_.end() || !at->second.failure.ok()) {
      return error(StatusCode::kCancelled, "request ", pages.job, " has ended");
    }
    const GrantMessage& grant = *at->second.grant;
    const std::int64_t skip = grant.cached_tokens / storage_->shape().block_tokens;
    ChannelTransport<Channel> transport(*channel_, at->second.request.process);
    return transport.send(
        *storage_, {grant.handoff, pages.layer, pages.first_block - skip, pages.blocks, pages.last_tokens});
  }
  void prefilled(const PrefillResult& result) {
    const auto at = requests_.find(result.id);
    if (at == requests_.end()) return;
    at->second.prefilling = false;
    if (!result.status.ok()) end_later(at->second, result.status);
  }

  /// Ends a request from here: the worker and the decode process are told now, the caller at the end of the
  /// step.
  void end_later(Request& request, const Status& reason) {
    if (!request.failure.ok()) return;
    request.failure = reason;
    if (request.prefilling) static_cast<void>(worker_->cancel(request.request.id));
    if (!watch_.alive(request.request.process)) return;
    write_cancel(request.request.id, message_);
    say(request.request.process);
  }
  void lose(int process, const Status& reason) {
    watch_.declare_dead(process);
    channel_->give_up(process);
    for (auto& [id, request] : requests_) {
      if (request.request.process == process) end_later(request, reason);
    }
  }
  /// Sends message_. That it could not be sent, the process's silence will tell.
  void say(int process) {
    watch_.said(process, now_);
    static_cast<void>(channel_->send(process, std::move(message_)).ok());
    message_.clear();
  }
  [[nodiscard]] Request* find(int process, std::uint64_t id) {
    const auto at = requests_.find(id);
    const bool there =
        at != requests_.end() && at->second.request.process == process && at->second.failure.ok();
    return there ? &at->second : nullptr;
  }

  const PrefillModule<Base>* module_;
  PrefillWorker<Base>* worker_;
  HostKvStorage* storage_;
  Channel* channel_;
  PrefillServerOptions options_;
  PeerWatch watch_;
  KvTime now_ = 0;
  std::map<std::uint64_t, Request> requests_;
  Message incoming_;
  Message message_;
};

}  // namespace prefillshare
