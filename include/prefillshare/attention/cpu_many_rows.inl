// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/attention/cpu_many_rows.inl - many rows of Q: tiles of scores from copies of K and V.
// A part of cpu_kernels.inl.

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
