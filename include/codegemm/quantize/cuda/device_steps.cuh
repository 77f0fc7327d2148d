// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/cuda/device_steps.cuh - the steps of the calibrated quantizer on a GPU.
// Layer: quantize/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <cub/device/device_radix_sort.cuh>

#include <codegemm/cuda/device_array.cuh>
#include <codegemm/quantize/calibrated.hpp>
#include <codegemm/quantize/cuda/cholesky.cuh>
#include <codegemm/quantize/cuda/device_search.cuh>
#include <codegemm/quantize/cuda/device_work.cuh>
#include <codegemm/quantize/cuda/kernels/rows.cuh>
#include <codegemm/quantize/cuda/kmeans.cuh>

namespace codegemm::cuda::detail {

using codegemm::detail::AdditiveState;
using codegemm::detail::CodebookSolver;
using codegemm::detail::SearchMode;

/// HostSteps on a GPU: products by cuBLAS in fp32, all else by kernels; the codebooks' small vectors stay on
/// the host. Memory is kept from one layer to the next. One thread, one stream.
class DeviceSteps {
 public:
  [[nodiscard]] static Result<DeviceSteps> create(const Device& device, cudaStream_t stream) {
    Result<DeviceWork> work = DeviceWork::create(device, stream);
    if (!work.ok()) return work.status();
    return DeviceSteps(*std::move(work));
  }

  [[nodiscard]] Status begin(AdditiveState& state) {
    s_ = &state;
    const Format f = state.format;
    layer_ = {};
    layer_.rows = static_cast<std::int32_t>(state.rows);
    layer_.cols = static_cast<std::int32_t>(state.cols);
    layer_.m = static_cast<std::int32_t>(f.m);
    layer_.v = static_cast<std::int32_t>(f.v);
    layer_.centroids = static_cast<std::int32_t>(f.centroids());
    layer_.group = static_cast<std::int32_t>(state.group_length());
    layer_.groups = static_cast<std::int32_t>(state.groups());
    if (state.rows * state.vectors() > std::numeric_limits<std::int32_t>::max()) {
      return codegemm::error(StatusCode::kUnsupported, "quantize_calibrated: ", state.rows, " x ", state.cols,
                             " have more vectors than a GPU's 32-bit places count");
    }
    work_.reserve(weights_, state.rows * state.cols);
    if (work_.ok()) {
      const std::size_t width = static_cast<std::size_t>(state.cols) * sizeof(float);
      work_.keep(cuda_status(
          cudaMemcpy2DAsync(weights_.data(), width, state.weights.data,
                            static_cast<std::size_t>(state.weights.stride) * sizeof(float), width,
                            static_cast<std::size_t>(state.rows), cudaMemcpyHostToDevice, work_.stream()),
          "cudaMemcpy2DAsync"));
    }
    work_.reserve(gram_, state.cols * state.cols);
    work_.copy(gram_.data(), state.gram.data(), state.cols * state.cols, cudaMemcpyHostToDevice);
    work_.reserve(codes_, state.rows * f.m * state.vectors());
    work_.reserve(scales_, state.rows * state.groups());
    if (!state.codes.empty()) {
      work_.put(codes_, state.codes);
      work_.put(scales_, state.scales);
      work_.put(books_, book_values(state));
    }
    for (DeviceArray<float>* x : {&error_, &product_}) work_.reserve(*x, state.rows * state.cols);
    work_.reserve(row_sums_, state.rows);
    layer_.weights = weights_.data();
    layer_.codes = codes_.data();
    layer_.scales = scales_.data();
    return work_.finish();
  }

  [[nodiscard]] Status start(const KMeansOptions& options, const std::vector<float>& importance,
                             Executor& executor) {
    const auto trained = codegemm::detail::train_books(
        s_->weights, s_->format, options, importance, executor,
        [&](const TrainingSet& set) { return DeviceVectors(set, s_->format, work_, kmeans_); });
    if (!trained.ok()) return trained.status();
    s_->books = trained->books;
    s_->scales.resize(static_cast<std::size_t>(s_->rows * s_->groups()));
    for (std::int64_t n = 0; n < s_->rows; ++n) {
      for (std::int64_t g = 0; g < s_->groups(); ++g)
        s_->scales_of(n)[g] =
            trained->groups.scales[static_cast<std::size_t>(g * s_->rows + n)] / trained->groups.factor;
    }
    s_->codes.resize(static_cast<std::size_t>(s_->rows * s_->format.m * s_->vectors()));
    work_.put(scales_, s_->scales);
    work_.put(books_, book_values(*s_));
    encode_rows(work_, kmeans_, layer_, s_->books, books_.data(), codes_.data(), scales_.data(), options);
    return work_.finish();
  }

