// SPDX-License-Identifier: Apache-2.0
//
// codegemm/io/aqlm_codes.hpp - codes as AQLM stores them: [N][K / v][m], in signed integers that wrap.
// Layer: io (host only).
// See: https://github.com/Vahe1994/AQLM, inference_lib/src/aqlm/utils.py, pack_int_data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include <codegemm/quantized_matrix.hpp>

namespace codegemm::detail {

/// A code of 2^(b-1) or more is stored as code - 2^b, in the least of int8 and int16 that has b bits.
template <class Stored>
void pack_aqlm_codes(const QuantizedMatrixView& w, Stored* out) {
  static_assert(std::is_signed_v<Stored>, "codegemm: pack_aqlm_codes Stored must be signed");
  const std::int64_t vectors = w.vectors();
  const std::int32_t half = std::int32_t{1} << (w.format.b - 1);
  for (std::int64_t n = 0; n < w.rows; ++n) {
    for (std::int64_t j = 0; j < vectors; ++j) {
      for (std::int64_t c = 0; c < w.format.m; ++c) {
        const auto code = static_cast<std::int32_t>(w.code(c, n, j));
        *out++ = static_cast<Stored>(code >= half ? code - 2 * half : code);
      }
    }
  }
}

/// The codes of a valid matrix, as bytes of an AQLM tensor.
[[nodiscard]] inline std::vector<std::byte> aqlm_codes(const QuantizedMatrixView& w) {
  const auto count = static_cast<std::size_t>(w.rows * w.vectors() * w.format.m);
  std::vector<std::byte> bytes(count * static_cast<std::size_t>(w.format.stored_code_bits() / 8));
  if (w.format.stored_code_bits() == 8) {
    pack_aqlm_codes(w, reinterpret_cast<std::int8_t*>(bytes.data()));
  } else {
    std::vector<std::int16_t> codes(count);
    pack_aqlm_codes(w, codes.data());
    if (count > 0) std::memcpy(bytes.data(), codes.data(), bytes.size());
  }
  return bytes;
}

/// The way back, into a matrix of the right format and shape. Taken modulo 2^b, as AQLM does it.
template <class Stored>
void unpack_aqlm_codes(std::span<const std::byte> bytes, QuantizedMatrix& out) {
  const Format f = out.format();
  const std::uint32_t mask = (1U << f.b) - 1U;
  const std::byte* at = bytes.data();
  for (std::int64_t n = 0; n < out.rows(); ++n) {
    for (std::int64_t j = 0; j < out.cols() / f.v; ++j) {
      for (std::int64_t c = 0; c < f.m; ++c, at += sizeof(Stored)) {
        Stored stored = 0;
        std::memcpy(&stored, at, sizeof(stored));
        out.set_code(c, n, j, static_cast<std::uint32_t>(static_cast<std::int32_t>(stored)) & mask);
      }
    }
  }
}

}  // namespace codegemm::detail
