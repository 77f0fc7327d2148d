// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/code_search.hpp - new codes for all rows, given codebooks and scales.
// Layer: quantize (host only).
// See: AQLM (arXiv 2401.06118), algorithm 1; GPTQ (arXiv 2210.17323); QuIP (arXiv 2307.13304)
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <codegemm/base/executor.hpp>
#include <codegemm/format.hpp>
#include <codegemm/quantize/additive_state.hpp>
#include <codegemm/quantize/beam.hpp>
#include <codegemm/quantize/guarded_loop.hpp>

namespace codegemm::detail {

/// Two ways to see the loss e H e^T of a row's error e, which a beam search over its vectors makes small.
///
/// kRefine goes through the vectors from the first to the last and changes each code with all others held, as
/// AQLM does: the terms of vector j are e_j H_jj e_j^T + 2 e_j (rest of e H)_j^T.
///
/// kRebuild chooses all codes anew. With H = L L^T, L lower triangular, the loss is the sum over j of
/// |e_j L_jj + sum over i > j of e_i L_ij|^2. From the last vector to the first each term depends on chosen
/// vectors only, so paths can be compared before they are complete, and each vector makes up for the errors
/// of those chosen before. With one path this is what GPTQ and QuIP's LDLQ do, with more a K-best decoder.
enum class SearchMode { kRefine, kRebuild };

/// The search of one tile of rows; a worker's own.
template <int kVecLen>
class TileSearch {
 public:
  /// factor: L, for kRebuild only.
  TileSearch(AdditiveState& state, const DenseMatrix& factor, SearchMode mode, int beam)
      : s_(state),
        cross_(mode == SearchMode::kRefine ? state.gram : factor),
        mode_(mode),
        beam_(beam),
        // The codes that are there are of use in kRefine; in kRebuild the others of a vector are out of date.
        vector_beam_(state.books, beam, mode == SearchMode::kRebuild && state.format.m > 1 ? 2 : 1),
        vectors_(state.vectors()) {}

  void run(std::int64_t first_row, std::int64_t count) {
    first_row_ = first_row;
    start(count);
    const std::int64_t blocks = (s_.cols + kBlock - 1) / kBlock;
    for (std::int64_t i = 0; i < blocks; ++i) {
      block_first_ = (mode_ == SearchMode::kRefine ? i : blocks - 1 - i) * kBlock;
      block_width_ = std::min<std::int64_t>(kBlock, s_.cols - block_first_);
      enter_block();
      const std::int64_t in_block = block_width_ / kVecLen;
      for (std::int64_t j = 0; j < in_block; ++j) {
        const std::int64_t local = (mode_ == SearchMode::kRefine ? j : in_block - 1 - j) * kVecLen;
        measure(block_first_ + local);
        for (Row& row : rows_) search_vector(row, local);
      }
      leave_block();
    }
    finish();
  }

 private:
  static constexpr int kBlock = 128;  // columns that are worked on between two products with H

  /// A path within the block of columns at hand.
  struct Path {
    int root = 0;  // the path before the block that it continues
    double loss = 0.0;
    float error[kBlock] = {};
    float cross[kBlock] = {};  // kRefine: (e H) at these columns; kRebuild: sum over chosen i of e_i L_i
    std::uint16_t codes[kMaxCodebooks][kCount<kBlock / kVecLen>] = {};
  };
  struct Row {
    std::int64_t n = 0;
    double start_loss = 0.0;  // kRebuild: of the codes that are there
    std::vector<Path> paths;
  };

  [[nodiscard]] float* error_of(std::size_t row, std::size_t path) {
    return errors_.row(static_cast<Eigen::Index>(row) * beam_ + static_cast<Eigen::Index>(path)).data();
  }
  [[nodiscard]] std::uint16_t* codes_of(std::size_t row, std::size_t path) {
    return codes_.data() +
           (row * static_cast<std::size_t>(beam_) + path) * static_cast<std::size_t>(s_.format.m * vectors_);
  }

  void start(std::int64_t count) {
    rows_.resize(static_cast<std::size_t>(count));
    errors_.setZero(count * beam_, s_.cols);
    codes_.assign(static_cast<std::size_t>(count * beam_ * s_.format.m * vectors_), 0);
    const std::vector<float> values = book_values(s_);
    DenseMatrix before(count, s_.cols);
    residual_rows(s_, values, first_row_, count, before.data());
    DenseMatrix product;
    if (mode_ == SearchMode::kRebuild) product.noalias() = before * s_.gram;
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      const auto i = static_cast<Eigen::Index>(r);
      Row& row = rows_[r];
      row.n = first_row_ + i;
      row.paths.assign(1, Path());
      if (mode_ == SearchMode::kRebuild)
        row.start_loss = dot(before.row(i).data(), product.row(i).data(), s_.cols);
      std::copy_n(before.row(i).data(), s_.cols, error_of(r, 0));
      std::copy_n(s_.codes_of(row.n), s_.format.m * vectors_, codes_of(r, 0));
    }
  }

