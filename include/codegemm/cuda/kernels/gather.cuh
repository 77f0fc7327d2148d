// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/gather.cuh - y = x W^T for one or two tokens by gathering from Psumbooks.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <codegemm/cuda/block/half_layout.hpp>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/kernels/gather_args.cuh>
#include <codegemm/cuda/kernels/gather_share.cuh>
#include <codegemm/cuda/kernels/gather_tile.cuh>
#include <codegemm/cuda/kernels/normed_row.cuh>
#include <codegemm/cuda/kernels/row_copy.cuh>

namespace codegemm::cuda {

/// Block (split, chunk, group) sums granules_per_block granules, from number (group * splits + split) *
/// granules_per_block on, over the row tiles of its chunk. Then the sums of a chunk are added, always in
/// their order:
/// - Cluster: the splits are the blocks of one cluster. They push their sums into each other's shared memory,
///   and each ends with a share of the rows. Else there is one split, and its share is all rows.
/// - SwiGLU: a cluster has the splits of a chunk of the first half, then those of its partner in the second.
/// - Several groups: each block writes its share to `partials`, and the last to come, by `counters`, adds
///   them up.
template <class Config, int Tokens, bool Cluster>
__global__ void __launch_bounds__(Config::kThreads, 1) gather_kernel(const __grid_constant__ GatherArgs a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr bool kCluster = Cluster;
#else
  constexpr bool kCluster = false;  // never launched there
#endif
  using Book = typename detail::BookOf<Config, Tokens>::Type;
  constexpr bool kHalf = kHalfPsumbook<Config>;
  constexpr bool kNormed = kHalf && Tokens == 1;
  constexpr int kWarps = Config::kThreads / 32;
  constexpr int kSets = Config::kSets;
  constexpr int kSteps = Config::kScaleSteps;
  constexpr int kSums = detail::sums_of<Book, kSteps, kHalf>();
  using Tile = detail::TileRegisters<kSets, kSteps>;
  // The Psumbook (of fp16: one or two from kWindowStart in the shared window on, and the activations); the
  // sums of the block's rows [Tokens][tiles_per_block][16]; for a cluster, what its blocks push here,
  // [ranks][Tokens][warps owned][tiles of a warp][16], and the barrier. The tiles of warp w (of every block)
  // are summed by the block of rank w % ranks.
  extern __shared__ __align__(1024) char shared[];

  detail::allow_next_kernel();
  [[maybe_unused]] const int code_bits = Config::kCodeBits != 0 ? Config::kCodeBits : a.code_bits;
  const int v = Config::kVecLen != 0 ? Config::kVecLen : a.v;
  const int warp = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int ranks = kCluster ? static_cast<int>(gridDim.x) : 1;
  const bool gated = kCluster && a.rows.half_tiles > 0;
  const int splits = kCluster ? a.splits : 1;
  const int half = kCluster && static_cast<int>(blockIdx.x) >= splits ? 1 : 0;
  const int split = static_cast<int>(blockIdx.x) - half * splits;
  const int granule0 = (static_cast<int>(blockIdx.z) * splits + split) * a.granules_per_block;
  const int granule1 = min(granule0 + a.granules_per_block, a.granules);
  const RowBlocks::Block rows = a.rows.block(static_cast<int>(blockIdx.y), half);
  const int tile0 = rows.tile;
  const int tiles = rows.tiles;

  // Weights do not depend on the kernel before: they are on their way while it still runs. In each round a
  // warp sums one tile; its next one comes into the same registers in the meantime, and one warp asks for the
  // tiles of a later round into the second-level cache.
  const auto tile_bytes = static_cast<unsigned>(a.tile_bytes);
  const unsigned char* const first_tile =
      a.tiles + static_cast<std::uint64_t>(static_cast<unsigned>(granule0)) * a.granule_bytes +
      static_cast<unsigned>(tile0) * tile_bytes;
  const unsigned char* at = first_tile + static_cast<unsigned>(warp) * tile_bytes;
  const unsigned step = kWarps * tile_bytes;
  Tile tile;
  if constexpr (!kHalf) {
    if (warp < tiles) tile.load(at, lane);
  }

  // With a fixed format each warp keeps its share of the centroids and builds one position of the table.
  constexpr bool kFixed = Config::kVecLen != 0 && Config::kCodeBits != 0 && kWarps % kSets == 0;
  constexpr int kShare = kHalf    ? (32 + kWarps - 1) / kWarps  // of 32 blocks of centroids
                         : kFixed ? (1 << (Config::kCodeBits - 3)) * kSets / kWarps
                                  : 1;
  static_assert(!kFixed || kShare >= 1,
                "codegemm: Config kThreads must not be more than the Psumbook can use");
  const std::uint16_t* const codebooks = a.codebooks + rows.part * ((Config::kCodebooks * v) << code_bits);
  typename Book::Centroids centroids[kShare];
  // HalfPsumbook: of its 32 blocks of centroids.
  [[maybe_unused]] const auto has_share = [&](int i) {
    return (i + 1) * kWarps <= 32 || warp + i * kWarps < 32;
  };
  if constexpr (kHalf) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (has_share(i)) centroids[i] = Book::load_centroids(codebooks, warp + i * kWarps);
    }
  } else if constexpr (kFixed) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      centroids[i] = Book::load_centroids(codebooks + (warp % kSets % Config::kCodebooks) * (v << code_bits),
                                          warp / kSets + i * (kWarps / kSets), v);
    }
  }

  // Of an address in the shared window the highest byte is the block's rank in its cluster.
  const auto start = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const unsigned window = start & 0xFF000000U;
  char* const table = kHalf ? shared + (window + static_cast<unsigned>(kWindowStart) - start) : shared;
  [[maybe_unused]] const bool norms = kNormed && a.normed.x != nullptr;
  [[maybe_unused]] const bool copies = kNormed && a.copies_row;
  [[maybe_unused]] const detail::RowCopy copy{granule0 * kHalfActivations};
