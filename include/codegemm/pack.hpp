// SPDX-License-Identifier: Apache-2.0
//
// codegemm/pack.hpp - canonical layout to the layout that the CPU kernels read, once, and back.
// Layer: data (host only).
// See: examples/01_codegemm_cpu.cpp
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <codegemm/base/aligned_buffer.hpp>
#include <codegemm/base/numerics.hpp>
#include <codegemm/base/status.hpp>
#include <codegemm/base/weight_arena.hpp>
#include <codegemm/cpu/byte_codebooks.hpp>
#include <codegemm/cpu/configs.hpp>
#include <codegemm/cpu/integer_tables.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantized_matrix.hpp>

namespace codegemm {

/// Rows that register lookups take at once.
inline constexpr int kBlockRows = 64;
/// Rows whose codes share one 64-bit word.
inline constexpr int kWordRows = 8;

/// Raw pointers into a PackedMatrix, for kernels. An *entry* is one (vector j, codebook c) pair: one code for
/// each row, one table for each activation. Entries are numbered j * m + c and cut into tiles whose
/// tables stay in the first-level cache together. The codes of an entry for the rows of a block are a byte
/// each, in the order of the rows. With 4 bits a code two share a byte: rows 0..31 of the block have its low
/// half, rows 32..63 the high one.
struct PackedView {
  Format format;                  ///< of the weights
  std::int64_t rows = 0;          ///< N
  std::int64_t cols = 0;          ///< K
  int block_rows = kBlockRows;    ///< rows in a block: kBlockRows, or kWordRows where nothing is looked up
  std::int64_t row_blocks = 0;    ///< ceil(rows / block_rows); rows beyond `rows` have code 0 and scale 0
  std::int64_t tile_vectors = 0;  ///< vectors in every tile but the last, which may have fewer
  std::int64_t tiles = 0;         ///< tiles along K
  /// [tiles][row_blocks][entries of the tile][words of an entry]
  const std::uint64_t* codes = nullptr;
  const float* codebooks = nullptr;             ///< [m][2^b][v]
  const float* codebooks_transposed = nullptr;  ///< [m][v][2^b]
  // codebooks[i] = about codebook_step * codebooks_rounded[i]; null where that is not exact enough
  const std::int16_t* codebooks_rounded = nullptr;  ///< [m][2^b][v]
  float codebook_step = 0.0F;                       ///< see codebooks_rounded
  /// The same as bytes, of codebook_byte_step (cpu/byte_codebooks.hpp); null where no kernel takes them.
  const std::int8_t* codebooks_bytes = nullptr;
  float codebook_byte_step = 0.0F;  ///< see codebooks_bytes
  /// The same as pairs of 16-bit integers, of codebook_pair_step (cpu/integer_tables.hpp); null where no
  /// kernel takes them.
  const std::int32_t* codebooks_pairs = nullptr;
  float codebook_pair_step = 0.0F;  ///< see codebooks_pairs
  const Half* scales = nullptr;     ///< [ceil(K / g)][row_blocks * block_rows]

  /// Vectors of a row, K / v.
  [[nodiscard]] std::int64_t vectors() const noexcept { return cols / format.v; }
  /// Rows with the last block filled up.
  [[nodiscard]] std::int64_t padded_rows() const noexcept { return row_blocks * block_rows; }
  /// 64-bit words of an entry in one row block.
  [[nodiscard]] std::int64_t entry_words() const noexcept {
    return block_rows / kWordRows / (format.b == 4 ? 2 : 1);
  }
  /// Vectors of tile `tile`.
  [[nodiscard]] std::int64_t vectors_in(std::int64_t tile) const noexcept {
    return std::min(tile_vectors, vectors() - tile * tile_vectors);
  }
  /// The codes of one tile: [row_blocks][vectors_in(tile) * m][entry_words()].
  [[nodiscard]] const std::uint64_t* tile_codes(std::int64_t tile) const noexcept {
    return codes + tile * tile_vectors * format.m * row_blocks * entry_words();
  }
  /// Vectors that share one scale.
  [[nodiscard]] std::int64_t segment_vectors() const noexcept {
    return format.g < 0 ? vectors() : format.g / format.v;
  }
};

class PackedMatrix;

namespace detail {

/// pack() for the kernels of `isa`; null: memory of its own.
[[nodiscard]] Result<PackedMatrix> pack_for(const QuantizedMatrixView& w, Isa isa,
                                            WeightArena* arena = nullptr);

}  // namespace detail

/// Weights in the CPU kernels' own layout, which may change from version to version: keep the canonical
/// form on disk and pack after loading. Made by pack(); movable.
class PackedMatrix {
 public:
  static constexpr int kLayoutVersion = 3;  ///< changes with the layout

