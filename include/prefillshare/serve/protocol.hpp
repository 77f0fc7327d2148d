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

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/model/config.hpp>
#include <prefillshare/serve/handoff_table.hpp>
#include <prefillshare/serve/wire.hpp>

namespace prefillshare {

/// The first number of every message.
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
  ModelConfig config;             ///< of the base model
  CacheKey key;                   ///< of its cache
  std::int32_t block_tokens = 0;  ///< tokens of a block
};

/// A request for an answer.
struct AskMessage {
  std::uint64_t id = 0;                   ///< the asker's, one of its kind among those it has under way
  std::int32_t module = 0;                ///< of the receiver
  std::int64_t max_tokens = 0;            ///< of the answer
  std::int64_t time_limit = 0;            ///< from arrival, by the receiver's clock; 0: none
  std::vector<std::int32_t> stop_tokens;  ///< end the answer
  std::vector<std::int32_t> context;      ///< at least one token; the base cache covers all but the last
};

/// The receiver has room: send the pages that are missing.
struct GrantMessage {
  std::uint64_t id = 0;             ///< of the Ask
  HandoffId handoff = 0;            ///< to be sent along with the pages
  std::int64_t cached_tokens = 0;   ///< there already
  std::int64_t missing_blocks = 0;  ///< to be sent
};

/// The numbers before the pages themselves: for each block K [tokens][kv_heads][head_dim], then V, fp32.
struct PagesHeader {
  HandoffId handoff = 0;         ///< of the Grant
  std::int32_t layer = 0;        ///< of the model
  std::int64_t first = 0;        ///< block of the hand-off that the first one is sent for
  std::int64_t count = 0;        ///< blocks
  std::int64_t last_tokens = 0;  ///< tokens in the last of them
};

/// One token of an answer.
struct TokenMessage {
  std::uint64_t id = 0;    ///< of the Ask
  std::int32_t token = 0;  ///< the answer's next
};

/// How an Ask ended; once for each.
struct EndMessage {
  /// How it ended.
  enum class Kind : std::int32_t { kStopped = 0, kLength = 1, kFailed = 2 };
  std::uint64_t id = 0;       ///< of the Ask
  Kind kind = Kind::kFailed;  ///< how it ended
  Status status;              ///< not ok() exactly if kFailed
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

template <class M, class Wanted>
concept MessageOf = std::same_as<std::remove_const_t<M>, Wanted>;

/// Each field in turn, the same for writing and for reading: visit(field) -> bool.
template <class Config, class Visit>
[[nodiscard]] bool visit_config(Config& c, Visit&& visit) {
  return visit(c.vocab_size) && visit(c.hidden_size) && visit(c.intermediate_size) && visit(c.layers) &&
         visit(c.heads) && visit(c.kv_heads) && visit(c.head_dim) && visit(c.context_length) &&
         visit(c.rms_epsilon) && visit(c.rope.head_dim) && visit(c.rope.theta) && visit(c.rope.factor) &&
         visit(c.rope.low_freq_factor) && visit(c.rope.high_freq_factor) &&
         visit(c.rope.original_max_position_embeddings);
}

/// The fields of each plain message in their order, the same for writing and for reading.
template <class Visit>
[[nodiscard]] bool visit_fields(MessageOf<AskMessage> auto& m, Visit&& visit) {
  return visit(m.id) && visit(m.module) && visit(m.max_tokens) && visit(m.time_limit) &&
         visit(m.stop_tokens) && visit(m.context);
}
template <class Visit>
[[nodiscard]] bool visit_fields(MessageOf<GrantMessage> auto& m, Visit&& visit) {
  return visit(m.id) && visit(m.handoff) && visit(m.cached_tokens) && visit(m.missing_blocks);
}
template <class Visit>
[[nodiscard]] bool visit_fields(MessageOf<PagesHeader> auto& m, Visit&& visit) {
  return visit(m.handoff) && visit(m.layer) && visit(m.first) && visit(m.count) && visit(m.last_tokens);
}
template <class Visit>
[[nodiscard]] bool visit_fields(MessageOf<TokenMessage> auto& m, Visit&& visit) {
  return visit(m.id) && visit(m.token);
}

template <class M>
void write_fields(MessageKind kind, const M& message, Message& out) {
  MessageWriter writer = begin_message(out, kind);
  static_cast<void>(visit_fields(message, [&](const auto& field) {
    if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(field)>>) {
      writer.number(field);
    } else {
      writer.tokens(field);
    }
    return true;
  }));
}
template <class M>
[[nodiscard]] bool read_fields(MessageReader& reader, M& message) {
  return visit_fields(message, [&](auto& field) {
    if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(field)>>) {
      return reader.number(field);
    } else {
      return reader.tokens(field);
    }
  });
}
[[nodiscard]] inline MessageReader body_of(std::span<const std::byte> message) {
  return MessageReader(message.subspan(std::min(kMessageHead, message.size())));
}

}  // namespace detail