#if __CUDA_ARCH__ >= 900
  [[maybe_unused]] const auto turn_of = [&](int w) {  // w / ranks
    return static_cast<int>(static_cast<unsigned>(w) * a.ranks_inverse >> 16);
  };
  const int rank = kCluster ? static_cast<int>(detail::cluster_rank()) : 0;
  const unsigned table_at = kHalf ? window + static_cast<unsigned>(kWindowStart) : start;
  const unsigned barrier = table_at + static_cast<unsigned>(a.barrier_at);
  [[maybe_unused]] const unsigned row_barrier =
      table_at + static_cast<unsigned>(a.sums_at) - static_cast<unsigned>(kSquaresBytes + kRowBarrierBytes);
  if (copies && warp == kWarps - 1) {  // before its tile: of all that comes, the row is waited for longest
    copy.prepare(a, table_at, row_barrier);
    if constexpr (kCluster) detail::cluster_arrive();
    detail::wait_for_previous_kernel();
    copy.start(a, table_at, row_barrier);
  }
#endif
  if constexpr (kHalf) {  // loads come in the order of their requests, and those are wanted first
    if (warp < tiles) tile.load(at, lane);
  }

  const auto prefetch_round = [&](const unsigned char* block_tiles, int round) {
    const int first = round * kWarps;
    if (first < tiles && lane == 0) {
      detail::prefetch_l2(block_tiles + static_cast<unsigned>(first) * tile_bytes,
                          static_cast<unsigned>(min(kWarps, tiles - first)) * tile_bytes);
    }
  };
  if (warp > 0 && warp <= a.rounds_ahead) prefetch_round(first_tile, warp);

#if __CUDA_ARCH__ >= 900
  if constexpr (kCluster) {
    if (warp == kWarps - 2) {
      const bool owned = lane < kWarps && lane < tiles && lane - turn_of(lane) * ranks == rank;
      const unsigned expected = __reduce_add_sync(
          0xFFFFFFFFU, owned ? static_cast<unsigned>(tiles - lane + kWarps - 1) / kWarps : 0U);
      if (lane == 0) {
        detail::init_barrier(barrier, 1);
        detail::publish_barriers();
      }
      __syncwarp();  // for compute-sanitizer: as predicated instructions the two are not seen as one lane's
      if (lane == 0) {
        detail::arrive_and_expect(barrier, expected * static_cast<unsigned>(ranks * Tokens) * 64U);
      }
    }
    if (!copies || warp != kWarps - 1) detail::cluster_arrive();
  } else {
    if (copies) __syncthreads();
  }
#endif

  detail::wait_for_previous_kernel();
  Activations x[Tokens];
