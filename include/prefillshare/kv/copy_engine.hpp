// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/copy_engine.hpp - who carries blocks between the device and the tiers below it.
// Layer: kv (host only).
// See: host_copy_engine.hpp for host memory and a file.
#pragma once

#include <cstdint>

#include <codegemm/base/status.hpp>

namespace prefillshare {

/// Where the KV of a block lies: tier 0 is the allocator's storage, slot = BlockId; tiers from 1 on are the
/// engine's, each slower and larger than the one before it.
struct BlockPlace {
  int tier = 0;           ///< 0: the device
  std::int32_t slot = 0;  ///< in the tier

  /// The same place.
  friend bool operator==(const BlockPlace&, const BlockPlace&) = default;
};

/// A copy that has ended.
struct CopyResult {
  std::uint64_t ticket = 0;  ///< as start() was given
  codegemm::Status status;   ///< of the copy
};

/// Copies whole blocks, without waiting. The allocator promises: from start() until poll() has returned the
/// ticket neither place is given to anybody else, and what lies at `from` does not change. So an engine may
/// read and write the places from any thread, stream or device in the meantime, and it may take the copies in
/// any order. start() and poll() are called by one thread at a time. Nothing is started twice.
class CopyEngine {
 public:
  CopyEngine() = default;
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;
  virtual ~CopyEngine() = default;

  /// Tiers below the device.
  [[nodiscard]] virtual int tiers() const noexcept = 0;
  /// Blocks that tier 1 .. tiers() holds.
  [[nodiscard]] virtual std::int64_t slots(int tier) const noexcept = 0;
  /// Copies that can be under way at once. At least 1.
  [[nodiscard]] virtual std::int64_t queue_size() const noexcept = 0;
  /// Begins a copy between two different tiers. A failure means that nothing was begun.
  [[nodiscard]] virtual codegemm::Status start(BlockPlace from, BlockPlace to, std::uint64_t ticket) = 0;
  /// The next copy that has ended; false if there is none now.
  [[nodiscard]] virtual bool poll(CopyResult& result) = 0;
};

}  // namespace prefillshare
