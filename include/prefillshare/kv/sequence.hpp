// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/sequence.hpp - one context's blocks, held until the handle goes away.
// Layer: kv (host only).
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/prefix_tree.hpp>

namespace prefillshare {

namespace detail {

/// What an allocator keeps of a sequence. blocks.size() is always ceil((length + reserved) / block_tokens).
struct SequenceState {
  std::vector<BlockId> blocks;     // in the order of positions, none twice
  std::vector<std::int32_t> tail;  // base only: the tokens of the partly filled last block
  TreeNode root;                   // base only: the producer
  std::int64_t length = 0;         // tokens whose KV is there
  std::int64_t reserved = 0;       // tokens that may be added with no further block
  std::int64_t base_length = 0;    // fork only: the tokens at the start that the prefill module made
  std::vector<BlockId> arriving;   // base only: blocks that a load fills, to follow length()
  std::vector<std::int32_t> arriving_tokens;
  std::int32_t index = 0;   // this state's place with its owner
  std::int32_t tenant = 0;  // who opened it; a fork has its parent's
  int block_tokens = 1;
  bool is_fork = false;
  bool is_open = false;
};

class SequenceOwner {
 public:
  /// Gives every block back.
  virtual void close(SequenceState& state) noexcept = 0;

 protected:
  SequenceOwner() = default;
  SequenceOwner(const SequenceOwner&) = default;
  SequenceOwner& operator=(const SequenceOwner&) = default;
  ~SequenceOwner() = default;
};

struct SequenceAccess;

}  // namespace detail

/// A handle on the KV of one context; destroying it returns every block to the allocator that made it,
/// which must still be there. Move-only; a moved-from or default-made one is empty and belongs to nobody.
///
/// Two kinds. A *base* sequence (KvAllocator::open) is filled by the prefill module and grows by reserve()
/// and commit(), turn after turn. A *fork* (KvAllocator::fork) is a decode module's private view of it: it
/// starts as the same tokens in the same blocks and grows by append_private(), in blocks of its own. Either
/// may go first.
class Sequence {
 public:
  Sequence() = default;
  /// The other is no longer open.
  Sequence(Sequence&& other) noexcept
      : owner_(std::exchange(other.owner_, nullptr)), state_(std::exchange(other.state_, nullptr)) {}
  /// Closes what this one was; the other is no longer open.
  Sequence& operator=(Sequence&& other) noexcept {
    if (this != &other) {
      reset();
      owner_ = std::exchange(other.owner_, nullptr);
      state_ = std::exchange(other.state_, nullptr);
    }
    return *this;
  }
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  ~Sequence() { reset(); }

  /// Closes it now.
  void reset() noexcept {
    if (state_ != nullptr) owner_->close(*state_);
    owner_ = nullptr;
    state_ = nullptr;
  }

  [[nodiscard]] bool is_open() const noexcept { return state_ != nullptr; }  ///< holds blocks of an allocator
  /// A decode-private view; its own tokens never enter the prefix tree.
  [[nodiscard]] bool is_fork() const noexcept { return state_ != nullptr && state_->is_fork; }

  /// Position p lies in slot p % block_tokens of blocks()[p / block_tokens]. Covers what is reserved too.
  /// Any call on this sequence may change it: read it anew after reserve, commit, append and truncate.
  [[nodiscard]] std::span<const BlockId> blocks() const noexcept {
    return state_ != nullptr ? std::span<const BlockId>(state_->blocks) : std::span<const BlockId>();
  }
  /// Tokens whose KV is there (base: found or committed; fork: shared or appended).
  [[nodiscard]] std::int64_t length() const noexcept { return state_ != nullptr ? state_->length : 0; }
  /// Tokens that can follow with no further block.
  [[nodiscard]] std::int64_t reserved() const noexcept { return state_ != nullptr ? state_->reserved : 0; }
  /// The tokens at the start whose KV the prefill module made: all of a base sequence; of a fork, as many
  /// as the base had when it was forked.
  [[nodiscard]] std::int64_t base_length() const noexcept {
    if (state_ == nullptr) return 0;
    return state_->is_fork ? state_->base_length : state_->length;
  }
  /// Tokens that a load brings from a lower tier; they count in length() only after finish_load().
  [[nodiscard]] std::int64_t loading() const noexcept {
    return state_ != nullptr ? std::ssize(state_->arriving_tokens) : 0;
  }
  /// The TenantId that opened it.
  [[nodiscard]] std::int32_t tenant() const noexcept { return state_ != nullptr ? state_->tenant : 0; }
  /// At least 1.
  [[nodiscard]] int block_tokens() const noexcept { return state_ != nullptr ? state_->block_tokens : 1; }

 private:
  friend struct detail::SequenceAccess;

  Sequence(detail::SequenceOwner& owner, detail::SequenceState& state) : owner_(&owner), state_(&state) {}

  detail::SequenceOwner* owner_ = nullptr;
  detail::SequenceState* state_ = nullptr;
};

namespace detail {

/// The way in for allocators and the page table.
struct SequenceAccess {
  [[nodiscard]] static Sequence make(SequenceOwner& owner, SequenceState& state) { return {owner, state}; }
  [[nodiscard]] static SequenceState* state(const Sequence& sequence) noexcept { return sequence.state_; }
  [[nodiscard]] static const SequenceOwner* owner(const Sequence& sequence) noexcept {
    return sequence.owner_;
  }
};

}  // namespace detail

}  // namespace prefillshare
