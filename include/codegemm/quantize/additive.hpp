// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/additive.hpp - trains m codebooks whose centroids add up, and codes vectors with them.
// Layer: quantize (host only).
// See: AQLM (arXiv 2401.06118), algorithm 1; Arthur and Vassilvitskii, k-means++ (SODA 2007)
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <codegemm/base/executor.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantize/nearest.hpp>

namespace codegemm::detail {

/// splitmix64: the same numbers on every machine.
class SplitMix {
 public:
  explicit SplitMix(std::uint64_t seed) : state_(seed) {}
  [[nodiscard]] std::uint64_t next() noexcept {
    state_ += 0x9E3779B97F4A7C15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  /// In [0, 1).
  [[nodiscard]] double uniform() noexcept { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  std::uint64_t state_;
};

/// Vectors to train on; what a vector weighs is the square of its group's scale.
struct TrainingSet {
  int v = 0;
  std::int64_t count = 0;
  std::vector<float> x;        // [count][v]
  std::vector<float> weights;  // [count]
};

inline constexpr std::int64_t kVectorsPerTask = 1024;

/// x[n][d] -= sign * centroid(codes[n])[d].
template <int kVecLen>
void subtract_centroids(const SearchBook& book, const std::uint16_t* codes, std::int64_t count, float sign,
                        float* x) {
  for (std::int64_t n = 0; n < count; ++n, x += kVecLen) {
    const float* const centroid = book.values.data() + std::int64_t{codes[n]} * kVecLen;
    for (int d = 0; d < kVecLen; ++d) x[d] -= sign * centroid[d];
  }
}

inline void subtract_centroids(const SearchBook& book, const std::uint16_t* codes, std::int64_t count,
                               float sign, float* x) {
  with_vec_len(book.v, [&](auto v) { subtract_centroids<v>(book, codes, count, sign, x); });
}

/// The codes of vectors x[count][v]: codes[c][code_stride], c < m. If `fresh`, first each codebook on what
/// the ones before left. Then, `rounds` times, each again on what all others leave, which never makes the
/// error larger. `left` holds count * v floats.
inline void encode(const std::vector<SearchBook>& books, bool fresh, int rounds, const float* x,
                   std::int64_t count, std::uint16_t* codes, std::int64_t code_stride, float* left) {
  const std::int64_t v = books.front().v;
  std::copy_n(x, count * v, left);
  std::uint16_t* own = codes;
  for (const SearchBook& book : books) {
    if (fresh) find_nearest(book, left, count, own);
    subtract_centroids(book, own, count, 1.0F, left);
    own += code_stride;
  }
  for (int round = 0; round < rounds; ++round) {
    own = codes;
    for (const SearchBook& book : books) {
      subtract_centroids(book, own, count, -1.0F, left);
      find_nearest(book, left, count, own);
      subtract_centroids(book, own, count, 1.0F, left);
      own += code_stride;
    }
  }
}

inline constexpr std::int64_t kSeedLanes = 8;     // points whose distances are computed together
inline constexpr std::int64_t kSeedStretch = 64;  // points whose chances have a sum of their own

/// Lowers least[count] to the weighted squared distances of points[v][count] from a centroid; `first`: sets
/// them. count: a multiple of kSeedLanes.
template <int kVecLen>
void lower_distances(const float* points, std::int64_t count, const float* centroid, const float* weights,
                     bool first, float* least) {
  for (std::int64_t n = 0; n < count; n += kSeedLanes) {
    float d2[kSeedLanes] = {};
    for (int d = 0; d < kVecLen; ++d) {
      const float* const values = points + d * count + n;
      for (std::int64_t l = 0; l < kSeedLanes; ++l) {
        const float off = values[l] - centroid[d];
        d2[l] += off * off;
      }
    }
    for (std::int64_t l = 0; l < kSeedLanes; ++l) d2[l] *= weights[n + l];
    for (std::int64_t l = 0; l < kSeedLanes; ++l)
      least[n + l] = first || d2[l] < least[n + l] ? d2[l] : least[n + l];
  }
}

inline void lower_distances(int v, const float* points, std::int64_t count, const float* centroid,
                            const float* weights, bool first, float* least) {
  with_vec_len(v, [&](auto c) { lower_distances<c>(points, count, centroid, weights, first, least); });
}

/// sums[i] of each kSeedStretch chances, and of all.
inline double sum_chances(const std::vector<float>& chances, std::vector<double>& sums) {
  double total = 0.0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const float* const own = chances.data() + static_cast<std::int64_t>(i) * kSeedStretch;
    double lanes[kSeedLanes] = {};
    for (std::int64_t n = 0; n < kSeedStretch; n += kSeedLanes) {
      for (std::int64_t l = 0; l < kSeedLanes; ++l) lanes[l] += static_cast<double>(own[n + l]);
    }
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    sums[i] = sum;
    total += sum;
  }
  return total;
}

/// k-means++: each next centroid is drawn with a chance that grows with its weighted distance to the ones so
/// far.
inline void seed_plus_plus(const float* x, const TrainingSet& set, SplitMix& random, SearchBook& book) {
  const std::int64_t v = set.v;
  const std::int64_t step = std::max<std::int64_t>(1, set.count / (32 * book.centroids));
  const std::int64_t count = (set.count + step - 1) / step;
  const std::int64_t stretches = (count + kSeedStretch - 1) / kSeedStretch;
  const std::int64_t padded = stretches * kSeedStretch;             // with points that have no weight
  std::vector<float> points(static_cast<std::size_t>(padded * v));  // [v][padded]: distances by vectors
  std::vector<float> weights(static_cast<std::size_t>(padded));
  std::vector<double> sums(static_cast<std::size_t>(stretches));
  for (std::int64_t n = 0; n < count; ++n) {
    for (std::int64_t d = 0; d < v; ++d)
      points[static_cast<std::size_t>(d * padded + n)] = x[n * step * v + d];
    weights[static_cast<std::size_t>(n)] = set.weights[static_cast<std::size_t>(n * step)];
  }
  std::vector<float> chances = weights;
  double total = sum_chances(chances, sums);
  for (std::int64_t i = 0; i < book.centroids; ++i) {
    double left = random.uniform() * total;
    std::int64_t stretch = 0;
    while (stretch + 1 < stretches && left >= sums[static_cast<std::size_t>(stretch)])
      left -= sums[static_cast<std::size_t>(stretch++)];
    std::int64_t pick = stretch * kSeedStretch;
    const std::int64_t last = std::min(count, pick + kSeedStretch) - 1;
    while (pick < last && left >= static_cast<double>(chances[static_cast<std::size_t>(pick)]))
      left -= static_cast<double>(chances[static_cast<std::size_t>(pick++)]);
    float* const centroid = book.values.data() + i * v;
    for (std::int64_t d = 0; d < v; ++d) centroid[d] = points[static_cast<std::size_t>(d * padded + pick)];
    lower_distances(set.v, points.data(), padded, centroid, weights.data(), i == 0, chances.data());
    total = sum_chances(chances, sums);
  }
  book.refresh();
}

/// The vectors of a training set while codebooks are trained: what these leave of each, and its codes. Of the
/// host; a class for another device has the same members.
class HostVectors {
 public:
  HostVectors(const TrainingSet& set, Format f, Executor& executor)
      : set_(set), executor_(executor), left_(set.x), codes_(static_cast<std::size_t>(f.m * set.count)) {}

