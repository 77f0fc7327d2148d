// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/device_search.cuh - the beam search for codes, TileSearch on a GPU.
// Layer: quantize/cuda (host, needs nvcc and cuBLAS).
// See: codegemm/quantize/code_search.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <codegemm/cuda/device_array.cuh>
#include <codegemm/format.hpp>
#include <codegemm/quantize/cuda/device_work.cuh>
#include <codegemm/quantize/cuda/kernels/search.cuh>
#include <codegemm/quantize/cuda/kernels/search_measure.cuh>
#include <codegemm/quantize/cuda/kernels/search_paths.cuh>

namespace codegemm::cuda::detail {

/// Device memory, but for the numbers.
struct SearchProblem {
  LayerArgs layer;                       // scales and shape
  const float* books = nullptr;          // [m][centroids][v]
  const float* errors = nullptr;         // [rows][cols], W - W^ of the codes that are there
  const float* matrix = nullptr;         // [cols][cols]: H, or L where `rebuild`
  const double* start_losses = nullptr;  // [rows]: what a row's new codes must be below; null: nothing
  std::uint16_t* codes = nullptr;        // [rows][m][cols / v], in and out
  std::int32_t beam = 1;
  bool rebuild = false;  // SearchMode::kRebuild
};

/// Searches all rows in parallel. Memory is kept from one layer to the next.
class DeviceSearch {
 public:
  /// Puts the search into the work's stream; what failed is the work's.
  void run(DeviceWork& work, const SearchProblem& problem) {
    codegemm::detail::with_vec_len(problem.layer.v, [&](auto v) { search_rows<v>(work, problem); });
  }

 private:
  static constexpr std::int64_t kMostPathBytes = std::int64_t{1} << 29;  // of the rows searched at once

  template <int kVecLen>
  void search_rows(DeviceWork& work, const SearchProblem& p) {
    const std::int64_t cols = p.layer.cols;
    const std::int64_t of_row = p.beam * cols * static_cast<std::int64_t>(sizeof(float));
    const std::int64_t at_once = std::clamp<std::int64_t>(kMostPathBytes / of_row, 1, p.layer.rows);
    const std::int64_t all_codes = p.layer.m * (cols / kVecLen);
    for (int i = 0; i < (p.beam > 1 ? 2 : 1); ++i) {
      work.reserve(path_errors_[i], at_once * p.beam * cols);
      work.reserve(path_codes_[i], at_once * p.beam * all_codes);
    }
    work.reserve(losses_, at_once * p.beam);
    work.reserve(counts_, at_once);
    work.reserve(cross_, at_once * p.beam * kSearchColumns);
    const std::int64_t vectors = kSearchColumns / kVecLen;
    work.reserve(q_, vectors * kVecLen * kVecLen);
    work.reserve(blocks_, vectors * kVecLen * kVecLen);
    work.reserve(norms_, vectors * p.layer.m * p.layer.centroids);
    for (std::int64_t first = 0; first < p.layer.rows; first += at_once) {
      const std::int64_t rows = std::min<std::int64_t>(at_once, p.layer.rows - first);
      StartArgs begin;
      begin.errors = p.errors + first * cols;
      begin.codes = p.codes + first * all_codes;
      begin.path_errors = path_errors_[0].data();
      begin.path_codes = path_codes_[0].data();
      begin.losses = losses_.data();
      begin.counts = counts_.data();
      begin.cols = p.layer.cols;
      begin.all_codes = static_cast<std::int32_t>(all_codes);
      begin.beam = p.beam;
      work.start(start_paths_kernel<0>, begin, rows, kRowThreads);
      int from = 0;
      const std::int64_t stretches = DeviceWork::divide(cols, kSearchColumns);
      for (std::int64_t i = 0; i < stretches; ++i) {
        const std::int64_t column = (p.rebuild ? stretches - 1 - i : i) * kSearchColumns;
        const int to = p.beam > 1 ? 1 - from : from;
        search_stretch<kVecLen>(work, p, first, rows, column, from, to);
        from = to;
      }
      FinishArgs end;
      end.path_codes = path_codes_[from].data();
      end.losses = losses_.data();
      end.counts = counts_.data();
      end.start_losses = p.start_losses != nullptr ? p.start_losses + first : nullptr;
      end.codes = p.codes + first * all_codes;
      end.all_codes = static_cast<std::int32_t>(all_codes);
      end.beam = p.beam;
      work.start(finish_paths_kernel<0>, end, rows, kRowThreads);
    }
  }

