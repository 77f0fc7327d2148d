// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/serve/peers.hpp - which of the other processes are alive, by what was heard of them.
// Layer: serve (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>

#include <prefillshare/kv/eviction.hpp>

namespace prefillshare {

/// How the processes of a group watch each other, in the unit of the clock that step() is given. A process
/// says nothing within a step, so `silence` must be well over the longest step of any of them.
struct WatchOptions {
  KvTime heartbeat = 100;  ///< at least so often each says something
  KvTime silence = 2000;   ///< who says nothing for so long is dead, now and for good
};

/// A process that was killed says nothing, and neither MPI nor a network tells the others; one that is only
/// slow looks the same. So a peer that is silent for too long is declared dead, and is then treated as dead
/// even if it speaks again: whatever was given to it has been given to somebody else by then.
class PeerWatch {
 public:
  /// Nobody is watched yet.
  explicit PeerWatch(const WatchOptions& options) : options_(options) {}

  /// From now on `peer` must be heard of.
  void add(int peer, KvTime now) { peers_.emplace(peer, Peer{now, now - options_.heartbeat, true}); }
  /// Something came from `peer`: it is alive, unless it was declared dead.
  void heard(int peer, KvTime now) {
    const auto at = peers_.find(peer);
    if (at != peers_.end()) at->second.heard = now;
  }
  /// Said something to it, so that no heartbeat is due.
  void said(int peer, KvTime now) {
    const auto at = peers_.find(peer);
    if (at != peers_.end()) at->second.said = now;
  }
  /// It is dead for good, whatever else comes from it.
  void declare_dead(int peer) {
    const auto at = peers_.find(peer);
    if (at != peers_.end()) at->second.alive = false;
  }
  [[nodiscard]] bool knows(int peer) const { return peers_.contains(peer); }  ///< was added
  /// Was added and not declared dead.
  [[nodiscard]] bool alive(int peer) const {
    const auto at = peers_.find(peer);
    return at != peers_.end() && at->second.alive;
  }

  /// How many are alive.
  [[nodiscard]] std::int64_t living() const {
    return std::count_if(peers_.begin(), peers_.end(), [](const auto& one) { return one.second.alive; });
  }

  /// visit(peer), which may declare it dead.
  template <class Visit>
  void for_each_living(Visit&& visit) {
    for (auto& [peer, state] : peers_) {
      if (state.alive) visit(peer);
    }
  }
  /// visit(peer, how long it has been silent) for each living one that has been for too long.
  template <class Visit>
  void for_each_silent(KvTime now, Visit&& visit) {
    for (auto& [peer, state] : peers_) {
      if (state.alive && now - state.heard >= options_.silence) visit(peer, now - state.heard);
    }
  }
  /// visit(peer) for each living one that should hear something.
  template <class Visit>
  void for_each_due(KvTime now, Visit&& visit) {
    for (auto& [peer, state] : peers_) {
      if (state.alive && now - state.said >= options_.heartbeat) visit(peer);
    }
  }

 private:
  struct Peer {
    KvTime heard;
    KvTime said;
    bool alive;
  };
  WatchOptions options_;
  std::map<int, Peer> peers_;
};

}  // namespace prefillshare