#pragma unroll
  for (int t = 0; t < Tokens; ++t) {
    x[t] = Activations{a.x + t * a.x_stride, a.cols, a.x_type == ScalarType::kBFloat16};
  }
  auto segments = detail::no_segments<Book, Tokens, kHalf>();
  [[maybe_unused]] auto words = detail::no_words<Book, kHalf>();
  // HalfPsumbook: warp by warp the tokens of a granule, then those of the next.
  [[maybe_unused]] const auto load_words = [&](int i) {
    if constexpr (kHalf) {
      const Activations token{x[0].x + i % Tokens * a.x_stride, a.cols, x[0].bf16};
      words = Book::load(token, (granule0 + i / Tokens) * Book::kActivations);
    }
  };
  const int all_words = (granule1 - granule0) * Tokens;
  if constexpr (kHalf) {
    if (!norms && warp < all_words) load_words(warp);
  } else if constexpr (kFixed) {
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      segments.of[t] = Book::load_segments(x[t], granule0 * Book::kSegments * v, warp % kSets, v);
    }
  }

  // What follows is done while they come.
  float* const row_sums = reinterpret_cast<float*>(table + a.sums_at);
  const int rounds = static_cast<int>(static_cast<unsigned>(tiles + kWarps - 1) / kWarps);
  const int mine = static_cast<int>(static_cast<unsigned>(max(tiles - warp, 0) + kWarps - 1) / kWarps);
#if __CUDA_ARCH__ >= 900
  unsigned push_at = 0;  // where the next sum of this warp goes, in the owner's memory
  unsigned push_barrier = 0;
  if constexpr (kCluster) {
    detail::cluster_wait();  // every barrier of the cluster is ready
    const int turn = turn_of(warp);
    const unsigned owner = static_cast<unsigned>(warp - turn * ranks);
    push_barrier = detail::address_in(barrier, owner);
    push_at = detail::address_in(
        table_at + static_cast<unsigned>(a.pushed_at) +
            static_cast<unsigned>((rank * Tokens * a.slots + turn * a.most) * 16 + row_slot(lane, 0)) * 4U,
        owner);
    asm volatile("" : "+r"(push_barrier), "+r"(push_at));  // not later
  }
#else
  constexpr int rank = 0;
#endif
  const detail::GatherShare<Config, Tokens, kCluster> share{a,
                                                            table,
                                                            row_sums,
                                                            tile0,
                                                            tiles,
                                                            half,
                                                            rank,
                                                            ranks,
                                                            splits,
                                                            gated,
                                                            kCluster ? a.slots * 16 : tiles * 16};
  if constexpr (kSteps == 5 || kSteps < 0) {
    // No register to spare for it.
    if (a.out.row_scales != nullptr && static_cast<int>(threadIdx.x) < share.size) {
      const int row = share.row_of(static_cast<int>(threadIdx.x));
      if (row >= 0 && row < a.out.rows) detail::prefetch_l1(a.out.row_scales + row);
    }
  }
  auto ones = detail::ones_of<Book, kSteps, kHalf>();
  if constexpr (kHalf) asm volatile("" : "+r"(ones.bytes[0]), "+r"(ones.bytes[1]));  // not later

  // HalfPsumbook.
  const auto table_offset = [&](int granule) {
    return a.tables == 2 ? static_cast<unsigned>(granule - granule0) % 2U << 16 : 0U;
  };
  const auto staged = [&](int granule) {
    return table + static_cast<unsigned>(a.tables * Tokens) * kHalfTableBytes +
           static_cast<unsigned>((granule - granule0) * detail::BookOf<Config, Tokens>::kStagedBytes);
  };
  const auto build_half = [&](int granule) {
    if constexpr (kHalf) {
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        if (has_share(i))
          Book::build(table + table_offset(granule), staged(granule), centroids[i], warp + i * kWarps);
      }
    }
  };
  if constexpr (kHalf) {
    if (!norms) {
      for (int i = warp; i < all_words;) {
        Book::stage(staged(granule0 + i / Tokens), words, x[0].bf16, i % Tokens);
        i += kWarps;
        if (i < all_words) load_words(i);
      }
    } else if constexpr (kNormed) {
      NormedRow normed = a.normed;
#if __CUDA_ARCH__ >= 900
      if (copies) {
        detail::wait_for_phase(row_barrier, 0);
        normed = copy.in(table, normed, a.cols);
      }
#endif
      const float squares = detail::squares_of<Config::kThreads>(normed, a.cols);
      for (int i = granule0 + warp; i < granule1; i += kWarps) {
        Book::stage_products(staged(i), normed.x, normed.weight, a.cols, i * Book::kActivations);
      }
      const float sum = detail::warp_sum(squares);
      if (lane == 0) row_sums[warp - static_cast<int>(kSquaresBytes / sizeof(float))] = sum;
    }
  }

  if constexpr (kHalf) {
    if (start - window > kWindowStart) __trap();  // the plan counts on it
    __syncthreads();
    build_half(granule0);
  }

  // Sums a tile in registers; `next`, if there is one, then comes into the same registers.
  [[maybe_unused]] unsigned column = 0;  // see HalfPsumbook::gather()
  float unscale[Tokens] = {};
  float* so_far = nullptr;  // the lane's row of the warp's next tile
  const auto sum_tile = [&](const unsigned char* tile_at, const unsigned char* next, bool first, bool last) {
    float sums[Tokens][kSums];
    if constexpr (kHalf) {
      Book::template gather<kSteps>(column, tile.codes, ones, sums);
    } else {
      Book::gather(table, tile.codes, lane, sums);
    }
    unsigned scale_bits[sizeof(tile.scale_bits) / sizeof(unsigned)];
#pragma unroll
    for (unsigned i = 0; i < sizeof(tile.scale_bits) / sizeof(unsigned); ++i)
      scale_bits[i] = tile.scale_bits[i];
    if (next != nullptr) tile.load(next, lane);
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      float total;
      if constexpr (kHalf) {
        total = detail::reduce_with<kSteps>(sums[t], scale_bits) * unscale[t];
      } else {
        total = detail::reduce_tile<kSteps>(sums[t], scale_bits, tile_at + kSets * 512, lane, a.scale_steps);
      }
      if (lane < 16) {
        float* const sum = so_far + t * a.rows.tiles_per_block * 16;
        if (!first) total += *sum;
        if (!last || !kCluster) {
          *sum = total;
        } else {
#if __CUDA_ARCH__ >= 900
          detail::push(push_at + static_cast<unsigned>(t * a.slots) * 64U, total, push_barrier);
#endif
        }
      }
    }
    so_far += kWarps * 16;
