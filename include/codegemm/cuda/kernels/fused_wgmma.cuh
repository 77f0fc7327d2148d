// SPDX-License-Identifier: Apache-2.0
//
// codegemm/cuda/kernels/fused_wgmma.cuh - y = x W^T for many tokens on Hopper: weights are looked up straight
// into the registers of wgmma while the copy engine brings the activations.
// Layer: cuda/kernels (device).
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <codegemm/cuda/block/centroid_table.cuh>
#include <codegemm/cuda/block/intrinsics.cuh>
#include <codegemm/cuda/block/piece_schedule.hpp>
#include <codegemm/cuda/block/row_parts.hpp>
#include <codegemm/cuda/block/stage_ring.hpp>
#include <codegemm/cuda/block/wgmma.cuh>
#include <codegemm/cuda/block/wgmma_fragments.cuh>
#include <codegemm/cuda/kernels/fused_wgmma_args.cuh>
#include <codegemm/cuda/kernels/output.cuh>
#include <codegemm/cuda/kernels/piece_sums.cuh>
#include <codegemm/cuda/kernels/warpgroup_output.cuh>

namespace codegemm::cuda {

#if CODEGEMM_HAS_WGMMA
namespace detail {

template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace detail
#endif

/// A cluster of two blocks makes 256 rows x TokenTile tokens at a time, a product or a piece of one, as its
/// schedule says; products are numbered [part][token block][row block], and consecutive ones run at once.
/// With SwiGLU one of the blocks takes rows of the first half, the other their partners. In a block one
/// warpgroup copies: a warp asks the copy engine for x, half of it for both blocks, the others bring codes
/// and scales. Two warpgroups multiply 64 rows each; with three, 384 rows of a cluster, products are not cut.
/// While the products of a group of steps run, weights of the next group are looked up, and codes of the one
/// after that come into registers.
template <class Config, PairType Type, int TokenTile, bool Gated, int Groups = 2>
__global__ void __launch_bounds__(128 + 128 * Groups, 1)
    fused_wgmma_kernel(const __grid_constant__ FusedWgmmaArgs a) {
#if CODEGEMM_HAS_WGMMA
  using Shape = FusedWgmmaShape<Config, TokenTile, Groups>;
  using Table = typename Shape::Table;
  constexpr int kStagesOfSlab = Shape::kStagesOfSlab;
  // Steps of 16 k whose weights are looked up at once: the more, the less of a look-up's latency is seen.
  // Where there are registers, and an even number of groups in a slab. Several codebooks keep shared memory
  // busy: with few tokens their look-ups come better in small portions.
  constexpr bool kFour =
      TokenTile < 256 && Groups == 2 && kStagesOfSlab > 1 && (Config::kCodebooks == 1 || TokenTile == 128);
  constexpr int kGroup = kFour ? 4 : 2;
  constexpr int kGroups = 4 * kStagesOfSlab / kGroup;  // of a slab
  constexpr int kRowTiles = Shape::kRowTiles;
  // The table, whose size is a multiple of 1024 bytes; x of the stages, which the swizzle wants at such ones;
  // codes and scales of the code stages; sums on their way out, and with SwiGLU those that come from the
  // other block; barriers.
  extern __shared__ __align__(1024) char table[];
  char* const x_memory = table + Shape::table_bytes(a.code_bits);
  char* const code_memory = x_memory + a.x_stages * Shape::kStageBytes;
  const int scale_bytes = Shape::scale_bytes(a.scale_steps);
  const int code_stage_bytes = Shape::code_stage_bytes(a.scale_steps);
  const unsigned x_at = static_cast<unsigned>(__cvta_generic_to_shared(x_memory));
  const unsigned codes_at = static_cast<unsigned>(__cvta_generic_to_shared(code_memory));
  unsigned barriers =
      codes_at + static_cast<unsigned>(a.code_stages * code_stage_bytes +
                                       (Gated ? Shape::kGatedScratchBytes : Shape::kScratchBytes));
  asm("" : "+r"(barriers));  // in a register, not made again in every round
  const auto full_x = [&](int stage) { return barriers + static_cast<unsigned>(stage) * 8U; };
  const auto empty_x = [&](int stage) {
    return barriers + static_cast<unsigned>(Shape::kMaxStages + stage) * 8U;
  };
  const auto full_codes = [&](int stage) {
    return barriers + static_cast<unsigned>(2 * Shape::kMaxStages + stage) * 8U;
  };
  const auto empty_codes = [&](int stage) {
    return barriers + static_cast<unsigned>(3 * Shape::kMaxStages + stage) * 8U;
  };
  const auto from_other = [&](int tile, unsigned buffer) {
    return barriers + (static_cast<unsigned>(4 * Shape::kMaxStages + tile * 2) + buffer) * 8U;
  };

  constexpr int kCodeThreads = 96;

  detail::allow_next_kernel();
  const int rank = static_cast<int>(detail::cluster_rank());
  const int group = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) % 128 / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 32) detail::prefetch_map(&a.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.x_stages; ++i) {
      detail::init_barrier(full_x(i), 1);
      detail::init_barrier(empty_x(i), 2 * Groups);  // the warpgroups of both blocks
    }
    for (int i = 0; i < a.code_stages; ++i) {
      detail::init_barrier(full_codes(i), kCodeThreads);
      detail::init_barrier(empty_codes(i), Shape::kMultipliers);
    }
    for (int i = 0; i < 2 * kRowTiles; ++i) detail::init_barrier(from_other(i / 2, i % 2), 1);
    detail::publish_barriers();
  }

  // Pieces are kept in shared memory: there are no registers for them.
  const int cluster = static_cast<int>(blockIdx.x) / 2;
  auto& pieces = *reinterpret_cast<PieceSchedule::Pieces*>(code_memory + (barriers - codes_at) +
                                                           (4 * Shape::kMaxStages + 2 * kRowTiles) * 8);
  const PieceSchedule::Pieces pieces_here(a.schedule, cluster);
  if (threadIdx.x == 0) pieces = pieces_here;
  struct Piece {
    int part, row_tile, end_tile, token, slab, slabs;
    bool ends;
  };
  const auto open_piece = [&](const PieceSchedule::Piece& of) {
    const int i = of.product;
    int part = 0;
#pragma unroll
    for (int of_part = 1; of_part < kMaxParts; ++of_part)
      part += i >= a.rows.first_block[of_part] * a.token_blocks ? 1 : 0;
    const int blocks = a.rows.first_block[part + 1] - a.rows.first_block[part];
    const int in_part = i - a.rows.first_block[part] * a.token_blocks;
    const int token_block = in_part / blocks;
    const RowBlocks::Block rows =
        a.rows.block(a.rows.first_block[part] + in_part - token_block * blocks, Gated ? rank : 0);
    Piece p;
    p.part = rows.part;
    p.row_tile = rows.tile + (Gated ? 0 : rank * kRowTiles);
    p.end_tile = rows.tile + rows.tiles;
    p.token = token_block * TokenTile;
    p.slab = of.slab;
    p.slabs = of.slabs;
    p.ends = of.ends;
    return p;
  };
  const auto codebooks_of = [&](int part) {
    return a.codebooks + ((part * Config::kCodebooks) << a.code_bits) * Config::kVecLen;
  };
  // The other block's barriers are waited for below; the table is made before.
  __syncthreads();
  detail::cluster_arrive();

  if (group == 0) {
    detail::give_registers<Groups == 2 ? 40 : 32>();
    detail::cluster_wait();
    if (warp == 0) {
      if (lane == 0) {
        detail::wait_for_previous_kernel();
        int stage = 0;
        unsigned phase = 0;
        for (int n = 0; n < pieces.size(); ++n) {
          const Piece p = open_piece(pieces.piece(a.schedule, n));
          for (int s = 0; s < p.slabs * kStagesOfSlab; ++s) {
            detail::wait_for_cluster_phase(empty_x(stage), phase ^ 1U);
            detail::arrive_and_expect(full_x(stage), Shape::kStageBytes);
            detail::copy_box(
                x_at + static_cast<unsigned>(stage * Shape::kStageBytes + rank * (Shape::kStageBytes / 2)),
                &a.x, p.slab * Shape::kSlabSpan + s * 64, p.token + rank * (TokenTile / 2), full_x(stage), 3);
            if (++stage == a.x_stages) {
              stage = 0;
              phase ^= 1U;
            }
          }
        }
      }
    } else {
      // Two warps bring codes, of kAtOnce tiles at a time, the third scales. A thread has one place in all.
      const int thread = static_cast<int>(threadIdx.x) - 32;
      constexpr int kChunks = 16 * Shape::kRowBytes;  // of 16 bytes of a row tile
      constexpr int kAtOnce = 64 / kChunks;
      const int scale_chunks = scale_bytes / 16;
      const int part = thread % kChunks / 16;
      const int owner = thread % 16;
      const int first = thread / kChunks;
      const unsigned place =
          static_cast<unsigned>(first * Shape::kCodeBytes + part * kHalfLineStride + owner * 16);
      int stage = 0;
      unsigned phase = 0;
      for (int n = 0; n < pieces.size(); ++n) {
        const Piece p = open_piece(pieces.piece(a.schedule, n));
        const int last = a.row_tiles - 1 - p.row_tile;
        for (int s = 0; s < p.slabs; ++s) {
          const int slab = p.slab + s;
          detail::wait_for_phase(empty_codes(stage), phase ^ 1U);
          const unsigned to = codes_at + static_cast<unsigned>(stage * code_stage_bytes);
          const unsigned char* const tiles =
              a.tiles + (static_cast<std::int64_t>(slab / 2) * a.row_tiles + p.row_tile) * a.tile_bytes;
          if (thread < kAtOnce * kChunks) {
            const unsigned char* const from = tiles + (part * 32 + slab % 2 * 16 + owner) * 16;
#pragma unroll
            for (int tile = 0; tile < kRowTiles; tile += kAtOnce) {
              detail::copy_16_bytes(to + place + static_cast<unsigned>(tile * Shape::kCodeBytes),
                                    from + min(tile + first, last) * a.tile_bytes);
            }
          } else if (thread >= 64) {
            for (int c = thread - 64; c < kRowTiles * scale_chunks; c += 32) {
              detail::copy_16_bytes(to + static_cast<unsigned>(kRowTiles * Shape::kCodeBytes + c * 16),
                                    tiles + min(c / scale_chunks, last) * a.tile_bytes +
                                        Shape::kRowBytes * 512 + slab % 2 * scale_bytes +
                                        c % scale_chunks * 16);
            }
          }
          detail::arrive_after_copies(full_codes(stage));
          if (++stage == a.code_stages) {
            stage = 0;
            phase ^= 1U;
          }
        }
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
    }
  } else {
    detail::take_registers<Groups == 2 ? 232 : 160>();
    using Fragments = detail::WgmmaFragments<Config, Type>;
    Fragments fragments;
    fragments.begin(table, a.code_bits, Config::kScaleSteps > 0 ? Config::kScaleSteps : a.scale_steps, lane);
    int table_part = -1;  // the first one is looked up while x and codes come
    const int tile_of_block = (group - 1) * 4 + warp;
    float* const scratch = reinterpret_cast<float*>(code_memory + a.code_stages * code_stage_bytes) +
                           tile_of_block * Shape::kScratchFloats;
    const detail::WarpgroupOutput output{
        static_cast<unsigned>(__cvta_generic_to_shared(scratch - warp * Shape::kScratchFloats)), group - 1};
    const detail::PieceSums<TokenTile> sums_of_pieces{a, cluster, rank, group - 1, x_memory};
    unsigned exchanges = 0;  // from the other block, of 16 tokens each
    const bool leader = threadIdx.x % 128 == 0;
    const unsigned other_empty = detail::address_in(empty_x(0), static_cast<unsigned>(rank ^ 1));
    // Without a branch, see keep_before().
    const auto release_x = [&](int stage, bool there) {
      detail::arrive_at_both(empty_x(stage), other_empty + static_cast<unsigned>(stage) * 8U,
                             leader && there);
    };
    StageRing<kStagesOfSlab, Shape::stages_fit(Gated)> ring;
    int code_stage = 0;
    unsigned code_phase = 0;
    float d[TokenTile / 2];
    const int count = __reduce_max_sync(0xFFFFFFFFU, pieces.size());
    for (int n = 0; n < count; ++n) {
      Piece p = open_piece(pieces.piece(a.schedule, n));
      p.slabs = __reduce_max_sync(0xFFFFFFFFU, p.slabs);  // of all the warp, which ptxas does not see
      if (p.part != table_part) {
        table_part = p.part;
        fragments.codebooks = codebooks_of(table_part);
        if constexpr (Config::kCodeBytes == 1) {
          if (n > 0) detail::wait_for_multipliers<Groups>();
          Table::fill(table, codebooks_of(table_part), a.code_bits, PairType::kHalf,
                      static_cast<int>(threadIdx.x) - 128, Shape::kMultipliers);
          detail::wait_for_multipliers<Groups>();
        }
      }
      if (n == 0) {
        detail::cluster_wait();
        detail::wait_for_previous_kernel();  // it may read what is written here
      }
      // The sums of the piece before are not the ones of this one, which ptxas does not see.
#pragma unroll
      for (int e = 0; e < TokenTile / 2; ++e) asm volatile("" : "=f"(d[e]));
      constexpr int kOfStage = 4 / kGroup;  // groups of a stage
      auto ring_before = ring;              // of the slab before
      unsigned weights[2][kGroup][4];
      typename Fragments::Pairs pairs[2][kGroup];
      typename Fragments::Codes fetched[2][kGroup];
      const char* codes = nullptr;
      const char* scales = nullptr;
      const auto open_codes = [&] {
        detail::wait_for_phase_together(full_codes(code_stage), code_phase);
        const char* const of_stage = code_memory + code_stage * code_stage_bytes;
        codes = of_stage + tile_of_block * Shape::kCodeBytes;
        scales = of_stage + kRowTiles * Shape::kCodeBytes + tile_of_block * scale_bytes;
      };
      const auto close_codes = [&] {
        detail::arrive(empty_codes(code_stage));  // this thread has read them
        if (++code_stage == a.code_stages) {
          code_stage = 0;
          code_phase ^= 1U;
        }
      };
      // Groups of a slab, of which every second one uses the same registers.
      const auto fetch = [&](int g) {
#pragma unroll
        for (int step = 0; step < kGroup; ++step)
          fragments.fetch(codes, scales, g * kGroup + step, fetched[g % 2][step]);
      };
      const auto lookup = [&](int g) {
#pragma unroll
        for (int step = 0; step < kGroup; ++step)
          fragments.lookup(fetched[g % 2][step], g * kGroup + step, pairs[g % 2][step]);
      };
      open_codes();
      fetch(0);
      fetch(1);
      lookup(0);
#pragma unroll 1
      for (int s = 0; s < p.slabs; ++s) {
        const bool goes_on = s + 1 < p.slabs;
        // What all threads have is put into registers of the warp.
        const unsigned place =
            __reduce_max_sync(0xFFFFFFFFU, static_cast<unsigned>(ring.first) | ring.first_phase << 8);
        auto here = ring;
        here.first = static_cast<int>(place & 255U);
        here.first_phase = place >> 8;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const int stage = g / kOfStage;
          if (g % 2 == 0) {
            if (g + 2 == kGroups && goes_on) {
              close_codes();
              open_codes();
            }
#pragma unroll
            for (int i = stage; i < stage + 2 / kOfStage; ++i)
              detail::wait_for_phase_together(full_x(here.stage(i, a.x_stages)), here.phase(i, a.x_stages));
          }
          fetch((g + 2) % kGroups);
          lookup((g + 1) % kGroups);
          detail::wgmma_wait<1>();  // the products of the group before the last are done
          if (kOfStage == 1 || g % 2 == 1) {
            const int done = (g - 2 + kGroups) % kGroups / kOfStage;
            release_x((g < 2 ? ring_before : here).stage(done, a.x_stages), s > 0 || g >= 2);
          }
#pragma unroll
          for (int step = 0; step < kGroup; ++step) {
            fragments.finish(pairs[g % 2][step], weights[g % 2][step]);
            detail::keep_before(weights[g % 2][step]);
          }
          const std::uint64_t tokens = detail::describe_tokens(
              x_at + static_cast<unsigned>(here.stage(stage, a.x_stages) * Shape::kStageBytes));
          detail::wgmma_fence();
#pragma unroll
          for (int step = 0; step < kGroup; ++step) {
            detail::wgmma<Type, TokenTile / 2>(
                d, weights[g % 2][step],
                tokens + static_cast<std::uint64_t>((g % kOfStage * kGroup + step) * 2),
                s > 0 || g > 0 || step > 0);
          }
          detail::wgmma_commit();
        }
        ring_before = here;
        ring.next_slab(a.x_stages);
      }
      close_codes();
      detail::wgmma_wait<0>();
      if (kOfStage == 1) release_x(ring_before.stage(kStagesOfSlab - 2, a.x_stages), true);
      release_x(ring_before.stage(kStagesOfSlab - 1, a.x_stages), true);

      int first_token = p.token;
      int end_token = a.tokens;
      if constexpr (Groups == 2) {
        if (a.schedule.even_pieces > 1 && p.slabs < a.schedule.slabs) {
          const int share = TokenTile / a.schedule.even_pieces;
          first_token += sums_of_pieces.share(d) * share;
          end_token = min(end_token, first_token + share);
        } else if (!p.ends) {
          sums_of_pieces.hand_over(d);
          continue;
        } else if (p.slab > 0) {
          sums_of_pieces.add(d, p.slab);
        }
      }

      if constexpr (!Gated) {
        const int first_row = (p.row_tile + (group - 1) * 4) * 16;
        if (detail::WarpgroupOutput::fits(a.out, first_row, p.end_tile * 16)) {
          if (a.out.type == ScalarType::kHalf)
            output.template store<PairType::kHalf>(a.out, first_row, first_token, end_token, d);
          else
            output.template store<PairType::kBFloat16>(a.out, first_row, first_token, end_token, d);
          continue;
        }
      }
      // Out by way of shared memory, 16 tokens at a time: half a tile's rows of a token a lane, which is a
      // sector for two lanes.
      const int row = (p.row_tile + tile_of_block) * 16 + lane % 2 * 8;
      const bool has_rows = p.row_tile + tile_of_block < p.end_tile;
      const float* const from = scratch + lane / 2 * Shape::kScratchStride + lane % 2 * 8;
      detail::EightRows rows;
      rows.load(a.out, row);
      // SwiGLU: of 32 tokens each block pushes its sums of 16 to its partner and then finishes the others.
      // There are two buffers for what comes: once the partner's next 16 are there, it has read those before
      // the last.
#pragma unroll 1
      for (int i = 0; i < TokenTile / 16; ++i) {
        if (first_token + (Gated ? i / 2 * 2 : i) * 16 >= end_token) break;
        const int n = Gated ? i / 2 * 2 + (i % 2 == 0 ? rank ^ 1 : rank) : i;
#pragma unroll
        for (int of = 0; of < TokenTile / 16; ++of) {
          if (of != n) continue;  // one piece of code for all: registers are chosen by branches
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            scratch[(e / 4 * 8 + fragments.q * 2 + e % 2) * Shape::kScratchStride + fragments.r +
                    e / 2 % 2 * 8] = d[of * 8 + e];
          }
        }
        __syncwarp();
        float sums[8];
        detail::load_eight(from, sums);
        const int token = first_token + n * 16 + lane / 2;
        int to_row = row;
        rows.finish(sums);
        if constexpr (Gated) {
          const unsigned of_two = exchanges & 1U;
          const unsigned arrived = from_other(tile_of_block, of_two);
          const float* const buffer =
              from + (1 + static_cast<int>(of_two)) * (kRowTiles * Shape::kScratchFloats);
          if (i % 2 == 0) {
            const auto other = static_cast<unsigned>(rank ^ 1);
            detail::push8(detail::address_in(static_cast<unsigned>(__cvta_generic_to_shared(buffer)), other),
                          sums, detail::address_in(arrived, other));
            __syncwarp();
            continue;
          }
          if (lane == 0) detail::arrive_and_expect(arrived, 16 * 16 * 4);
          detail::wait_for_cluster_phase(arrived, exchanges >> 1 & 1U);
          ++exchanges;
          float others[8];
          detail::load_eight(buffer, others);
          to_row -= rank * a.out.half_rows;
#pragma unroll
          for (int e = 0; e < 8; ++e)
            sums[e] = rank == 0 ? detail::swiglu(sums[e], others[e]) : detail::swiglu(others[e], sums[e]);
        }
        __syncwarp();
        if (token >= end_token || !has_rows) continue;
        rows.store(a.out, token, to_row, sums);
      }
    }
    if (count == 0) detail::cluster_wait();
  }
  detail::cluster_barrier();  // nobody's barriers go while the other block arrives at them
#endif
}

}  // namespace codegemm::cuda
