// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cpu_kernels.inl - the attention kernels, written once in vector types.
// Included by cpu_kernels.hpp only, once for each instruction set, inside a namespace that defines
//   kLanes    floats of a vector: 4, 8 or 16; with 16 only attend_rows() is used, and head_dim a multiple of 16
//   kVectors  vectors of a register tile's row; kVectors * kLanes divides kKeyTile
// and with the compiler's target set. Templates and inline functions of others are not used here: an
// instance made under this target could be the one the linker keeps for all.

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

/// `count` numbers of another type, a multiple of 8, times `scale`.
inline void convert_row(KvElement element, const unsigned char* from, std::int64_t count, float scale,
                        float* to) {
  using Bits8 [[gnu::vector_size(8 * sizeof(std::uint32_t))]] = std::uint32_t;
  using Half8 [[gnu::vector_size(8 * sizeof(std::uint16_t))]] = std::uint16_t;
  using Byte8 [[gnu::vector_size(8)]] = std::uint8_t;
  for (std::int64_t i = 0; i < count; i += 8) {
    Vec8 value;
    if (element == KvElement::kFp8E4M3) {
      Byte8 stored;
      __builtin_memcpy(&stored, from + i, sizeof stored);
      const Bits8 bits = __builtin_convertvector(stored, Bits8);
      const Bits8 magnitude = bits & 0x7FU;
      const Vec8 scaled = __builtin_bit_cast(Vec8, magnitude << 20) * 0x1p120F;  // from bias 7 to 127
      const Bits8 nan = __builtin_bit_cast(Bits8, magnitude == 0x7FU) & 0x7FC00000U;
      value = __builtin_bit_cast(Vec8, __builtin_bit_cast(Bits8, scaled) | nan | (bits & 0x80U) << 24);
    } else {
      Half8 stored;
      __builtin_memcpy(&stored, from + 2 * i, sizeof stored);
      const Bits8 bits = __builtin_convertvector(stored, Bits8);
      if (element == KvElement::kBf16) {
        value = __builtin_bit_cast(Vec8, bits << 16);
      } else {
        const Bits8 magnitude = bits & 0x7FFFU;
        const Vec8 scaled = __builtin_bit_cast(Vec8, magnitude << 13) * 0x1p112F;  // from bias 15 to 127
        const Bits8 special = __builtin_bit_cast(Bits8, magnitude >= 0x7C00U) & 0x7F800000U;
        value =
            __builtin_bit_cast(Vec8, __builtin_bit_cast(Bits8, scaled) | special | (bits & 0x8000U) << 16);
      }
    }
    value *= scale;
    store(to + i, value);
  }
}

/// find_rows() for pages of another type, which are read into `converted` here, or another order.
inline void find_page_rows(const AttentionProblem& problem, int kv_head, std::int64_t first_key,
                           std::int64_t end, float* converted, const float** k_rows, const float** v_rows) {
  const KvPages& pages = *problem.pages;
  const KvElement element = pages.format.element;
  const auto width = static_cast<std::int64_t>(pages.head_dim);
  const auto* const base = static_cast<const unsigned char*>(pages.base);
  const std::int64_t bytes = element == KvElement::kFp8E4M3 ? 1 : element == KvElement::kFp32 ? 4 : 2;
  std::int64_t index = first_key / pages.block_tokens;
  std::int64_t slot = first_key % pages.block_tokens;
  for (int i = 0; i < kKeyTile; ++i) {
    if (first_key + i >= end) {
      k_rows[i] = v_rows[i] = kZeros;
      continue;
    }
    const std::int64_t at = problem.blocks[index] * pages.strides.block + slot * pages.strides.slot +
                            kv_head * pages.strides.head;
    if (element == KvElement::kFp32) {
      k_rows[i] = static_cast<const float*>(pages.base) + at;
      v_rows[i] = k_rows[i] + pages.strides.part;
    } else {
      float* const k = converted + i * width;
      float* const v = k + kKeyTile * width;
      convert_row(element, base + at * bytes, width, pages.k_scale, k);
      convert_row(element, base + (at + pages.strides.part) * bytes, width, pages.v_scale, v);
      k_rows[i] = k;
      v_rows[i] = v;
    }
    if (++slot == pages.block_tokens) {
      slot = 0;
      ++index;
    }
  }
}

