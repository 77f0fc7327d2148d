// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/block/piece_schedule.hpp - products dealt out to clusters: whole ones as long as every
// cluster gets one, and what is left in pieces of K, so that all end at the same time.
// Layer: cuda/block (host + device, no CUDA headers).
#pragma once

#include <cstdint>

#include <codegemm/base/macros.hpp>

namespace codegemm::cuda {

/// Most clusters that share the sum of a product, see PieceSchedule::even_pieces.
inline constexpr std::int32_t kMostEvenPieces = 8;

/// Cluster c makes products c, c + clusters, .. of the first `whole * clusters`. The slabs of the others, one
/// product after the other, are cut into `cutters` ranges, none longer than a product, and cluster c takes
/// the c-th one (the stream-K decomposition of Osama et al., PPoPP 2023, for the last wave alone). So a range
/// has at most two pieces: one at its end that does not end a product, the *head*, whose sums the cluster
/// hands to whoever ends the product; and one that does, the *tail*, for which it adds what the clusters just
/// before it hand over. A cluster begins with its head and ends with its tail: it waits for clusters of
/// lower number alone, and for the first thing that those do. Blocks start in the order of their numbers
/// (what CUB's decoupled look-back relies on too), so this ends even where other kernels keep some from
/// starting.
///
/// Where every product of the rest can have the same power of two of clusters, these share the sum as well:
/// each ends a share of the product's tokens, for which the others hand it theirs. They do so last of all and
/// wait for each other, being next to each other: of one kernel at most one such group has begun and not yet
/// all its clusters.
struct PieceSchedule {
  std::int32_t slabs = 0;         ///< of a product, along K
  std::int32_t clusters = 0;      ///< to launch
  std::int32_t whole = 0;         ///< whole products of every cluster
  std::int32_t cutters = 0;       ///< clusters that share the rest, at least as many as its products
  std::int32_t shared_slabs = 0;  ///< slabs of the rest; times cutters it fits 31 bits
  std::int32_t even_pieces = 0;   ///< more than 1: so many clusters share a product of the rest, see above

  /// Part of a product that one cluster makes.
  struct Piece {
    std::int32_t product = 0;  ///< which
    std::int32_t slab = 0;     ///< the first one
    std::int32_t slabs = 0;    ///< how many
    bool ends = false;         ///< with the product's last slab
  };

  /// Where the range of a cluster begins, in slabs; it ends where the next one begins.
  [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr std::int32_t first_slab(std::int32_t cluster) const {
    return (cluster < cutters ? cluster : cutters) * shared_slabs / (cutters > 0 ? cutters : 1);
  }

  /// The pieces of one cluster, in the order in which it makes them.
  class Pieces {
   public:
    /// Of cluster number `cluster`.
    CODEGEMM_HOST_DEVICE constexpr Pieces(const PieceSchedule& s, std::int32_t cluster)
        : cluster_(cluster), whole_(s.whole) {
      const std::int32_t first = s.first_slab(cluster);
      const std::int32_t end = s.first_slab(cluster + 1);
      if (first == end) return;
      const std::int32_t first_product = first / s.slabs;
      const std::int32_t end_product = end / s.slabs;  // the one that the range's end lies in
      const std::int32_t shared = s.whole * s.clusters;
      const std::int32_t at = first - first_product * s.slabs;
      if (s.even_pieces > 1) {
        tails_ = 1;
        tail_ = Piece{shared + first_product, at, end - first, true};
        return;
      }
      const std::int32_t left = end - end_product * s.slabs;
      heads_ = left > 0 ? 1 : 0;
      const std::int32_t head_at = first_product == end_product ? at : 0;
      head_ = Piece{shared + end_product, head_at, left - head_at, false};
      tails_ = first_product < end_product ? 1 : 0;
      tail_ = Piece{shared + first_product, at, s.slabs - at, true};
    }
    /// How many.
    [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr std::int32_t size() const {
      return heads_ + whole_ + tails_;
    }
    /// The i-th.
    [[nodiscard]] CODEGEMM_HOST_DEVICE constexpr Piece piece(const PieceSchedule& s, std::int32_t i) const {
      if (i < heads_) return head_;
      if (i < heads_ + whole_) return Piece{(i - heads_) * s.clusters + cluster_, 0, s.slabs, true};
      return tail_;
    }

   private:
    std::int32_t cluster_;
    std::int32_t whole_;
    std::int32_t heads_ = 0;
    std::int32_t tails_ = 0;
    Piece head_;
    Piece tail_;
  };
};

/// The schedule of `products` of `slabs` slabs each on at most `most_clusters` clusters, what is left after
/// whole waves cut into about `splits` pieces a product. No clusters: there is none, or too many slabs. At
/// most `most_even_pieces` clusters share a product's sum, 1: none do.
[[nodiscard]] constexpr PieceSchedule schedule_pieces(std::int64_t products, std::int64_t slabs,
                                                      std::int32_t most_clusters, std::int32_t splits,
                                                      std::int32_t most_even_pieces) {
  PieceSchedule out;
  if (products < 1 || slabs < 1 || most_clusters < 1) return out;
  const std::int64_t rest = products % most_clusters;
  const std::int64_t wanted = rest * (splits < slabs ? splits : slabs);
  const std::int64_t cutters = wanted < most_clusters ? wanted : most_clusters;
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  if (products >= kMost || slabs * (most_clusters + 1) * (most_clusters + 1) >= kMost) return out;
  out.slabs = static_cast<std::int32_t>(slabs);
  out.whole = static_cast<std::int32_t>(products / most_clusters);
  out.cutters = static_cast<std::int32_t>(cutters);
  out.clusters = out.whole > 0 ? most_clusters : out.cutters;
  out.shared_slabs = static_cast<std::int32_t>(rest * slabs);
  const bool power_of_two = splits == 2 || splits == 4 || splits == 8;
  if (power_of_two && splits <= kMostEvenPieces && splits <= most_even_pieces && cutters == rest * splits)
    out.even_pieces = splits;
  return out;
}

}  // namespace codegemm::cuda
