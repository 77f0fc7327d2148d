// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cpu_few_rows.inl - few rows of Q: K and V are read once, where they lie.
// A part of cpu_kernels.inl.

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
