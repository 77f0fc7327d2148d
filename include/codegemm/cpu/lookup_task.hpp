// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cpu/lookup_task.hpp - one task by register look-ups: tables tile by tile, encoded, and codes
// asked for meanwhile.
// Layer: cpu (host only).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <codegemm/cpu/kernels.hpp>
#include <codegemm/cpu/psumbook_task.hpp>
#include <codegemm/pack.hpp>

namespace codegemm::detail {

/// The codes of a task in a tile, some of which were asked for. While tables are made, which would leave the
/// memory without work, the next ones are.
struct TileCodes {
  const std::uint8_t* first;
  std::int64_t bytes;
  std::int64_t asked;

  /// Where `count` more begin; null if there are none.
  [[nodiscard]] const std::uint8_t* ask(std::int64_t count) noexcept {
    if (asked >= bytes) return nullptr;
    return first + std::exchange(asked, asked + count);
  }
};

/// Makes the tables of vectors [j, next) of a tile, which share a scale, of integers and appends their
/// flushes; false where that cannot be.
inline bool make_segment(const CpuKernels& kernels, const PackedView& w, const float* x, std::int64_t j,
                         std::int64_t next, const Half* scales, const PsumbookScratch& scratch,
                         TileCodes& codes, std::int64_t& flush_count) {
  if (kernels.make_tables == nullptr || w.codebooks_pairs == nullptr) return false;
  const std::int64_t most = flush_entries(w.format.b);
  const std::int64_t m = w.format.m;
  const std::int64_t end = next * m;
  std::int64_t count = flush_count;
  for (std::int64_t first = j * m; first < end; first += most) {
    const std::int64_t some = std::min(most, end - first);
    const float step = kernels.make_tables(
        {w.codebooks_pairs, w.codebook_pair_step, x + first / m * w.format.v, ceil_div(first % m + some, m),
         m, first % m, some, scratch.encoded + first * encoded_bytes(w.format.b),
         codes.ask(some * bytes_asked(w.format.b))});
    if (step < 0.0F) return false;
    scratch.flushes[count++] = {first, some, step, scales};
  }
  flush_count = count;
  return true;
}

/// Builds the tables of vectors [j, next) of a tile with activations x, which share a scale, encodes them
/// flush by flush while they are in the first-level cache, and appends the flushes; false where one of them
/// needs more than 16 bits: then all tables are there in fp32.
inline bool encode_segment(const CpuKernels& kernels, const PackedView& w, const float* x, std::int64_t j,
                           std::int64_t next, const Half* scales, const PsumbookScratch& scratch,
                           TileCodes& codes, std::int64_t& flush_count) {
  const std::int64_t most = flush_entries(w.format.b);
  const std::int64_t m = w.format.m;
  const std::int64_t end = next * m;
  std::int64_t count = flush_count;
  std::int64_t built = j;  // vectors
  const auto build_until = [&](std::int64_t last) {
    if (last <= built) return;
    kernels.build1({w.codebooks, w.codebooks_transposed, x + built * w.format.v, last - built, m,
                    w.format.centroids(), scratch.tables + built * m * w.format.centroids()});
    built = last;
  };
  for (std::int64_t first = j * m; first < end; first += most) {
    const std::int64_t some = std::min(most, end - first);
    build_until(ceil_div(first + some, m));
    const float step = kernels.lookup.encode({scratch.tables + first * w.format.centroids(), some,
                                              scratch.encoded + first * encoded_bytes(w.format.b),
                                              codes.ask(some * w.format.centroids())});
    if (step < 0.0F) {
      build_until(next);
      return false;
    }
    if (step > 0.0F) scratch.flushes[count++] = {first, some, step, scales};
  }
  flush_count = count;
  return true;
}

/// Words of a tile from one row block to the next.
[[nodiscard]] inline std::int64_t block_words(const PackedView& w, std::int64_t tile) noexcept {
  return w.vectors_in(tile) * w.format.m * w.entry_words();
}

/// A task's codes in a tile.
[[nodiscard]] inline const std::uint64_t* task_codes(const PackedView& w, const PsumbookTask& task,
                                                     std::int64_t tile) noexcept {
  return w.tile_codes(tile) + task.first_block * block_words(w, tile);
}

/// Asks for `bytes` bytes from `from` on, some of which nothing before has asked for, into the first-level
/// cache.
inline void ask_for(const void* from, std::int64_t bytes) noexcept {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 3);
}

/// Asks for a line of each page of `bytes` bytes from `from` on: finding a page takes as long as a line, and
/// all are found side by side.
inline void ask_for_pages(const void* from, std::int64_t bytes) noexcept {
  constexpr std::int64_t kPageBytes = 4096;
  const auto* const first = static_cast<const char*>(from);
  for (std::int64_t i = 0; i < bytes; i += kPageBytes) __builtin_prefetch(first + i, 0, 2);
  if (bytes > 0) __builtin_prefetch(first + bytes - 1, 0, 2);
}

/// Bytes of a task's codes in a tile.
[[nodiscard]] inline std::int64_t task_bytes(const PackedView& w, const PsumbookTask& task,
                                             std::int64_t tile) noexcept {
  return task.blocks * block_words(w, tile) * 8;
}

