// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/sequence_table.hpp - the memory of an allocator's sequences, open and closed.
// Layer: kv (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/sequence.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare::detail {

/// States do not move, and a closed one is used again with the memory it has, so that opening a session
/// allocates only when more are open than ever before.
class SequenceTable {
 public:
  /// A closed state with its memory; it counts as taken only after start(). Null: no memory.
  [[nodiscard]] SequenceState* idle(int block_tokens) {
    const bool allocated = try_allocate([&] {
      if (!idle_.empty()) return;
      if (states_.size() == states_.capacity()) {
        const std::size_t grown = std::max<std::size_t>(16, 2 * states_.size());
        idle_.reserve(grown);  // room for all, so that closing never allocates
        states_.reserve(grown);
      }
      auto state = std::make_unique<SequenceState>();
      state->index = static_cast<std::int32_t>(states_.size());
      state->block_tokens = block_tokens;
      state->tail.reserve(static_cast<std::size_t>(block_tokens));
      states_.push_back(std::move(state));
      idle_.push_back(states_.back()->index);
    });
    return allocated ? states_[static_cast<std::size_t>(idle_.back())].get() : nullptr;
  }
  void start(SequenceState& state, bool is_fork, std::int32_t tenant) {
    CODEGEMM_ASSERT(!state.is_open && idle_.back() == state.index);
    idle_.pop_back();
    state.is_open = true;
    state.is_fork = is_fork;
    state.tenant = tenant;
  }
  /// Its blocks were given back.
  void stop(SequenceState& state) noexcept {
    CODEGEMM_ASSERT(state.is_open && state.blocks.empty() && state.arriving.empty());
    state.tail.clear();
    state.root = TreeNode();
    state.base_length = 0;
    state.is_open = false;
    idle_.push_back(state.index);
  }
  [[nodiscard]] std::int64_t open() const noexcept { return std::ssize(states_) - std::ssize(idle_); }
  [[nodiscard]] const std::vector<std::unique_ptr<SequenceState>>& states() const noexcept { return states_; }

 private:
  std::vector<std::unique_ptr<SequenceState>> states_;  // open and idle
  std::vector<std::int32_t> idle_;
};

}  // namespace prefillshare::detail