  [[nodiscard]] Format format() const noexcept { return view_.format; }    ///< of the weights
  [[nodiscard]] std::int64_t rows() const noexcept { return view_.rows; }  ///< N
  [[nodiscard]] std::int64_t cols() const noexcept { return view_.cols; }  ///< K
  /// Memory held: codes, scales, two fp32 copies of the codebooks, up to two in 16-bit integers, one in
  /// bytes.
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  /// For kernels; valid as long as this object lives.
  [[nodiscard]] const PackedView& view() const noexcept { return view_; }

  /// An empty 0 x 0 matrix.
  PackedMatrix() = default;
  PackedMatrix(PackedMatrix&&) noexcept = default;             ///< the other is empty afterwards
  PackedMatrix& operator=(PackedMatrix&&) noexcept = default;  ///< the same
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;
  ~PackedMatrix() = default;

 private:
  friend Result<PackedMatrix> detail::pack_for(const QuantizedMatrixView& w, Isa isa, WeightArena* arena);

  PackedView view_;
  std::shared_ptr<std::byte> memory_;  // this object's alone, or with a chunk of an arena
  std::size_t bytes_ = 0;
};

namespace detail {

// Cuts memory into arrays, each of which begins on a cache line.
class MemoryParts {
 public:
  // An array, once the memory is there.
  template <class T>
  struct Part {
    std::size_t first;  // in bytes
    [[nodiscard]] T* in(std::byte* memory) const noexcept { return reinterpret_cast<T*>(memory + first); }
  };

