// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/calibrated.hpp - quantizes a dense matrix so that its outputs on calibration data change
// least.
// Layer: quantize (host only).
// See: AQLM (arXiv 2401.06118), algorithm 1; examples/06_quantize.cpp
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>
#include <utility>
#include <vector>

#include <Eigen/Cholesky>
#include <Eigen/Core>

#include <codegemm/base/executor.hpp>
#include <codegemm/base/matrix_view.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/quantize/additive_state.hpp>
#include <codegemm/quantize/code_search.hpp>
#include <codegemm/quantize/codebook_fit.hpp>
#include <codegemm/quantize/gram.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <codegemm/quantize/scale_fit.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm {

/// What quantize_calibrated() may be told.
struct CalibratedOptions {
  KMeansOptions kmeans;     ///< how codebooks and codes begin; the seed is its seed
  int rounds = 12;          ///< at most so many rounds of fitting and searching
  double tolerance = 0.01;  ///< rounds end once one lowers the error by less than this share
  int beam = 4;             ///< paths that the code search keeps, 1..16
  int codebook_steps = 8;   ///< conjugate gradient steps of each codebook fit
  double damping = 0.1;     ///< added to H's diagonal, in shares of its mean
  /// Called with the share done (0 to 1, an upper bound of the rounds being assumed) and the relative error
  /// so far, on the calling thread. May be empty.
  std::function<void(double share, double error)> progress;
};

/// How a matrix was quantized. Errors are relative: tr((W - W^) H (W - W^)^T) / tr(W H W^T), H damped.
struct CalibratedReport {
  double kmeans_error = 0.0;  ///< of k-means, with which it began
  double error = 0.0;         ///< in the end
  int rounds = 0;             ///< rounds run
};

namespace detail {

[[nodiscard]] inline Status check_gram(MatrixView<const float> gram, std::int64_t cols, Executor& executor) {
  if (gram.rows != cols || gram.cols != cols || gram.stride < cols) {
    return error(StatusCode::kShapeMismatch, "quantize_calibrated: H is ", gram.rows, " x ", gram.cols,
                 " of stride ", gram.stride, ", the weights have ", cols, " columns");
  }
  if (gram.data == nullptr && cols > 0)
    return error(StatusCode::kNullPointer, "quantize_calibrated: H is null");
  const auto [i, j] = first_place(gram, executor, [](float value, std::int64_t row, std::int64_t column) {
    return !std::isfinite(value) || (row == column && value < 0.0F);
  });
  if (i == cols) return {};
  return error(StatusCode::kInvalidArgument, "quantize_calibrated: H at row ", i, ", column ", j, " is ",
               gram.row(i)[j]);
}

/// H, symmetric and scaled to a mean diagonal of 1, with the damping added. The scale does not change what is
/// best; it keeps fp32 in its range.
[[nodiscard]] inline DenseMatrix damped_gram(MatrixView<const float> gram, double damping,
                                             Executor& executor) {
  const std::int64_t k = gram.cols;
  double trace = 0.0;
  for (std::int64_t i = 0; i < k; ++i) trace += static_cast<double>(gram.row(i)[i]);
  if (!(trace > 0.0)) return DenseMatrix::Identity(k, k);  // no data: every input counts the same
  DenseMatrix out(k, k);
  const double scale = static_cast<double>(k) / trace;
  // By squares: columns are read, too.
  constexpr std::int64_t kSquare = 64;
  parallel_for(executor, (k + kSquare - 1) / kSquare, [&](std::int64_t task, int) {
    const std::int64_t first = task * kSquare;
    const std::int64_t last = std::min(k, first + kSquare);
    for (std::int64_t left = 0; left < last; left += kSquare) {
      for (std::int64_t i = first; i < last; ++i) {
        for (std::int64_t j = left; j <= std::min(i, left + kSquare - 1); ++j) {
          const double mean =
              0.5 * (static_cast<double>(gram.row(i)[j]) + static_cast<double>(gram.row(j)[i]));
          out(i, j) = out(j, i) = static_cast<float>(scale * mean);
        }
      }
    }
    for (std::int64_t i = first; i < last; ++i) out(i, i) += static_cast<float>(damping);
  });
  return out;
}

/// What the inputs of each vector weigh when the codebooks begin: the fourth root of H's mean diagonal over
/// it. Its full weight lets the few largest inputs take all centroids, from which the rounds do not recover.
[[nodiscard]] inline std::vector<float> vector_importance(const DenseMatrix& gram, int v) {
  std::vector<float> out;
  for (std::int64_t k = 0; k < gram.rows(); k += v) {
    float sum = 0.0F;
    for (std::int64_t d = 0; d < v; ++d) sum += gram(k + d, k + d);
    out.push_back(std::pow(sum / static_cast<float>(v), 0.25F));
  }
  return out;
}

inline void take_matrix(const QuantizedMatrix& from, AdditiveState& s) {
  const Format f = s.format;
  s.books.assign(static_cast<std::size_t>(f.m), SearchBook(f.v, f.centroids()));
  std::size_t at = 0;
  for (SearchBook& book : s.books) {
    for (float& value : book.values) value = from.codebooks()[at++].to_float();
    book.refresh();
  }
  s.codes.resize(static_cast<std::size_t>(s.rows * f.m * s.vectors()));
  s.scales.resize(static_cast<std::size_t>(s.rows * s.groups()));
  const QuantizedMatrixView view = from.view();
  for (std::int64_t n = 0; n < s.rows; ++n) {
    for (std::int64_t c = 0; c < f.m; ++c) {
      for (std::int64_t j = 0; j < s.vectors(); ++j)
        s.codes_of(n)[c * s.vectors() + j] = static_cast<std::uint16_t>(view.code(c, n, j));
    }
    for (std::int64_t g = 0; g < s.groups(); ++g) s.scales_of(n)[g] = view.scales[g * s.rows + n].to_float();
  }
}

inline void give_matrix(const AdditiveState& s, QuantizedMatrix& to, Executor& executor) {
  std::size_t at = 0;
  for (const SearchBook& book : s.books) {
    for (const float value : book.values) to.codebooks()[at++] = Half::from_float(value);
  }
  parallel_for(executor, s.rows, [&](std::int64_t n, int) {
    for (std::int64_t c = 0; c < s.format.m; ++c) {
      for (std::int64_t j = 0; j < s.vectors(); ++j) to.set_code(c, n, j, s.codes_of(n)[c * s.vectors() + j]);
    }
    for (std::int64_t g = 0; g < s.groups(); ++g)
      to.scales()[static_cast<std::size_t>(g * s.rows + n)] = Half::from_float(s.scales_of(n)[g]);
  });
}

/// The steps of the quantizer on the host. A class for another device has the same members.
class HostSteps {
 public:
  explicit HostSteps(Executor& executor) : executor_(executor) {}

