// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/elementwise.hpp - RMSNorm, RoPE, SwiGLU and cross entropy, forward and backward.
// Layer: train (host only).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include <Eigen/Core>

#include <codegemm/base/aligned_buffer.hpp>
#include <prefillshare/attention/rope.hpp>
#include <prefillshare/train/tensor.hpp>

namespace prefillshare::detail {

/// out[t] = weight * x[t] / rms(x[t]) for rows of `width`, and inverse[t] = 1 / rms(x[t]).
template <class T>
void norm_rows(const T* x, const T* weight, double epsilon, std::int64_t rows, std::int64_t width, T* out,
               T* inverse) {
  const TrainConstArray<T> w(weight, width);
  for (std::int64_t t = 0; t < rows; ++t) {
    const TrainConstArray<T> in(x + t * width, width);
    const T mean_square = in.square().sum() / static_cast<T>(width);
    inverse[t] = T{1} / std::sqrt(mean_square + static_cast<T>(epsilon));
    TrainArray<T>(out + t * width, width) = in * inverse[t] * w;
  }
}

/// The gradient of norm_rows(): dx = or += (if `add`) that of x out of dy, that of out. The rows' gradient of
/// the weight is added to weight_sum[width]. dx may be dy.
template <class T>
void norm_rows_backward(const T* x, const T* weight, const T* inverse, const T* dy, std::int64_t rows,
                        std::int64_t width, T* dx, bool add, T* weight_sum) {
  const TrainConstArray<T> w(weight, width);
  TrainArray<T> dw(weight_sum, width);
  for (std::int64_t t = 0; t < rows; ++t) {
    const TrainConstArray<T> in(x + t * width, width);
    const TrainConstArray<T> d(dy + t * width, width);
    TrainArray<T> out(dx + t * width, width);
    const T i = inverse[t];
    const T along = (d * w * in).sum() * i * i * i / static_cast<T>(width);
    dw += d * in * i;
    if (add) {
      out += d * w * i - in * along;
    } else {
      out = d * w * i - in * along;
    }
  }
}

/// norm_rows() of tokens[T] of `per_token` rows each, on the executor.
template <class T>
void norm_tokens(const T* x, const T* weight, double epsilon, std::int64_t tokens, std::int64_t per_token,
                 std::int64_t width, T* out, T* inverse, Executor& executor) {
  for_ranges(tokens, executor, [&](std::int64_t, std::int64_t first, std::int64_t count) {
    const std::int64_t row = first * per_token;
    norm_rows(x + row * width, weight, epsilon, count * per_token, width, out + row * width, inverse + row);
  });
}

/// Its gradient; parts: [token_ranges(tokens)][width] of scratch. weight_gradient[width], added to, or null.
template <class T>
void norm_tokens_backward(const T* x, const T* weight, const T* inverse, const T* dy, std::int64_t tokens,
                          std::int64_t per_token, std::int64_t width, T* dx, bool add, T* weight_gradient,
                          T* parts, Executor& executor) {
  for_ranges(tokens, executor, [&](std::int64_t range, std::int64_t first, std::int64_t count) {
    const std::int64_t row = first * per_token;
    T* const sum = parts + range * width;
    std::fill_n(sum, width, T{0});
    norm_rows_backward(x + row * width, weight, inverse + row, dy + row * width, count * per_token, width,
                       dx + row * width, add, sum);
  });
  if (weight_gradient != nullptr) add_parts(parts, token_ranges(tokens), width, weight_gradient);
}

/// Turns x[T][heads * head_dim] in place; row t is at positions[t]. `back` turns the other way: the gradient.
template <class T>
void turn_heads(const RopeTable& rope, const std::int64_t* positions, std::int64_t tokens, std::int64_t heads,
                bool back, T* x, Executor& executor) {
  const std::int64_t dim = rope.config().head_dim;
  const std::int64_t pairs = dim / 2;
  const bool half = rope.config().layout == RopeLayout::kHalf;
  const std::int64_t step = half ? 1 : 2;
  const std::int64_t other = half ? pairs : 1;
  for_ranges(tokens, executor, [&](std::int64_t, std::int64_t first, std::int64_t count) {
    for (std::int64_t t = first; t < first + count; ++t) {
      const float* const cos = rope.cos(positions[t]);
      const float* const sin = rope.sin(positions[t]);
      for (std::int64_t h = 0; h < heads; ++h) {
        T* const head = x + (t * heads + h) * dim;
        for (std::int64_t i = 0; i < pairs; ++i) {
          const T c = static_cast<T>(cos[i]);
          const T s = back ? -static_cast<T>(sin[i]) : static_cast<T>(sin[i]);
          const T a = head[i * step];
          const T b = head[i * step + other];
          head[i * step] = a * c - b * s;
          head[i * step + other] = b * c + a * s;
        }
      }
    }
  });
}

/// out = silu(gate) * up.
template <class T>
void swiglu(const T* gate, const T* up, std::int64_t size, T* out, Executor& executor) {
  for_elements(size, executor, [&](std::int64_t first, std::int64_t count) {
    const TrainConstArray<T> g(gate + first, count);
    const TrainConstArray<T> u(up + first, count);
    TrainArray<T>(out + first, count) = g / (T{1} + (-g).exp()) * u;
  });
}

/// In place of gate and up their gradients, out of d[size], that of silu(gate) * up.
template <class T>
void swiglu_backward(const T* d, std::int64_t size, T* gate, T* up, Executor& executor) {
  for_elements(size, executor, [&](std::int64_t first, std::int64_t count) {
    constexpr std::int64_t kChunk = 64;
    using Chunk =
        Eigen::Array<T, kChunk, 1>;  // whole, since exp() of vector code and of single elements differ
    Chunk sigmoid;
    Chunk up_gradient;
    for (std::int64_t at = first; at < first + count; at += kChunk) {
      const std::int64_t size_here = std::min(kChunk, first + count - at);
      TrainArray<T> g(gate + at, size_here);
      TrainArray<T> u(up + at, size_here);
      const TrainConstArray<T> dy(d + at, size_here);
      sigmoid.setZero();
      sigmoid.head(size_here) = g;
      sigmoid = T{1} / (T{1} + (-sigmoid).exp());
      const auto s = sigmoid.head(size_here);
      up_gradient.head(size_here) = dy * g * s;
      g = dy * u * s * (T{1} + g * (T{1} - s));
      u = up_gradient.head(size_here);
    }
  });
}

/// -log p of `label` in a row of logits, which becomes scale * (softmax - one_hot): the gradient.
template <class T>
[[nodiscard]] double cross_entropy_row(T* row, std::int64_t vocabulary, std::int32_t label, T scale) {
  TrainArray<T> logits(row, vocabulary);
  const T top = logits.maxCoeff();
  const T own = row[label];
  logits = (logits - top).exp();
  const T sum = logits.sum();
  logits *= scale / sum;
  row[label] -= scale;
  return std::log(static_cast<double>(sum)) + static_cast<double>(top) - static_cast<double>(own);
}

/// gradient[n] += the column sums of d[T][n]: that of a bias.
template <class T>
void add_column_sums(const T* d, std::int64_t rows, std::int64_t width, T* gradient) {
  for (std::int64_t t = 0; t < rows; ++t)
    TrainArray<T>(gradient, width) += TrainConstArray<T>(d + t * width, width);
}

}  // namespace prefillshare::detail
