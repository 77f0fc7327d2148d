// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/composed.cuh - layers whose weights are made of parameters, all of a model at once:
// low-rank deltas, or codebooks and scales of fixed codes.
// Layer: train/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <codegemm/quantized_matrix.hpp>
#include <prefillshare/train/cuda/kernels/composed.cuh>
#include <prefillshare/train/cuda/train_stream.cuh>

namespace prefillshare::cuda::detail {

/// Pairs of a task and a first row or column, a block each.
class ComposeBlocks {
 public:
  void add(std::size_t task, std::int64_t size, std::int64_t of_block) {
    for (std::int64_t at = 0; at < size; at += of_block) {
      pairs_.push_back(static_cast<std::int32_t>(task));
      pairs_.push_back(static_cast<std::int32_t>(at));
    }
  }
  void upload(Allocations& memory) { memory.copy<std::int32_t>(device_, pairs_); }
  [[nodiscard]] const std::int32_t* data() const { return device_.data(); }
  [[nodiscard]] std::int64_t blocks() const { return static_cast<std::int64_t>(pairs_.size() / 2); }

 private:
  std::vector<std::int32_t> pairs_;
  DeviceArray<std::int32_t> device_;
};

/// W + scale * B A of some layers.
class LowRankLayers {
 public:
  void add(const LowRankTask& task) {
    by_rows_.add(tasks_.size(), task.rows, kComposeRows);
    by_columns_.add(tasks_.size(), task.cols, kComposeThreads);
    tasks_.push_back(task);
  }
  [[nodiscard]] Status upload() {
    Allocations memory;
    memory.copy<LowRankTask>(device_, tasks_);
    by_rows_.upload(memory);
    by_columns_.upload(memory);
    return memory.finish();
  }
  template <class S>
  void materialize(TrainStream& ts) const {
    ts.start(low_rank_kernel<S>, {device_.data(), by_rows_.data()}, by_rows_.blocks(), kComposeThreads);
  }
  void pull_back(TrainStream& ts) const {
    ts.start(low_rank_db_kernel<0>, {device_.data(), by_rows_.data()}, by_rows_.blocks(), kComposeThreads);
    ts.start(low_rank_da_kernel<0>, {device_.data(), by_columns_.data()}, by_columns_.blocks(),
             kComposeThreads);
  }