  /// [count][v].
  [[nodiscard]] const std::vector<float>& left() const { return left_; }
  /// Of codebook c, [count].
  [[nodiscard]] std::vector<std::uint16_t> codes(std::int64_t c) const {
    return {own(c), own(c) + set_.count};
  }
  /// The nearest centroids to what is left become the codes of codebook c.
  void assign(const SearchBook& book, std::int64_t c) {
    for_stretches([&](std::int64_t first, std::int64_t count, float* x) {
      find_nearest(book, x, count, own(c) + first);
    });
  }
  /// What is left becomes less by sign * centroid.
  void subtract(const SearchBook& book, std::int64_t c, float sign) {
    for_stretches([&](std::int64_t first, std::int64_t count, float* x) {
      subtract_centroids(book, own(c) + first, count, sign, x);
    });
  }
  /// The weighted sum of each centroid's vectors and their weight, [2^b][v + 1].
  [[nodiscard]] std::vector<double> sums(const SearchBook& book, std::int64_t c) const {
    const std::int64_t v = set_.v;
    // The parts are fixed and added in order, so that the sums do not depend on the workers.
    const std::int64_t parts = book.centroids <= 1024 ? 8 : 1;
    const std::int64_t part_size = book.centroids * (v + 1);
    std::vector<double> sums(static_cast<std::size_t>(parts * part_size), 0.0);
    parallel_for(executor_, parts, [&](std::int64_t part, int) {
      for (std::int64_t n = set_.count * part / parts; n < set_.count * (part + 1) / parts; ++n) {
        const auto weight = static_cast<double>(set_.weights[static_cast<std::size_t>(n)]);
        double* const sum = sums.data() + part * part_size + std::int64_t{own(c)[n]} * (v + 1);
        const float* const left = left_.data() + n * v;
        for (std::int64_t d = 0; d < v; ++d) sum[d] += weight * static_cast<double>(left[d]);
        sum[v] += weight;
      }
    });
    for (std::int64_t part = 1; part < parts; ++part) {
      for (std::int64_t i = 0; i < part_size; ++i)
        sums[static_cast<std::size_t>(i)] += sums[static_cast<std::size_t>(part * part_size + i)];
    }
    sums.resize(static_cast<std::size_t>(part_size));
    return sums;
  }

