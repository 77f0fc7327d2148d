// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/kv/cache_key.hpp - who made a cache, and the fixed hash that finds its blocks.
// Layer: kv (host only).
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace prefillshare {

/// The producer of cached KV. Blocks are shared only between sequences whose three strings are all equal,
/// so a model under a used name needs a new version, and tenants with different salts never meet.
struct CacheKey {
  std::string model_id;       ///< of the prefill module (the base), never of a decode module
  std::string model_version;  ///< whatever changes when its weights do: a digest, a revision
  std::string tenant_salt;    ///< empty: shared by everybody

  /// All three are equal.
  friend bool operator==(const CacheKey&, const CacheKey&) = default;
};

/// What the prefix tree needs of a hash: the same number for the same input in every process. It need not
/// be free of collisions: keys and tokens are compared on every hit.
template <class Hash>
concept BlockHash = requires(const Hash hash, std::uint64_t parent, std::span<const std::int32_t> tokens,
                             const CacheKey& key) {
  { hash(parent, tokens) } -> std::same_as<std::uint64_t>;
  { hash(key) } -> std::same_as<std::uint64_t>;
};

/// The hash of a block is the hash of its parent continued over its tokens, so it stands for the whole
/// prefix. No seed: routers and caches in other processes compute the same number. Not cryptographic: a
/// client that picks its tokens can make buckets long, but can never be given another's block.
struct ChainHash {
  /// The number of `tokens` after the prefix of number `parent`.
  [[nodiscard]] std::uint64_t operator()(std::uint64_t parent,
                                         std::span<const std::int32_t> tokens) const noexcept {
    std::uint64_t h = mix(parent ^ kStart);  // a parent's number and a token must not cancel out
    std::size_t i = 0;
    for (; i + 2 <= tokens.size(); i += 2) {
      h = mix(h ^ (std::uint64_t{static_cast<std::uint32_t>(tokens[i])} |
                   std::uint64_t{static_cast<std::uint32_t>(tokens[i + 1])} << 32));
    }
    if (i < tokens.size()) h = mix(h ^ static_cast<std::uint32_t>(tokens[i]));
    return mix(mix(h ^ tokens.size()));
  }

  /// The number of a producer's empty prefix.
  [[nodiscard]] std::uint64_t operator()(const CacheKey& key) const noexcept {
    std::uint64_t h = kStart;
    for (const std::string_view text : {std::string_view(key.model_id), std::string_view(key.model_version),
                                        std::string_view(key.tenant_salt)}) {
      for (const char c : text) h = mix(h ^ static_cast<unsigned char>(c));
      h = mix(h ^ text.size() ^ kStart);  // so that ("ab", "c") and ("a", "bc") differ
    }
    return mix(h);
  }

 private:
  static constexpr std::uint64_t kStart = 0x243F6A8885A308D3ULL;  // the first bits of pi: not 0

  // The odd constant is 2^64 / the golden ratio; the shift brings the well-mixed high bits down.
  [[nodiscard]] static constexpr std::uint64_t mix(std::uint64_t h) noexcept {
    h *= 0x9E3779B97F4A7C15ULL;
    return h ^ (h >> 32);
  }
};
static_assert(BlockHash<ChainHash>);

}  // namespace prefillshare
