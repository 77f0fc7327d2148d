// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/tenant.hpp - who uses how many blocks, and how many they may.
// Layer: kv (host only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/base/status.hpp>
#include <prefillshare/kv/block_pool.hpp>
#include <prefillshare/kv/try_allocate.hpp>

namespace prefillshare {

/// A tenant of one allocator, numbered in the order of KvAllocator::add_tenant(). Number 0 is always there.
/// Whose blocks a tenant can see is not decided here but by CacheKey::tenant_salt.
using TenantId = std::int32_t;
inline constexpr TenantId kDefaultTenant = 0;  ///< who has no name and no quota

/// What a tenant may hold.
struct TenantQuota {
  /// Different blocks that the tenant's open sequences may hold at once; a block that several of them share
  /// counts once, cached blocks that no sequence holds do not count.
  std::int64_t max_blocks = std::numeric_limits<std::int64_t>::max();
};

/// What one tenant has and had. in_use_blocks = shared_blocks + private_blocks.
struct TenantStats {
  std::string name;                 ///< as given to add_tenant()
  std::int64_t max_blocks = 0;      ///< the quota
  std::int64_t sequences = 0;       ///< open
  std::int64_t in_use_blocks = 0;   ///< held by its open sequences, each counted once
  std::int64_t shared_blocks = 0;   ///< of these, held by two or more of its sequences
  std::int64_t private_blocks = 0;  ///< of these, held by one
  std::int64_t bytes_shared = 0;    ///< of shared_blocks
  std::int64_t bytes_private = 0;   ///< of private_blocks

  /// Counted from the tenant's beginning.
  std::int64_t hit_tokens = 0;
  std::int64_t miss_tokens = 0;     ///< looked up and not found
  std::int64_t evicted_blocks = 0;  ///< cached blocks given up which it was the last to use
  std::int64_t refusals = 0;        ///< reservations refused by its quota
};

/// Counts each tenant's holds on each block, exactly: 4 bytes a block and tenant. hold() and drop() are O(1)
/// and allocate nothing. Externally synchronized.
class TenantLedger {
 public:
  /// With the default tenant, who has no quota. kOutOfMemory.
  [[nodiscard]] static codegemm::Result<TenantLedger> create(std::int64_t blocks) {
    TenantLedger ledger;
    ledger.blocks_ = static_cast<std::size_t>(blocks);
    if (!detail::try_allocate([&] { ledger.last_user_.assign(ledger.blocks_, kDefaultTenant); })) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "TenantLedger: no memory for ", blocks,
                             " blocks");
    }
    auto added = ledger.add("", {});
    if (!added.ok()) return added.status();
    return ledger;
  }

  /// kOutOfMemory, kInvalidArgument for a negative quota.
  [[nodiscard]] codegemm::Result<TenantId> add(std::string name, const TenantQuota& quota) {
    if (quota.max_blocks < 0) {
      return codegemm::error(codegemm::StatusCode::kInvalidArgument, "tenant ", name, ": a quota of ",
                             quota.max_blocks, " blocks");
    }
    const bool allocated = detail::try_allocate([&] {
      Tenant tenant;
      tenant.stats.name = std::move(name);
      tenant.stats.max_blocks = quota.max_blocks;
      tenant.holds.assign(blocks_, 0);
      tenants_.push_back(std::move(tenant));
    });
    if (!allocated) {
      return codegemm::error(codegemm::StatusCode::kOutOfMemory, "no memory for tenant ", tenants_.size());
    }
    return static_cast<TenantId>(tenants_.size() - 1);
  }

  /// From now on; what is held beyond it stays held.
  void set_quota(TenantId tenant, const TenantQuota& quota) {
    at(tenant).stats.max_blocks = quota.max_blocks;
  }

  /// Whether there is such a tenant.
  [[nodiscard]] bool contains(TenantId tenant) const noexcept {
    return tenant >= 0 && static_cast<std::size_t>(tenant) < tenants_.size();
  }
  /// They are numbered from 0.
  [[nodiscard]] std::int64_t tenants() const noexcept { return std::ssize(tenants_); }
  /// Of a tenant that is there.
  [[nodiscard]] TenantStats& stats(TenantId tenant) { return at(tenant).stats; }
  /// Of a tenant that is there.
  [[nodiscard]] const TenantStats& stats(TenantId tenant) const { return at(tenant).stats; }
  /// How many of the tenant's sequences hold the block.
  [[nodiscard]] std::int32_t holds(TenantId tenant, BlockId block) const {
    return at(tenant).holds[static_cast<std::size_t>(block)];
  }
  /// Further blocks that the tenant may hold; negative after a quota was lowered.
  [[nodiscard]] std::int64_t room(TenantId tenant) const {
    return at(tenant).stats.max_blocks - at(tenant).stats.in_use_blocks;
  }
  /// The tenant whose sequence was the last to let go of the block.
  [[nodiscard]] TenantId last_user(BlockId block) const {
    return last_user_[static_cast<std::size_t>(block)];
  }

  /// One more sequence of the tenant holds the block.
  void hold(TenantId tenant, BlockId block) {
    Tenant& entry = at(tenant);
    const std::int32_t before = entry.holds[static_cast<std::size_t>(block)]++;
    if (before == 0) {
      ++entry.stats.in_use_blocks;
      ++entry.stats.private_blocks;
    } else if (before == 1) {
      --entry.stats.private_blocks;
      ++entry.stats.shared_blocks;
    }
  }
  /// One fewer.
  void drop(TenantId tenant, BlockId block) {
    Tenant& entry = at(tenant);
    const std::int32_t before = entry.holds[static_cast<std::size_t>(block)]--;
    CODEGEMM_ASSERT(before > 0);
    last_user_[static_cast<std::size_t>(block)] = tenant;
    if (before == 1) {
      --entry.stats.in_use_blocks;
      --entry.stats.private_blocks;
    } else if (before == 2) {
      ++entry.stats.private_blocks;
      --entry.stats.shared_blocks;
    }
  }
  /// Counts an eviction for the last user.
  void evicted(BlockId block) { ++at(last_user(block)).stats.evicted_blocks; }

 private:
  struct Tenant {
    TenantStats stats;                // bytes are filled in by the allocator
    std::vector<std::int32_t> holds;  // [blocks] sequences of this tenant that hold the block
  };

  [[nodiscard]] Tenant& at(TenantId tenant) {
    CODEGEMM_ASSERT(contains(tenant));
    return tenants_[static_cast<std::size_t>(tenant)];
  }
  [[nodiscard]] const Tenant& at(TenantId tenant) const {
    CODEGEMM_ASSERT(contains(tenant));
    return tenants_[static_cast<std::size_t>(tenant)];
  }

  std::size_t blocks_ = 0;
  std::vector<Tenant> tenants_;
  std::vector<TenantId> last_user_;  // [blocks]
};

}  // namespace prefillshare
