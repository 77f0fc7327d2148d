// SPDX-License-Identifier: Apache-2.0
//
// prefillshare/train/cuda/cache_forward.cuh - the forward pass of the training weights over a cache of rows
// on the GPU: what a frozen base makes, and what generates.
// Layer: train/cuda (host, needs nvcc and cuBLAS).
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <prefillshare/attention/rope.hpp>
#include <prefillshare/model/cuda/sampling.cuh>
#include <prefillshare/train/cuda/block.cuh>
#include <prefillshare/train/cuda/pass_graphs.cuh>

namespace prefillshare::cuda {

/// Keys (after RoPE) and values of rows of a cache on the device, [layers][rows][2][kv_heads * head_dim]; the
/// memory is somebody else's.
template <TrainStorage S>
struct DevicePrefixView {
  const S* data = nullptr;  ///< null where there are no rows
  std::int64_t rows = 0;    ///< of each layer

  /// Those of one layer; kv_size = kv_heads * head_dim.
  [[nodiscard]] detail::LayerPrefix<S> layer(std::int64_t i, std::int64_t kv_size) const {
    if (data == nullptr) return {};
    const S* const at = data + i * rows * 2 * kv_size;
    return {at, at + kv_size, 2 * kv_size};
  }
};

namespace detail {

/// cos and sin for every position, on the device.
struct DeviceRope {
  DeviceArray<float> cos;  // [positions][head_dim / 2]
  DeviceArray<float> sin;  // the same

  [[nodiscard]] static Result<DeviceRope> create(const RopeConfig& config, std::int64_t positions) {
    const Result<RopeTable> table = RopeTable::create(config, positions);
    if (!table.ok()) return table.status();
    const auto size = static_cast<std::size_t>(positions * (config.head_dim / 2));
    DeviceRope out;
    Allocations memory;
    memory.copy(out.cos, std::span<const float>(table->cos(0), size));
    memory.copy(out.sin, std::span<const float>(table->sin(0), size));
    if (Status s = memory.finish(); !s.ok()) return s;
    return out;
  }
};

/// The next tokens of a sequence whose keys and values lie at rows `row`, row + 1, ... of a cache.
struct CachedPiece {
  std::span<const std::int32_t> tokens;
  std::int32_t position = 0;  // of the first of them
  std::int32_t row = 0;       // of position 0
};

/// A cache to write to and read from: [layers][rows][2][kv_heads * head_dim].
template <class S>
struct CacheTarget {
  S* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t spare = 0;  // the first of CacheForward::padding() rows that nobody reads; 0: none
};

/// Runs tokens of many sequences over a cache, which holds what came before them.
template <class S>
class CacheForward {
 public:
  /// Passes of up to max_rows rows, positions up to max_context, logits of up to max_logits sequences (0:
  /// none).
  [[nodiscard]] static Result<CacheForward> create(const ModelConfig& c, std::int64_t max_rows,
                                                   std::int64_t max_context, std::int64_t max_logits,
                                                   const Device& device, cudaStream_t stream) {
    Result<TrainStream> ts = TrainStream::create(device, stream);
    if (!ts.ok()) return ts.status();
    Result<DeviceRope> rope = DeviceRope::create(c.rope, max_context);
    if (!rope.ok()) return rope.status();
    CacheForward out(*std::move(ts), c);
    out.max_rows_ = max_rows;
    out.max_context_ = max_context;
    out.stride_ = (c.vocab_size + 7) / 8 * 8;
    out.max_logits_ = max_logits;
    out.rope_ = *std::move(rope);
    const std::int64_t rows = padded_rows(max_rows);
    Allocations memory;
    for (DeviceArray<float>* x : {&out.x_, &out.mid_}) memory.make(*x, rows * c.hidden_size);
    for (DeviceArray<S>* x : {&out.normed_, &out.y_}) memory.make(*x, rows * c.hidden_size);
    memory.make(out.qkv_, rows * (c.q_size() + 2 * c.kv_size()));
    memory.make(out.attended_, rows * c.q_size());
    memory.make(out.both_, rows * 2 * c.intermediate_size);
    memory.make(out.act_, rows * c.intermediate_size);
    memory.make(out.logits_, max_logits * out.stride_);
    memory.zeros(out.best_, max_logits);
    memory.zeros(out.arrived_, max_logits);
    if (Status s = memory.finish(); !s.ok()) return s;
    // Tokens, positions, rows, segments and their tiles, and the last rows.
    const std::int64_t segments = padded_segments(rows + 1);
    const std::int64_t tiles =
        AttentionTiles::most(rows * (c.heads / c.kv_heads), segments) + AttentionTiles::most(rows, segments);
    if (Status s = out.input_.allocate(5 * rows + 4 * segments + 2 * tiles); !s.ok()) return s;
    return out;
  }

