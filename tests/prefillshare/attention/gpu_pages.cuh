// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/attention/gpu_pages.cuh - a batch of sequences in scattered pages, and attention over
// them in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include <prefillshare/attention/cuda/kv_pages.hpp>
#include <prefillshare/kv/element.hpp>

#include "../../codegemm/cuda/gpu.cuh"

namespace prefillshare::test {

using codegemm::BFloat16;
using codegemm::Half;
using codegemm::MatrixView;
using codegemm::Status;
using codegemm::StatusCode;
using codegemm::test::as_float;
using codegemm::test::DeviceBuffer;
using codegemm::test::Rng;

inline float as_float(Fp8E4M3 value) { return value.to_float(); }

/// Consecutive sequences of a batch that share their first pages.
struct SharedGroup {
  int first = 0;
  int count = 0;
  int pages = 0;
};

struct BatchShape {
  int page_size = 16;
  cuda::KvLayout layout = cuda::KvLayout::kNhd;
  int kv_heads = 2;
  int group = 4;
  int head_dim = 128;
  [[nodiscard]] int heads() const { return kv_heads * group; }
};

/// Every page that no sequence has, and every slot behind a sequence's end, is NaN.
template <class T>
struct PagedBatch {
  BatchShape shape;
  std::vector<int> lengths;
  std::vector<std::int32_t> indptr{0};
  std::vector<std::int32_t> indices;
  std::vector<std::int32_t> last_page_len;
  int pages = 0;
  std::vector<T> values;  // the cache
  float k_scale = std::is_same_v<T, Fp8E4M3> ? 0.017F : 1.0F;
  float v_scale = std::is_same_v<T, Fp8E4M3> ? 0.3F : 1.0F;

  PagedBatch(BatchShape shape_, std::vector<int> lengths_, const std::vector<SharedGroup>& groups, Rng& rng)
      : shape(shape_), lengths(std::move(lengths_)) {
    const int size = shape.page_size;
    int needed = 0;
    for (const int length : lengths) needed += (length + size - 1) / size;
    pages = needed + 3;
    std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t i = order.size() - 1; i > 0; --i) {
      std::swap(order[i], order[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(i) + 1))]);
    }
    std::size_t next = 0;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const int count = (lengths[i] + size - 1) / size;
      for (int j = 0; j < count; ++j) {
        std::int32_t page = order[next];
        bool is_shared = false;
        for (const SharedGroup& g : groups) {
          const int member = static_cast<int>(i) - g.first;
          if (member <= 0 || member >= g.count || j >= g.pages) continue;
          page = indices[static_cast<std::size_t>(indptr[static_cast<std::size_t>(g.first)] + j)];
          is_shared = true;
        }
        if (!is_shared) ++next;
        indices.push_back(page);
      }
      indptr.push_back(static_cast<std::int32_t>(indices.size()));
      last_page_len.push_back(lengths[i] == 0 ? size : (lengths[i] - 1) % size + 1);
    }
    const cuda::KvPages<T> at = view(nullptr);
    T nan;
    nan.bits = static_cast<decltype(nan.bits)>(0xFFFF);
    values.assign(static_cast<std::size_t>(at.page_stride * pages), nan);
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      for (int t = 0; t < lengths[i]; ++t) {
        for (int h = 0; h < shape.kv_heads; ++h) {
          for (int d = 0; d < shape.head_dim; ++d) {
            T& k = values[offset(i, t, h, false) + static_cast<std::size_t>(d)];
            if (k.bits != nan.bits) continue;  // shared, and there already
            k = T::from_float(rng.normal() / k_scale);
            values[offset(i, t, h, true) + static_cast<std::size_t>(d)] =
                T::from_float(rng.normal() / v_scale);
          }
        }
      }
    }
  }

  [[nodiscard]] cuda::KvPages<T> view(T* data) const {
    auto out = cuda::kv_pages(data, shape.layout, pages, shape.page_size, shape.kv_heads, shape.head_dim);
    out.k_scale = k_scale;
    out.v_scale = v_scale;
    return out;
  }
  [[nodiscard]] std::size_t offset(std::size_t sequence, int token, int head, bool v) const {
    const cuda::KvPages<T> at = view(nullptr);
    const std::int64_t page = indices[static_cast<std::size_t>(indptr[sequence] + token / shape.page_size)];
    return static_cast<std::size_t>(page * at.page_stride + token % shape.page_size * at.token_stride +
                                    head * at.head_stride + (v ? at.page_stride / 2 : 0));
  }
};

/// The table on the device.
struct DeviceTable {
  DeviceBuffer<std::int32_t> indptr;
  DeviceBuffer<std::int32_t> indices;
  DeviceBuffer<std::int32_t> last_page_len;
  int sequences;

  template <class T>
  explicit DeviceTable(const PagedBatch<T>& batch)
      : indptr(batch.indptr),
        indices(batch.indices),
        last_page_len(batch.last_page_len),
        sequences(static_cast<int>(batch.lengths.size())) {}
  [[nodiscard]] cuda::PageTableView view() {
    return {indptr.data(), indices.data(), last_page_len.data(), sequences};
  }
};

