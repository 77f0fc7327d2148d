// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/handoff_pages.hpp - which pages of a hand-off have arrived, and whether it is over.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <prefillshare/kv/try_allocate.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// Where a hand-off stands.
enum class HandoffState : int {
  kReserved,  ///< room for every page, and none has begun
  kFilling,   ///< some pages are being written or have arrived
  kComplete,  ///< every layer of every block is there. Final.
  kAborted,   ///< will never be complete. Final.
};

/// As it is printed.
[[nodiscard]] constexpr std::string_view to_string(HandoffState state) noexcept {
  switch (state) {
    case HandoffState::kReserved: return "reserved";
    case HandoffState::kFilling: return "filling";
    case HandoffState::kComplete: return "complete";
    case HandoffState::kAborted: return "aborted";
  }
  return "unknown";
}

/// The state machine of a hand-off, and one byte for each page (a layer of a block). Two steps a page,
/// because a write takes time: what is being written when the hand-off is aborted must end before its block
/// is used again. Externally synchronized. All memory is taken by create().
class HandoffPages {
 public:
  HandoffPages() = default;  // no page: complete
  /// The other has no page: complete.
  HandoffPages(HandoffPages&& other) noexcept { swap(other); }
  /// The other has no page: complete.
  HandoffPages& operator=(HandoffPages&& other) noexcept {
    HandoffPages(std::move(other)).swap(*this);
    return *this;
  }
  HandoffPages(const HandoffPages&) = delete;
  HandoffPages& operator=(const HandoffPages&) = delete;
  ~HandoffPages() = default;

  /// kInvalidArgument for no layer, or more pages than 2^40; kOutOfMemory. No block: complete at once.
  [[nodiscard]] static Result<HandoffPages> create(std::int64_t layers, std::int64_t blocks) {
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    if (layers < 1 || blocks < 0 || layers > kMost || blocks > kMost / layers) {
      return error(StatusCode::kInvalidArgument, "hand-off of ", blocks, " blocks in ", layers, " layers");
    }
    HandoffPages out;
    out.layers_ = layers;
    out.blocks_ = blocks;
    if (!detail::try_allocate(
            [&] { out.page_.assign(static_cast<std::size_t>(layers * blocks), Page::kMissing); })) {
      return error(StatusCode::kOutOfMemory, "hand-off: no memory for ", layers * blocks, " pages");
    }
    out.state_ = blocks == 0 ? HandoffState::kComplete : HandoffState::kReserved;
    return out;
  }

  [[nodiscard]] HandoffState state() const noexcept { return state_; }    ///< of all pages together
  [[nodiscard]] std::int64_t layers() const noexcept { return layers_; }  ///< of the model
  [[nodiscard]] std::int64_t blocks() const noexcept { return blocks_; }  ///< of the sequence
  /// One for each layer and block.
  [[nodiscard]] std::int64_t pages() const noexcept { return layers_ * blocks_; }
  [[nodiscard]] std::int64_t arrived() const noexcept { return arrived_; }  ///< pages written
  /// Pages begun and not yet written.
  [[nodiscard]] std::int64_t writing() const noexcept { return writing_; }

  /// kInvalidArgument for pages that are not there, or none.
  [[nodiscard]] Status check(std::int64_t layer, std::int64_t first, std::int64_t count) const {
    if (layer >= 0 && layer < layers_ && first >= 0 && count >= 1 && first < blocks_ &&
        count <= blocks_ - first) {
      return {};
    }
    return error(StatusCode::kInvalidArgument, "hand-off: ", count, " blocks from ", first, " of layer ",
                 layer, "; there are ", blocks_, " blocks of ", layers_, " layers");
  }

  /// All or nothing, one block at least. kCancelled after an abort; kInvalidArgument for pages that are not
  /// there, are being written or have arrived.
  [[nodiscard]] Status begin(std::int64_t layer, std::int64_t first, std::int64_t count) {
    if (Status s = check(layer, first, count); !s.ok()) return s;
    if (state_ == HandoffState::kAborted) return error(StatusCode::kCancelled, "hand-off aborted");
    if (Status s = expect(layer, first, count, Page::kMissing, "begun"); !s.ok()) return s;
    set(layer, first, count, Page::kWriting);
    writing_ += count;
    if (state_ == HandoffState::kReserved) state_ = HandoffState::kFilling;
    return {};
  }

