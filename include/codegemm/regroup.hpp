// SPDX-License-Identifier: Apache-2.0
//
// codegemm/regroup.hpp - the same weights under another scale group, where that exists.
// Layer: data (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <codegemm/base/status.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm {

/// `w` with one scale for every `group` weights (-1: one a row), every weight the same bits as before. A
/// smaller group always exists; a larger one only where all the scales that it would join are equal.
/// kUnsupported with the row and the two scales where they are not; kInvalidArgument for a group that the
/// format cannot have; kOutOfMemory; what validate() finds wrong with `w`.
[[nodiscard]] inline Result<QuantizedMatrix> regroup(const QuantizedMatrixView& w, int group) {
  if (Status status = validate(w); !status.ok()) return status;
  Format format = w.format;
  format.g = group;
  Result<QuantizedMatrix> made = QuantizedMatrix::create(format, w.rows, w.cols);
  if (!made.ok()) return made.status();
  QuantizedMatrix& out = *made;
  std::copy_n(w.codes, out.codes().size(), out.codes().data());
  std::copy_n(w.codebooks, out.codebooks().size(), out.codebooks().data());
  const std::int64_t old_length = w.format.g < 0 ? w.cols : w.format.g;
  const std::int64_t new_length = group < 0 ? w.cols : group;
  for (std::int64_t s = 0; s < format.scale_groups(w.cols); ++s) {
    const std::int64_t first = s * new_length / old_length;
    const std::int64_t last = (std::min(w.cols, (s + 1) * new_length) - 1) / old_length;
    for (std::int64_t n = 0; n < w.rows; ++n) {
      const Half scale = w.scales[first * w.rows + n];
      for (std::int64_t old = first + 1; old <= last; ++old) {
        const Half other = w.scales[old * w.rows + n];
        if (other == scale) continue;
        return error(StatusCode::kUnsupported, "row ", n, " has the scales ", scale.to_float(), " and ",
                     other.to_float(), " within what would be one group of ", new_length,
                     " weights: ", format_name(w.format), " cannot become ", format_name(format));
      }
      out.scales()[static_cast<std::size_t>(s * w.rows + n)] = scale;
    }
  }
  return made;
}

}  // namespace codegemm
