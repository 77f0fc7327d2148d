// SPDX-License-Identifier: Apache-2.0
//
// codegemm/quantize/nearest.hpp - the nearest centroid of each vector.
// Layer: quantize (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <codegemm/base/macros.hpp>
#include <codegemm/cpu/isa.hpp>
#include <codegemm/format.hpp>

#if CODEGEMM_HAS_AVX2
#include <immintrin.h>
#endif

namespace codegemm::detail {

/// One codebook, ready for the search: |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c), and |x|^2 does not matter.
struct SearchBook {
  int v = 0;
  std::int64_t centroids = 0;     // a multiple of 16
  std::vector<float> values;      // [centroids][v]
  std::vector<float> transposed;  // [v][centroids]
  std::vector<float> half_norms;  // [centroids]

  SearchBook(int v_, std::int64_t centroids_)
      : v(v_),
        centroids(centroids_),
        values(static_cast<std::size_t>(centroids_ * v_)),
        transposed(values.size()),
        half_norms(static_cast<std::size_t>(centroids_)) {}

  [[nodiscard]] const float* centroid(std::int64_t i) const { return values.data() + i * v; }

  /// After `values` has changed.
  void refresh() {
    for (std::int64_t i = 0; i < centroids; ++i) {
      float norm = 0.0F;
      for (std::int64_t d = 0; d < v; ++d) {
        const float value = values[static_cast<std::size_t>(i * v + d)];
        transposed[static_cast<std::size_t>(d * centroids + i)] = value;
        norm += value * value;
      }
      half_norms[static_cast<std::size_t>(i)] = 0.5F * norm;
    }
  }
};

/// codes[i] = the centroid nearest to x[i][v], the lowest one of equals.
template <int kVecLen>
void nearest_portable(const SearchBook& book, const float* x, std::int64_t count, std::uint16_t* codes) {
  constexpr int kLanes = 8;
  for (std::int64_t n = 0; n < count; ++n, x += kVecLen) {
    float best[kLanes];
    std::int32_t index[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      best[l] = std::numeric_limits<float>::infinity();
      index[l] = l;
    }
    for (std::int64_t i = 0; i < book.centroids; i += kLanes) {
      const float* const column = book.transposed.data() + i;
      for (int l = 0; l < kLanes; ++l) {
        float score = book.half_norms[static_cast<std::size_t>(i + l)];
        for (int d = 0; d < kVecLen; ++d) score -= x[d] * column[d * book.centroids + l];
        index[l] = score < best[l] ? static_cast<std::int32_t>(i + l) : index[l];
        best[l] = score < best[l] ? score : best[l];
      }
    }
    int least = 0;
    for (int l = 1; l < kLanes; ++l) {
      if (best[l] < best[least] || (best[l] == best[least] && index[l] < index[least])) least = l;
    }
    codes[n] = static_cast<std::uint16_t>(index[least]);
  }
}

#if CODEGEMM_HAS_AVX2

// The index that goes with the least of eight scores, the lowest index of equals. No branch: which lane it is
// cannot be predicted.
CODEGEMM_TARGET_AVX2 inline std::uint16_t least_index_avx2(__m256 scores, __m256i indices) {
  __m256 least = _mm256_min_ps(scores, _mm256_permute2f128_ps(scores, scores, 1));
  least = _mm256_min_ps(least, _mm256_shuffle_ps(least, least, 0x4E));
  least = _mm256_min_ps(least, _mm256_shuffle_ps(least, least, 0xB1));
  const __m256i equal = _mm256_castps_si256(_mm256_cmp_ps(scores, least, _CMP_EQ_OQ));
  const __m256i of_least = _mm256_blendv_epi8(_mm256_set1_epi32(0xFFFF), indices, equal);
  __m128i low = _mm_min_epi32(_mm256_castsi256_si128(of_least), _mm256_extracti128_si256(of_least, 1));
  low = _mm_min_epi32(low, _mm_shuffle_epi32(low, 0x4E));
  low = _mm_min_epi32(low, _mm_shuffle_epi32(low, 0xB1));
  return static_cast<std::uint16_t>(_mm_cvtsi128_si32(low));
}

// Eight centroids in the lanes; two vectors at once share the loads and hide the latencies of one another.
template <int kVecLen>
CODEGEMM_TARGET_AVX2 void nearest_avx2(const float* transposed, const float* half_norms,
                                       std::int64_t centroids, const float* x, std::int64_t count,
                                       std::uint16_t* codes) {
  for (std::int64_t n = 0; n < count; n += 2) {
    const float* const x0 = x + n * kVecLen;
    const float* const x1 = n + 1 < count ? x0 + kVecLen : x0;
    __m256 best0 = _mm256_set1_ps(std::numeric_limits<float>::infinity());
    __m256 best1 = best0;
    __m256i current = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i index0 = current;
    __m256i index1 = current;
    for (std::int64_t i = 0; i < centroids; i += 8) {
      __m256 score0 = _mm256_loadu_ps(half_norms + i);
      __m256 score1 = score0;
      CODEGEMM_UNROLL
      for (int d = 0; d < kVecLen; ++d) {
        const __m256 column = _mm256_loadu_ps(transposed + d * centroids + i);
        score0 = _mm256_fnmadd_ps(_mm256_broadcast_ss(x0 + d), column, score0);
        score1 = _mm256_fnmadd_ps(_mm256_broadcast_ss(x1 + d), column, score1);
      }
      const __m256 less0 = _mm256_cmp_ps(score0, best0, _CMP_LT_OQ);
      const __m256 less1 = _mm256_cmp_ps(score1, best1, _CMP_LT_OQ);
      best0 = _mm256_min_ps(score0, best0);
      best1 = _mm256_min_ps(score1, best1);
      index0 = _mm256_blendv_epi8(index0, current, _mm256_castps_si256(less0));
      index1 = _mm256_blendv_epi8(index1, current, _mm256_castps_si256(less1));
      current = _mm256_add_epi32(current, _mm256_set1_epi32(8));
    }
    codes[n] = least_index_avx2(best0, index0);
    if (n + 1 < count) codes[n + 1] = least_index_avx2(best1, index1);
  }
}

#endif

template <int kVecLen>
void nearest(const SearchBook& book, const float* x, std::int64_t count, std::uint16_t* codes) {
#if CODEGEMM_HAS_AVX2
  if (has_avx2(detect_isa())) {
    nearest_avx2<kVecLen>(book.transposed.data(), book.half_norms.data(), book.centroids, x, count, codes);
    return;
  }
#endif
  nearest_portable<kVecLen>(book, x, count, codes);
}

/// codes[count] for x[count][v].
inline void find_nearest(const SearchBook& book, const float* x, std::int64_t count, std::uint16_t* codes) {
  with_vec_len(book.v, [&](auto v) { nearest<v>(book, x, count, codes); });
}

}  // namespace codegemm::detail