  [[nodiscard]] const ModelConfig& config() const noexcept { return c_; }
  [[nodiscard]] TrainStream& train_stream() noexcept { return ts_; }
  [[nodiscard]] std::int64_t max_rows() const noexcept { return max_rows_; }

  /// As DeviceTrainer's.
  void use_graphs(bool on) noexcept { graphs_.enable(on); }

  /// Rows of padding of a pass, at most.
  [[nodiscard]] std::int64_t padding() const noexcept { return padding_step(max_rows_, kStep); }
  /// A cache of at least so many rows and padding() spare ones behind them; what it held is lost if it grows.
  [[nodiscard]] Result<CacheTarget<S>> reserve(DeviceArray<S>& cache, std::int64_t rows) {
    const std::int64_t width = c_.layers * 2 * c_.kv_size();
    const std::int64_t needed = rows + padding();
    if (static_cast<std::int64_t>(cache.size()) < needed * width) {
      ts_.synchronize();  // a pass may still read the old one
      if (Status s = ts_.take(); !s.ok()) return s;
      cache = {};
      Allocations memory;
      memory.make(cache, (needed + needed / 4) * width);
      if (Status s = memory.finish(); !s.ok()) return s;
    }
    const std::int64_t all = static_cast<std::int64_t>(cache.size()) / width;
    return CacheTarget<S>{cache.data(), all, all - padding()};
  }

  /// Whole pieces, as many a pass as fit, without logits; passes of sizes that come again are graphs.
  [[nodiscard]] Status run_in_passes(const DeviceWeightsView<S>& w, std::span<const CachedPiece> pieces,
                                     CacheTarget<S> cache) {
    return in_passes(pieces, max_rows_, [&](std::span<const CachedPiece> some) {
      return run(w, some, cache, nullptr, nullptr);
    });
  }
  /// body(pieces) -> Status for runs of pieces that fit into a pass together.
  template <class Body>
  [[nodiscard]] Status in_passes(std::span<const CachedPiece> pieces, std::int64_t most, Body&& body) {
    for (std::size_t first = 0; first < pieces.size();) {
      std::size_t end = first;
      std::int64_t count = 0;
      while (end < pieces.size() && count + std::ssize(pieces[end].tokens) <= max_rows_ &&
             static_cast<std::int64_t>(end - first) < most)
        count += std::ssize(pieces[end++].tokens);
      if (end == first) {
        return codegemm::error(StatusCode::kInvalidArgument, "a sequence of ", pieces[end].tokens.size(),
                               " tokens, a pass has ", max_rows_);
      }
      if (Status s = body(pieces.subspan(first, end - first)); !s.ok()) return s;
      first = end;
    }
    return {};
  }

  /// KV of the pieces' tokens to the cache. With `chosen` (device, [pieces]) the largest logit's id behind
  /// each piece's last token goes there. `tokens` (device), where given, are the pieces' tokens in place of
  /// theirs. kInvalidArgument for a token outside of the vocabulary, kCudaError.
  [[nodiscard]] Status run(const DeviceWeightsView<S>& w, std::span<const CachedPiece> pieces,
                           CacheTarget<S> cache, std::int32_t* chosen, const std::int32_t* tokens) {
    if (Status s = send(pieces, tokens, chosen == nullptr ? cache.spare : 0); !s.ok()) return s;
    if (rows_.rows == 0) return {};
    const auto body = [&] { launch(w, std::ssize(pieces), cache, chosen); };
    if (chosen != nullptr || cache.spare == 0) {
      body();
    } else {
      const auto number = [](const auto& value) { return reinterpret_cast<std::uintptr_t>(value); };
      ts_.bind();
      graphs_.run(
          ts_,
          {static_cast<std::uintptr_t>(rows_.rows), segments_.size(), number(cache.data),
           static_cast<std::uintptr_t>(cache.rows), number(w.matrices), number(w.vectors), number(w.biases)},
          body);
    }
    return ts_.take();
  }