  [[nodiscard]] Result<bool> factor() {
    work_.reserve(factor_, s_->cols * s_->cols);
    work_.reserve(failed_, 1);
    work_.copy(factor_.data(), gram_.data(), s_->cols * s_->cols, cudaMemcpyDeviceToDevice);
    factor_lower(work_, factor_.data(), s_->cols, failed_.data());
    const bool failed = work_.get(failed_.data(), 1).front() != 0;
    if (Status status = work_.finish(); !status.ok()) return status;
    return !failed;
  }

  [[nodiscard]] Result<double> error(bool residual) {
    const float* of = weights_.data();
    if (residual) {
      decode(books_.data(), DecodeKind::kResidual, error_.data());
      of = error_.data();
    }
    multiply(of, layer_.cols, gram_.data(), layer_.rows, layer_.cols, layer_.cols, product_.data());
    row_products(of, row_sums_.data());
    const std::vector<double> sums = work_.get(row_sums_.data(), layer_.rows);
    if (Status status = work_.finish(); !status.ok()) return status;
    double out = 0.0;
    for (const double sum : sums) out += sum;
    return out;
  }

  [[nodiscard]] Status fit_codebooks(int steps) {
    list_uses();
    CodebookSolver<DeviceSteps>(*s_, *this).run(steps);
    work_.put(books_, book_values(*s_));
    return work_.finish();
  }

  [[nodiscard]] Status fit_scales() {
    decode(books_.data(), DecodeKind::kUnscaled, product_.data());
    decode(books_.data(), DecodeKind::kResidual, error_.data());
    const std::int64_t length = layer_.group;
    work_.reserve(gradient_, layer_.rows * std::min<std::int64_t>(length, layer_.cols));
    work_.reserve(curvature_, layer_.rows * std::min<std::int64_t>(length, layer_.cols));
    for (std::int64_t g = 0; g < layer_.groups; ++g) {
      const std::int64_t at = g * length;
      const std::int64_t width = std::min(length, layer_.cols - at);
      multiply(error_.data(), layer_.cols, gram_.data() + at, layer_.rows, layer_.cols, width,
               gradient_.data());
      multiply(product_.data() + at, layer_.cols, gram_.data() + at * layer_.cols + at, layer_.rows, width,
               width, curvature_.data());
      ScaleArgs args;
      args.unscaled = product_.data();
      args.left = error_.data();
      args.gradient = gradient_.data();
      args.curvature = curvature_.data();
      args.scales = scales_.data();
      args.rows = layer_.rows;
      args.cols = layer_.cols;
      args.at = static_cast<std::int32_t>(at);
      args.width = static_cast<std::int32_t>(width);
      args.group = static_cast<std::int32_t>(g);
      args.groups = layer_.groups;
      work_.start(fit_scale_kernel<0>, args, divide(layer_.rows, kRowThreads / 32), kRowThreads);
    }
    return work_.finish();
  }

  [[nodiscard]] Status search(SearchMode mode, int beam) {
    const bool rebuild = mode == SearchMode::kRebuild;
    decode(books_.data(), DecodeKind::kResidual, error_.data());
    if (rebuild) {
      multiply(error_.data(), layer_.cols, gram_.data(), layer_.rows, layer_.cols, layer_.cols,
               product_.data());
      row_products(error_.data(), row_sums_.data());
    }
    SearchProblem problem;
    problem.layer = layer_;
    problem.books = books_.data();
    problem.errors = error_.data();
    problem.matrix = rebuild ? factor_.data() : gram_.data();
    problem.start_losses = rebuild ? row_sums_.data() : nullptr;
    problem.codes = codes_.data();
    problem.beam = beam;
    problem.rebuild = rebuild;
    search_.run(work_, problem);
    return work_.finish();
  }

  [[nodiscard]] Status end() {
    work_.copy(s_->codes.data(), codes_.data(), std::ssize(s_->codes), cudaMemcpyDeviceToHost);
    work_.copy(s_->scales.data(), scales_.data(), std::ssize(s_->scales), cudaMemcpyDeviceToHost);
    return work_.finish();
  }

  // For CodebookSolver, as HostCodebookSums; zeros after a failure.

  [[nodiscard]] std::vector<float> normal_map(const std::vector<float>& x, bool residual) {
    work_.put(trial_, x);
    decode(trial_.data(), residual ? DecodeKind::kResidual : DecodeKind::kScaled, error_.data());
    multiply(error_.data(), layer_.cols, gram_.data(), layer_.rows, layer_.cols, layer_.cols,
             product_.data());
    return sum_uses(sum_uses_kernel<false>, product_.data(), layer_.v);
  }
  [[nodiscard]] std::vector<float> blocks() {
    return sum_uses(sum_uses_kernel<true>, gram_.data(), layer_.v * layer_.v);
  }

 private:
  static constexpr std::int64_t kUsesWarps = 4096;

  explicit DeviceSteps(DeviceWork work) : work_(std::move(work)) {}

  [[nodiscard]] static std::int64_t divide(std::int64_t a, std::int64_t b) {
    return DeviceWork::divide(a, b);
  }