  template <class T>
  [[nodiscard]] Part<T> add(std::int64_t count) noexcept {
    const Part<T> out{bytes_};
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    bytes_ += (size + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    return out;
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

// Where the codes of entry (j, c) begin, in bytes, and how far on those of the next row block lie.
struct EntryPlace {
  std::int64_t first;
  std::int64_t stride;
  int block_rows;
  bool nibbles;

  [[nodiscard]] std::int64_t byte(std::int64_t row) const noexcept {
    const std::int64_t in_block = row % block_rows;
    return first + row / block_rows * stride + (nibbles ? in_block % (block_rows / 2) : in_block);
  }
  [[nodiscard]] int shift(std::int64_t row) const noexcept {
    return nibbles && row % block_rows >= block_rows / 2 ? 4 : 0;
  }
};

[[nodiscard]] inline EntryPlace entry_place(const PackedView& p, std::int64_t j, std::int64_t c) noexcept {
  const std::int64_t tile = j / p.tile_vectors;
  const std::int64_t entry_bytes = p.entry_words() * 8;
  const std::int64_t entry = (j - tile * p.tile_vectors) * p.format.m + c;
  return {(tile * p.tile_vectors * p.format.m * p.row_blocks + entry) * entry_bytes,
          p.vectors_in(tile) * p.format.m * entry_bytes, p.block_rows, p.format.b == 4};
}

// The codes of an entry for all rows, from w to their place. uses: how often each code is.
inline void pack_entry(const QuantizedMatrixView& w, std::int64_t j, std::int64_t c, const EntryPlace& place,
                       unsigned char* bytes, std::int64_t* uses) noexcept {
  const int per_word = w.format.codes_per_word();
  const int bits = w.format.stored_code_bits();
  const std::int64_t words = (w.vectors() + per_word - 1) / per_word;
  const std::uint32_t* const codes = w.codes + (c * words + j / per_word) * w.rows;
  const int shift = static_cast<int>(j % per_word) * bits;
  const std::uint32_t mask = (1U << bits) - 1U;
  const std::int64_t apart = place.nibbles ? place.block_rows / 2 : place.block_rows;
  for (std::int64_t first = 0, block = 0; first < w.rows; first += place.block_rows, ++block) {
    unsigned char* const to = bytes + place.first + block * place.stride;
    const std::int64_t count = std::min<std::int64_t>(place.block_rows, w.rows - first);
    for (std::int64_t row = 0; row < std::min(count, apart); ++row) {
      const std::uint32_t code = codes[first + row] >> shift & mask;
      to[row] = static_cast<unsigned char>(code);
      ++uses[code];
    }
    for (std::int64_t row = apart; row < count; ++row) {
      const std::uint32_t code = codes[first + row] >> shift & mask;
      to[row - apart] = static_cast<unsigned char>(to[row - apart] | code << 4);
      ++uses[code];
    }
  }
}

// Vectors in a tile: as many as the tables allow, but so that tiles and scale groups share their borders
// where that costs less than half of the tile.
[[nodiscard]] inline std::int64_t choose_grouped_tile(Format f, std::int64_t vectors, bool lookup) {
  const std::int64_t floats = lookup ? CpuTiles::kLookupTableFloats : CpuTiles::kTableFloats;
  const std::int64_t entries = std::min(CpuTiles::kMaxEntries, floats / f.centroids());
  const std::int64_t most = std::max<std::int64_t>(1, entries / f.m);
  if (f.g < 0 || vectors <= most) return most;
  const std::int64_t segment = std::max(1, f.g / f.v);
  if (segment <= most) return most / segment * segment;
  for (std::int64_t tile = most; tile > most / 2; --tile) {
    if (segment % tile == 0) return tile;
  }
  return most;
}

// The same, but few vectors in an even number of equal tiles, which two workers share evenly, if such tiles
// are at most an eighth larger; and in one for each of the two where its 16-bit tables fit.
[[nodiscard]] inline std::int64_t choose_tile_vectors(Format f, std::int64_t rows, std::int64_t vectors,
                                                      bool lookup) {
  CODEGEMM_ASSERT(validate(f).ok());
  constexpr std::int64_t kFewTiles = 8;
  const std::int64_t tile = choose_grouped_tile(f, vectors, lookup);
  if (!lookup) return tile;
  const std::int64_t half = vectors / 2;
  if (vectors > tile && vectors % 2 == 0 && f.b > 4 && shares_k_by_two(f.b, rows, vectors * f.v) &&
      half * f.m * encoded_bytes(f.b) <= first_level_bytes() * 3 / 4) {
    return half;
  }
  if (vectors % (2 * tile) == 0 || vectors > kFewTiles * tile) return tile;
  for (std::int64_t tiles = 2; tiles <= kFewTiles; tiles *= 2) {
    const std::int64_t equal = vectors / tiles;
    if (vectors % tiles == 0 && equal <= tile + tile / 8 && equal > tile / 2) return equal;
  }
  return tile;
}

/// The largest sum of m rounded centroid elements: with kIntegerChunk activations whose magnitudes add up to
/// no more than kRoundedTokenSum, every sum of products fits into 32 bits.
inline constexpr std::int64_t kRoundedWeightMax = 8191;

/// The step by which codebooks are rounded to integers whose sums are at most `most`, or 0 where that would
/// change W by more than 5e-4 of its norm: centroids that are hardly used but far out stretch the step.
/// histogram: [m][2^b], how often each code is used.
[[nodiscard]] inline float rounding_step(const float* codebooks, Format f,
                                         const std::vector<std::int64_t>& histogram, std::int64_t uses,
                                         std::int64_t most) {
  constexpr double kAccepted = 5e-4;
  double bound = 0.0;  // of a weight before its scale
  double power = 0.0;  // its mean square
  for (std::int64_t c = 0; c < f.m; ++c) {
    double largest = 0.0;
    for (std::int64_t i = 0; i < f.centroids(); ++i) {
      const auto used = static_cast<double>(histogram[static_cast<std::size_t>(c * f.centroids() + i)]);
      for (std::int64_t d = 0; d < f.v; ++d) {
        const double value = codebooks[(c * f.centroids() + i) * f.v + d];
        largest = std::max(largest, std::abs(value));
        power += value * value * used;
      }
    }
    bound += largest;
  }
  power /= std::max(1.0, static_cast<double>(uses * f.v));
  const double step = bound / static_cast<double>(most - f.m);
  const bool good = step > 1e-30 && f.m * step * step / 12.0 <= kAccepted * kAccepted * power;
  return good ? static_cast<float>(step) : 0.0F;
}

}  // namespace detail

/// Repacks for the CPU kernels of this machine. Errors: those of validate(w); kUnsupported for b > 8;
/// kInvalidArgument for a codebook value or scale that is not finite, with its place; kOutOfMemory.
[[nodiscard]] inline Result<PackedMatrix> pack(const QuantizedMatrixView& w) {
  return detail::pack_for(w, detect_isa());
}

/// The same beside other matrices of a model.
[[nodiscard]] inline Result<PackedMatrix> pack(const QuantizedMatrixView& w, WeightArena& arena) {
  return detail::pack_for(w, detect_isa(), &arena);
}

inline Result<PackedMatrix> detail::pack_for(const QuantizedMatrixView& w, Isa isa, WeightArena* arena) {
  if (Status status = validate(w); !status.ok()) return status;
  const Format f = w.format;
  if (f.b > kMaxPsumbookCodeBits) {
    return error(StatusCode::kUnsupported, "pack: format ", format_name(f), " has b = ", f.b,
                 " bits a code; the CPU kernels serve b = ", kMinCodeBits, "..", kMaxPsumbookCodeBits);
  }
  const std::int64_t codebook_values = f.m * f.centroids() * f.v;
  const std::int64_t segments = f.scale_groups(w.cols);
  for (std::int64_t i = 0; i < codebook_values; ++i) {
    if (!std::isfinite(w.codebooks[i].to_float())) {
      return error(StatusCode::kInvalidArgument, "pack: codebook ", i / (f.centroids() * f.v), ", centroid ",
                   i / f.v % f.centroids(), ", element ", i % f.v, " is not finite");
    }
  }
  for (std::int64_t i = 0; i < segments * w.rows; ++i) {
    if (!std::isfinite(w.scales[i].to_float())) {
      return error(StatusCode::kInvalidArgument, "pack: scale of row ", i % w.rows, ", group ", i / w.rows,
                   " is not finite");
    }
  }

  PackedMatrix out;
  PackedView view;
  view.format = f;
  view.rows = w.rows;
  view.cols = w.cols;
  const bool lookup = detail::lookup_cost(isa, f.b) > 0.0;
  view.block_rows = lookup || f.b == 4 ? kBlockRows : kWordRows;
  view.row_blocks = (w.rows + view.block_rows - 1) / view.block_rows;
  view.tile_vectors = detail::choose_tile_vectors(f, w.rows, w.vectors(), lookup);
  view.tiles = (w.vectors() + view.tile_vectors - 1) / view.tile_vectors;
  const std::int64_t padded = view.padded_rows();
  const std::int64_t words = view.row_blocks * w.vectors() * f.m * view.entry_words();
  const bool pairs = lookup && detail::makes_integer_tables(isa, f.b);
  // Two vectors of 2 go together, so they may not lie in two tiles.
  const bool as_bytes = isa == Isa::kAvx512Vbmi && view.block_rows == kBlockRows &&
                        f.m <= detail::kByteCodebooksMax && (f.v > 2 || view.tile_vectors % 2 == 0);
  // What one token reads lies together.
  detail::MemoryParts parts;
  const auto at_pairs = parts.add<std::int32_t>(pairs ? codebook_values / 2 : 0);
  const auto at_scales = parts.add<Half>(segments * padded);
  const auto at_codes = parts.add<std::uint64_t>(words);
  const auto at_codebooks = parts.add<float>(2 * codebook_values);
  const auto at_rounded = parts.add<std::int16_t>(codebook_values);
  const auto at_bytes = parts.add<std::int8_t>(as_bytes ? detail::byte_codebook_bytes(f) : 0);
  out.bytes_ = parts.bytes();
  out.memory_ = arena != nullptr ? arena->allocate(parts.bytes()) : shared_bytes(parts.bytes());
  if (parts.bytes() > 0 && out.memory_ == nullptr) {
    return error(StatusCode::kOutOfMemory, "pack: ", w.rows, " x ", w.cols, " as ", format_name(f), " needs ",
                 parts.bytes(), " bytes");
  }
  std::byte* const memory = out.memory_.get();

  std::uint64_t* const codes = at_codes.in(memory);
  if (words > 0) std::memset(codes, 0, static_cast<std::size_t>(words) * sizeof(std::uint64_t));
  std::vector<std::int64_t> histogram(static_cast<std::size_t>(f.m * f.centroids()));
  for (std::int64_t c = 0; c < f.m; ++c) {
    std::int64_t* const uses = histogram.data() + c * f.centroids();
    for (std::int64_t j = 0; j < w.vectors(); ++j) {
      detail::pack_entry(w, j, c, detail::entry_place(view, j, c), reinterpret_cast<unsigned char*>(codes),
                         uses);
    }
  }

  float* const codebooks = at_codebooks.in(memory);
  float* const transposed = codebooks + codebook_values;
  for (std::int64_t i = 0; i < codebook_values; ++i) {
    const float value = w.codebooks[i].to_float();
    const std::int64_t c = i / (f.centroids() * f.v);
    codebooks[i] = value;
    transposed[(c * f.v + i % f.v) * f.centroids() + i / f.v % f.centroids()] = value;
  }
  const std::int64_t uses = w.rows * w.vectors();
  view.codebook_step = detail::rounding_step(codebooks, f, histogram, uses, detail::kRoundedWeightMax);
  if (view.codebook_step > 0.0F) {
    std::int16_t* const rounded = at_rounded.in(memory);
    for (std::int64_t i = 0; i < codebook_values; ++i) {
      rounded[i] = static_cast<std::int16_t>(std::lround(codebooks[i] / view.codebook_step));
    }
    view.codebooks_rounded = rounded;
  }
  if (as_bytes) {
    view.codebook_byte_step =
        detail::rounding_step(codebooks, f, histogram, uses, detail::byte_weight_max(f.m));
  }
  if (view.codebook_byte_step > 0.0F) {
    view.codebooks_bytes = at_bytes.in(memory);
    detail::fill_byte_codebooks(codebooks, f, view.codebook_byte_step, at_bytes.in(memory));
  }
  if (pairs) {
    view.codebook_pair_step =
        detail::pair_step(codebooks, f, detail::longest_flush(w, codebooks, view.tile_vectors));
  }
  if (view.codebook_pair_step > 0.0F) {
    view.codebooks_pairs = at_pairs.in(memory);
    detail::fill_pairs(codebooks, f, view.codebook_pair_step, at_pairs.in(memory));
  }
  Half* const scales = at_scales.in(memory);
  for (std::int64_t s = 0; s < segments; ++s) {
    for (std::int64_t n = 0; n < padded; ++n) {
      scales[s * padded + n] = n < w.rows ? w.scales[s * w.rows + n] : Half{};
    }
  }

  view.codes = codes;
  view.codebooks = codebooks;
  view.codebooks_transposed = transposed;
  view.scales = scales;
  out.view_ = view;
  return out;
}

/// Back to the canonical layout; exact: unpack(pack(w)) has the codes, codebooks and scales of w.
/// kOutOfMemory.
[[nodiscard]] inline Result<QuantizedMatrix> unpack(const PackedMatrix& packed) {
  const PackedView& p = packed.view();
  const Format f = p.format;
  Result<QuantizedMatrix> created = QuantizedMatrix::create(f, p.rows, p.cols);
  if (!created.ok()) return created.status();
  QuantizedMatrix& out = *created;
  const auto* const bytes = reinterpret_cast<const unsigned char*>(p.codes);
  const unsigned mask = f.b == 4 ? 15U : 255U;
  for (std::int64_t c = 0; c < f.m; ++c) {
    for (std::int64_t j = 0; j < p.vectors(); ++j) {
      const detail::EntryPlace place = detail::entry_place(p, j, c);
      for (std::int64_t n = 0; n < p.rows; ++n) {
        const unsigned byte = bytes[place.byte(n)];
        out.set_code(c, n, j, (byte >> place.shift(n)) & mask);
      }
    }
  }
  for (std::size_t i = 0; i < out.codebooks().size(); ++i) {
    out.codebooks()[i] = p.codebooks == nullptr ? Half{} : Half::from_float(p.codebooks[i]);
  }
  for (std::int64_t s = 0; s < f.scale_groups(p.cols); ++s) {
    for (std::int64_t n = 0; n < p.rows; ++n) {
      out.scales()[static_cast<std::size_t>(s * p.rows + n)] = p.scales[s * p.padded_rows() + n];
    }
  }
  return created;
}

}  // namespace codegemm