  /// `state` is worked on until end(). It may lack codebooks, codes and scales: then start() comes next.
  [[nodiscard]] Status begin(AdditiveState& state) {
    s_ = &state;
    return {};
  }
  /// Codebooks, codes and scales by k-means. importance: vector_importance().
  [[nodiscard]] Status start(const KMeansOptions& options, const std::vector<float>& importance,
                             Executor& executor) {
    const Result<QuantizedMatrix> made =
        quantize_kmeans_checked(s_->weights, s_->format, options, importance, executor);
    if (!made.ok()) return made.status();
    take_matrix(*made, *s_);
    return {};
  }
  /// L of H = L L^T, which SearchMode::kRebuild needs; false where fp32 cannot factor H.
  [[nodiscard]] Result<bool> factor() {
    const Eigen::LLT<DenseMatrix> factored(s_->gram);
    if (factored.info() != Eigen::Success) return false;
    factor_ = factored.matrixL();
    return true;
  }
  /// weighted_error().
  [[nodiscard]] Result<double> error(bool residual) { return weighted_error(*s_, residual, executor_); }
  [[nodiscard]] Status fit_codebooks(int steps) {
    CodebookFit(*s_, executor_).run(steps);
    return {};
  }
  [[nodiscard]] Status fit_scales() {
    detail::fit_scales(*s_, executor_);
    return {};
  }
  [[nodiscard]] Status search(SearchMode mode, int beam) {
    search_codes(*s_, mode == SearchMode::kRebuild ? factor_ : s_->gram, mode, beam, executor_);
    return {};
  }
  /// The state has the result.
  [[nodiscard]] Status end() { return {}; }

