// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/handoff.hpp - a base cache on its way to a decode worker, from the blocks reserved for
// it to the cache that may be decoded from, or to nothing.
// Layer: serve (host only). Knows no transport and touches no page: a simulator drives it just as well.
// See: PrefillShare (arXiv 2602.12029) section 3.3, cache hand-off.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/kv/allocator.hpp>
#include <prefillshare/kv/cache_key.hpp>
#include <prefillshare/kv/sequence.hpp>
#include <prefillshare/kv/tenant.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/serve/handoff_pages.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// One base cache that a decode worker is given. The decode side owns it: it reserves the blocks, so it alone
/// knows when they may be written and when they are free again. What lies in its prefix tree already need not
/// be sent; the rest, the blocks that follow, arrives page by page in any order.
///
///   reserve()          kReserved: the blocks are held, nothing is in them
///   begin(), finish()  kFilling: begin() before the first byte of pages is written, finish() after the last
///   (the last finish)  kComplete: the tokens are committed, take() gives the sequence, to fork and decode
///                      from
///   abort()            kAborted: no further page may begin; blocks go back as soon as no write is under way
///
/// There is no way to the sequence but take(), so nothing decodes from an incomplete cache. Which of abort()
/// and the last finish() came first is decided by whichever call was first, once: the other one is told.
///
/// Externally synchronized, as its allocator is. Destroying it aborts it; no write may be under way then.
template <class Allocator = KvAllocator>
class Handoff {
 public:
  /// For the base cache of `tokens`, each block of which arrives in `layers` parts (the model's layers; 1
  /// where a block is sent whole). Complete at once if nothing is missing. As Allocator::open() and
  /// reserve(): kExhausted is back-pressure, nothing is held then.
  [[nodiscard]] static Result<Handoff> reserve(Allocator& allocator, const CacheKey& key,
                                               std::span<const std::int32_t> tokens, std::int64_t layers,
                                               TenantId tenant = kDefaultTenant) {
    Result<Sequence> opened = allocator.open(key, tokens, tenant);
    if (!opened.ok()) return opened.status();
    Handoff out;
    out.allocator_ = &allocator;
    out.sequence_ = *std::move(opened);
    out.cached_tokens_ = out.sequence_.length();
    const auto missing = tokens.subspan(static_cast<std::size_t>(out.cached_tokens_));
    if (Status s = allocator.reserve(out.sequence_, std::ssize(missing)); !s.ok()) return s;
    const std::int64_t block_tokens = out.sequence_.block_tokens();
    Result<HandoffPages> pages =
        HandoffPages::create(layers, (std::ssize(missing) + block_tokens - 1) / block_tokens);
    if (!pages.ok()) return pages.status();
    out.pages_ = *std::move(pages);
    if (!detail::try_allocate([&] { out.missing_.assign(missing.begin(), missing.end()); })) {
      return error(StatusCode::kOutOfMemory, "Handoff: no memory for ", missing.size(), " tokens");
    }
    if (out.pages_.state() == HandoffState::kComplete) out.seal();
    return out;
  }

  /// The other holds nothing.
  Handoff(Handoff&&) noexcept = default;
  Handoff& operator=(Handoff other) noexcept {  ///< what was here goes with `other`
    std::swap(allocator_, other.allocator_);
    std::swap(sequence_, other.sequence_);
    std::swap(pages_, other.pages_);
    missing_.swap(other.missing_);
    std::swap(cached_tokens_, other.cached_tokens_);
    std::swap(reason_, other.reason_);
    return *this;
  }
  ~Handoff() { CODEGEMM_ASSERT(pages_.writing() == 0); }

  [[nodiscard]] HandoffState state() const noexcept { return pages_.state(); }  ///< where it stands
  [[nodiscard]] const HandoffPages& pages() const noexcept { return pages_; }   ///< which pages have come
  /// Why it was aborted; ok() otherwise.
  [[nodiscard]] const Status& reason() const noexcept { return reason_; }

  /// Tokens found here when it was reserved, whole blocks: the sender starts behind them.
  [[nodiscard]] std::int64_t cached_tokens() const noexcept { return cached_tokens_; }
  /// Tokens to be sent.
  [[nodiscard]] std::int64_t missing_tokens() const noexcept { return std::ssize(missing_); }