  /// kCancelled after an abort: then the pages are no longer being written, and count for nothing.
  [[nodiscard]] Status finish(std::int64_t layer, std::int64_t first, std::int64_t count) {
    if (Status s = end(layer, first, count, Page::kArrived); !s.ok()) return s;
    if (state_ == HandoffState::kAborted) return error(StatusCode::kCancelled, "hand-off aborted");
    arrived_ += count;
    if (arrived_ == pages()) state_ = HandoffState::kComplete;
    return {};
  }

  /// The write did not succeed; the pages are missing as before.
  [[nodiscard]] Status fail(std::int64_t layer, std::int64_t first, std::int64_t count) {
    if (Status s = end(layer, first, count, Page::kMissing); !s.ok()) return s;
    if (state_ == HandoffState::kAborted) return error(StatusCode::kCancelled, "hand-off aborted");
    return {};
  }

  /// Whether this call decided it. Nothing is decided twice.
  bool abort() noexcept {
    if (state_ == HandoffState::kComplete || state_ == HandoffState::kAborted) return false;
    state_ = HandoffState::kAborted;
    return true;
  }

  /// Counts the pages anew. O(pages).
  [[nodiscard]] Status check_invariants() const {
    const auto writing = std::count(page_.begin(), page_.end(), Page::kWriting);
    const auto arrived = std::count(page_.begin(), page_.end(), Page::kArrived);
    // After an abort a page that ends is marked and no longer counted.
    const bool counts = writing == writing_ && (state_ == HandoffState::kAborted || arrived == arrived_);
    const bool complete = state_ != HandoffState::kComplete || (arrived_ == pages() && writing_ == 0);
    const bool reserved = state_ != HandoffState::kReserved || (arrived == 0 && writing == 0);
    const bool filling = state_ != HandoffState::kFilling || arrived_ < pages();
    if (counts && complete && reserved && filling) return {};
    return error(StatusCode::kCorruptData, "hand-off ", to_string(state_), ": ", arrived_, " arrived and ",
                 writing_, " being written of ", pages(), " pages, counted anew ", arrived, " and ", writing);
  }

 private:
  enum class Page : std::uint8_t { kMissing, kWriting, kArrived };

  void swap(HandoffPages& other) noexcept {
    std::swap(layers_, other.layers_);
    std::swap(blocks_, other.blocks_);
    page_.swap(other.page_);
    std::swap(arrived_, other.arrived_);
    std::swap(writing_, other.writing_);
    std::swap(state_, other.state_);
  }

  [[nodiscard]] Status expect(std::int64_t layer, std::int64_t first, std::int64_t count, Page wanted,
                              const char* what) const {
    for (std::int64_t i = first; i < first + count; ++i) {
      if (at(layer, i) == wanted) continue;
      return error(StatusCode::kInvalidArgument, "hand-off: layer ", layer, " of block ", i, " cannot be ",
                   what, ": it ", name(at(layer, i)));
    }
    return {};
  }
  [[nodiscard]] Status end(std::int64_t layer, std::int64_t first, std::int64_t count, Page next) {
    if (Status s = check(layer, first, count); !s.ok()) return s;
    if (Status s = expect(layer, first, count, Page::kWriting, "ended"); !s.ok()) return s;
    set(layer, first, count, next);
    writing_ -= count;
    return {};
  }
  [[nodiscard]] static const char* name(Page page) noexcept {
    switch (page) {
      case Page::kMissing: return "was not begun";
      case Page::kWriting: return "is being written";
      case Page::kArrived: return "has arrived";
    }
    return "";
  }
  [[nodiscard]] Page at(std::int64_t layer, std::int64_t block) const {
    return page_[static_cast<std::size_t>(layer * blocks_ + block)];
  }
  void set(std::int64_t layer, std::int64_t first, std::int64_t count, Page page) {
    std::fill_n(page_.begin() + static_cast<std::ptrdiff_t>(layer * blocks_ + first), count, page);
  }

  std::int64_t layers_ = 1;
  std::int64_t blocks_ = 0;
  std::vector<Page> page_;  // [layers][blocks]
  std::int64_t arrived_ = 0;
  std::int64_t writing_ = 0;
  HandoffState state_ = HandoffState::kComplete;
};

}  // namespace prefillshare
