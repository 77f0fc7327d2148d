// SPDX-License-Identifier: Apache-2.0
//
// bench/support/gpu_problem.cuh - a random quantized matrix on the GPU, often enough to be cold, and how far
// a product with it is off.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/cuda/packed_matrix.hpp>
#include <codegemm/reference.hpp>

#include "gpu_program.hpp"
#include "gpu_timing.cuh"

namespace codegemm::bench {

struct Random {  // splitmix64
  std::uint64_t state;
  std::uint64_t next() {
    std::uint64_t z = state += 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24F; }
  float normal() {
    float sum = -6.0F;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

struct Shape {
  std::int64_t rows;
  std::int64_t cols;

  std::string name() const { return std::to_string(rows) + "x" + std::to_string(cols); }
};

inline Shape parse_shape(const char* text) {
  long long n = 0, k = 0;
  if (std::sscanf(text, "%lldx%lld", &n, &k) != 2) throw std::runtime_error("--shape wants NxK");
  return {n, k};
}

// "--shape NxK" and "--format NAME" of a command line, each as often as wanted.
inline Option shape_option(std::vector<Shape>& to) {
  return Option::value([&to](const char* text) { to.push_back(parse_shape(text)); });
}
inline Option format_option(std::vector<Format>& to) {
  return Option::value([&to](const char* text) {
    const auto format = parse_format(text);
    check(format.status());
    to.push_back(*format);
  });
}

// How many copies of so many bytes no cache holds: 600 MB in all.
inline int cold_copies(std::size_t bytes) {
  return static_cast<int>(std::clamp<std::size_t>(600'000'000 / bytes + 1, 2, 64));
}

// Random codes, centroids and scales, of one matrix or of several merged along N; packed, and on the device
// `copies` times.
class ColdMatrix {
 public:
  // copies 0: as many as make it cold.
  ColdMatrix(Shape shape, Format format, cuda::PackOptions options, int copies)
      : ColdMatrix(std::vector<Shape>{shape}, format, options, copies) {}
  ColdMatrix(const std::vector<Shape>& parts, Format format, cuda::PackOptions options, int copies)
      : parts_(draw(parts, format)),
        packed_(pack(parts_, options)),
        pitch_((packed_.bytes().size() + 255) / 256 * 256),
        copies_(copies > 0 ? copies : cold_copies(packed_.bytes().size())),
        data_(pitch_ * static_cast<std::size_t>(copies_)) {
    const std::size_t bytes = packed_.bytes().size();
    check(cudaMemcpy(data_.data, packed_.bytes().data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    for (int i = 1; i < copies_; ++i) {
      check(cudaMemcpy(data_.data + pitch_ * static_cast<std::size_t>(i), data_.data, bytes,
                       cudaMemcpyDeviceToDevice),
            "cudaMemcpy");
    }
  }

  const QuantizedMatrix& matrix() const { return parts_.front(); }
  const std::vector<QuantizedMatrix>& parts() const { return parts_; }
  int copies() const { return copies_; }
  cuda::DevicePackedView view(int i) const {
    return packed_.view(data_.data + pitch_ * static_cast<std::size_t>(i % copies_));
  }

 private:
  static std::vector<QuantizedMatrix> draw(const std::vector<Shape>& parts, Format format) {
    std::vector<QuantizedMatrix> out;
    for (const Shape shape : parts) {
      Random random{static_cast<std::uint64_t>(shape.rows * 1000003 + shape.cols + format.v) + out.size()};
      auto made = QuantizedMatrix::create(format, shape.rows, shape.cols);
      check(made.status());
      // Any code that the format has, in each byte or half of a word.
      const auto most = static_cast<std::uint32_t>(format.centroids() - 1);
      const std::uint32_t mask = most * (format.stored_code_bits() == 8 ? 0x01010101U : 0x00010001U);
      for (std::uint32_t& word : made->codes()) word = static_cast<std::uint32_t>(random.next()) & mask;
      for (Half& value : made->codebooks()) value = Half::from_float(random.normal());
      for (Half& value : made->scales()) value = Half::from_float(0.01F + 0.02F * random.uniform());
      out.push_back(std::move(made).value());
    }
    return out;
  }
  static cuda::PackedMatrix pack(const std::vector<QuantizedMatrix>& parts, cuda::PackOptions options) {
    std::vector<QuantizedMatrixView> views;
    for (const QuantizedMatrix& part : parts) views.push_back(part.view());
    auto packed = cuda::pack(std::span<const QuantizedMatrixView>(views), options);
    check(packed.status());
    return std::move(packed).value();
  }

  std::vector<QuantizedMatrix> parts_;
  cuda::PackedMatrix packed_;
  std::size_t pitch_;
  int copies_;
  Buffer<std::byte> data_;
};

// x, [tokens][cols]. Numbers are drawn once and repeated: a prime number of them, so that tokens differ.
inline std::vector<Half> draw_tokens(std::int64_t tokens, std::int64_t cols) {
  Random random{static_cast<std::uint64_t>(cols)};
  std::vector<Half> x(static_cast<std::size_t>(tokens * cols));
  std::vector<Half> drawn(std::min<std::size_t>(x.size(), 1'000'003));
  for (Half& value : drawn) value = Half::from_float(random.normal());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = drawn[i % drawn.size()];
  return x;
}

// ||y - ref|| / ||ref|| over some of the rows and tokens, against sums in double over the same quantized
// weights, merged along N; swiglu: y has half of the rows, silu(first half) * second half.
inline double error_of(const std::vector<QuantizedMatrix>& parts, const std::vector<Half>& x,
                       const std::vector<Half>& y, int tokens, bool swiglu = false) {
  std::int64_t all = 0;
  for (const QuantizedMatrix& part : parts) all += part.rows();
  const std::int64_t cols = parts.front().cols();
  const int token_step = std::max(1, tokens / 16);
  const auto sums_of = [&](std::int64_t n) {
    std::size_t part = 0;
    while (n >= parts[part].rows()) n -= parts[part++].rows();
    const QuantizedMatrixView view = parts[part].view();
    std::vector<double> sums(static_cast<std::size_t>(tokens), 0.0);
    for (std::int64_t k = 0; k < cols; ++k) {
      const double weight = reference_weight(view, n, k);
      for (int t = 0; t < tokens; t += token_step) {
        sums[static_cast<std::size_t>(t)] +=
            weight * static_cast<double>(x[static_cast<std::size_t>(t * cols + k)].to_float());
      }
    }
    return sums;
  };
  const std::int64_t rows = swiglu ? all / 2 : all;
  double off = 0.0;
  double size = 0.0;
  for (std::int64_t n = 0; n < rows; n += std::max<std::int64_t>(1, rows / 97)) {
    std::vector<double> sums = sums_of(n);
    if (swiglu) {
      const std::vector<double> up = sums_of(n + rows);
      for (std::size_t t = 0; t < sums.size(); ++t) sums[t] *= up[t] / (1.0 + std::exp(-sums[t]));
    }
    for (int t = 0; t < tokens; t += token_step) {
      const double want = sums[static_cast<std::size_t>(t)];
      const double d = static_cast<double>(y[static_cast<std::size_t>(t * rows + n)].to_float()) - want;
      off += d * d;
      size += want * want;
    }
  }
  return std::sqrt(off / size);
}

}  // namespace codegemm::bench