 private:
  static constexpr std::int64_t kStep = 64;  // rows of a segment of padding, at most

  CacheForward(TrainStream ts, const ModelConfig& c) : ts_(std::move(ts)), c_(c) {}

  [[nodiscard]] static std::int64_t padded_rows(std::int64_t rows) { return padded_size(rows, kStep); }
  [[nodiscard]] static std::int64_t padded_segments(std::int64_t segments) {
    return padded_size(segments, 16);
  }

  void launch(const DeviceWeightsView<S>& w, std::int64_t pieces, const CacheTarget<S>& cache,
              std::int32_t* chosen) {
    EmbedArgs embed;
    embed.tokens = tokens_on_device_;
    embed.table = w.embedding();
    embed.out = x_.data();
    embed.width = static_cast<int>(c_.hidden_size);
    embed.vocab = static_cast<int>(c_.vocab_size);
    ts_.start(embed_kernel<S>, embed, rows_.rows, kEmbedThreads);
    BlockLaunches<S> launches(ts_, c_, rows_);
    BlockScratch<S> scratch;
    scratch.y = y_.data();
    BlockActivations<S> a;
    a.x = x_.data();
    a.mid = mid_.data();
    a.normed = a.normed2 = normed_.data();
    a.raw = a.qkv = qkv_.data();
    a.attended = attended_.data();
    a.both = both_.data();
    a.act = act_.data();
    a.kv_stride = 2 * c_.kv_size();
    for (std::int64_t i = 0; i < c_.layers; ++i) {
      const DeviceBlockWeights<S> block = w.block(i);
      a.keys = cache.data + i * cache.rows * 2 * c_.kv_size();
      a.values = a.keys + c_.kv_size();
      if (i == 0) {
        launches.norm(a.x, nullptr, nullptr, block.input_norm, a.normed);
      } else {
        launches.norm(a.mid, scratch.y, a.x, block.input_norm, a.normed);
      }
      launches.project(block, a);
      if (i + 1 == c_.layers && chosen == nullptr) break;
      launches.finish(block, a, scratch, {a.keys, a.values, a.kv_stride});
    }
    if (chosen != nullptr) choose(w, pieces, chosen, launches);
  }

