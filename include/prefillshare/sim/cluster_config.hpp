// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/sim/cluster_config.hpp - the cluster that is simulated.
// Layer: sim (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include <prefillshare/serve/worker_table.hpp>
#include <prefillshare/sim/cost_model.hpp>
#include <prefillshare/sim/workload.hpp>
#include <prefillshare/vocabulary.hpp>

namespace prefillshare {

/// Who computes a context's KV, and who may read it.
enum class CacheSharing : std::uint8_t {
  // Each module prefills for itself, on workers of its own: prefill worker i serves module i % modules.
  kPerModule,
  // Each module has caches of its own, but any prefill worker serves any module, and holds the weights of
  // all.
  kPooled,
  // PrefillShare: one base for all modules, on any prefill worker.
  kShared,
};

/// As it is printed.
[[nodiscard]] constexpr std::string_view to_string(CacheSharing sharing) noexcept {
  switch (sharing) {
    case CacheSharing::kPerModule: return "per module";
    case CacheSharing::kPooled: return "pooled";
    case CacheSharing::kShared: return "shared";
  }
  return "unknown";
}

/// A worker that dies, and comes back empty.
struct SimFault {
  /// Which kind of worker.
  enum class Side : std::uint8_t { kPrefill, kDecode };
  Side side = Side::kPrefill;                           ///< which kind
  std::int32_t worker = 0;                              ///< its number
  double down = 0.0;                                    ///< seconds
  double up = std::numeric_limits<double>::infinity();  ///< seconds; never, if not set
};

/// Decode worker i serves module i % modules.
struct ClusterConfig {
  CacheSharing sharing = CacheSharing::kShared;  ///< who shares a cache
  std::int32_t modules = 4;                      ///< decode modules
  std::int32_t prefill_workers = 4;              ///< on the prefill side
  std::int32_t decode_workers = 4;               ///< on the decode side
  int block_tokens = 16;                         ///< tokens of a block
  std::int64_t prefill_blocks = 0;               ///< of each worker
  std::int64_t decode_blocks = 0;                ///< of each worker
  double kv_bytes_per_token = 0.0;               ///< of all layers
  CostModel cost;                                ///< how long steps take
  std::int64_t chunk_tokens = 2048;              ///< of a prefill step, of all its requests together
  std::int32_t most_batch = 256;                 ///< sequences in a decode step

  /// Sessions: at most `most_sessions` at once, the others wait, at most `most_queued` of them.
  std::int64_t most_sessions = std::numeric_limits<std::int64_t>::max();
  std::int64_t most_queued = std::numeric_limits<std::int64_t>::max();  ///< sessions
  double session_patience = std::numeric_limits<double>::infinity();    ///< seconds in that queue
  /// Sessions together may have contexts of so many times the blocks of the prefill workers that keep them.
  double session_blocks_share = std::numeric_limits<double>::infinity();
  /// A call begins its prefill when the decode worker has set aside all the blocks that it may ever need.
  /// Without, it takes them as it grows, and whoever came last loses his to those before him when there are
  /// none.
  bool reserve_decode = true;
  /// Without reserve_decode: a cache for which the decode side has no room yet goes to host memory and comes
  /// back at so many bytes a second. 0: it stays where it is.
  double staging_bytes_per_second = 0.0;

  std::vector<double> prefill_speed;  ///< [prefill_workers] or empty: 1.0; 0.5 takes twice as long
  std::vector<double> decode_speed;   ///< [decode_workers] or empty, as prefill_speed
  std::vector<SimFault> faults;       ///< workers that die
  double sample_seconds = 1.0;        ///< from one sample of the memory in use to the next
  std::int64_t event_ring = 4096;     ///< events that a prefill worker's log keeps
};

/// Blocks of KV that fit beside the weights.
[[nodiscard]] inline std::int64_t blocks_beside(double memory_bytes, double weight_bytes,
                                                double kv_bytes_per_token, int block_tokens) {
  const double room = std::max(0.0, memory_bytes - weight_bytes);
  return static_cast<std::int64_t>(room / (kv_bytes_per_token * block_tokens));
}

/// kInvalidArgument, with the field.
[[nodiscard]] inline Status validate(const ClusterConfig& config) {
  struct Field {
    const char* name;
    std::int64_t value;
    std::int64_t least;
    std::int64_t most;
  };
  const Field fields[] = {
      {"modules", config.modules, 1, 1 << 16},
      {"prefill_workers", config.prefill_workers, 1, kMostWorkers},
      {"decode_workers", config.decode_workers, config.modules, kMostWorkers},
      {"block_tokens", config.block_tokens, 1, 1 << 16},
      {"prefill_blocks", config.prefill_blocks, 1, std::int64_t{1} << 30},
      {"decode_blocks", config.decode_blocks, 1, std::int64_t{1} << 30},
      {"chunk_tokens", config.chunk_tokens, 1, std::int64_t{1} << 30},
      {"most_batch", config.most_batch, 1, 1 << 20},
      {"most_sessions", config.most_sessions, 1, std::numeric_limits<std::int64_t>::max()},
      {"event_ring", config.event_ring, 1, std::int64_t{1} << 24},
  };
  for (const Field& field : fields) {
    if (field.value < field.least || field.value > field.most) {
      return error(StatusCode::kInvalidArgument, "ClusterConfig: ", field.name, " = ", field.value,
                   ", expected ", field.least, " to ", field.most);
    }
  }
  if (config.sharing == CacheSharing::kPerModule && config.prefill_workers < config.modules) {
    return error(StatusCode::kInvalidArgument, "ClusterConfig: ", config.prefill_workers,
                 " prefill workers for ", config.modules, " modules that each need one");
  }
  const auto speeds = [](const std::vector<double>& speed, std::int32_t workers) {
    return (speed.empty() || static_cast<std::int64_t>(speed.size()) == workers) &&
           std::all_of(speed.begin(), speed.end(), [](double s) { return s > 0.0; });
  };
  if (!speeds(config.prefill_speed, config.prefill_workers) ||
      !speeds(config.decode_speed, config.decode_workers)) {
    return error(StatusCode::kInvalidArgument, "ClusterConfig: a speed above 0 for each worker, or none");
  }
  if (!(config.kv_bytes_per_token >= 0.0) || !(config.session_blocks_share > 0.0) ||
      !(config.staging_bytes_per_second >= 0.0) || !(config.sample_seconds > 0.0) ||
      !(config.session_patience > 0.0)) {
    return error(StatusCode::kInvalidArgument,
                 "ClusterConfig: bytes, shares and seconds must not be below 0");
  }
  for (const SimFault& fault : config.faults) {
    const std::int32_t workers =
        fault.side == SimFault::Side::kPrefill ? config.prefill_workers : config.decode_workers;
    if (fault.worker < 0 || fault.worker >= workers || !(fault.down >= 0.0) || !(fault.up > fault.down)) {
      return error(StatusCode::kInvalidArgument, "ClusterConfig: a fault of worker ", fault.worker, " of ",
                   workers, " from ", fault.down, " to ", fault.up, " s");
    }
  }
  return validate(config.cost);
}

}  // namespace prefillshare
