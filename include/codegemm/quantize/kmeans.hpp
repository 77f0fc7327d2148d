// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/kmeans.hpp - quantizes a dense matrix by k-means, without calibration data.
// Layer: quantize (host only).
// See: examples/01_codegemm_cpu.cpp
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>
#include <utility>
#include <vector>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/quantize/additive.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm {

/// What quantize_kmeans() may be told.
struct KMeansOptions {
  std::uint64_t seed = 1;  ///< the same seed gives the same bits, whatever the number of workers
  int iterations = 16;     ///< rounds of Lloyd for each codebook
  int rounds = 12;         ///< rounds of training all codebooks together (m > 1)
  int encode_rounds = 3;   ///< rounds of choosing the codes of one codebook given the others (m > 1)
  int refits = 3;          ///< times that scales are refitted to the codes; codes are chosen again between
  std::int64_t sample = 65536;  ///< vectors that the codebooks are trained on; all if there are fewer
  /// Called with the share done, 0 to 1, on the calling thread. May be empty.
  std::function<void(double)> progress;
};

namespace detail {

// Groups are scaled to a root mean square of 1 for training; codebooks get the square root of the matrix's
// size as a factor, a power of two, so that neither they nor the scales leave the range of fp16.
struct GroupScales {
  std::vector<float> scales;  // [groups][N], the root mean square of each group
  float factor = 1.0F;
};

/// Row and column of the first value, row by row, for which bad(value, row, column); {rows, 0}: none.
template <class Bad>
[[nodiscard]] std::pair<std::int64_t, std::int64_t> first_place(MatrixView<const float> values,
                                                                Executor& executor, Bad&& bad) {
  const auto column_of = [&](std::int64_t row) {
    const float* const begin = values.row(row);
    std::int64_t column = 0;
    while (column < values.cols && !bad(begin[column], row, column)) ++column;
    return column;
  };
  std::atomic<std::int64_t> first{values.rows};
  parallel_for(executor, values.rows, [&](std::int64_t row, int) {
    std::int64_t least = first.load(std::memory_order_relaxed);
    if (row >= least || column_of(row) == values.cols) return;
    while (row < least && !first.compare_exchange_weak(least, row)) {
    }
  });
  const std::int64_t row = first.load();
  return {row, row < values.rows ? column_of(row) : 0};
}

[[nodiscard]] inline Status check_finite(MatrixView<const float> w, Executor& executor) {
  const auto [n, k] =
      first_place(w, executor, [](float value, std::int64_t, std::int64_t) { return !std::isfinite(value); });
  if (n == w.rows) return {};
  return error(StatusCode::kInvalidArgument, "quantize_kmeans: weight at row ", n, ", column ", k, " is ",
               w.row(n)[k]);
}

[[nodiscard]] inline GroupScales measure_groups(MatrixView<const float> w, Format f, Executor& executor) {
  GroupScales out;
  const std::int64_t groups = f.scale_groups(w.cols);
  const std::int64_t length = f.g < 0 ? w.cols : f.g;
  out.scales.resize(static_cast<std::size_t>(groups * w.rows));
  std::vector<double> sizes(out.scales.size());  // [N][groups]
  parallel_for(executor, w.rows, [&](std::int64_t n, int) {
    for (std::int64_t s = 0; s < groups; ++s) {
      const std::int64_t first = s * length;
      const std::int64_t last = std::min(w.cols, first + length);
      double sum = 0.0;
      for (std::int64_t k = first; k < last; ++k) {
        sum += static_cast<double>(w.row(n)[k]) * static_cast<double>(w.row(n)[k]);
      }
      const double rms = std::sqrt(sum / static_cast<double>(last - first));
      out.scales[static_cast<std::size_t>(s * w.rows + n)] = static_cast<float>(rms);
      sizes[static_cast<std::size_t>(n * groups + s)] = rms;
    }
  });
  double total = 0.0;
  std::int64_t counted = 0;
  for (const double rms : sizes) {
    if (!(rms > 0.0)) continue;
    total += std::log2(rms);
    ++counted;
  }
  if (counted > 0) {
    out.factor = static_cast<float>(std::exp2(std::round(total / static_cast<double>(counted) / 2.0)));
  }
  return out;
}

// Centroids lie within a few root mean squares; 16 of them have to fit.
[[nodiscard]] inline Status check_range(const GroupScales& groups, std::int64_t rows) {
  constexpr float kLargestHalf = 65504.0F;
  for (std::size_t i = 0; i < groups.scales.size(); ++i) {
    if (groups.scales[i] / groups.factor <= kLargestHalf && groups.factor * 16.0F <= kLargestHalf) continue;
    return error(StatusCode::kInvalidArgument, "quantize_kmeans: row ", static_cast<std::int64_t>(i) % rows,
                 ", group ", static_cast<std::int64_t>(i) / rows, " has a root mean square of ",
                 groups.scales[i], ", too large for fp16 scales and codebooks");
  }
  return {};
}

// Up to `sample` vectors, one drawn out of each of as many equal stretches of the matrix; none of zero
// groups. importance: what the inputs of each vector of a row weigh, [K / v], or empty.
[[nodiscard]] inline TrainingSet draw_sample(MatrixView<const float> w, Format f, const GroupScales& groups,
                                             const std::vector<float>& importance, std::int64_t sample,
                                             SplitMix& random) {
  TrainingSet set;
  set.v = f.v;
  const std::int64_t per_row = w.cols / f.v;
  const std::int64_t total = w.rows * per_row;
  if (total <= 0) return set;
  const std::int64_t wanted = std::min(total, std::max(sample, f.centroids()));
  const double stretch = static_cast<double>(total) / static_cast<double>(wanted);
  for (std::int64_t i = 0; i < wanted; ++i) {
    const double at = (static_cast<double>(i) + (wanted < total ? random.uniform() : 0.0)) * stretch;
    const std::int64_t index = std::min(total - 1, static_cast<std::int64_t>(at));
    const std::int64_t n = index / per_row;
    const std::int64_t k = index % per_row * f.v;
    const float scale = groups.scales[static_cast<std::size_t>((f.g < 0 ? 0 : k / f.g) * w.rows + n)];
    if (scale <= 0.0F) continue;
    for (std::int64_t d = 0; d < f.v; ++d) set.x.push_back(w.row(n)[k + d] / scale);
    const float weight = importance.empty() ? 1.0F : importance[static_cast<std::size_t>(index % per_row)];
    set.weights.push_back(scale * scale * weight);
    ++set.count;
  }
  // Only their ratios matter; without this, squares of small scales might vanish.
  const float largest = set.count > 0 ? *std::max_element(set.weights.begin(), set.weights.end()) : 1.0F;
  for (float& weight : set.weights) weight = largest > 0.0F ? weight / largest : 1.0F;
  return set;
}

// A worker's memory for one row.
struct RowScratch {
  std::vector<float> scales;         // [groups]
  std::vector<float> x;              // [K], the row over its scales
  std::vector<float> left;           // [K]
  std::vector<std::uint16_t> codes;  // [m][K / v]