/// Where the K (or V) of each key of a tile lies; keys from `end` on are taken as zeros and never read.
inline void find_rows(const AttentionProblem& problem, int kv_head, std::int64_t first_key, std::int64_t end,
                      float* converted, const float** k_rows, const float** v_rows) {
  if (problem.pages != nullptr) {
    find_page_rows(problem, kv_head, first_key, end, converted, k_rows, v_rows);
    return;
  }
  const std::int64_t block_tokens = problem.kv.block_tokens;
  const std::int64_t stride = problem.kv.slot_stride();
  std::int64_t index = first_key / block_tokens;
  std::int64_t slot = first_key % block_tokens;
  for (int i = 0; i < kKeyTile; ++i) {
    if (first_key + i >= end) {
      k_rows[i] = v_rows[i] = kZeros;
      continue;
    }
    const std::int64_t head = static_cast<std::int64_t>(kv_head) * problem.kv.head_dim;
    k_rows[i] = problem.kv.k(problem.blocks[index], 0) + slot * stride + head;
    v_rows[i] = problem.kv.v(problem.blocks[index], 0) + slot * stride + head;
    if (++slot == block_tokens) {
      slot = 0;
      ++index;
    }
  }
}

/// K tile -> [head_dim][kKeyTile], in squares of 4 x 4.
inline void transpose_keys(const float* const* k_rows, std::int64_t head_dim, float* transposed) {
  for (int key = 0; key < kKeyTile; key += 4) {
    const float* const* rows = k_rows + key;
    for (std::int64_t d = 0; d < head_dim; d += 4) {
      Vec4 a, b, c, e;
      load(a, rows[0] + d);
      load(b, rows[1] + d);
      load(c, rows[2] + d);
      load(e, rows[3] + d);
      const Vec4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Vec4 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Vec4 ce_low = __builtin_shufflevector(c, e, 0, 4, 1, 5);
      const Vec4 ce_high = __builtin_shufflevector(c, e, 2, 6, 3, 7);
      float* to = transposed + d * kKeyTile + key;
      store(to, __builtin_shufflevector(ab_low, ce_low, 0, 1, 4, 5));
      store(to + kKeyTile, __builtin_shufflevector(ab_low, ce_low, 2, 3, 6, 7));
      store(to + 2 * kKeyTile, __builtin_shufflevector(ab_high, ce_high, 0, 1, 4, 5));
      store(to + 3 * kKeyTile, __builtin_shufflevector(ab_high, ce_high, 2, 3, 6, 7));
    }
  }
}

/// to += weight * from, `count` floats, a multiple of 8.
[[gnu::always_inline]] inline void add_scaled(float weight, const float* from, std::int64_t count,
                                              float* to) {
  for (std::int64_t d = 0; d < count; d += 8) {
    Vec8 a, b;
    load(a, from + d);
    load(b, to + d);
    b += a * weight;
    store(to + d, b);
  }
}

/// Attention of rows [first_row, first_row + count) of a K/V head over all keys they may see. A row's
/// result does not depend on the rows beside it: tiles of keys it sees nothing of leave it bit for bit.
inline void attend_rows(const AttentionProblem& problem, int kv_head, std::int64_t first_row,
                        std::int64_t count, float* memory) {
  const std::int64_t head_dim = problem.kv.head_dim;
  const TileScratch scratch(memory, head_dim);
  const std::int64_t padded = (count + kRowPad - 1) / kRowPad * kRowPad;
  for (std::int64_t r = 0; r < padded; ++r) {
    const float* from = r < count ? problem.q_row(kv_head, first_row + r) : kZeros;
    for (std::int64_t d = 0; d < head_dim; ++d) scratch.q[r * head_dim + d] = from[d] * problem.scale;
    scratch.maximum[r] = -__builtin_inff();
    scratch.sum[r] = 0.0F;
  }
  for (std::int64_t i = 0; i < padded * head_dim; ++i) scratch.out[i] = 0.0F;

  const std::int64_t end = problem.position(first_row + count - 1) + 1;
  const float* k_rows[kKeyTile];
  const float* v_rows[kKeyTile];
  for (std::int64_t key = 0; key < end; key += kKeyTile) {
    find_rows(problem, kv_head, key, end, scratch.converted, k_rows, v_rows);
    transpose_keys(k_rows, head_dim, scratch.k_transposed);
    for (int i = 0; i < kKeyTile; ++i) {
      __builtin_memcpy(scratch.v + i * head_dim, v_rows[i],
                       static_cast<std::size_t>(head_dim) * sizeof(float));
    }
    for (std::int64_t r = 0; r < padded; r += kRowPad) {
      const std::int64_t last = r + kRowPad <= count ? r + kRowPad - 1 : count - 1;
      if (problem.position(first_row + last) < key) continue;  // sees nothing of this tile
      multiply_add_columns(scratch.q + r * head_dim, head_dim, scratch.k_transposed, kKeyTile, head_dim,
                           scratch.scores, kKeyTile, kKeyTile, nullptr);
      // Keys of the tile that each row sees; `all` of them are seen by every row.
      std::int64_t seen[kRowPad];
      std::int64_t all = kKeyTile;
      for (std::int64_t i = 0; i < kRowPad; ++i) {
        const std::int64_t row = r + i < count ? r + i : count - 1;
        const std::int64_t keys = problem.position(first_row + row) - key + 1;
        seen[i] = keys < 0 ? 0 : keys < kKeyTile ? keys : kKeyTile;
        all = seen[i] < all ? seen[i] : all;
        for (std::int64_t j = seen[i]; j < kKeyTile; ++j)
          scratch.scores[i * kKeyTile + j] = -__builtin_inff();
      }
      float factor[kRowPad];
      for (std::int64_t i = 0; i < kRowPad; ++i) {
        factor[i] = softmax_row(scratch.scores + i * kKeyTile, scratch.maximum[r + i], scratch.sum[r + i]);
      }
      multiply_add_columns(scratch.scores, kKeyTile, scratch.v, head_dim, all, scratch.out + r * head_dim,
                           head_dim, head_dim, factor);
      // On the diagonal the rest goes row by row: 0 times a later token's infinity would be NaN.
      for (std::int64_t i = 0; i < kRowPad; ++i) {
        for (std::int64_t j = all; j < seen[i]; ++j) {
          add_scaled(scratch.scores[i * kKeyTile + j], scratch.v + j * head_dim, head_dim,
                     scratch.out + (r + i) * head_dim);
        }
      }
    }
  }
  for (std::int64_t r = 0; r < count; ++r) {
    float* to = problem.out_row(kv_head, first_row + r);
    const float* from = scratch.out + r * head_dim;
    for (std::int64_t d = 0; d < head_dim; ++d) to[d] = from[d] / scratch.sum[r];
  }
}