 private:
  Executor& executor_;
  AdditiveState* s_ = nullptr;
  DenseMatrix factor_;
};

/// In turn new codes and fits, until a round gains less than the tolerance. Without `rebuild` codes are only
/// refined: what no calibration can make fp32 factor.
template <class Steps>
[[nodiscard]] Status alternate(bool rebuild, const CalibratedOptions& options, Steps& steps,
                               CalibratedReport& report) {
  const Result<double> size = steps.error(false);
  if (!size.ok()) return size.status();
  const auto relative = [&](double& out) -> Status {
    out = 0.0;
    if (!(*size > 0.0)) return {};
    const Result<double> now = steps.error(true);
    if (!now.ok()) return now.status();
    out = *now / *size;
    return {};
  };
  const auto fit = [&]() -> Status {
    if (Status status = steps.fit_codebooks(options.codebook_steps); !status.ok()) return status;
    return steps.fit_scales();
  };
  const auto tell = [&](int done) {
    if (options.progress) options.progress(static_cast<double>(done) / (options.rounds + 1), report.error);
  };
  if (Status status = relative(report.kmeans_error); !status.ok()) return status;
  report.error = report.kmeans_error;
  tell(1);
  for (int round = 0; round < options.rounds && report.error > 0.0; ++round) {
    // Before the search: codebooks that know H make for other codes than those of k-means.
    if (Status status = fit(); !status.ok()) return status;
    if (rebuild) {
      if (Status status = steps.search(SearchMode::kRebuild, options.beam); !status.ok()) return status;
    }
    if (Status status = steps.search(SearchMode::kRefine, options.beam); !status.ok()) return status;
    double error = 0.0;
    if (Status status = relative(error); !status.ok()) return status;
    report.rounds = round + 1;
    const bool done = !(error < report.error * (1.0 - options.tolerance));
    report.error = error;
    tell(round + 2);
    if (done) break;
  }
  if (report.rounds > 0) {
    if (Status status = fit(); !status.ok()) return status;
    if (Status status = relative(report.error); !status.ok()) return status;
  }
  return {};
}

template <class Steps>
[[nodiscard]] Result<QuantizedMatrix> quantize_calibrated_checked(MatrixView<const float> w,
                                                                  MatrixView<const float> gram, Format f,
                                                                  const CalibratedOptions& options,
                                                                  Executor& executor, Steps& steps,
                                                                  CalibratedReport& report) {
  Result<QuantizedMatrix> made = QuantizedMatrix::create(f, w.rows, w.cols);
  if (!made.ok() || w.rows == 0 || w.cols == 0) return made;
  AdditiveState s;
  s.format = f;
  s.rows = w.rows;
  s.cols = w.cols;
  s.weights = w;
  s.gram = damped_gram(gram, options.damping, executor);
  KMeansOptions kmeans = options.kmeans;
  kmeans.progress = nullptr;
  if (Status status = steps.begin(s); !status.ok()) return status;
  if (Status status = steps.start(kmeans, vector_importance(s.gram, f.v), executor); !status.ok())
    return status;
  const Result<bool> rebuild = steps.factor();
  if (!rebuild.ok()) return rebuild.status();
  if (Status status = alternate(*rebuild, options, steps, report); !status.ok()) return status;
  if (Status status = steps.end(); !status.ok()) return status;
  give_matrix(s, *made, executor);
  if (options.progress) options.progress(1.0, report.error);
  return made;
}

/// Checks the arguments, then quantizes with these steps.
template <class Steps>
[[nodiscard]] Result<QuantizedMatrix> quantize_calibrated_with(MatrixView<const float> weights,
                                                               MatrixView<const float> gram, Format format,
                                                               const CalibratedOptions& options,
                                                               Executor& executor, Steps& steps,
                                                               CalibratedReport* report) {
  if (Status status = check_quantize(weights, format, options.kmeans, executor); !status.ok()) return status;
  if (Status status = check_gram(gram, weights.cols, executor); !status.ok()) return status;
  if (options.rounds < 0 || options.beam < 1 || options.beam > kMostBeam || options.codebook_steps < 0 ||
      !(options.damping >= 0.0) || std::isinf(options.damping) || !(options.tolerance >= 0.0)) {
    return error(StatusCode::kInvalidArgument, "quantize_calibrated: options rounds = ", options.rounds,
                 ", codebook_steps = ", options.codebook_steps, ", damping = ", options.damping,
                 ", tolerance = ", options.tolerance, " must not be negative, beam = ", options.beam,
                 " in 1..", kMostBeam);
  }
  try {
    CalibratedReport unused;
    return quantize_calibrated_checked(weights, gram, format, options, executor, steps,
                                       report != nullptr ? *report : unused);
  } catch (const std::bad_alloc&) {
    return error(StatusCode::kOutOfMemory, "quantize_calibrated: ", weights.rows, " x ", weights.cols, " as ",
                 format_name(format));
  }
}

}  // namespace detail

/// Quantizes weights[N][K] so that tr((W - W^) H (W - W^)^T) is small, H = gram[K][K] = X^T X of the layer's
/// inputs (GramMatrix), in whatever scale. It begins with k-means, weighted by H's diagonal, and then in turn
/// chooses codes by beam search, all rows in parallel, and fits codebooks (conjugate gradients) and scales
/// (least squares), until a round gains less than the tolerance. Any format of the canonical layout. The same
/// result for the same seed, whatever the number of workers. `report` may be null. Errors: those of
/// quantize_kmeans(); kShapeMismatch, kNullPointer and kInvalidArgument for H; kInvalidArgument for options.
[[nodiscard]] inline Result<QuantizedMatrix> quantize_calibrated(MatrixView<const float> weights,
                                                                 MatrixView<const float> gram, Format format,
                                                                 const CalibratedOptions& options,
                                                                 Executor& executor,
                                                                 CalibratedReport* report = nullptr) {
  detail::HostSteps steps(executor);
  return detail::quantize_calibrated_with(weights, gram, format, options, executor, steps, report);
}

}  // namespace codegemm
