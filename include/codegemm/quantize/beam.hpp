// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/beam.hpp - the few best ways to code a vector of weights, given what came before.
// Layer: quantize (host only).
// See: AQLM (arXiv 2401.06118), the beam search of algorithm 1
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <codegemm/format.hpp>
#include <codegemm/quantize/nearest.hpp>

namespace codegemm::detail {

inline constexpr int kMostBeam = 16;

/// An array bound out of an int parameter.
template <int kValue>
inline constexpr std::size_t kCount = static_cast<std::size_t>(kValue);

/// One way to code the vector at hand. With the error e = w - w^ of the vector, the loss as a function of e
/// is (up to a constant) e Q e^T + 2 e l^T; `gradient` is half its derivative, Q e + l.
template <int kVecLen>
struct VectorPath {
  int parent = 0;  // the path of the row that it continues
  double loss = 0.0;
  float error[kCount<kVecLen>] = {};
  float gradient[kCount<kVecLen>] = {};
  std::uint16_t codes[kMaxCodebooks] = {};
};

/// What all rows share at one vector position: Q ([v][v]) and c Q c^T of every centroid.
template <int kVecLen>
struct VectorMetric {
  float q[kCount<kVecLen * kVecLen>] = {};
  std::vector<float> norms;  // [m][2^b]

  void measure(const std::vector<SearchBook>& books) {
    const std::int64_t centroids = books.front().centroids;
    norms.resize(books.size() * static_cast<std::size_t>(centroids));
    float* out = norms.data();
    for (const SearchBook& book : books) {
      for (std::int64_t i = 0; i < centroids; ++i) out[i] = 0.0F;
      for (int a = 0; a < kVecLen; ++a) {
        for (int b = 0; b <= a; ++b) {
          const float weight = (a == b ? 1.0F : 2.0F) * q[a * kVecLen + b];
          const float* const x = book.transposed.data() + a * centroids;
          const float* const y = book.transposed.data() + b * centroids;
          for (std::int64_t i = 0; i < centroids; ++i) out[i] += weight * x[i] * y[i];
        }
      }
      out += centroids;
    }
  }
};

/// Keeps the `width` best of all candidates offered, sorted, the earlier one of equals.
class BestCandidates {
 public:
  struct Candidate {
    double loss;
    int path;
    std::uint16_t code;
  };

  explicit BestCandidates(int width) : width_(width) {}

  [[nodiscard]] int size() const noexcept { return size_; }
  [[nodiscard]] const Candidate& operator[](int i) const noexcept { return best_[i]; }
  /// A candidate must be below this to be kept.
  [[nodiscard]] double threshold() const noexcept {
    return size_ < width_ ? std::numeric_limits<double>::infinity() : best_[size_ - 1].loss;
  }
  void insert(const Candidate& candidate) noexcept {
    int at = size_ < width_ ? size_++ : size_ - 1;
    for (; at > 0 && candidate.loss < best_[at - 1].loss; --at) best_[at] = best_[at - 1];
    best_[at] = candidate;
  }

 private:
  int width_;
  int size_ = 0;
  Candidate best_[kMostBeam] = {};
};

/// scores[i] = scale^2 c_i Q c_i^T - 2 scale c_i u^T: the loss with centroid i, up to what does not depend on
/// it.
template <int kVecLen>
void score_centroids(const SearchBook& book, const float* norms, float scale, const float* u, float* scores) {
  const float square = scale * scale;
  const std::int64_t centroids = book.centroids;
  const float* const values = book.transposed.data();
  float factor[kCount<kVecLen>];
  for (int d = 0; d < kVecLen; ++d) factor[d] = -2.0F * scale * u[d];
  for (std::int64_t i = 0; i < centroids; ++i) {
    float score = square * norms[i];
    for (int d = 0; d < kVecLen; ++d) score += factor[d] * values[d * centroids + i];
    scores[i] = score;
  }
}

/// The codes of one vector for all paths of a row: for each codebook, given the codes of the others, the best
/// `width` of all continuations, `rounds` times.
template <int kVecLen>
class VectorBeam {
 public:
  VectorBeam(const std::vector<SearchBook>& books, int width, int rounds)
      : books_(books),
        width_(width),
        rounds_(rounds),
        scores_(static_cast<std::size_t>(books.front().centroids)) {
    paths_.reserve(kMostBeam);
    next_.reserve(kMostBeam);
  }