/// Writes a whole message; what was in `out` is lost.
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
/// kCorruptData, with what is wrong, for anything but a whole and valid message of this kind.
[[nodiscard]] inline Result<HelloMessage> read_hello(std::span<const std::byte> message) {
  detail::MessageReader reader = detail::body_of(message);
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

/// Writes a whole message; what was in `out` is lost.
inline void write_message(const AskMessage& ask, Message& out) {
  detail::write_fields(MessageKind::kAsk, ask, out);
}
/// kCorruptData, as read_hello().
[[nodiscard]] inline Result<AskMessage> read_ask(std::span<const std::byte> message) {
  detail::MessageReader reader = detail::body_of(message);
  AskMessage out;
  if (!detail::read_fields(reader, out) || !reader.complete() || out.context.empty() || out.time_limit < 0) {
    return detail::malformed("Ask", message.size());
  }
  return out;
}

/// Writes a whole message; what was in `out` is lost.
inline void write_message(const GrantMessage& grant, Message& out) {
  detail::write_fields(MessageKind::kGrant, grant, out);
}
/// kCorruptData, as read_hello().
[[nodiscard]] inline Result<GrantMessage> read_grant(std::span<const std::byte> message) {
  detail::MessageReader reader = detail::body_of(message);
  GrantMessage out;
  if (!detail::read_fields(reader, out) || !reader.complete() || out.cached_tokens < 0 ||
      out.missing_blocks < 0) {
    return detail::malformed("Grant", message.size());
  }
  return out;
}

/// Begins a Pages message, to which the pages are appended.
inline void write_message(const PagesHeader& pages, Message& out) {
  detail::write_fields(MessageKind::kPages, pages, out);
}
/// A message of pages as it was read.
struct PagesMessage {
  PagesHeader header;                ///< what they are
  std::span<const std::byte> pages;  ///< within the message
};
/// That there are as many bytes as the header says, for pages of `shape`, is checked.
[[nodiscard]] inline Result<PagesMessage> read_pages(std::span<const std::byte> message,
                                                     const KvShape& shape) {
  detail::MessageReader reader = detail::body_of(message);
  PagesMessage out;
  PagesHeader& h = out.header;
  if (!detail::read_fields(reader, h) || h.layer < 0 || h.layer >= shape.layers || h.first < 0 ||
      h.count < 1 || h.last_tokens < 1 || h.last_tokens > shape.block_tokens) {
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

/// Writes a whole message: the Ask of that id is no longer wanted.
inline void write_cancel(std::uint64_t id, Message& out) {
  detail::begin_message(out, MessageKind::kCancel).number(id);
}
/// kCorruptData, as read_hello(); else the Ask's id.
[[nodiscard]] inline Result<std::uint64_t> read_cancel(std::span<const std::byte> message) {
  detail::MessageReader reader = detail::body_of(message);
  std::uint64_t id = 0;
  if (!reader.number(id) || !reader.complete()) return detail::malformed("Cancel", message.size());
  return id;
}

/// Writes a whole message; what was in `out` is lost.
inline void write_message(const TokenMessage& token, Message& out) {
  detail::write_fields(MessageKind::kToken, token, out);
}
/// kCorruptData, as read_hello().
[[nodiscard]] inline Result<TokenMessage> read_token(std::span<const std::byte> message) {
  detail::MessageReader reader = detail::body_of(message);
  TokenMessage out;
  if (!detail::read_fields(reader, out) || !reader.complete()) {
    return detail::malformed("Token", message.size());
  }
  return out;
}

/// Writes a whole message; what was in `out` is lost.
inline void write_message(const EndMessage& end, Message& out) {
  detail::MessageWriter writer = detail::begin_message(out, MessageKind::kEnd);
  writer.number(end.id);
  writer.number(end.kind);
  writer.number(static_cast<std::int32_t>(end.status.code()));
  writer.text(end.status.message());
}
/// kCorruptData, as read_hello().
[[nodiscard]] inline Result<EndMessage> read_end(std::span<const std::byte> message) {
  detail::MessageReader reader = detail::body_of(message);
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
