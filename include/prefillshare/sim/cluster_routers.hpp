// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/cluster_routers.hpp - the routers of a simulated cluster: one for each pool of workers.
// Layer: sim (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <prefillshare/serve/router.hpp>
#include <prefillshare/sim/cluster_config.hpp>
#include <prefillshare/sim/nodes.hpp>

namespace prefillshare::detail {

/// Prefill workers are one pool, or one for each module where caches are kept per module; decode workers are
/// one for each module. Worker i of a side is in pool i % pools, its (i / pools)-th.
template <RoutingPolicy Policy>
class ClusterRouters {
 public:
  using Prefill = Router<Policy, TablePrefillCost>;
  using Decode = Router<LeastLoadedRouting, LinearPrefillCost>;

  /// The config outlives this. Errors: those of Router::create.
  [[nodiscard]] Status set_up(const ClusterConfig& config, const Policy& policy) {
    prefill_pools_ = config.sharing == CacheSharing::kPerModule ? config.modules : 1;
    for (std::int32_t pool = 0; pool < prefill_pools_; ++pool) {
      auto router =
          Prefill::create({pool_size(config.prefill_workers, prefill_pools_, pool), config.block_tokens},
                          policy, TablePrefillCost{&config.cost});
      if (!router.ok()) return router.status();
      prefill_.push_back(*std::move(router));
    }
    for (std::int32_t pool = 0; pool < config.modules; ++pool) {
      auto router = Decode::create({pool_size(config.decode_workers, config.modules, pool), 1});
      if (!router.ok()) return router.status();
      decode_.push_back(*std::move(router));
    }
    return {};
  }

  [[nodiscard]] std::int32_t prefill_pools() const noexcept { return prefill_pools_; }
  [[nodiscard]] Prefill& prefill(const PrefillNode& node) { return at(prefill_, node.pool); }
  [[nodiscard]] Prefill& prefill(const SimCall& one) { return at(prefill_, prefill_pool(one)); }
  [[nodiscard]] Decode& decode(const DecodeNode& node) { return at(decode_, node.pool); }
  [[nodiscard]] Decode& decode(const SimCall& one) { return at(decode_, one.module); }

  /// The number of a worker, among all of its side, that the router of a call's pool has named.
  [[nodiscard]] std::int32_t prefill_worker(const SimCall& one, std::int32_t in_pool) const noexcept {
    return in_pool * prefill_pools_ + prefill_pool(one);
  }
  [[nodiscard]] std::int32_t decode_worker(const SimCall& one, std::int32_t in_pool) const noexcept {
    return in_pool * static_cast<std::int32_t>(decode_.size()) + one.module;
  }

  void end_session(SessionId session) {
    for (Prefill& router : prefill_) router.end_session(session);
    for (Decode& router : decode_) router.end_session(session);
  }

  /// At the end: every router agrees with itself and, where no call is left, has none. kCorruptData.
  [[nodiscard]] Status check_idle(std::int64_t calls_unfinished) const {
    for (const Prefill& router : prefill_) {
      if (Status s = check(router, calls_unfinished); !s.ok()) return s;
    }
    for (const Decode& router : decode_) {
      if (Status s = check(router, calls_unfinished); !s.ok()) return s;
    }
    return {};
  }

 private:
  [[nodiscard]] static std::int32_t pool_size(std::int32_t workers, std::int32_t pools, std::int32_t pool) {
    return (workers - pool + pools - 1) / pools;
  }
  [[nodiscard]] std::int32_t prefill_pool(const SimCall& one) const noexcept {
    return prefill_pools_ == 1 ? 0 : one.module;
  }
  template <class AnyRouter>
  [[nodiscard]] static AnyRouter& at(std::vector<AnyRouter>& routers, std::int32_t pool) {
    return routers[static_cast<std::size_t>(pool)];
  }
  template <class AnyRouter>
  [[nodiscard]] static Status check(const AnyRouter& router, std::int64_t calls_unfinished) {
    if (router.requests() != 0 && calls_unfinished == 0) {
      return error(StatusCode::kCorruptData, "a router has ", router.requests(), " requests left");
    }
    return router.check_invariants();
  }

  std::int32_t prefill_pools_ = 1;
  std::vector<Prefill> prefill_;  // [prefill_pools_]
  std::vector<Decode> decode_;    // [modules]
};

}  // namespace prefillshare::detail