#if __CUDA_ARCH__ >= 900
    if constexpr (kCluster) push_at += last ? 64U : 0U;
#endif
  };

  for (int granule = granule0; granule < granule1; ++granule) {
    if constexpr (kHalf) {
      column = window + table_offset(granule) + Book::column_bytes(lane);
#pragma unroll
      for (int t = 0; t < Tokens; ++t) unscale[t] = Book::unscale(staged(granule), t);
    } else if constexpr (kFixed) {
#pragma unroll
      for (int t = 0; t < Tokens; ++t) {
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
          float d[2][4] = {};
          Book::multiply(d, x[t], centroids[i], segments.of[t]);
          Book::store(table, Book::plane(t, warp % kSets), warp / kSets + i * (kWarps / kSets), d);
        }
        segments.of[t] = Book::load_segments(x[t], (granule + 1) * Book::kSegments * v, warp % kSets, v);
      }
    } else {
      Book::build(table, codebooks, x, granule * Book::kSegments * v, v, code_bits);
    }
    const bool last = granule + 1 == granule1;
    const unsigned char* const next_granule = at + a.granule_bytes;
    const unsigned char* const block_tiles = at - static_cast<unsigned>(warp) * tile_bytes;
    __syncthreads();
    const bool first = granule == granule0;
    so_far = row_sums + warp * 16 + row_slot(lane, 0);
    for (int i = 0; i < mine; ++i) {
      if ((i & 15) == warp) {
        const int round = i + 1 + a.rounds_ahead;
        if (a.rounds_ahead == 0) {  // nothing is asked for ahead of time
        } else if (round < rounds) {
          prefetch_round(block_tiles, round);
        } else if (!last) {
          prefetch_round(block_tiles + a.granule_bytes, round - rounds);
        }
      }
      const unsigned char* const next = i + 1 < mine ? at + step : last ? nullptr : next_granule;
      sum_tile(at, next, first, last);
      at = next;
    }
    if constexpr (kHalf) {  // nobody gathers from the other table any more
      if (!last && a.tables == 1) __syncthreads();
      if (!last) build_half(granule + 1);
    } else {
      if (!last) __syncthreads();
    }
  }

  Output out = a.out;
  if constexpr (kNormed) {
    if (a.normed.x != nullptr) {
      const float squares = detail::warp_sum(
          lane < kWarps ? row_sums[lane - static_cast<int>(kSquaresBytes / sizeof(float))] : 0.0F);
      out.unscale *= rsqrtf(squares / static_cast<float>(a.cols) + a.normed.epsilon);
    }
  }
  if constexpr (kCluster) {
#if __CUDA_ARCH__ >= 900
    detail::wait_for_pushes(barrier);
#endif
  } else {
    __syncthreads();
  }
  share.finish(out);
}

}  // namespace codegemm::cuda