  /// kSearchColumns columns of some rows, the paths going from one set of arrays to another.
  template <int kVecLen>
  void search_stretch(DeviceWork& work, const SearchProblem& p, std::int64_t first_row, std::int64_t rows,
                      std::int64_t column, int from, int to) {
    const std::int64_t cols = p.layer.cols;
    const std::int64_t width = std::min<std::int64_t>(kSearchColumns, cols - column);
    const float* const errors = path_errors_[from].data();
    if (!p.rebuild) {
      work.multiply(errors, cols, p.matrix + column, cols, rows * p.beam, cols, width, cross_.data());
    } else if (const std::int64_t chosen = column + width; chosen < cols) {
      work.multiply(errors + chosen, cols, p.matrix + chosen * cols + column, cols, rows * p.beam,
                    cols - chosen, width, cross_.data());
    } else {
      work.zero(cross_.data(), static_cast<std::size_t>(rows * p.beam * width) * sizeof(float));
    }
    MeasureArgs measure;
    measure.cross = p.matrix;
    measure.books = p.books;
    measure.q = q_.data();
    measure.factor = blocks_.data();
    measure.norms = norms_.data();
    measure.cols = cols;
    measure.first = column;
    measure.m = p.layer.m;
    measure.centroids = p.layer.centroids;
    measure.rebuild = p.rebuild;
    work.start(measure_kernel<kVecLen>, measure,
               dim3(static_cast<unsigned>(width / kVecLen), static_cast<unsigned>(p.layer.m),
                    static_cast<unsigned>(DeviceWork::divide(p.layer.centroids, kRowThreads))),
               kRowThreads);
    SearchArgs args;
    args.layer = p.layer;
    args.books = p.books;
    args.matrix = p.matrix;
    args.cross = cross_.data();
    args.q = q_.data();
    args.factor = blocks_.data();
    args.norms = norms_.data();
    args.errors_in = errors;
    args.errors_out = path_errors_[to].data();
    args.codes_in = path_codes_[from].data();
    args.codes_out = path_codes_[to].data();
    args.losses = losses_.data();
    args.counts = counts_.data();
    args.first_row = static_cast<std::int32_t>(first_row);
    args.first = static_cast<std::int32_t>(column);
    args.width = static_cast<std::int32_t>(width);
    args.beam = p.beam;
    args.rounds = p.rebuild && p.layer.m > 1 ? 2 : 1;
    args.rebuild = p.rebuild;
    const auto shared =
        static_cast<std::size_t>(SearchLayout(kVecLen, p.layer.m, p.beam).floats) * sizeof(float);
    if (shared > static_cast<std::size_t>(work.device().shared_bytes)) {
      return work.keep(codegemm::error(StatusCode::kUnsupported, "quantize_calibrated: ", p.layer.m,
                                       " codebooks and a beam of ", p.beam, " take ", shared,
                                       " bytes of shared memory, the card has ", work.device().shared_bytes));
    }
    const int threads = std::clamp(p.layer.centroids / 32 * 32, 32, kSearchThreads);
    work.start(search_kernel<kVecLen>, args, dim3(static_cast<unsigned>(rows)), threads, shared);
  }

  DeviceArray<float> path_errors_[2];         // [rows at once][beam][cols]
  DeviceArray<std::uint16_t> path_codes_[2];  // [rows at once][beam][m][cols / v]
  DeviceArray<double> losses_;                // [rows at once][beam]
  DeviceArray<std::int32_t> counts_;          // [rows at once]
  DeviceArray<float> cross_;                  // [rows at once][beam][columns of a stretch]
  DeviceArray<float> q_, blocks_, norms_;     // of a stretch's vectors: MeasureArgs
};

}  // namespace codegemm::cuda::detail
