// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/transport.hpp - moves a base cache's pages to the decode worker that is to read them.
// Layer: serve (host only).
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <prefillshare/kv/storage.hpp>
#include <prefillshare/serve/handoff_table.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// One layer's pages of some blocks, on their way to a hand-off.
struct PageRun {
  HandoffId handoff = 0;            ///< as granted by the receiver
  int layer = 0;                    ///< of the model
  std::int64_t first = 0;           ///< block of the hand-off that blocks[0] is sent for
  std::span<const BlockId> blocks;  ///< in the sender's storage
  std::int64_t last_tokens = 0;     ///< tokens in the last of them; the others are full

  /// Tokens in blocks[i].
  [[nodiscard]] std::int64_t tokens_in(std::size_t i, int block_tokens) const noexcept {
    return i + 1 == blocks.size() ? last_tokens : block_tokens;
  }
};

/// Takes pages layer by layer, as a prefill worker announces them, so that what is on the way and what is
/// being computed overlap. send() returns when the pages may be written again (moved, or copied into a
/// message); that they have arrived, the hand-off's own state says. An error means that the hand-off cannot
/// be completed.
///
/// Between workers that share a pool no page has to move, and no transport is needed: DecodeWorker::start()
/// takes the sequence itself.
template <class T>
concept PageTransport = requires(T& transport, const HostKvStorage& from, const PageRun& run) {
  { transport.send(from, run) } -> std::same_as<Status>;
};

namespace detail {

/// Whether a run can be sent from a storage at all.
[[nodiscard]] inline Status check_run(const HostKvStorage& from, const PageRun& run) {
  const KvShape& shape = from.shape();
  const bool fits = run.layer >= 0 && run.layer < shape.layers && run.first >= 0 && !run.blocks.empty() &&
                    run.last_tokens >= 1 && run.last_tokens <= shape.block_tokens;
  bool there = fits;
  for (const BlockId block : run.blocks) there = there && block >= 0 && block < from.blocks();
  if (there) return {};
  return error(StatusCode::kInvalidArgument, "hand-off ", run.handoff, ": ", run.blocks.size(),
               " blocks from ", run.first, " of layer ", run.layer, ", ", run.last_tokens,
               " tokens in the last, of a storage of ", from.blocks(), " blocks in ", shape.layers,
               " layers");
}

/// Bytes of K, or of V, of `tokens` tokens in one layer.
[[nodiscard]] inline std::size_t half_page_bytes(const KvShape& shape, std::int64_t tokens) {
  return static_cast<std::size_t>(tokens * shape.kv_heads * shape.head_dim) * sizeof(float);
}

}  // namespace detail

/// To a decode worker in this process that has a pool of its own: a copy, straight into the reserved blocks.
template <class Table>
class LocalTransport {
 public:
  /// Both are the decode worker's, and outlive this.
  LocalTransport(Table& table, HostKvStorage& to) : table_(&table), to_(&to) {}

  /// kIncompatible where the pages are of another shape; else as HandoffTable::begin() and finish().
  [[nodiscard]] Status send(const HostKvStorage& from, const PageRun& run) {
    if (from.shape() != to_->shape()) {
      return error(StatusCode::kIncompatible, "hand-off ", run.handoff, " between pages of unlike shapes");
    }
    if (Status s = detail::check_run(from, run); !s.ok()) return s;
    const Result<std::vector<BlockId>> blocks =
        table_->begin(run.handoff, run.layer, run.first, std::ssize(run.blocks), run.last_tokens);
    if (!blocks.ok()) return blocks.status();
    for (std::size_t i = 0; i < blocks->size(); ++i) {
      const std::size_t bytes =
          detail::half_page_bytes(from.shape(), run.tokens_in(i, from.shape().block_tokens));
      std::memcpy(to_->k(run.layer, (*blocks)[i], 0), from.k(run.layer, run.blocks[i], 0), bytes);
      std::memcpy(to_->v(run.layer, (*blocks)[i], 0), from.v(run.layer, run.blocks[i], 0), bytes);
    }
    return table_->finish(run.handoff, run.layer, run.first, std::ssize(run.blocks)).status();
  }

 private:
  Table* table_;
  HostKvStorage* to_;
};
static_assert(PageTransport<LocalTransport<HandoffTable<>>>);

}  // namespace prefillshare
