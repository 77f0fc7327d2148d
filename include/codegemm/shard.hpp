// SPDX-License-Identifier: Apache-2.0
//
// codegemm/shard.hpp - pieces of a quantized matrix, cut before packing: tensor parallelism.
// Layer: data (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <codegemm/base/status.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm {

/// Rows first .. first + rows - 1: a shard along N, whose products are these columns of y. kInvalidArgument
/// for rows that are not there, kOutOfMemory, and what validate() finds wrong with `w`.
[[nodiscard]] inline Result<QuantizedMatrix> shard_rows(const QuantizedMatrixView& w, std::int64_t first,
                                                        std::int64_t rows) {
  if (Status status = validate(w); !status.ok()) return status;
  if (first < 0 || rows < 0 || first > w.rows || rows > w.rows - first) {
    return error(StatusCode::kInvalidArgument, "shard of ", rows, " rows from row ", first, " on, of ",
                 w.rows);
  }
  Result<QuantizedMatrix> made = QuantizedMatrix::create(w.format, rows, w.cols);
  if (!made.ok()) return made.status();
  QuantizedMatrix& out = *made;
  const auto copy = [&](const auto* from, auto to) {  // [..][w.rows] to [..][rows]
    if (rows == 0) return;
    for (std::size_t i = 0; i < to.size(); i += static_cast<std::size_t>(rows), from += w.rows)
      std::copy_n(from + first, rows, to.data() + i);
  };
  copy(w.codes, out.codes());
  copy(w.scales, out.scales());
  std::copy_n(w.codebooks, out.codebooks().size(), out.codebooks().data());
  return made;
}

/// Columns first .. first + cols - 1: a shard along K. The products of all shards with their columns of x add
/// up to y. `first` is a multiple of v and g, and so is `cols` but for the last shard. kInvalidArgument else;
/// kOutOfMemory; what validate() finds wrong with `w`.
[[nodiscard]] inline Result<QuantizedMatrix> shard_cols(const QuantizedMatrixView& w, std::int64_t first,
                                                        std::int64_t cols) {
  if (Status status = validate(w); !status.ok()) return status;
  const Format f = w.format;
  const std::int64_t unit = f.g < 0 ? f.v : f.g;  // a multiple of v
  if (first < 0 || cols < 0 || first > w.cols || cols > w.cols - first || first % unit != 0 ||
      (cols % unit != 0 && first + cols != w.cols)) {
    return error(StatusCode::kInvalidArgument, "shard of ", cols, " columns from column ", first, " on, of ",
                 w.cols, ": ", format_name(f), " is cut at multiples of ", unit);
  }
  Result<QuantizedMatrix> made = QuantizedMatrix::create(f, w.rows, cols);
  if (!made.ok()) return made.status();
  QuantizedMatrix& out = *made;
  for (std::int64_t c = 0; c < f.m; ++c) {
    for (std::int64_t n = 0; n < w.rows; ++n) {
      for (std::int64_t j = 0; j < cols / f.v; ++j) out.set_code(c, n, j, w.code(c, n, first / f.v + j));
    }
  }
  const Half* const scales = f.g < 0 ? w.scales : w.scales + first / f.g * w.rows;
  std::copy_n(scales, out.scales().size(), out.scales().data());
  std::copy_n(w.codebooks, out.codebooks().size(), out.codebooks().data());
  return made;
}

}  // namespace codegemm