/// Lane i of the result: the sum of all lanes of part[i].
[[gnu::always_inline]] inline void add_across(const Vec4 (&part)[4], Vec4& result) {
  const Vec4 low = __builtin_shufflevector(part[0], part[1], 0, 1, 4, 5) +
                   __builtin_shufflevector(part[0], part[1], 2, 3, 6, 7);
  const Vec4 high = __builtin_shufflevector(part[2], part[3], 0, 1, 4, 5) +
                    __builtin_shufflevector(part[2], part[3], 2, 3, 6, 7);
  result = __builtin_shufflevector(low, high, 0, 2, 4, 6) + __builtin_shufflevector(low, high, 1, 3, 5, 7);
}

/// Scores of Count rows of Q with 4 keys read where they lie: scores[r][0 .. 3]. Reading ahead in the four
/// rows of `ahead`: pages lie anywhere, so the hardware does not guess them.
template <std::size_t Count>
[[gnu::always_inline]] inline void dot_products(const float* q, std::int64_t head_dim,
                                                const float* const* k_rows, const float* const* ahead,
                                                float* scores) {
  const auto width = static_cast<std::size_t>(head_dim);
  Vec sum[Count][4] = {};
  std::int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vec k[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      load(k[j], k_rows[j] + d);
      __builtin_prefetch(ahead[j] + d);
    }
#pragma GCC unroll 4
    for (std::size_t r = 0; r < Count; ++r) {
      Vec row;
      load(row, q + r * width + d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] += row * k[j];
    }
  }
#pragma GCC unroll 4
  for (std::size_t r = 0; r < Count; ++r) {
    Vec4 part[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) fold<Add>(sum[r][j], part[j]);
    Vec4 across;
    add_across(part, across);
    store(scores + r * kKeyTile, across);
  }
}

/// out[0 .. Count vectors) = out * factor + sum over keys of weights[key] * V row, read where they lie.
/// Reading ahead in the rows of `ahead`.
template <std::size_t Count>
[[gnu::always_inline]] inline void weigh_values(const float* weights, const float* const* v_rows,
                                                const float* const* ahead, std::int64_t column, int keys,
                                                float factor, float* out) {
  Vec sum[Count];
#pragma GCC unroll 8
  for (std::size_t n = 0; n < Count; ++n) {
    load(sum[n], out + column + n * kLanes);
    sum[n] *= factor;
  }
  for (int key = 0; key < keys; ++key) {
    const float* row = v_rows[key] + column;
    for (std::size_t n = 0; n < Count * kLanes; n += 16) __builtin_prefetch(ahead[key] + column + n);
#pragma GCC unroll 8
    for (std::size_t n = 0; n < Count; ++n) {
      Vec v;
      load(v, row + n * kLanes);
      sum[n] += v * weights[key];
    }
  }
#pragma GCC unroll 8
  for (std::size_t n = 0; n < Count; ++n) store(out + column + n * kLanes, sum[n]);
}

