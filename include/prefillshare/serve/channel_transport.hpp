// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/channel_transport.hpp - pages as messages: to a decode worker in another process or on
// another host.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include <prefillshare/serve/protocol.hpp>
#include <prefillshare/serve/transport.hpp>

namespace prefillshare {

/// To the decode process `peer` of a channel. The pages are copied into messages of no more than about a
/// megabyte, which leave while the next layer is computed.
template <MessageChannel Channel>
class ChannelTransport {
 public:
  /// To process `peer` of the channel, which outlives this.
  ChannelTransport(Channel& channel, int peer) : channel_(&channel), peer_(peer) {}

  /// As PageTransport says: the pages are copied into one message.
  [[nodiscard]] Status send(const HostKvStorage& from, const PageRun& run) {
    if (Status s = detail::check_run(from, run); !s.ok()) return s;
    const KvShape& shape = from.shape();
    const std::size_t block_bytes = 2 * detail::half_page_bytes(shape, shape.block_tokens);
    if (block_bytes > kMostMessageBytes / 2) {
      return error(StatusCode::kUnsupported, "pages of ", block_bytes, " bytes a layer do not fit a message");
    }
    const std::size_t blocks = std::max<std::size_t>(1, (std::size_t{1} << 20) / block_bytes);
    for (std::size_t i = 0; i < run.blocks.size(); i += blocks) {
      PageRun part = run;
      part.first = run.first + static_cast<std::int64_t>(i);
      part.blocks = run.blocks.subspan(i, std::min(blocks, run.blocks.size() - i));
      if (i + blocks < run.blocks.size()) part.last_tokens = shape.block_tokens;
      if (Status s = send_part(from, part); !s.ok()) return s;
    }
    return {};
  }

 private:
  [[nodiscard]] Status send_part(const HostKvStorage& from, const PageRun& run) {
    const KvShape& shape = from.shape();
    Message message;
    write_message(PagesHeader{run.handoff, run.layer, run.first, std::ssize(run.blocks), run.last_tokens},
                  message);
    std::size_t at = message.size();
    const auto tokens = (std::ssize(run.blocks) - 1) * std::int64_t{shape.block_tokens} + run.last_tokens;
    message.resize(at + 2 * detail::half_page_bytes(shape, tokens));
    for (std::size_t i = 0; i < run.blocks.size(); ++i) {
      const std::size_t bytes = detail::half_page_bytes(shape, run.tokens_in(i, shape.block_tokens));
      std::memcpy(message.data() + at, from.k(run.layer, run.blocks[i], 0), bytes);
      std::memcpy(message.data() + at + bytes, from.v(run.layer, run.blocks[i], 0), bytes);
      at += 2 * bytes;
    }
    return channel_->send(peer_, std::move(message));
  }

  Channel* channel_;
  int peer_;
};

/// Writes what came in a Pages message into the blocks that the hand-off reserved, and says what state that
/// leaves. kIncompatible, kCorruptData, and as HandoffTable::begin() and finish(): nothing is then written.
template <class Table>
[[nodiscard]] Result<HandoffState> receive_pages(const PagesMessage& message, Table& table,
                                                 HostKvStorage& to) {
  const PagesHeader& h = message.header;
  const KvShape& shape = to.shape();
  const auto tokens = (h.count - 1) * shape.block_tokens + h.last_tokens;
  if (message.pages.size() != 2 * detail::half_page_bytes(shape, tokens)) {
    return error(StatusCode::kCorruptData, "hand-off ", h.handoff, ": ", message.pages.size(), " bytes for ",
                 tokens, " tokens of a layer");
  }
  const Result<std::vector<BlockId>> blocks =
      table.begin(h.handoff, h.layer, h.first, h.count, h.last_tokens);
  if (!blocks.ok()) return blocks.status();
  const std::byte* at = message.pages.data();
  for (std::size_t i = 0; i < blocks->size(); ++i) {
    const bool last = i + 1 == blocks->size();
    const std::size_t bytes = detail::half_page_bytes(shape, last ? h.last_tokens : shape.block_tokens);
    std::memcpy(to.k(h.layer, (*blocks)[i], 0), at, bytes);
    std::memcpy(to.v(h.layer, (*blocks)[i], 0), at + bytes, bytes);
    at += 2 * bytes;
  }
  return table.finish(h.handoff, h.layer, h.first, h.count);
}

}  // namespace prefillshare