  /// Fetches the block's part of every path, with what the columns outside of it mean for it.
  void enter_block() {
    DenseMatrix cross;
    if (mode_ == SearchMode::kRefine) {
      cross.noalias() = errors_ * cross_.middleCols(block_first_, block_width_);
    } else {
      const std::int64_t chosen = block_first_ + block_width_;
      cross.setZero(errors_.rows(), block_width_);
      if (chosen < s_.cols) {
        cross.noalias() = errors_.rightCols(s_.cols - chosen) *
                          cross_.block(chosen, block_first_, s_.cols - chosen, block_width_);
      }
    }
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      for (std::size_t p = 0; p < rows_[r].paths.size(); ++p) {
        Path& path = rows_[r].paths[p];
        path.root = static_cast<int>(p);
        std::copy_n(error_of(r, p) + block_first_, block_width_, path.error);
        std::copy_n(cross.data() +
                        (static_cast<std::int64_t>(r) * beam_ + static_cast<std::int64_t>(p)) * block_width_,
                    block_width_, path.cross);
        for (std::int64_t c = 0; c < s_.format.m; ++c) {
          std::copy_n(codes_of(r, p) + c * vectors_ + block_first_ / kVecLen, block_width_ / kVecLen,
                      path.codes[c]);
        }
      }
    }
  }

  /// Q at column k: H_jj, or L_jj L_jj^T.
  void measure(std::int64_t k) {
    for (int a = 0; a < kVecLen; ++a) {
      for (int b = 0; b < kVecLen; ++b) {
        float& q = metric_.q[a * kVecLen + b];
        factor_[a * kVecLen + b] = cross_(k + a, k + b);
        q = factor_[a * kVecLen + b];
        if (mode_ == SearchMode::kRefine) continue;
        q = 0.0F;
        for (int d = 0; d <= std::min(a, b); ++d) q += cross_(k + a, k + d) * cross_(k + b, k + d);
      }
    }
    metric_.measure(s_.books);
  }

  void search_vector(Row& row, std::int64_t local) {
    const std::int64_t k = block_first_ + local;
    const float scale = s_.scales_of(row.n)[k / s_.group_length()];
    std::vector<VectorPath<kVecLen>>& paths = vector_beam_.paths();
    paths.clear();
    for (std::size_t p = 0; p < row.paths.size(); ++p) paths.push_back(begin_vector(row.paths[p], p, local));
    // A group of zeros has the scale 0: every code is as good, and the old one stays.
    if (scale != 0.0F) vector_beam_.search(metric_, scale);
    continue_paths(row, paths, local);
  }

  [[nodiscard]] VectorPath<kVecLen> begin_vector(const Path& path, std::size_t p, std::int64_t local) const {
    VectorPath<kVecLen> out;
    out.parent = static_cast<int>(p);
    out.loss = path.loss;
    std::copy_n(path.error + local, kVecLen, out.error);
    for (std::int64_t c = 0; c < s_.format.m; ++c) out.codes[c] = path.codes[c][local / kVecLen];
    const float* const rest = path.cross + local;
    if (mode_ == SearchMode::kRefine) {
      std::copy_n(rest, kVecLen, out.gradient);  // e H, vector j's own part included
      return out;
    }
    // The term |e_j L_jj + rest|^2, new for this path.
    for (int a = 0; a < kVecLen; ++a) {
      float term = rest[a];
      for (int d = a; d < kVecLen; ++d) term += out.error[d] * factor_[d * kVecLen + a];
      out.loss += static_cast<double>(term) * static_cast<double>(term);
      for (int d = a; d < kVecLen; ++d) out.gradient[d] += factor_[d * kVecLen + a] * term;
    }
    return out;
  }

  /// The row's paths become those that the vector's search kept.
  void continue_paths(Row& row, const std::vector<VectorPath<kVecLen>>& kept, std::int64_t local) {
    // The first continuation of a path takes its memory over; others copy it.
    slots_.assign(row.paths.size(), -1);
    next_.resize(kept.size());
    for (std::size_t i = 0; i < kept.size(); ++i) {
      const auto parent = static_cast<std::size_t>(kept[i].parent);
      if (slots_[parent] < 0) {
        slots_[parent] = static_cast<int>(i);
      } else {
        next_[i] = row.paths[parent];
      }
    }
    for (std::size_t p = 0; p < slots_.size(); ++p) {
      if (slots_[p] >= 0) std::swap(next_[static_cast<std::size_t>(slots_[p])], row.paths[p]);
    }
    row.paths.swap(next_);
    for (std::size_t i = 0; i < kept.size(); ++i) advance(row.paths[i], kept[i], local);
  }

  void advance(Path& path, const VectorPath<kVecLen>& kept, std::int64_t local) {
    path.loss = kept.loss;
    const std::int64_t k = block_first_ + local;
    for (int d = 0; d < kVecLen; ++d) {
      const float* const row = cross_.row(k + d).data() + block_first_;
      if (mode_ == SearchMode::kRefine) {
        const float change = kept.error[d] - path.error[local + d];
        if (change != 0.0F)
          for (std::int64_t t = local + kVecLen; t < block_width_; ++t) path.cross[t] += change * row[t];
      } else {
        for (std::int64_t t = 0; t < local; ++t) path.cross[t] += kept.error[d] * row[t];
      }
      path.error[local + d] = kept.error[d];
    }
    for (std::int64_t c = 0; c < s_.format.m; ++c) path.codes[c][local / kVecLen] = kept.codes[c];
  }

  /// Writes the block's part of every path behind the path that it continues.
  void leave_block() {
    const std::int64_t code_count = s_.format.m * vectors_;
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      const std::vector<Path>& paths = rows_[r].paths;
      const auto count = paths.size();
      old_errors_.assign(error_of(r, 0), error_of(r, 0) + beam_ * s_.cols);
      old_codes_.assign(codes_of(r, 0), codes_of(r, 0) + beam_ * code_count);
      for (std::size_t p = 0; p < count; ++p) {
        const Path& path = paths[p];
        std::copy_n(old_errors_.data() + path.root * s_.cols, s_.cols, error_of(r, p));
        std::copy_n(old_codes_.data() + path.root * code_count, code_count, codes_of(r, p));
        std::copy_n(path.error, block_width_, error_of(r, p) + block_first_);
        for (std::int64_t c = 0; c < s_.format.m; ++c) {
          std::copy_n(path.codes[c], block_width_ / kVecLen,
                      codes_of(r, p) + c * vectors_ + block_first_ / kVecLen);
        }
      }
    }
  }

  void finish() {
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      const Row& row = rows_[r];
      std::size_t best = 0;
      for (std::size_t p = 1; p < row.paths.size(); ++p)
        if (row.paths[p].loss < row.paths[best].loss) best = p;
      // kRefine starts at 0 and only goes down; kRebuild may do worse than what was there.
      if (mode_ == SearchMode::kRebuild && !(row.paths[best].loss < row.start_loss)) continue;
      std::copy_n(codes_of(r, best), s_.format.m * vectors_, s_.codes_of(row.n));
    }
  }

  AdditiveState& s_;
  const DenseMatrix& cross_;  // H or L
  SearchMode mode_;
  std::int64_t beam_;
  VectorBeam<kVecLen> vector_beam_;
  std::int64_t vectors_;
  std::int64_t first_row_ = 0;
  std::int64_t block_first_ = 0;
  std::int64_t block_width_ = 0;
  std::vector<Row> rows_;
  DenseMatrix errors_;                // [rows][beam][K]
  std::vector<std::uint16_t> codes_;  // [rows][beam][m][K / v]
  VectorMetric<kVecLen> metric_;
  float factor_[kCount<kVecLen * kVecLen>] = {};  // H_jj or L_jj
  std::vector<int> slots_;
  std::vector<Path> next_;
  std::vector<float> old_errors_;
  std::vector<std::uint16_t> old_codes_;
};

template <int kVecLen>
void search_codes(AdditiveState& s, const DenseMatrix& factor, SearchMode mode, int beam,
                  Executor& executor) {
  constexpr std::int64_t kRows = 32;
  guarded_for(executor, (s.rows + kRows - 1) / kRows, [&](std::int64_t task, int) {
    TileSearch<kVecLen> tile(s, factor, mode, beam);
    tile.run(task * kRows, std::min(kRows, s.rows - task * kRows));
  });
}

inline void search_codes(AdditiveState& s, const DenseMatrix& factor, SearchMode mode, int beam,
                         Executor& executor) {
  with_vec_len(s.format.v, [&](auto v) { search_codes<v>(s, factor, mode, beam, executor); });
}

}  // namespace codegemm::detail