 private:
  [[nodiscard]] std::uint16_t* own(std::int64_t c) { return codes_.data() + c * set_.count; }
  [[nodiscard]] const std::uint16_t* own(std::int64_t c) const { return codes_.data() + c * set_.count; }
  template <class Body>
  void for_stretches(Body&& body) {
    const std::int64_t tasks = (set_.count + kVectorsPerTask - 1) / kVectorsPerTask;
    parallel_for(executor_, tasks, [&](std::int64_t task, int) {
      const std::int64_t first = task * kVectorsPerTask;
      body(first, std::min(kVectorsPerTask, set_.count - first), left_.data() + first * set_.v);
    });
  }

  const TrainingSet& set_;
  Executor& executor_;
  std::vector<float> left_;
  std::vector<std::uint16_t> codes_;  // [m][count]
};

/// Each centroid becomes the weighted mean of its vectors. One that has none takes over the vector with the
/// largest weighted error that no other empty one took.
template <class Vectors>
void update_centroids(const TrainingSet& set, const Vectors& vectors, std::int64_t c, SearchBook& book) {
  const std::int64_t v = set.v;
  const std::vector<double> sums = vectors.sums(book, c);
  std::vector<std::int64_t> empty;
  for (std::int64_t i = 0; i < book.centroids; ++i) {
    const double* const sum = sums.data() + i * (v + 1);
    if (sum[v] <= 0.0) {
      empty.push_back(i);
      continue;
    }
    for (std::int64_t d = 0; d < v; ++d)
      book.values[static_cast<std::size_t>(i * v + d)] = static_cast<float>(sum[d] / sum[v]);
  }
  if (!empty.empty()) {
    const std::vector<float>& x = vectors.left();
    const std::vector<std::uint16_t> codes = vectors.codes(c);
    std::vector<std::pair<float, std::int64_t>> errors(static_cast<std::size_t>(set.count));
    for (std::int64_t n = 0; n < set.count; ++n) {
      const float* const centroid = book.centroid(codes[static_cast<std::size_t>(n)]);
      float d2 = 0.0F;
      for (std::int64_t d = 0; d < v; ++d) {
        const float off = x[static_cast<std::size_t>(n * v + d)] - centroid[d];
        d2 += off * off;
      }
      errors[static_cast<std::size_t>(n)] = {-d2 * set.weights[static_cast<std::size_t>(n)], n};
    }
    const std::size_t taken = std::min(empty.size(), errors.size());
    std::partial_sort(errors.begin(), errors.begin() + static_cast<std::ptrdiff_t>(taken), errors.end());
    for (std::size_t e = 0; e < taken; ++e)
      std::copy_n(x.data() + errors[e].second * v, v, book.values.data() + empty[e] * v);
  }
  book.refresh();
}

/// Trains m codebooks on vectors that nothing was taken of yet. One after the other on what is left
/// (k-means++ and `iterations` rounds of Lloyd), then together: `rounds` times, for each codebook, new codes
/// given the others and new means.
template <class Vectors>
std::vector<SearchBook> train_additive(const TrainingSet& set, Format f, int iterations, int rounds,
                                       SplitMix& random, Vectors& vectors) {
  std::vector<SearchBook> books(static_cast<std::size_t>(f.m), SearchBook(f.v, f.centroids()));
  for (SearchBook& book : books) book.refresh();
  if (set.count == 0) return books;
  std::int64_t c = 0;
  for (SearchBook& book : books) {
    {
      const std::vector<float>& left = vectors.left();
      seed_plus_plus(left.data(), set, random, book);
    }
    for (int i = 0; i < iterations; ++i) {
      vectors.assign(book, c);
      update_centroids(set, vectors, c, book);
    }
    vectors.assign(book, c);
    vectors.subtract(book, c++, 1.0F);
  }
  for (int round = 0; round < (f.m > 1 ? rounds : 0); ++round) {
    c = 0;
    for (SearchBook& book : books) {
      vectors.subtract(book, c, -1.0F);
      vectors.assign(book, c);
      update_centroids(set, vectors, c, book);
      vectors.subtract(book, c++, 1.0F);
    }
  }
  return books;
}

}  // namespace codegemm::detail