  RowScratch(Format f, std::int64_t cols)
      : scales(static_cast<std::size_t>(f.scale_groups(cols))),
        x(static_cast<std::size_t>(cols)),
        left(static_cast<std::size_t>(cols)),
        codes(static_cast<std::size_t>(f.m * (cols / f.v))) {}
};

// Codes for the scales at hand, then the scales that fit these codes best, and again; ends with a fit.
inline void quantize_row(const std::vector<SearchBook>& books, Format f, const KMeansOptions& options,
                         const float* row, std::int64_t cols, RowScratch& scratch) {
  const std::int64_t vectors = cols / f.v;
  const std::int64_t length = f.g < 0 ? cols : f.g;
  const std::int64_t groups = f.scale_groups(cols);
  for (int refit = 0; refit < std::max(1, options.refits); ++refit) {
    for (std::int64_t k = 0; k < cols; ++k) {
      const float scale = scratch.scales[static_cast<std::size_t>(k / length)];
      scratch.x[static_cast<std::size_t>(k)] = scale != 0.0F ? row[k] / scale : 0.0F;
    }
    // With one codebook there are no others to choose by: rounds are for m > 1, where the first go matters
    // most.
    const int rounds = f.m == 1 ? 0 : refit == 0 ? options.encode_rounds : 1;
    encode(books, refit == 0 || f.m == 1, rounds, scratch.x.data(), vectors, scratch.codes.data(), vectors,
           scratch.left.data());
    for (std::int64_t s = 0; s < groups; ++s) {
      double dot = 0.0;
      double norm = 0.0;
      for (std::int64_t j = s * length / f.v; j < std::min(cols, (s + 1) * length) / f.v; ++j) {
        for (std::int64_t d = 0; d < f.v; ++d) {
          float q = 0.0F;
          for (std::int64_t c = 0; c < f.m; ++c) {
            const std::uint16_t code = scratch.codes[static_cast<std::size_t>(c * vectors + j)];
            q += books[static_cast<std::size_t>(c)].centroid(code)[d];
          }
          dot += static_cast<double>(row[j * f.v + d]) * static_cast<double>(q);
          norm += static_cast<double>(q) * static_cast<double>(q);
        }
      }
      // Rounded here, so that the next codes are chosen for the scale that is stored.
      const double fitted = norm > 0.0 ? dot / norm : 0.0;
      scratch.scales[static_cast<std::size_t>(s)] = Half::from_float(static_cast<float>(fitted)).to_float();
    }
  }
}

/// What k-means begins with: scales that groups are trained at, and the codebooks as fp16 holds them.
struct KMeansBooks {
  GroupScales groups;
  std::vector<SearchBook> books;
};

/// make_vectors(set) gives the vectors on whichever device, as HostVectors. importance: draw_sample().
template <class MakeVectors>
[[nodiscard]] Result<KMeansBooks> train_books(MatrixView<const float> w, Format f,
                                              const KMeansOptions& options,
                                              const std::vector<float>& importance, Executor& executor,
                                              MakeVectors&& make_vectors) {
  KMeansBooks out;
  out.groups = measure_groups(w, f, executor);
  if (Status status = check_range(out.groups, w.rows); !status.ok()) return status;
  SplitMix random(options.seed);
  const TrainingSet set = draw_sample(w, f, out.groups, importance, options.sample, random);
  auto vectors = make_vectors(set);
  out.books = train_additive(set, f, options.iterations, options.rounds, random, vectors);
  for (SearchBook& book : out.books) {
    for (float& value : book.values) value = Half::from_float(value * out.groups.factor).to_float();
    book.refresh();
  }
  return out;
}

[[nodiscard]] inline Result<QuantizedMatrix> quantize_kmeans_checked(MatrixView<const float> w, Format f,
                                                                     const KMeansOptions& options,
                                                                     const std::vector<float>& importance,
                                                                     Executor& executor) {
  Result<QuantizedMatrix> made = QuantizedMatrix::create(f, w.rows, w.cols);
  if (!made.ok()) return made.status();
  QuantizedMatrix& out = *made;
  const Result<KMeansBooks> trained =
      train_books(w, f, options, importance, executor,
                  [&](const TrainingSet& set) { return HostVectors(set, f, executor); });
  if (!trained.ok()) return trained.status();
  const GroupScales& groups = trained->groups;
  const std::vector<SearchBook>& books = trained->books;
  std::size_t at = 0;
  for (const SearchBook& book : books) {
    for (const float value : book.values) out.codebooks()[at++] = Half::from_float(value);
  }

  const std::int64_t group_count = f.scale_groups(w.cols);
  const std::int64_t vectors = w.cols / f.v;
  std::vector<RowScratch> scratches(static_cast<std::size_t>(executor.workers()), RowScratch(f, w.cols));
  constexpr std::int64_t kBatches = 16;
  for (std::int64_t batch = 0; batch < kBatches; ++batch) {
    const std::int64_t first = w.rows * batch / kBatches;
    const std::int64_t last = w.rows * (batch + 1) / kBatches;
    parallel_for(executor, last - first, [&](std::int64_t task, int worker) {
      const std::int64_t n = first + task;
      RowScratch& scratch = scratches[static_cast<std::size_t>(worker)];
      for (std::int64_t s = 0; s < group_count; ++s) {
        scratch.scales[static_cast<std::size_t>(s)] =
            groups.scales[static_cast<std::size_t>(s * w.rows + n)] / groups.factor;
      }
      quantize_row(books, f, options, w.row(n), w.cols, scratch);
      for (std::int64_t s = 0; s < group_count; ++s) {
        out.scales()[static_cast<std::size_t>(s * w.rows + n)] =
            Half::from_float(scratch.scales[static_cast<std::size_t>(s)]);
      }
      for (std::int64_t c = 0; c < f.m; ++c) {
        for (std::int64_t j = 0; j < vectors; ++j) {
          out.set_code(c, n, j, scratch.codes[static_cast<std::size_t>(c * vectors + j)]);
        }
      }
    });
    if (options.progress) options.progress(static_cast<double>(batch + 1) / kBatches);
  }
  return made;
}

// The arguments of both quantizers, checked.
[[nodiscard]] inline Status check_quantize(MatrixView<const float> weights, Format format,
                                           const KMeansOptions& options, Executor& executor) {
  if (const auto sizes = canonical_sizes(format, weights.rows, weights.cols); !sizes.ok())
    return sizes.status();
  if (weights.stride < weights.cols) {
    return error(StatusCode::kInvalidArgument, "quantize_kmeans: weights have stride ", weights.stride,
                 ", below their ", weights.cols, " columns");
  }
  if (weights.data == nullptr && weights.rows > 0 && weights.cols > 0) {
    return error(StatusCode::kNullPointer, "quantize_kmeans: weights is null");
  }
  if (options.iterations < 0 || options.rounds < 0 || options.encode_rounds < 0 || options.refits < 0 ||
      options.sample < 1) {
    return error(StatusCode::kInvalidArgument, "quantize_kmeans: options iterations = ", options.iterations,
                 ", rounds = ", options.rounds, ", encode_rounds = ", options.encode_rounds,
                 ", refits = ", options.refits, " must not be negative, sample = ", options.sample,
                 " at least 1");
  }
  return check_finite(weights, executor);
}

}  // namespace detail

/// Quantizes weights[N][K], K a multiple of v, so that the sum of squared errors is small: scale groups by
/// their root mean square, codebooks by k-means on a sample, codes for all weights, scales refitted to the
/// codes. The same result for the same seed, whatever the number of workers; results of machines with and
/// without fused multiply-add may differ in a few codes. A group of zeros gets the scale 0. Errors:
/// kInvalidArgument for the format, shape or options, for a weight that is not finite (with its place) and
/// for weights whose scales fp16 cannot hold; kNullPointer; kOutOfMemory.
[[nodiscard]] inline Result<QuantizedMatrix> quantize_kmeans(MatrixView<const float> weights, Format format,
                                                             const KMeansOptions& options,
                                                             Executor& executor) {
  if (Status status = detail::check_quantize(weights, format, options, executor); !status.ok()) return status;
  try {
    return detail::quantize_kmeans_checked(weights, format, options, {}, executor);
  } catch (const std::bad_alloc&) {
    return error(StatusCode::kOutOfMemory, "quantize_kmeans: ", weights.rows, " x ", weights.cols, " as ",
                 format_name(format));
  }
}

}  // namespace codegemm