/// The order in which a task goes through its row blocks: all of them, or first one range and then another.
struct BlockOrder {
  struct Range {
    std::int64_t first;
    std::int64_t end;
  };
  Range parts[2];
  int count;

  [[nodiscard]] static BlockOrder whole(std::int64_t blocks) noexcept { return {{{0, blocks}, {0, 0}}, 1}; }
};

/// Asks for what a task's first tables are made of, and for its first codes.
inline void ask_for_first(const PackedView& w, const PsumbookTask& task, std::int64_t first_block,
                          std::int64_t bytes) noexcept {
  const std::int64_t values = w.format.m * w.format.centroids() * w.format.v;
  if (w.codebooks_pairs != nullptr) {
    ask_for(w.codebooks_pairs, values * 2);
  } else {
    ask_for(w.codebooks_transposed, values * 4);
  }
  const std::int64_t there = task_bytes(w, task, task.first_tile);
  const std::uint64_t* const codes = task_codes(w, task, task.first_tile);
  ask_for_pages(codes, there);
  ask_for(codes + first_block * block_words(w, task.first_tile), std::min(bytes, there));
}

/// What happens to a task's sums while others come: nothing.
struct NobodyWaits {
  void begin(int /*part*/) const noexcept {}
  void end(int /*part*/) const noexcept {}
};

/// sums[t][blocks * 64], `sum_stride` apart, = the task's rows times its tokens over its tiles. A scale group
/// that 16 bits do not serve is gathered from its fp32 tables. `watcher` is told when the sums of a part of
/// the rows are about to be finished, and when they are.
template <class Watcher>
void run_lookup_task(const CpuKernels& kernels, const GemmArgs& args, const PsumbookTask& task,
                     const BlockOrder& order, const PsumbookScratch& scratch, float* sums,
                     std::int64_t sum_stride, Watcher&& watcher) {
  const PackedView& w = args.w;
  const std::int64_t m = w.format.m;
  const std::int64_t segment = w.segment_vectors();
  const std::int64_t words = w.entry_words();
  for (std::int64_t t = 0; t < task.tokens; ++t) {
    std::fill_n(sums + t * sum_stride, task.blocks * kBlockRows, 0.0F);
  }
  const bool ask = kernels.lookup.ahead_bytes > 0;
  const std::int64_t first_bytes = CpuTiles::kLookupFirstBytes;
  if (ask) ask_for_first(w, task, order.parts[0].first, first_bytes);
  for (std::int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const std::int64_t first = tile * w.tile_vectors;
    const std::int64_t count = w.vectors_in(tile);
    const std::int64_t stride = block_words(w, tile);
    const std::uint64_t* const codes = task_codes(w, task, tile);
    const bool last_tile = tile + 1 == task.last_tile;
    if (ask && !last_tile) {
      ask_for_pages(task_codes(w, task, tile + 1), task_bytes(w, task, tile + 1));
    }
    const BlockOrder::Range& begin = order.parts[0];
    TileCodes asked{reinterpret_cast<const std::uint8_t*>(codes + begin.first * stride),
                    (begin.end - begin.first) * stride * 8,
                    tile == task.first_tile ? first_bytes : kernels.lookup.ahead_bytes};
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      const float* const x = args.x.row(task.first_token + t) + first * w.format.v;
      float* const y = sums + t * sum_stride;
      std::int64_t flush_count = 0;
      for (std::int64_t j = 0, next = 0; j < count; j = next) {  // [j, next) share a scale
        const std::int64_t group = (first + j) / segment;
        next = std::min(count, (group + 1) * segment - first);
        const std::int64_t entries = (next - j) * m;
        const Half* const scales = w.scales + group * w.padded_rows() + task.first_block * kBlockRows;
        if (ask && t == 0) ask_for(scales, task.blocks * kBlockRows * 2);
        if (make_segment(kernels, w, x, j, next, scales, scratch, asked, flush_count)) continue;
        if (encode_segment(kernels, w, x, j, next, scales, scratch, asked, flush_count)) continue;
        kernels.gather1({codes + j * m * words, stride, words, scratch.tables + j * m * w.format.centroids(),
                         entries, scales, nullptr, y, task.blocks * kBlockRows / kWordRows, true, true});
      }
      const bool last_token = t + 1 == task.tokens;
      const std::uint64_t* const read_next =
          (last_token && !last_tile ? task_codes(w, task, tile + 1) : codes) + begin.first * stride;
      for (int part = 0; part < order.count; ++part) {
        const BlockOrder::Range& range = order.parts[part];
        const std::uint64_t* const after =
            part + 1 < order.count ? codes + order.parts[part + 1].first * stride : read_next;
        if (last_token && last_tile) watcher.begin(part);
        kernels.lookup.lookup({reinterpret_cast<const std::uint8_t*>(codes), stride * 8, scratch.encoded,
                               scratch.flushes, flush_count, y, range.first, range.end,
                               reinterpret_cast<const std::uint8_t*>(after)});
        if (last_token && last_tile) watcher.end(part);
      }
    }
  }
}

}  // namespace codegemm::detail
