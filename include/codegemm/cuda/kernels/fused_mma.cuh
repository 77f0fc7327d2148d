// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/fused_mma.cuh - y = x W^T for up to 16 tokens: weights are looked up straight into
// the fragments of mma.sync and exist nowhere else.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_fp16.h>

#include <codegemm/cuda/block/centroid_table.cuh>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/tile_pairs.cuh>
#include <codegemm/cuda/kernels/fused_mma_args.cuh>
#include <codegemm/cuda/kernels/fused_mma_copies.cuh>
#include <codegemm/cuda/kernels/fused_mma_sums.cuh>
#include <codegemm/cuda/kernels/fused_mma_x.cuh>

namespace codegemm::cuda {

/// Block (split, i) multiplies the slabs of its split with the i-th block of row tiles, and the splits of one
/// i are a cluster that adds its sums. With SwiGLU it does so in both halves, one after the other. Each warp
/// holds one slab of x in registers, as fragments, and goes over the block's row tiles; what the warps made
/// of a tile is added in shared memory, in a fixed order. So x is read once a window of as many slabs as
/// there are warps, and shared memory is left to the lookups.
///
/// 16 tokens are the rows of a product, weights its columns; with 8 tokens weights are the rows. Either way
/// lane 4 r + q holds rows r and r + 8 of a tile. In the step that multiplies the i-th four of every lane's
/// k, the packed lanes q, 4 + q, 8 + q and 12 + q of the slab come in turn. So one load brings the codes of
/// all steps of a packed lane, and a looked-up centroid is a fragment as it is.
template <class Config, PairType Type, int Tokens, bool Gated>
__global__ void __launch_bounds__(kFusedMmaThreads, 1)
    fused_mma_kernel(const __grid_constant__ FusedMmaArgs a) {
  using Shape = FusedMmaShape<Config, Tokens>;
  using Table = typename Shape::Table;
  constexpr int V = Config::kVecLen;
  constexpr int kCodebooks = Config::kCodebooks;
  constexpr int kRowBytes = Shape::kRowBytes;
  constexpr bool kStaged = Shape::kStaged;
  constexpr int kLaneSpan = Shape::kLaneSpan;
  constexpr int kWarps = Shape::kWarps;
  static_assert(kLaneSpan % 4 == 0, "codegemm: a lane of a Config must own a multiple of 4 columns");
  // A scale shared by whole chunks of four packed lanes multiplies sums, else weights.
  constexpr bool kRowScale = Config::kScaleSteps == 5;
  constexpr bool kOnSums = !kRowScale && Config::kScaleSteps >= 2;
  constexpr bool kOnWeights = !kRowScale && !kOnSums;
  constexpr bool kConvert = Type == PairType::kBFloat16 && Config::kCodeBytes == 2;
  constexpr bool kTableBf16 = Type == PairType::kBFloat16 && !kOnWeights;
  // One product for all codebooks: in fp16 the sum of two centroids is rounded once.
  constexpr bool kCombine = kOnWeights || kConvert || Type == PairType::kHalf;
  constexpr int kChunksPerScale = kOnSums ? 1 << (Config::kScaleSteps - 2) : 1;
  constexpr bool kWeightRows = Tokens == 8;  // of a product
  using SumScales = std::conditional_t<kWeightRows, detail::WeightScales,
                                       detail::SumScales<kOnSums ? Config::kScaleSteps : 2>>;
  constexpr int kUnit = V < 4 ? 4 : V;        // k of a lane looked up at once
  constexpr int kVectors = kUnit / V;         // vectors of it
  constexpr int kSteps = kUnit / 4;           // products of it
  constexpr int kChunkSteps = kLaneSpan / 4;  // products of a chunk
  constexpr int kSums = kWeightRows ? 1 : 2;  // fragments of sums

  // The table; codes of the warps' next tiles, [warp][stage], and their scales; what warps made of a group of
  // tiles, [2][tile][warp][token][16 rows]; where blocks or windows are added: the block's sums
  // [half][token][row].
  extern __shared__ __align__(1024) char table[];
  const int most_tiles = kStaged ? a.group : Shape::kMostGroup;  // between two barriers
  const int table_bytes = Shape::table_bytes(a.code_bits);
  float* const warp_sums = reinterpret_cast<float*>(table + table_bytes + Shape::staged_bytes(a.scale_steps));
  const int log_sums = Shape::log_tile_sums(a.tokens);
  float* const block_sums = warp_sums + Shape::sum_bytes(a.tokens, most_tiles) / 4;

  detail::allow_next_kernel();
  const int warp = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int r = lane / 4;
  const int q = lane % 4;
  const int tile0 = a.rows.block(static_cast<int>(blockIdx.y)).tile;  // of the first half
  const int tiles = a.rows.block(static_cast<int>(blockIdx.y)).tiles;
  const auto codebooks_of = [&](int half) {
    const int part = a.rows.block(static_cast<int>(blockIdx.y), half).part;
    return a.codebooks + ((part * kCodebooks) << a.code_bits) * V;
  };
  const int slab0 = static_cast<int>(blockIdx.x) * a.slabs_per_split;
  const int slab1 = min(slab0 + a.slabs_per_split, a.slabs);
  const bool direct = gridDim.x == 1 && slab1 - slab0 <= kWarps && !Gated;
  const int block_rows = a.rows.tiles_per_block * kTileRows;

  // Where a lane finds what it needs in a tile for chunk 0 of a slab. Other chunks differ in bits that are
  // known.
  const auto code_offset = [](int owner, int offset) {
    return kStaged ? Shape::staged_offset(owner, offset) : static_cast<unsigned>(tile_offset(owner, offset));
  };
  const unsigned first_code = code_offset(q, stream_offset(kRowBytes, row_slot(q, r) & 7, 0));
  [[maybe_unused]] const unsigned first_last =
      code_offset(q, stream_offset(kRowBytes, row_slot(q, r) & 7, kRowBytes - 1));
  constexpr int kScalesAt = kStaged ? 0 : kRowBytes * 512;
  // Without scales in the tiles (known at run time only) weights are multiplied by 1.
  const bool has_scales = kOnSums || (kOnWeights && a.scale_steps < 5);
  const int steps = kOnSums ? Config::kScaleSteps : has_scales ? a.scale_steps : 0;
  const unsigned second_scale =  // from row r to row r + 8
      steps > 0      ? 2U * (16U >> steps)
      : (q & 1) != 0 ? static_cast<unsigned>(-16)
                     : 16U;
  [[maybe_unused]] const unsigned first_sum_scale =
      static_cast<unsigned>(kScalesAt + 2 * scale_offset(steps, 0, 2 * q));
  [[maybe_unused]] unsigned weight_scale_at[kOnWeights ? 4 : 1];
  if constexpr (kOnWeights) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weight_scale_at[j] =
          static_cast<unsigned>(kScalesAt + 2 * scale_offset(steps, (4 * j + q) >> steps << steps, r));
    }
  }
  [[maybe_unused]] unsigned sum_scale_at[4 / kChunksPerScale];  // of row r, see second_scale
  if constexpr (kOnSums && kWeightRows) {
#pragma unroll
    for (int i = 0; i < 4 / kChunksPerScale; ++i) {
      sum_scale_at[i] =
          static_cast<unsigned>(kScalesAt + 2 * scale_offset(steps, 4 * i * kChunksPerScale, r));
    }
  }
  [[maybe_unused]] const unsigned scale_half = 32U * (16U >> steps);  // to the granule's other slab
  const unsigned select0 = detail::PairCodes<kRowBytes>::selector((q & 1) != 0);
  const unsigned select1 = detail::PairCodes<kRowBytes>::selector((q & 1) == 0);
  const unsigned lane_bytes = Table::lane_bytes(lane);

  // A warp's tiles in the order [half][window][tile]: the codes of the next one come into the registers of
  // the one that is multiplied, and a later one into the second-level cache.
  detail::PairCodes<kRowBytes> codes[4];
  [[maybe_unused]] SumScales sum_scales[4 / kChunksPerScale];
  [[maybe_unused]] detail::WeightScales weight_scales[4];
  const unsigned granule_bytes = static_cast<unsigned>(a.row_tiles) * static_cast<unsigned>(a.tile_bytes);
  unsigned at = 0;         // of the tile to be loaded, plus 256 for an odd slab; or of its copy
  unsigned scales_at = 0;  // of its scales, less their place in a tile; or of their copy
  const unsigned char* const weights_from = kStaged ? reinterpret_cast<unsigned char*>(table) : a.tiles;
  const auto load_chunk = [&](int j) {
    const int slot = (j & 1) * 2 + j / 2;  // what row_slot() of lane 4 j flips
    codes[j].template load<kStaged>(weights_from,
                                    at + (first_code ^ code_offset(4 * j, stream_offset(kRowBytes, slot, 0))),
                                    at + (first_last ^ code_offset(4 * j, slot * 2)));
    // The scales of a group are needed until its last chunk.
    if constexpr (kOnSums) {
      if (j % kChunksPerScale == kChunksPerScale - 1) {
        if constexpr (kWeightRows) {
          sum_scales[j / kChunksPerScale].template load<kStaged>(
              weights_from, scales_at + sum_scale_at[j / kChunksPerScale], second_scale);
        } else {
          const int first = j / kChunksPerScale * kChunksPerScale;
          const unsigned flip = Config::kScaleSteps == 2 && first % 2 == 1 ? 4U : 0U;
          sum_scales[j / kChunksPerScale].template load<kStaged>(
              weights_from,
              scales_at + (first_sum_scale ^ flip) + static_cast<unsigned>(8 * first * (16 >> steps)));
        }
      }
    }
    if constexpr (kOnWeights) {
      weight_scales[j].bits[0] = weight_scales[j].bits[1] = 0x3C00;  // 1
      if (has_scales) {
        weight_scales[j].template load<kStaged>(weights_from, scales_at + weight_scale_at[j], second_scale);
      }
    }
  };
  const auto load_chunks = [&] {
#pragma unroll
    for (int j = 0; j < 4; ++j) load_chunk(j);
  };
  const auto offset_of = [&](int slab, int tile) {
    return static_cast<unsigned>(slab / 2) * granule_bytes +
           static_cast<unsigned>(tile0 + tile) * static_cast<unsigned>(a.tile_bytes);
  };
  const auto aim = [&](int slab, int tile) {
    const auto odd = static_cast<unsigned>(slab % 2);
    const unsigned of_tile = offset_of(slab, tile);
    at = of_tile + odd * 256U;
    scales_at = of_tile + odd * scale_half;
  };
  // One of the two warps of a granule asks for the tile.
  const auto prefetch = [&](int slab, int tile) {
    if (lane == 0 && (slab % 2 == 0 || slab == slab0)) {
      detail::prefetch_l2(a.tiles + offset_of(slab, tile), static_cast<unsigned>(a.tile_bytes));
    }
  };

  [[maybe_unused]] detail::StagedTiles<Shape, Gated> copies(a, {slab0, slab1, tile0, tiles}, warp, table,
                                                            table_bytes,
                                                            kOnSums ? Config::kScaleSteps : a.scale_steps);
  if (slab0 + warp < slab1) {
    if constexpr (kStaged) {
      at = copies.first_stage;
      copies.begin();
#pragma unroll
      for (int i = 1; i < Shape::kCodeStages; ++i) copies.next();
    } else {
      aim(slab0 + warp, 0);
      load_chunks();
      for (int i = 1; i <= min(a.tiles_ahead, tiles - 1); ++i) prefetch(slab0 + warp, i);
    }
  }
  const auto fill_table = [&](int half) {
    if constexpr (Config::kCodeBytes == 1) {
      Table::fill(table, codebooks_of(half), a.code_bits, kTableBf16 ? PairType::kBFloat16 : PairType::kHalf,
                  static_cast<int>(threadIdx.x), kFusedMmaThreads);
    }
  };
  fill_table(0);
  [[maybe_unused]] const std::uint16_t* codebooks = Config::kCodeBytes == 1 ? nullptr : codebooks_of(0);
  if (threadIdx.x == 0) {  // what every look-up, and every output, would wait for
    if constexpr (Config::kCodeBytes == 2) {
      const unsigned blocks = gridDim.x * gridDim.y;
      const unsigned share = (a.codebook_bytes / 16U + blocks - 1U) / blocks * 16U;
      const unsigned from = (blockIdx.y * gridDim.x + blockIdx.x) * share;
      if (from < a.codebook_bytes) {
        detail::prefetch_l2(reinterpret_cast<const unsigned char*>(a.codebooks) + from,
                            min(share, a.codebook_bytes - from));
      }
    }
    if (a.out.row_scales != nullptr) {
      for (int i = 0; i < (Gated ? 2 : 1); ++i) {
        detail::prefetch_l2(a.out.row_scales + (tile0 + i * a.rows.half_tiles) * kTileRows,
                            static_cast<unsigned>(tiles * kTileRows) * sizeof(std::uint16_t));
      }
    }
  }
  [[maybe_unused]] const auto load_wide = [&](unsigned row, int p, int c, unsigned(&vector)[V / 2]) {
    const unsigned code = p == 0 ? row & 0xFFFFU : row >> 16;
    detail::load_centroid<V>(codebooks + ((static_cast<unsigned>(c) << a.code_bits) + code) * V, vector);
  };
  // What the first tile takes of them comes while the kernel before ends.
  constexpr bool kLooksAhead = Config::kCodeBytes == 2 && Tokens == 8;
  [[maybe_unused]] unsigned first_centroids[kLooksAhead ? 8 * Config::kSets : 1][V / 2];
  if constexpr (kLooksAhead) {
    if (slab0 + warp < slab1) {
#pragma unroll
      for (int i = 0; i < 8 * Config::kSets; ++i) {
        const int p = i % Config::kSets;
        const unsigned select = i / Config::kSets % 2 == 0 ? select0 : select1;
        load_wide(codes[i / Config::kSets / 2].row(select), p, p % kCodebooks, first_centroids[i]);
      }
    }
  }
  detail::wait_for_previous_kernel();

  int stage = 0;
  int half = 0;
  // Fragments of x. The words of a slab come while sums of the one before are added. In the order of the
  // loads 16 tokens would cost four moves in front of every product.
  using SlabOfX = detail::SlabOfX<Shape, Tokens>;
  typename SlabOfX::Words words = {};
  typename SlabOfX::Words x;
  const unsigned zero = static_cast<unsigned>(a.tokens) >> 31;
  const auto ask_for_x = [&](int slab) {
    if (slab >= slab1) {
      // So that the old ones need no registers.
      SlabOfX::for_words([&](int step, int i) { words[step][i] = 0; });
    } else if (a.x_aligned && a.cols - slab * Shape::kSlabSpan >= Shape::kSlabSpan) {
      // One branch for all loads, so that nothing stands between them.
      SlabOfX::load(a, slab, r, q, std::true_type{}, words);
    } else {
      SlabOfX::load(a, slab, r, q, std::false_type{}, words);
    }
  };
  ask_for_x(slab0 + warp);
  __syncthreads();  // the table

  int window = slab0;
  const auto multiply_window = [&](auto first) {
    const int slab = window + warp;
    const int warps = min(kWarps, slab1 - window);  // that have a slab
    const bool last_window = window + kWarps >= slab1;
    SlabOfX::for_words([&](int step, int i) {
      x[step][i] = Tokens == 16 ? detail::or_here(words[step][i], zero) : words[step][i];
    });
    [[maybe_unused]] const int half_tile = half * a.rows.half_tiles;
    float* const half_sums = block_sums + half * (Tokens * block_rows);
    const auto multiply_group = [&](auto looked_up, int group) {
      float* const of_stage = warp_sums + ((stage * most_tiles * kWarps) << log_sums);
      const int end = min(group + most_tiles, tiles);
      if (slab < slab1) {
#pragma unroll 1
        for (int tile = group; tile < end; ++tile) {
          // After the last tile of a window comes the first of the next; after all, the last one again.
          if constexpr (kStaged) {
            detail::wait_for_copies<Shape::kCodeStages - 2>();
            __syncwarp();
            scales_at = at + Shape::kStagedCodeBytes;
            load_chunks();
            copies.advance(at);
            copies.next();
          } else {
            if (tile + 1 + a.tiles_ahead < tiles) prefetch(slab, half_tile + tile + 1 + a.tiles_ahead);
            if (tile + 1 < tiles) {
              aim(slab, half_tile + tile + 1);
            } else if (slab + kWarps < slab1) {
              aim(slab + kWarps, half_tile);
            } else if (Gated && half == 0) {
              aim(slab0 + warp, a.rows.half_tiles);
            }
          }
          float sums[kSums][4] = {};
          [[maybe_unused]] float part[kSums][4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const unsigned rows[2] = {codes[j].row(select0), codes[j].row(select1)};
            [[maybe_unused]] float sum_scale[2][2];  // [row: 8 on][the next]
            [[maybe_unused]] __half weight_scale[2];
            if constexpr (kOnSums) {
              if (j % kChunksPerScale == kChunksPerScale - 1) {
                if constexpr (kWeightRows) {
#pragma unroll
                  for (int e = 0; e < 2; ++e) {
                    sum_scale[e][0] = sum_scale[e][1] =
                        __half2float(__ushort_as_half(sum_scales[j / kChunksPerScale].bits[e]));
                  }
                } else {
                  sum_scales[j / kChunksPerScale].unpack(j / 2 == 1, sum_scale);
                }
              }
            }
            if constexpr (kOnWeights) {
              weight_scale[0] = __ushort_as_half(weight_scales[j].bits[0]);
              weight_scale[1] = __ushort_as_half(weight_scales[j].bits[1]);
            }
            if constexpr (!kStaged) load_chunk(j);
            constexpr int kTogether = kCombine ? kCodebooks : 1;
#pragma unroll
            for (int u = 0; u < kLaneSpan / kUnit; ++u) {
#pragma unroll
              for (int first = 0; first < kCodebooks; first += kTogether) {
                unsigned weights[2][kUnit / 2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {  // rows 0 .. 7, then 8 .. 15 of the tile
#pragma unroll
                  for (int c = first; c < first + kTogether; ++c) {
#pragma unroll
                    for (int i = 0; i < kVectors; ++i) {
                      const int p = (u * kVectors + i) * kCodebooks + c;
                      unsigned vector[V / 2];
                      if constexpr (Config::kCodeBytes == 1) {
                        Table::lookup(table, Table::address(rows[e], p, lane_bytes), c, a.code_bits, vector);
                      } else if constexpr (decltype(looked_up)::value) {
#pragma unroll
                        for (int w = 0; w < V / 2; ++w)
                          vector[w] = first_centroids[(j * 2 + e) * Config::kSets + p][w];
                      } else {
                        load_wide(rows[e], p, c, vector);
                      }
#pragma unroll
                      for (int w = 0; w < V / 2; ++w) {
                        unsigned& to = weights[e][i * (V / 2) + w];
                        to = c > first ? detail::add_pairs(to, vector[w]) : vector[w];
                      }
                    }
                  }
                  if constexpr (kOnWeights || kConvert) {
                    const __half by = kOnWeights ? weight_scale[e] : __ushort_as_half(0x3C00);
#pragma unroll
                    for (unsigned& pair : weights[e]) {
                      pair = Type == PairType::kHalf
                                 ? detail::scale_pair(pair, __half2half2(by))
                                 : detail::scale_pair_bf16(detail::unpack_pair(pair), __half2float(by));
                    }
                  }
                  if (kWeightRows && e == 0) continue;
#pragma unroll
                  for (int s = 0; s < kSteps; ++s) {
                    auto& to = kOnSums ? part : sums;
                    const auto& of_x = x[j * kChunkSteps + u * kSteps + s];
                    const bool begin = kOnSums && j % kChunksPerScale == 0 && u == 0 && s == 0 && first == 0;
                    if constexpr (kWeightRows) {
                      const unsigned of_rows[4] = {weights[0][s * 2], weights[1][s * 2],
                                                   weights[0][s * 2 + 1], weights[1][s * 2 + 1]};
                      detail::mma_pairs<Type>(to[0], of_rows, of_x[0], of_x[1], begin);
                    } else {
                      detail::mma_pairs<Type>(to[e], of_x, weights[e][s * 2], weights[e][s * 2 + 1], begin);
                    }
                  }
                }
              }
            }
            if (kOnSums && j % kChunksPerScale == kChunksPerScale - 1) {
#pragma unroll
              for (int e = 0; e < kSums; ++e) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const float more = part[e][i] * (kWeightRows ? sum_scale[i / 2][0] : sum_scale[e][i % 2]);
                  sums[e][i] = j < kChunksPerScale ? more : sums[e][i] + more;
                }
              }
            }
          }
          detail::put_tile_sums(of_stage + (((tile - group) * kWarps + warp) << log_sums), sums, r, q,
                                log_sums == 7);
        }
      }
    };
    const auto add_group = [&](int group) {
      float* const of_stage = warp_sums + ((stage * most_tiles * kWarps) << log_sums);
      __syncthreads();
      detail::GroupSums<Shape, Tokens> adder{a, of_stage, half_sums, tile0, block_rows, log_sums, warps};
      adder.direct = direct;
      adder.on_top = window > slab0;
      adder.add(group, min(group + most_tiles, tiles));
      stage ^= 1;  // the other half of the sums: nobody still reads it
    };
    int group = 0;
    bool more = true;
    if constexpr (decltype(first)::value) {
      multiply_group(first, group);
      more = group + most_tiles < tiles;
      if (more) add_group(group), group += most_tiles;
    }
    while (more) {
      multiply_group(std::false_type{}, group);
      more = group + most_tiles < tiles;
      if (more) add_group(group), group += most_tiles;
    }
    if (Gated && last_window && half == 0 && window == slab0) {
      // The same for the other half.
      SlabOfX::for_words([&](int step, int i) { words[step][i] = x[step][i]; });
    } else {
      ask_for_x(!last_window ? slab + kWarps : Gated && half == 0 ? slab0 + warp : slab1);
    }
    add_group(group);
    window += kWarps;
    if (last_window && Gated && half == 0) {
      half = 1;
      window = slab0;
      if (a.rows.half_part != 0) {
        fill_table(1);  // all lookups are behind the barrier of the last group
        if constexpr (Config::kCodeBytes == 2) codebooks = codebooks_of(1);
        __syncthreads();
      }
    }
  };
  if constexpr (kLooksAhead) multiply_window(std::true_type{});
  while (window < slab1) multiply_window(std::false_type{});
  if (direct) return;
  __syncthreads();

  detail::store_split_sums<Shape, Tokens, Gated>(a, block_sums, tile0, tiles, block_rows);
}

}  // namespace codegemm::cuda