  [[nodiscard]] std::vector<VectorPath<kVecLen>>& paths() noexcept { return paths_; }

  void search(const VectorMetric<kVecLen>& metric, float scale) {
    for (int round = 0; round < rounds_; ++round) {
      for (std::size_t c = 0; c < books_.size(); ++c) step(metric, scale, c);
    }
  }

 private:
  void step(const VectorMetric<kVecLen>& metric, float scale, std::size_t c) {
    const SearchBook& book = books_[c];
    const float* const norms = metric.norms.data() + static_cast<std::int64_t>(c) * book.centroids;
    BestCandidates best(width_);
    for (std::size_t p = 0; p < paths_.size(); ++p) {
      const VectorPath<kVecLen>& path = paths_[p];
      // Without the old centroid a = scale c_old the error is e + a: the gradient there is the target's.
      const float* const old = book.centroid(path.codes[c]);
      float u[kCount<kVecLen>];
      double without = path.loss;
      for (int d = 0; d < kVecLen; ++d) {
        float sum = path.gradient[d];
        for (int k = 0; k < kVecLen; ++k) sum += scale * old[k] * metric.q[k * kVecLen + d];
        u[d] = sum;
        without += 2.0 * static_cast<double>(scale * old[d]) * static_cast<double>(path.gradient[d]);
      }
      without += static_cast<double>(scale * scale * norms[path.codes[c]]);
      score_centroids<kVecLen>(book, norms, scale, u, scores_.data());
      offer(static_cast<int>(p), c, without, best);
    }
    next_.clear();
    for (int i = 0; i < best.size(); ++i) next_.push_back(follow(metric, scale, c, best[i]));
    paths_.swap(next_);
  }

  void offer(int p, std::size_t c, double base, BestCandidates& best) {
    constexpr std::int64_t kBlock = 16;  // every codebook has a multiple of 16 centroids
    const std::int64_t centroids = books_[c].centroids;
    for (std::int64_t first = 0; first < centroids; first += kBlock) {
      const float* const scores = scores_.data() + first;
      float least = scores[0];
      for (std::int64_t i = 1; i < kBlock; ++i) least = scores[i] < least ? scores[i] : least;
      if (!(base + static_cast<double>(least) < best.threshold())) continue;
      for (std::int64_t i = 0; i < kBlock; ++i) {
        const double loss = base + static_cast<double>(scores[i]);
        const auto code = static_cast<std::uint16_t>(first + i);
        if (loss < best.threshold() && !known(p, c, code, best)) best.insert({loss, p, code});
      }
    }
  }

  /// Whether two paths come together: the same row path and the same codes.
  [[nodiscard]] bool known(int p, std::size_t c, std::uint16_t code, const BestCandidates& best) const {
    const VectorPath<kVecLen>& path = paths_[static_cast<std::size_t>(p)];
    for (int i = 0; i < best.size(); ++i) {
      const VectorPath<kVecLen>& other = paths_[static_cast<std::size_t>(best[i].path)];
      if (best[i].code != code || other.parent != path.parent || best[i].path == p) continue;
      bool same = true;
      for (std::size_t k = 0; k < books_.size(); ++k)
        same = same && (k == c || path.codes[k] == other.codes[k]);
      if (same) return true;
    }
    return false;
  }

  [[nodiscard]] VectorPath<kVecLen> follow(const VectorMetric<kVecLen>& metric, float scale, std::size_t c,
                                           const BestCandidates::Candidate& candidate) const {
    VectorPath<kVecLen> path = paths_[static_cast<std::size_t>(candidate.path)];
    path.loss = candidate.loss;
    if (path.codes[c] == candidate.code) return path;
    const float* const from = books_[c].centroid(path.codes[c]);
    const float* const to = books_[c].centroid(candidate.code);
    for (int d = 0; d < kVecLen; ++d) {
      const float change = scale * (to[d] - from[d]);
      path.error[d] -= change;
      for (int k = 0; k < kVecLen; ++k) path.gradient[k] -= change * metric.q[d * kVecLen + k];
    }
    path.codes[c] = candidate.code;
    return path;
  }

  const std::vector<SearchBook>& books_;
  int width_;
  int rounds_;
  std::vector<float> scores_;  // [2^b]
  std::vector<VectorPath<kVecLen>> paths_;
  std::vector<VectorPath<kVecLen>> next_;
};

}  // namespace codegemm::detail
