// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/composed.cuh - layers whose weights are made of parameters, all of a model at once:
// low-rank deltas, or codebooks and scales of fixed codes.
// Layer: train/cuda (host, needs nvcc).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <cub/device/device_radix_sort.cuh>

#include <codegemm/quantized_matrix.hpp>
#include <prefillshare/train/cuda/kernels/composed.cuh>
#include <prefillshare/train/cuda/train_stream.cuh>

namespace prefillshare::cuda::detail {

/// Pairs of a task and a first row or column, a block each.
class ComposeBlocks {
 public:
  /// [first, first + size) of a task.
  void add(std::size_t task, std::int64_t first, std::int64_t size, std::int64_t of_block) {
    for (std::int64_t at = 0; at < size; at += of_block) {
      pairs_.push_back(static_cast<std::int32_t>(task));
      pairs_.push_back(static_cast<std::int32_t>(first + at));
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
    by_rows_.add(tasks_.size(), 0, task.rows, kComposeRows);
    by_columns_.add(tasks_.size(), 0, task.cols, kComposeThreads);
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

/// Layers of codes. Which vectors a centroid's gradient is summed from is listed when the codes are set.
class CodesLayers {
 public:
  /// `task` lacks its codes, which are taken from `matrix`. dbooks: [m][centroids][v], device memory.
  /// kUnsupported for a layer that 32-bit places cannot count, kOutOfMemory.
  [[nodiscard]] Status add(CodesTask task, const codegemm::QuantizedMatrix& matrix, float* dbooks) {
    const codegemm::Format f = matrix.format();
    const codegemm::QuantizedMatrixView view = matrix.view();
    const std::int64_t vectors = matrix.cols() / f.v;
    const std::int64_t count = matrix.rows() * vectors;
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    if (matrix.rows() * matrix.cols() > kMost || vectors_ + f.m * count > kMost || f.v > kVectorMost) {
      return codegemm::error(StatusCode::kUnsupported, "codebooks of a layer of ", matrix.rows(), " x ",
                             matrix.cols(), " behind ", vectors_, " vectors: too many to train on a GPU");
    }
    task.rows = static_cast<std::int32_t>(matrix.rows());
    task.cols = static_cast<std::int32_t>(matrix.cols());
    task.m = static_cast<std::int32_t>(f.m);
    task.centroids = static_cast<std::int32_t>(f.centroids());
    task.v = static_cast<std::int32_t>(f.v);
    task.group = static_cast<std::int32_t>(f.g < 0 ? matrix.cols() : f.g);
    task.groups = static_cast<std::int32_t>(f.scale_groups(matrix.cols()));
    std::vector<std::uint16_t> codes;
    codes.reserve(static_cast<std::size_t>(f.m * count));
    for (std::int64_t n = 0; n < matrix.rows(); ++n) {
      for (std::int64_t c = 0; c < f.m; ++c) {
        for (std::int64_t j = 0; j < vectors; ++j)
          codes.push_back(static_cast<std::uint16_t>(view.code(c, n, j)));
      }
    }
    for (std::int64_t c = 0; c < f.m; ++c) {
      BookTask book;
      book.to = dbooks + c * task.centroids * f.v;
      book.task = static_cast<std::int32_t>(tasks_.size());
      book.book = static_cast<std::int32_t>(c);
      book.first = static_cast<std::int32_t>(vectors_);
      book.count = static_cast<std::int32_t>(count);
      book.centroid = static_cast<std::int32_t>(centroids_);
      book.parts =
          static_cast<std::int32_t>(std::max<std::int64_t>(1, count / task.centroids / kPartVectors));
      book.part = static_cast<std::int32_t>(parts_);
      by_parts_.add(books_.size(), parts_, book.parts * std::int64_t{task.centroids}, 1);
      vectors_ += count;
      centroids_ += task.centroids;
      parts_ += book.parts * std::int64_t{task.centroids};
      most_centroids_ = std::max(most_centroids_, task.centroids);
      bits_.push_back(static_cast<int>(f.b));
      books_.push_back(book);
    }
    Allocations memory;
    memory.copy<std::uint16_t>(codes_.emplace_back(), codes);
    task.codes = codes_.back().data();
    by_rows_.add(tasks_.size(), 0, task.rows, kComposeRows);
    tasks_.push_back(task);
    sizes_.push_back(unscaled_size(matrix, codes));
    return memory.finish();
  }
  [[nodiscard]] Status upload() {
    Allocations memory;
    memory.copy<CodesTask>(device_, tasks_);
    memory.copy<BookTask>(device_books_, books_);
    memory.make(begins_, centroids_ + std::ssize(books_));
    for (auto* const x : {&keys_, &sorted_keys_}) memory.make(*x, vectors_);
    for (auto* const x : {&unsorted_, &places_}) memory.make(*x, vectors_);
    memory.make(part_sums_, parts_ * kVectorMost);
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < books_.size(); ++i) {
      std::size_t own = 0;
      if (Status s = sort(nullptr, own, i, nullptr); !s.ok()) return s;
      bytes = std::max(bytes, own);
    }
    memory.make(sort_memory_, static_cast<std::int64_t>(bytes));
    by_rows_.upload(memory);
    by_parts_.upload(memory);
    return memory.finish();
  }
  /// After the codes were set or changed.
  void list(TrainStream& ts) {
    if (books_.empty()) return;
    const auto books = static_cast<unsigned>(books_.size());
    ListArgs args;
    args.tasks = device_.data();
    args.books = device_books_.data();
    args.codes = keys_.data();
    args.places = unsorted_.data();
    args.sorted = sorted_keys_.data();
    args.begins = begins_.data();
    ts.start(list_codes_kernel<0>, args, dim3(kListBlocks, books), kComposeThreads);
    for (std::size_t i = 0; i < books_.size() && ts.ok(); ++i) {
      std::size_t bytes = sort_memory_.size();
      ts.keep(sort(sort_memory_.data(), bytes, i, ts.stream()));
    }
    ts.start(list_centroids_kernel<0>, args,
             dim3(static_cast<unsigned>((most_centroids_ + kComposeThreads) / kComposeThreads), books),
             kComposeThreads);
  }
  template <class S>
  void materialize(TrainStream& ts) const {
    ts.start(codes_kernel<S>, {device_.data(), by_rows_.data()}, by_rows_.blocks(), kComposeThreads);
  }
  void pull_back(TrainStream& ts) const {
    ts.start(codes_dscales_kernel<0>, {device_.data(), by_rows_.data()}, by_rows_.blocks(), kComposeThreads);
    CentroidPartsArgs parts;
    parts.tasks = device_.data();
    parts.books = device_books_.data();
    parts.blocks = by_parts_.data();
    parts.places = places_.data();
    parts.begins = begins_.data();
    parts.sums = part_sums_.data();
    ts.start(centroid_parts_kernel<0>, parts, by_parts_.blocks(), kCentroidThreads);
    CentroidSumsArgs sums;
    sums.tasks = device_.data();
    sums.books = device_books_.data();
    sums.sums = part_sums_.data();
    ts.start(
        centroid_sums_kernel<0>, sums,
        dim3(static_cast<unsigned>((most_centroids_ * kVectorMost + kComposeThreads - 1) / kComposeThreads),
             static_cast<unsigned>(books_.size())),
        kComposeThreads);
  }

  [[nodiscard]] const std::vector<CodesTask>& tasks() const noexcept { return tasks_; }
  [[nodiscard]] const CodesTask* device_tasks() const noexcept { return device_.data(); }
  /// Root mean square of layer i's vectors without their scales, at the beginning.
  [[nodiscard]] float size(std::size_t i) const { return sizes_[i]; }
  /// Of layer i, [rows][m][cols / v], device memory. list() is due after a change.
  [[nodiscard]] std::uint16_t* codes(std::size_t i) const { return codes_[i].data(); }

 private:
  static constexpr std::int32_t kPartVectors = 1024;  // of a block, about
  static constexpr unsigned kListBlocks = 64;

  /// codes: [rows][m][vectors].
  [[nodiscard]] static float unscaled_size(const codegemm::QuantizedMatrix& matrix,
                                           const std::vector<std::uint16_t>& codes) {
    const codegemm::Format f = matrix.format();
    const std::int64_t vectors = matrix.cols() / f.v;
    std::vector<float> books;
    for (const codegemm::Half value : matrix.codebooks()) books.push_back(value.to_float());
    double squares = 0.0;
    for (std::int64_t n = 0; n < matrix.rows(); ++n) {
      const std::uint16_t* const own = codes.data() + n * f.m * vectors;
      for (std::int64_t j = 0; j < vectors; ++j) {
        for (std::int64_t d = 0; d < f.v; ++d) {
          float sum = 0.0F;
          for (std::int64_t c = 0; c < f.m; ++c)
            sum += books[static_cast<std::size_t>((c * f.centroids() + own[c * vectors + j]) * f.v + d)];
          squares += static_cast<double>(sum * sum);
        }
      }
    }
    return static_cast<float>(
        std::sqrt(squares / static_cast<double>(std::max<std::int64_t>(1, matrix.rows() * matrix.cols()))));
  }

  [[nodiscard]] Status sort(void* memory, std::size_t& bytes, std::size_t book, cudaStream_t stream) {
    const std::int64_t at = books_[book].first;
    return codegemm::cuda::cuda_status(
        cub::DeviceRadixSort::SortPairs(memory, bytes, keys_.data() + at, sorted_keys_.data() + at,
                                        unsorted_.data() + at, places_.data() + at, books_[book].count, 0,
                                        bits_[book], stream),
        "cub::DeviceRadixSort");
  }

  std::vector<CodesTask> tasks_;
  std::vector<BookTask> books_;
  std::vector<float> sizes_;
  std::vector<int> bits_;            // of each book's codes
  std::int64_t vectors_ = 0;         // of all books
  std::int64_t centroids_ = 0;       // of all books
  std::int64_t parts_ = 0;           // of all books
  std::int32_t most_centroids_ = 0;  // of a book
  std::vector<DeviceArray<std::uint16_t>> codes_;
  DeviceArray<CodesTask> device_;
  DeviceArray<BookTask> device_books_;
  DeviceArray<std::uint16_t> keys_, sorted_keys_;
  DeviceArray<std::int32_t> unsorted_, places_, begins_;
  DeviceArray<std::byte> sort_memory_;
  DeviceArray<float> part_sums_;
  ComposeBlocks by_rows_, by_parts_;
};

}  // namespace prefillshare::cuda::detail