 private:
  std::vector<LowRankTask> tasks_;
  DeviceArray<LowRankTask> device_;
  ComposeBlocks by_rows_;
  ComposeBlocks by_columns_;
};

/// Layers of codes. What a centroid's gradient is summed from is listed once, as codes never change.
class CodesLayers {
 public:
  /// `task` lacks its codes, which are taken from `matrix`. dbooks: [m][centroids][v], device memory.
  /// kUnsupported for a layer that 32-bit places cannot count, kOutOfMemory.
  [[nodiscard]] Status add(CodesTask task, const codegemm::QuantizedMatrix& matrix, float* dbooks) {
    const codegemm::Format f = matrix.format();
    const codegemm::QuantizedMatrixView view = matrix.view();
    const std::int64_t vectors = matrix.cols() / f.v;
    const std::int64_t count = matrix.rows() * vectors * f.m;
    if (matrix.rows() * matrix.cols() > std::numeric_limits<std::int32_t>::max() ||
        std::ssize(places_) + count > std::numeric_limits<std::int32_t>::max() || f.v > kVectorMost) {
      return codegemm::error(StatusCode::kUnsupported, "codebooks of a layer of ", matrix.rows(), " x ",
                             matrix.cols(), " behind ", places_.size(),
                             " vectors: too many to train on a GPU");
    }
    task.rows = static_cast<std::int32_t>(matrix.rows());
    task.cols = static_cast<std::int32_t>(matrix.cols());
    task.m = static_cast<std::int32_t>(f.m);
    task.centroids = static_cast<std::int32_t>(f.centroids());
    task.v = static_cast<std::int32_t>(f.v);
    task.group = static_cast<std::int32_t>(f.g < 0 ? matrix.cols() : f.g);
    task.groups = static_cast<std::int32_t>(f.scale_groups(matrix.cols()));
    const auto number = static_cast<std::int32_t>(tasks_.size());
    std::vector<std::uint16_t> codes(static_cast<std::size_t>(count));
    std::vector<std::int32_t> begin(static_cast<std::size_t>(task.centroids) + 1);
    const std::size_t base = places_.size();
    places_.resize(base + static_cast<std::size_t>(count));
    std::size_t of_book = base;
    for (std::int64_t c = 0; c < f.m; ++c) {
      // A counting sort of the vectors by code keeps them in the order of rows.
      std::fill(begin.begin(), begin.end(), 0);
      for (std::int64_t n = 0; n < matrix.rows(); ++n) {
        for (std::int64_t j = 0; j < vectors; ++j) {
          const std::uint32_t code = view.code(c, n, j);
          codes[static_cast<std::size_t>((n * f.m + c) * vectors + j)] = static_cast<std::uint16_t>(code);
          ++begin[code + 1];
        }
      }
      for (std::size_t code = 1; code < begin.size(); ++code) begin[code] += begin[code - 1];
      for (std::int32_t code = 0; code < task.centroids; ++code) {
        CentroidSum sum;
        sum.to = dbooks + (c * task.centroids + code) * f.v;
        sum.v = task.v;
        sum.begin = static_cast<std::int32_t>(parts_.size());
        const auto end = static_cast<std::int32_t>(of_book) + begin[static_cast<std::size_t>(code) + 1];
        for (std::int32_t at = static_cast<std::int32_t>(of_book) + begin[static_cast<std::size_t>(code)];
             at < end; at += kPartVectors)
          parts_.push_back({number, at, std::min(end, at + kPartVectors)});
        sum.end = static_cast<std::int32_t>(parts_.size());
        if (sum.end > sum.begin) sums_.push_back(sum);
      }
      for (std::int64_t n = 0; n < matrix.rows(); ++n) {
        for (std::int64_t j = 0; j < vectors; ++j) {
          std::int32_t& at = begin[codes[static_cast<std::size_t>((n * f.m + c) * vectors + j)]];
          places_[of_book + static_cast<std::size_t>(at++)] =
              static_cast<std::int32_t>(n * matrix.cols() + j * f.v);
        }
      }
      of_book += static_cast<std::size_t>(matrix.rows() * vectors);
    }
    Allocations memory;
    memory.copy<std::uint16_t>(codes_.emplace_back(), codes);
    task.codes = codes_.back().data();
    by_rows_.add(tasks_.size(), task.rows, kComposeRows);
    tasks_.push_back(task);
    return memory.finish();
  }
  [[nodiscard]] Status upload() {
    Allocations memory;
    memory.copy<CodesTask>(device_, tasks_);
    memory.copy<std::int32_t>(device_places_, places_);
    memory.copy<CentroidPart>(device_parts_, parts_);
    memory.copy<CentroidSum>(device_sums_, sums_);
    memory.make(part_sums_, std::ssize(parts_) * kVectorMost);
    by_rows_.upload(memory);
    return memory.finish();
  }
  template <class S>
  void materialize(TrainStream& ts) const {
    ts.start(codes_kernel<S>, {device_.data(), by_rows_.data()}, by_rows_.blocks(), kComposeThreads);
  }
  void pull_back(TrainStream& ts) const {
    ts.start(codes_dscales_kernel<0>, {device_.data(), by_rows_.data()}, by_rows_.blocks(), kComposeThreads);
    CentroidPartsArgs parts;
    parts.tasks = device_.data();
    parts.parts = device_parts_.data();
    parts.places = device_places_.data();
    parts.sums = part_sums_.data();
    ts.start(centroid_parts_kernel<0>, parts, std::ssize(parts_), kCentroidThreads);
    CentroidSumsArgs sums;
    sums.centroids = device_sums_.data();
    sums.sums = part_sums_.data();
    sums.count = std::ssize(sums_);
    ts.start(centroid_sums_kernel<0>, sums,
             (sums.count * kVectorMost + kComposeThreads - 1) / kComposeThreads, kComposeThreads);
  }

 private:
  static constexpr std::int32_t kPartVectors = 2048;  // of a block

  std::vector<CodesTask> tasks_;
  std::vector<std::int32_t> places_;
  std::vector<CentroidPart> parts_;
  std::vector<CentroidSum> sums_;
  std::vector<DeviceArray<std::uint16_t>> codes_;
  DeviceArray<CodesTask> device_;
  DeviceArray<std::int32_t> device_places_;
  DeviceArray<CentroidPart> device_parts_;
  DeviceArray<CentroidSum> device_sums_;
  DeviceArray<float> part_sums_;
  ComposeBlocks by_rows_;
};

}  // namespace prefillshare::cuda::detail
