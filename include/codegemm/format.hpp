// SPDX-License-Identifier: Apache-2.0
//
// codegemm/format.hpp - the codebook format (v, m, b, g): its name, its limits, its bits per weight.
// Layer: data (host + device, no CUDA headers).
// See: examples/01_codegemm_cpu.cpp
#pragma once

#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>

#include <codegemm/base/quoted.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/base/text.hpp>

namespace codegemm {

inline constexpr int kMaxCodebooks = 4;         ///< most codebooks, m
inline constexpr int kMaxVecLen = 16;           ///< longest vector, v
inline constexpr int kMinCodeBits = 4;          ///< fewest bits of a code, b
inline constexpr int kMaxPsumbookCodeBits = 8;  ///< beyond, a Psumbook costs more than it saves
inline constexpr int kMaxCodeBits = 16;         ///< beyond, the canonical layout has no place for a code

/// Weights are cut into vectors of v along K. Each vector is the sum of one centroid out of each of m
/// codebooks with 2^b centroids, times one scale for every g weights of a row (g = -1: one scale a row):
///   W[n, k] = s[n, k / g] * sum_c C_c[code_c[n, k / v]][k % v]
struct Format {
  int v = 4;    ///< weights that one code stands for
  int m = 1;    ///< codebooks, whose centroids are added
  int b = 8;    ///< bits of a code: 2^b centroids in a codebook
  int g = 128;  ///< weights of a row that share one scale; -1: the whole row

  /// 2^b, the number of centroids in a codebook.
  [[nodiscard]] constexpr std::int64_t centroids() const noexcept { return std::int64_t{1} << b; }
  /// Bits that a code takes in the canonical layout: 8 or 16.
  [[nodiscard]] constexpr int stored_code_bits() const noexcept { return b <= 8 ? 8 : 16; }
  /// Codes in one 32-bit word of the canonical layout: 4 or 2.
  [[nodiscard]] constexpr int codes_per_word() const noexcept { return 32 / stored_code_bits(); }
  /// Scales along a row of `cols` weights; the last one may cover less than g.
  [[nodiscard]] constexpr std::int64_t scale_groups(std::int64_t cols) const noexcept {
    if (cols == 0) return 0;
    return g <= 0 ? 1 : (cols + g - 1) / g;
  }

  /// All four numbers are equal.
  friend constexpr bool operator==(const Format&, const Format&) = default;
};

/// The same as a type, for code that fixes the format when it is compiled.
template <int V, int M, int B, int G = -1>
struct StaticFormat {
  static_assert(V == 2 || V == 4 || V == 8 || V == 16, "codegemm: StaticFormat V must be 2, 4, 8 or 16");
  static_assert(M >= 1 && M <= kMaxCodebooks, "codegemm: StaticFormat M must be 1 to 4");
  static_assert(B >= kMinCodeBits && B <= kMaxCodeBits, "codegemm: StaticFormat B must be 4 to 16");
  static_assert(G == -1 || (G > 0 && G % V == 0), "codegemm: StaticFormat G must be -1 or a multiple of V");
  static constexpr int kVecLen = V;      ///< as Format::v
  static constexpr int kCodebooks = M;   ///< as Format::m
  static constexpr int kCodeBits = B;    ///< as Format::b
  static constexpr int kScaleGroup = G;  ///< as Format::g
  /// The same at run time.
  [[nodiscard]] static constexpr Format format() noexcept { return Format{V, M, B, G}; }
};

/// The short name, as parse_format() reads it: "m1v4g128", "m2v8g-1", "m1v4b6g32" (b only where it is not 8).
[[nodiscard]] inline std::string format_name(Format f) {
  return f.b == 8 ? concat('m', f.m, 'v', f.v, 'g', f.g) : concat('m', f.m, 'v', f.v, 'b', f.b, 'g', f.g);
}

/// Whether the canonical layout can hold this format. Kernels may serve less: pack() says what it needs.
[[nodiscard]] inline Status validate(Format f) {
  if (f.v != 2 && f.v != 4 && f.v != 8 && f.v != 16) {
    return error(StatusCode::kInvalidArgument, "format: v = ", f.v, " is not 2, 4, 8 or 16");
  }
  if (f.m < 1 || f.m > kMaxCodebooks) {
    return error(StatusCode::kInvalidArgument, "format: m = ", f.m, " is not in 1..", kMaxCodebooks);
  }
  if (f.b < kMinCodeBits || f.b > kMaxCodeBits) {
    return error(StatusCode::kInvalidArgument, "format: b = ", f.b, " is not in ", kMinCodeBits, "..",
                 kMaxCodeBits);
  }
  if (f.g != -1 && (f.g <= 0 || f.g % f.v != 0)) {
    return error(StatusCode::kInvalidArgument, "format: g = ", f.g,
                 " is neither -1 nor a positive multiple of v = ", f.v);
  }
  return {};
}

namespace detail {

// Reads "<letter><number>" off the front of `text`; false and nothing read where it is not there.
inline bool take_field(std::string_view& text, char letter, int& value) {
  if (text.size() < 2 || text.front() != letter) return false;
  const char* const first = text.data() + 1;
  const char* const last = text.data() + text.size();
  const auto [end, code] = std::from_chars(first, last, value);
  if (code != std::errc() || end == first) return false;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return true;
}

/// body(v) for the v of a valid format, as a std::integral_constant: loops over a vector are unrolled then.
template <class Body>
decltype(auto) with_vec_len(int v, Body&& body) {
  switch (v) {
    case 2: return body(std::integral_constant<int, 2>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 8: return body(std::integral_constant<int, 8>{});
    default: return body(std::integral_constant<int, 16>{});
  }
}

}  // namespace detail

/// Reads a name such as "m1v4g128" or "m1v4b6g32" (no b: 8 bits) and checks it by validate().
[[nodiscard]] inline Result<Format> parse_format(std::string_view name) {
  // A name may come out of a file.
  const std::string shown = codegemm::quoted(name, 40);
  Format f{};
  std::string_view rest = name;
  bool read = detail::take_field(rest, 'm', f.m) && detail::take_field(rest, 'v', f.v);
  if (read && !rest.empty() && rest.front() == 'b') read = detail::take_field(rest, 'b', f.b);
  read = read && detail::take_field(rest, 'g', f.g) && rest.empty();
  if (!read) {
    return error(StatusCode::kInvalidArgument, "format ", shown,
                 " is not of the form mMvVgG or mMvVbBgG, such as m1v4g128 or m1v4b6g32");
  }
  if (Status status = validate(f); !status.ok()) return status.with_prefix(shown);
  return f;
}

/// q = m*b/v + 16/g + 16*m*2^b*v/(N*K): codes, scales and codebooks of an N x K matrix, per weight. With
/// g = -1 the scale term is 16/K. An empty matrix has no weights to share the codebooks: 0 for that term.
[[nodiscard]] inline double bits_per_weight(Format f, std::int64_t rows, std::int64_t cols) {
  const double weights = static_cast<double>(rows) * static_cast<double>(cols);
  const double codes = static_cast<double>(f.m) * f.b / f.v;
  if (weights == 0.0) return codes;
  const double scales = 16.0 * static_cast<double>(f.scale_groups(cols)) / static_cast<double>(cols);
  return codes + scales + 16.0 * f.m * static_cast<double>(f.centroids()) * f.v / weights;
}

}  // namespace codegemm
