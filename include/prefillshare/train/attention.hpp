// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/attention.hpp - causal grouped-query attention over segments of a batch, forward and
// backward, each behind a prefix of keys and values that are constants.
// Layer: train (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include <Eigen/Core>

#include <codegemm/quantize/guarded_loop.hpp>
#include <prefillshare/train/tensor.hpp>

namespace prefillshare {

/// What a pass does to values as it stores them: nothing. Another type in its place shows what a narrower
/// storage makes of the results.
struct StoreExactly {
  /// The `size` values at x are stored.
  template <TrainScalar T>
  void operator()(T* /*x*/, std::int64_t /*size*/) const noexcept {}
  /// They are probabilities of attention or their gradients: on a device operands of its products at most.
  template <TrainScalar T>
  void probabilities(T* /*x*/, std::int64_t /*size*/) const noexcept {}
};

/// Rows [first, first + count) of a batch are one sequence at positions prefix, prefix + 1, ... Before them
/// come `prefix` tokens whose keys (after RoPE) and values somebody else made: constants without a gradient.
template <TrainScalar T>
struct Segment {
  std::int64_t first = 0;          ///< row of its first token
  std::int64_t count = 0;          ///< rows
  std::int64_t prefix = 0;         ///< tokens before them
  std::int64_t prefix_stride = 0;  ///< tokens of one layer in keys and values, at least prefix
  const T* keys = nullptr;         ///< [layers][prefix_stride][kv_heads * head_dim]
  const T* values = nullptr;       ///< the same
};

namespace detail {

/// The operands of attention: q, out [T][heads][head_dim], k, v [T][kv_heads][head_dim].
struct AttentionShape {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
};

/// Scratch of one worker for one KV head of one segment.
template <class T>
class AttentionScratch {
 public:
  static constexpr std::int64_t kQueries = 64;  // rows of a score matrix

  void resize(std::int64_t keys, std::int64_t head_dim) {
    if (keys <= keys_) return;
    k.resize(keys * head_dim);
    v.resize(keys * head_dim);
    dk.resize(keys * head_dim);
    dv.resize(keys * head_dim);
    scores.resize(kQueries * keys);
    dscores.resize(kQueries * keys);
    keys_ = keys;
  }

  Tensor<T> k, v, dk, dv;     // [keys][head_dim]
  Tensor<T> scores, dscores;  // [kQueries][keys]

 private:
  std::int64_t keys_ = 0;
};

/// Attention over a batch of segments. Tasks are the KV heads of each segment, so that what several query
/// heads add to one key's gradient is added by one task, in order.
template <class T, class Store = StoreExactly>
class SegmentAttention {
 public:
  SegmentAttention(AttentionShape shape, int workers, Store store = {})
      : shape_(shape), store_(store), scratch_(static_cast<std::size_t>(workers)) {}

  void forward(std::span<const Segment<T>> segments, std::int64_t layer, const T* q, const T* k, const T* v,
               T* out, Executor& executor) {
    reserve(segments);
    for_tasks(segments, executor, [&](const Segment<T>& s, std::int64_t kv, AttentionScratch<T>& scratch) {
      gather(s, layer, kv, k, v, scratch);
      for_queries(s, kv, [&](std::int64_t head, std::int64_t row, std::int64_t count) {
        const std::int64_t keys = s.prefix + row + count;
        probabilities(s, head, row, count, q, scratch);
        eigen_nn<T>(matrix(scratch.scores, count, keys), matrix(scratch.v, keys, shape_.head_dim),
                    head_rows(out, shape_.heads, s.first + row, head, count), false);
      });
    });
  }

  /// dq, dk and dv (overwritten) out of dout and what forward() read and wrote.
  void backward(std::span<const Segment<T>> segments, std::int64_t layer, const T* q, const T* k, const T* v,
                const T* out, const T* dout, T* dq, T* dk, T* dv, Executor& executor) {
    reserve(segments);
    const T scale = T{1} / std::sqrt(static_cast<T>(shape_.head_dim));
    for_tasks(segments, executor, [&](const Segment<T>& s, std::int64_t kv, AttentionScratch<T>& scratch) {
      const std::int64_t dim = shape_.head_dim;
      gather(s, layer, kv, k, v, scratch);
      std::fill_n(scratch.dk.data(), s.count * dim, T{0});
      std::fill_n(scratch.dv.data(), s.count * dim, T{0});
      for_queries(s, kv, [&](std::int64_t head, std::int64_t row, std::int64_t count) {
        const std::int64_t keys = s.prefix + row + count;
        const std::int64_t own = row + count;  // keys that have a gradient
        probabilities(s, head, row, count, q, scratch);
        const MatrixView<T> p = matrix(scratch.scores, count, keys);
        const MatrixView<T> ds = matrix(scratch.dscores, count, keys);
        const MatrixView<const T> queries = head_rows(q, shape_.heads, s.first + row, head, count);
        const MatrixView<const T> d = head_rows(dout, shape_.heads, s.first + row, head, count);
        const MatrixView<const T> o = head_rows(out, shape_.heads, s.first + row, head, count);
        eigen_tn<T>(own_columns(scratch.scores, s.prefix, count, own), d, matrix(scratch.dv, own, dim), true);
        eigen_nt<T>(d, matrix(scratch.v, keys, dim), ds);
        for (std::int64_t i = 0; i < count; ++i) {
          const T mean = (TrainConstArray<T>(d.row(i), dim) * TrainConstArray<T>(o.row(i), dim)).sum();
          TrainArray<T> row_values(ds.row(i), keys);
          row_values = TrainConstArray<T>(p.row(i), keys) * (row_values - mean) * scale;
          store_.probabilities(ds.row(i), keys);
        }
        eigen_nn<T>(ds, matrix(scratch.k, keys, dim), head_rows(dq, shape_.heads, s.first + row, head, count),
                    false);
        eigen_tn<T>(own_columns(scratch.dscores, s.prefix, count, own), queries, matrix(scratch.dk, own, dim),
                    true);
      });
      map_of<T>(head_rows(dk, shape_.kv_heads, s.first, kv, s.count)) =
          map_of<T>(matrix(scratch.dk, s.count, dim));
      map_of<T>(head_rows(dv, shape_.kv_heads, s.first, kv, s.count)) =
          map_of<T>(matrix(scratch.dv, s.count, dim));
    });
  }

