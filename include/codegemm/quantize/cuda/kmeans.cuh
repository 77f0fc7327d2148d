// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/kmeans.cuh - k-means on a GPU: what the calibrated quantizer begins with.
// Layer: quantize/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <codegemm/format.hpp>
#include <codegemm/quantize/additive.hpp>
#include <codegemm/quantize/additive_state.hpp>
#include <codegemm/quantize/cuda/device_work.cuh>
#include <codegemm/quantize/cuda/kernels/kmeans.cuh>
#include <codegemm/quantize/kmeans.hpp>

namespace codegemm::cuda::detail {

using codegemm::detail::SearchBook;
using codegemm::detail::TrainingSet;

/// Device memory of one run of k-means after the other.
struct KMeansMemory {
  DeviceArray<float> left, weights, values, half_norms;
  DeviceArray<std::uint16_t> codes;
  DeviceArray<double> sums;
};

/// HostVectors on a GPU. What failed is the work's.
class DeviceVectors {
 public:
  DeviceVectors(const TrainingSet& set, Format f, DeviceWork& work, KMeansMemory& memory)
      : set_(set), work_(work), memory_(memory) {
    work_.put(memory_.left, set.x);
    work_.put(memory_.weights, set.weights);
    work_.reserve(memory_.codes, f.m * set.count);
  }

  [[nodiscard]] std::vector<float> left() const {
    return work_.get(memory_.left.data(), set_.count * set_.v);
  }
  [[nodiscard]] std::vector<std::uint16_t> codes(std::int64_t c) const {
    return work_.get(own(c), set_.count);
  }
  void assign(const SearchBook& book, std::int64_t c) {
    put(book);
    AssignArgs args;
    args.book = {memory_.values.data(), memory_.half_norms.data(), static_cast<std::int32_t>(book.centroids)};
    args.x = memory_.left.data();
    args.codes = own(c);
    args.count = set_.count;
    const std::int64_t blocks = DeviceWork::divide(set_.count, kNearestThreads);
    codegemm::detail::with_vec_len(
        set_.v, [&](auto v) { work_.start(assign_kernel<v>, args, blocks, kNearestThreads); });
  }
  void subtract(const SearchBook& book, std::int64_t c, float sign) {
    put(book);
    SubtractArgs args;
    args.values = memory_.values.data();
    args.codes = own(c);
    args.x = memory_.left.data();
    args.count = set_.count * set_.v;
    args.v = set_.v;
    args.sign = sign;
    work_.start(subtract_kernel<0>, args, DeviceWork::divide(args.count, kRowThreads), kRowThreads);
  }
  [[nodiscard]] std::vector<double> sums(const SearchBook& book, std::int64_t c) const {
    const std::int64_t size = book.centroids * (book.v + 1);
    work_.reserve(memory_.sums, size);
    MeansArgs args;
    args.x = memory_.left.data();
    args.weights = memory_.weights.data();
    args.codes = own(c);
    args.sums = memory_.sums.data();
    args.count = set_.count;
    codegemm::detail::with_vec_len(
        book.v, [&](auto v) { work_.start(means_kernel<v>, args, book.centroids, kMeansThreads); });
    return work_.get(memory_.sums.data(), size);
  }

 private:
  [[nodiscard]] std::uint16_t* own(std::int64_t c) const { return memory_.codes.data() + c * set_.count; }
  void put(const SearchBook& book) {
    work_.put(memory_.values, book.values);
    work_.put(memory_.half_norms, book.half_norms);
  }

  const TrainingSet& set_;
  DeviceWork& work_;
  KMeansMemory& memory_;
};

/// New codes and scales of a whole layer, as quantize_row(): `layer` has weights, scales to begin with and
/// room for codes, `books` the codebooks.
inline void encode_rows(DeviceWork& work, KMeansMemory& memory, const LayerArgs& layer,
                        const std::vector<SearchBook>& books, const float* values, std::uint16_t* codes,
                        float* scales, const KMeansOptions& options) {
  std::vector<float> half_norms;
  for (const SearchBook& book : books)
    half_norms.insert(half_norms.end(), book.half_norms.begin(), book.half_norms.end());
  work.put(memory.half_norms, half_norms);
  EncodeArgs encode;
  encode.layer = layer;
  encode.books = values;
  encode.half_norms = memory.half_norms.data();
  encode.codes = codes;
  RefitArgs refit;
  refit.layer = layer;
  refit.books = values;
  refit.scales = scales;
  const std::int64_t vectors = static_cast<std::int64_t>(layer.rows) * (layer.cols / layer.v);
  const std::int64_t blocks = DeviceWork::divide(vectors, kNearestThreads);
  for (int i = 0; i < std::max(1, options.refits); ++i) {
    encode.fresh = i == 0 || layer.m == 1;
    encode.rounds = layer.m == 1 ? 0 : i == 0 ? options.encode_rounds : 1;
    codegemm::detail::with_vec_len(
        layer.v, [&](auto v) { work.start(encode_kernel<v>, encode, blocks, kNearestThreads); });
    work.start(refit_kernel<0>, refit,
               DeviceWork::divide(static_cast<std::int64_t>(layer.rows) * layer.groups, kRowThreads / 32),
               kRowThreads);
  }
}

}  // namespace codegemm::cuda::detail
