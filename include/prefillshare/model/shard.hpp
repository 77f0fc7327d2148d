// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/model/shard.hpp - a rank's part of a model, for tensor parallelism: heads and the rows between
// gate, up and down are dealt out, so that two sums over the ranks a block are all that is exchanged.
// Layer: model (host only).
// See: Megatron-LM (arXiv 1909.08053) section 3: columns first, then rows.
#pragma once

#include <cstdint>

#include <prefillshare/model/config.hpp>

namespace prefillshare {

/// One of `ranks` equal parts.
struct ModelShard {
  int ranks = 1;  ///< parts
  int rank = 0;   ///< which, from 0 on
};

namespace detail {

// Where a part of `size` begins and how long it is.
struct ShardRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
};
[[nodiscard]] inline Result<ShardRange> shard_range(const char* name, std::int64_t size, ModelShard part) {
  if (part.ranks < 1 || part.rank < 0 || part.rank >= part.ranks) {
    return error(StatusCode::kInvalidArgument, "shard ", part.rank, " of ", part.ranks);
  }
  if (size % part.ranks != 0) {
    return error(StatusCode::kInvalidArgument, name, " is ", size, ", no multiple of ", part.ranks, " ranks");
  }
  const std::int64_t count = size / part.ranks;
  return ShardRange{part.rank * count, count};
}

}  // namespace detail

/// The config of a rank's part: heads, KV heads and intermediate size are a part of the whole's, all else is
/// the whole's. kInvalidArgument for what cannot be dealt out evenly.
[[nodiscard]] inline Result<ModelConfig> shard_config(const ModelConfig& config, ModelShard part) {
  ModelConfig out = config;
  const auto deal = [&](const char* name, std::int64_t& size) -> Status {
    const auto range = detail::shard_range(name, size, part);
    if (!range.ok()) return range.status();
    size = range->count;
    return {};
  };
  if (Status s = deal("ModelConfig::heads", out.heads); !s.ok()) return s;
  if (Status s = deal("ModelConfig::kv_heads", out.kv_heads); !s.ok()) return s;
  if (Status s = deal("ModelConfig::intermediate_size", out.intermediate_size); !s.ok()) return s;
  return out;
}

}  // namespace prefillshare