 private:
  void reserve(std::span<const Segment<T>> segments) {
    std::int64_t keys = 0;
    for (const Segment<T>& s : segments) keys = std::max(keys, s.prefix + s.count);
    for (AttentionScratch<T>& scratch : scratch_) scratch.resize(keys, shape_.head_dim);
  }

  template <class Body>
  void for_tasks(std::span<const Segment<T>> segments, Executor& executor, Body&& body) {
    const auto count = static_cast<std::int64_t>(segments.size()) * shape_.kv_heads;
    codegemm::detail::guarded_for(executor, count, [&](std::int64_t task, int worker) {
      body(segments[static_cast<std::size_t>(task / shape_.kv_heads)], task % shape_.kv_heads,
           scratch_[static_cast<std::size_t>(worker)]);
    });
  }

  template <class Body>
  void for_queries(const Segment<T>& s, std::int64_t kv, Body&& body) const {
    const std::int64_t group = shape_.heads / shape_.kv_heads;
    for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head) {
      for (std::int64_t row = 0; row < s.count; row += AttentionScratch<T>::kQueries)
        body(head, row, std::min(AttentionScratch<T>::kQueries, s.count - row));
    }
  }

  /// Keys and values of one KV head, the prefix first, one after the other.
  void gather(const Segment<T>& s, std::int64_t layer, std::int64_t kv, const T* k, const T* v,
              AttentionScratch<T>& scratch) const {
    const std::int64_t dim = shape_.head_dim;
    const std::int64_t width = shape_.kv_heads * dim;
    const auto take = [&](const T* prefix, const T* own, T* to) {
      for (std::int64_t t = 0; t < s.prefix; ++t)
        std::copy_n(prefix + (layer * s.prefix_stride + t) * width + kv * dim, dim, to + t * dim);
      for (std::int64_t t = 0; t < s.count; ++t)
        std::copy_n(own + (s.first + t) * width + kv * dim, dim, to + (s.prefix + t) * dim);
    };
    take(s.keys, k, scratch.k.data());
    take(s.values, v, scratch.v.data());
  }

  /// scores[count][prefix + row + count] = softmax of q k^T under the causal mask.
  void probabilities(const Segment<T>& s, std::int64_t head, std::int64_t row, std::int64_t count, const T* q,
                     AttentionScratch<T>& scratch) const {
    const std::int64_t keys = s.prefix + row + count;
    const T scale = T{1} / std::sqrt(static_cast<T>(shape_.head_dim));
    eigen_nt<T>(head_rows(q, shape_.heads, s.first + row, head, count),
                matrix(scratch.k, keys, shape_.head_dim), matrix(scratch.scores, count, keys));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t seen = s.prefix + row + i + 1;
      T* const from = scratch.scores.data() + i * keys;
      TrainArray<T> x(from, seen);
      const T top = x.maxCoeff();
      x = ((x - top) * scale).exp();
      x *= T{1} / x.sum();
      store_.probabilities(from, seen);
      std::fill(from + seen, from + keys, T{0});
    }
  }

  static MatrixView<T> matrix(Tensor<T>& x, std::int64_t rows, std::int64_t cols) {
    return MatrixView<T>(x.data(), rows, cols);
  }
  /// The columns of a score matrix behind the prefix.
  static MatrixView<T> own_columns(Tensor<T>& x, std::int64_t prefix, std::int64_t rows, std::int64_t own) {
    return MatrixView<T>(x.data() + prefix, rows, own, prefix + own);
  }
  /// One head of some tokens of x[T][heads][head_dim].
  template <class Value>
  [[nodiscard]] MatrixView<Value> head_rows(Value* x, std::int64_t heads, std::int64_t row, std::int64_t head,
                                            std::int64_t count) const {
    return MatrixView<Value>(x + (row * heads + head) * shape_.head_dim, count, shape_.head_dim,
                             heads * shape_.head_dim);
  }

  AttentionShape shape_;
  Store store_;
  std::vector<AttentionScratch<T>> scratch_;
};

}  // namespace detail
}  // namespace prefillshare