/// All rows (kFewRows at most) of a K/V head over keys [first_key, end_key), for few rows: K and V are read
/// once, where they lie. Leaves, for each row, what merge_splits() needs. `memory` is scratch.
inline void attend_keys(const AttentionProblem& problem, int kv_head, std::int64_t first_key,
                        std::int64_t end_key, float* memory, float* partial) {
  const std::int64_t head_dim = problem.kv.head_dim;
  const auto rows = static_cast<int>(problem.rows());
  float* q = memory;                             // [rows][head_dim]
  float* scores = memory + kFewRows * head_dim;  // [rows][kKeyTile]
  const std::int64_t stride = partial_floats(head_dim);
  for (int r = 0; r < rows; ++r) {
    const float* from = problem.q_row(kv_head, r);
    for (std::int64_t d = 0; d < head_dim; ++d) q[r * head_dim + d] = from[d] * problem.scale;
    float* own = partial + r * stride;
    own[0] = -__builtin_inff();
    for (std::int64_t i = 1; i < stride; ++i) own[i] = 0.0F;
  }
  const float* rows_of_tile[2][2][kKeyTile];  // this tile and the next; K, V
  float* const converted[2] = {scores + kFewRows * kKeyTile,
                               scores + kFewRows * kKeyTile + 2 * kKeyTile * head_dim};
  find_rows(problem, kv_head, first_key, end_key, converted[0], rows_of_tile[0][0], rows_of_tile[0][1]);
  int now = 0;
  for (std::int64_t key = first_key; key < end_key; key += kKeyTile, now = 1 - now) {
    const float* const* k_rows = rows_of_tile[now][0];
    const float* const* v_rows = rows_of_tile[now][1];
    const float* const* next_k_rows = rows_of_tile[1 - now][0];
    find_rows(problem, kv_head, key + kKeyTile, end_key, converted[1 - now], rows_of_tile[1 - now][0],
              rows_of_tile[1 - now][1]);
    const auto keys = static_cast<int>(end_key - key < kKeyTile ? end_key - key : kKeyTile);
    for (int j = 0; j < keys; j += 4) {
      int r = 0;
      for (; r + 3 <= rows; r += 3) {
        dot_products<3>(q + r * head_dim, head_dim, k_rows + j, v_rows + j, scores + r * kKeyTile + j);
      }
      for (; r < rows; ++r)
        dot_products<1>(q + r * head_dim, head_dim, k_rows + j, v_rows + j, scores + r * kKeyTile + j);
    }
    for (int r = 0; r < rows; ++r) {
      const std::int64_t before_end = problem.position(r) - key + 1;
      if (before_end <= 0) continue;  // this row is before the whole tile
      const int seen = before_end < keys ? static_cast<int>(before_end) : keys;
      float* own_scores = scores + r * kKeyTile;
      for (int i = seen; i < kKeyTile; ++i) own_scores[i] = -__builtin_inff();
      float* own = partial + r * stride;
      const float factor = softmax_row(own_scores, own[0], own[1]);
      float* out = own + 8;
      std::int64_t column = 0;
      for (; column + 8 * kLanes <= head_dim; column += 8 * kLanes) {
        weigh_values<8>(own_scores, v_rows, next_k_rows, column, seen, factor, out);
      }
      for (; column + 4 * kLanes <= head_dim; column += 4 * kLanes) {
        weigh_values<4>(own_scores, v_rows, next_k_rows, column, seen, factor, out);
      }
      for (; column + kLanes <= head_dim; column += kLanes) {
        weigh_values<1>(own_scores, v_rows, next_k_rows, column, seen, factor, out);
      }
    }
  }
}

/// Joins the splits of one row by their maxima and sums, in order. partial: [splits][row_stride].
inline void merge_splits(const float* partial, std::int64_t splits, std::int64_t split_stride,
                         std::int64_t head_dim, float* out) {
  float maximum = -__builtin_inff();
  for (std::int64_t s = 0; s < splits; ++s) {
    const float here = partial[s * split_stride];
    maximum = here > maximum ? here : maximum;
  }
  float sum = 0.0F;
  for (std::int64_t d = 0; d < head_dim; ++d) out[d] = 0.0F;
  for (std::int64_t s = 0; s < splits; ++s) {
    const float* own = partial + s * split_stride;
    Vec weight = Vec{} + (own[0] - maximum);
    exp2_in_place(weight);
    const float factor = weight[0];
    sum += factor * own[1];
    for (std::int64_t d = 0; d < head_dim; ++d) out[d] += factor * own[8 + d];
  }
  for (std::int64_t d = 0; d < head_dim; ++d) out[d] /= sum;
}
