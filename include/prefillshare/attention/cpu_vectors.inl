// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cpu_vectors.inl - vector types of one instruction set: products, exponentials, sums.
// A part of cpu_kernels.inl.

using Vec [[gnu::vector_size(kLanes * sizeof(float))]] = float;
using BitVec [[gnu::vector_size(kLanes * sizeof(std::uint32_t))]] = std::uint32_t;
using Vec16 [[gnu::vector_size(16 * sizeof(float))]] = float;
using Vec8 [[gnu::vector_size(8 * sizeof(float))]] = float;
using Vec4 [[gnu::vector_size(4 * sizeof(float))]] = float;

template <class V>
[[gnu::always_inline]] inline void load(V& vector, const float* from) {
  __builtin_memcpy(&vector, from, sizeof(V));
}
template <class V>
[[gnu::always_inline]] inline void store(float* to, const V& vector) {
  __builtin_memcpy(to, &vector, sizeof(V));
}

/// 2^x for x <= 0, within 2 units in the last place; exactly 0 below -126 and for -infinity; NaN stays.
[[gnu::always_inline]] inline void exp2_in_place(Vec& x) {
  const BitVec keep = __builtin_bit_cast(BitVec, ~(x < -126.0F));
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x + kRound;
  const Vec f = x - (shifted - kRound);  // in [-0.5, 0.5]
  // Interpolation of 2^f at the 7 Chebyshev points of the interval, relative error 2.6e-9.
  Vec p = f * 1.546144469646172e-4F + 1.3400428177419153e-3F;
  p = p * f + 9.61805667852609e-3F;
  p = p * f + 5.550327226670944e-2F;
  p = p * f + 0.24022650922288827F;
  p = p * f + 0.6931472067028321F;
  p = p * f + 1.0F;
  // The low bits of `shifted` are the integer; moved into the exponent they multiply p by its power of 2.
  const BitVec exponent = __builtin_bit_cast(BitVec, shifted) << 23;
  x = __builtin_bit_cast(Vec, (__builtin_bit_cast(BitVec, p) + exponent) & keep);
}

/// C[r][0 .. Count vectors) = C * factor[r] + sum over d of A[r][d] * B[d], for r in [0, kRowPad).
/// Without `factor` C is not read. B's rows are `b_stride` apart. Sums run in the order of d.
template <std::size_t Count>
[[gnu::always_inline]] inline void multiply_add(const float* a, std::int64_t a_stride, const float* b,
                                                std::int64_t b_stride, std::int64_t depth, float* c,
                                                std::int64_t c_stride, const float* factor) {
  Vec sum[kRowPad][Count];
#pragma GCC unroll 8
  for (int r = 0; r < kRowPad; ++r) {
#pragma GCC unroll 4
    for (std::size_t n = 0; n < Count; ++n) {
      if (factor == nullptr) {
        sum[r][n] = Vec{};
      } else {
        load(sum[r][n], c + r * c_stride + n * kLanes);
        sum[r][n] *= factor[r];
      }
    }
  }
  for (std::int64_t d = 0; d < depth; ++d) {
    Vec row[Count];
#pragma GCC unroll 4
    for (std::size_t n = 0; n < Count; ++n) load(row[n], b + d * b_stride + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRowPad; ++r) {
#pragma GCC unroll 4
      for (std::size_t n = 0; n < Count; ++n) sum[r][n] += row[n] * a[r * a_stride + d];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowPad; ++r) {
#pragma GCC unroll 4
    for (std::size_t n = 0; n < Count; ++n) store(c + r * c_stride + n * kLanes, sum[r][n]);
  }
}

/// multiply_add over `columns` columns, a multiple of 8.
inline void multiply_add_columns(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                                 std::int64_t depth, float* c, std::int64_t c_stride, std::int64_t columns,
                                 const float* factor) {
  std::int64_t n = 0;
  for (; n + kVectors * kLanes <= columns; n += kVectors * kLanes) {
    multiply_add<kVectors>(a, a_stride, b + n, b_stride, depth, c + n, c_stride, factor);
  }
  for (; n + kLanes <= columns; n += kLanes) {
    multiply_add<1>(a, a_stride, b + n, b_stride, depth, c + n, c_stride, factor);
  }
}

struct Add {
  template <class V>
  [[gnu::always_inline]] static void join(V& a, const V& b) {
    a += b;
  }
};
struct Larger {
  template <class V>
  [[gnu::always_inline]] static void join(V& a, const V& b) {
    a = b > a ? b : a;
  }
};

/// Down to 4 lanes by halves.
template <class Op>
[[gnu::always_inline]] inline void fold(const Vec4& vector, Vec4& four) {
  four = vector;
}
template <class Op>
[[gnu::always_inline]] inline void fold(const Vec8& vector, Vec4& four) {
  four = __builtin_shufflevector(vector, vector, 0, 1, 2, 3);
  const Vec4 high = __builtin_shufflevector(vector, vector, 4, 5, 6, 7);
  Op::join(four, high);
}
template <class Op>
[[gnu::always_inline]] inline void fold(const Vec16& vector, Vec4& four) {
  Vec8 half = __builtin_shufflevector(vector, vector, 0, 1, 2, 3, 4, 5, 6, 7);
  const Vec8 high = __builtin_shufflevector(vector, vector, 8, 9, 10, 11, 12, 13, 14, 15);
  Op::join(half, high);
  fold<Op>(half, four);
}
/// All lanes to one number, by halves: the same order in every call.
template <class Op>
[[gnu::always_inline]] inline float reduce(const Vec& vector) {
  Vec4 four;
  fold<Op>(vector, four);
  const Vec4 far = __builtin_shufflevector(four, four, 2, 3, 0, 1);
  Op::join(four, far);
  const Vec4 near = __builtin_shufflevector(four, four, 1, 0, 3, 2);
  Op::join(four, near);
  return four[0];
}

/// One row of kKeyTile scores becomes weights 2^(score - maximum); maximum and sum run along. Returns the
/// factor by which what was summed before must shrink.
[[gnu::always_inline]] inline float softmax_row(float* scores, float& maximum, float& sum) {
  constexpr std::int64_t kCount = kKeyTile / kLanes;
  Vec peak;
  load(peak, scores);
#pragma GCC unroll 16
  for (int i = 1; i < kCount; ++i) {
    Vec next;
    load(next, scores + i * kLanes);
    Larger::join(peak, next);
  }
  const float old_maximum = maximum;
  const float here = reduce<Larger>(peak);
  const float new_maximum = here > old_maximum ? here : old_maximum;
  Vec sums = Vec{};
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    Vec x;
    load(x, scores + i * kLanes);
    x -= new_maximum;
    exp2_in_place(x);
    store(scores + i * kLanes, x);
    sums += x;
  }
  Vec shrink = Vec{} + (old_maximum - new_maximum);
  exp2_in_place(shrink);
  const float factor = shrink[0];
  maximum = new_maximum;
  sum = sum * factor + reduce<Add>(sums);
  return factor;
}