  /// Where pages of the missing blocks go, in the order of the tokens: block i of the hand-off holds the
  /// tokens from cached_tokens() + i * block_tokens on. Empty when nothing may be written any more.
  [[nodiscard]] std::span<const BlockId> blocks() const noexcept {
    if (!holds_blocks() || state() == HandoffState::kComplete) return {};
    return sequence_.blocks().subspan(static_cast<std::size_t>(cached_tokens_ / sequence_.block_tokens()));
  }
  /// How many tokens block i holds: all it has room for, fewer in the last.
  [[nodiscard]] std::int64_t tokens_in(std::int64_t block) const noexcept {
    const std::int64_t block_tokens = sequence_.block_tokens();
    return std::min(block_tokens, missing_tokens() - block * block_tokens);
  }

  /// A layer's pages of `count` blocks from `first` will be written from now on. kCancelled after an abort,
  /// with the reason; kInvalidArgument for pages that are not there, have arrived or are being written.
  [[nodiscard]] Status begin(std::int64_t layer, std::int64_t first, std::int64_t count) {
    Status status = pages_.begin(layer, first, count);
    return status.code() == StatusCode::kCancelled ? refused(status) : status;
  }
  /// They are written. Says what state that leaves; kCancelled when it was aborted meanwhile (the blocks go
  /// back with the last such write), kInvalidArgument for pages that were not begun.
  [[nodiscard]] Result<HandoffState> finish(std::int64_t layer, std::int64_t first, std::int64_t count) {
    if (Status s = pages_.finish(layer, first, count); !s.ok()) return settle(std::move(s));
    if (state() == HandoffState::kComplete) seal();
    return state();
  }
  /// They could not be written: they are missing as before, and may be begun again.
  [[nodiscard]] Status fail(std::int64_t layer, std::int64_t first, std::int64_t count) {
    return settle(pages_.fail(layer, first, count));
  }
  /// begin() and finish() in one, for whoever writes nothing (a simulator) or has written already.
  [[nodiscard]] Result<HandoffState> arrive(std::int64_t layer, std::int64_t first, std::int64_t count) {
    if (Status s = begin(layer, first, count); !s.ok()) return s;
    return finish(layer, first, count);
  }

  /// Whether this call has aborted it; false if it was complete, or aborted before. `reason` is not ok().
  bool abort(Status reason) {
    CODEGEMM_ASSERT(!reason.ok());
    if (!pages_.abort()) return false;
    reason_ = std::move(reason);
    release_if_idle();
    return true;
  }

  /// Whether it keeps any block from the pool: false after take(), and after an abort when no write is under
  /// way.
  [[nodiscard]] bool holds_blocks() const noexcept { return sequence_.is_open(); }

  /// The complete base cache, once. kExhausted while pages are missing; kCancelled after an abort;
  /// kInvalidArgument the second time.
  [[nodiscard]] Result<Sequence> take() {
    if (state() == HandoffState::kAborted) return refused(error(StatusCode::kCancelled, "hand-off aborted"));
    if (state() != HandoffState::kComplete) {
      return error(StatusCode::kExhausted, "hand-off ", to_string(state()), ": ", pages_.arrived(), " of ",
                   pages_.pages(), " pages have arrived");
    }
    if (!sequence_.is_open()) return error(StatusCode::kInvalidArgument, "hand-off taken already");
    return std::move(sequence_);
  }

 private:
  Handoff() = default;

  void seal() {
    const Status status = allocator_->commit(sequence_, missing_);  // as many as are reserved: cannot fail
    CODEGEMM_ASSERT(status.ok());
    static_cast<void>(status.ok());
  }
  [[nodiscard]] Status settle(Status status) {
    release_if_idle();
    return status.code() == StatusCode::kCancelled ? refused(status) : status;
  }
  /// A page that is being written may not be given to anybody else, so the blocks wait for the last of them.
  void release_if_idle() {
    if (state() == HandoffState::kAborted && pages_.writing() == 0) sequence_.reset();
  }
  [[nodiscard]] Status refused(const Status& status) const {
    return error(StatusCode::kCancelled, status.message(), ": ", reason_.message());
  }

  Allocator* allocator_ = nullptr;
  Sequence sequence_;                  // open until taken or given back
  HandoffPages pages_;                 // [layers][blocks that are missing]
  std::vector<std::int32_t> missing_;  // the tokens to be sent
  std::int64_t cached_tokens_ = 0;
  Status reason_;
};

}  // namespace prefillshare