  /// With `spare` rows of the cache behind the others, sizes are padded to those that few passes differ in.
  [[nodiscard]] Status send(std::span<const CachedPiece> pieces, const std::int32_t* tokens,
                            std::int64_t spare) {
    tokens_.clear();
    positions_.clear();
    kv_rows_.clear();
    last_rows_.clear();
    segments_.clear();
    for (const CachedPiece& p : pieces) {
      if (p.tokens.empty()) continue;
      const auto count = static_cast<std::int32_t>(p.tokens.size());
      segments_.push_back({static_cast<std::int32_t>(positions_.size()), count, p.position, p.row});
      for (std::int32_t i = 0; i < count; ++i) {
        positions_.push_back(p.position + i);
        kv_rows_.push_back(p.row + p.position + i);
      }
      last_rows_.push_back(static_cast<std::int32_t>(positions_.size()) - 1);
      if (tokens != nullptr) continue;
      for (const std::int32_t id : p.tokens) {
        if (id >= 0 && id < c_.vocab_size) continue;
        return codegemm::error(StatusCode::kInvalidArgument, "token ", id, ", the vocabulary has ",
                               c_.vocab_size);
      }
      tokens_.insert(tokens_.end(), p.tokens.begin(), p.tokens.end());
    }
    const std::int64_t filled = std::ssize(positions_);
    CODEGEMM_ASSERT(filled <= max_rows_);
    rows_.rows = filled;
    if (filled == 0) return {};
    const bool pads = spare > 0 && tokens == nullptr;
    if (pads) {
      rows_.rows = padded_rows(filled);
      const std::int64_t most = std::min(kStep, max_context_);
      for (std::int64_t at = filled; at < rows_.rows;) {
        const auto count = static_cast<std::int32_t>(std::min(most, rows_.rows - at));
        const auto row = static_cast<std::int32_t>(spare + at - filled);
        segments_.push_back({static_cast<std::int32_t>(at), count, 0, row});
        for (std::int32_t i = 0; i < count; ++i) {
          positions_.push_back(i);
          kv_rows_.push_back(row + i);
          tokens_.push_back(0);
        }
        at += count;
      }
    }
    tiles_.assign(segments_, c_.heads / c_.kv_heads);
    if (pads) {
      const std::int64_t segments = padded_segments(std::ssize(segments_));
      tiles_.pad(rows_.rows, c_.heads / c_.kv_heads, segments);
      segments_.resize(static_cast<std::size_t>(segments));
    }
    if (Status s = input_.begin(); !s.ok()) return s;
    using Ints = std::span<const std::int32_t>;
    tokens_on_device_ = tokens != nullptr ? tokens : input_.add(Ints(tokens_));
    rows_.positions = input_.add(Ints(positions_));
    rows_.kv_rows = input_.add(Ints(kv_rows_));
    rows_.cos = rope_.cos.data();
    rows_.sin = rope_.sin.data();
    rows_.tiles.segments = input_.add(std::span<const DeviceSegment>(segments_));
    rows_.tiles.segment_of = input_.add(Ints(tiles_.segment_of));
    rows_.tiles.queries = input_.add(Ints(tiles_.queries));
    rows_.tiles.query_tiles = std::ssize(tiles_.queries) / 2;
    last_rows_on_device_ = input_.add(Ints(last_rows_));
    return input_.send(ts_.stream());
  }

  void choose(const DeviceWeightsView<S>& w, std::int64_t count, std::int32_t* chosen,
              BlockLaunches<S>& launches) {
    CODEGEMM_ASSERT(count <= max_logits_);
    launches.norm(mid_.data(), y_.data(), x_.data(), nullptr, nullptr);
    NormArgs norm;
    norm.x = x_.data();
    norm.chosen = last_rows_on_device_;
    norm.weight = w.final_norm();
    norm.out = normed_.data();
    norm.rows = count;
    launches.norm(norm);
    ts_.nt(normed_.data(), w.head(), logits_.data(), count, c_.vocab_size, c_.hidden_size, stride_);
    DeviceSampling largest;
    largest.best = best_.data();
    largest.arrived = arrived_.data();
    const MatrixView<const float> logits(logits_.data(), count, c_.vocab_size, stride_);
    if (ts_.ok()) ts_.keep(sample(logits, largest, chosen, ts_.device(), ts_.stream()));
  }

  TrainStream ts_;
  ModelConfig c_;
  std::int64_t max_rows_ = 0;
  std::int64_t max_context_ = 0;
  std::int64_t max_logits_ = 0;
  std::int64_t stride_ = 0;  // of logits
  DeviceRope rope_;
  PassInput input_;
  PassGraphs graphs_;
  std::vector<std::int32_t> tokens_, positions_, kv_rows_, last_rows_;
  std::vector<DeviceSegment> segments_;
  AttentionTiles tiles_;
  DeviceRows rows_;
  const std::int32_t* tokens_on_device_ = nullptr;
  const std::int32_t* last_rows_on_device_ = nullptr;
  DeviceArray<float> x_, mid_;  // [rows][hidden]
  DeviceArray<S> normed_, y_;   // [rows][hidden]
  DeviceArray<S> qkv_, attended_, both_, act_;
  DeviceArray<float> logits_;  // [max_logits][stride]
  DeviceArray<std::uint64_t> best_;
  DeviceArray<unsigned> arrived_;
};

}  // namespace detail
}  // namespace prefillshare::cuda
