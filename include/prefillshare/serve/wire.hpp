// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/wire.hpp - messages as bytes, and what carries them from process to process.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// One message. Numbers in it stand in the byte order of the sender, which kHello lets the receiver check.
using Message = std::vector<std::byte>;

/// No message is longer: what claims to be is refused before any memory is taken.
inline constexpr std::size_t kMostMessageBytes = std::size_t{16} << 20;

/// Carries whole messages between the processes of a group, each known by its number: in order from one to
/// another, and never waiting. Used by one thread.
template <class C>
concept MessageChannel = requires(C& channel, const C& constant, int peer, Message message) {
  // Takes the message. An error means that it will not arrive (or, of MPI, that nobody knows).
  { channel.send(peer, std::move(message)) } -> std::same_as<Status>;
  // The next message and from whom, if there is one; sends make progress too.
  { channel.receive(message) } -> std::same_as<Result<std::optional<int>>>;
  // Sent, but not yet out of this process.
  { constant.queued_bytes(peer) } -> std::same_as<std::int64_t>;
  // From now on what comes from this peer is dropped, and what is sent to it too: it is dead to this process.
  { channel.give_up(peer) } -> std::same_as<void>;
};

namespace detail {

/// Appends to a message.
class MessageWriter {
 public:
  explicit MessageWriter(Message& out) : out_(&out) {}

  template <class T>
  void number(T value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    bytes(std::as_bytes(std::span(&value, 1)));
  }
  void bytes(std::span<const std::byte> from) {
    if (from.empty()) return;
    const std::size_t at = out_->size();
    out_->resize(at + from.size());  // gcc 12 warns of an insert() in which it loses count
    std::memcpy(out_->data() + at, from.data(), from.size());
  }
  void text(std::string_view value) {
    number(static_cast<std::uint32_t>(value.size()));
    bytes(std::as_bytes(std::span(value)));
  }
  void tokens(std::span<const std::int32_t> values) {
    number(static_cast<std::uint32_t>(values.size()));
    bytes(std::as_bytes(values));
  }

 private:
  Message* out_;
};

/// Reads a message that anybody may have written: every read says whether there was enough, and after one
/// that was not, none is. Allocates no more than the message is long.
class MessageReader {
 public:
  explicit MessageReader(std::span<const std::byte> from) : from_(from) {}

  template <class T>
  [[nodiscard]] bool number(T& value) {
    static_assert(std::is_arithmetic_v<T>);
    std::span<const std::byte> part;
    if (!bytes(sizeof(T), part)) return false;
    std::memcpy(&value, part.data(), sizeof(T));
    return true;
  }
  [[nodiscard]] bool bytes(std::size_t count, std::span<const std::byte>& part) {
    if (count > from_.size()) {
      from_ = {};
      broken_ = true;
    }
    if (broken_) return false;
    part = from_.first(count);
    from_ = from_.subspan(count);
    return true;
  }
  [[nodiscard]] bool text(std::string& value) {
    std::uint32_t size = 0;
    std::span<const std::byte> part;
    if (!number(size) || !bytes(size, part)) return false;
    value.assign(reinterpret_cast<const char*>(part.data()), part.size());
    return true;
  }
  [[nodiscard]] bool tokens(std::vector<std::int32_t>& values) {
    std::uint32_t count = 0;
    std::span<const std::byte> part;
    if (!number(count) || !bytes(std::size_t{count} * sizeof(std::int32_t), part)) return false;
    values.resize(count);
    if (count > 0) std::memcpy(values.data(), part.data(), part.size());
    return true;
  }
  [[nodiscard]] std::span<const std::byte> rest() const noexcept { return from_; }
  /// All was read and none was missing.
  [[nodiscard]] bool complete() const noexcept { return !broken_ && from_.empty(); }

 private:
  std::span<const std::byte> from_;
  bool broken_ = false;
};

}  // namespace detail

}  // namespace prefillshare