/// A copy of a batch's pages, so far apart that some begin beyond 2^31 elements.
template <class T>
class FarPages {
 public:
  explicit FarPages(const cuda::KvPages<T>& near)
      : near_(near),
        stride_(((std::int64_t{1} << 32) / near.pages + 15) / 16 * 16),
        memory_(static_cast<std::size_t>(stride_ * near.pages)) {
    REQUIRE(stride_ >= near.page_stride);
    copy(memory_.data(), stride_, near_.k, near_.page_stride);
  }
  [[nodiscard]] static bool fit() {
    std::size_t free = 0;
    std::size_t total = 0;
    REQUIRE_CUDA(cudaMemGetInfo(&free, &total));
    return free > (std::size_t{10} << 30);
  }
  [[nodiscard]] cuda::KvPages<T> view() {
    cuda::KvPages<T> out = near_;
    out.k = memory_.data();
    out.v = memory_.data() + (near_.v - near_.k);
    out.page_stride = stride_;
    return out;
  }
  /// What the pages hold now, to the places that they were copied from.
  void copy_back() { copy(near_.k, near_.page_stride, memory_.data(), stride_); }

 private:
  void copy(T* to, std::int64_t to_stride, const T* from, std::int64_t from_stride) const {
    REQUIRE_CUDA(cudaMemcpy2D(to, static_cast<std::size_t>(to_stride) * sizeof(T), from,
                              static_cast<std::size_t>(from_stride) * sizeof(T),
                              static_cast<std::size_t>(near_.page_stride) * sizeof(T),
                              static_cast<std::size_t>(near_.pages), cudaMemcpyDeviceToDevice));
    REQUIRE_CUDA(cudaDeviceSynchronize());
  }
  cuda::KvPages<T> near_;
  std::int64_t stride_;
  DeviceBuffer<T> memory_;
};

/// Rows of queries at a position each: attention in double, and the mean size of V, which bounds what
/// rounding the weights can do.
struct AttentionReference {
  std::vector<double> out;   // [rows][heads * head_dim]
  std::vector<double> size;  // the same
};

struct QueryAt {
  std::size_t sequence;
  int keys;  // that it sees
};

template <class C, class T>
[[nodiscard]] AttentionReference reference_attention(const PagedBatch<C>& batch, const std::vector<T>& q,
                                                     std::int64_t stride, const std::vector<QueryAt>& rows) {
  const BatchShape& s = batch.shape;
  const auto dim = static_cast<std::size_t>(s.head_dim);
  const auto heads = static_cast<std::size_t>(s.heads());
  const double scale = 1.0 / std::sqrt(static_cast<double>(s.head_dim));
  AttentionReference want;
  want.out.assign(rows.size() * heads * dim, 0.0);
  want.size = want.out;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t h = 0; h < heads; ++h) {
      const int kv_head = static_cast<int>(h) / s.group;
      const T* const query = q.data() + r * static_cast<std::size_t>(stride) + h * dim;
      std::vector<double> weight(static_cast<std::size_t>(rows[r].keys));
      double top = -HUGE_VAL;
      for (std::size_t t = 0; t < weight.size(); ++t) {
        const C* const k =
            batch.values.data() + batch.offset(rows[r].sequence, static_cast<int>(t), kv_head, false);
        double sum = 0.0;
        for (std::size_t d = 0; d < dim; ++d) {
          sum += static_cast<double>(as_float(query[d])) * static_cast<double>(as_float(k[d]));
        }
        weight[t] = sum * scale * static_cast<double>(batch.k_scale);
        top = std::max(top, weight[t]);
      }
      double all = 0.0;
      for (double& w : weight) all += w = std::exp(w - top);
      for (std::size_t t = 0; t < weight.size(); ++t) {
        const C* const v =
            batch.values.data() + batch.offset(rows[r].sequence, static_cast<int>(t), kv_head, true);
        for (std::size_t d = 0; d < dim; ++d) {
          const double term =
              weight[t] / all * static_cast<double>(as_float(v[d])) * static_cast<double>(batch.v_scale);
          want.out[(r * heads + h) * dim + d] += term;
          want.size[(r * heads + h) * dim + d] += std::abs(term);
        }
      }
    }
  }
  return want;
}

/// The element that is furthest off, as a multiple of what it may be off; NaN counts as infinite.
template <class Y>
[[nodiscard]] double furthest(const AttentionReference& want, const std::vector<Y>& got, std::int64_t cols,
                              std::int64_t stride, double tolerance) {
  double out = 0.0;
  for (std::size_t i = 0; i < want.out.size(); ++i) {
    const std::size_t row = i / static_cast<std::size_t>(cols);
    const double y = static_cast<double>(
        as_float(got[row * static_cast<std::size_t>(stride) + i % static_cast<std::size_t>(cols)]));
    const double bound =
        tolerance * want.size[i] + 1.01 * codegemm::test::rounding_of<Y>() * std::abs(want.out[i]) + 1e-7;
    const double off = std::abs(y - want.out[i]) / bound;
    out = off <= out ? out : (off > out ? off : HUGE_VAL);
  }
  return out;
}

/// Weights rounded to fp16 are within 1e-3, to bf16 within 4e-3; decoding multiplies by what bf16
/// leaves, too.
inline constexpr double kTolerance = 1e-3;
inline constexpr double kTolerancePrefillBFloat16 = 4e-3;

}  // namespace prefillshare::test