  /// out[rows][width] = a[rows][inner] b[inner][width]; rows of a are a_stride apart, those of b cols.
  void multiply(const float* a, std::int64_t a_stride, const float* b, std::int64_t rows, std::int64_t inner,
                std::int64_t width, float* out) {
    work_.multiply(a, a_stride, b, layer_.cols, rows, inner, width, out);
  }

  void decode(const float* books, DecodeKind kind, float* out) {
    DecodeArgs args;
    args.layer = layer_;
    args.books = books;
    args.out = out;
    args.kind = kind;
    work_.start(decode_rows_kernel<0>, args, divide(s_->rows * s_->vectors(), kRowThreads), kRowThreads);
  }
  /// The dot product of each row of `a` with product_'s.
  void row_products(const float* a, double* sums) {
    ProductArgs args;
    args.a = a;
    args.b = product_.data();
    args.sums = sums;
    args.cols = layer_.cols;
    work_.start(row_products_kernel<0>, args, layer_.rows, kRowThreads);
  }

  /// places_ and begins_: where each centroid is used, in the order of rows.
  void list_uses() {
    const std::int64_t uses = s_->rows * s_->vectors();
    for (DeviceArray<std::uint16_t>* x : {&keys_, &sorted_keys_}) work_.reserve(*x, layer_.m * uses);
    for (DeviceArray<std::int32_t>* x : {&unsorted_, &places_}) work_.reserve(*x, layer_.m * uses);
    work_.reserve(begins_, layer_.m * (std::int64_t{layer_.centroids} + 1));
    KeysArgs keys;
    keys.layer = layer_;
    keys.keys = keys_.data();
    keys.places = unsorted_.data();
    work_.start(list_keys_kernel<0>, keys, divide(uses, kRowThreads), kRowThreads);
    const auto sort = [&](void* memory, std::size_t& bytes, std::int64_t c) {
      work_.keep(cuda_status(cub::DeviceRadixSort::SortPairs(
                                 memory, bytes, keys_.data() + c * uses, sorted_keys_.data() + c * uses,
                                 unsorted_.data() + c * uses, places_.data() + c * uses,
                                 static_cast<int>(uses), 0, static_cast<int>(s_->format.b), work_.stream()),
                             "cub::DeviceRadixSort"));
    };
    std::size_t bytes = 0;
    if (work_.ok()) sort(nullptr, bytes, 0);
    work_.reserve(sort_memory_, static_cast<std::int64_t>(bytes));
    for (std::int64_t c = 0; c < layer_.m && work_.ok(); ++c) sort(sort_memory_.data(), bytes, c);
    BeginsArgs begins;
    begins.keys = sorted_keys_.data();
    begins.begins = begins_.data();
    begins.count = uses;
    begins.centroids = layer_.centroids;
    work_.start(list_begins_kernel<0>, begins,
                dim3(static_cast<unsigned>(divide(std::int64_t{layer_.centroids} + 1, kRowThreads)),
                     static_cast<unsigned>(layer_.m)),
                kRowThreads);
  }

  [[nodiscard]] std::vector<float> sum_uses(void (*kernel)(UsesArgs), const float* values,
                                            std::int32_t width) {
    const std::int64_t centroids = std::int64_t{layer_.m} * layer_.centroids;
    UsesArgs args;
    args.layer = layer_;
    args.places = places_.data();
    args.begins = begins_.data();
    args.values = values;
    args.of_centroid = static_cast<std::int32_t>(std::max<std::int64_t>(1, kUsesWarps / centroids));
    args.width = width;
    work_.reserve(parts_, centroids * args.of_centroid * width);
    work_.reserve(sums_, centroids * width);
    args.parts = parts_.data();
    work_.start(kernel, args, divide(centroids * args.of_centroid, kUsesThreads / 32), kUsesThreads);
    AddUsesArgs add;
    add.parts = parts_.data();
    add.out = sums_.data();
    add.count = centroids * width;
    add.of_centroid = args.of_centroid;
    add.width = width;
    work_.start(add_uses_kernel<0>, add, divide(add.count, kRowThreads), kRowThreads);
    return work_.get(sums_.data(), centroids * width);
  }

  DeviceWork work_;
  AdditiveState* s_ = nullptr;
  LayerArgs layer_;
  DeviceArray<float> weights_, gram_, factor_, scales_, books_;
  DeviceArray<std::uint16_t> codes_;
  DeviceArray<std::int32_t> failed_;  // of factor()
  KMeansMemory kmeans_;
  DeviceArray<float> error_, product_;       // [rows][cols]
  DeviceArray<double> row_sums_;             // [rows]
  DeviceArray<float> gradient_, curvature_;  // [rows][columns of a group]
  // Of fit_codebooks().
  DeviceArray<float> trial_, sums_;
  DeviceArray<double> parts_;
  DeviceArray<std::uint16_t> keys_, sorted_keys_;
  DeviceArray<std::int32_t> unsorted_, places_, begins_;
  DeviceArray<std::byte> sort_memory_;
  DeviceSearch search_;
};

}  // namespace codegemm::cuda::detail
