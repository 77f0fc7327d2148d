// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/protocol.hpp - what a prefill process and a decode process say to each other.
// Layer: serve (host only).
//
//   prefill -> decode   Hello        the base: its config, key and pages; a decode module must fit it
//                       Ask          an answer is wanted to a context: its tokens, the module, the limits
//                       Pages        one layer of some blocks of a hand-off
//                       Cancel       an Ask is no longer wanted
//                       Bye          no more comes, and nothing under way is wanted
//   decode -> prefill   Grant        blocks are reserved: the hand-off's number, and what need not be sent
//                       Token, End   of the answer; End is also the refusal, with the Status that says why
//   both                Alive        nothing to say
//
// Every reader treats what it gets as hostile: sizes and ranges are checked here as far as they can be
// without knowing the receiver's state, which checks the rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/model/config.hpp>
#include <prefillshare/serve/handoff_table.hpp>
#include <prefillshare/serve/wire.hpp>

namespace prefillshare {

enum class MessageKind : std::uint32_t {
  kHello = 1,
  kAsk,
  kPages,
  kCancel,
  kGrant,
  kToken,
  kEnd,
  kAlive,
  kBye
};

/// Who makes the cache, and what its pages are.
struct HelloMessage {
  ModelConfig config;
  CacheKey key;
  std::int32_t block_tokens = 0;
};

struct AskMessage {
  std::uint64_t id = 0;  // the asker's, one of its kind among those it has under way
  std::int32_t module = 0;
  std::int64_t max_tokens = 0;
  std::int64_t time_limit = 0;  // from arrival, by the receiver's clock; 0: none
  std::vector<std::int32_t> stop_tokens;
  std::vector<std::int32_t> context;  // at least one token; the base cache covers all but the last
};

struct GrantMessage {
  std::uint64_t id = 0;
  HandoffId handoff = 0;
  std::int64_t cached_tokens = 0;
  std::int64_t missing_blocks = 0;
};

/// The numbers before the pages themselves: for each block K [tokens][kv_heads][head_dim], then V, fp32.
struct PagesHeader {
  HandoffId handoff = 0;
  std::int32_t layer = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
  std::int64_t last_tokens = 0;
};

struct TokenMessage {
  std::uint64_t id = 0;
  std::int32_t token = 0;
};

/// How an Ask ended; once for each.
struct EndMessage {
  enum class Kind : std::int32_t { kStopped = 0, kLength = 1, kFailed = 2 };
  std::uint64_t id = 0;
  Kind kind = Kind::kFailed;
  Status status;  // not ok() exactly if kFailed
};

namespace detail {

inline constexpr std::uint32_t kMessageMagic = 0x50534831;  // in another byte order it is another number

[[nodiscard]] inline MessageWriter begin_message(Message& out, MessageKind kind) {
  out.clear();
  MessageWriter writer(out);
  writer.number(kMessageMagic);
  writer.number(kind);
  return writer;
}
[[nodiscard]] inline Status malformed(const char* what, std::size_t bytes) {
  return error(StatusCode::kCorruptData, "a ", what, " message of ", bytes, " bytes is malformed");
}

}  // namespace detail

/// kCorruptData for what is no message of this protocol.
[[nodiscard]] inline Result<MessageKind> message_kind(std::span<const std::byte> message) {
  detail::MessageReader reader(message);
  std::uint32_t magic = 0;
  std::uint32_t kind = 0;
  if (!reader.number(magic) || !reader.number(kind) || magic != detail::kMessageMagic ||
      kind < static_cast<std::uint32_t>(MessageKind::kHello) ||
      kind > static_cast<std::uint32_t>(MessageKind::kBye)) {
    return error(StatusCode::kCorruptData, "a message of ", message.size(), " bytes begins with ", magic,
                 " and ", kind, ", which is not this protocol (another version, or another byte order?)");
  }
  return static_cast<MessageKind>(kind);
}

namespace detail {

inline constexpr std::size_t kMessageHead = 2 * sizeof(std::uint32_t);

/// Each field in turn, the same for writing and for reading: visit(field) -> bool.
template <class Config, class Visit>
[[nodiscard]] bool visit_config(Config& c, Visit&& visit) {
  return visit(c.vocab_size) && visit(c.hidden_size) && visit(c.intermediate_size) && visit(c.layers) &&
         visit(c.heads) && visit(c.kv_heads) && visit(c.head_dim) && visit(c.context_length) &&
         visit(c.rms_epsilon) && visit(c.rope.head_dim) && visit(c.rope.theta) && visit(c.rope.factor) &&
         visit(c.rope.low_freq_factor) && visit(c.rope.high_freq_factor) &&
         visit(c.rope.original_max_position_embeddings);
}

}  // namespace detail

inline void write_message(const HelloMessage& hello, Message& out) {
  detail::MessageWriter writer = detail::begin_message(out, MessageKind::kHello);
  const ModelConfig& c = hello.config;
  static_cast<void>(detail::visit_config(c, [&](const auto& field) {
    writer.number(field);
    return true;
  }));
  for (const int flag : {static_cast<int>(c.rope.scaling), static_cast<int>(c.rope.layout),
                         int{c.tied_embeddings}, int{c.attention_bias}, int{c.qk_norm}}) {
    writer.number(static_cast<std::int32_t>(flag));
  }
  writer.text(hello.key.model_id);
  writer.text(hello.key.model_version);
  writer.text(hello.key.tenant_salt);
  writer.number(hello.block_tokens);
}
[[nodiscard]] inline Result<HelloMessage> read_hello(std::span<const std::byte> message) {
  detail::MessageReader reader(message.subspan(std::min(detail::kMessageHead, message.size())));
  HelloMessage out;
  ModelConfig& c = out.config;
  std::int32_t flags[5] = {};
  bool good = detail::visit_config(c, [&](auto& field) { return reader.number(field); });
  for (std::int32_t& flag : flags) good = good && reader.number(flag);
  good = good && reader.text(out.key.model_id) && reader.text(out.key.model_version) &&
         reader.text(out.key.tenant_salt) && reader.number(out.block_tokens) && reader.complete();
  if (!good || flags[0] < 0 || flags[0] > 2 || flags[1] < 0 || flags[1] > 1) {
    return detail::malformed("Hello", message.size());
  }
  c.rope.scaling = static_cast<RopeScaling>(flags[0]);
  c.rope.layout = static_cast<RopeLayout>(flags[1]);
  c.tied_embeddings = flags[2] != 0;
  c.attention_bias = flags[3] != 0;
  c.qk_norm = flags[4] != 0;
  if (Status s = validate(c); !s.ok()) return s.with_prefix("Hello");
  if (Status s = validate(kv_shape(c, out.block_tokens)); !s.ok()) return s.with_prefix("Hello");
  return out;
}

inline void write_message(const AskMessage& ask, Message& out) {
  detail::MessageWriter writer = detail::begin_message(out, MessageKind::kAsk);
  writer.number(ask.id);
  writer.number(ask.module);
  writer.number(ask.max_tokens);
  writer.number(ask.time_limit);
  writer.tokens(ask.stop_tokens);
  writer.tokens(ask.context);
}
[[nodiscard]] inline Result<AskMessage> read_ask(std::span<const std::byte> message) {
  detail::MessageReader reader(message.subspan(std::min(detail::kMessageHead, message.size())));
  AskMessage out;
  if (!reader.number(out.id) || !reader.number(out.module) || !reader.number(out.max_tokens) ||
      !reader.number(out.time_limit) || !reader.tokens(out.stop_tokens) || !reader.tokens(out.context) ||
      !reader.complete() || out.context.empty() || out.time_limit < 0) {
    return detail::malformed("Ask", message.size());
  }
  return out;
}

inline void write_message(const GrantMessage& grant, Message& out) {
  detail::MessageWriter writer = detail::begin_message(out, MessageKind::kGrant);
  writer.number(grant.id);
  writer.number(grant.handoff);
  writer.number(grant.cached_tokens);
  writer.number(grant.missing_blocks);
}
[[nodiscard]] inline Result<GrantMessage> read_grant(std::span<const std::byte> message) {
  detail::MessageReader reader(message.subspan(std::min(detail::kMessageHead, message.size())));
  GrantMessage out;
  if (!reader.number(out.id) || !reader.number(out.handoff) || !reader.number(out.cached_tokens) ||
      !reader.number(out.missing_blocks) || !reader.complete() || out.cached_tokens < 0 ||
      out.missing_blocks < 0) {
    return detail::malformed("Grant", message.size());
  }
  return out;
}

/// Begins a Pages message, to which the pages are appended.
inline void write_message(const PagesHeader& pages, Message& out) {
  detail::MessageWriter writer = detail::begin_message(out, MessageKind::kPages);
  writer.number(pages.handoff);
  writer.number(pages.layer);
  writer.number(pages.first);
  writer.number(pages.count);
  writer.number(pages.last_tokens);
}
struct PagesMessage {
  PagesHeader header;
  std::span<const std::byte> pages;  // within the message
};
/// That there are as many bytes as the header says, for pages of `shape`, is checked.
[[nodiscard]] inline Result<PagesMessage> read_pages(std::span<const std::byte> message,
                                                     const KvShape& shape) {
  detail::MessageReader reader(message.subspan(std::min(detail::kMessageHead, message.size())));
  PagesMessage out;
  PagesHeader& h = out.header;
  if (!reader.number(h.handoff) || !reader.number(h.layer) || !reader.number(h.first) ||
      !reader.number(h.count) || !reader.number(h.last_tokens) || h.layer < 0 || h.layer >= shape.layers ||
      h.first < 0 || h.count < 1 || h.last_tokens < 1 || h.last_tokens > shape.block_tokens) {
    return detail::malformed("Pages", message.size());
  }
  out.pages = reader.rest();
  const std::int64_t token_bytes = shape.bytes_per_token() / shape.layers;
  const std::int64_t most = static_cast<std::int64_t>(out.pages.size()) / token_bytes;  // tokens there are
  if (h.count > most || (h.count - 1) * shape.block_tokens + h.last_tokens != most ||
      most * token_bytes != static_cast<std::int64_t>(out.pages.size())) {
    return detail::malformed("Pages", message.size());
  }
  return out;
}

inline void write_cancel(std::uint64_t id, Message& out) {
  detail::begin_message(out, MessageKind::kCancel).number(id);
}
[[nodiscard]] inline Result<std::uint64_t> read_cancel(std::span<const std::byte> message) {
  detail::MessageReader reader(message.subspan(std::min(detail::kMessageHead, message.size())));
  std::uint64_t id = 0;
  if (!reader.number(id) || !reader.complete()) return detail::malformed("Cancel", message.size());
  return id;
}

inline void write_message(const TokenMessage& token, Message& out) {
  detail::MessageWriter writer = detail::begin_message(out, MessageKind::kToken);
  writer.number(token.id);
  writer.number(token.token);
}
[[nodiscard]] inline Result<TokenMessage> read_token(std::span<const std::byte> message) {
  detail::MessageReader reader(message.subspan(std::min(detail::kMessageHead, message.size())));
  TokenMessage out;
  if (!reader.number(out.id) || !reader.number(out.token) || !reader.complete()) {
    return detail::malformed("Token", message.size());
  }
  return out;
}

inline void write_message(const EndMessage& end, Message& out) {
  detail::MessageWriter writer = detail::begin_message(out, MessageKind::kEnd);
  writer.number(end.id);
  writer.number(end.kind);
  writer.number(static_cast<std::int32_t>(end.status.code()));
  writer.text(end.status.message());
}
[[nodiscard]] inline Result<EndMessage> read_end(std::span<const std::byte> message) {
  detail::MessageReader reader(message.subspan(std::min(detail::kMessageHead, message.size())));
  EndMessage out;
  std::int32_t kind = 0;
  std::int32_t code = 0;
  std::string text;
  if (!reader.number(out.id) || !reader.number(kind) || !reader.number(code) || !reader.text(text) ||
      !reader.complete() || kind < 0 || kind > 2 || code < 0 ||
      code > static_cast<std::int32_t>(StatusCode::kOutOfMemory) || (kind == 2) == (code == 0)) {
    return detail::malformed("End", message.size());
  }
  out.kind = static_cast<EndMessage::Kind>(kind);
  if (code != 0) out.status = Status(static_cast<StatusCode>(code), std::move(text));
  return out;
}

/// kAlive and kBye have nothing to say but what they are.
inline void write_word(MessageKind kind, Message& out) {
  static_cast<void>(detail::begin_message(out, kind));
}

}  // namespace prefillshare
